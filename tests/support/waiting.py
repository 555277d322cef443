"""A call that waits in a table of calls, without a client."""

from __future__ import annotations

from rpcq.calls.outcomes import Call, CallEvent, Outcome, State
from rpcq.calls.pending import PendingCalls
from rpcq.wire.replies import RESULT, Reply

REPLY = Reply(b"id", RESULT, b"1")
SENT = (State.WRITTEN, State.CONFIRMED)
EVERY = (State.CREATED, *SENT)


class Waiting(Call):
    """A call that remembers what became of it."""

    def __init__(self, correlation_id: bytes, *, idempotent: bool = False) -> None:
        super().__init__(correlation_id, idempotent=idempotent)
        self.outcomes: list[Outcome] = []
        self.agains = 0
        self.elsewheres = 0

    def ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def again(self) -> None:
        self.agains += 1

    def elsewhere(self) -> None:
        self.elsewheres += 1


def begun(state: State, *, idempotent: bool = False) -> tuple[PendingCalls, Waiting]:
    calls = PendingCalls(10)
    call = Waiting(calls.next_id(), idempotent=idempotent)
    calls.add(call)
    if state is not State.CREATED:
        calls.write(call)
    if state is State.CONFIRMED:
        calls.happened(call, CallEvent.CONFIRM)
    assert call.state is state
    return calls, call
