"""A deadline as a value: a handler's own calls inherit the deadline of the call that it handles.

Times are seconds. A deadline is a time of this process's monotonic clock, so a change of the wall clock does not move
it. Only on the wire does it become a remaining time and an absolute time (see `rpcq.wire.requests`).
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Final, NamedTuple


class Deadline(NamedTuple):
    """The time by which a call has to end.

    Attributes:
        at: seconds of `time.monotonic()`.

    """

    at: float

    @classmethod
    def after(cls, timeout: float) -> Deadline:
        """Return the deadline `timeout` seconds from now."""
        return cls(time.monotonic() + timeout)

    def remaining(self) -> float:
        """Return the seconds left; negative once the deadline has passed."""
        return self.at - time.monotonic()


current: Final[ContextVar[float | None]] = ContextVar("rpcq_deadline", default=None)
"""Deadline of the call that is being handled, seconds of `time.monotonic()`; None outside a handler. It is a plain
number, not a `Deadline`, because it is set and read in every call."""


def inherit(timeout: float, now: float) -> float:
    """Return the deadline of a new call: `timeout` seconds from `now`, or that of the handled call if it is sooner."""
    at = now + timeout
    inherited = current.get()
    return at if inherited is None or inherited > at else inherited
