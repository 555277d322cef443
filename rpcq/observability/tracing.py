"""Traces with OpenTelemetry's API: a span for each call at its client, and a span at its worker, in one trace.

Spans follow the conventions for messaging (https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/) and
for RabbitMQ. The context is sent in the headers of W3C Trace Context and W3C Baggage.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context, attach
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rpcq.errors import CallError
from rpcq.observability.sampling import Sampler
from rpcq.observer import OK, Observed, ObservedCall, ObservedRequest, Observer
from rpcq.runtime.process import own_version

MAX_STATE: Final = 2048
"""Largest size of `tracestate` and of `baggage`, bytes; a longer one is not sent, as W3C allows."""

_CARRIED: Final = ("traceparent", "tracestate", "baggage")

_decided_against: Final[ContextVar[bool]] = ContextVar("rpcq_not_traced", default=False)
"""Whether the call of this handler was not picked: then the calls that it makes are not picked either."""


class Tracing(Observer):
    """Makes spans for calls at a client, and for requests at a worker.

    Whether a call is traced is decided before anything is built for it. Inside a trace, its `sampled` flag decides.
    Outside a trace, `ratio` and the call's correlation ID decide: client and worker decide alike, and nothing is sent
    for it. The calls that a handler makes follow the decision for the handler's own call.

    Args:
        ratio: share of the calls outside a trace that start a trace, from 0 to 1. The SDK's sampler may drop more.
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
            f"send {call.label}", kind=SpanKind.PRODUCER, attributes=_attributes(call, "send")
        )
        call.headers = self._carried(span)
        return partial(_end, span)

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
        context = self._received(request.headers) if "traceparent" in request.headers else None
        if context is not None:
            if not trace.get_current_span(context).get_span_context().trace_flags.sampled:
                if request.ran:
                    attach(context)  # the calls of the handler are not traced either
                return None
        elif not self._picked(request.correlation_id):
            if request.ran:
                _decided_against.set(True)
            return None
        else:
            context = Context()
        attributes = _attributes(request, "process") | {"messaging.message.body.size": request.body_size}
        if request.caller:
            attributes["messaging.client.id"] = request.caller
        if request.attempt > 1:
            attributes["rpcq.attempt"] = request.attempt
        span = self._tracer.start_span(
            f"process {request.label}", context=context, kind=SpanKind.CONSUMER, attributes=attributes
        )
        if request.ran:
            # In the context of the handler's task, which ends with it: there is nothing to detach.
            attach(trace.set_span_in_context(span, context))
        return partial(_end, span)

    def _received(self, headers: Mapping[str, Any]) -> Context | None:
        """Return the context in the headers of a request; None if it is not valid."""
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
        "messaging.message.conversation_id": observed.correlation_id,
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
