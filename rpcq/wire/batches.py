"""Message batches: several replies in one message, bytes <-> values. Pure; `docs/wire.md` is the contract.

line 1     a JSON array with the head of each reply: [correlation ID, type, ms in the queue, ms in the handler]
line 2...  the body of each reply, JSON without a line feed, in the order of the heads
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rpcq.wire import properties as amqp
from rpcq.wire.bodies import loads
from rpcq.wire.properties import LENGTHS, short
from rpcq.wire.replies import LINES, REPLIES, Reply

MAX_BATCH: Final = 64 * 1024
"""Bytes of the body of a message batch."""

MAX_ENTRY: Final = 4 * 1024
"""Bytes of a body in a message batch. A larger one goes alone."""

HEAD_SIZE: Final = 64
"""Bytes that the head of a reply has at most, besides its correlation ID."""

_U16: Final = struct.Struct(">H")
_FLAGS: Final = amqp.CONTENT_TYPE | amqp.DELIVERY_MODE | amqp.CORRELATION_ID | amqp.TYPE
_START: Final = _U16.pack(_FLAGS) + short(LINES) + b"\x01"
_END: Final = short(REPLIES)
_PLAIN_ID: Final = re.compile(rb"[0-9A-Za-z._:-]{1,255}\Z")
"""Correlation IDs that JSON carries as they are."""


@dataclass(slots=True)
class Entry:
    """A reply that is to go with others.

    Attributes:
        correlation_id: that of the request.
        kind: RESULT or ERROR.
        queue_ms: as in `ReplyEncoder.encode`; so is `handler_ms`.
        body: JSON.

    """

    correlation_id: bytes
    kind: bytes
    queue_ms: float | None
    handler_ms: float
    body: bytes

    @property
    def size(self) -> int:
        """The most bytes that it takes in a message batch."""
        return HEAD_SIZE + len(self.correlation_id) + len(self.body)


def fits(correlation_id: bytes, body: bytes) -> bool:
    """Whether a reply can go with others: not if it is large, its ID needs to be escaped, or its body has lines."""
    return len(body) <= MAX_ENTRY and b"\n" not in body and _PLAIN_ID.match(correlation_id) is not None


def write_properties(batch_id: bytes) -> bytes:
    """Encode the properties of a message batch of replies; `batch_id` is its correlation ID."""
    return b"".join((_START, LENGTHS[len(batch_id)], batch_id, _END))


def write_replies(entries: Sequence[Entry]) -> bytes:
    """Write the body of a message batch of replies, each of which `fits`."""
    heads = [
        b'["%b","%b",null,null]' % (it.correlation_id, it.kind)
        if it.queue_ms is None
        else b'["%b","%b",%.3f,%.3f]' % (it.correlation_id, it.kind, it.queue_ms, it.handler_ms)
        for it in entries
    ]
    return b"\n".join((b"[%b]" % b",".join(heads), *(it.body for it in entries)))


def read_replies(batch: Reply) -> list[Reply]:
    """Read the replies in a message batch.

    Raises:
        ValueError: it is not one; the message says why.

    """
    if batch.problem:
        raise ValueError(batch.problem)
    if batch.body is None or len(batch.body) > MAX_BATCH:
        raise ValueError(f"it is over {MAX_BATCH} bytes")
    first, *bodies = batch.body.split(b"\n")
    heads = loads(first)
    if not isinstance(heads, list) or len(heads) != len(bodies):
        raise ValueError(f"it has {len(bodies)} bodies, and not as many heads")
    return [_reply(head, body) for head, body in zip(heads, bodies, strict=True)]


def _reply(head: Any, body: bytes) -> Reply:
    match head:
        case [str(correlation_id), str(kind), float() | int() as queue_ms, float() | int() as handler_ms]:
            return Reply(correlation_id.encode(), kind.encode(), body, times=(queue_ms, handler_ms))
        case [str(correlation_id), str(kind), None, None]:
            return Reply(correlation_id.encode(), kind.encode(), body)
    raise ValueError(f"the head of a reply must be an ID, a type and two times; got {head!r:.300}")
