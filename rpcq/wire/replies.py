"""Replies, and the broker's notices of requests that a queue gave up: bytes <-> values. Pure; see `docs/wire.md`."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from rpcq.errors import InvalidReply
from rpcq.wire import properties as amqp
from rpcq.wire.bodies import JSON, is_json, loads, text
from rpcq.wire.properties import LENGTHS, MalformedProperties, short
from rpcq.wire.values import NotCarried

RESULT: Final = b"result"
ERROR: Final = b"error"
"""The two types of a reply."""

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_TIMES: Final = struct.Struct(">15sd17sd")
_QUEUE_MS: Final = short(b"rpcq-queue-ms") + b"d"
_HANDLER_MS: Final = short(b"rpcq-handler-ms") + b"d"

_FLAGS: Final = amqp.CONTENT_TYPE | amqp.HEADERS | amqp.DELIVERY_MODE | amqp.CORRELATION_ID | amqp.TYPE


class ReplyEncoder:
    """Encodes the properties of a worker's replies."""

    def __init__(self) -> None:
        start = _U16.pack(_FLAGS) + short(JSON)
        self._start_full = start + _U32.pack(48)
        self._start_short = start + _U32.pack(25) + _HANDLER_MS
        self._ends = {kind: short(kind) for kind in (RESULT, ERROR)}

    def encode(self, kind: bytes, correlation_id: bytes | None, queue_ms: float | None, handler_ms: float) -> bytes:
        """The properties of one reply: `kind` is RESULT or ERROR; times where known, in milliseconds."""
        if queue_ms is None:
            start = self._start_short + struct.pack(">d", handler_ms)
        else:
            start = self._start_full + _TIMES.pack(_QUEUE_MS, queue_ms, _HANDLER_MS, handler_ms)
        correlation_id = correlation_id or b""
        return b"".join((start, b"\x01", LENGTHS[len(correlation_id)], correlation_id, self._ends[kind]))


@dataclass(frozen=True, slots=True)
class Notice:
    """The broker's word that a request was given up by its queue.

    Attributes:
        reason: "expired", "delivery_limit", "rejected", ...
        queue: its name.

    """

    correlation_id: bytes
    reason: str
    queue: str


@dataclass(slots=True)
class Reply:
    """A reply as it came.

    Attributes:
        kind: RESULT or ERROR, or what else the `type` says; a reply with none counts as a result.
        properties: all of them, as they came.

    """

    correlation_id: bytes
    kind: bytes
    body: bytes | None
    content_type: bytes = JSON
    properties: bytes = field(default=b"", compare=False, repr=False)


_FAST_REPLY: Final = _U16.pack(_FLAGS) + short(JSON) + _U32.pack(48) + _QUEUE_MS
_AFTER_QUEUE_MS: Final = len(_FAST_REPLY) + 8
_AFTER_HEADERS: Final = len(_FAST_REPLY) + 8 + len(_HANDLER_MS) + 8


def read_reply(data: bytes, body: bytes | None, own: bytes) -> Reply | Notice | None:
    """What came to the reply queue `own`.

    None for a copy of a request of this client that is no notice: a request that was published once more with its `CC`,
    as a shovel does it. Requests alone want their replies in `own`; a reply may have any header, `x-death` too.

    Raises:
        MalformedProperties: `data` are not properties.

    """
    if data.startswith(_FAST_REPLY) and data.startswith(_HANDLER_MS, _AFTER_QUEUE_MS):  # what rpcq's workers send
        try:
            at = _AFTER_HEADERS + 1  # after the delivery mode
            end = at + 1 + data[at]
            if end + 1 + data[end] != len(data):
                raise MalformedProperties("the properties of a reply are malformed")
            return Reply(data[at + 1 : end], data[end + 1 :] or RESULT, body, JSON, data)
        except IndexError as error:
            raise MalformedProperties("the properties of a reply end early") from error
    found = amqp.decode(data)
    correlation_id = found.correlation_id or b""
    if not found.reply_to or found.reply_to != own:
        return Reply(correlation_id, found.type or RESULT, body, found.content_type or JSON, data)
    match (found.headers or {}).get("x-death"):
        case [{"reason": str(reason), "queue": str(queue)}, *_]:
            return Notice(correlation_id, reason, queue)
    return None


def read_times(reply: Reply) -> tuple[float | None, float] | None:
    """Milliseconds from the client to the handler, where told, and in the handler; None where neither is told."""
    data = reply.properties
    at = 3 + data[2] + 4  # where the headers of a reply of rpcq's workers begin
    if data[at : at + 15] == _QUEUE_MS and data[at + 23 : at + 40] == _HANDLER_MS:
        _, queue_ms, _, handler_ms = _TIMES.unpack_from(data, at)
        return queue_ms, handler_ms
    headers = amqp.decode(data).headers or {}
    queue_ms, handler_ms = headers.get("rpcq-queue-ms"), headers.get("rpcq-handler-ms")
    return (queue_ms if isinstance(queue_ms, float) else None, handler_ms) if isinstance(handler_ms, float) else None


def read_body(reply: Reply) -> Any:
    """The value in a reply's body.

    Raises:
        InvalidReply: it has none that could be read.

    """
    executed: Literal["yes", "maybe"] = "yes" if reply.kind == RESULT else "maybe"
    if reply.kind not in (RESULT, ERROR):
        msg = f"the reply's type is {text(reply.kind)!r}; this client reads 'result' and 'error'"
        raise InvalidReply(msg, executed="maybe")
    if reply.body is None:
        raise InvalidReply("the reply's body is over the limit (max_body)", executed=executed)
    if reply.content_type != JSON and not is_json(reply.content_type):
        msg = f"the reply's content type is {text(reply.content_type)!r}; this client reads application/json"
        raise InvalidReply(msg, executed=executed)
    try:
        return loads(reply.body)
    except NotCarried as error:
        raise InvalidReply(f"the reply cannot be taken: {error}", executed=executed) from error
    except ValueError as error:
        raise InvalidReply(f"the reply's body is not JSON: {error}", executed=executed) from error
