"""A process for work that computes: it says how far it is, it can be killed, and it takes nobody with it.

A thread would do for the speed, because Pillow lets other threads run meanwhile. But a thread cannot be ended when its
time is over, and a picture that crashes Pillow, or takes all memory, would end the whole worker.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, Self, TypeVar

T = TypeVar("T")

LOOK_EVERY = 0.1
"""Seconds between two looks at how far the work is."""

# A worker has threads, and must not be forked. A server that has nothing but Pillow is forked instead, in milliseconds.
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["examples.media.painting"])

_DONE, _TOTAL, _PID = range(3)

_report: Any = None  # in the process of a pool: what the worker reads


def say(done: float, total: float) -> None:
    """Say in the pool's process how far its work is; elsewhere, nobody listens."""
    if _report is not None:
        _report[_DONE], _report[_TOTAL] = done, total


def _begin(report: Any) -> None:
    global _report  # noqa: PLW0603 - one for the process
    _report = report
    report[_PID] = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the worker
    threading.Thread(target=_end_with_the_worker, daemon=True).start()


def _end_with_the_worker() -> None:
    """End when the worker has ended, however it did: otherwise, this process would wait for work for ever."""
    worker = multiprocessing.parent_process()
    if worker is not None:
        worker.join()
    os._exit(1)


def _nothing() -> None:
    """The first piece of work: that it is done shows that the process has started."""


class Pool:
    """One process, which does one piece of work at a time. Open it with `async with`.

    How far its work is stands in memory that both processes share, so that no lock and no pipe is left in a bad state
    when one of them is killed.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._renew()

    def _renew(self) -> None:
        self._report = _FORKSERVER.RawArray("d", 3)
        self._executor = ProcessPoolExecutor(1, _FORKSERVER, _begin, (self._report,))

    async def __aenter__(self) -> Self:
        """Start the process, so that the first job does not wait for it."""
        await self.run(_nothing)
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the process."""
        await asyncio.to_thread(self._executor.shutdown)

    async def run(
        self, work: Callable[..., T], *arguments: Any, on_progress: Callable[[float, float], None] | None = None
    ) -> T:
        """Call a function in the process. If this is cancelled, the process is killed, and a new one takes its place.

        Args:
            work: a function of a module; it may call `say`.
            arguments: what can be pickled.
            on_progress: called with what the work says, whenever that has changed.

        Raises:
            RuntimeError: the process died.
            Exception: what the function raised.

        """
        async with self._turn:
            self._report[_DONE] = self._report[_TOTAL] = said = 0.0
            running: Future[T] = self._executor.submit(work, *arguments)
            result = asyncio.wrap_future(running)
            try:
                while not result.done():
                    await asyncio.wait([result], timeout=LOOK_EVERY)
                    done, total = self._report[_DONE], self._report[_TOTAL]
                    if on_progress is not None and total and done != said:
                        said = done
                        on_progress(done, total)
                return result.result()
            except BrokenProcessPool as error:
                self._renew()
                msg = "the process that did the work died, as it does when there is no memory left"
                raise RuntimeError(msg) from error
            except asyncio.CancelledError:
                result.cancel()
                self._kill(running)
                raise

    def _kill(self, running: Future[Any]) -> None:
        if running.done():
            return
        if pid := int(self._report[_PID]):  # 0: it has not come so far as to say so
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._renew()
