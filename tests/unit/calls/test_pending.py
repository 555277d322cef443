"""The table of calls under way: which call a reply is for, what is kept of ended calls, and correlation IDs."""

from __future__ import annotations

import re

import pytest

from rpcq.calls.outcomes import CallEvent, State
from rpcq.calls.pending import REMEMBERED_CALLS, PendingCalls, public_id
from rpcq.errors import ConfigurationError, Overloaded
from rpcq.wire.replies import Reply
from support.waiting import EVERY, Waiting, begun


def test_every_request_has_an_id_of_its_own_and_each_finds_its_call() -> None:
    calls, call = begun(State.WRITTEN)
    first = call.request_id
    calls.happened(call, CallEvent.TURNED_AWAY)
    second = calls.write(call)
    assert first != second
    assert calls.get(first) is calls.get(second) is call
    assert (calls.get(b"another"), calls.get(b"another.2")) == (None, None)


def test_replies_for_no_call_under_way_are_told_apart_as_late_duplicate_and_stray() -> None:
    calls, answered = begun(State.WRITTEN)
    calls.happened(answered, CallEvent.REPLY, Reply(answered.correlation_id, b"result", b"1"))
    assert calls.get(answered.request_id) is None
    calls.count_unmatched(answered.request_id)
    assert (calls.late, calls.duplicate, calls.stray) == (0, 1, 0)
    for event in (CallEvent.DEADLINE, CallEvent.CANCEL):
        call = Waiting(calls.next_id(), idempotent=True)
        calls.add(call)
        calls.write(call)
        calls.happened(call, CallEvent.LOST)
        calls.write(call)
        calls.happened(call, event)
        assert calls.get(call.request_id) is None
        calls.count_unmatched(call.request_id)  # that of the second request
    assert (calls.late, calls.duplicate, calls.stray) == (2, 1, 0)
    calls.count_unmatched(call.correlation_id)  # and that of the first
    assert (calls.late, calls.duplicate, calls.stray) == (2, 2, 0)
    calls.count_unmatched(b"another")
    assert (calls.stray, calls.unmatched) == (1, 5)


def test_what_is_remembered_of_calls_without_a_reply_is_bounded() -> None:
    calls = PendingCalls(1)
    for _ in range(REMEMBERED_CALLS + 5):
        call = Waiting(calls.next_id(), idempotent=False)
        calls.add(call)
        calls.write(call)
        calls.happened(call, CallEvent.DEADLINE)
    assert len(calls._unanswered) == REMEMBERED_CALLS
    assert call.correlation_id in calls._unanswered


def test_a_cancelled_call_is_forgotten() -> None:
    for state in EVERY:
        calls, call = begun(state)
        assert calls.is_pending(call)
        calls.happened(call, CallEvent.CANCEL)
        assert (call.outcomes, len(calls), calls.is_pending(call)) == ([], 0, False)


def test_the_table_is_bounded() -> None:
    calls = PendingCalls(2)
    for _ in range(2):
        calls.add(Waiting(calls.next_id()))
    with pytest.raises(Overloaded, match="2 calls are under way"):
        calls.add(Waiting(calls.next_id()))


def test_a_correlation_id_that_is_taken_is_refused() -> None:
    calls, call = begun(State.CREATED)
    with pytest.raises(ConfigurationError, match="under way already"):
        calls.add(Waiting(call.correlation_id))
    assert list(calls) == [call]


def test_ids_of_clients_and_calls_differ() -> None:
    ids = {calls.next_id() for calls in (PendingCalls(1), PendingCalls(1)) for _ in range(1000)}
    assert len(ids) == 2000


def test_an_id_does_not_follow_from_all_others_and_its_public_part_does_not_tell_it() -> None:
    calls = PendingCalls(1)
    ids = [calls.next_id().decode() for _ in range(2000)]
    secrets = [it.removeprefix(f"{public_id(it)}-") for it in ids]
    assert all(re.fullmatch("[0-9a-f]{16}", it) for it in secrets)  # 64 bits each
    assert len(set(secrets)) == 2000
    assert len({bit for it in secrets for bit in enumerate(f"{int(it, 16):064b}")}) == 128  # each is 0 and 1
    assert [public_id(it).rpartition("-")[2] for it in ids] == [f"{it:x}" for it in range(256, 2256)]
