"""Gathers the jobs of ordered lanes that may be what kills their workers, so that the first turn is the right one's.

Each lane has a consumer of its own. After the loss of a worker, what it held comes back lane by lane, to a worker whose
session may still be opening. If the first one to arrive began at once, it would be the same one each time: with poison
among them, all others would come back as often as it, and be taken for poison too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from rpcq.jobs.outcomes import turn_of

if TYPE_CHECKING:
    from rpcq.jobs.run import JobRun
    from rpcq.transport.base import Transport

GATHERING: Final = 2.0
"""Seconds for which such a job waits for those that are to run before it, while the session is up.

RabbitMQ delivers at once what is ready when a lane is consumed; this leaves time for far and for busy brokers.
"""

CLOCK_SLACK: Final = 5.0
"""Seconds that a pause may last longer than it should, when the machine's clock is set back meanwhile."""


async def sleep(transport: Transport, until_ms: int, seconds: float) -> None:
    """Wait until a time of the transport's clock that is so many seconds from now."""
    try:
        async with asyncio.timeout(seconds + CLOCK_SLACK):
            await transport.sleep_until(until_ms)
    except TimeoutError:
        pass  # the machine's clock was set back


class Gathering:
    """The gathered jobs of all ordered lanes of a worker; they have their turns together, in the order of `turn_of`.

    Args:
        transport: the worker's.
        is_ready: whether the session is up, and jobs may begin.

    """

    def __init__(self, transport: Transport, is_ready: Callable[[], bool]) -> None:
        self._transport = transport
        self._is_ready = is_ready
        self._runs: dict[JobRun, None] = {}
        self._until_ms = 0
        self._task: asyncio.Task[None] | None = None

    def add(self, run: JobRun) -> None:
        """Take a job of an ordered lane; its lane is called with its turn."""
        self._runs[run] = None
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._gather())

    def discard(self, run: JobRun) -> None:
        """The job is held here no more."""
        if run in self._runs:
            del self._runs[run]
            if not self._runs:
                self.close()  # those that come again are gathered for the whole time

    def asleep(self, now_ms: int) -> list[JobRun]:
        """The jobs that wait for a time that has not come."""
        return [*self._runs] if self._until_ms > now_ms else []

    def close(self) -> None:
        """Call no lane any more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _gather(self) -> None:
        was_ready = is_ready = False
        while not (was_ready and is_ready):
            was_ready = self._is_ready()
            self._until_ms = self._transport.now_ms() + round(GATHERING * 1000)
            await sleep(self._transport, self._until_ms, GATHERING)
            is_ready = self._is_ready()
        self._task = None
        runs = sorted(self._runs, key=lambda run: turn_of(run.job))
        self._runs.clear()
        for run in runs:
            assert run.lane is not None  # noqa: S101 - only jobs of ordered lanes are gathered
            run.lane.turn(run)
