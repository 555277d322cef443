"""When calls are due, and who makes them."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcq.bench.echo import NonceRecord, read_nonces
from rpcq.bench.generator import NONCES
from rpcq.bench.plan import Phase, Plan, read_plan


def plan(number: int = 0, processes: int = 1, **options: object) -> Plan:
    given = {"warm_up": 0.0, **options}
    return Plan("things.work", number=number, processes=processes, **given)  # type: ignore[arg-type]


def test_constant_arrivals_come_at_even_distances() -> None:
    due = list(plan(phases=(Phase(100, 100, 2),)).due())
    assert len(due) == 200
    assert due[0] == pytest.approx(0.005)
    assert all(b - a == pytest.approx(0.01) for a, b in pairwise(due))


def test_a_ramp_makes_as_many_calls_as_its_mean_rate_and_ever_more_of_them() -> None:
    due = list(plan(phases=(Phase(0, 100, 2), Phase(100, 100, 1))).due())
    assert len(due) == 200
    assert sum(it < 1 for it in due) == 25  # a quarter of the triangle
    assert sum(it < 2 for it in due) == 100
    assert due == sorted(due)


def test_several_processes_take_turns_and_make_the_calls_of_one() -> None:
    phases = (Phase(0, 70, 2), Phase(50, 50, 1))
    alone = list(plan(phases=phases).due())
    shared = [it for number in range(3) for it in plan(number, 3, phases=phases).due()]
    assert abs(len(shared) - len(alone)) <= 2
    between = [b - a for a, b in pairwise(sorted(it for it in shared if it > 2))]
    assert max(between) < 0.03


def test_random_arrivals_have_the_rate_and_the_spread_of_independent_callers() -> None:
    due = list(plan(phases=(Phase(1000, 1000, 20),), arrivals="poisson", seed=3).due())
    assert len(due) == pytest.approx(20_000, rel=0.03)
    between = [b - a for a, b in pairwise(due)]
    assert statistics.stdev(between) == pytest.approx(statistics.mean(between), rel=0.05)  # of an exponential one


def test_random_arrivals_are_the_same_for_a_seed_and_differ_between_seeds_and_processes() -> None:
    phases = (Phase(100, 100, 1),)

    def due(number: int, seed: int) -> list[float]:
        return list(plan(number, 2, phases=phases, arrivals="poisson", seed=seed).due())

    assert due(0, 1) == due(0, 1)
    assert due(0, 1) != due(0, 2)
    assert due(0, 1) != due(1, 1)


def test_the_warm_up_has_the_first_rate() -> None:
    due = list(plan(phases=(Phase(100, 100, 1),), warm_up=0.5).due())
    assert (len(due), sum(it < 0.5 for it in due)) == (150, 50)


@given(first=st.floats(0, 1e5), last=st.floats(0.01, 1e5), seconds=st.floats(0.01, 100), share=st.floats(0, 1))
def test_what_is_due_by_then_is_what_the_rate_gives(first: float, last: float, seconds: float, share: float) -> None:
    phase = Phase(first, last, seconds)
    number = phase.calls * share
    at = phase.due(number)
    assert 0 <= at <= seconds * 1.0001
    assert first * at + (last - first) / seconds * at**2 / 2 == pytest.approx(number, rel=1e-6, abs=1e-6)


def test_callers_and_calls_of_the_closed_model_are_shared_out_to_the_last() -> None:
    plans = [plan(number, 3, concurrency=10, calls=100) for number in range(3)]
    assert [it.own_concurrency for it in plans] == [4, 3, 3]
    assert [it.own_calls for it in plans] == [34, 33, 33]
    assert plan(concurrency=1).own_calls == float("inf")


def test_a_plan_goes_to_another_process_as_it_is() -> None:
    made = plan(phases=(Phase(1, 2, 3),), params={"x": [1, None]}, lines=({"a": 1}, {"b": "ü"}), seed=5)
    assert read_plan(made.to_json()) == made


def test_nonces_that_were_seen_twice_are_counted_also_by_two_workers() -> None:
    one, other = NonceRecord(), NonceRecord()
    for nonce in (0, 1, 9, 20_000, NONCES + 1, NONCES + 1):
        one.add(nonce)
    for nonce in (2, 9, NONCES + 1, 2 * NONCES):
        other.add(nonce)
    whole = NonceRecord().merge([read_nonces(one.to_json()), read_nonces(other.to_json())])
    assert (whole.runs, whole.doubled) == (10, 3)
    assert (one.doubled, other.doubled) == (1, 0)
