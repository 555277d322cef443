"""What observers are told, on both transports: metrics, traces and logs of the same calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.baggage import get_all, set_baggage
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags

from rpcq import CallTimeout, DomainError, InvalidParams, RemoteError, Retry, Service
from rpcq.observability.calls import CallLogs
from rpcq.observability.sampling import Sampler
from rpcq.observability.tracing import Tracing
from rpcq.observer import Observed, ObservedCall, ObservedRequest, Observer
from rpcq.options import MAX_HEADERS
from support.late import let_others_speak_first
from support.load import until
from support.observed import Scraped, by_name
from support.places import Place

QUEUE_TYPE_MATTERS = False


class Busy(DomainError):
    """Not now."""


def things(place: Place) -> tuple[Service, list[Any]]:
    service, seen = place.service(errors=[Busy]), []

    @service.method(idempotent=True)
    async def add(x: int, y: int) -> int:
        return x + y

    @service.method
    async def fail(busy: bool) -> None:
        raise Busy("busy") if busy else ValueError("not for callers")

    @service.method
    async def sleep(seconds: float) -> None:
        seen.append("sleep")
        await asyncio.sleep(seconds)

    @service.method(timeout=0.3)  # from its start, however late that is
    async def nap() -> None:
        await asyncio.sleep(60)

    return service, seen


# Metrics.


async def test_each_call_is_counted_once_at_each_end_by_how_it_ended(place: Place, scraped: Scraped) -> None:
    service, _ = things(place)
    observers = [scraped.metrics]
    async with place.worker(service, observers=observers), place.client(observers=observers) as client:
        await asyncio.gather(*(client.call("things.add", x=i, y=1) for i in range(100)))
        for busy in (True, False):
            with pytest.raises(RemoteError):
                await client.call("things.fail", busy=busy)
        with pytest.raises(InvalidParams):
            await client.call("things.add", x="no")
        call = asyncio.create_task(client.call("things.sleep", seconds=60))
        await until(lambda: scraped("rpcq_worker_requests_in_flight", service="things", method="sleep") == 1)
        assert scraped("rpcq_client_calls_in_flight", service="things", method="sleep") == 1
        assert scraped("rpcq_client_pending_replies") == 1
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        with pytest.raises(CallTimeout):
            await client.call("things.nap")
        await until(lambda: scraped("rpcq_worker_requests_in_hand") == 0)

    expected = {
        ("things", "add", "OK"): 100,
        ("things", "add", "INVALID_ARGUMENT"): 1,
        ("things", "fail", "busy"): 1,
        ("things", "fail", "UNKNOWN"): 1,
        ("things", "sleep", "CANCELLED"): 1,
        ("things", "nap", "DEADLINE_EXCEEDED"): 1,
    }
    assert scraped.all("rpcq_client_calls_finished_total") == expected
    assert scraped.all("rpcq_worker_requests_finished_total") == expected
    started = {("things", "add"): 101, ("things", "fail"): 2, ("things", "sleep"): 1, ("things", "nap"): 1}
    assert scraped.all("rpcq_client_calls_started_total") == started
    assert scraped.all("rpcq_worker_requests_started_total") == started
    assert scraped.all("rpcq_client_call_duration_seconds_count") == started
    # The one with wrong parameters was in no handler.
    assert scraped.all("rpcq_worker_handler_duration_seconds_count") == {**started, ("things", "add"): 100}
    waited = scraped("rpcq_worker_queue_wait_seconds_count", service="things", method="add")
    assert waited == 100
    total = scraped("rpcq_client_call_duration_seconds_sum", service="things", method="nap")
    assert total is not None
    assert total > 0.2
    assert scraped("rpcq_worker_requests_acknowledged_total") == 105
    assert scraped("rpcq_client_pending_replies") == 0


async def test_a_method_that_nobody_has_makes_no_series_of_its_own_at_the_worker(
    place: Place, scraped: Scraped
) -> None:
    service, _ = things(place)
    async with place.worker(service, observers=[scraped.metrics]), place.client() as client:
        for number in range(5):
            with pytest.raises(Exception, match="no method"):
                await client.call(f"things.made_up_{number}")
    assert scraped.all("rpcq_worker_requests_finished_total") == {("things", "", "UNIMPLEMENTED"): 5}


async def test_what_a_worker_cuts_off_is_told_as_aborted(place: Place, scraped: Scraped) -> None:
    service, seen = things(place)
    async with place.client(timeout=5) as client:
        async with place.worker(service, observers=[scraped.metrics], grace=0.05):
            call = asyncio.create_task(client.call("things.sleep", seconds=60))
            await until(lambda: seen)
        assert scraped.all("rpcq_worker_requests_finished_total") == {("things", "sleep", "ABORTED"): 1}
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


async def test_sessions_that_go_down_and_come_back_are_counted(place: Place, scraped: Scraped) -> None:
    service, _ = things(place)
    observers = [scraped.metrics]
    roles = ("consuming", "publishing")
    async with place.worker(service, observers=observers) as worker, place.client(observers=observers) as client:
        assert [scraped("rpcq_sessions_up", role=role) for role in roles] == [2, 2]
        assert client.connected
        assert worker.connected
        await place.cut(client, worker)
        await until(lambda: sum(scraped.all("rpcq_session_downs_total").values()) == 4)
        await until(lambda: client.connected and worker.connected)
        assert [scraped("rpcq_session_ups_total", role=role) for role in roles] == [4, 4]
        assert [scraped("rpcq_sessions_up", role=role) for role in roles] == [2, 2]
        assert set(scraped.all("rpcq_session_downs_total")) == {(role, "BrokerUnreachable") for role in roles}
    assert not client.connected
    assert not worker.connected
    assert [scraped("rpcq_sessions", role=role) for role in roles] == [0, 0]
    assert [scraped("rpcq_sessions_up", role=role) for role in roles] == [0, 0]


async def test_what_a_queue_gives_up_is_counted_by_its_reason(place: Place, scraped: Scraped) -> None:
    service, _ = things(place)
    async with place.client(observers=[scraped.metrics]) as client:
        async with place.worker(service):
            pass  # its queue stays
        let_others_speak_first(client)
        with pytest.raises(CallTimeout):
            await client.with_options(timeout=0.5).call("things.add", x=1, y=1)
        assert scraped("rpcq_client_notices_total", reason="expired") == 1


async def test_what_is_made_again_is_one_call_with_its_last_attempt(place: Place, scraped: Scraped) -> None:
    service = place.service(errors=[Busy])
    runs = 0

    @service.method(idempotent=True)
    async def work() -> int:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise Busy("busy")
        return runs

    told: list[ObservedCall] = []

    class Told(Observer):
        def on_call(self, call: ObservedCall) -> Callable[[ObservedCall], None]:
            return told.append

    async with place.worker(service), place.client(observers=[scraped.metrics, Told()]) as client:
        retry = Retry(max_attempts=5, initial_backoff=0.01, codes=("busy",))
        assert await client.with_options(retry=retry, idempotent=True).call("things.work") == 3
    assert scraped.all("rpcq_client_calls_finished_total") == {("things", "work", "OK"): 1}
    assert scraped("rpcq_client_calls_retried_total") == 2
    assert [(it.attempt, it.code) for it in told] == [(3, "OK")]


async def test_an_observer_that_fails_costs_no_call_and_is_named(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Observer):
        def on_call(self, call: ObservedCall) -> Callable[[Observed], None]:
            return self.ended

        def on_request(self, request: ObservedRequest) -> None:
            raise RuntimeError("broken at once")

        def ended(self, seen: Observed) -> None:
            raise RuntimeError(f"broken at the end of {seen.label}")

        def on_opened(self, owner: Any) -> None:
            raise RuntimeError("broken when opened")

    service, _ = things(place)
    async with place.worker(service, observers=[Broken()]), place.client(observers=[Broken()]) as client:
        assert await client.call("things.add", x=1, y=1) == 2
    failed = [record for record in caplog.records if "observer failed" in record.getMessage()]
    assert len(failed) == 4


# Traces.


def nested(place: Place, tracing: Tracing) -> tuple[Service, Service, list[Mapping[str, object]]]:
    """`outer.work` calls `inner.work`, as a client of its own."""
    inner, outer, baggage = place.service("inner"), place.service("outer"), []
    client = place.client(observers=[tracing])

    @inner.method(name="work")
    def work_inside(x: int) -> int:  # in a thread, which has the context too
        baggage.append(get_all())
        trace.get_current_span().set_attribute("inside", True)
        return x + 1

    @outer.method(name="work")
    async def work_outside(x: int) -> int:
        async with client:
            return await client.call("inner.work", x=x)

    return inner, outer, baggage


async def test_a_call_through_two_services_is_one_trace(
    place: Place, spans: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    provider, exporter = spans
    tracing = Tracing(tracer_provider=provider)
    inner, outer, baggage = nested(place, tracing)
    async with place.worker(inner, outer, observers=[tracing]), place.client(observers=[tracing]) as client:
        token = attach(set_baggage("tenant", "a b"))
        try:
            assert await client.call("outer.work", x=1) == 2
        finally:
            detach(token)
    found = by_name(exporter)
    chain = ["send outer.work", "process outer.work", "send inner.work", "process inner.work"]
    assert sorted(found) == sorted(chain)
    parents = [found[name].parent for name in chain]
    assert parents[0] is None
    for name, parent in zip(chain, parents[1:], strict=False):
        assert parent is not None
        assert parent.span_id == found[name].context.span_id
    assert len({span.context.trace_id for span in found.values()}) == 1
    assert baggage == [{"tenant": "a b"}]
    assert found["process inner.work"].attributes["inside"] is True
    sent, processed = found["send outer.work"], found["process outer.work"]
    assert (sent.kind, processed.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    destination = f"{place.namespace}.requests:outer"
    for span, operation in ((sent, "send"), (processed, "process")):
        assert span.attributes["messaging.system"] == "rabbitmq"
        assert span.attributes["messaging.operation.type"] == operation
        assert span.attributes["messaging.destination.name"] == destination
        assert span.attributes["messaging.rabbitmq.destination.routing_key"] == "outer"
    ids = [span.attributes["messaging.message.conversation_id"] for span in (sent, processed)]
    assert ids[0] == ids[1]


async def test_a_failed_call_is_an_error_in_both_spans_with_its_incident(
    place: Place, spans: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    provider, exporter = spans
    tracing = Tracing(tracer_provider=provider)
    service, _ = things(place)
    async with place.worker(service, observers=[tracing]), place.client(observers=[tracing]) as client:
        with pytest.raises(RemoteError) as caught:
            await client.call("things.fail", busy=False)
        with pytest.raises(InvalidParams):  # never in a handler, whose context there would be
            await client.call("things.fail")
        assert not trace.get_current_span().get_span_context().is_valid
    failed = [span for span in exporter.get_finished_spans() if span.attributes["error.type"] == "UNKNOWN"]
    assert [span.name for span in failed] == ["process things.fail", "send things.fail"]
    for span in failed:
        assert not span.status.is_ok
        assert span.attributes["rpcq.incident"] == caught.value.incident
        assert "not for callers" not in span.to_json()
    assert len({span.context.trace_id for span in exporter.get_finished_spans()}) == 2


async def test_inside_a_trace_that_is_not_sampled_nothing_is_traced_at_any_hop(
    place: Place, spans: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    provider, exporter = spans
    tracing = Tracing(tracer_provider=provider)
    inner, outer, _ = nested(place, tracing)
    unsampled = SpanContext(trace_id=1, span_id=2, is_remote=False, trace_flags=TraceFlags(0))
    async with place.worker(inner, outer, observers=[tracing]), place.client(observers=[tracing]) as client:
        token = attach(trace.set_span_in_context(NonRecordingSpan(unsampled)))
        try:
            assert await client.call("outer.work", x=1) == 2
        finally:
            detach(token)
    assert exporter.get_finished_spans() == ()


async def test_both_ends_pick_the_same_share_of_calls_and_nested_ones_go_by_the_outermost(
    place: Place, spans: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    provider, exporter = spans
    tracing = Tracing(0.3, provider)
    inner, outer = place.service("inner"), place.service("outer")
    client = place.client(observers=[tracing])
    inner.method(name="work")(lambda: None)

    async def work() -> None:
        await client.call("inner.work")

    outer.method(name="work")(work)
    async with client, place.worker(inner, outer, observers=[tracing]):
        await asyncio.gather(*(client.call("outer.work") for _ in range(100)))
    traces: dict[int, list[str]] = {}
    for span in exporter.get_finished_spans():
        traces.setdefault(span.context.trace_id, []).append(span.name)
    assert 5 < len(traces) < 70
    whole = ["process inner.work", "process outer.work", "send inner.work", "send outer.work"]
    assert all(sorted(names) == whole for names in traces.values())


async def test_a_context_that_is_too_large_is_left_out_and_costs_no_call(
    place: Place, spans: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    provider, exporter = spans
    tracing = Tracing(tracer_provider=provider)
    service, came = place.service(), []

    @service.method
    async def work() -> None:
        came.append(get_all())

    large, small = set_baggage("large", "x" * 4000), set_baggage("small", "y")
    async with place.worker(service, observers=[tracing]), place.client(observers=[tracing]) as client:
        full = client.with_options(metadata={"x-full": "m" * (MAX_HEADERS - 60)})
        for caller, context in ((client, large), (client, small), (full, small)):
            token = attach(context)
            try:
                await caller.call("things.work")
            finally:
                detach(token)
    assert came == [{}, {"small": "y"}, {}]
    # Where not even the trace has room, the two spans are of two traces.
    assert len({span.context.trace_id for span in exporter.get_finished_spans()}) == 4


# Logs.


async def test_calls_are_logged_from_their_begin_to_their_end_and_the_lines_of_handlers_carry_their_ids(
    place: Place, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    service = place.service()
    mine = logging.getLogger("mine")

    @service.method
    async def work(secret: str) -> None:
        mine.info("in the loop")

    @service.method
    def thread() -> None:
        mine.info("in a thread")

    @service.method
    async def fail() -> None:
        raise ValueError("text")

    observers = [CallLogs()]
    async with place.worker(service, observers=observers), place.client(observers=observers) as client:
        await client.with_options(metadata={"x-tenant": "private"}).call("things.work", secret="s3cr3t")
        await client.call("things.thread")
        with pytest.raises(RemoteError) as caught:
            await client.call("things.fail")
        with pytest.raises(InvalidParams):
            await client.call("things.work")
    loggers = ("rpcq.worker", "rpcq.worker.calls", "rpcq.client.calls", "mine")
    found = [line for line in lines() if line["logger"] in loggers]  # a busy machine may have others
    events = [
        "worker started",
        "call started",
        "request received",
        "handler started",
        "in the loop",
        "request completed",
        "call completed",
        "call started",
        "request received",
        "handler started",
        "in a thread",
        "request completed",
        "call completed",
        "call started",
        "request received",
        "handler started",
        "handler failed",
        "request failed",
        "call failed",
        "call started",
        "request received",
        "request refused",
        "call failed",
        "worker stopped",
    ]
    assert [line["event"] for line in found] == events
    for first in (1, 7, 13, 19):
        of_call = found[first : first + 6 if first < 19 else 23]
        assert len({line["correlation_id"] for line in of_call}) == 1, of_call
    assert {line["attempt"] for line in found if line["event"] in ("in the loop", "in a thread", "handler failed")} == {
        1
    }
    assert {line["method"] for line in found[1:7]} == {"things.work"}
    incidents = [line.get("incident") for line in found if line["event"] in ("handler failed", "request failed")]
    assert incidents == [caught.value.incident] * 2
    assert all(
        line["duration_ms"] >= 0
        for line in found
        if line["event"].endswith(("completed", "failed")) and line["event"] != "handler failed"
    )
    assert "s3cr3t" not in str(found)
    assert "private" not in str(found)


async def test_a_share_of_calls_is_logged_and_that_at_both_ends(
    place: Place, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    service, _ = things(place)
    observers = [CallLogs(0.3)]
    async with place.worker(service, observers=observers), place.client(observers=observers) as client:
        await asyncio.gather(*(client.call("things.add", x=i, y=1) for i in range(100)))
    ids: dict[str, list[str]] = {}
    for line in lines():
        if "correlation_id" in line:
            ids.setdefault(line["correlation_id"], []).append(line["event"])
    assert 5 < len(ids) < 70
    assert all(Sampler(0.3)(it) for it in ids)
    assert all(len(events) == 5 for events in ids.values())


async def test_a_line_about_another_call_keeps_its_ids_in_a_handler(
    place: Place, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    service = place.service()

    @service.method
    async def work() -> None:
        logging.getLogger("mine").info("about another", extra={"correlation_id": "another"})

    async with place.worker(service), place.client() as client:
        await client.call("things.work")
    (line,) = [line for line in lines() if line["event"] == "about another"]
    assert line["correlation_id"] == "another"
    assert "method" not in line
