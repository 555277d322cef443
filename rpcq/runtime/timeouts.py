"""Timeouts that are cheap to set and to cancel, since nearly all are cancelled before they expire.

A timer of the event loop for each call costs more than any other step of the call. Therefore a timeout that is not near
waits in a bucket, with all others that expire in the same span of time. When the span begins, each timeout that is
still in the bucket gets a timer of its own, and so expires on time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio

SPAN: Final = 0.25
"""Seconds that a bucket covers."""


class Timed(Protocol):
    """Something that may have a timeout. `timeout` is where the timeout waits, or None if there is none."""

    timeout: Bucket | asyncio.TimerHandle | None


T = TypeVar("T", bound=Timed)
Bucket = dict[Timed, float]
"""What has a timeout -> when it expires, in seconds of `time.monotonic()`."""


class Timeouts(Generic[T]):
    """The timeouts of many things, each of which has at most one at a time.

    Args:
        loop: event loop that runs the timers.
        on_timeout: called inside the event loop with a thing whose timeout expired.

    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_timeout: Callable[[T], None]) -> None:
        self._loop = loop
        self._on_timeout = on_timeout
        self._buckets: dict[int, dict[T, float]] = {}
        self._beginnings: dict[int, asyncio.TimerHandle] = {}

    def set(self, timed: T, at: float, now: float) -> None:
        """Set the timeout of a thing. It expires at `at`; `at` and `now` are times of `time.monotonic()`."""
        number = int(at / SPAN)
        bucket = self._buckets.get(number)
        if bucket is None:
            begins_in = number * SPAN - now
            if begins_in <= 0:
                timed.timeout = self._loop.call_later(at - now, self._come, timed)
                return
            bucket = self._buckets[number] = {}
            self._beginnings[number] = self._loop.call_later(begins_in, self._begin, number)
        bucket[timed] = at
        timed.timeout = bucket  # type: ignore[assignment]  # all things in it are of type T

    def cancel(self, timed: T) -> None:
        """Cancel the timeout of a thing; do nothing if it has none, or it expired."""
        where, timed.timeout = timed.timeout, None
        if type(where) is dict:
            del where[timed]
            if not where:
                where.clear()  # dicts never shrink, and there is one for each span to come; clear() frees its table
        elif where is not None:
            where.cancel()  # type: ignore[union-attr]  # it is a TimerHandle

    def close(self) -> None:
        """Cancel all timeouts, except those that are so near that they have a timer of their own."""
        for beginning in self._beginnings.values():
            beginning.cancel()

    def _begin(self, number: int) -> None:
        del self._beginnings[number]
        now = time.monotonic()
        for timed, at in self._buckets.pop(number).items():
            timed.timeout = self._loop.call_later(at - now, self._come, timed)

    def _come(self, timed: T) -> None:
        timed.timeout = None
        self._on_timeout(timed)
