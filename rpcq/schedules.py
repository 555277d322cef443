"""Schedules of jobs: the moments, called ticks, at which a job is due. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from datetime import datetime
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Final, Literal, get_args

from rpcq.errors import ConfigurationError

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

    from cronsim import CronSim

Missed = Literal["all", "last", "skip"]

MISSED_AFTER_MS: Final = 60_000
"""Milliseconds after which a tick counts as missed, for `missed="skip"`."""

SHORTEST: Final = 0.25
"""Seconds of the shortest period of `Every`."""

LONGEST: Final = 366 * 24 * 3600.0
"""Seconds of the longest period of `Every`."""

AT_ONCE: Final = 100
"""Missed ticks that are made up for at once; the others follow."""

_FIRST_LOOK_MS: Final = 1000
_WIDER: Final = 8
"""How far back to look for the last tick, and how many times further if there was none."""


@dataclass(frozen=True)
class Cron:
    """A schedule in the syntax of cron: `Cron("0 6 * * mon-fri", tz="Europe/Berlin")`.

    When clocks change, it does as Debian's cron does. Of a job at fixed hours, a tick in the hour that is skipped comes
    at the end of that hour, and a tick in the hour that is repeated comes once. A job that is due each hour or more
    often is due by the time that passes.

    Attributes:
        expression: five fields: minute, hour, day of the month, month, day of the week. A sixth one is for seconds.
        tz: a time zone of the IANA database, such as "Europe/Berlin".
        missed: what becomes of the ticks that came while no worker was there. "all" makes up for each of them, "last"
            for the last one, "skip" for none: it leaves out a tick that is more than a minute old.

    Raises:
        ConfigurationError: an argument is not valid; the message names it.

    """

    expression: str
    _: KW_ONLY
    tz: str = "UTC"
    missed: Missed = "last"

    def __post_init__(self) -> None:
        _check_missed(self.missed)
        _zone(self.tz)
        if not isinstance(self.expression, str):
            raise ConfigurationError(f"the expression of a Cron must be a string; got {self.expression!r}")
        if self.next_after(0) is None:
            raise ConfigurationError(f"a Cron must have a tick within 50 years; {self.expression!r} has none")

    def __str__(self) -> str:
        return f"cron {' '.join(self.expression.split()).lower()} {self.tz}"

    def next_after(self, ms: int) -> int | None:
        """The first tick after this time; None if there is none within 50 years. Milliseconds since the epoch."""
        return next(self.ticks_after(ms), None)

    def ticks_after(self, ms: int) -> Iterator[int]:
        """The ticks after this time, in order, in milliseconds since the epoch."""
        for tick in self._simulation(datetime.fromtimestamp(ms / 1000, _zone(self.tz))):
            yield round(tick.timestamp() * 1000)

    def _simulation(self, after: datetime) -> CronSim:
        from cronsim import CronSim, CronSimError  # noqa: PLC0415 - only who has a schedule pays for its import

        try:
            return CronSim(self.expression, after)
        except CronSimError as error:
            raise ConfigurationError(
                f"a Cron must be five fields for minute, hour, day of the month, month and day of the week, such as "
                f"'0 6 * * mon-fri'; got {self.expression!r}: {error}"
            ) from error


@dataclass(frozen=True)
class Every:
    """A schedule with a fixed period: `Every(60)`.

    The ticks are the multiples of the period since 1970-01-01 00:00 UTC, so that all workers agree about them:
    `Every(3600)` is due at each full hour, and `Every(86400)` at midnight UTC.

    Attributes:
        seconds: the period, at least 0.25 and at most 366 days, to the millisecond.
        missed: as for `Cron`.

    Raises:
        ConfigurationError: an argument is not valid; the message names it.

    """

    seconds: float
    _: KW_ONLY
    missed: Missed = "last"

    def __post_init__(self) -> None:
        _check_missed(self.missed)
        value = self.seconds
        if isinstance(value, bool) or not isinstance(value, int | float) or not SHORTEST <= value <= LONGEST:
            raise ConfigurationError(
                f"the period of Every must be a number of seconds from {SHORTEST:g} to {LONGEST:g}; got {value!r}"
            )

    def __str__(self) -> str:
        return f"every {self._period / 1000:g} s"

    @property
    def _period(self) -> int:
        return round(self.seconds * 1000)

    def next_after(self, ms: int) -> int:
        """As for `Cron`; there is always one."""
        return (ms // self._period + 1) * self._period

    def ticks_after(self, ms: int) -> Iterator[int]:
        """As for `Cron`."""
        tick = self.next_after(ms)
        while True:
            yield tick
            tick += self._period


Schedule = Cron | Every


def read_schedule(text: str) -> Schedule | None:
    """The schedule that has this text, as `str` writes it; None if no schedule of this version has it."""
    try:
        match text.split():
            case ["cron", *fields, zone]:
                return Cron(" ".join(fields), tz=zone)
            case ["every", seconds, "s"]:
                return Every(float(seconds))
    except (ConfigurationError, ValueError):
        pass
    return None


def due(schedule: Schedule, last_ms: int, now_ms: int) -> list[int]:
    """The ticks after `last_ms` that are to be sent at `now_ms`, in order; at most `AT_ONCE`.

    What is missed and not to be made up for is left out. All times are in milliseconds since the epoch.
    """
    if schedule.missed == "all":
        return list(islice(_until(schedule, last_ms, now_ms), AT_ONCE))
    look = _FIRST_LOOK_MS  # a schedule of seconds may have missed millions of ticks: look back further and further
    while True:
        begin = max(last_ms, now_ms - look)
        tick = max(_until(schedule, begin, now_ms), default=None)
        if tick is not None:
            break
        if begin == last_ms:
            return []
        look *= _WIDER
    is_missed = schedule.missed == "skip" and now_ms - tick > MISSED_AFTER_MS
    return [] if is_missed else [tick]


def check_schedule(schedule: Schedule | None) -> None:
    """Check that it is a schedule or None.

    Raises:
        ConfigurationError: it is something else.

    """
    if schedule is not None and not isinstance(schedule, Cron | Every):
        raise ConfigurationError(f"schedule must be a Cron(...), an Every(...) or None; got {schedule!r}")


def _until(schedule: Schedule, after_ms: int, now_ms: int) -> Iterator[int]:
    for tick in schedule.ticks_after(after_ms):
        if tick > now_ms:
            return
        yield tick


def _check_missed(missed: str) -> None:
    if missed not in get_args(Missed):
        raise ConfigurationError(f"missed must be 'all', 'last' or 'skip'; got {missed!r}")


@lru_cache(maxsize=64)
def _zone(name: str) -> ZoneInfo:
    from zoneinfo import ZoneInfo  # noqa: PLC0415 - as above

    try:
        return ZoneInfo(name)
    except (OSError, ValueError, TypeError, KeyError) as error:  # KeyError: ZoneInfoNotFoundError
        raise ConfigurationError(
            f"tz must be a time zone of the IANA database, such as 'Europe/Berlin'; got {name!r}. If it is one, the "
            "database is not installed: install the package tzdata"
        ) from error
