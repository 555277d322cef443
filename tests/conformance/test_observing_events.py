"""Metrics, traces and logs of events, on both transports, and what workers say of their subscriptions."""

import secrets
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import SpanKind

from rpcq import AnyEvent, Context, Event, GiveUp, ObservedJob, ObservedPublish, Observer, Retry, Service
from rpcq.jobs import outcomes
from rpcq.observability.calls import CallLogs
from rpcq.observability.tracing import Tracing
from support.jobs import Done, settled
from support.load import until
from support.observed import Scraped, Spans
from support.places import Place

SOON = Retry(max_attempts=2, initial_backoff=0.01, max_backoff=0.01)
WORD = f"e{secrets.token_hex(6)}"


class Created(Event, name=f"{WORD}.created"):
    number: int = 0


class Other(Event, name=f"{WORD}.other"):
    pass


async def test_events_and_the_attempts_of_subscriptions_are_counted(
    home: Place, service: Service, scraped: Scraped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "UNKNOWN_PAUSES", ())

    @service.on(Created, retry=SOON)
    async def fails(event: Created, context: Context) -> None:
        raise ValueError("no")

    @service.on(f"{WORD}.created")
    async def work(event: AnyEvent) -> None: ...

    @service.on(f"{WORD}.*")
    async def narrow(event: Created) -> None: ...

    observers = [scraped.metrics]
    async with home.client(observers=observers) as client, home.worker(service, observers=observers):
        for event in (Created(), Created(), Other()):
            await client.publish(event)
        await client.publish(Nobody())
        expected = {
            ("fails", "retried", "failed"): 2,
            ("fails", "dead", "attempts"): 2,
            ("work", "done", ""): 2,
            ("narrow", "done", ""): 2,
            ("narrow", "dead", "unknown_event"): 1,
        }
        await until(lambda: {it[1:]: n for it, n in scraped.all("rpcq_worker_jobs_ended_total").items()} == expected)
    assert scraped.all("rpcq_client_events_published_total") == {
        (f"{WORD}.created", "yes", "yes"): 2,
        (f"{WORD}.other", "yes", "yes"): 1,
        (f"nobody.{WORD}", "yes", "no"): 1,
    }
    assert scraped.all("rpcq_client_event_publish_duration_seconds_count")[f"{WORD}.created",] == 2
    assert set(scraped.all("rpcq_client_events_in_flight").values()) == {0}


class Nobody(Event, name=f"nobody.{WORD}"):
    pass


class Seen(Observer):
    """Keeps all that it is called with at the end."""

    def __init__(self) -> None:
        self.published: list[ObservedPublish] = []
        self.jobs: list[ObservedJob] = []

    def on_publish(self, publish: ObservedPublish) -> Callable[[ObservedPublish], None]:
        return self.published.append

    def on_job(self, job: ObservedJob) -> Callable[[ObservedJob], None]:
        return self.jobs.append


async def test_an_observer_sees_the_event_and_its_subscription(home: Place, service: Service) -> None:
    @service.on(Created)
    async def work(event: Created) -> None: ...

    seen = Seen()
    async with home.client(observers=[seen]) as client, home.worker(service, observers=[seen]):
        published = await client.publish(Created(number=7))
        await until(lambda: seen.jobs)
    (publish,), (job,) = seen.published, seen.jobs
    assert (publish.label, publish.service, publish.queued, publish.heard) == (f"{WORD}.created", "", "yes", True)
    assert (publish.body_size, publish.code) == (len(b'{"number":7}'), "OK")
    assert (job.label, job.event, job.outcome) == (f"{service.name}.work", f"{WORD}.created", "done")
    assert job.correlation_id == publish.correlation_id == published.id
    assert job.exchange == publish.exchange == f"{home.namespace}.events".encode()


async def test_each_run_is_a_span_with_a_link_to_that_of_the_publisher(
    home: Place, service: Service, spans: Spans
) -> None:
    provider, exporter = spans
    tracing = Tracing(tracer_provider=provider)

    @service.on(Created, retry=SOON)
    async def first(event: Created, context: Context) -> None:
        if context.attempt == 1:
            raise ValueError("not yet")

    @service.on(Created)
    async def second(event: Created) -> None:
        trace.get_current_span().add_event("here")

    async with home.client(observers=[tracing]) as client, home.worker(service, observers=[tracing]):
        published = await client.publish(Created())
        await until(lambda: len(exporter.get_finished_spans()) == 4)
    found = exporter.get_finished_spans()
    (publisher,) = [span for span in found if span.kind is SpanKind.PRODUCER]
    runs = [span for span in found if span.kind is SpanKind.CONSUMER]
    assert publisher.name == f"send {WORD}.created"
    assert publisher.attributes["rpcq.heard"] is True
    assert publisher.attributes["messaging.destination.name"] == f"{home.namespace}.events"
    assert publisher.attributes["messaging.rabbitmq.destination.routing_key"] == f"{WORD}.created"
    assert sorted(span.name for span in runs) == [f"process {service.name}.{it}" for it in ("first", "first", "second")]
    for span in runs:
        assert [link.context.span_id for link in span.links] == [publisher.context.span_id]
        assert span.attributes["rpcq.event"] == f"{WORD}.created"
        assert span.attributes["messaging.message.id"] == published.id
        assert span.context.trace_id != publisher.context.trace_id


async def test_every_line_about_an_event_names_it_and_its_subscription(
    home: Place, service: Service, done: Done, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    @service.on(Created)
    async def work(event: Created) -> None:
        done.note("run")
        raise GiveUp("no such order")

    observers = [CallLogs()]
    async with home.client(observers=observers) as client, home.worker(service, observers=observers) as worker:
        published = await client.publish(Created())
        await done.until(lambda counts: counts["run"] == 1)
        await settled(worker)
    found = {line["event"]: line for line in lines()}
    assert found["event published"]["event_name"] == f"{WORD}.created"
    assert (found["event published"]["event_id"], found["event published"]["heard"]) == (published.id, True)
    for text in ("job started", "job ended", "job is dead"):
        line = found[text]
        assert (line["job"], line["event_name"]) == (f"{service.name}.work", f"{WORD}.created")
        assert (line["job_id"], line["attempt"]) == (published.id, 1)


async def test_a_worker_describes_its_subscriptions(home: Place, service: Service) -> None:
    @service.on(Created, f"{WORD}.#", retry=SOON, timeout=5)
    async def work(event: Created | AnyEvent) -> None:
        """Do it."""

    async with home.client() as client, home.worker(service):
        (worker,) = [it async for it in client.workers(service.name, wait=0.5)]
    (info,) = worker.services[0].subscriptions
    assert (info.name, info.patterns, info.events) == (
        "work",
        (f"{WORD}.created", f"{WORD}.#"),
        (f"{WORD}.created 1",),
    )
    assert (info.queue, info.doc) == (f"{home.namespace}.sub.{service.name}:work", "Do it.")
    assert (info.timeout, info.max_attempts, info.at_most_once, info.each_instance) == (5, 2, False, False)
    assert "Created" in info.signature
