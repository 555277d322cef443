"""A clock that stands still until it is moved, for tests of what takes hours. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class StoppedClock:
    """The time of an in-process broker whose time a test moves.

    Args:
        began: the time at which it stands first; with a time zone.

    Attributes:
        now: seconds since then.

    """

    def __init__(self, began: datetime) -> None:
        # Whole milliseconds: messages carry no more, and what they carry must not be later than this clock.
        self._began = began.astimezone(UTC).replace(microsecond=began.microsecond // 1000 * 1000)
        self.now = 0.0

    def at(self, ms: int) -> float:
        """The seconds at which it shows a time of day, which is in milliseconds since the epoch."""
        return ms / 1000 - self._began.timestamp()

    def wall(self) -> datetime:
        """The time of day that it shows."""
        return self._began + timedelta(seconds=self.now)
