"""A trace that begins with an HTTP request, as OpenTelemetry's own instrumentation of FastAPI makes it."""

from __future__ import annotations

from fastapi import FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rpcq import Client, Service, Worker
from rpcq.observability.tracing import Tracing
from rpcq.web import CancelOnDisconnect, Rpc
from support.load import until
from support.webserver import served

CHAIN = ["GET /work", "send outer.work", "process outer.work", "send inner.work", "process inner.work"]


async def test_a_call_from_a_web_request_through_two_nested_services_is_one_trace(
    rabbitmq_url: str, namespace: str
) -> None:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observers = [Tracing(ratio=0.0, tracer_provider=provider)]  # what is in a trace goes by that alone
    inner, outer = Service("inner"), Service("outer")
    nested = Client(rabbitmq_url, namespace=namespace, observers=observers)

    @inner.method(name="work")
    async def work_inside(x: int) -> int:
        return x + 1

    @outer.method(name="work")
    async def work_outside(x: int) -> int:
        return await nested.call("inner.work", x=x)

    rpc = Rpc(rabbitmq_url, namespace=namespace, observers=observers, first_wait=10)
    app = FastAPI(lifespan=rpc.lifespan)
    app.add_middleware(CancelOnDisconnect)

    @app.get("/work")
    async def work(x: int) -> int:
        return await rpc.client.call("outer.work", x=x)

    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, exclude_spans=["receive", "send"])
    try:
        async with (
            nested,
            Worker(inner, url=rabbitmq_url, namespace=namespace, observers=observers),
            Worker(outer, url=rabbitmq_url, namespace=namespace, observers=observers),
            served(app) as browser,
        ):
            given = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
            assert (await browser.get("/work?x=1", headers=given)).json() == 2
            await until(lambda: len(exporter.get_finished_spans()) == len(CHAIN))
    finally:
        FastAPIInstrumentor.uninstrument_app(app)
        provider.shutdown()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert sorted(spans) == sorted(CHAIN)
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {"a" * 32}
    parents = [f"{parent.span_id:016x}" for name in CHAIN if (parent := spans[name].parent)]
    assert parents == ["b" * 16, *(f"{spans[name].context.span_id:016x}" for name in CHAIN[:-1])]
