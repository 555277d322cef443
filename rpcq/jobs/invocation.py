"""A job that is to run: the queue that it came from, its handler, its arguments, its message. Pure."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rpcq.errors import InvalidParams
from rpcq.invocation import Invocation
from rpcq.jobs.outcomes import Again, Dead, Filtered, is_last_attempt, of_refusal, of_unknown
from rpcq.once import Found, NotBegun, OnceKey
from rpcq.results import fingerprint
from rpcq.runtime.deadline import Deadline
from rpcq.service import Context, Offered, Report, Service
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.jobs import JobMessage

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a handler, by position and by name."""

if TYPE_CHECKING:
    from rpcq.jobs.ordering import Lane


class Served:
    """A queue of a service whose jobs are done here. All that depends on the kind of queue is asked of it.

    Args:
        service: the service.
        state: what its lifespan yielded.
        room: how many jobs of the queue may wait here for a turn by their own limits.
        topology: of the namespace.
        lane: the ordered lane that it is; None for another queue.

    Attributes:
        subscription: the name of the subscription whose queue it is; empty for a queue of jobs.
        exchange: what its jobs are published to.
        suspect_key: where its suspects go, at the exchange for what is due.
        dead_key: where its dead letters go.

    """

    __slots__ = ("_topology", "dead_key", "exchange", "lane", "room", "service", "state", "suspect_key")

    subscription = ""

    def __init__(
        self, service: Service, state: Any, *, room: int, topology: JobTopology, lane: Lane | None = None
    ) -> None:
        self.service = service
        self.state = state
        self.room = room
        self.lane = lane
        self.exchange = topology.jobs.name.encode()
        self.suspect_key = topology.suspect_key(service.name)
        self.dead_key = topology.address(service.name)
        self._topology = topology

    def address(self, job: JobMessage) -> str:
        """Where a job of the queue goes after a delay."""
        return self._topology.address(self.service.name, job.lane)

    def find(self, job: JobMessage) -> Offered | None:
        """What runs a job; None if nothing here does."""
        return self.service.jobs.get(job.name)

    def unknown(self, job: JobMessage) -> Again | Dead | Filtered:
        """What becomes of a job for which `find` has nothing."""
        return of_unknown(job, is_method=job.name in self.service.methods)

    def read(self, job: JobMessage) -> Arguments:
        """Read the arguments of the handler of a job for which `find` has something.

        Raises:
            InvalidParams: they do not fit.

        """
        return self.service.jobs[job.name].parameters.read(job.body)

    def refused(self, job: JobMessage, error: InvalidParams) -> Again | Dead | Filtered:
        """What becomes of a job whose arguments `read` refused."""
        return of_refusal(job, error)

    def names(self, job: JobMessage) -> dict[str, Any]:
        """The fields that identify a job of the queue in logs."""
        return {"job": f"{self.service.name}.{job.name}", "job_id": job.id, "attempt": job.attempt}


def once_key(method: Offered, job: JobMessage) -> OnceKey:
    """The key under which a job is done once.

    It does not have the broker's user that sent the job: only the first attempt carries that. A subscription does
    events of several names, each with keys of its own.
    """
    consumer = method.label if method.name == job.name else f"{method.label}/{job.name}"
    return OnceKey(consumer, job.key, fingerprint(job.name, job.body))


class JobInvocation(Invocation):
    """The handler of a job, with its message.

    Attributes:
        job: the message.
        served: the queue that it came from.
        report: takes what its handler says of its progress; None if nobody watches it.
        given: what an `async def` handler of a job with `once` gets from that.

    """

    __slots__ = ("given", "job", "report", "served")

    def __init__(
        self,
        job: JobMessage,
        method: Offered,
        arguments: Arguments,
        deadline: float,
        served: Served,
        report: Report | None = None,
    ) -> None:
        super().__init__(method, arguments, deadline)
        self.job = job
        self.served = served
        self.report = report
        self.given: Any = None

    def call(self) -> Any:
        """See `Invocation`; the handler of a job with `once` also gets what that gives."""
        options = self.method.job
        if options is None or options.once is None:
            return super().call()
        if self.method.is_async:
            return self.method.call_once(self.args, self.params, self.context, self.given)
        with options.once.open_blocking(once_key(self.method, self.job)) as given:
            if time.monotonic() >= self.deadline:  # it has waited for the database, in its thread
                raise NotBegun(Found.FAILED)
            return self.method.call_once(self.args, self.params, self.context, given)

    def names(self) -> dict[str, Any]:
        """The fields that identify the job in logs."""
        return self.served.names(self.job)

    def context(self) -> Context:
        """What the handler gets to know of the job."""
        job, options = self.job, self.method.job
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
            state=self.served.state,
            due=None if job.due_ms is None else datetime.fromtimestamp(job.due_ms / 1000, UTC),
            order_key=job.order_key,
            is_last_attempt=options is not None and is_last_attempt(job, options),
            _report=self.report,
        )
