"""A watched job for a sender that blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Self, TypeVar

from rpcq.errors import ClosedError
from rpcq.options import check_seconds
from rpcq.runtime import blocking
from rpcq.watching.jobs import WatchedJob
from rpcq.wire.jobs import Job
from rpcq.wire.watching import Progress

T = TypeVar("T")
R = TypeVar("R")

_UNSET: Final[Any] = None


@dataclass(frozen=True, slots=True)
class BlockingJob(Job, Generic[T]):
    """A job that its sender watches, for programs that block; see `rpcq.WatchedJob`. Any thread may use it.

    Attributes:
        id: as for `Job`; so are `service`, `name`, `key`, `due` and `priority`.

    """

    _job: WatchedJob[T] = field(default=_UNSET, repr=False, compare=False, kw_only=True)
    _loop: asyncio.AbstractEventLoop = field(default=_UNSET, repr=False, compare=False, kw_only=True)

    @classmethod
    def of(cls, job: WatchedJob[T], loop: asyncio.AbstractEventLoop) -> Self:
        """Make one of a job whose client runs in this event loop."""
        return cls(job.id, job.service, job.name, job.key, job.due, job.priority, _job=job, _loop=loop)

    def result(self, *, timeout: float) -> T:
        """Wait until the job is done, and return what its handler returned; see `rpcq.WatchedJob.result`.

        Args:
            timeout: seconds to wait, above 0.

        Raises:
            TimeoutError: it had not ended by then, and goes on.
            JobFailed: it is dead, or its end is not known.
            NoResult: it is done, and its result cannot be had.
            ClosedError: the client was closed before it ended.
            Exception: what else `rpcq.WatchedJob.result` raises.

        """
        return self._run(lambda: self._job.result(timeout=timeout))

    def progress(self, *, timeout: float | None = None) -> Iterator[Progress]:
        """How far the job is: `for step in job.progress()`, until it has ended; see `rpcq.WatchedJob.progress`.

        Args:
            timeout: seconds until it gives up, above 0; None for no limit.

        Raises:
            TimeoutError: the job had not ended by then, and goes on.
            ConfigurationError: the timeout is not valid.

        """
        until = None
        if timeout is not None:
            check_seconds("timeout", timeout)
            until = time.monotonic() + timeout
        version = 0
        while found := self._after(version, None if until is None else until - time.monotonic()):
            version, step = found
            yield step

    def _after(self, version: int, seconds: float | None) -> tuple[int, Progress] | None:
        watch = self._job._watch  # noqa: SLF001 - of one piece
        return self._run(lambda: watch.after(version, seconds))

    def _run(self, function: Callable[[], Coroutine[Any, Any, R]]) -> R:
        try:
            return blocking.run(self._loop, function)
        except blocking.Abandoned:
            raise ClosedError("the event loop of the client has ended; the job goes on unheard") from None
