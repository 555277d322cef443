"""Deadlines: values on the monotonic clock, and the sooner one counts."""

from __future__ import annotations

import contextvars
import time

import pytest

from rpcq.runtime import deadline
from rpcq.runtime.deadline import Deadline, inherit


def _while_handling(handled: float, timeout: float, now: float) -> float:
    def inner() -> float:
        deadline.current.set(handled)
        return inherit(timeout, now)

    return contextvars.copy_context().run(inner)


def test_a_deadline_after_a_timeout_lies_that_far_ahead() -> None:
    before = time.monotonic()
    made = Deadline.after(5)
    after = time.monotonic()
    assert before + 5 <= made.at <= after + 5
    assert 0 < made.remaining() <= 5


def test_what_remains_of_a_deadline_that_passed_is_negative() -> None:
    assert Deadline(time.monotonic() - 1).remaining() <= -1


def test_a_deadline_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Deadline(1.0).at = 2.0  # type: ignore[misc]


def test_outside_of_a_handler_a_call_has_its_own_timeout() -> None:
    assert deadline.current.get() is None
    assert inherit(30.0, 100.0) == 130.0


def test_a_call_that_a_handler_makes_ends_no_later_than_the_handlers_own() -> None:
    handled = 110.0
    assert _while_handling(handled, 30.0, 100.0) == handled


def test_a_call_that_a_handler_makes_may_end_sooner() -> None:
    assert _while_handling(110.0, 2.0, 100.0) == 102.0


def test_a_deadline_that_passed_already_is_inherited_as_it_is() -> None:
    assert _while_handling(90.0, 30.0, 100.0) == 90.0


def test_a_handlers_deadline_is_not_seen_outside_of_its_context() -> None:
    _while_handling(110.0, 30.0, 100.0)
    assert deadline.current.get() is None
