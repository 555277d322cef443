"""A deadline as a value, carried from a call into the calls that its handler makes.

Times are seconds. A deadline is a moment of this process's monotonic clock, so that a change of the wall clock moves
none; only on the wire does it become a time left and an absolute time (see `wire`).
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Final, NamedTuple


class Deadline(NamedTuple):
    """The moment by which a call has ended.

    Attributes:
        at: seconds on `time.monotonic()`.

    """

    at: float

    @classmethod
    def after(cls, timeout: float) -> Deadline:
        """The deadline `timeout` seconds from now."""
        return cls(time.monotonic() + timeout)

    def remaining(self) -> float:
        """Seconds left; negative once it has passed."""
        return self.at - time.monotonic()


current: Final[ContextVar[float | None]] = ContextVar("rpcq_deadline", default=None)
"""When the call that is being handled ends, on `time.monotonic()`; None outside of a handler. A plain number: it is set
and read in every call."""


def inherit(timeout: float, now: float) -> float:
    """When a new call ends: `timeout` seconds from `now`, or with the handled call where that is sooner."""
    at = now + timeout
    inherited = current.get()
    return at if inherited is None or inherited > at else inherited
