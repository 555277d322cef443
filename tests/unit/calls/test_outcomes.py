"""How a call ends: the table, row by row, and any interleaving of what can happen."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from rpcq.calls.outcomes import (
    MAX_ATTEMPTS,
    TRANSITIONS,
    Act,
    Call,
    CallEvent,
    State,
    for_call,
)
from rpcq.calls.pending import PendingCalls
from rpcq.errors import (
    CallError,
    CallTimeout,
    InvalidParams,
    OutcomeUnknown,
    Overloaded,
    ServiceUnavailable,
    TooLarge,
)
from support.waiting import EVERY, REPLY, SENT, Waiting, begun


@pytest.mark.parametrize(
    ("states", "event", "error", "executed", "retryable"),
    [
        (SENT, CallEvent.LOST, OutcomeUnknown, "maybe", False),
        (SENT, CallEvent.WORKER_LOST, OutcomeUnknown, "maybe", False),
        ((State.WRITTEN,), CallEvent.RETURNED, ServiceUnavailable, "no", True),
        ((State.WRITTEN,), CallEvent.REFUSED, Overloaded, "maybe", False),
        ((State.WRITTEN,), CallEvent.REFUSED_UNRUN, Overloaded, "no", True),
        ((State.WRITTEN,), CallEvent.TOO_LARGE, TooLarge, "no", False),
        (SENT, CallEvent.EXPIRED_UNRUN, CallTimeout, "no", True),
        (SENT, CallEvent.EXPIRED, CallTimeout, "maybe", False),
        (SENT, CallEvent.DEADLINE, CallTimeout, "maybe", False),
        (SENT, CallEvent.DEADLINE_BLOCKED, CallTimeout, "maybe", False),
        (SENT, CallEvent.DEADLINE_CUT_OFF, CallTimeout, "maybe", False),
        ((State.CREATED,), CallEvent.DEADLINE, CallTimeout, "no", True),
        ((State.CREATED,), CallEvent.DEADLINE_CUT_OFF, ServiceUnavailable, "no", True),
        ((State.CREATED,), CallEvent.DEADLINE_BLOCKED, Overloaded, "no", True),
        (SENT, CallEvent.CLOSE, OutcomeUnknown, "maybe", False),
        ((State.CREATED,), CallEvent.CLOSE, ServiceUnavailable, "no", True),
    ],
)
def test_an_event_ends_a_call_with_one_honest_error(
    states: tuple[State, ...], event: CallEvent, error: type[CallError], executed: str, retryable: bool
) -> None:
    for state in states:
        calls, call = begun(state)
        calls.happened(call, event, why="the cause")
        (outcome,) = call.outcomes
        assert type(outcome) is error
        assert (outcome.executed, outcome.retryable) == (executed, retryable)
        assert outcome.correlation_id == call.correlation_id.decode()
        assert "the cause" in str(outcome)
        assert len(calls) == 0
        assert call.state is State.DONE


@pytest.mark.parametrize("state", EVERY)
def test_a_reply_answers_a_call_in_every_state(state: State) -> None:
    calls, call = begun(state)
    calls.happened(call, CallEvent.REPLY, REPLY)
    assert call.outcomes == [REPLY]
    assert len(calls) == 0


@pytest.mark.parametrize("event", [CallEvent.TURNED_AWAY, CallEvent.UNSENT])
def test_a_request_that_certainly_did_not_run_is_sent_again_whatever_the_call(event: CallEvent) -> None:
    calls, call = begun(State.WRITTEN)
    calls.happened(call, event)
    assert (call.agains, call.attempt, call.outcomes, call.state) == (1, 1, [], State.CREATED)


def test_a_request_that_reached_no_queue_is_sent_elsewhere_under_the_same_id() -> None:
    calls, call = begun(State.WRITTEN)
    first = call.request_id
    calls.happened(call, CallEvent.NOT_THERE)
    assert (call.elsewheres, call.agains, call.sent, call.outcomes, call.state) == (1, 0, 0, [], State.CREATED)
    assert calls.write(call) == first
    calls.happened(call, CallEvent.TURNED_AWAY)
    second = calls.write(call)
    calls.happened(call, CallEvent.NOT_THERE)
    assert calls.write(call) == second != first


@pytest.mark.parametrize("event", [CallEvent.LOST, CallEvent.WORKER_LOST])
def test_an_idempotent_call_is_sent_again_a_few_times(event: CallEvent) -> None:
    calls, call = begun(State.WRITTEN, idempotent=True)
    for attempt in range(2, MAX_ATTEMPTS + 1):
        calls.happened(call, event)
        assert (call.attempt, call.outcomes) == (attempt, [])
        calls.write(call)
    calls.happened(call, event)
    (outcome,) = call.outcomes
    assert isinstance(outcome, OutcomeUnknown)


@pytest.mark.parametrize(
    "event", [CallEvent.RETURNED, CallEvent.REFUSED_UNRUN, CallEvent.TOO_LARGE, CallEvent.EXPIRED_UNRUN]
)
def test_no_later_attempt_says_that_the_call_did_not_run(event: CallEvent) -> None:
    calls, call = begun(State.WRITTEN, idempotent=True)
    calls.happened(call, CallEvent.LOST)
    calls.write(call)
    calls.happened(call, event)
    (outcome,) = call.outcomes
    assert isinstance(outcome, CallError)
    assert (outcome.executed, outcome.retryable) == ("maybe", False)
    told = for_call(call, InvalidParams("by a worker"))
    assert (told.executed, told.retryable) == ("maybe", False)


def test_a_call_that_has_ended_never_changes() -> None:
    assert not [state for state, _ in TRANSITIONS if state is State.DONE]
    calls, call = begun(State.WRITTEN)
    calls.happened(call, CallEvent.REPLY, REPLY)
    for event in CallEvent:
        calls.happened(call, event, REPLY)
    assert call.outcomes == [REPLY]


def test_nothing_that_may_have_run_is_sent_again_for_certain() -> None:
    for transition in TRANSITIONS.values():
        if transition.act is Act.AGAIN:
            assert transition.executed == "no"
        if transition.act is Act.AGAIN_OR_FAIL:
            assert transition.executed == "maybe"


def test_what_says_nothing_about_the_last_request_is_passed_over() -> None:
    deadlines = {CallEvent.DEADLINE, CallEvent.DEADLINE_BLOCKED, CallEvent.DEADLINE_CUT_OFF}
    everything = {CallEvent.REPLY, *deadlines, CallEvent.CANCEL, CallEvent.CLOSE}
    only_sent = {
        CallEvent.TURNED_AWAY,
        CallEvent.WORKER_LOST,
        CallEvent.LOST,
        CallEvent.EXPIRED,
        CallEvent.EXPIRED_UNRUN,
    }
    returned = {CallEvent.RETURNED, CallEvent.NOT_THERE}
    refused = {CallEvent.REFUSED, CallEvent.REFUSED_UNRUN, CallEvent.TOO_LARGE}
    only_unconfirmed = {CallEvent.CONFIRM, *returned, *refused, CallEvent.UNSENT}
    assert {event for state, event in TRANSITIONS if state is State.CREATED} == everything | {CallEvent.WRITE}
    assert {
        event for state, event in TRANSITIONS if state is State.WRITTEN
    } == everything | only_sent | only_unconfirmed
    assert {event for state, event in TRANSITIONS if state is State.CONFIRMED} == everything | only_sent
    for state in EVERY:
        for event in set(CallEvent) - {of for at, of in TRANSITIONS if at is state}:
            calls, call = begun(state, idempotent=True)
            calls.happened(call, event)
            assert (call.state, call.agains, call.outcomes, len(calls)) == (state, 0, [], 1)


def test_a_late_answer_to_an_earlier_request_is_an_answer() -> None:
    for event in (CallEvent.TURNED_AWAY, CallEvent.LOST):
        calls, call = begun(State.WRITTEN, idempotent=True)
        calls.happened(call, event)
        calls.happened(call, CallEvent.REPLY, REPLY)
        assert call.outcomes == [REPLY]


def test_who_is_told_is_for_subclasses_to_say() -> None:
    call = Call(b"id", idempotent=False)
    with pytest.raises(NotImplementedError):
        call.ended(REPLY)
    with pytest.raises(NotImplementedError):
        call.again()


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order, each call ends once, and honestly."""

    under_way: Bundle[Waiting] = Bundle("under_way")

    def __init__(self) -> None:
        super().__init__()
        self.calls = PendingCalls(5)
        self.all: list[Waiting] = []
        self.cancelled: set[Waiting] = set()
        self.may_have_run: set[Waiting] = set()

    @rule(target=under_way, idempotent=st.booleans())
    def begin(self, idempotent: bool) -> Waiting:
        call = Waiting(self.calls.next_id(), idempotent=idempotent)
        if len(self.calls) == 5:
            with pytest.raises(Overloaded):
                self.calls.add(call)
            call.ended(REPLY)  # it never began
            call.state = State.DONE
        else:
            self.calls.add(call)
        self.all.append(call)
        return call

    @rule(call=under_way)
    def write(self, call: Waiting) -> None:
        if call.state is State.CREATED:
            self.calls.write(call)

    @rule(
        call=under_way, event=st.sampled_from([it for it in CallEvent if it not in (CallEvent.WRITE, CallEvent.CANCEL)])
    )
    def happen(self, call: Waiting, event: CallEvent) -> None:
        before, agains = call.state, call.agains
        self.calls.happened(call, event, REPLY if event is CallEvent.REPLY else None)
        if before in SENT and event in (CallEvent.LOST, CallEvent.WORKER_LOST):
            self.may_have_run.add(call)
            assert call.agains == agains or call.idempotent

    @rule(call=under_way)
    def cancel(self, call: Waiting) -> None:
        if call.state is not State.DONE:
            self.cancelled.add(call)
        self.calls.happened(call, CallEvent.CANCEL)

    @rule(call=consumes(under_way))
    def expire(self, call: Waiting) -> None:
        self.calls.happened(call, CallEvent.DEADLINE)
        assert call.state is State.DONE

    @invariant()
    def each_call_ends_once(self) -> None:
        for call in self.all:
            ended = call.state is State.DONE
            assert len(call.outcomes) == (1 if ended and call not in self.cancelled else 0)
            assert self.calls.is_pending(call) == (not ended)
            assert call.attempt <= MAX_ATTEMPTS
            if call in self.may_have_run and call.outcomes and isinstance(call.outcomes[0], CallError):
                assert call.outcomes[0].executed != "no"

    def teardown(self) -> None:
        for call in self.all:
            self.calls.happened(call, CallEvent.DEADLINE)
        assert len(self.calls) == 0


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
