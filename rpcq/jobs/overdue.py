"""What a worker does with jobs that it has held for too long: RabbitMQ bounds that to 30 minutes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sized
from typing import TYPE_CHECKING, Final

from rpcq import logs

if TYPE_CHECKING:
    from rpcq.jobs.limits import Limits
    from rpcq.jobs.ordering import Ordering
    from rpcq.jobs.run import JobRun
    from rpcq.jobs.suspects import Suspects

log = logs.get_logger("rpcq.worker")

LOOK_PAUSE: Final = 5.0
"""Seconds between two looks at how long the jobs in hand are held."""

LONGEST_WAIT: Final = 30.0
"""Seconds that a job waits here for its turn, until it is put off."""

LONGEST_RUN: Final = 28 * 60.0
"""Seconds after which a job is settled although its handler does not end. It is longer than any timeout."""


class Overdue:
    """Looks every few seconds at how long jobs are held, while there are any.

    Args:
        in_hand: all jobs that the worker has.
        running: the jobs whose handlers run.
        waiting: those that wait for suspects, for a limit, or in an ordered lane.
        write_off: settles a job although its handler goes on; the seconds are how long it has run.
        put_off: has the broker hold a job for so many seconds.

    """

    def __init__(
        self,
        in_hand: Sized,
        running: Collection[JobRun],
        waiting: tuple[Suspects, Limits, Ordering],
        write_off: Callable[[JobRun, float], None],
        put_off: Callable[[JobRun, float], None],
    ) -> None:
        self._in_hand = in_hand
        self._running = running
        self._suspects, self._limits, self._ordering = waiting
        self._write_off = write_off
        self._put_off = put_off
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def look_later(self) -> None:
        """A job begins, or waits: look at it from now on."""
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(LOOK_PAUSE, self._look)

    def close(self) -> None:
        """Look no more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        """Put off what has waited too long, and write off what has run too long: threads, for example."""
        self._timer = None
        now = time.monotonic()
        for run in [run for run in self._running if run.since <= now - LONGEST_RUN]:
            log.error("handler does not end: its job is settled, and its thread may be lost", **run.names)
            self._write_off(run, now - run.since)
        for run in self._suspects.take_held(now - LONGEST_WAIT):
            self._put_off(run, LONGEST_WAIT)
        self._limits.put_off_since(now - LONGEST_WAIT)
        self._ordering.look(now)
        if len(self._in_hand):
            self.look_later()
