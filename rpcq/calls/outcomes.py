"""How a call ends: events, the table of transitions, and the errors that come of them. Pure.

`TRANSITIONS` is the one place that decides how a call ends. What comes from outside (a reply, a notice, a confirm, the
deadline) becomes an event of the table by the functions at the end of this module. The states:

    CREATED --WRITE--> WRITTEN --CONFIRM--> CONFIRMED --> DONE
       ^                  |                     |          ^
       |    sent again    |                     |          |   a reply, or an error
       +------------------+---------------------+----------+

A request is sent again within the same deadline if it certainly did not run, or if it may have run and the caller
declared the call idempotent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from typing import Final

from rpcq.errors import (
    CallError,
    CallTimeout,
    Executed,
    OutcomeUnknown,
    Overloaded,
    ServiceUnavailable,
    TooLarge,
)
from rpcq.transport.base import Published
from rpcq.wire.bodies import dumps, loads
from rpcq.wire.replies import ERROR, Notice, Reply

MAX_ATTEMPTS: Final = 3
"""At most so many requests of an idempotent call may have run."""


class State(IntEnum):
    """How far a call is."""

    CREATED = auto()
    WRITTEN = auto()
    CONFIRMED = auto()
    DONE = auto()


class CallEvent(IntEnum):
    """What happens to a call."""

    WRITE = auto()
    """A request is handed to the transport."""
    CONFIRM = auto()
    """The broker has the request."""
    REPLY = auto()
    """A worker replied, with a result or an error."""
    TURNED_AWAY = auto()
    """A worker replied that it did not begin: it shuts down, has no free thread, or its store failed."""
    WORKER_LOST = auto()
    """The worker that held the request was lost, or its queue gave it up, as the broker or another worker says."""
    RETURNED = auto()
    """No queue is bound for the service."""
    NOT_THERE = auto()
    """The request was sent only to the queue that delivers once, and was returned: the service has no such queue."""
    REFUSED = auto()
    """The broker refused the request: the queue is full, or its node cannot be reached. It may be in the queue."""
    REFUSED_UNRUN = auto()
    """The broker refused the request for a queue that delivers once: it is certainly not in the queue."""
    TOO_LARGE = auto()
    """The broker takes no request of that size."""
    UNSENT = auto()
    """The request never reached the socket."""
    LOST = auto()
    """A session was lost: no news of the request will come."""
    EXPIRED = auto()
    """The request expired in a queue that may have delivered it before."""
    EXPIRED_UNRUN = auto()
    """The request expired in the only queue it was in, which delivers once, and too soon to have been delivered."""
    DEADLINE = auto()
    """The deadline passed."""
    DEADLINE_BLOCKED = auto()
    """The deadline passed while the connection to the broker was blocked or its buffer full."""
    DEADLINE_CUT_OFF = auto()
    """The deadline passed while there was no connection to the broker."""
    CANCEL = auto()
    """The caller's task was cancelled."""
    CLOSE = auto()
    """The client is closed."""


class Act(Enum):
    """What a transition does besides changing the state."""

    NOTHING = auto()
    ANSWER = auto()
    """The caller gets the reply."""
    FAIL = auto()
    """The caller gets the error."""
    AGAIN = auto()
    """The request is sent again: it certainly did not run."""
    ELSEWHERE = auto()
    """The request reached no queue: it is sent again at once, under the name of the service."""
    AGAIN_OR_FAIL = auto()
    """The request may have run: it is sent again if the call is idempotent, else the caller gets the error."""
    FORGET = auto()
    """The caller is gone."""


@dataclass(frozen=True, slots=True)
class Transition:
    """What becomes of a call."""

    state: State
    act: Act
    error: type[CallError] | None = None
    executed: Executed = "no"
    message: str = ""


def _fail(error: type[CallError], executed: Executed, message: str) -> Transition:
    return Transition(State.DONE, Act.FAIL, error, executed, message)


_ANSWER: Final = Transition(State.DONE, Act.ANSWER)
_AGAIN: Final = Transition(State.CREATED, Act.AGAIN)
_FORGET: Final = Transition(State.DONE, Act.FORGET)
_NO_SERVICE: Final = _fail(ServiceUnavailable, "no", "no worker serves it: no queue is bound for it")
_NOT_CONNECTED: Final = _fail(ServiceUnavailable, "no", "there was no connection to the broker until the deadline")
_BLOCKED: Final = _fail(Overloaded, "no", "the broker took no messages until the deadline")
_FULL: Final = _fail(Overloaded, "no", "the broker refused it: the request queue is full, or has no leader")
_REFUSED: Final = _fail(
    Overloaded, "maybe", "the broker refused it: the request queue is full, or its node cannot be reached"
)
_TOO_LARGE: Final = _fail(TooLarge, "no", "the broker takes no such message (max_message_size, frame_max)")
_TOO_LATE: Final = _fail(CallTimeout, "no", "the deadline passed before the call was sent")
_NO_WORD: Final = _fail(CallTimeout, "maybe", "no reply until the deadline")
_EXPIRED: Final = _fail(CallTimeout, "maybe", "the request expired in the queue")
_EXPIRED_UNRUN: Final = _fail(CallTimeout, "no", "the request expired in the queue, and was never delivered")
_CLOSED: Final = _fail(OutcomeUnknown, "maybe", "the client was closed while the call was under way")
_CLOSED_UNSENT: Final = _fail(ServiceUnavailable, "no", "the client was closed before the call was sent")
_LOST: Final = Transition(
    State.CREATED, Act.AGAIN_OR_FAIL, OutcomeUnknown, "maybe", "the connection to the broker was lost"
)
_WORKER_LOST: Final = Transition(
    State.CREATED, Act.AGAIN_OR_FAIL, OutcomeUnknown, "maybe", "the worker that held the call was lost"
)

_C, _W, _CF = State.CREATED, State.WRITTEN, State.CONFIRMED

# A call that is CREATED again still takes a late reply to an earlier request. All other news of an earlier request says
# nothing about the next one, and is ignored.
TRANSITIONS: Final[dict[tuple[State, CallEvent], Transition]] = {
    (_C, CallEvent.WRITE): Transition(_W, Act.NOTHING),
    (_C, CallEvent.REPLY): _ANSWER,
    (_C, CallEvent.DEADLINE): _TOO_LATE,
    (_C, CallEvent.DEADLINE_BLOCKED): _BLOCKED,
    (_C, CallEvent.DEADLINE_CUT_OFF): _NOT_CONNECTED,
    (_C, CallEvent.CANCEL): _FORGET,
    (_C, CallEvent.CLOSE): _CLOSED_UNSENT,
    (_W, CallEvent.CONFIRM): Transition(_CF, Act.NOTHING),
    (_W, CallEvent.REPLY): _ANSWER,
    (_W, CallEvent.TURNED_AWAY): _AGAIN,
    (_W, CallEvent.WORKER_LOST): _WORKER_LOST,
    (_W, CallEvent.RETURNED): _NO_SERVICE,
    (_W, CallEvent.NOT_THERE): Transition(_C, Act.ELSEWHERE),
    (_W, CallEvent.REFUSED): _REFUSED,
    (_W, CallEvent.REFUSED_UNRUN): _FULL,
    (_W, CallEvent.TOO_LARGE): _TOO_LARGE,
    (_W, CallEvent.UNSENT): _AGAIN,
    (_W, CallEvent.LOST): _LOST,
    (_W, CallEvent.EXPIRED): _EXPIRED,
    (_W, CallEvent.EXPIRED_UNRUN): _EXPIRED_UNRUN,
    (_W, CallEvent.DEADLINE): _NO_WORD,
    (_W, CallEvent.DEADLINE_BLOCKED): _NO_WORD,
    (_W, CallEvent.DEADLINE_CUT_OFF): _NO_WORD,
    (_W, CallEvent.CANCEL): _FORGET,
    (_W, CallEvent.CLOSE): _CLOSED,
    (_CF, CallEvent.REPLY): _ANSWER,
    (_CF, CallEvent.TURNED_AWAY): _AGAIN,
    (_CF, CallEvent.WORKER_LOST): _WORKER_LOST,
    (_CF, CallEvent.LOST): _LOST,
    (_CF, CallEvent.EXPIRED): _EXPIRED,
    (_CF, CallEvent.EXPIRED_UNRUN): _EXPIRED_UNRUN,
    (_CF, CallEvent.DEADLINE): _NO_WORD,
    (_CF, CallEvent.DEADLINE_BLOCKED): _NO_WORD,
    (_CF, CallEvent.DEADLINE_CUT_OFF): _NO_WORD,
    (_CF, CallEvent.CANCEL): _FORGET,
    (_CF, CallEvent.CLOSE): _CLOSED,
}


# By index, and not by a pair of enum members: it is looked up several times in each call, and in CPython 3.11, getting
# at a member of an enum takes as long as calling a function.
TABLE: Final = [
    [None, *(TRANSITIONS.get((state, event)) for event in CallEvent)]  # auto() counts from 1
    for state in (State(1), *State)
]

_CREATED: Final = State.CREATED

Outcome = Reply | CallError


class Together:
    """The calls whose requests are in one message. It is a carrier: what becomes of it is for each of them.

    Attributes:
        batch_id: the correlation ID of the message.
        calls: those whose requests it has, and that still wait for news of it, in their order. One that has ended is
            not kept here: its result may be large, and another call of the message may take long.

    """

    __slots__ = ("batch_id", "calls")

    def __init__(self, batch_id: bytes, calls: Sequence[Call]) -> None:
        self.batch_id = batch_id
        self.calls = dict.fromkeys(calls)


class Call:
    """One call under way. Subclasses send its requests and take its outcome.

    Attributes:
        correlation_id: 1 to 255 bytes, unique for this client.
        request_id: the correlation ID of its last request: the call's, with a number added from the second one on.
        idempotent: it may be sent again where it may have run.
        state: how far the call is.
        sent: requests handed to the transport.
        attempt: 1 + the number of earlier requests that may have run.
        together: the message batch that its last request is in; None if that went alone, or the call has ended.

    """

    __slots__ = ("attempt", "correlation_id", "idempotent", "request_id", "sent", "state", "together")

    def __init__(self, correlation_id: bytes, *, idempotent: bool) -> None:
        self.correlation_id = correlation_id
        self.request_id = correlation_id
        self.idempotent = idempotent
        self.state = _CREATED
        self.sent = 0
        self.attempt = 1
        self.together: Together | None = None

    def ended(self, outcome: Outcome) -> None:
        """The call has ended. Called once; never if its caller is gone."""
        raise NotImplementedError

    def again(self) -> None:
        """Send a request of the call again."""
        raise NotImplementedError

    def elsewhere(self) -> None:
        """Send a request of the call under the name of the service."""
        raise NotImplementedError


def error_of(call: Call, transition: Transition, why: str) -> CallError:
    """The error that a transition gives to the caller."""
    assert transition.error is not None  # noqa: S101 - the table has one wherever a call may fail
    message = f"{transition.message}: {why}" if why else transition.message
    return for_call(call, transition.error(message, executed=transition.executed))


def for_call(call: Call, error: CallError) -> CallError:
    """Add to an error what is known of its call: the ID, the attempt, and that an earlier request may have run."""
    error.correlation_id = call.correlation_id.decode("utf-8", "replace")
    error.attempt = call.attempt
    if call.attempt > 1 and error.executed == "no":
        error.executed = "maybe"
        error.retryable = False
    return error


# What comes from outside -> the event that it is for the call.

_LONGEST_SIGNAL: Final = 4096
"""Bytes. The two errors of workers that do not end a call are written by rpcq, and short."""

_MISREAD: Final = dumps(
    {
        "code": "INTERNAL",
        "message": "a program took a message with several requests for one request, and replied to that",
        "executed": "maybe",
        "retryable": False,
    }
)

_OF_PUBLISHED: Final = {
    Published.CONFIRMED: CallEvent.CONFIRM,
    Published.RETURNED: CallEvent.RETURNED,
    Published.REFUSED: CallEvent.REFUSED,
    Published.TOO_LARGE: CallEvent.TOO_LARGE,
    Published.UNSENT: CallEvent.UNSENT,
    Published.UNKNOWN: CallEvent.LOST,
}


def event_of_published(published: Published, *, is_once: bool, is_ours: bool) -> CallEvent:
    """The event for what became of the last request of a call when it was published.

    Args:
        published: what became of it.
        is_once: the request was sent to one queue that delivers once, and to no other.
        is_ours: the target is a service of rpcq, which may also have a queue that does not deliver once.

    """
    if is_once and published is Published.REFUSED:
        return CallEvent.REFUSED_UNRUN
    if is_once and is_ours and published is Published.RETURNED:
        return CallEvent.NOT_THERE
    return _OF_PUBLISHED[published]


def event_of_reply(reply: Reply) -> tuple[CallEvent, str]:
    """The event for a reply, and its cause if there is one."""
    if reply.kind == ERROR and reply.body is not None and len(reply.body) <= _LONGEST_SIGNAL:
        try:
            said = loads(reply.body)
        except ValueError:
            return CallEvent.REPLY, ""
        match said:
            case {"code": "UNAVAILABLE", "executed": "no"}:
                return CallEvent.TURNED_AWAY, ""
            case {"code": "ABORTED", "executed": "maybe"}:
                return CallEvent.WORKER_LOST, str(said.get("message") or "")
    return CallEvent.REPLY, ""


def event_of_refusal(reply: Reply) -> tuple[CallEvent, Reply, str]:
    """The event, for each call in a message batch, of a reply to the message: its worker does not read such messages.

    A worker that refuses what it cannot read says `no`, or `maybe` if the message may have been delivered before.
    Anything else comes of a program that took the message for one request, and says nothing of its calls.
    """
    if reply.kind == ERROR and reply.body is not None and len(reply.body) <= _LONGEST_SIGNAL:
        try:
            said = loads(reply.body)
        except ValueError:
            said = None
        match said:
            case {"executed": "no"}:
                return CallEvent.TURNED_AWAY, reply, ""
            case {"code": "ABORTED", "executed": "maybe"}:
                return CallEvent.WORKER_LOST, reply, str(said.get("message") or "")
            case {"code": "DEADLINE_EXCEEDED", "executed": "maybe"}:
                return CallEvent.REPLY, reply, ""
    return CallEvent.REPLY, Reply(reply.correlation_id, ERROR, _MISREAD), ""


def event_of_notice(notice: Notice, *, is_unrun: bool) -> tuple[CallEvent, str]:
    """The event for a notice that a queue gave up the last request of a call, and its cause if there is one.

    Args:
        notice: the broker's.
        is_unrun: the request was in this queue only, the queue delivers once, and it expired too soon to have been
            delivered.

    """
    if notice.reason != "expired":
        return CallEvent.WORKER_LOST, notice.reason
    return (CallEvent.EXPIRED_UNRUN if is_unrun else CallEvent.EXPIRED), ""


def event_of_deadline(*, is_connected: bool, can_publish: bool) -> CallEvent:
    """The event for the deadline of a call, by the state of the client's sessions."""
    if not is_connected:
        return CallEvent.DEADLINE_CUT_OFF
    return CallEvent.DEADLINE if can_publish else CallEvent.DEADLINE_BLOCKED


def too_late(call: Call, deadline: float) -> CallTimeout:
    """The error of a call whose deadline had passed before it began."""
    error = CallTimeout("the deadline had passed before the call", executed="no")
    error.deadline = deadline
    for_call(call, error)
    return error
