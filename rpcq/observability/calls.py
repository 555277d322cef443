"""Logs of calls: one line when a call begins and one when it has ended, for all calls or a share of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rpcq import logs
from rpcq.errors import CallError
from rpcq.observability.sampling import Sampler
from rpcq.observer import OK, ObservedCall, ObservedRequest, Observer

client_log = logs.get_logger("rpcq.client.calls")
worker_log = logs.get_logger("rpcq.worker.calls")


class CallLogs(Observer):
    """Logs calls at a client, and requests at a worker. Bodies, headers and metadata are never logged.

    The logger `rpcq.worker` logs some things without this observer: exceptions of handlers with their incident IDs,
    sessions that go down, and workers that start and stop.

    Args:
        ratio: share of calls that is logged, from 0 to 1; client and worker log the same calls.

    Raises:
        ConfigurationError: the ratio is not a number from 0 to 1.

    """

    def __init__(self, ratio: float = 1.0) -> None:
        self._picked = Sampler(ratio)

    def on_call(self, call: ObservedCall) -> Callable[[ObservedCall], None] | None:
        """See `Observer`."""
        if not self._picked(call.correlation_id):
            return None
        client_log.info("call started", method=call.label, correlation_id=call.correlation_id)
        return self._call_ended

    def _call_ended(self, call: ObservedCall) -> None:
        text = "call completed" if call.code == OK else "call failed"
        client_log.info(text, **_ended(call))

    def on_request(self, request: ObservedRequest) -> Callable[[ObservedRequest], None] | None:
        """See `Observer`."""
        if not self._picked(request.correlation_id):
            return None
        waited = request.queue_seconds
        worker_log.info(
            "request received",
            method=request.label,
            correlation_id=request.correlation_id,
            attempt=request.attempt,
            caller=request.caller,
            bytes=request.body_size,
            queue_ms=None if waited is None else round(waited * 1000, 3),
        )
        if request.ran:
            worker_log.info("handler started", method=request.label, correlation_id=request.correlation_id)
        return self._request_ended

    def _request_ended(self, request: ObservedRequest) -> None:
        failed = "request failed" if request.ran else "request refused"
        worker_log.info("request completed" if request.code == OK else failed, **_ended(request))


def _ended(observed: ObservedCall | ObservedRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "method": observed.label,
        "correlation_id": observed.correlation_id,
        "code": observed.code,
        "duration_ms": round(observed.seconds * 1000, 3),
    }
    if observed.code != OK:
        fields["attempt"] = observed.attempt
    if isinstance(observed.error, CallError):
        fields["executed"] = observed.error.executed
        if observed.error.incident:
            fields["incident"] = observed.error.incident
    return fields
