"""A watchdog for the event loop: it says in the log which handler blocks it, where that stands, and for how long."""

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
"""Seconds that a loop has to go on once it is suspected: it may have been stopped, with the whole process."""

JOIN: Final = 1.0
"""Seconds that `close` waits for the thread."""

_STDLIB: Final = (sysconfig.get_path("stdlib"), "<frozen ")

log = logs.get_logger("rpcq.watchdog")


class Watchdog:
    """Watches an event loop from a daemon thread, from now until `close`; to be made in the loop's own thread.

    The loop notes the time every quarter of the limit; the thread looks whether it does. A block is counted from the
    last note, so up to a quarter of the limit before it began.

    Args:
        loop: what is watched.
        limit: seconds that it may be blocked.
        name: fields for the log that tell what a task is; it runs in the watchdog's thread, while the loop's may run.

    Attributes:
        blocks: how often the loop was blocked for longer than the limit.
        longest: seconds of the longest of these, also while it lasts.

    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, limit: float, name: Callable[[asyncio.Task[Any]], Mapping[str, Any]]
    ) -> None:
        self.blocks = 0
        self.longest = 0.0
        self._loop = loop
        self._name = name
        self._beat_every = limit / 4
        self._patience = limit + self._beat_every  # since the last beat: only then the next one is late by the limit
        self._alive = time.monotonic()
        self._clock = _cpu_clock()
        self._cpu = time.clock_gettime(self._clock)
        self._gaps: deque[tuple[float, bool]] = deque()  # seconds between two beats; whether the loop's thread computed
        self._loop_thread = threading.get_ident()
        self._depth = 0  # frames under what the loop calls
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rpcq-watchdog", daemon=True)
        loop.call_soon(self._beat)
        self._thread.start()

    def close(self) -> None:
        """End the thread, from any thread, also when the loop is blocked or closed; waits at most `JOIN` seconds."""
        self._closing.set()
        self._thread.join(JOIN)

    def _beat(self) -> None:
        """In the loop: note that it is alive. That the loop does it itself tells the truth when threads are held up."""
        if self._closing.is_set():
            return
        self._depth = self._depth or len(_stack(sys._getframe().f_back))  # noqa: SLF001 - as documented
        now = time.monotonic()
        if now - self._alive > self._patience:
            self._gaps.append((now - self._alive, self._computed()))
        self._alive, self._cpu = now, time.clock_gettime(self._clock)
        self._loop.call_later(self._beat_every, self._beat)

    def _computed(self) -> bool:
        """Whether the loop's thread computed for long since the last beat; else it slept, or was not let run."""
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
                self._alive = woke  # nobody expects anything of it
            elif self._gaps or woke - self._alive > self._patience:
                # Late, this thread was held up itself: by the loop (C code that holds the GIL), or with the loop.
                late = woke - wake_at > max(self._beat_every, 2 * GRACE)
                self._suspect(woke, stood=late and not self._computed())

    def _suspect(self, woke: float, *, stood: bool) -> None:
        fields: dict[str, Any] = {}
        named = False
        if not self._gaps:
            if not stood:
                fields, named = self._look()  # at once: after C code with the GIL the handler may soon be gone
            self._closing.wait(GRACE)
        gap, computed = self._gaps.popleft() if self._gaps else (0.0, False)
        if stood or (gap and not named and not computed):
            log.warning("event loop stood still", blocked_for=round(gap or woke - self._alive, 3))
            if not gap:
                self._alive = woke  # what it does now is not to blame for that, and has the whole limit
            return
        self.blocks += 1
        if gap:
            self._tell("event loop blocked", gap, fields)
        tell_at = 0.0
        while not gap and self._goes_on() and self._loop.is_running():
            blocked_for = time.monotonic() - self._alive
            if blocked_for >= tell_at:
                fields, _ = self._look()
                self._tell("event loop blocked", blocked_for, fields)
                tell_at = 2 * blocked_for
            self._closing.wait(self._beat_every)
            gap = self._gaps.popleft()[0] if self._gaps else 0.0
        if not self._closing.is_set():
            self._tell("event loop goes on", gap or time.monotonic() - self._alive, fields)

    def _goes_on(self) -> bool:
        return not self._closing.is_set() and not self._loop.is_closed()

    def _tell(self, event: str, seconds: float, fields: dict[str, Any]) -> None:
        self.longest = max(self.longest, seconds)
        log.warning(event, **{**fields, "blocked_for": round(seconds, 3)})

    def _look(self) -> tuple[dict[str, Any], bool]:
        """What the loop is at, as fields for the log; whether it is a task."""
        fields: dict[str, Any] = {}
        task = asyncio.current_task(self._loop)
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - as documented
        at = None if frame is None else _at(_stack(frame), self._depth)
        if task is not None:
            try:
                fields.update(self._name(task))
            except Exception:
                log.exception("what blocks the event loop cannot be named")
        return ({**fields, "at": at} if at else fields), task is not None


def _cpu_clock() -> int:
    """The clock of this thread's computing, as other threads may read it; the process's where there is none."""
    if sys.platform == "linux":
        return time.pthread_getcpuclockid(threading.get_ident())
    return time.CLOCK_PROCESS_CPUTIME_ID


def _stack(frame: FrameType | None) -> list[FrameType]:
    """The frame and those that called it, the innermost first."""
    stack = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack


def _at(stack: list[FrameType], depth: int) -> str:
    """Where it stands, in what the loop called: in code that is no library's, if there is any."""
    called = stack[: max(len(stack) - depth, 1)]
    frame = next((it for it in called if not _in_library(it.f_code.co_filename)), stack[0])
    return f"{PurePath(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def _in_library(filename: str) -> bool:
    return filename.startswith(_STDLIB) or "/site-packages/" in filename or "/dist-packages/" in filename
