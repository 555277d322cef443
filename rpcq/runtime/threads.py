"""Runs functions that may block in a pool of threads."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a function ended. Not the exception of a future: that cannot be a StopIteration, for example."""

    value: Any
    error: BaseException | None

    def unwrap(self, who: str) -> Any:
        """Return the value or raise the error. An error that would break an event loop is raised in a RuntimeError."""
        if self.error is None:
            return self.value
        if isinstance(self.error, (Exception, asyncio.CancelledError)) and not isinstance(self.error, StopIteration):
            raise self.error
        raise RuntimeError(f"{who} raised {self.error!r} in its thread") from self.error


class CannotStart(Exception):
    """No thread could be started. The function has not run and will not run."""


class Threads:
    """A pool of threads, made when it is first used.

    Args:
        most: largest number of threads.

    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._pool: ThreadPoolExecutor | None = None

    def start(self, function: Callable[[], Any]) -> Future[Ended]:
        """Run a function when a thread is free, in a copy of the caller's context. The future never fails.

        Raises:
            CannotStart: the system cannot start another thread, or the pool is shut down.

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
            # The pool has put it in its queue in spite of the error: another thread may take it, now or later.
            if future.cancel():
                msg = f"no thread can be started: {error}"
                raise CannotStart(msg) from error
        return future

    def abandon(self) -> None:
        """Cancel the functions that still wait for a thread. Running threads cannot be ended, and go on."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _end(function: Callable[[], Any]) -> Ended:
    try:
        return Ended(function(), None)
    except BaseException as error:  # noqa: BLE001 - raised by `unwrap`
        return Ended(None, error)
