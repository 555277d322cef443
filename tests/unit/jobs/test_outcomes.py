"""What becomes of a job: every cause, and that no dead letter claims more than is known."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcq.errors import GiveUp, InvalidParams, RetryLater, ServiceUnavailable
from rpcq.invocation import Interruption, Refused
from rpcq.jobs.outcomes import (
    UNKNOWN_PAUSES,
    Again,
    Dead,
    Suspect,
    of_delivery,
    of_error,
    of_interruption,
    of_refusal,
    of_unknown,
)
from rpcq.options import JobOptions, Retry
from rpcq.wire.jobs import JobMessage

OPTIONS = JobOptions(retry=Retry(max_attempts=3, initial_backoff=1, max_backoff=60))
ONCE = JobOptions(at_most_once=True)


def job(**fields: Any) -> JobMessage:
    return JobMessage(**{"id": "7", "name": "work", "body": b"{}", "key": "7", **fields})


def delivered(
    message: JobMessage,
    known: JobOptions | None = OPTIONS,
    *,
    is_suspects: bool = False,
    is_method: bool = False,
    now_ms: int = 1000,
) -> Any:
    unknown = partial(of_unknown, is_method=is_method)
    return of_delivery(message, is_suspects=is_suspects, known=known, unknown=unknown, now_ms=now_ms)


def longest(pause: float) -> float:
    return pause


@pytest.mark.parametrize(
    ("fields", "known", "rest", "reason", "executed"),
    [
        ({"problem": "bad"}, OPTIONS, {}, "invalid", "no"),
        ({"problem": "bad", "returns": 1}, OPTIONS, {}, "invalid", "maybe"),
        ({"problem": "bad", "attempt": 2}, OPTIONS, {}, "invalid", "yes"),
        ({"returns": 20}, OPTIONS, {}, "delivery_limit", "maybe"),
        ({"returns": 5}, OPTIONS, {"is_suspects": True}, "delivery_limit", "maybe"),
        ({"returns": 1, "earlier": 19}, OPTIONS, {}, "delivery_limit", "maybe"),
        ({"earlier": 20}, OPTIONS, {"is_suspects": True}, "delivery_limit", "maybe"),
        ({"expires_ms": 1000}, OPTIONS, {}, "expired", "no"),
        ({"expires_ms": 1000, "earlier": 1}, OPTIONS, {}, "expired", "maybe"),
        ({"earlier": 1}, ONCE, {}, "interrupted", "maybe"),
        ({"expires_ms": 999, "returns": 1}, OPTIONS, {}, "expired", "maybe"),
        ({"expires_ms": 999, "attempt": 2}, OPTIONS, {}, "expired", "yes"),
        ({}, None, {"is_method": True}, "unknown_method", "no"),
        ({"unknown": len(UNKNOWN_PAUSES)}, None, {}, "unknown_method", "no"),
        ({"unknown": len(UNKNOWN_PAUSES), "returns": 1}, None, {}, "unknown_method", "maybe"),
        ({"returns": 1}, ONCE, {}, "interrupted", "maybe"),
    ],
)
def test_what_may_not_run_is_dead(
    fields: dict[str, Any], known: JobOptions | None, rest: dict[str, Any], reason: str, executed: str
) -> None:
    found = delivered(job(**fields), known, **rest)
    assert isinstance(found, Dead)
    assert (found.reason, found.executed) == (reason, executed)


def test_what_may_run_runs() -> None:
    assert delivered(job()) is None
    assert delivered(job(returns=1)) is None
    assert delivered(job(expires_ms=1001)) is None
    assert delivered(job(returns=4), is_suspects=True) is None


def test_what_came_back_twice_is_a_suspect() -> None:
    assert delivered(job(returns=2)) == Suspect()
    assert delivered(job(returns=19)) == Suspect()
    assert delivered(job(returns=1, earlier=1)) == Suspect()
    assert delivered(job(earlier=2), is_suspects=True) is None


def test_a_name_that_is_not_known_waits_longer_each_time() -> None:
    pauses = [delivered(job(unknown=count), None) for count in range(len(UNKNOWN_PAUSES))]
    assert [(it.steps / 4, it.attempts, it.unknown) for it in pauses] == [(it, 0, 1) for it in UNKNOWN_PAUSES]


def test_an_error_is_retried_with_a_growing_pause_and_then_the_job_is_dead() -> None:
    error = ValueError("no")
    first, second = (of_error(job(attempt=number), OPTIONS, error, longest) for number in (1, 2))
    assert (first, second) == (
        Again(4, "failed", "ValueError: no", attempts=1),
        Again(8, "failed", "ValueError: no", attempts=1),
    )
    assert of_error(job(attempt=3), OPTIONS, error, longest) == Dead("attempts", "yes", "ValueError: no")


@pytest.mark.parametrize("options", [JobOptions(retry=None), ONCE])
def test_a_job_without_retries_is_dead_after_its_first_attempt(options: JobOptions) -> None:
    assert of_error(job(), options, ValueError("no"), longest) == Dead("attempts", "yes", "ValueError: no")
    assert of_error(job(), options, RetryLater(1), longest) == Dead("attempts", "yes", "RetryLater: again in 1 s")


def test_the_handler_decides() -> None:
    assert of_error(job(), OPTIONS, RetryLater(0.3), longest) == Again(
        2, "retry_later", "RetryLater: again in 0.3 s", attempts=1
    )
    assert of_error(job(), OPTIONS, GiveUp("bounced"), longest) == Dead("gave_up", "yes", "bounced")


def test_retry_on_and_give_up_on() -> None:
    options = JobOptions(retry_on=(OSError, LookupError), give_up_on=(KeyError,))
    kinds = {type(of_error(job(), options, it, longest)) for it in (OSError(), ConnectionError(), IndexError())}
    assert kinds == {Again}
    kinds = {type(of_error(job(), options, it, longest)) for it in (KeyError("k"), ValueError())}
    assert kinds == {Dead}


def test_a_job_that_could_not_begin_is_not_an_attempt() -> None:
    found = of_error(job(attempt=3), OPTIONS, Refused(ServiceUnavailable("no thread")), longest)
    assert isinstance(found, Again)
    assert (found.attempts, found.unknown) == (0, 0)


def test_interruptions() -> None:
    def found(why: Interruption, options: JobOptions = OPTIONS, attempt: int = 1) -> Any:
        return of_interruption(job(attempt=attempt), options, why, 1.5, longest)

    assert found(Interruption.TIMED_OUT) == Again(4, "timed_out", "it timed out after 1.500 s", attempts=1)
    assert found(Interruption.TIMED_OUT, attempt=3) == Dead("attempts", "yes", "it timed out after 1.500 s")
    assert found(Interruption.TIMED_OUT_UNBEGUN, attempt=3).attempts == 0
    assert found(Interruption.CUT_OFF) is None
    assert found(Interruption.CUT_OFF_UNBEGUN) is None
    assert (found(Interruption.CUT_OFF, ONCE).reason, found(Interruption.CUT_OFF, ONCE).executed) == (
        "interrupted",
        "maybe",
    )
    assert found(Interruption.CUT_OFF_UNBEGUN, ONCE) == Again(0, "stopped", "its worker stopped before it began")


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_no_retry_is_without_a_pause_or_beyond_the_ladder(attempt: int, part: float) -> None:
    retry = Retry(max_attempts=1000, initial_backoff=1e-9, max_backoff=1e12)
    options = JobOptions(retry=retry)
    found = of_error(job(attempt=min(attempt, 999)), options, ValueError(), lambda pause: pause * part)
    assert isinstance(found, Again)
    assert 1 <= found.steps < 2**24
    assert found.steps.bit_count() <= 2


def test_parameters_that_do_not_fit() -> None:
    assert of_refusal(job(), InvalidParams("x: missing")) == Dead("invalid", "no", "x: missing")


@given(st.integers(1, 5), st.integers(0, 25), st.booleans(), st.sampled_from([OPTIONS, ONCE, None]))
def test_no_is_never_said_of_what_may_have_run(
    attempt: int, returns: int, is_suspects: bool, known: JobOptions | None
) -> None:
    found = delivered(job(attempt=attempt, returns=returns, unknown=4), known, is_suspects=is_suspects)
    if isinstance(found, Dead) and found.executed == "no":
        assert attempt == 1
        assert returns == 0
