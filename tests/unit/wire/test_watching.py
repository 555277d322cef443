"""What a worker tells a watcher, as bytes and back."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcq.errors import Executed
from rpcq.wire import bodies
from rpcq.wire.properties import decode
from rpcq.wire.replies import ERROR, RESULT, Reply, read_reply
from rpcq.wire.watching import (
    PROGRESS,
    Failure,
    Progress,
    State,
    Told,
    encode_told,
    read_failure,
    read_progress,
    write_failure,
    write_progress,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
AMOUNT = st.none() | st.integers(0, 10**300) | st.floats(0, allow_nan=False, allow_infinity=False)
TIMES = st.none() | st.integers(0, 10**13).map(lambda ms: datetime.fromtimestamp(ms // 1000, UTC))
PROGRESSES = st.builds(
    Progress,
    state=st.sampled_from(get_args(State)),
    attempt=st.integers(1, 1000),
    done=AMOUNT,
    total=AMOUNT,
    note=st.none() | TEXT,
    reason=TEXT,
    error=TEXT,
    incident=TEXT,
    due=TIMES,
)
FAILURES = st.builds(Failure, TEXT, TEXT, st.sampled_from(get_args(Executed)), st.integers(0, 1000), st.just("") | TEXT)


@given(PROGRESSES, TEXT, st.integers(1, 10**6))
def test_progress_arrives_as_it_was_told(progress: Progress, run: str, number: int) -> None:
    told = Told(progress, run, number)
    assert read_progress(write_progress(told)) == told


@given(FAILURES)
def test_a_failure_arrives_as_it_was_told(failure: Failure) -> None:
    assert read_failure(write_failure(failure)) == failure


@pytest.mark.parametrize("kind", [PROGRESS, RESULT, ERROR])
def test_a_message_to_a_watcher_is_a_transient_reply_without_headers(kind: bytes) -> None:
    properties = encode_told(kind, b"job-7")
    found = decode(properties)
    assert (found.correlation_id, found.type, found.delivery_mode, found.headers) == (b"job-7", kind, 1, None)
    assert found.content_type == b"application/json"
    assert read_reply(properties, b"{}", b"amq.gen-1") == Reply(b"job-7", kind, b"{}")


@pytest.mark.parametrize(
    "body", [None, b"", b"{", b"5", b"[]", b"null", b"{}", b'{"state": "running"}', b"\xff", b"1e400"]
)
def test_what_is_no_progress_is_refused(body: bytes | None) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_progress(body)


@pytest.mark.parametrize("body", [None, b"", b"{", b"5", b"[]", b"{}", b'{"code": 5}', b'{"code": null}'])
def test_what_is_no_failure_is_refused(body: bytes | None) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_failure(body)


ODD: Any = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**400) | st.floats(-10, 10) | TEXT | st.lists(st.integers())
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("attempt", "number", "done", "total", "note", "due"), ODD)))
def test_a_part_that_does_not_fit_is_left_out_and_the_rest_is_read(odd: dict[str, Any]) -> None:
    told = read_progress(bodies.dumps({"state": "waiting", "run": "r", **odd}))
    progress = told.progress
    assert (told.run, progress.state) == ("r", "waiting")
    assert type(told.number) is int
    assert progress.note is None or isinstance(progress.note, str)
    assert all(value is None or 0 <= value < float("inf") for value in (progress.done, progress.total))


def test_an_outcome_that_is_none_counts_as_not_known() -> None:
    assert read_failure(b'{"code": "attempts", "executed": "never", "attempts": -1}') == Failure(
        "attempts", "", "maybe", 0
    )


def test_texts_that_utf_8_cannot_carry_are_replaced() -> None:
    assert read_failure(write_failure(Failure("gave_up", "\ud800", "yes", 1))).message == "?"
