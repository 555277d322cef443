"""Jobs, on both transports: sent, done, retried, buried.

The services of one broker share a namespace: each namespace has a ladder of its own, of 24 queues.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

import pytest

from rpcq import (
    Client,
    Context,
    GiveUp,
    InvalidParams,
    JobInfo,
    MethodNotFound,
    Retry,
    RetryLater,
    SendError,
    Service,
    UsageError,
    contract,
)
from rpcq.jobs import outcomes
from rpcq.transport.base import Message, Published
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.properties import Properties, encode
from support.jobs import Done, dead_queue, settled
from support.letters import letters
from support.load import READY, first
from support.places import Place, lose

SOON = Retry(max_attempts=3, initial_backoff=0.01, max_backoff=0.01)


async def test_a_job_is_done_by_whoever_serves_it_and_its_function_is_an_ordinary_one(
    home: Place, service: Service, done: Done
) -> None:
    @service.job
    async def welcome(to: str, name: str = "you") -> None:
        done.note((to, name))

    async with home.client() as client, home.worker(service) as worker:
        by_function = await client.send(welcome, to="ada", name="Ada")
        by_name = await client.send(f"{service.name}.welcome", to="bob")
        await done.until(lambda counts: counts.total() == 2)
        await settled(worker)
    assert done.counts == {("ada", "Ada"): 1, ("bob", "you"): 1}
    assert (by_function.service, by_function.name) == (service.name, "welcome")
    assert by_function.id != by_name.id
    await welcome("cy")
    assert done.counts[("cy", "you")] == 1


async def test_a_job_waits_for_its_worker(home: Place, service: Service, done: Done) -> None:
    loop = asyncio.get_running_loop()

    @service.job
    def count(number: int) -> None:
        loop.call_soon_threadsafe(done.note, number)

    async with home.client() as client:
        async with home.worker(service):
            pass  # it declares the queue
        sent = await client.send_many(count, [{"number": number} for number in range(50)])
        assert len({job.id for job in sent}) == 50
        async with home.worker(service) as worker:
            await settled(worker)
            await done.until(lambda counts: counts.total() == 50)
    assert set(done.counts.values()) == {1}


async def test_a_handler_knows_its_job(home: Place, service: Service) -> None:
    got: asyncio.Queue[Context] = asyncio.Queue()

    @service.job
    async def look(context: Context) -> None:
        await got.put(context)

    async with home.client(name="shop") as client, home.worker(service):
        maker = client.with_options(idempotency_key="k-7", metadata={"x-tenant": "t1"})
        job = await maker.send(look)
        context = await got.get()
    assert (context.correlation_id, context.idempotency_key, context.attempt) == (job.id, "k-7", 1)
    assert (context.caller, context.metadata, context.method) == ("shop", {"x-tenant": "t1"}, "look")


async def test_what_fails_runs_again_with_a_pause_that_the_broker_holds(
    home: Place, service: Service, done: Done
) -> None:
    attempts: list[tuple[int, bool]] = []

    @service.job(retry=SOON)
    async def flaky(context: Context) -> None:
        attempts.append((context.attempt, context.is_last_attempt))
        if done.note("run") < 3:
            raise ValueError("not yet")

    async with home.client() as client, home.worker(service) as worker:
        await client.send(flaky)
        await done.until(lambda counts: counts["run"] == 3)
        await settled(worker)
        assert worker.in_flight == 0
    assert attempts == [(number, number == SOON.max_attempts) for number in (1, 2, 3)]


async def test_a_job_that_never_succeeds_becomes_a_dead_letter_that_says_why(
    home: Place, service: Service, done: Done
) -> None:
    @service.job(retry=SOON)
    async def broken(secret: str) -> None:
        done.note("run")
        raise ValueError("the printer burns")

    async with home.client() as client, home.worker(service):
        job = await client.with_options(metadata={"x-tenant": "t1"}).send(broken, secret="s")
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert done.counts["run"] == 3
    assert letter.id == job.id
    assert letter.body == b'{"secret":"s"}'
    assert letter.properties.type == b"broken"
    headers = letter.headers
    assert {name: headers[name] for name in ("rpcq-dead-reason", "rpcq-executed", "rpcq-from", "rpcq-attempt")} == {
        "rpcq-dead-reason": "attempts",
        "rpcq-executed": "yes",
        "rpcq-from": service.name,
        "rpcq-attempt": 3,
    }
    assert headers["rpcq-error"] == "ValueError: the printer burns"
    assert headers["x-tenant"] == "t1"
    assert len(headers["rpcq-incident"]) == 12
    assert not [name for name in headers if name.startswith(("x-death", "x-first-death", "x-delivery"))]


@pytest.mark.parametrize(
    ("error", "reason", "runs"),
    [
        (partial(GiveUp, "bounced"), "gave_up", 1),
        (partial(KeyError, "k"), "gave_up", 1),
        (partial(OSError, "net"), "attempts", 3),
        (partial(RetryLater, 0.01), "attempts", 3),
    ],
    ids=lambda it: it.func.__name__ if isinstance(it, partial) else "",
)
async def test_the_handler_and_its_options_say_what_is_retried(
    home: Place, service: Service, done: Done, error: Callable[[], Exception], reason: str, runs: int
) -> None:
    @service.job(retry=SOON, retry_on=[OSError, LookupError], give_up_on=[KeyError])
    async def work() -> None:
        done.note("run")
        raise error()

    async with home.client() as client, home.worker(service):
        await client.send(work)
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert (letter.headers["rpcq-dead-reason"], done.counts["run"]) == (reason, runs)
    assert letter.headers["rpcq-executed"] == "yes"


async def test_what_does_not_fit_is_refused_before_it_is_sent_or_dead_at_once(
    home: Place, service: Service, done: Done
) -> None:
    @service.job
    async def add(x: int) -> None:
        done.note(x)

    @service.method
    async def called() -> int:
        return 1

    async with home.client() as client, home.worker(service):
        with pytest.raises(InvalidParams, match="x"):
            await client.send(add, x="no number")  # type: ignore[arg-type]  # that is the test
        await client.send(f"{service.name}.add", x="no number")
        await client.send(f"{service.name}.called")
        with pytest.raises(MethodNotFound, match=rf"{service.name}\.add is a job: send it, client\.send\('"):
            await client.call(f"{service.name}.add", x=1)
        async with letters(home.url, dead_queue(home, service)) as dead:
            found = await dead.wait_for(2)
    reasons = {letter.properties.type: letter.headers["rpcq-dead-reason"] for letter in found}
    assert reasons == {b"add": "invalid", b"called": "unknown_method"}
    errors = {letter.properties.type: letter.headers["rpcq-error"] for letter in found}
    assert errors[b"called"] == "'called' is a method: call it, do not send it"
    assert errors[b"add"].startswith(f"the parameters do not fit {service.name}.add: x: ")
    assert {letter.headers["rpcq-executed"] for letter in found} == {"no"}
    assert not done.counts


async def test_a_job_is_sent_by_a_contract_without_the_code_of_its_service(
    home: Place, service: Service, done: Done
) -> None:
    @contract(service.name, jobs=["welcome"])
    class EmailsApi(Protocol):
        async def welcome(self, to: str, name: str = ..., copies: int = 1) -> None: ...

        async def sent(self, to: str) -> int: ...

    held = Service(api=EmailsApi)

    @held.method
    async def sent(to: str) -> int:
        return done.counts[to]

    @held.job
    async def welcome(context: Context, to: str, name: str = "you", copies: int = 1) -> None:
        done.note(to)
        done.note((name, copies, context.idempotency_key))

    async with home.client() as client, home.worker(held) as worker:
        emails = client.bind(EmailsApi)
        job = await client.send(emails.welcome, "ada", copies=2)
        await client.with_options(idempotency_key="k-7").send(emails.welcome, to="bob", name="Bob")
        with pytest.raises(InvalidParams, match=rf"do not fit {service.name}\.welcome: to: "):
            await client.send(emails.welcome, to=5)  # type: ignore[arg-type]  # that is the test
        with pytest.raises(InvalidParams, match="copies: "):
            await client.send_many(emails.welcome, [{"to": "eve"}, {"to": "eve", "copies": "many"}])
        await client.send_many(emails.welcome, [{"to": "cy"}, {"to": "dan"}])
        await done.until(lambda counts: counts.total() == 8)
        await settled(worker)
        assert (await emails.sent("ada"), await emails.sent("eve")) == (1, 0)
    assert (job.service, job.name) == (service.name, "welcome")
    assert done.counts[("you", 2, job.key)] == done.counts[("Bob", 1, "k-7")] == 1


async def test_a_job_that_returns_what_json_cannot_carry_is_done(home: Place, service: Service, done: Done) -> None:
    @service.job
    async def work():  # type: ignore[no-untyped-def]  # an annotation would be refused
        done.note("run")
        return object()

    async with home.client() as client, home.worker(service) as worker:
        await client.send(work)
        await done.until(lambda counts: counts["run"] == 1)
        await settled(worker)
        assert worker._jobs is not None
        assert (worker._jobs.finished, worker._jobs.retried, worker._jobs.dead) == (1, 0, 0)
    assert done.counts["run"] == 1


async def test_a_worker_describes_its_jobs(home: Place, service: Service) -> None:
    @service.job(timeout=60)
    async def welcome(to: str, name: str = "you") -> None:
        """Greet somebody."""

    @service.job(at_most_once=True)
    def charge(context: Context, amount: int) -> None: ...

    async with home.client() as client, home.worker(service, job_prefetch=7):
        (worker,) = await first(client.workers(service.name, wait=READY), 1)
    (found,) = worker.services
    assert (found.methods, found.job_queue, worker.job_prefetch) == ((), f"{home.namespace}.job.{service.name}", 7)
    assert found.jobs == (
        JobInfo("welcome", "(to: str, name: str = 'you') -> None", 60, 8, "Greet somebody."),
        JobInfo("charge", "(amount: int) -> None", 300, 1, at_most_once=True),
    )


async def test_a_job_that_a_worker_does_not_know_waits_for_one_that_does(
    home: Place, service: Service, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "UNKNOWN_PAUSES", (0.25, 0.25, 0.25, 0.25))
    newer = Service(service.name)

    @service.job
    async def old() -> None: ...

    @newer.job
    async def new() -> None:
        done.note("run")

    async with home.client() as client:
        async with home.worker(service) as worker:
            await client.send(f"{service.name}.new")
            while worker._jobs is None or not worker._jobs.retried:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.005)
            await settled(worker)
        async with home.worker(newer):
            await done.until(lambda counts: counts["run"] == 1)


async def test_a_job_that_nobody_ever_knows_becomes_a_dead_letter(
    home: Place, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "UNKNOWN_PAUSES", (0.25, 0.25))

    @service.job
    async def old() -> None: ...

    async with home.client() as client, home.worker(service):
        await client.send(f"{service.name}.new")
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("unknown_method", "no")
    assert letter.headers["rpcq-unknown"] == 2


async def test_a_service_whose_queue_does_not_exist_is_an_error_at_once(home: Place, service: Service) -> None:
    async with home.client() as client:
        with pytest.raises(SendError, match=f"no queue takes jobs of service '{service.name}': run `rpcq setup`") as it:
            await client.send(f"{service.name}.welcome")
        assert it.value.queued == "no"
        assert it.value.message_id == it.value.key


async def test_a_job_that_times_out_is_retried_and_has_a_bound(home: Place, service: Service, done: Done) -> None:
    @service.job(retry=SOON, timeout=0.05)
    async def hangs() -> None:
        done.note("run")
        await asyncio.Event().wait()

    async with home.client() as client, home.worker(service):
        await client.send(hangs)
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert (letter.headers["rpcq-dead-reason"], done.counts["run"]) == ("attempts", 3)
    assert "timed out" in letter.headers["rpcq-error"]


async def test_a_thread_that_outlasts_its_timeout_and_succeeds_has_done_the_job(
    home: Place, service: Service, done: Done
) -> None:
    go_on = threading.Event()
    began = asyncio.Event()
    loop = asyncio.get_running_loop()

    @service.job(retry=SOON, timeout=0.05)
    def slow() -> None:
        loop.call_soon_threadsafe(began.set)
        assert go_on.wait(30)

    async with home.client() as client, home.worker(service) as worker:
        await client.send(slow)
        await began.wait()
        await asyncio.sleep(0.1)  # its timeout passes
        assert worker.in_flight == 1
        go_on.set()
        await settled(worker)
        assert worker._jobs is not None
        assert (worker._jobs.finished, worker._jobs.retried) == (1, 0)


async def test_what_a_lost_worker_held_is_done_by_another(home: Place, service: Service, done: Done) -> None:
    stuck = asyncio.Event()

    @service.job
    async def work() -> None:
        if done.note("run") == 1:
            await stuck.wait()

    async with home.client() as client:
        first = home.worker(service, grace=0.05)
        await first.start()
        await client.send(work)
        await done.until(lambda counts: counts["run"] == 1)
        await lose(first)
        async with home.worker(service):
            await done.until(lambda counts: counts["run"] == 2)


async def test_a_job_in_hand_whose_session_is_lost_does_not_run_twice(
    home: Place, service: Service, done: Done
) -> None:
    go_on = asyncio.Event()

    @service.job
    async def work() -> None:
        done.note("run")
        await go_on.wait()

    async with home.client() as client, home.worker(service) as worker:
        await client.send(work)
        await done.until(lambda counts: counts["run"] == 1)
        await home.cut(worker)
        await worker._sessions.ready()
        while not any(run.delivery.redelivered for run in worker._jobs or ()):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.005)
        go_on.set()
        await settled(worker)
    assert done.counts == {"run": 1}


async def test_a_stopping_worker_finishes_what_runs_and_gives_back_the_rest(
    home: Place, service: Service, done: Done
) -> None:
    go_on = asyncio.Event()

    @service.job
    async def work(number: int) -> None:
        done.note(number)
        await go_on.wait()

    async with home.client() as client:
        worker = home.worker(service, job_prefetch=2)
        await worker.start()
        await client.send_many(work, [{"number": number} for number in range(5)])
        await done.until(lambda counts: counts.total() == 2)
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0.05)
        assert not stopping.done()
        go_on.set()
        assert await stopping
        assert done.counts.total() == 2
        async with home.worker(service):
            await done.until(lambda counts: counts.total() == 5)
    assert set(done.counts.values()) == {1}


async def test_a_job_that_is_cut_off_comes_back_and_one_that_runs_at_most_once_is_dead(
    home: Place, service: Service, done: Done
) -> None:
    @service.job
    async def again() -> None:
        if done.note("again") == 1:
            await asyncio.Event().wait()

    @service.job(at_most_once=True)
    async def once() -> None:
        done.note("once")
        await asyncio.Event().wait()

    async with home.client() as client:
        worker = home.worker(service, grace=0.05)
        await worker.start()
        await client.send(again)
        await client.send(once)
        await done.until(lambda counts: counts.total() == 2)
        assert not await worker.stop()
        async with home.worker(service), letters(home.url, dead_queue(home, service)) as dead:
            await done.until(lambda counts: counts["again"] == 2)
            (letter,) = await dead.wait_for(1)
    assert done.counts == {"again": 2, "once": 1}
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("interrupted", "maybe")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("home", ["memory", pytest.param("rabbitmq", marks=pytest.mark.long)], indirect=True)
async def test_a_job_that_kills_its_workers_is_dead_and_its_neighbours_are_done(
    home: Place, service: Service, done: Done
) -> None:
    async def serve() -> None:
        """One worker that dies of poison."""
        worker = home.worker(service, job_prefetch=10, grace=0.1)  # `lose` leaves nothing to wait for
        poisoned.clear()
        await worker.start()
        dying = asyncio.create_task(poisoned.wait())
        ended = asyncio.create_task(all_done.wait())
        await asyncio.wait([dying, ended], return_when=asyncio.FIRST_COMPLETED)
        for task in (dying, ended):
            task.cancel()
        await (lose(worker) if poisoned.is_set() else worker.stop())

    poisoned, all_done = asyncio.Event(), asyncio.Event()

    @service.job
    async def work(number: int) -> None:
        if number in (3, 11):
            done.note("poison")
            poisoned.set()
        await asyncio.sleep(0.02)
        if poisoned.is_set():
            await asyncio.Event().wait()  # what a lost worker runs ends with it: were it to return, it might be done
        done.note(number)

    async with home.client() as client:
        async with home.worker(service):
            pass
        await client.send_many(work, [{"number": number} for number in range(20)])
        async with letters(home.url, dead_queue(home, service)) as dead:

            async def watch() -> None:
                await dead.wait_for(2)
                await done.until(lambda counts: len(counts) == 19)
                all_done.set()

            watching = asyncio.create_task(watch())
            while not all_done.is_set():
                await serve()
            await watching
            found = {letter.body for letter in dead.found}
    assert found == {b'{"number":3}', b'{"number":11}'}
    assert {number for number in done.counts if number != "poison"} == set(range(20)) - {3, 11}
    assert {letter.headers["rpcq-dead-reason"] for letter in dead.found} == {"delivery_limit"}
    assert {letter.headers["rpcq-executed"] for letter in dead.found} == {"maybe"}


async def test_a_retry_whose_queue_is_gone_is_kept_with_the_lost(home: Place, service: Service, done: Done) -> None:
    @service.job(retry=Retry(max_attempts=2, initial_backoff=0.01, max_backoff=0.01))
    async def work() -> None:
        done.note("run")
        raise RetryLater(4)  # the queue has to be gone before

    topology = JobTopology(home.namespace)
    (lost,) = [queue for queue in topology.shared_queues() if queue.name == topology.lost.name]
    async with home.client() as client:
        async with home.worker(service) as worker:
            job = await client.send(work)
            await done.until(lambda counts: counts["run"] == 1)
            await settled(worker)
        await delete_queue(home, client, topology.queue(service.name).name)
        async with letters(home.url, lost) as found:
            while job.id not in [letter.id for letter in found.found]:
                await found.wait_for(len(found.found) + 1)


async def delete_queue(home: Place, client: Client, queue: str) -> None:
    if home.url.startswith("memory"):
        vhost = client._transport._broker.vhost  # type: ignore[attr-defined]  # the memory transport's
        vhost._delete(vhost.queues[queue])
        return
    import aio_pika

    async with await aio_pika.connect(home.url) as connection:
        await (await connection.channel()).queue_delete(queue)


async def test_a_send_that_is_not_confirmed_says_that_the_job_may_be_queued(
    home: Place, service: Service, done: Done
) -> None:
    @service.job
    async def work() -> None:
        done.note("run")

    async with home.client() as client, home.worker(service):
        publish = client._transport.publish
        client._transport.publish = lambda message: message.on_published(Published.REFUSED)  # type: ignore[method-assign]
        with pytest.raises(
            SendError, match=r"did not confirm it within 0\.3 s; send it again with idempotency_key="
        ) as it:
            await client.with_options(timeout=0.3, idempotency_key="k").send(work)
        assert (it.value.queued, it.value.key) == ("maybe", "k")
        client._transport.publish = publish  # type: ignore[method-assign]
        await client.send(work)
        await done.until(lambda counts: counts["run"] == 1)


async def test_sends_while_the_connection_is_cut_are_made_when_it_is_back(
    home: Place, service: Service, done: Done
) -> None:
    @service.job
    async def work(number: int) -> None:
        done.note(number)

    async with home.client() as client, home.worker(service) as worker:
        await client.send(work, number=0)
        sending = [asyncio.create_task(client.send(work, number=number)) for number in range(1, 101)]
        await asyncio.sleep(0)
        await home.cut(client, worker)
        await asyncio.gather(*sending)
        await done.until(lambda counts: len(counts) == 101)


async def test_what_cannot_be_sent_is_said(home: Place, service: Service) -> None:
    async def no_job() -> None: ...

    @service.job
    async def work(x: int = 0) -> None: ...

    async with home.client() as client, home.worker(service):
        with pytest.raises(UsageError, match="it is not a job"):
            await client.send(no_job)
        with pytest.raises(UsageError, match="send_many must have no idempotency_key"):
            await client.with_options(idempotency_key="k").send_many(work, [{}])
        with pytest.raises(InvalidParams):
            await client.send_many(work, [{"x": 1}, {"x": "no"}])
        closed = client
    with pytest.raises(Exception, match="closed"):
        await closed.send(work)


async def publish(client: Client, place: Place, service: Service, properties: Properties, body: bytes) -> None:
    """Publish a message to the exchange for jobs, as any program may."""
    confirmed = asyncio.get_running_loop().create_future()
    exchange = JobTopology(place.namespace).jobs.name.encode()
    message = Message(exchange, service.name.encode(), b"c", encode(properties), body, confirmed.set_result)
    await client._transport.declare([JobTopology(place.namespace).jobs])
    client._transport.publish(message)
    assert await confirmed is Published.CONFIRMED


async def test_what_cannot_be_read_is_dead_with_all_that_it_had(home: Place, service: Service) -> None:
    @service.job
    async def work() -> None: ...

    text = Properties(content_type=b"text/html", message_id=b"7", type=b"work", headers={"x-mine": "kept"}, priority=3)
    async with home.client() as client, home.worker(service):
        await publish(client, home, service, text, b"<p>")
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert (letter.properties.content_type, letter.body, letter.headers["x-mine"]) == (b"text/html", b"<p>", "kept")
    assert letter.properties.priority == 3
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("invalid", "no")
    assert letter.headers["rpcq-error"] == "the content type must be application/json; got 'text/html'"


async def test_a_body_over_the_limit_of_the_worker_is_kept_in_the_dead_letter(home: Place, service: Service) -> None:
    @service.job
    async def work(text: str) -> None: ...

    async with home.client() as client, home.worker(service, max_body=1000):
        job = await client.send(work, text="x" * 2000)
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert (letter.id, len(letter.body)) == (job.id, len('{"text":""}') + 2000)
    assert letter.headers["x-first-death-reason"] == "rejected"


async def test_the_first_send_waits_for_a_connection_that_is_cut(home: Place, service: Service, done: Done) -> None:
    @service.job
    async def work() -> None:
        done.note("run")

    async with home.client() as client, home.worker(service):
        await home.cut(client)
        await client.send(work)
        await done.until(lambda counts: counts["run"] == 1)


async def test_a_client_that_is_closed_ends_its_sends(home: Place, service: Service) -> None:
    @service.job
    async def work() -> None: ...

    async with home.client() as client, home.worker(service):
        await client.send(work)
        client._transport.publish = lambda _: None  # type: ignore[method-assign]  # the confirmation never comes
        sending = asyncio.create_task(client.send(work))
        await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(SendError, match="the client was closed") as it:
            await sending
        assert it.value.queued == "maybe"
