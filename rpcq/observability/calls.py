"""Logs of calls and jobs: one line when it begins and one when it has ended, for all of them or a share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rpcq import logs
from rpcq.errors import CallError
from rpcq.observability.sampling import Sampler
from rpcq.observer import OK, ObservedCall, ObservedJob, ObservedPublish, ObservedRequest, ObservedSend, Observer

client_log = logs.get_logger("rpcq.client.calls")
worker_log = logs.get_logger("rpcq.worker.calls")


class CallLogs(Observer):
    """Logs calls, sends and events at a client, requests and jobs at a worker.

    It never logs bodies, headers and metadata.

    The logger `rpcq.worker` logs some things without this observer: exceptions of handlers with their incident IDs,
    jobs that run again later or are dead, sessions that go down, and workers that start and stop.

    Args:
        ratio: share of calls and jobs that is logged, from 0 to 1; client and worker log the same ones.

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

    def on_send(self, send: ObservedSend) -> Callable[[ObservedSend], None] | None:
        """See `Observer`."""
        return self._send_ended if self._picked(send.correlation_id) else None

    def _send_ended(self, send: ObservedSend) -> None:
        client_log.info(
            "job sent" if send.code == OK else "job not sent",
            job=send.label,
            job_id=send.correlation_id,
            queued=send.queued,
            bytes=send.body_size,
            duration_ms=round(send.seconds * 1000, 3),
        )

    def on_publish(self, publish: ObservedPublish) -> Callable[[ObservedPublish], None] | None:
        """See `Observer`."""
        return self._publish_ended if self._picked(publish.correlation_id) else None

    def _publish_ended(self, publish: ObservedPublish) -> None:
        client_log.info(
            "event published" if publish.code == OK else "event not published",
            event_name=publish.label,
            event_id=publish.correlation_id,
            queued=publish.queued,
            heard=publish.heard,
            bytes=publish.body_size,
            duration_ms=round(publish.seconds * 1000, 3),
        )

    def on_job(self, job: ObservedJob) -> Callable[[ObservedJob], None] | None:
        """See `Observer`."""
        if not self._picked(job.correlation_id):
            return None
        if job.ran:
            waited = job.queue_seconds
            worker_log.info(
                "job started",
                **_named(job),
                caller=job.caller,
                bytes=job.body_size,
                queue_ms=None if waited is None else round(waited * 1000, 3),
            )
        return self._job_ended

    def _job_ended(self, job: ObservedJob) -> None:
        fields: dict[str, Any] = {"outcome": job.outcome, "duration_ms": round(job.seconds * 1000, 3)}
        if job.code != OK:
            fields["reason"] = job.code
        if job.incident:
            fields["incident"] = job.incident
        worker_log.info("job ended" if job.ran else "job not started", **_named(job), **fields)


def _named(job: ObservedJob) -> dict[str, Any]:
    event = {"event_name": job.event} if job.event else {}
    return {"job": job.label, **event, "job_id": job.correlation_id, "attempt": job.attempt}


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
