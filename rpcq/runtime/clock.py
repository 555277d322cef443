"""The machine's time of day."""

from __future__ import annotations

import asyncio
import time
from typing import Final

LOOK_AGAIN: Final = 30.0
"""Seconds between two looks at the clock of who waits for a time of day: it may be set, or the machine may sleep."""


def now_ms() -> int:
    """The time, in milliseconds since the epoch."""
    return round(time.time() * 1000)


async def sleep_until(ms: int) -> None:
    """Wait until the time is at least this, in milliseconds since the epoch."""
    while (left := ms - now_ms()) > 0:  # noqa: ASYNC110 - no event tells the time
        await asyncio.sleep(min(left / 1000, LOOK_AGAIN))
