"""A job in hand: from its delivery until it is settled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from rpcq.execution import Run
from rpcq.invocation import Interruption, Invocation
from rpcq.jobs.invocation import Served
from rpcq.options import JobOptions
from rpcq.service import Offered
from rpcq.transport.base import Delivery
from rpcq.wire.job_queues import ALONE_FROM
from rpcq.wire.jobs import JobMessage

if TYPE_CHECKING:
    from rpcq.jobs.keys import Claimed
    from rpcq.jobs.limits import Limit
    from rpcq.jobs.observing import Observation
    from rpcq.jobs.ordering import Lane
    from rpcq.jobs.telling import Watcher


class Settler(Protocol):
    """What is called with the end of a run, and settles its delivery."""

    def returned(self, run: JobRun, value: Any) -> None:
        """The handler returned."""

    def raised(self, run: JobRun, invocation: Invocation, error: BaseException) -> None:
        """The handler raised, or did not run."""

    def interrupted(self, run: JobRun, invocation: Invocation, why: Interruption) -> None:
        """The handler was interrupted, or never entered."""


class JobRun(Run):
    """A job in hand, from its delivery until it is settled.

    Attributes:
        runner: what settles it.
        served: the queue that it came from.
        delivery: its delivery.
        job: its message.
        method: what runs it; None if nothing here does.
        is_suspect: whether it came from the queue for suspects.
        since: when it began, or began to wait for suspects, on time.monotonic().
        limit: the limit that it counts towards while it runs.
        key: its key in the worker's memory; None if the service has a store, or nothing is remembered.
        claimed: its key in the store of its service.
        observation: what observers see of its handler's run; None without observers, and after it ended.
        watcher: the sender that watches it; None if nobody does.

    """

    __slots__ = (
        "claimed",
        "delivery",
        "is_suspect",
        "job",
        "key",
        "limit",
        "method",
        "observation",
        "runner",
        "served",
        "since",
        "watcher",
    )

    def __init__(
        self,
        runner: Settler,
        served: Served,
        delivery: Delivery,
        job: JobMessage,
        method: Offered | None,
        *,
        is_suspect: bool,
    ) -> None:
        super().__init__()
        self.runner = runner
        self.served = served
        self.delivery = delivery
        self.job = job
        self.method = method
        self.is_suspect = is_suspect
        self.since = 0.0
        self.limit: Limit | None = None
        self.key: str | None = None
        self.claimed: Claimed | None = None
        self.observation: Observation | None = None
        self.watcher: Watcher | None = None

    @property
    def id(self) -> str:
        """The job's ID, for logs."""
        return self.job.id

    @property
    def names(self) -> dict[str, Any]:
        """The fields that identify the job in logs."""
        return self.served.names(self.job)

    @property
    def lane(self) -> Lane | None:
        """The ordered lane that it came through; None for another queue."""
        return self.served.lane

    @property
    def order_key(self) -> str:
        """Its order key; empty if it has none."""
        return self.job.order_key or ""

    @property
    def is_alone(self) -> bool:
        """Whether no other job may run beside it, because it may be what kills its workers."""
        return self.is_suspect or (self.lane is not None and self.job.returns >= ALONE_FROM)

    @property
    def longest(self) -> float:
        """Seconds that one attempt may run; 0 if nothing here runs it."""
        return 0.0 if self.method is None or self.method.job is None else self.method.job.timeout

    @property
    def options(self) -> JobOptions:
        """How it is run; there is a method that runs it."""
        assert self.method is not None  # noqa: S101 - without one, it is moved on arrival
        assert self.method.job is not None  # noqa: S101 - `Service` sets it
        return self.method.job

    def returned(self, invocation: Invocation, value: Any) -> None:  # noqa: ARG002 - its service has the method
        """See `Run`."""
        self.runner.returned(self, value)

    def raised(self, invocation: Invocation, error: BaseException) -> None:
        """See `Run`."""
        self.runner.raised(self, invocation, error)

    def interrupted(self, invocation: Invocation, why: Interruption) -> None:
        """See `Run`."""
        self.runner.interrupted(self, invocation, why)
