"""What observers see of jobs, on both transports: metrics, traces and logs from the sender to the last attempt."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.baggage import get_all, set_baggage
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags

from rpcq import Client, Context, GiveUp, Retry, RetryLater, SendError, Service
from rpcq.jobs import outcomes
from rpcq.jobs.letters import read_letter, replay_of
from rpcq.observability.calls import CallLogs
from rpcq.observability.tracing import Tracing
from rpcq.observer import ObservedJob, ObservedSend, Observer
from rpcq.options import MAX_HEADERS
from rpcq.results import MemoryResults
from rpcq.transport.base import Message, Published
from rpcq.wire.events import EventTopology
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.properties import Properties, encode
from support.letters import letters
from support.load import until
from support.observed import Scraped, Spans
from support.places import Place, lose

SOON = Retry(max_attempts=3, initial_backoff=0.01, max_backoff=0.01)


async def publish(client: Client, home: Place, service: str, properties: bytes, body: bytes) -> None:
    """Publish a message to the exchange for jobs, as any program may."""
    confirmed = asyncio.get_running_loop().create_future()
    exchange = JobTopology(home.namespace).jobs
    await client._transport.declare([exchange])
    message = Message(exchange.name.encode(), service.encode(), b"c", properties, body, confirmed.set_result)
    client._transport.publish(message)
    assert await confirmed is Published.CONFIRMED


# Metrics.


def ends(scraped: Scraped, service: Service) -> dict[tuple[str, ...], float]:
    """How attempts ended: job, outcome and reason."""
    found = scraped.all("rpcq_worker_jobs_ended_total")
    assert {it[0] for it in found} <= {service.name}
    return {it[1:]: count for it, count in found.items()}


async def test_each_attempt_is_counted_once_by_what_became_of_it(
    home: Place, service: Service, scraped: Scraped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "UNKNOWN_PAUSES", (0.25,))
    go_on = asyncio.Event()

    @service.job
    async def work(x: int) -> None: ...

    @service.job
    async def holds() -> None:
        await go_on.wait()

    @service.job(retry=SOON)
    async def fails() -> None:
        raise ValueError("text")

    @service.job(retry=SOON)
    async def later(context: Context) -> None:
        if context.attempt == 1:
            raise RetryLater(0.01)
        raise GiveUp("bounced")

    @service.job(retry=SOON, timeout=0.02)
    async def hangs() -> None:
        await asyncio.Event().wait()

    observers = [scraped.metrics]
    async with home.client(observers=observers) as client, home.worker(service, observers=observers, max_body=500):
        await client.send_many(work, [{"x": number} for number in range(20)])
        await client.send(f"{service.name}.work", x="no number")
        await client.send(f"{service.name}.work", x="x" * 1000)  # over the worker's limit
        await client.send(f"{service.name}.unheard_of")
        for job in (fails, later, hangs, holds):
            await client.send(job)
        expected = {
            ("work", "done", ""): 20,
            ("work", "dead", "invalid"): 1,
            ("", "dead", "rejected"): 1,
            ("", "retried", "unknown_method"): 1,
            ("", "dead", "unknown_method"): 1,
            ("fails", "retried", "failed"): 2,
            ("fails", "dead", "attempts"): 1,
            ("later", "retried", "retry_later"): 1,
            ("later", "dead", "gave_up"): 1,
            ("hangs", "retried", "timed_out"): 2,
            ("hangs", "dead", "attempts"): 1,
        }
        await until(lambda: ends(scraped, service) == expected)
        await until(lambda: scraped("rpcq_worker_jobs_in_hand") == 1)
        assert scraped("rpcq_worker_jobs_in_flight", service=service.name, method="holds") == 1
        assert scraped("rpcq_worker_requests_in_hand") == 0
        go_on.set()
        await until(lambda: scraped("rpcq_worker_jobs_in_hand") == 0)
    started = {"work": 20, "fails": 3, "later": 2, "hangs": 3, "holds": 1}
    of_service = {(service.name, name): count for name, count in started.items()}
    assert {key: n for key, n in scraped.all("rpcq_worker_jobs_started_total").items() if n} == of_service
    assert scraped.all("rpcq_worker_job_duration_seconds_count") == of_service
    first = {key: 1 if key[1] != "work" else 20 for key in of_service}  # the pause of a retry is no time in a queue
    assert scraped.all("rpcq_worker_job_queue_wait_seconds_count") == first
    assert set(scraped.all("rpcq_worker_jobs_in_flight").values()) == {0}
    sent = {"work": 22, "unheard_of": 1, "fails": 1, "later": 1, "hangs": 1, "holds": 1}
    by_name = {(service.name, name, "yes"): count for name, count in sent.items()}
    assert scraped.all("rpcq_client_jobs_sent_total") == by_name
    assert scraped("rpcq_client_job_send_duration_seconds_count", service=service.name, method="work") == 22


class Seen(Observer):
    """Keeps all that it is called with at the end."""

    def __init__(self) -> None:
        self.sends: list[ObservedSend] = []
        self.jobs: list[ObservedJob] = []

    def on_send(self, send: ObservedSend) -> Callable[[ObservedSend], None]:
        return self.sends.append

    def on_job(self, job: ObservedJob) -> Callable[[ObservedJob], None]:
        return self.jobs.append


async def test_a_send_says_whether_the_broker_has_the_job(home: Place, service: Service) -> None:
    @service.job
    async def work() -> None: ...

    seen = Seen()
    async with home.client(observers=[seen]) as client, home.worker(service):
        job = await client.send(work)
        with pytest.raises(SendError):
            await client.send("nobody.work")
        client._transport.publish = lambda _: None  # type: ignore[method-assign]  # the confirmation never comes
        with pytest.raises(SendError):
            await client.with_options(timeout=0.1).send(work)
        sending = asyncio.create_task(client.send_many(work, [{}, {}]))
        await until(lambda: client._confirms._under_way)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    found = [(send.label, send.queued, send.code) for send in seen.sends]
    name = f"{service.name}.work"
    assert found == [
        (name, "yes", "OK"),
        ("nobody.work", "no", "FAILED_PRECONDITION"),
        (name, "maybe", "FAILED_PRECONDITION"),
        (name, "maybe", "CANCELLED"),
        (name, "maybe", "CANCELLED"),
    ]
    assert (seen.sends[0].correlation_id, seen.sends[0].error) == (job.id, None)
    assert isinstance(seen.sends[1].error, SendError)


async def test_what_was_never_handed_to_the_broker_is_not_there(home: Place, service: Service) -> None:
    @service.job
    async def work() -> None: ...

    async def never() -> None:
        await asyncio.Event().wait()

    seen = Seen()
    async with home.client(observers=[seen]) as client, home.worker(service):
        await client.send(work)
        transport: Any = client._transport
        client._confirms._waiting._is_ready = lambda: False
        client._confirms._waiting._ready = never
        client._confirms._waiting.add(object())  # type: ignore[arg-type]  # something waits for a connection already
        assert transport.can_publish
        sending = asyncio.create_task(client.send(work))
        await until(lambda: len(client._confirms._waiting) == 2)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        client._confirms._waiting.clear()
        client._jobs._now.task, client._jobs._now.is_there = None, False
        client._transport.declare = lambda _: never()  # type: ignore[method-assign]  # no connection
        with pytest.raises(SendError, match="there was no connection"):
            await client.with_options(timeout=0.05).send(work)
    assert [(send.queued, send.code) for send in seen.sends[1:]] == [
        ("no", "CANCELLED"),
        ("no", "FAILED_PRECONDITION"),
    ]


async def test_the_time_in_the_queue_is_known_for_what_only_waited(home: Place, service: Service) -> None:
    seen = Seen()

    @service.job
    async def work() -> None: ...

    now = time.time()
    first = {"rpcq-first-sent": round((now - 100) * 1000)}

    def message(job_id: bytes, published: float, **headers: Any) -> bytes:
        found = Properties(message_id=job_id, type=b"work", timestamp=int(published), headers={**first, **headers})
        return encode(found)

    async with home.client() as client, home.worker(service, observers=[seen]):
        await publish(client, home, service.name, message(b"waited", now - 100), b"{}")
        await publish(client, home, service.name, message(b"replayed", now), b"{}")
        await publish(client, home, service.name, message(b"retried", now - 100, **{"rpcq-attempt": 2}), b"{}")
        await publish(client, home, service.name, encode(Properties(message_id=b"foreign", type=b"work")), b"{}")
        await until(lambda: len(seen.jobs) == 4)
    waits = {job.correlation_id: job.queue_seconds for job in seen.jobs}
    assert waits.pop("waited") == pytest.approx(100, abs=50)
    assert waits == {"replayed": None, "retried": None, "foreign": None}


async def test_what_does_not_run_is_put_off_or_suppressed(home: Place, service: Service) -> None:
    seen, go_on = Seen(), asyncio.Event()

    @service.job
    async def work() -> None:
        await go_on.wait()

    async with home.client() as client, home.worker(service, observers=[seen]):
        maker = client.with_options(idempotency_key="k")
        await maker.send(work)
        await maker.send(work)  # while the first one runs
        await until(lambda: seen.jobs)
        go_on.set()
        await until(lambda: len(seen.jobs) == 2)
        await maker.send(work)
        await until(lambda: len(seen.jobs) == 3)
    assert [(job.outcome, job.code, job.ran) for job in seen.jobs] == [
        ("put_off", "key_held", False),
        ("done", "OK", True),
        ("suppressed", "done_already", False),
    ]


async def test_a_handler_behind_a_store_of_results_is_seen_when_it_is_entered(home: Place) -> None:
    seen = Seen()
    service = Service(f"s{secrets.token_hex(6)}", result_store=MemoryResults(1_000_000))

    @service.job
    async def work() -> None: ...

    async with home.client() as client, home.worker(service, observers=[seen]):
        maker = client.with_options(idempotency_key="k")
        await maker.send(work)
        await until(lambda: seen.jobs)
        await maker.send(work)
        await until(lambda: len(seen.jobs) == 2)
    assert [(job.outcome, job.code, job.ran) for job in seen.jobs] == [
        ("done", "OK", True),
        ("suppressed", "done_already", False),
    ]


async def test_what_a_stopping_worker_cuts_off_is_given_back(home: Place, service: Service) -> None:
    seen = Seen()
    began = asyncio.Event()

    @service.job
    async def work() -> None:
        began.set()
        await asyncio.Event().wait()

    async with home.client() as client:
        async with home.worker(service, observers=[seen], grace=0.05):
            await client.send(work)
            await began.wait()
        (job,) = seen.jobs
    assert (job.outcome, job.code, job.ran) == ("given_back", "stopped", True)


async def test_a_thread_that_outlasts_its_timeout_has_one_end(home: Place, service: Service) -> None:
    seen = Seen()
    go_on, began = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    @service.job(retry=SOON, timeout=0.05)
    def slow() -> None:
        loop.call_soon_threadsafe(began.set)
        assert go_on.wait(30)

    async with home.client() as client, home.worker(service, observers=[seen]) as worker:
        await client.send(slow)
        await began.wait()
        await until(lambda: any(run.ran_on for run in worker._jobs or ()))
        assert not seen.jobs
        go_on.set()
        await until(lambda: seen.jobs)
    assert [(job.outcome, job.ran) for job in seen.jobs] == [("done", True)]


# Traces.


def attempts(spans: Spans) -> list[ReadableSpan]:
    """The spans of attempts, in the order in which they ended."""
    return [span for span in spans[1].get_finished_spans() if span.kind is SpanKind.CONSUMER]


def sent(spans: Spans) -> ReadableSpan:
    (span,) = [span for span in spans[1].get_finished_spans() if span.kind is SpanKind.PRODUCER]
    return span


def assert_linked(spans: Spans) -> None:
    """Each attempt has a trace of its own, and a link to the sender's span."""
    sender, found = sent(spans), attempts(spans)
    for span in found:
        assert span.parent is None
        (link,) = span.links
        assert (link.context.trace_id, link.context.span_id) == (sender.context.trace_id, sender.context.span_id)
    assert len({span.context.trace_id for span in (sender, *found)}) == 1 + len(found)


async def test_each_attempt_is_a_span_with_a_link_to_that_of_the_sender(
    home: Place, service: Service, spans: Spans
) -> None:
    tracing = Tracing(tracer_provider=spans[0])
    baggage = []

    @service.job(retry=SOON)
    async def flaky(context: Context) -> None:
        baggage.append(dict(get_all()))
        trace.get_current_span().set_attribute("inside", context.attempt)
        if context.attempt < 3:
            raise ValueError("not for everybody")

    async with home.client(observers=[tracing], name="shop") as client, home.worker(service, observers=[tracing]):
        token = attach(set_baggage("tenant", "a b"))
        try:
            job = await client.send(flaky)
        finally:
            detach(token)
        await until(lambda: len(attempts(spans)) == 3)
    assert_linked(spans)
    sender, found = sent(spans), attempts(spans)
    label = f"{service.name}.flaky"
    assert [span.name for span in (sender, *found)] == [f"send {label}", *[f"process {label}"] * 3]
    for span, operation in ((sender, "send"), (found[0], "process")):
        assert span.attributes["messaging.operation.type"] == operation
        assert span.attributes["messaging.message.id"] == job.id
        assert span.attributes["messaging.destination.name"] == f"{home.namespace}.jobs:{service.name}"
        assert span.attributes["messaging.message.body.size"] == 2
    assert sender.attributes["rpcq.queued"] == "yes"
    assert [span.attributes["inside"] for span in found] == [1, 2, 3]
    assert [span.attributes.get("rpcq.attempt") for span in found] == [None, 2, 3]
    assert [span.attributes["rpcq.outcome"] for span in found] == ["retried", "retried", "done"]
    assert [span.attributes.get("error.type") for span in found] == ["failed", "failed", None]
    assert [span.status.is_ok for span in found[:2]] == [False, False]
    assert {span.attributes["messaging.client.id"] for span in found} == {"shop"}
    assert len(found[0].attributes["rpcq.incident"]) == 12
    assert "not for everybody" not in "".join(span.to_json() for span in found)
    assert baggage == [{"tenant": "a b"}] * 3


async def test_the_trace_is_kept_in_a_dead_letter_and_its_replay(home: Place, service: Service, spans: Spans) -> None:
    tracing = Tracing(tracer_provider=spans[0])
    topology = JobTopology(home.namespace)
    runs = []

    @service.job
    async def work() -> None:
        runs.append(1)
        if len(runs) == 1:
            raise GiveUp("not today")

    async with home.client(observers=[tracing]) as client, home.worker(service, observers=[tracing]):
        await client.send(work)
        async with letters(home.url, topology.dead_queue(service.name)) as dead:
            (found,) = await dead.wait_for(1)
        key = topology.address(service.name).encode()
        events = EventTopology(home.namespace)
        letter = read_letter(events, topology.dead.name.encode(), key, encode(found.properties), found.body)
        replay = replay_of(events, letter, None, round(time.time() * 1000))
        assert not isinstance(replay, str)
        await publish(client, home, service.name, replay.properties, replay.body)
        await until(lambda: len(attempts(spans)) == 2)
    assert_linked(spans)
    assert [span.attributes["rpcq.outcome"] for span in attempts(spans)] == ["dead", "done"]
    assert attempts(spans)[0].attributes["rpcq.reason"] == "gave_up"


@pytest.mark.parametrize("home", ["memory", pytest.param("rabbitmq", marks=pytest.mark.long)], indirect=True)
async def test_the_trace_of_a_suspect_is_kept(home: Place, service: Service, spans: Spans) -> None:
    tracing = Tracing(tracer_provider=spans[0])
    began: asyncio.Queue[None] = asyncio.Queue()
    lost = 0

    @service.job
    async def work() -> None:
        began.put_nowait(None)
        if lost < 2:
            await asyncio.Event().wait()

    async with home.client(observers=[tracing]) as client:
        async with home.worker(service):
            pass  # it declares the queue
        await client.send(work)
        while lost < 2:
            worker = home.worker(service, grace=0.05)
            await worker.start()
            await began.get()
            await lose(worker)
            lost += 1
        async with home.worker(service, observers=[tracing]):
            await began.get()
            await until(lambda: len(attempts(spans)) == 2)
    assert_linked(spans)
    suspect, done = attempts(spans)
    assert (suspect.attributes["rpcq.outcome"], suspect.attributes["rpcq.reason"]) == ("suspect", "workers_lost")
    assert suspect.status.is_unset
    assert done.attributes["rpcq.outcome"] == "done"


async def test_inside_a_trace_that_is_not_sampled_nothing_of_a_job_is_traced(
    home: Place, service: Service, spans: Spans
) -> None:
    tracing = Tracing(tracer_provider=spans[0])
    done = asyncio.Event()
    inner = home.client(observers=[tracing])

    @service.job
    async def second() -> None:
        done.set()

    @service.job
    async def first() -> None:
        await inner.send(second)

    unsampled = SpanContext(trace_id=1, span_id=2, is_remote=False, trace_flags=TraceFlags(0))
    async with inner, home.client(observers=[tracing]) as client, home.worker(service, observers=[tracing]):
        token = attach(trace.set_span_in_context(NonRecordingSpan(unsampled)))
        try:
            await client.send(first)
        finally:
            detach(token)
        await done.wait()
    assert spans[1].get_finished_spans() == ()


async def test_both_ends_pick_the_same_share_of_jobs_and_nested_ones_go_by_the_outermost(
    home: Place, service: Service, spans: Spans
) -> None:
    tracing = Tracing(0.3, spans[0])
    inner, done = home.client(observers=[tracing]), []

    @service.job
    async def second(of: str) -> None:
        done.append(of)

    @service.job
    async def first(context: Context) -> None:
        await inner.send(second, of=context.correlation_id)

    async with inner, home.client(observers=[tracing]) as client, home.worker(service, observers=[tracing]):
        await client.send_many(first, [{} for _ in range(100)])
        await until(lambda: len(done) == 100)
    names = [span.name.replace(f"{service.name}.", "") for span in spans[1].get_finished_spans()]
    assert 5 < len(names) / 4 < 70
    counts = {name: names.count(name) for name in set(names)}
    assert set(counts) == {"send first", "process first", "send second", "process second"}
    assert len(set(counts.values())) == 1


async def test_a_context_that_has_no_room_beside_the_metadata_is_left_out(
    home: Place, service: Service, spans: Spans
) -> None:
    tracing = Tracing(tracer_provider=spans[0])

    @service.job
    async def work() -> None: ...

    async with home.client(observers=[tracing]) as client, home.worker(service, observers=[tracing]):
        await client.with_options(metadata={"x-full": "m" * (MAX_HEADERS - 60)}).send(work)
        await until(lambda: len(attempts(spans)) == 1)
    assert attempts(spans)[0].links == ()


# Logs.


async def test_every_line_about_a_job_has_its_name_its_id_and_its_attempt(
    home: Place, service: Service, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    mine = logging.getLogger("mine")

    @service.job(retry=SOON)
    async def loop(secret: str, context: Context) -> None:
        mine.info("in the loop")
        if context.attempt == 1:
            raise ValueError("not yet")
        if context.attempt == 2:
            raise RetryLater(0.01)
        raise GiveUp("no more")

    @service.job
    def thread() -> None:
        mine.info("in a thread")

    observers = [CallLogs()]
    async with home.client(observers=observers) as client, home.worker(service, observers=observers) as worker:
        job = await client.with_options(metadata={"x-tenant": "private"}).send(f"{service.name}.loop", secret="s3cr3t")
        await until(lambda: sum(line["event"] == "job ended" for line in lines()) == 3)
        other = await client.send(thread)
        await until(lambda: sum(line["event"] == "job ended" for line in lines()) == 4)
        await until(lambda: not worker.in_flight)
    loggers = ("rpcq.worker", "rpcq.worker.calls", "rpcq.client.calls", "mine")
    found = [line for line in lines() if line["logger"] in loggers and not line["event"].startswith("worker ")]
    assert {(line["job"], line["job_id"]) for line in found} == {
        (f"{service.name}.loop", job.id),
        (f"{service.name}.thread", other.id),
    }
    events = [(line["event"], line.get("attempt")) for line in found if line["event"] != "job sent"]
    assert events == [
        ("job started", 1),
        ("in the loop", 1),
        ("job failed", 1),
        ("job ended", 1),
        ("job runs again later", 1),
        ("job started", 2),
        ("in the loop", 2),
        ("job ended", 2),
        ("job runs again later", 2),
        ("job started", 3),
        ("in the loop", 3),
        ("job ended", 3),
        ("job is dead", 3),
        ("job started", 1),
        ("in a thread", 1),
        ("job ended", 1),
    ]
    incidents = [line["incident"] for line in found if "incident" in line]
    assert len(incidents) == 2
    assert len(set(incidents)) == 1
    assert "s3cr3t" not in str(found)
    assert "private" not in str(found)


async def test_a_line_about_a_job_that_a_handler_sends_has_nothing_of_its_own_job(
    home: Place, service: Service, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    inner = home.client(observers=[CallLogs()])
    done = asyncio.Event()

    @service.job
    async def second() -> None:
        done.set()

    @service.job
    async def first() -> None:
        await inner.send(second)

    async with inner, home.client() as client, home.worker(service):
        job = await client.send(first)
        await done.wait()
        await until(lambda: any(line["event"] == "job sent" for line in lines()))
    (line,) = [line for line in lines() if line["event"] == "job sent"]
    assert line["job"] == f"{service.name}.second"
    assert line["job_id"] != job.id
    assert "attempt" not in line
