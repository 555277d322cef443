"""Traces with OpenTelemetry's API: spans for what a client calls, sends and publishes, and for what a worker runs.

The two spans of a call are in one trace. An attempt of a job begins a trace of its own, whose span has a link to that
of the sender: it may run hours later, and several times. So does each attempt of each subscription of an event.

Spans follow the conventions for messaging (https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/) and
for RabbitMQ. The context is sent in the headers of W3C Trace Context and W3C Baggage.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, TypeVar

from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context, attach
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rpcq.errors import CallError
from rpcq.observability.sampling import Sampler
from rpcq.observer import (
    OK,
    Observed,
    ObservedCall,
    ObservedJob,
    ObservedPublish,
    ObservedRequest,
    ObservedSend,
    ObservedWrite,
    Observer,
)
from rpcq.runtime.process import own_version

MAX_STATE: Final = 2048
"""Largest size of `tracestate` and of `baggage`, bytes; a longer one is not sent, as W3C allows."""

Sent = TypeVar("Sent", ObservedCall, ObservedSend, ObservedPublish, ObservedWrite)

_CARRIED: Final = ("traceparent", "tracestate", "baggage")

_decided_against: Final[ContextVar[bool]] = ContextVar("rpcq_not_traced", default=False)
"""Whether the call of this handler was not picked: then the calls that it makes are not picked either."""


class Tracing(Observer):
    """Makes spans for calls, sends and events at a client, and for requests and attempts of jobs at a worker.

    Whether a call or a job is traced is decided before anything is built for it. Inside a trace, its `sampled` flag
    decides. Outside a trace, `ratio` and its ID decide: client and worker decide alike, and nothing is sent for it. The
    calls and sends of a handler follow the decision for the handler's own call or job.

    Args:
        ratio: share of the calls and jobs outside a trace that start a trace, from 0 to 1. The SDK's sampler may drop
            more.
        tracer_provider: provider of the tracer; None for the global one.

    Raises:
        ConfigurationError: the ratio is not a number from 0 to 1.

    """

    def __init__(self, ratio: float = 1.0, tracer_provider: trace.TracerProvider | None = None) -> None:
        self._picked = Sampler(ratio)
        self._tracer = trace.get_tracer("rpcq", own_version(), tracer_provider)
        self._context = TraceContextTextMapPropagator()
        self._baggage = W3CBaggagePropagator()

    # At a client.

    def on_call(self, call: ObservedCall) -> Callable[[ObservedCall], None] | None:
        """See `Observer`."""
        return self._sent(call, {"messaging.message.conversation_id": call.correlation_id}, _end)

    def on_send(self, send: ObservedSend) -> Callable[[ObservedSend], None] | None:
        """See `Observer`."""
        more = {**_of_job(send), "messaging.message.body.size": send.body_size}
        return self._sent(send, more, _end_send)

    def on_publish(self, publish: ObservedPublish) -> Callable[[ObservedPublish], None] | None:
        """See `Observer`."""
        more = {
            **_of_job(publish),
            "messaging.message.body.size": publish.body_size,
            "messaging.destination.name": publish.exchange.decode(),
            "messaging.rabbitmq.destination.routing_key": publish.label,
        }
        return self._sent(publish, more, _end_publish)

    def on_write(self, write: ObservedWrite) -> None:
        """See `Observer`. The conventions call the span "create": what is sent later, by a relay, has its context."""
        more = {**_of_job(write), "messaging.message.body.size": write.body_size}
        if write.event:
            more["messaging.destination.name"] = write.exchange.decode()
            more["messaging.rabbitmq.destination.routing_key"] = write.event
        ended = self._sent(write, more, _end_write, "create")
        if ended is not None:
            ended(write)

    def _sent(
        self,
        call: Sent,
        more: Mapping[str, str | int],
        end: Callable[[Span, Sent], None],
        operation: str = "send",
    ) -> Callable[[Sent], None] | None:
        parent = trace.get_current_span().get_span_context()
        if parent.is_valid:
            if not parent.trace_flags.sampled:
                call.headers = self._carried(None)
                return None
        elif _decided_against.get():
            call.headers = {"traceparent": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"}
            return None
        elif not self._picked(call.correlation_id):
            return None
        span = self._tracer.start_span(
            f"{operation} {call.label}", kind=SpanKind.PRODUCER, attributes={**_attributes(call, operation), **more}
        )
        call.headers = self._carried(span)
        return partial(end, span)

    def _carried(self, span: Span | None) -> Mapping[str, str]:
        """Return the headers to send: the current context, with this span in it if there is one."""
        context = None if span is None else trace.set_span_in_context(span)
        carrier: dict[str, str] = {}
        self._context.inject(carrier, context)
        self._baggage.inject(carrier, context)
        return {name: text for name, text in carrier.items() if len(text) <= MAX_STATE}

    # At a worker.

    def on_request(self, request: ObservedRequest) -> Callable[[ObservedRequest], None] | None:
        """See `Observer`."""
        context = self._context_of(request)
        if context is None:
            return None
        id_ = {"messaging.message.conversation_id": request.correlation_id}
        return partial(_end, self._process(request, context, id_))

    def on_job(self, job: ObservedJob) -> Callable[[ObservedJob], None] | None:
        """See `Observer`."""
        context = self._context_of(job)
        if context is None:
            return None
        sender = trace.get_current_span(context).get_span_context()
        context = trace.set_span_in_context(trace.INVALID_SPAN, context)  # the sender's baggage, and a trace of its own
        return partial(_end_job, self._process(job, context, _of_job(job), [Link(sender)] if sender.is_valid else []))

    def _context_of(self, received: ObservedRequest | ObservedJob) -> Context | None:
        """Return the context for its span, with the sender's span if that is known; None if it is not traced."""
        context = self._received(received.headers) if "traceparent" in received.headers else None
        if context is not None:
            if trace.get_current_span(context).get_span_context().trace_flags.sampled:
                return context
            if received.ran:
                attach(context)  # the calls of the handler are not traced either
            return None
        if self._picked(received.correlation_id):
            return Context()
        if received.ran:
            attach(Context())  # a sender in this process may have started the task: its span is not that of the job
            _decided_against.set(True)
        return None

    def _process(
        self,
        received: ObservedRequest | ObservedJob,
        context: Context,
        more: Mapping[str, str | int],
        links: Sequence[Link] = (),
    ) -> Span:
        attributes = {**_attributes(received, "process"), **more, "messaging.message.body.size": received.body_size}
        if received.caller:
            attributes["messaging.client.id"] = received.caller
        if received.attempt > 1:
            attributes["rpcq.attempt"] = received.attempt
        span = self._tracer.start_span(
            f"process {received.label}", context=context, kind=SpanKind.CONSUMER, attributes=attributes, links=links
        )
        if received.ran:
            # In the context of the handler's task, which ends with it: there is nothing to detach.
            attach(trace.set_span_in_context(span, context))
        return span

    def _received(self, headers: Mapping[str, Any]) -> Context | None:
        """Return the context in the headers of a request or a job; None if it is not valid."""
        carrier = {name: headers[name] for name in _CARRIED if isinstance(headers.get(name), str)}
        context = self._baggage.extract(carrier, self._context.extract(carrier, Context()))
        return context if trace.get_current_span(context).get_span_context().is_valid else None


def _attributes(observed: Observed, operation: str) -> dict[str, str | int]:
    exchange = observed.exchange.decode()
    return {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": f"{exchange}:{observed.service}" if exchange else observed.service,
        "messaging.rabbitmq.destination.routing_key": observed.service,
        "rpcq.service": observed.service,
        "rpcq.method": observed.method,
    }


def _end(span: Span, observed: Observed) -> None:
    if observed.code != OK:
        span.set_attribute("error.type", observed.code)
        span.set_status(Status(StatusCode.ERROR, observed.code))
        error = observed.error
        if isinstance(error, CallError):
            span.set_attribute("rpcq.executed", error.executed)
            if error.incident:
                span.set_attribute("rpcq.incident", error.incident)
    span.end()


def _of_job(job: ObservedSend | ObservedJob) -> dict[str, str | int]:
    event = job.label if isinstance(job, ObservedPublish) else ""
    if isinstance(job, ObservedJob | ObservedWrite):
        event = job.event
    found: dict[str, str | int] = {"messaging.message.id": job.correlation_id}
    return found | {"rpcq.event": event} if event else found


def _end_write(span: Span, _write: ObservedWrite) -> None:
    span.end()


def _end_send(span: Span, send: ObservedSend) -> None:
    span.set_attribute("rpcq.queued", send.queued)
    _end(span, send)


def _end_publish(span: Span, publish: ObservedPublish) -> None:
    if publish.heard is not None:
        span.set_attribute("rpcq.heard", publish.heard)
    _end_send(span, publish)


def _end_job(span: Span, job: ObservedJob) -> None:
    span.set_attribute("rpcq.outcome", job.outcome)
    if job.code != OK:
        span.set_attribute("rpcq.reason", job.code)
    if job.outcome in ("retried", "dead"):
        span.set_attribute("error.type", job.code)
        span.set_status(Status(StatusCode.ERROR, job.code))
    if job.incident:
        span.set_attribute("rpcq.incident", job.incident)
    span.end()
