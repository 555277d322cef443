"""Timeouts of which nearly all are cancelled before they come: cheap to set, cheap to cancel.

A timer of the event loop for each call costs more than any other step of it. So a timeout that is not near waits in a
bucket, with all others that come in the same span of time; what is still in a bucket when its span begins gets a timer
of its own, and so comes as punctually as any.
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
    """What may have a timeout; `timeout` is where it waits, and None while it has none."""

    timeout: Bucket | asyncio.TimerHandle | None


T = TypeVar("T", bound=Timed)
Bucket = dict[Timed, float]
"""What waits -> when its timeout comes, in seconds on `time.monotonic()`."""


class Timeouts(Generic[T]):
    """The timeouts of many things, each of which has at most one at a time.

    Args:
        loop: whose time passes.
        on_timeout: called with a thing when its timeout comes, from inside the event loop.

    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_timeout: Callable[[T], None]) -> None:
        self._loop = loop
        self._on_timeout = on_timeout
        self._buckets: dict[int, dict[T, float]] = {}
        self._beginnings: dict[int, asyncio.TimerHandle] = {}

    def set(self, timed: T, at: float, now: float) -> None:
        """Let its timeout come `at` a moment of `time.monotonic()`, which says `now`."""
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
        timed.timeout = bucket  # type: ignore[assignment]  # of things of one kind

    def cancel(self, timed: T) -> None:
        """Forget its timeout; nothing where it has none, or it came."""
        where, timed.timeout = timed.timeout, None
        if type(where) is dict:
            del where[timed]
            if not where:
                where.clear()  # a dict keeps the room that it once needed, and there is one for each span to come
        elif where is not None:
            where.cancel()  # type: ignore[union-attr]  # the other kind of the two

    def close(self) -> None:
        """Let no more come, but for those that are near."""
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
