"""Traces with OpenTelemetry's API: a span for each call at its client, and one at its worker, in one trace.

Spans follow the conventions for messaging (https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/) and
for RabbitMQ; context goes over the wire in the headers of W3C Trace Context and W3C Baggage.
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
"""Bytes of `tracestate` and of `baggage` that are sent; more of either is left out, as W3C allows."""

_CARRIED: Final = ("traceparent", "tracestate", "baggage")

_decided_against: Final[ContextVar[bool]] = ContextVar("rpcq_not_traced", default=False)
"""Whether this handler's call was not picked: then the calls that it makes are not, either."""


class Tracing(Observer):
    """Makes spans for calls at a client, and for requests at a worker.

    Whether a call is traced is decided before anything is built for it. Inside a trace, by that trace: its `sampled`
    flag. Outside, by `ratio` and the call's correlation ID, and so alike at both ends without a word on the wire; what
    a handler calls goes by what was decided for itself.

    Args:
        ratio: the share of calls outside a trace that begins one, from 0 to 1. The SDK's sampler has its say on top.
        tracer_provider: None for the global one.

    Raises:
        ConfigurationError: the ratio is none.

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
        """What goes over the wire: the context with this span in it, or as it is."""
        context = None if span is None else trace.set_span_in_context(span)
        carrier: dict[str, str] = {}
        self._context.inject(carrier, context)
        self._baggage.inject(carrier, context)
        return {name: text for name, text in carrier.items() if len(text) <= MAX_STATE}

    # At a worker.

    def on_request(self, request: ObservedRequest) -> Callable[[ObservedRequest], None] | None:
        """See `Observer`."""
        context = self._came(request.headers) if "traceparent" in request.headers else None
        if context is not None:
            if not trace.get_current_span(context).get_span_context().trace_flags.sampled:
                if request.ran:
                    attach(context)  # what the handler calls is not traced, either
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

    def _came(self, headers: Mapping[str, Any]) -> Context | None:
        """The context that came over the wire; None if that is none."""
        carrier = {name: headers[name] for name in _CARRIED if isinstance(headers.get(name), str)}
        context = self._baggage.extract(carrier, self._context.extract(carrier, Context()))
        return context if trace.get_current_span(context).get_span_context().is_valid else None


def _attributes(seen: Observed, operation: str) -> dict[str, str | int]:
    exchange = seen.exchange.decode()
    return {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": f"{exchange}:{seen.service}" if exchange else seen.service,
        "messaging.rabbitmq.destination.routing_key": seen.service,
        "messaging.message.conversation_id": seen.correlation_id,
        "rpcq.service": seen.service,
        "rpcq.method": seen.method,
    }


def _end(span: Span, seen: Observed) -> None:
    if seen.code != OK:
        span.set_attribute("error.type", seen.code)
        span.set_status(Status(StatusCode.ERROR, seen.code))
        error = seen.error
        if isinstance(error, CallError):
            span.set_attribute("rpcq.executed", error.executed)
            if error.incident:
                span.set_attribute("rpcq.incident", error.incident)
    span.end()
