"""Which jobs a worker has in hand: from their delivery until they are settled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rpcq.jobs.invocation import Served
    from rpcq.jobs.run import JobRun
    from rpcq.transport.base import Delivery
    from rpcq.wire.jobs import JobMessage


class Hand:
    """The jobs in hand, by ID, and twins: further ones that have the ID of one of them."""

    def __init__(self) -> None:
        self._runs: dict[str, JobRun] = {}
        self._twins: set[JobRun] = set()

    def __len__(self) -> int:
        return len(self._runs) + len(self._twins)

    def __iter__(self) -> Iterator[JobRun]:
        return iter((*self._runs.values(), *self._twins))  # a copy: they change meanwhile

    def add(self, run: JobRun) -> None:
        """Take a job."""
        if self._runs.setdefault(run.job.id, run) is not run:
            self._twins.add(run)

    def forget(self, run: JobRun) -> None:
        """The job is settled, or its session is lost."""
        if self._runs.get(run.job.id) is run:
            del self._runs[run.job.id]
        else:
            self._twins.discard(run)

    def adopt(self, served: Served, job: JobMessage, delivery: Delivery) -> JobRun | None:
        """Let a job that is still in hand take over its redelivery: the session of its first delivery was lost.

        Returns that job; None if there is none.
        """
        for run in (self._runs.get(job.id), *self._twins):
            # Of the same queue: the copies of an event in several subscriptions have one ID.
            if run is not None and run.job.id == job.id and run.served is served:
                if run.delivery.source is delivery.source:
                    continue  # this session delivered both: they are two messages with one ID
                run.delivery = delivery
                if run.lane is not None:
                    run.lane.adopted(run)
                return run
        return None
