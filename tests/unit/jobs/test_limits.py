"""The limit of one job, with times that the test gives."""

from __future__ import annotations

from typing import Any

import pytest

from rpcq import ConfigurationError, Service
from rpcq.jobs.limits import FARTHEST, NEAR, Limit
from rpcq.options import JobOptions


@pytest.mark.parametrize(
    ("rate", "spacing"), [("1/s", 1.0), ("10/s", 0.1), ("100/m", 0.6), ("1000/h", 3.6), ("999999999/s", 1 / 999999999)]
)
def test_a_rate_says_how_far_apart_jobs_begin(rate: str, spacing: float) -> None:
    assert JobOptions(rate=rate).spacing == pytest.approx(spacing)


NO_RATES = ["10", "10/d", "0/s", "-1/s", "0.5/s", "10 /s", "10/s\n", "1e3/h", "", 10, 1.5, b"1/s", True]


@pytest.mark.parametrize("rate", NO_RATES)
def test_what_is_no_rate_is_refused_with_the_form_of_one(rate: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"rate must be a whole number of jobs .* such as '10/s'.*; got"):
        JobOptions(rate=rate)


@pytest.mark.parametrize("most", [0, -1, 1.5, "4", True, 65_536])
def test_a_concurrency_that_cannot_be_is_refused(most: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_concurrency must be a whole number from 1 to 65535; got"):
        Service("s").job(max_concurrency=most)


@pytest.mark.parametrize("timeout", [1500.001, 1801, 0, -1, float("inf"), float("nan"), "60", True])
def test_a_timeout_over_25_minutes_is_refused(timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match="timeout must be a number of seconds above 0 and at most 1500; got"):
        JobOptions(timeout=timeout)
    assert JobOptions(timeout=1500).timeout == 1500


def limit(**options: Any) -> Limit:
    return Limit(JobOptions(**options))


def test_the_next_one_begins_a_spacing_after_the_last_one_began_and_none_are_made_up_for() -> None:
    found = limit(rate="10/s")
    assert found.turn(100.0, "normal") == 0
    found.begin(100.0)
    assert found.turn(100.0, "normal") == pytest.approx(0.1)
    assert found.turn(100.04, "normal") == pytest.approx(0.06)
    assert found.turn(200.0, "normal") == 0
    found.begin(200.0)
    assert found.turn(200.0, "normal") == pytest.approx(0.1)


def test_one_more_may_begin_when_one_has_ended() -> None:
    found = limit(max_concurrency=2)
    found.begin(0.0)
    assert found.turn(0.0, "normal") == 0
    found.begin(0.0)
    assert found.is_full
    assert found.turn(0.0, "normal") > 0
    found.end(1.0)
    assert found.turn(1.0, "normal") == 0


def test_a_turn_is_foretold_by_how_long_jobs_took() -> None:
    found = limit(max_concurrency=1)
    for _ in range(100):
        found.begin(0.0)
        found.end(40.0)
    found.begin(0.0)
    assert found.turn(0.0, "normal") == pytest.approx(40, abs=1)
    assert found.turn(0.0, "normal") > NEAR


def test_the_put_off_jobs_of_one_priority_do_not_move_the_turns_of_another() -> None:
    found = limit(rate="1/s")
    found.begin(0.0)
    for _ in range(1000):
        found.put_off(0.0, "low")
    assert found.put_off(0.0, "low") == FARTHEST
    assert [found.put_off(0.0, "high"), found.put_off(0.0, "high"), found.put_off(0.0, "normal")] == [2.0, 3.0, 2.0]


def test_each_job_that_is_put_off_comes_back_later_than_the_one_before_up_to_a_bound() -> None:
    found = limit(rate="1/s")
    found.begin(0.0)
    pauses = [found.put_off(0.0, "normal") for _ in range(1000)]
    assert pauses[:3] == [2.0, 3.0, 4.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == FARTHEST
    assert found.put_off(FARTHEST - 10, "normal") == 11  # time has passed: the turns of the earlier ones are near
