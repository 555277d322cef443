"""The limits of jobs in one worker: how many of one name run at once, and how often one begins.

    may begin now                               -> begins
    its turn is near, and few others wait       -> waits here
    else                                        -> put off: the broker holds it for a while

A job that waits here takes a place of its queue's prefetch. So only half of these places are for waiting: else a
backlog of one slow job would hold up every other job of its queue. Of those that wait, the ones of the highest priority
begin first. A job that is put off comes back about when its turn may be; the turn is not reserved for it, so whichever
job is there first has it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, get_args

from rpcq.options import Priority

if TYPE_CHECKING:
    from rpcq.jobs.invocation import Served
    from rpcq.jobs.run import JobRun
    from rpcq.options import JobOptions

NEAR: Final = 10.0
"""Seconds until its turn for which a job waits in the worker."""

FARTHEST: Final = 600.0
"""Seconds that a job is put off at most: the turns that are foretold depend on how long jobs take, and on how many
workers there are."""


class Limit:
    """The limit of one job. Times are seconds of the monotonic clock.

    Attributes:
        waiting: jobs that wait here -> since when; by priority, the highest first.
        timer: wakes the first of them, if `rate` holds it up.

    """

    def __init__(self, options: JobOptions) -> None:
        self.waiting: dict[Priority, OrderedDict[JobRun, float]] = {each: OrderedDict() for each in get_args(Priority)}
        self.timer: asyncio.TimerHandle | None = None
        self._most = options.max_concurrency
        self._spacing = options.spacing
        self._running = 0
        self._next = 0.0  # when the next one may begin, by `rate`
        self._last = dict.fromkeys(self.waiting, 0.0)  # when the turn is of the job that was put off last
        # Of a job, about. A first guess that is too long leaves turns unused; if it is too short, jobs come back early.
        self._duration = 0.05

    @property
    def is_full(self) -> bool:
        """Whether as many run as may."""
        return self._most is not None and self._running >= self._most

    def pause(self, now: float) -> float:
        """Seconds until the next one may begin by `rate`."""
        return max(0.0, self._next - now)

    def begin(self, now: float) -> None:
        """One begins."""
        self._running += 1
        self._next = now + self._spacing

    def end(self, seconds: float) -> None:
        """One has ended that took so long."""
        self._running -= 1
        self._duration += (seconds - self._duration) / 8

    @property
    def first(self) -> JobRun | None:
        """The next one of those that wait; None if none waits."""
        return next((run for runs in self.waiting.values() for run in runs), None)

    def turn(self, now: float, priority: Priority) -> float:
        """Seconds until the turn of a job that comes now, as far as can be foretold; 0 if it may begin."""
        ahead = int(self.is_full)
        for each, runs in self.waiting.items():
            ahead += len(runs)
            if each == priority:
                break
        return self.pause(now) + ahead * self._gap

    def put_off(self, now: float, priority: Priority) -> float:
        """Seconds until a job that is put off shall come back: each one later than the one before of its priority."""
        turn = max(self._last[priority], now + self.turn(now, priority))
        self._last[priority] = last = min(turn + self._gap, now + FARTHEST)
        return last - now

    @property
    def _gap(self) -> float:
        """Seconds from one turn to the next, about."""
        return max(self._spacing, 0.0 if self._most is None else self._duration / self._most)


class Limits:
    """The limits of all jobs of a worker.

    Args:
        begin: begins a job.
        put_off: has the broker hold a job for so many seconds.
        may_begin: whether any job that waits may begin now.

    """

    def __init__(
        self,
        begin: Callable[[JobRun], None],
        put_off: Callable[[JobRun, float], None],
        may_begin: Callable[[], bool],
    ) -> None:
        self._begin = begin
        self._put_off = put_off
        self._may_begin = may_begin
        self._limits: dict[str, Limit] = {}
        self._waiting: Counter[Served] = Counter()  # jobs that wait here

    def enter(self, run: JobRun) -> None:
        """Have a job begin, now or later.

        A suspect begins at once: nothing else runs, and each of its turns would hold up the whole worker.
        """
        assert run.method is not None  # noqa: S101 - it may run
        limit = self._limits.get(run.method.label)
        if limit is None:
            limit = self._limits[run.method.label] = Limit(run.options)
        now = time.monotonic()
        self._go_on(limit)
        priority = run.job.priority
        turn = limit.turn(now, priority)
        if turn <= 0 or run.is_alone:
            self._enter(limit, run, now)
        elif turn <= NEAR and self._waiting[run.served] < run.served.room:
            limit.waiting[priority][run] = now
            self._waiting[run.served] += 1
            self._wake(limit, now)
        else:
            self._put_off(run, limit.put_off(now, priority))

    def leave(self, run: JobRun, seconds: float) -> None:
        """A job that began has ended, after so many seconds."""
        if run.limit is not None:
            limit, run.limit = run.limit, None
            limit.end(seconds)
            self._go_on(limit)

    def go_on(self) -> None:
        """Jobs that wait may begin again."""
        for limit in self._limits.values():
            self._go_on(limit)

    def put_off_since(self, since: float) -> None:
        """Put off the jobs that have waited since then, or longer."""
        for limit in self._limits.values():
            waiting = [(run, began) for runs in limit.waiting.values() for run, began in runs.items()]
            for run in [run for run, began in waiting if began <= since]:
                self._take(limit, run)
                self._put_off(run, limit.put_off(time.monotonic(), run.job.priority))

    def take_waiting(self) -> Iterator[JobRun]:
        """Take out the jobs that wait here."""
        for limit in self._limits.values():
            for run in [run for runs in limit.waiting.values() for run in runs]:
                self._take(limit, run)
                yield run

    def _go_on(self, limit: Limit) -> None:
        """Begin those that wait and may begin."""
        while (run := limit.first) is not None and not limit.is_full and self._may_begin():
            now = time.monotonic()
            if limit.pause(now) > 0:
                self._wake(limit, now)
                return
            self._take(limit, run)
            self._enter(limit, run, now)

    def _enter(self, limit: Limit, run: JobRun, now: float) -> None:
        run.limit = limit
        limit.begin(now)
        self._begin(run)

    def _take(self, limit: Limit, run: JobRun) -> None:
        del limit.waiting[run.job.priority][run]
        self._waiting[run.served] -= 1
        if limit.first is None and limit.timer is not None:
            limit.timer.cancel()
            limit.timer = None

    def _wake(self, limit: Limit, now: float) -> None:
        if limit.timer is None and (pause := limit.pause(now)) > 0:
            limit.timer = asyncio.get_running_loop().call_later(pause, self._woken, limit)

    def _woken(self, limit: Limit) -> None:
        limit.timer = None
        self._go_on(limit)
