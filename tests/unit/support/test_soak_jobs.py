"""The oracle of the soak of jobs: it must see each thing that must not be."""

from __future__ import annotations

from collections import Counter

import pytest

from soak.jobs import Found, Plan, verdict

PLAN = Plan(jobs=4, kills=1, poison=1, hang=1, restart="none", workers=1, minutes=1, seed=1)
KINDS = ["quick", "poison", "hang", "again"]


def found() -> Found:
    """A run in which all is well."""
    return Found(
        kills=1,
        done=Counter({0: 1, 3: 2}),
        numbers={f"id{number}": number for number in range(4)},
        dead=[{"id": "id1", "reason": "delivery_limit"}, {"id": "id2", "reason": "attempts"}],
    )


def test_all_is_well_also_where_an_effect_or_a_letter_is_doubled() -> None:
    well = found()
    well.dead.append({"id": "id2", "reason": "attempts"})
    assert verdict(PLAN, KINDS, well) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda it: it.done.pop(0), r"1 jobs are lost: 0 (quick)"),
        (lambda it: it.dead.append({"id": "id0", "reason": "attempts"}), "1 innocent jobs are dead: 0 (quick)"),
        (lambda it: it.dead.pop(), "job 2 (hang) must be dead because of attempts; found none"),
        (lambda it: it.dead[0].update(reason="gave_up"), "job 1 (poison) must be dead because of delivery_limit"),
        (lambda it: it.dead.append({"id": "?", "reason": "attempts"}), "dead letters of jobs that nobody sent"),
        (lambda it: it.numbers.pop("id3"), "1 jobs were not sent"),
        (lambda it: it.queued.update(queue=1), "left in queues: {'queue': 1}"),
        (lambda it: setattr(it, "kills", 0), "not as many as planned"),
    ],
)
def test_what_must_not_be_is_a_violation(change: object, problem: str) -> None:
    bad = found()
    change(bad)  # type: ignore[operator]  # a function
    assert any(problem in each for each in verdict(PLAN, KINDS, bad)), verdict(PLAN, KINDS, bad)
