"""What observers see of an outbox, and traces that go through it."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from sqlalchemy import select

from rpcq import ConfigurationError, Event, ObservedWrite, Observer, Service
from rpcq.observability.tracing import Tracing
from rpcq.outbox import Outbox
from rpcq.outbox.tables import outbox as rows_table
from support.load import until
from support.observed import Spans
from support.places import Place
from support.stores import Store


class Created(Event, name=f"outbox.t{secrets.token_hex(4)}.created"):
    number: int


@pytest.fixture
def spans() -> Spans:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


class Seen(Observer):
    """Keeps what it is called with."""

    def __init__(self) -> None:
        self.writes: list[ObservedWrite] = []

    def on_write(self, write: ObservedWrite) -> None:
        self.writes.append(write)


async def test_an_observer_sees_what_is_written_whatever_becomes_of_the_transaction(store: Store, home: Place) -> None:
    seen = Seen()
    outbox = Outbox(store.engine, home.url, namespace=home.namespace, observers=[seen])
    job = await store.write(lambda db: outbox.send(db, "things.work", number=7))
    event = await store.write(lambda db: outbox.publish(db, Created(number=7)), commit=False)
    first, second = seen.writes
    assert (first.label, first.service, first.method, first.event) == ("things.work", "things", "work", "")
    assert (second.label, second.service, second.event) == (Created.event_name, "", Created.event_name)
    assert [first.correlation_id, second.correlation_id] == [job.id, event.id]
    assert [write.exchange.decode() for write in seen.writes] == [f"{home.namespace}.jobs", f"{home.namespace}.events"]
    assert {(write.queued, write.code, write.body_size) for write in seen.writes} == {("", "", len(b'{"number":7}'))}


async def test_a_trace_goes_through_the_outbox_to_a_job_and_a_subscription(
    store: Store, home: Place, service: Service, spans: Spans
) -> None:
    provider, exporter = spans
    tracing = Tracing(tracer_provider=provider)
    outbox = Outbox(store.engine, home.url, namespace=home.namespace, observers=[tracing])

    @service.job
    async def work(number: int) -> None: ...

    @service.on(Created)
    async def heard(event: Created) -> None: ...

    def write(db: Any) -> None:
        outbox.send(db, work, number=7)
        outbox.publish(db, Created(number=7))

    with provider.get_tracer("web").start_as_current_span("POST /orders") as request:
        await store.write(write)
    async with outbox, home.worker(service, observers=[tracing]):  # the relay is in no trace
        await until(lambda: len(exporter.get_finished_spans()) == 5)
    found = {span.name: span for span in exporter.get_finished_spans()}
    for name, run in ((f"{service.name}.work", "work"), (Created.event_name, "heard")):
        written, ran = found[f"create {name}"], found[f"process {service.name}.{run}"]
        assert written.kind is SpanKind.PRODUCER
        assert written.attributes is not None
        assert written.attributes["messaging.operation.type"] == "create"
        assert written.context.trace_id == request.get_span_context().trace_id
        assert written.parent is not None
        assert written.parent.span_id == request.get_span_context().span_id
        assert [link.context.span_id for link in ran.links] == [written.context.span_id]
    written = found[f"create {Created.event_name}"]
    assert written.attributes is not None
    assert written.attributes["rpcq.event"] == Created.event_name
    assert written.attributes["messaging.destination.name"] == f"{home.namespace}.events"


async def test_what_is_not_traced_is_written_without_a_span(store: Store, home: Place, spans: Spans) -> None:
    provider, exporter = spans
    observers = [Tracing(ratio=0.0, tracer_provider=provider)]
    outbox = Outbox(store.engine, home.url, namespace=home.namespace, observers=observers)
    assert not trace.get_current_span().get_span_context().is_valid
    await store.write(lambda db: outbox.publish(db, Created(number=7)))
    assert exporter.get_finished_spans() == ()
    assert store.count(rows_table) == 1
    ((properties,),) = store.asked(select(rows_table.c.properties))
    assert b"traceparent" not in properties


def test_what_is_no_observer_is_refused(store: Store, home: Place) -> None:
    given: Any = [print]
    with pytest.raises(
        ConfigurationError, match=r"observers must hold instances of rpcq\.observer\.Observer; got <built"
    ):
        Outbox(store.engine, home.url, observers=given)
