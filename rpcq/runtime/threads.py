"""Functions that may block, each in a thread of a pool."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a function ended. A future of the pool cannot carry every exception: StopIteration, for one."""

    value: Any
    error: BaseException | None

    def unwrap(self, who: str) -> Any:
        """The value; or the error, raised where an event loop can bear it, else as the cause of a RuntimeError."""
        if self.error is None:
            return self.value
        if isinstance(self.error, (Exception, asyncio.CancelledError)) and not isinstance(self.error, StopIteration):
            raise self.error
        raise RuntimeError(f"{who} raised {self.error!r} in its thread") from self.error


class CannotStart(Exception):
    """No thread could be started, and the function has not run; it never will."""


class Threads:
    """A pool of threads, made when it is first needed.

    Args:
        most: threads that it has.

    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._pool: ThreadPoolExecutor | None = None

    def start(self, function: Callable[[], Any]) -> Future[Ended]:
        """Run it as soon as a thread is free, in a copy of the caller's context; the future never fails.

        Raises:
            CannotStart: the system gives no further thread, or the pool is shut down.

        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._most, thread_name_prefix="rpcq")
        future: Future[Ended] = Future()
        context = contextvars.copy_context()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(context.run(_end, function))

        try:
            self._pool.submit(work)
        except RuntimeError as error:
            # The pool has queued it all the same: another thread may come to it, now or later.
            if future.cancel():
                msg = f"no thread can be started: {error}"
                raise CannotStart(msg) from error
        return future

    def abandon(self) -> None:
        """Start nothing that still waits for a thread. Threads cannot be ended, and are left."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _end(function: Callable[[], Any]) -> Ended:
    try:
        return Ended(function(), None)
    except BaseException as error:  # noqa: BLE001 - told by whoever reads it
        return Ended(None, error)
