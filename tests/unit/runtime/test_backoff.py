"""Pauses between tries: how they grow, where they stop, and how they are spread."""

from __future__ import annotations

import pytest

from rpcq.runtime.backoff import Backoff, OutageBackoff, full_jitter


@pytest.mark.parametrize(
    ("backoff", "pauses"),
    [
        (Backoff(1.0, 100.0), [1.0, 2.0, 4.0, 8.0]),
        (Backoff(0.5, 100.0, factor=3.0), [0.5, 1.5, 4.5, 13.5]),
        (Backoff(1.0, 100.0, factor=1.0), [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_each_pause_is_longer_than_the_one_before_by_the_factor(backoff: Backoff, pauses: list[float]) -> None:
    assert [backoff.pause() for _ in pauses] == pauses


def test_no_pause_is_longer_than_the_longest() -> None:
    backoff = Backoff(1.0, 5.0)
    assert [backoff.pause() for _ in range(6)] == [1.0, 2.0, 4.0, 5.0, 5.0, 5.0]


def test_after_a_reset_the_pauses_begin_with_the_first_again() -> None:
    backoff = Backoff(1.0, 5.0)
    for _ in range(4):
        backoff.pause()
    backoff.reset()
    assert [backoff.pause(), backoff.pause()] == [1.0, 2.0]


def test_a_jittered_pause_is_a_part_of_the_next_pause_and_counts_as_it() -> None:
    spread = []
    for _ in range(200):
        backoff = Backoff(1.0, 100.0)
        first, second = backoff.jittered(), backoff.jittered()
        assert 0 <= first <= 1.0
        assert 0 <= second <= 2.0
        assert backoff.pause() == 4.0
        spread.append(second)
    assert min(spread) < 0.5
    assert max(spread) > 1.5


def test_full_jitter_is_anywhere_between_nothing_and_the_longest_pause() -> None:
    pauses = [full_jitter(3.0) for _ in range(200)]
    assert all(0 <= pause <= 3.0 for pause in pauses)
    assert min(pauses) < 1.0
    assert max(pauses) > 2.0
    assert full_jitter(0.0) == 0.0


def longest_of(backoff: OutageBackoff, now: float) -> float:
    return max(backoff.jittered(now) for _ in range(300))


def test_failures_of_one_outage_that_come_together_count_as_one() -> None:
    backoff = OutageBackoff(1.0, 5.0)
    for now, limit in ((0.0, 1.0), (0.9, 1.0), (1.0, 2.0), (2.9, 2.0), (3.0, 4.0), (7.0, 5.0), (100.0, 5.0)):
        assert limit * 0.8 < longest_of(backoff, now) <= limit


def test_after_a_success_the_pauses_of_outages_begin_with_the_first_again() -> None:
    backoff = OutageBackoff(1.0, 60.0)
    for now in range(0, 500, 50):
        backoff.jittered(float(now))
    backoff.reset()
    assert longest_of(backoff, 451.0) <= 1.0
    assert 1.0 < longest_of(backoff, 452.0) <= 2.0
