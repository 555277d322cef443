"""The pending-call table: correlation ID -> state -> one outcome. Pure.

`TRANSITIONS` below is the one place that decides how a call ends. A call is CREATED until a request of it is handed
to the socket, then WRITTEN, then CONFIRMED by the broker; it is DONE when its outcome is known. Requests may be sent
again inside the same deadline: freely where the last one certainly did not run, and where it may have run only if the
caller declared the call idempotent.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from typing import Final

from rpcq.errors import (
    CallError,
    CallTimeout,
    ConfigurationError,
    Executed,
    OutcomeUnknown,
    Overloaded,
    ServiceUnavailable,
    TooLarge,
)
from rpcq.wire import Reply

MAX_ATTEMPTS: Final = 3
"""Times that an idempotent call is sent where each may have run."""


REMEMBERED_CALLS: Final = 10_000
"""Calls that ended without a reply, by which a late one is told from one that came twice."""

_SECRET: Final = 8
"""Bytes of the random part of a correlation ID."""
_LAST_DIGITS: Final = [b"%02x-" % number for number in range(255, -1, -1)]
"""The last two digits of the numbers of 256 correlation IDs, the highest first.

So many are made at once: to ask the system for each random part would cost more than all else of an ID.
"""


class State(IntEnum):
    """How far a call is."""

    CREATED = auto()
    WRITTEN = auto()
    CONFIRMED = auto()
    DONE = auto()


class Event(IntEnum):
    """What happens to a call."""

    WRITE = auto()
    """A request is handed to the transport."""
    CONFIRM = auto()
    """The broker has the request."""
    REPLY = auto()
    """A worker answered: with a result, or with an error."""
    TURNED_AWAY = auto()
    """A worker answered that it shuts down and did not start."""
    WORKER_LOST = auto()
    """A worker or the broker says that the worker that held the request was lost."""
    RETURNED = auto()
    """No queue is bound for the service."""
    NOT_THERE = auto()
    """The service has no queue that delivers once: the request went to that alone, and was returned."""
    REFUSED = auto()
    """The broker did not take it, or does not know: the queue is full, or its node cannot be reached."""
    REFUSED_UNRUN = auto()
    """The same, for a queue that delivers once: it is certainly not in the queue."""
    TOO_LARGE = auto()
    """The broker takes no request of that size."""
    UNSENT = auto()
    """The request never reached the socket."""
    LOST = auto()
    """A session went down: nothing more will be heard of the request."""
    EXPIRED = auto()
    """The request expired in a queue that may have delivered it before."""
    EXPIRED_UNRUN = auto()
    """It expired in a queue that delivers once, the only one it was in, and too soon to have been delivered."""
    DEADLINE = auto()
    """The deadline passed."""
    DEADLINE_BLOCKED = auto()
    """The same, and the way to the broker is there but blocked or full."""
    DEADLINE_CUT_OFF = auto()
    """The same, and there is no connection to the broker."""
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
    """The request is sent at once, under the name of the service: it reached no queue."""
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

_C, _W, _F = State.CREATED, State.WRITTEN, State.CONFIRMED

# A call that was sent and is CREATED again still takes a late answer to its earlier request. What else concerns an
# earlier request says nothing about the next one, and is passed over.
TRANSITIONS: Final[dict[tuple[State, Event], Transition]] = {
    (_C, Event.WRITE): Transition(_W, Act.NOTHING),
    (_C, Event.REPLY): _ANSWER,
    (_C, Event.DEADLINE): _TOO_LATE,
    (_C, Event.DEADLINE_BLOCKED): _BLOCKED,
    (_C, Event.DEADLINE_CUT_OFF): _NOT_CONNECTED,
    (_C, Event.CANCEL): _FORGET,
    (_C, Event.CLOSE): _CLOSED_UNSENT,
    (_W, Event.CONFIRM): Transition(_F, Act.NOTHING),
    (_W, Event.REPLY): _ANSWER,
    (_W, Event.TURNED_AWAY): _AGAIN,
    (_W, Event.WORKER_LOST): _WORKER_LOST,
    (_W, Event.RETURNED): _NO_SERVICE,
    (_W, Event.NOT_THERE): Transition(_C, Act.ELSEWHERE),
    (_W, Event.REFUSED): _REFUSED,
    (_W, Event.REFUSED_UNRUN): _FULL,
    (_W, Event.TOO_LARGE): _TOO_LARGE,
    (_W, Event.UNSENT): _AGAIN,
    (_W, Event.LOST): _LOST,
    (_W, Event.EXPIRED): _EXPIRED,
    (_W, Event.EXPIRED_UNRUN): _EXPIRED_UNRUN,
    (_W, Event.DEADLINE): _NO_WORD,
    (_W, Event.DEADLINE_BLOCKED): _NO_WORD,
    (_W, Event.DEADLINE_CUT_OFF): _NO_WORD,
    (_W, Event.CANCEL): _FORGET,
    (_W, Event.CLOSE): _CLOSED,
    (_F, Event.REPLY): _ANSWER,
    (_F, Event.TURNED_AWAY): _AGAIN,
    (_F, Event.WORKER_LOST): _WORKER_LOST,
    (_F, Event.LOST): _LOST,
    (_F, Event.EXPIRED): _EXPIRED,
    (_F, Event.EXPIRED_UNRUN): _EXPIRED_UNRUN,
    (_F, Event.DEADLINE): _NO_WORD,
    (_F, Event.DEADLINE_BLOCKED): _NO_WORD,
    (_F, Event.DEADLINE_CUT_OFF): _NO_WORD,
    (_F, Event.CANCEL): _FORGET,
    (_F, Event.CLOSE): _CLOSED,
}


# Looked up several times in each call: by index, and members of enums by names of their own, since CPython 3.11 takes
# as long to get at a member as to call a function.
_TABLE: Final = [
    [None, *(TRANSITIONS.get((state, event)) for event in Event)]  # auto() counts from 1
    for state in (State(1), *State)
]

_CREATED, _DONE = State.CREATED, State.DONE
_ACT_NOTHING, _ACT_ANSWER = Act.NOTHING, Act.ANSWER
_EVENT_WRITE = Event.WRITE

Outcome = Reply | CallError


def public_id(correlation_id: str) -> str:
    """The part of a client's correlation ID that anybody may know: it names the call, and nobody can reply with it."""
    return correlation_id.rpartition("-")[0]


class Call:
    """One call under way. Subclasses say who is told.

    Attributes:
        correlation_id: 1 to 255 bytes, unique for this client.
        request_id: the correlation ID of its last request: the call's own, and for further ones with a number after it.
        idempotent: it may be sent again where it may have run.
        state: how far it is.
        sent: requests handed to the transport.
        attempt: 1 + the number of earlier requests that may have run.

    """

    __slots__ = ("attempt", "correlation_id", "idempotent", "request_id", "sent", "state")

    def __init__(self, correlation_id: bytes, *, idempotent: bool) -> None:
        self.correlation_id = correlation_id
        self.request_id = correlation_id
        self.idempotent = idempotent
        self.state = _CREATED
        self.sent = 0
        self.attempt = 1

    def settle(self, outcome: Outcome) -> None:
        """The call has ended; called once, or never where its caller is gone."""
        raise NotImplementedError

    def again(self) -> None:
        """The request is to be sent again."""
        raise NotImplementedError

    def elsewhere(self) -> None:
        """The request is to be sent under the name of the service."""
        raise NotImplementedError


class PendingCalls:
    """The calls under way, by correlation ID.

    Args:
        limit: calls that it holds; one more is `Overloaded`.

    Attributes:
        late: replies and notices for a call that had ended without one.
        duplicate: for a call that had its reply already.
        stray: for no call of this client.

    """

    def __init__(self, limit: int) -> None:
        self._calls: dict[bytes, Call] = {}
        self._limit = limit
        self._prefix = secrets.token_hex(4).encode() + b"-"
        self._count = 0  # of times that IDs were made
        self._ids: list[bytes] = []  # the next one is last
        self._unanswered: dict[bytes, None] = {}  # sent, and ended without a reply: the last of them, in order
        self.late = 0
        self.duplicate = 0
        self.stray = 0

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Call]:
        return iter(list(self._calls.values()))

    @property
    def unmatched(self) -> int:
        """Replies and notices that were for no call under way."""
        return self.late + self.duplicate + self.stray

    def is_pending(self, call: Call) -> bool:
        """Whether the call is under way."""
        return call.correlation_id in self._calls

    def next_id(self) -> bytes:
        """A correlation ID that no other call has. Nobody can guess it from other IDs.

        It has 32 random bits of the client and a number, which people read, and 64 random bits of its own. These make
        it unique, and keep it secret from workers that do not serve the call. A program that knows a reply queue and
        an ID can forge the reply.
        """
        try:
            return self._ids.pop()
        except IndexError:
            self._count += 1
            start = self._prefix + b"%x" % self._count
            secret = os.urandom(len(_LAST_DIGITS) * _SECRET).hex(" ", _SECRET).encode().split()
            self._ids = [start + digits + part for digits, part in zip(_LAST_DIGITS, secret, strict=True)]
            return self._ids.pop()

    def add(self, call: Call) -> None:
        """A call begins.

        Raises:
            Overloaded: the table is full.
            ConfigurationError: a call of this correlation ID is under way.

        """
        if len(self._calls) >= self._limit:
            msg = f"{self._limit} calls are under way already (max_in_flight)"
            raise honest(call, Overloaded(msg))
        if self._calls.setdefault(call.correlation_id, call) is not call:
            msg = f"a call with the correlation ID {call.correlation_id!r} is under way already"
            raise ConfigurationError(msg)

    def get(self, request_id: bytes) -> Call | None:
        """The call under way that a request with this ID belongs to."""
        return self._calls.get(request_id) or self._calls.get(request_id.rpartition(b".")[0])

    def count_unmatched(self, request_id: bytes) -> None:
        """Count a reply or a notice that is for no call under way: late, twice, or for nobody."""
        if not request_id.startswith(self._prefix):
            self.stray += 1
        elif request_id.partition(b".")[0] in self._unanswered:
            self.late += 1
            del self._unanswered[request_id.partition(b".")[0]]
        else:
            self.duplicate += 1

    def write(self, call: Call) -> bytes:
        """A request of the call is about to be handed to the transport; gives its ID.

        Each has its own, so that what is said of an earlier one is not taken for the last one's: a worker may answer
        twice that it did not begin, and the second answer must not send a call that runs elsewhere again.
        """
        self.happened(call, _EVENT_WRITE)
        call.sent += 1
        if call.sent > 1:
            call.request_id = b"%b.%d" % (call.correlation_id, call.sent)
        return call.request_id

    def happened(self, call: Call, event: Event, reply: Reply | None = None, why: str = "") -> None:
        """An event of the table; for REPLY with the reply, for others perhaps with the cause."""
        transition = _TABLE[call.state][event]
        if transition is None:
            return
        act = transition.act
        if act is _ACT_NOTHING:
            call.state = transition.state
        elif act is _ACT_ANSWER:
            assert reply is not None  # noqa: S101 - the table has ANSWER only for REPLY
            self._end(call)
            call.settle(reply)
        elif act is Act.FORGET:
            self._end_unanswered(call)
        elif act is Act.AGAIN:
            call.state = State.CREATED
            call.again()
        elif act is Act.ELSEWHERE:
            call.state = State.CREATED
            call.sent -= 1  # it reached nobody: nothing will be heard of it, and the next one may have its ID
            call.elsewhere()
        elif act is Act.AGAIN_OR_FAIL and call.idempotent and call.attempt < MAX_ATTEMPTS:
            call.state = State.CREATED
            call.attempt += 1
            call.again()
        else:
            self._end_unanswered(call)
            call.settle(_error(call, transition, why))

    def _end(self, call: Call) -> None:
        call.state = _DONE
        del self._calls[call.correlation_id]

    def _end_unanswered(self, call: Call) -> None:
        self._end(call)
        if call.sent:
            self._unanswered[call.correlation_id] = None
            if len(self._unanswered) > REMEMBERED_CALLS:
                del self._unanswered[next(iter(self._unanswered))]


def _error(call: Call, transition: Transition, why: str) -> CallError:
    assert transition.error is not None  # noqa: S101 - the table has one wherever a call may fail
    message = f"{transition.message}: {why}" if why else transition.message
    return honest(call, transition.error(message, executed=transition.executed))


def honest(call: Call, error: CallError) -> CallError:
    """The error with the call's ID, and with what is known of all its requests: an earlier one may have run."""
    error.correlation_id = call.correlation_id.decode("utf-8", "replace")
    error.attempt = call.attempt
    if call.attempt > 1 and error.executed == "no":
        error.executed = "maybe"
        error.retryable = False
    return error
