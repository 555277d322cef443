"""Replies, and the broker's notices of requests that a queue gave up: bytes <-> values. Pure; see `docs/wire.md`."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from rpcq.errors import InvalidReply
from rpcq.wire import properties as amqp
from rpcq.wire.bodies import JSON, LINES, loads, text, why_not_json, why_not_read
from rpcq.wire.properties import LENGTHS, MalformedProperties, NestedTooDeep, short
from rpcq.wire.values import NotCarried

RESULT: Final = b"result"
ERROR: Final = b"error"
"""The two types of a reply."""

REPLIES: Final = b"replies"
"""The type of a message batch, which has several replies; see `rpcq.wire.batches`."""

TAKES: Final = "rpcq-takes"
"""The header that says how many calls the service wants in one message."""

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_F64: Final = struct.Struct(">d")

# The properties of a worker's reply, as `ReplyEncoder` packs them and `read_reply` and `read_times` parse them by hand.
# Numbers are big-endian. A short string is U8 length, bytes; an entry of the headers' table is short name, U8 type,
# value.
#
#   U16    flags                                 _FLAGS, without HEADERS if there is no table
#   short  content_type     "application/json"
#   U32    bytes of the headers' table           _TIMES_SIZE; no table if the request has no times: old clients do not
#            short "rpcq-queue-ms", "d", F64     know the type "d"
#            short "rpcq-handler-ms", "d", F64
#            short "rpcq-takes", "I", I32          only if the service takes message batches of a client that reads them
#   U8     delivery_mode    1
#   short  correlation_id
#   short  type             "result" or "error"
_FLAGS: Final = amqp.CONTENT_TYPE | amqp.HEADERS | amqp.DELIVERY_MODE | amqp.CORRELATION_ID | amqp.TYPE
_QUEUE_MS: Final = short(b"rpcq-queue-ms") + b"d"
_HANDLER_MS: Final = short(b"rpcq-handler-ms") + b"d"
_TIMES: Final = struct.Struct(f">{len(_QUEUE_MS)}sd{len(_HANDLER_MS)}sd")
_TIMES_SIZE: Final = _TIMES.size
_TAKES_NAME: Final = short(TAKES.encode()) + b"I"
_TAKES: Final = struct.Struct(f">{len(_TAKES_NAME)}si")
_TAKES_SIZE: Final = _TAKES.size
_HANDLER_TIME_SIZE: Final = len(_HANDLER_MS) + _F64.size
_QUEUE_TIME_SIZE: Final = len(_QUEUE_MS) + _F64.size


class ReplyEncoder:
    """Encodes the properties of a worker's replies."""

    def __init__(self) -> None:
        start = _U16.pack(_FLAGS) + short(JSON)
        self._start_full = start + _U32.pack(_TIMES_SIZE)
        self._start_takes = start + _U32.pack(_TIMES_SIZE + _TAKES_SIZE)
        self._start_short = _U16.pack(_FLAGS & ~amqp.HEADERS) + short(JSON)
        self._ends = {kind: short(kind) for kind in (RESULT, ERROR)}

    def encode(
        self, kind: bytes, correlation_id: bytes | None, queue_ms: float | None, handler_ms: float, takes: int = 0
    ) -> bytes:
        """Encode the properties of one reply: `kind` is RESULT or ERROR; times are milliseconds.

        Without `queue_ms`, that is for a request that does not say when it was sent, the reply has no headers.
        `takes` is how many calls the service wants in one message; 0 if it takes no message batches.
        """
        if queue_ms is None:
            start = self._start_short
        elif takes:
            start = b"".join(
                (
                    self._start_takes,
                    _TIMES.pack(_QUEUE_MS, queue_ms, _HANDLER_MS, handler_ms),
                    _TAKES.pack(_TAKES_NAME, takes),
                )
            )
        else:
            start = self._start_full + _TIMES.pack(_QUEUE_MS, queue_ms, _HANDLER_MS, handler_ms)
        correlation_id = correlation_id or b""
        return b"".join((start, b"\x01", LENGTHS[len(correlation_id)], correlation_id, self._ends[kind]))


@dataclass(frozen=True, slots=True)
class Notice:
    """A notice of the broker: a queue gave up a request.

    Attributes:
        reason: "expired", "delivery_limit", "rejected", ...
        queue: the queue's name.

    """

    correlation_id: bytes
    reason: str
    queue: str


@dataclass(slots=True)
class Reply:
    """A reply, not validated yet.

    Attributes:
        kind: RESULT, ERROR, REPLIES or another `type`; a reply without a `type` counts as a result.
        body: None if it was over the client's `max_body`.
        problem: why its body is not read as JSON, by its properties; empty if it is.
        properties: all properties, as bytes; empty for a reply from a message batch.
        times: what `read_times` finds for a reply from a message batch.
        takes: how many calls the service wants in one message; 0 if it does not say so.

    """

    correlation_id: bytes
    kind: bytes
    body: bytes | None
    problem: str = ""
    properties: bytes = field(default=b"", compare=False, repr=False)
    times: tuple[float | None, float] | None = None
    takes: int = 0


_FAST_REPLY: Final = _U16.pack(_FLAGS) + short(JSON) + _U32.pack(_TIMES_SIZE) + _QUEUE_MS
_AFTER_QUEUE_MS: Final = len(_FAST_REPLY) + _F64.size
_CORRELATION_ID: Final = _AFTER_QUEUE_MS + _HANDLER_TIME_SIZE + 1
"""Where the correlation ID's length is: after the headers and the delivery mode."""
_FAST_TAKES: Final = _U16.pack(_FLAGS) + short(JSON) + _U32.pack(_TIMES_SIZE + _TAKES_SIZE) + _QUEUE_MS
_AFTER_TIMES: Final = _CORRELATION_ID - 1


def read_reply(data: bytes, body: bytes | None, own: bytes) -> Reply | Notice | None:
    """Read a message from the reply queue `own`.

    The result is None for a copy of this client's own request that is no notice: somebody published the request again
    with its `CC`, as a shovel does. Only this client's requests have `own` as their `reply_to`. The headers cannot tell
    a reply from a notice, because a reply may have any header, even `x-death`.

    Raises:
        MalformedProperties: `data` is not the properties of an AMQP message.

    """
    if data.startswith(_FAST_REPLY) and data.startswith(_HANDLER_MS, _AFTER_QUEUE_MS):  # from a worker of rpcq
        try:
            at = _CORRELATION_ID
            end = at + 1 + data[at]
            if end + 1 + data[end] != len(data):
                raise MalformedProperties("the properties of a reply are malformed")
            return Reply(data[at + 1 : end], data[end + 1 :] or RESULT, body, "", data)
        except IndexError as error:
            raise MalformedProperties("the properties of a reply end early") from error
    if data.startswith(_FAST_TAKES) and data.startswith(_TAKES_NAME, _AFTER_TIMES):
        try:
            takes = _TAKES.unpack_from(data, _AFTER_TIMES)[1]
            at = _CORRELATION_ID + _TAKES_SIZE
            end = at + 1 + data[at]
            if end + 1 + data[end] != len(data):
                raise MalformedProperties("the properties of a reply are malformed")
            return Reply(data[at + 1 : end], data[end + 1 :] or RESULT, body, "", data, None, takes)
        except (IndexError, struct.error) as error:
            raise MalformedProperties("the properties of a reply end early") from error
    try:
        found = amqp.decode(data)
    except NestedTooDeep:
        found = amqp.decode(data, flat=True)  # no header of a reply is needed, and a notice does not have such headers
    correlation_id, kind = found.correlation_id or b"", found.type or RESULT
    if not found.reply_to or found.reply_to != own:
        if body == b"" and kind == RESULT:
            body = b"null"  # of a foreign server that returns nothing; workers of rpcq always write JSON
        problem = ""
        if kind != REPLIES or found.content_type != LINES or found.content_encoding:
            problem = why_not_read(found.content_type, found.content_encoding)
        takes = (found.headers or {}).get(TAKES)
        return Reply(correlation_id, kind, body, problem, data, None, takes if type(takes) is int and takes > 0 else 0)
    match (found.headers or {}).get("x-death"):
        case [{"reason": str(reason), "queue": str(queue)}, *_]:
            return Notice(correlation_id, reason, queue)
    return None


def read_times(reply: Reply) -> tuple[float | None, float] | None:
    """Milliseconds from the client to the handler (None if not known), and in the handler; None without the latter."""
    data = reply.properties
    if not data:
        return reply.times
    at = 3 + data[2] + 4  # past the flags, the content type and the table's length, if a worker of rpcq sent it
    if data.startswith(_QUEUE_MS, at) and data.startswith(_HANDLER_MS, at + _QUEUE_TIME_SIZE):
        _, queue_ms, _, handler_ms = _TIMES.unpack_from(data, at)
        return queue_ms, handler_ms
    headers = amqp.decode(data, flat=True).headers or {}
    queue_ms, handler_ms = headers.get("rpcq-queue-ms"), headers.get("rpcq-handler-ms")
    return (queue_ms if isinstance(queue_ms, float) else None, handler_ms) if isinstance(handler_ms, float) else None


_SHOWN: Final = 200
"""Bytes of a body that is not JSON in the text of an error."""


def check_readable(reply: Reply) -> None:
    """Check that the body of a reply is JSON, by its properties.

    Raises:
        InvalidReply: it is something else.

    """
    if reply.problem:
        executed: Literal["yes", "maybe"] = "yes" if reply.kind == RESULT else "maybe"
        raise InvalidReply(f"the reply cannot be read: {reply.problem}{_shown(reply.body)}", executed=executed)


def _shown(body: bytes | None) -> str:
    """The beginning of a body, for the text of an error."""
    if not body:
        return ""
    return f"; its body is {text(body[:_SHOWN])!r}{'...' if len(body) > _SHOWN else ''}"


def read_body(reply: Reply) -> Any:
    """Read the value in a reply's body.

    Raises:
        InvalidReply: its type, content type or body cannot be read.

    """
    executed: Literal["yes", "maybe"] = "yes" if reply.kind == RESULT else "maybe"
    if reply.kind not in (RESULT, ERROR):
        msg = f"the reply's type must be 'result' or 'error'; got {text(reply.kind)!r}"
        raise InvalidReply(msg, executed="maybe")
    if reply.body is None:
        raise InvalidReply("the reply's body is over the limit (max_body)", executed=executed)
    check_readable(reply)
    try:
        return loads(reply.body)
    except NotCarried as error:
        raise InvalidReply(f"the reply's body cannot be read: {error}", executed=executed) from error
    except ValueError as error:
        why = why_not_json(reply.body, error)
        raise InvalidReply(f"the reply's body is not JSON: {why}{_shown(reply.body)}", executed=executed) from error
