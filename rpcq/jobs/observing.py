"""Calls observers with the jobs that a client sends, and with the attempts of jobs at a worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from rpcq import observer
from rpcq.errors import TooLarge
from rpcq.jobs.outcomes import Again, Dead, Suspect
from rpcq.observer import OK, Endings, JobOutcome, ObservedJob, ObservedSend, Queued
from rpcq.wire.jobs import JobMessage, check_headers

if TYPE_CHECKING:
    from rpcq.execution import Around, Enter
    from rpcq.jobs.invocation import Served
    from rpcq.jobs.run import JobRun

Sent = TypeVar("Sent", bound=ObservedSend)
SendObservers = Sequence[Callable[[ObservedSend], Callable[[ObservedSend], None] | None]]
JobObservers = Sequence[Callable[[ObservedJob], Callable[[ObservedJob], None] | None]]

UNREADABLE: Final = "rejected"
"""The reason of what a worker cannot read at all: the broker's own word for it."""


class SendObservation(Generic[Sent]):
    """One job, or one event, on its way to the broker.

    Args:
        observers: called with it now, and with its end.
        observed: what they see of it.
        message: its message, which gets the trace context that an observer sets.

    Attributes:
        observed: as above.

    """

    __slots__ = ("_began", "_endings", "observed")

    def __init__(
        self,
        observers: Sequence[Callable[[Sent], Callable[[Sent], None] | None]],
        observed: Sent,
        message: JobMessage,
    ) -> None:
        self.observed = observed
        observed.correlation_id = message.id
        observed.body_size = len(message.body)
        self._began = time.perf_counter()
        self._endings: Endings[Sent] = observer.begin(observers, observed)
        if observed.headers:
            headers = {**message.headers, **observed.headers}
            try:
                check_headers(headers)
            except TooLarge:
                return  # the sender's own headers leave no room for a trace
            message.headers = headers

    def end(self, queued: Queued, error: BaseException | None) -> None:
        """The send has ended: call the observers with what is known of the job."""
        self.observed.queued = queued
        self.observed.error = error
        self.observed.code = OK if error is None else observer.code_of(error)
        self.observed.seconds = time.perf_counter() - self._began
        observer.end(self._endings, self.observed)


class JobObserving:
    """Calls a worker's observers with the attempts of its jobs.

    Args:
        observers: called with each.
        now_ms: the time, in milliseconds since the epoch.

    """

    def __init__(self, observers: JobObservers, now_ms: Callable[[], int]) -> None:
        self._observers = observers
        self._now_ms = now_ms

    def wrap(self, run: JobRun, around: Around | None) -> Around:
        """Have observers called when the handler is entered, inside of `around`; for `Executor.begin`."""
        if around is None:
            return partial(self._enter, run)
        return lambda enter: around(partial(self._enter, run, enter))

    async def _enter(self, run: JobRun, enter: Enter) -> Any:
        """Enter the handler, in whose context observers are called."""
        observed = self._observed(run)
        observed.ran = True
        run.observation = observed, observer.begin(self._observers, observed)
        return await enter()

    def end(
        self, run: JobRun, outcome: JobOutcome, code: str, error: BaseException | None = None, incident: str = ""
    ) -> None:
        """What becomes of the job is decided, in its handler or before."""
        if run.observation is None:
            observed = self._observed(run)
            endings = observer.begin(self._observers, observed)
        else:
            observed, endings = run.observation
            run.observation = None
            observed.seconds = run.handler_ms / 1000
        observed.outcome, observed.code, observed.error, observed.incident = outcome, code, error, incident
        observer.end(endings, observed)

    def settled(self, run: JobRun, fate: Again | Dead | Suspect, error: BaseException | None, incident: str) -> None:
        """The job does not end as done."""
        match fate:
            case Again():
                self.end(run, "retried" if fate.is_retry else "put_off", fate.reason, error, incident)
            case Dead():
                self.end(run, "dead", fate.reason, error, incident)
            case Suspect():
                self.end(run, "suspect", "workers_lost")

    def given_back(self, run: JobRun) -> None:
        """The job goes back to its queue; without an observation, its handler was not entered, or has ended."""
        if run.observation is not None:
            self.end(run, "given_back", "stopped")

    def filtered(self, run: JobRun) -> None:
        """The job is acknowledged without a run."""
        self.end(run, "filtered", "unwanted")

    def unreadable(self, served: Served, body_size: int, outcome: JobOutcome = "dead") -> None:
        """A worker cannot read a job, and has the broker make a dead letter of it, or drops it."""
        service, name = served.service.name, served.subscription
        observed = ObservedJob(served.exchange, service, name, f"{service}.{name}")
        observed.body_size = body_size
        endings = observer.begin(self._observers, observed)
        observed.outcome, observed.code = outcome, UNREADABLE
        observer.end(endings, observed)

    def _observed(self, run: JobRun) -> ObservedJob:
        served, job = run.served, run.job
        # A sender may write any name.
        name = served.subscription if served.subscription or run.method is None else run.method.name
        observed = ObservedJob(served.exchange, served.service.name, name, f"{served.service.name}.{name}")
        observed.event = job.name if served.subscription else ""
        observed.correlation_id = job.id
        observed.attempt = job.attempt
        observed.caller = job.app_id
        observed.headers = job.headers
        observed.body_size = len(job.body)
        since = job.waits_since_ms
        observed.queue_seconds = None if since is None else max(0, self._now_ms() - since) / 1000
        return observed


Observation = tuple[ObservedJob, list[Callable[[Any], None]]]
"""What observers were called with at the beginning, and what they gave to be called at the end."""
