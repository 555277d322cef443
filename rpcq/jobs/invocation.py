"""A job that is to run: its handler, its arguments, its message. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rpcq.invocation import Invocation
from rpcq.runtime.deadline import Deadline
from rpcq.service import Context, Method, Service
from rpcq.wire.jobs import JobMessage


@dataclass(eq=False, slots=True)
class Served:
    """A queue of a service whose jobs are done here.

    Attributes:
        service: the service.
        state: what its lifespan yielded.
        room: how many jobs of the queue may wait here for a turn by their own limits.

    """

    service: Service
    state: Any
    room: int


class JobInvocation(Invocation):
    """The handler of a job, with its message."""

    __slots__ = ("job", "state")

    def __init__(
        self,
        job: JobMessage,
        method: Method,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        deadline: float,
        state: Any,
    ) -> None:
        super().__init__(method, arguments, deadline)
        self.job = job
        self.state = state

    def names(self) -> dict[str, Any]:
        """The fields that identify the job in logs."""
        return {"job": self.method.label, "job_id": self.job.id, "attempt": self.job.attempt}

    def context(self) -> Context:
        """What the handler gets to know of the job."""
        job = self.job
        return Context(
            service=self.method.service,
            method=self.method.name,
            correlation_id=job.id,
            deadline=Deadline(self.deadline),
            attempt=job.attempt,
            idempotency_key=job.key,
            caller=job.app_id or None,
            user=job.user or None,
            metadata=job.metadata,
            state=self.state,
            due=None if job.due_ms is None else datetime.fromtimestamp(job.due_ms / 1000, UTC),
        )
