"""The table of calls under way: correlation ID -> call. Pure; how each ends is decided in `rpcq.calls.outcomes`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Final

from rpcq.calls.outcomes import MAX_ATTEMPTS, TABLE, Act, Call, CallEvent, State, Together, error_of, for_call
from rpcq.errors import ConfigurationError, Overloaded
from rpcq.wire.replies import Reply

REMEMBERED_CALLS: Final = 10_000
"""How many calls that ended without a reply are remembered, to tell a late reply from a duplicate one."""

_SECRET: Final = 8
"""Bytes of the random part of a correlation ID."""
_LAST_DIGITS: Final = [b"%02x-" % number for number in range(255, -1, -1)]
"""The last two digits of the numbers of 256 correlation IDs, the highest first.

256 IDs are made at once, because asking the system for random bytes costs more than the rest of an ID.
"""

_DONE: Final = State.DONE
_NOTHING: Final = Act.NOTHING
_ANSWER: Final = Act.ANSWER
_WRITE: Final = CallEvent.WRITE
"""Names of their own: getting at a member of an enum takes as long as calling a function in CPython 3.11."""


def public_id(correlation_id: str) -> str:
    """The public part of a correlation ID: it names the call, and is not enough to forge a reply."""
    return correlation_id.rpartition("-")[0]


class PendingCalls:
    """The calls under way, by correlation ID.

    Args:
        limit: calls that it holds at most; one more raises `Overloaded`.

    Attributes:
        late: replies and notices for calls that had ended without a reply.
        duplicate: replies and notices for calls that had their reply already.
        stray: replies and notices for no call of this client.

    """

    def __init__(self, limit: int) -> None:
        self._calls: dict[bytes, Call] = {}
        self._together: dict[bytes, Together] = {}  # by the correlation IDs of message batches
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
        """Add a call.

        Raises:
            Overloaded: the table is full.
            ConfigurationError: a call of this correlation ID is under way.

        """
        if len(self._calls) >= self._limit:
            msg = f"{self._limit} calls are under way already (max_in_flight)"
            raise for_call(call, Overloaded(msg))
        if self._calls.setdefault(call.correlation_id, call) is not call:
            msg = f"a call with the correlation ID {call.correlation_id!r} is under way already"
            raise ConfigurationError(msg)

    def get(self, request_id: bytes) -> Call | None:
        """The call under way that has, or had, a request with this ID."""
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

    def put_together(self, batch_id: bytes, calls: Sequence[Call]) -> None:
        """Note that the last requests of these calls are in one message, with this correlation ID."""
        together = self._together[batch_id] = Together(batch_id, calls)
        for call in calls:
            call.together = together

    def together(self, batch_id: bytes) -> Sequence[Call]:
        """The calls whose last requests are in this message, and that have no other news. Empty if there are none."""
        found = self._together.get(batch_id)
        return () if found is None else list(found.calls)

    def write(self, call: Call) -> bytes:
        """Note that a request of the call is about to be handed to the transport; returns the request's ID.

        Each request has an ID of its own, so that news of an earlier request is not taken for news of the last one. For
        example, a worker may reply twice that it did not begin; the second reply must not send the call again while it
        runs elsewhere.
        """
        self.happened(call, _WRITE)
        call.sent += 1
        if call.sent > 1:
            call.request_id = b"%b.%d" % (call.correlation_id, call.sent)
        return call.request_id

    def happened(self, call: Call, event: CallEvent, reply: Reply | None = None, why: str = "") -> None:
        """Apply an event to a call; `reply` belongs to REPLY, `why` is the cause of others."""
        transition = TABLE[call.state][event]
        if transition is None:
            return
        act = transition.act
        if act is _NOTHING:
            call.state = transition.state
            return
        if call.together is not None:
            self._leave(call, call.together)
        if act is _ANSWER:
            assert reply is not None  # noqa: S101 - the table has ANSWER only for REPLY
            self._end(call)
            call.ended(reply)
        elif act is Act.FORGET:
            self._end_unanswered(call)
        elif act is Act.AGAIN:
            call.state = State.CREATED
            call.again()
        elif act is Act.ELSEWHERE:
            call.state = State.CREATED
            call.sent -= 1  # the request reached no queue: the next one can have its ID
            call.elsewhere()
        elif act is Act.AGAIN_OR_FAIL and call.idempotent and call.attempt < MAX_ATTEMPTS:
            call.state = State.CREATED
            call.attempt += 1
            call.again()
        else:
            self._end_unanswered(call)
            call.ended(error_of(call, transition, why))

    def _leave(self, call: Call, together: Together) -> None:
        """No news of the message that its last request was in is for this call any more."""
        call.together = None
        del together.calls[call]
        if not together.calls:
            del self._together[together.batch_id]

    def _end(self, call: Call) -> None:
        call.state = _DONE
        del self._calls[call.correlation_id]

    def _end_unanswered(self, call: Call) -> None:
        self._end(call)
        if call.sent:
            self._unanswered[call.correlation_id] = None
            if len(self._unanswered) > REMEMBERED_CALLS:
                del self._unanswered[next(iter(self._unanswered))]
