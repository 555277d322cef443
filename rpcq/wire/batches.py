"""Message batches: several replies or requests in one message, bytes <-> values. Pure; `docs/wire.md` is the contract.

line 1     a JSON array with the head of each:
               reply     [correlation ID, type, ms in the queue, ms in the handler]
               request   [correlation ID, method, ms left], or [correlation ID, method, ms left, headers]
line 2...  the body of each, JSON without a line feed, in the order of the heads
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rpcq.options import MAX_HEADERS
from rpcq.wire import properties as amqp
from rpcq.wire.bodies import LINES, dumps, loads
from rpcq.wire.properties import LENGTHS, short
from rpcq.wire.replies import REPLIES, TAKES, Reply
from rpcq.wire.requests import ATTEMPT, KEY, METHOD, Request, problem_of

MAX_BATCH: Final = 64 * 1024
"""Bytes of the body of a message batch."""

MAX_ENTRY: Final = 4 * 1024
"""Bytes of a body in a message batch. A larger one goes alone."""

MAX_REQUESTS: Final = 256
"""Requests in a message batch. Each costs its reader much more than its bytes: a task, a deadline, headers."""

HEAD_SIZE: Final = 64
"""Bytes that the head of a reply has at most, besides its correlation ID; and those of a message around its heads."""

_U16: Final = struct.Struct(">H")
_FLAGS: Final = amqp.CONTENT_TYPE | amqp.DELIVERY_MODE | amqp.CORRELATION_ID | amqp.TYPE
_START: Final = _U16.pack(_FLAGS) + short(LINES) + b"\x01"
_START_WITH_HEADERS: Final = _U16.pack(_FLAGS | amqp.HEADERS) + short(LINES)
_END: Final = short(REPLIES)
_I32: Final = struct.Struct(">i")
_TAKES_NAME: Final = short(TAKES.encode()) + b"I"
_TAKES_START: Final = struct.pack(">I", len(_TAKES_NAME) + _I32.size) + _TAKES_NAME
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


def write_properties(batch_id: bytes, takes: int = 0) -> bytes:
    """Encode the properties of a message batch of replies; `batch_id` is its correlation ID, `takes` as in a reply."""
    start = _START
    if takes:
        start = _START_WITH_HEADERS + _TAKES_START + _I32.pack(takes) + b"\x01"
    return b"".join((start, LENGTHS[len(batch_id)], batch_id, _END))


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
    heads, bodies = _split(batch.body)
    return [_reply(head, body) for head, body in zip(heads, bodies, strict=True)]


def _reply(head: Any, body: bytes) -> Reply:
    match head:
        case [str(correlation_id), str(kind), float() | int() as queue_ms, float() | int() as handler_ms]:
            return Reply(correlation_id.encode(), kind.encode(), body, times=(queue_ms, handler_ms))
        case [str(correlation_id), str(kind), None, None]:
            return Reply(correlation_id.encode(), kind.encode(), body)
    raise ValueError(f"the head of a reply must be an ID, a type and two times; got {head!r:.300}")


def _split(body: bytes | None) -> tuple[list[Any], list[bytes]]:
    """The heads and the bodies in a message batch."""
    if body is None or len(body) > MAX_BATCH:
        raise ValueError(f"it is over {MAX_BATCH} bytes, or over the max_body of its reader")
    first, *bodies = body.split(b"\n")
    heads = loads(first)
    if not isinstance(heads, list) or len(heads) != len(bodies):
        raise ValueError(f"it has {len(bodies)} bodies, and not as many heads")
    return heads, bodies


# Requests.


def write_head(correlation_id: bytes, method: bytes, left_ms: int, headers: Mapping[str, Any]) -> bytes:
    """Write the head of a request in a message batch.

    Args:
        correlation_id: one that JSON carries as it is, as rpcq's client makes them.
        method: the method's name.
        left_ms: milliseconds until the deadline.
        headers: of this request alone; mostly empty.

    """
    if headers:
        return b'["%b","%b",%d,%b]' % (correlation_id, method, left_ms, dumps(headers))
    return b'["%b","%b",%d]' % (correlation_id, method, left_ms)


def write_requests(heads: Sequence[bytes], bodies: Sequence[bytes]) -> bytes:
    """Write the body of a message batch of requests."""
    return b"\n".join((b"[%b]" % b",".join(heads), *bodies))


def read_requests(batch: Request, body: bytes | None) -> list[tuple[Request, bytes]]:
    """Read the requests in a message batch, each with its body. `batch` is what its properties say.

    A request whose head has an ID, and something else that cannot be read, has a `problem`.

    Raises:
        ValueError: it is no message batch; the message says why.

    """
    if body is not None and body.count(b"\n") > MAX_REQUESTS:
        raise ValueError(f"it has over {MAX_REQUESTS} requests")
    heads, bodies = _split(body)
    if not heads:
        raise ValueError("it has no requests")
    timeout, deadline = batch.timeout_ms, batch.deadline_ms
    sent_ms = None if timeout is None or deadline is None else deadline - timeout
    shared = batch.headers
    is_plain = not any(name in shared for name in (KEY, ATTEMPT, METHOD))
    found = []
    for head, each in zip(heads, bodies, strict=True):
        correlation_id = _id_of(head)
        request = Request(
            correlation_id,
            batch.reply_to,
            None,
            None,
            None,
            batch.app_id,
            1,
            None,
            shared,
            "",
            batch.has_copy,
            batch.user,
            batch.reads_batches,
        )
        if len(head) == 3 and is_plain and type(head[1]) is str and _is_ms(head[2]):
            request.method, request.timeout_ms = head[1] or None, head[2]
        else:
            request.problem = _read_head(request, head)
        if sent_ms is not None and request.timeout_ms is not None:
            request.deadline_ms = sent_ms + request.timeout_ms
        found.append((request, each))
    return found


def _id_of(head: Any) -> bytes:
    """The correlation ID in the head of a request."""
    if type(head) is list and head and type(head[0]) is str:
        correlation_id = head[0].encode()
        if 1 <= len(correlation_id) <= 255:
            return correlation_id
    raise ValueError(f"the head of a request must begin with an ID of 1 to 255 bytes; got {head!r:.300}")


def _is_ms(value: Any) -> bool:
    """Whether it is a number of milliseconds as the header of one request can carry it: an integer of 64 bits."""
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _read_head(request: Request, head: list[Any]) -> str:
    """Read the further items of a head into a request; returns why it may not run, or an empty string."""
    match head[1:]:
        case [None | str() as method, timeout] if _is_ms(timeout):
            own: dict[str, Any] = {}
        case [None | str() as method, timeout, dict() as own] if _is_ms(timeout):
            if sum(len(name) + len(str(value)) for name, value in own.items()) > MAX_HEADERS:
                return f"the headers of a request must have at most {MAX_HEADERS} bytes"
        case _:
            return f"the head of a request must be an ID, a method, milliseconds and perhaps headers; got {head!r:.300}"
    headers = request.headers
    if own:
        request.headers = headers = {**headers, **own}
    request.method = headers.get(METHOD) or method or None
    request.timeout_ms = timeout
    request.attempt = headers.get(ATTEMPT, 1)
    request.idempotency_key = headers.get(KEY)
    problem = problem_of(request)
    if type(request.method) is not str:
        request.method = None
    return problem
