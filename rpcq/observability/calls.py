"""Logs of calls: a line when one begins and one when it has ended, for a share of them."""

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

    What a handler raised is logged in any case, by `rpcq.worker`, with its incident ID; so are sessions that go down,
    and workers that start and stop.

    Args:
        ratio: the share of calls that is logged, from 0 to 1; the same ones at both ends.

    Raises:
        ConfigurationError: the ratio is none.

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
        event = "call completed" if call.code == OK else "call failed"
        client_log.info(event, **_ended(call))

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
        event = "request failed" if request.ran else "request refused"
        worker_log.info("request completed" if request.code == OK else event, **_ended(request))


def _ended(seen: ObservedCall | ObservedRequest) -> dict[str, Any]:
    said: dict[str, Any] = {
        "method": seen.label,
        "correlation_id": seen.correlation_id,
        "code": seen.code,
        "duration_ms": round(seen.seconds * 1000, 3),
    }
    if seen.code != OK:
        said["attempt"] = seen.attempt
    if isinstance(seen.error, CallError):
        said["executed"] = seen.error.executed
        if seen.error.incident:
            said["incident"] = seen.error.incident
    return said
