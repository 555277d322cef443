"""A watchdog for the event loop: it logs which handler blocks the loop, at which line, and for how long."""

from __future__ import annotations

import asyncio
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import PurePath
from types import FrameType
from typing import Any, Final

from rpcq import logs

GRACE: Final = 0.1
"""Seconds that a suspected loop gets to go on: it may have been stopped together with the whole process."""

JOIN: Final = 1.0
"""Seconds that `close` waits for the thread to end."""

_STDLIB: Final = (sysconfig.get_path("stdlib"), "<frozen ")

log = logs.get_logger("rpcq.watchdog")


class Watchdog:
    """Watches an event loop from a daemon thread, from now until `close`. Make it in the loop's own thread.

    The loop notes the time four times in each limit (a beat); the thread checks that it does. A block is measured from
    the last beat, which may be up to a quarter of the limit before the block began.

    Args:
        loop: event loop to watch.
        limit: seconds that it may be blocked.
        name: returns fields for the log that name a task. It runs in the watchdog's thread, maybe while the loop runs.

    Attributes:
        blocks: how often the loop was blocked for longer than the limit.
        longest: seconds of the longest block; it grows during a block.

    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, limit: float, name: Callable[[asyncio.Task[Any]], Mapping[str, Any]]
    ) -> None:
        self.blocks = 0
        self.longest = 0.0
        self._loop = loop
        self._name = name
        self._beat_every = limit / 4
        self._patience = limit + self._beat_every  # after a beat; the next beat is then late by the limit
        self._alive = time.monotonic()
        self._clock = _cpu_clock()
        self._cpu = time.clock_gettime(self._clock)
        self._gaps: deque[tuple[float, bool]] = deque()  # seconds between two beats; did the loop's thread compute
        self._loop_thread = threading.get_ident()
        self._depth = 0  # number of frames below the functions that the loop calls
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rpcq-watchdog", daemon=True)
        loop.call_soon(self._beat)
        self._thread.start()

    def close(self) -> None:
        """End the thread; wait at most `JOIN` seconds. Works from any thread, even if the loop is blocked or closed."""
        self._closing.set()
        self._thread.join(JOIN)

    def _beat(self) -> None:
        """Note, in the loop, that it runs. The loop measures its own gaps, since the thread may be late too."""
        if self._closing.is_set():
            return
        self._depth = self._depth or len(_stack(sys._getframe().f_back))  # noqa: SLF001 - as documented
        now = time.monotonic()
        if now - self._alive > self._patience:
            self._gaps.append((now - self._alive, self._computed()))
        self._alive, self._cpu = now, time.clock_gettime(self._clock)
        self._loop.call_later(self._beat_every, self._beat)

    def _computed(self) -> bool:
        """Whether the loop's thread used much CPU time since the last beat; if not, it slept or was not scheduled."""
        try:
            return time.clock_gettime(self._clock) - self._cpu > 2 * self._beat_every
        except OSError:
            return False  # the thread is gone

    # In the watchdog's thread.

    def _watch(self) -> None:
        while self._goes_on():
            wake_at = self._alive + self._patience
            self._closing.wait(max(wake_at - time.monotonic(), 0.001))
            woke = time.monotonic()
            if not self._loop.is_running():
                self._alive = woke  # a stopped loop is not blocked
            elif self._gaps or woke - self._alive > self._patience:
                # If this thread is late, it was held up too: by the loop (C code that holds the GIL) or with the loop.
                late = woke - wake_at > max(self._beat_every, 2 * GRACE)
                self._suspect(woke, stood=late and not self._computed())

    def _suspect(self, woke: float, *, stood: bool) -> None:
        fields: dict[str, Any] = {}
        named = False
        if not self._gaps:
            if not stood:
                fields, named = self._look()  # look at once: after C code with the GIL, the handler may end soon
            self._closing.wait(GRACE)
        gap, computed = self._gaps.popleft() if self._gaps else (0.0, False)
        if stood or (gap and not named and not computed):
            log.warning("event loop stood still", blocked_for=round(gap or woke - self._alive, 3))
            if not gap:
                self._alive = woke  # what runs now did not cause that: give it the whole limit
            return
        self.blocks += 1
        if gap:
            self._report("event loop blocked", gap, fields)
        report_at = 0.0
        while not gap and self._goes_on() and self._loop.is_running():
            blocked_for = time.monotonic() - self._alive
            if blocked_for >= report_at:
                fields, _ = self._look()
                self._report("event loop blocked", blocked_for, fields)
                report_at = 2 * blocked_for
            self._closing.wait(self._beat_every)
            gap = self._gaps.popleft()[0] if self._gaps else 0.0
        if not self._closing.is_set():
            self._report("event loop goes on", gap or time.monotonic() - self._alive, fields)

    def _goes_on(self) -> bool:
        return not self._closing.is_set() and not self._loop.is_closed()

    def _report(self, text: str, seconds: float, fields: dict[str, Any]) -> None:
        self.longest = max(self.longest, seconds)
        log.warning(text, **{**fields, "blocked_for": round(seconds, 3)})

    def _look(self) -> tuple[dict[str, Any], bool]:
        """Return fields for the log that say what the loop runs, and whether that is a task."""
        fields: dict[str, Any] = {}
        task = asyncio.current_task(self._loop)
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - as documented
        at = None if frame is None else _at(_stack(frame), self._depth)
        if task is not None:
            try:
                fields.update(self._name(task))
            except Exception:
                log.exception("cannot name the task that blocks the event loop")
        return ({**fields, "at": at} if at else fields), task is not None


def _cpu_clock() -> int:
    """Return this thread's CPU clock, which other threads may read; else the CPU clock of the process."""
    if sys.platform == "linux":
        return time.pthread_getcpuclockid(threading.get_ident())
    return time.CLOCK_PROCESS_CPUTIME_ID


def _stack(frame: FrameType | None) -> list[FrameType]:
    """Return the frame and its callers, the innermost first."""
    stack = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack


def _at(stack: list[FrameType], depth: int) -> str:
    """Return the line that runs, of the functions that the loop called; prefer code that is not in a library."""
    called = stack[: max(len(stack) - depth, 1)]
    frame = next((it for it in called if not _in_library(it.f_code.co_filename)), stack[0])
    return f"{PurePath(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def _in_library(filename: str) -> bool:
    return filename.startswith(_STDLIB) or "/site-packages/" in filename or "/dist-packages/" in filename
