"""When a job with a schedule is due."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from typing import Any

import pytest

from rpcq import ConfigurationError, Cron, Every, JobOptions, Service
from rpcq.schedules import AT_ONCE, MISSED_AFTER_MS, Missed, Schedule, due


def ms(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def utc(tick: int) -> str:
    return datetime.fromtimestamp(tick / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def ticks(schedule: Schedule, after: str, count: int) -> list[str]:
    return [utc(tick) for tick in islice(schedule.ticks_after(ms(after)), count)]


def test_a_cron_is_due_by_the_clock_of_its_time_zone() -> None:
    weekdays = Cron("0 6 * * mon-fri", tz="Europe/Berlin")
    friday = "2026-11-27T05:00:00+00:00"
    assert ticks(weekdays, friday, 2) == ["2026-11-30 05:00", "2026-12-01 05:00"]


def test_a_tick_in_the_hour_that_is_skipped_comes_at_its_end() -> None:
    """Clocks go from 02:00 to 03:00 on 2026-03-29."""
    at_half_past_two = Cron("30 2 * * *", tz="Europe/Berlin")
    assert ticks(at_half_past_two, "2026-03-28T00:00:00+00:00", 3) == [
        "2026-03-28 01:30",
        "2026-03-29 01:00",
        "2026-03-30 00:30",
    ]


def test_a_tick_in_the_hour_that_is_repeated_comes_once() -> None:
    """Clocks go from 03:00 back to 02:00 on 2026-10-25."""
    at_half_past_two = Cron("30 2 * * *", tz="Europe/Berlin")
    assert ticks(at_half_past_two, "2026-10-24T00:00:00+00:00", 3) == [
        "2026-10-24 00:30",
        "2026-10-25 00:30",
        "2026-10-26 01:30",
    ]


def test_what_is_due_each_quarter_of_an_hour_goes_on_in_the_hour_that_is_repeated() -> None:
    found = ticks(Cron("*/15 * * * *", tz="Europe/Berlin"), "2026-10-25T00:00:00+00:00", 9)
    assert found[:2] == ["2026-10-25 00:15", "2026-10-25 00:30"]
    assert found[-1] == "2026-10-25 02:15"


def test_a_period_is_due_at_its_multiples_on_which_all_workers_agree() -> None:
    assert ticks(Every(3600), "2026-11-29T10:12:00+00:00", 2) == ["2026-11-29 11:00", "2026-11-29 12:00"]
    assert list(islice(Every(0.25).ticks_after(1000), 3)) == [1250, 1500, 1750]


@pytest.mark.parametrize("kind", ["cron", "every"])
@pytest.mark.parametrize(
    ("missed", "found"),
    [("all", [1000, 2000, 3000, 4000, 5000]), ("last", [5000]), ("skip", [5000])],
)
def test_what_is_due_after_a_moment_without_workers(kind: str, missed: Missed, found: list[int]) -> None:
    schedule = Cron("* * * * * *", missed=missed) if kind == "cron" else Every(1, missed=missed)
    assert due(schedule, 0, 5999) == found


def test_what_is_due_after_a_long_time_without_workers() -> None:
    year = 365 * 24 * 3600 * 1000
    assert due(Every(1), 0, year + 500) == [year]
    assert due(Cron("* * * * * *"), 0, year + 500) == [year]
    assert due(Every(1, missed="all"), 0, year) == [1000 * (number + 1) for number in range(AT_ONCE)]
    assert due(Cron("0 0 1 1 *"), 0, year + 60 * 24 * 3600 * 1000) == [year]


def test_a_tick_that_is_too_old_is_skipped() -> None:
    midnight = 24 * 3600 * 1000
    daily = Every(24 * 3600, missed="skip")
    assert due(daily, 0, midnight + MISSED_AFTER_MS) == [midnight]
    assert due(daily, 0, midnight + MISSED_AFTER_MS + 1) == []


def test_nothing_is_due_before_the_first_tick() -> None:
    for missed in ("all", "last", "skip"):
        assert due(Every(10, missed=missed), 20_000, 29_999) == []


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Cron("0 6 * *"), "five fields .* got '0 6 \\* \\*'"),
        (lambda: Cron("0 25 * * *"), "Bad hour"),
        (lambda: Cron("0 0 30 2 *"), "Bad day-of-month"),
        (lambda: Cron(6), "must be a string; got 6"),  # type: ignore[arg-type]
        (lambda: Cron("0 6 * * *", tz="Mars/Olympus"), "tz must be .* got 'Mars/Olympus'"),
        (lambda: Cron("0 6 * * *", tz=""), "tz must be .* got ''"),
        (lambda: Cron("0 6 * * *", missed="none"), "missed must be 'all', 'last' or 'skip'; got 'none'"),  # type: ignore[arg-type]
        (lambda: Every(0), "from 0.25 to .* got 0"),
        (lambda: Every(-1), "got -1"),
        (lambda: Every(True), "got True"),
        (lambda: Every(float("nan")), "got nan"),
        (lambda: Every("60"), "got '60'"),  # type: ignore[arg-type]
        (lambda: JobOptions(schedule="0 6 * * *"), "schedule must be a Cron"),  # type: ignore[arg-type]
        (lambda: JobOptions(schedule=Every(1), at_most_once=True), "at_most_once must be False with a schedule"),
    ],
)
def test_what_is_no_schedule_is_refused(make: Any, part: str) -> None:
    with pytest.raises(ConfigurationError, match=part):
        make()


def test_a_job_with_a_schedule_needs_no_parameters() -> None:
    service = Service("reports")
    with pytest.raises(ConfigurationError, match=r"reports\.daily must have a default for each parameter"):

        @service.job(schedule=Every(60))
        async def daily(day: str) -> None: ...

    @service.job(schedule=Every(60))
    async def weekly(day: str = "monday") -> None: ...
