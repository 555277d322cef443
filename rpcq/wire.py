"""The wire contract, version 1: requests, replies and notices, bytes <-> values. Pure.

`docs/wire.md` is the contract. Bodies are JSON (RFC 8259), read and written by pydantic's core: it carries what
pydantic serialises, keeps integers of up to 4300 digits, and bounds nesting. Bytes are base64. NaN and Infinity are not
JSON: they are refused, not turned into null.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from pydantic_core import from_json, to_json, to_jsonable_python

from rpcq import properties as amqp
from rpcq.errors import InvalidParams, InvalidReply, NotSerializable, TooLarge
from rpcq.properties import LENGTHS, MalformedProperties, Properties, short
from rpcq.settings import MAX_HEADERS, OWNED_HEADERS
from rpcq.values import (
    EXPONENT,
    FLOATLESS,
    MARKS,
    MAX_DIGITS,
    OWN_SECRETS,
    NotCarried,
    refuse_beyond_float,
    refuse_changed,
    refuse_nan,
)

JSON: Final = b"application/json"
DEADLINE: Final = "rpcq-deadline"
TIMEOUT: Final = "rpcq-timeout"
KEY: Final = "rpcq-idempotency-key"
ATTEMPT: Final = "rpcq-attempt"

RESULT: Final = b"result"
ERROR: Final = b"error"
CANCEL: Final = b"cancel"
PING: Final = b"ping"
DESCRIBE: Final = b"describe"
STATS: Final = b"stats"

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_TIMES: Final = struct.Struct(">15sq14sq")
_DEADLINE_NAME: Final = short(DEADLINE.encode()) + b"l"
_TIMEOUT_NAME: Final = short(TIMEOUT.encode()) + b"l"
_REPLY_TIMES: Final = struct.Struct(">15sd17sd")
_QUEUE_MS: Final = short(b"rpcq-queue-ms") + b"d"
_HANDLER_MS: Final = short(b"rpcq-handler-ms") + b"d"


def dumps(value: Any) -> bytes:
    """A value as JSON.

    Raises:
        ValueError: JSON cannot carry it.

    """
    body = to_json(value, bytes_mode="base64", inf_nan_mode="constants")
    if body.find(b"N") >= 0 or body.find(b"I") >= 0:
        refuse_nan(body)
    if body.find(b"null") >= 0 and value is not None:  # perhaps a model's NaN, which has a mode of its own
        plain = to_jsonable_python(value, bytes_mode="base64", inf_nan_mode="constants")
        refuse_nan(to_json(plain, inf_nan_mode="constants"))
    if body.find(b"*") >= 0 or len(body) > MAX_DIGITS or OWN_SECRETS():
        refuse_changed(value, body)
    return body


def loads(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not one, or it is nested deeper than about 200.
        NotCarried: a ValueError too: a number in it is beyond the range of a float.

    """
    value = from_json(body, allow_inf_nan=False)
    # Each untyped reply comes this way: the first look is here, not behind another call.
    if type(value) not in FLOATLESS and (len(body) > 200 or body.translate(MARKS, b"+").rfind(EXPONENT) >= 0):
        refuse_beyond_float(body, value)
    return value


def encode_params(args: tuple[Any, ...], params: Mapping[str, Any], max_body: int) -> bytes:
    """The body of a request: by name an object, by position an array, a single scalar as it is.

    Raises:
        NotSerializable: JSON cannot carry a parameter; the message names it.
        InvalidParams: some are by name and some by position.
        TooLarge: the body is over `max_body` bytes.

    """
    value: Any = params
    if args:
        if params:
            msg = "parameters are given by position or by name, not both: the wire carries an array or an object"
            raise InvalidParams(msg)
        value = args
        if len(args) == 1 and isinstance(args[0], str | int | float | None):
            value = args[0]
    try:
        body = dumps(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise _name_culprit(args, params, error) from error
    if len(body) > max_body:
        msg = f"the parameters are {len(body)} bytes of JSON; the limit is {max_body} (max_body)"
        raise TooLarge(msg)
    return body


_FIX: Final = "; a class with bytes needs ConfigDict(ser_json_bytes='base64', val_json_bytes='base64')"


def _name_culprit(args: tuple[Any, ...], params: Mapping[str, Any], error: Exception) -> NotSerializable:
    named = [(repr(name), value) for name, value in params.items()] + [(str(at), it) for at, it in enumerate(args)]
    for name, value in named:
        try:
            dumps(value)
        except (ValueError, TypeError, RecursionError) as cause:
            fix = _FIX if "invalid utf-8" in str(cause) else ""
            return NotSerializable(f"JSON cannot carry parameter {name}, a {type(value).__name__}: {cause}{fix}")
    return NotSerializable(f"JSON cannot carry the parameters: {error}")


def encode_headers(
    *, key: str | None, attempt: int, metadata: Mapping[str, str], trace: Mapping[str, str] | None = None
) -> bytes:
    """The headers of a request besides its times and its `CC`, as entries of a field table.

    `trace` is left out where there is no room for it: a call does not fail over that.

    Raises:
        TooLarge: they are over 8 KiB.

    """
    headers: dict[str, Any] = dict(metadata)
    if key is not None:
        headers[KEY] = key
    if attempt > 1:
        headers[ATTEMPT] = attempt
    entries = amqp.encode_table(headers)[4:]
    if len(entries) > MAX_HEADERS:
        msg = f"the headers are {len(entries)} bytes; the limit is {MAX_HEADERS}"
        raise TooLarge(msg)
    if trace is not None:
        further = amqp.encode_table(dict(trace))[4:]
        if len(entries) + len(further) <= MAX_HEADERS:
            entries += further
    return entries


_REQUEST_FLAGS: Final = (
    amqp.CONTENT_TYPE
    | amqp.HEADERS
    | amqp.DELIVERY_MODE
    | amqp.CORRELATION_ID
    | amqp.REPLY_TO
    | amqp.EXPIRATION
    | amqp.APP_ID
)
"""The properties of every request of a client; the type comes on top where a method is named."""


class RequestEncoder:
    """Encodes the properties of a client's requests; what is the same for all of them is encoded once.

    Args:
        reply_to: the client's reply queue, in the current session.
        app_id: the client's name.
        user: the broker's user that the client is, where its requests say so; else empty.

    """

    def __init__(self, reply_to: str, app_id: str, user: str = "") -> None:
        self.reply_to = reply_to.encode()
        address = _U32.pack(len(self.reply_to)) + self.reply_to
        self._cc = b"\x02CCA" + _U32.pack(len(address) + 1) + b"S" + address
        flags = _REQUEST_FLAGS | amqp.USER_ID if user else _REQUEST_FLAGS
        self._start = _U16.pack(flags) + short(JSON)
        self._start_typed = _U16.pack(flags | amqp.TYPE) + short(JSON)
        self._usual = self._start_typed + _U32.pack(45 + len(self._cc)) + self._cc
        self._reply_to = short(self.reply_to)
        self._sender = (short(user.encode()) if user else b"") + short(app_id.encode())

    def encode(
        self,
        correlation_id: bytes,
        method: bytes,
        left_ms: int,
        deadline_ms: int,
        headers: bytes,
        *,
        notify: bool,
    ) -> bytes:
        """The properties of one request.

        Args:
            correlation_id: 1 to 255 bytes.
            method: its name; empty for none.
            left_ms: milliseconds until the deadline.
            deadline_ms: the same, absolute: milliseconds since the epoch.
            headers: further ones, from `encode_headers`.
            notify: have the broker tell of an expiry (`CC`); only through the requests exchange, since any other
                exchange would route a copy to the reply queue.

        """
        # The notice of an expiry is to arrive before the caller's deadline.
        expiration = b"%d" % (left_ms - (1000 if left_ms > 10_000 else left_ms // 10) or 1)
        if method and notify and not headers:
            start = self._usual
        else:
            cc = self._cc if notify else b""
            start = (self._start_typed if method else self._start) + _U32.pack(45 + len(cc) + len(headers)) + cc
        return b"".join(
            (
                start,
                _TIMES.pack(_DEADLINE_NAME, deadline_ms, _TIMEOUT_NAME, left_ms),
                headers,
                b"\x01",
                LENGTHS[len(correlation_id)],
                correlation_id,
                self._reply_to,
                LENGTHS[len(expiration)],
                expiration,
                LENGTHS[len(method)] + method if method else b"",
                self._sender,
            )
        )


@dataclass(slots=True)
class Request:
    """What a request says, besides its parameters.

    Attributes:
        correlation_id: empty where the caller gave none.
        reply_to: the queue that wants the reply; empty where none is wanted.
        method: its name, or None for the service's only or default one.
        deadline_ms: absolute, milliseconds since the epoch, or None.
        timeout_ms: time left when it was sent, or None.
        app_id: the caller's name; empty where it gave none.
        attempt: 1 + the number of earlier attempts that may have run.
        idempotency_key: the same for every attempt at one call, or None.
        headers: all of them, but for those that are told here.
        problem: why it may not be run; empty if it may.
        has_copy: it has the header `CC`, which only requests have that were sent through the requests exchange.
        user: the broker's user that sent it, which the broker has checked; empty where the request does not say.

    """

    correlation_id: bytes
    reply_to: bytes
    method: str | None
    deadline_ms: int | None = None
    timeout_ms: int | None = None
    app_id: str = ""
    attempt: int = 1
    idempotency_key: str | None = None
    headers: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    has_copy: bool = False
    user: str = ""

    @property
    def metadata(self) -> dict[str, str]:
        """The caller's own: headers that begin with `x-` and are not RabbitMQ's."""
        return {
            name: value
            for name, value in self.headers.items()
            if name.startswith("x-") and isinstance(value, str) and not OWNED_HEADERS.match(name)
        }


_NO_HEADERS: Final[Mapping[str, Any]] = MappingProxyType({})  # many requests share it
_FAST_START: Final = _U16.pack(_REQUEST_FLAGS | amqp.TYPE) + short(JSON)
_FAST_START_NAMED: Final = _U16.pack(_REQUEST_FLAGS | amqp.TYPE | amqp.USER_ID) + short(JSON)


def read_request(data: bytes) -> Request:
    """What the properties of a request say.

    Raises:
        MalformedProperties: `data` are not properties.

    """
    is_named = False
    if data.startswith(_FAST_START) or (is_named := data.startswith(_FAST_START_NAMED)):  # what rpcq's clients send
        try:
            fast = _read_fast(data, len(_FAST_START), is_named)
        except (IndexError, struct.error, UnicodeDecodeError) as error:
            raise MalformedProperties("the properties of a request are malformed") from error
        if fast is not None:
            return fast
    found = amqp.decode(data)
    headers = found.headers or _NO_HEADERS
    request = Request(
        correlation_id=found.correlation_id or b"",
        reply_to=found.reply_to or b"",
        method=_text(found.type) if found.type else None,
        deadline_ms=headers.get(DEADLINE),
        timeout_ms=headers.get(TIMEOUT),
        app_id=_text(found.app_id),
        attempt=headers.get(ATTEMPT, 1),
        idempotency_key=headers.get(KEY),
        headers=headers,
        has_copy="CC" in headers,
        user=_text(found.user_id),
    )
    request.problem = _problem(found, request)
    return request


def _read_fast(data: bytes, at: int, is_named: bool) -> Request | None:
    """A request with no headers but its times, and `CC`, which is for the broker; None if it has others.

    `is_named` says that it has the property `user_id`.
    """
    end = at + 4 + _U32.unpack_from(data, at)[0]
    at += 4
    has_copy = data[at : at + 4] == b"\x02CCA"
    if has_copy:
        at += 8 + _U32.unpack_from(data, at + 4)[0]
    if at + _TIMES.size != end:
        return None
    deadline_name, deadline, timeout_name, timeout = _TIMES.unpack_from(data, at)
    if deadline_name != _DEADLINE_NAME or timeout_name != _TIMEOUT_NAME:
        return None
    at = end + 2 + data[end + 1]  # after the delivery mode
    correlation_id = data[end + 2 : at]
    end = at + 1 + data[at]
    reply_to = data[at + 1 : end]
    end += 1 + data[end]  # the broker has dealt with the expiration
    at = end + 1 + data[end]
    method = data[end + 1 : at].decode()
    user = ""
    if is_named:
        end, at = at, at + 1 + data[at]
        user = data[end + 1 : at].decode()
    end = at + 1 + data[at]
    if end != len(data):
        raise IndexError(end)
    app_id = data[at + 1 : end].decode()
    return Request(
        correlation_id, reply_to, method or None, deadline, timeout, app_id, 1, None, _NO_HEADERS, "", has_copy, user
    )


def _problem(found: Properties, request: Request) -> str:
    """Why a request may not be run, or nothing."""
    content_type = found.content_type
    if content_type is not None and not _is_json(content_type):
        return f"the content type is {_text(content_type)!r}; this worker reads application/json"
    if found.content_encoding:
        return f"the body is encoded as {_text(found.content_encoding)!r}; this worker reads it as it is"
    if request.user and "\ufffd" in request.user:
        return f"the property user_id is {found.user_id!r:.300}; it is UTF-8"
    for name, value in ((DEADLINE, request.deadline_ms), (TIMEOUT, request.timeout_ms)):
        if value is not None and type(value) is not int:
            return f"the header {name} is {value!r}; it is a whole number of milliseconds"
    if type(request.attempt) is not int or request.attempt < 1:
        return f"the header {ATTEMPT} is {request.attempt!r}; it is a whole number from 1"
    key = request.idempotency_key
    if key is not None and (not isinstance(key, str) or not 1 <= len(key.encode()) <= 255):
        return f"the header {KEY} is {key!r:.50}; it is a string of 1 to 255 bytes"
    return ""


def _is_json(content_type: bytes) -> bool:
    media, _, charset = content_type.lower().replace(b" ", b"").partition(b";")
    return media == JSON and charset in (b"", b"charset=utf-8", b'charset="utf-8"')


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")


_REPLY_FLAGS: Final = amqp.CONTENT_TYPE | amqp.HEADERS | amqp.DELIVERY_MODE | amqp.CORRELATION_ID | amqp.TYPE


class ReplyEncoder:
    """Encodes the properties of a worker's replies."""

    def __init__(self) -> None:
        start = _U16.pack(_REPLY_FLAGS) + short(JSON)
        self._start_full = start + _U32.pack(48)
        self._start_short = start + _U32.pack(25) + _HANDLER_MS
        self._ends = {kind: short(kind) for kind in (RESULT, ERROR)}

    def encode(self, kind: bytes, correlation_id: bytes | None, queue_ms: float | None, handler_ms: float) -> bytes:
        """The properties of one reply: `kind` is RESULT or ERROR; times where known, in milliseconds."""
        if queue_ms is None:
            start = self._start_short + struct.pack(">d", handler_ms)
        else:
            start = self._start_full + _REPLY_TIMES.pack(_QUEUE_MS, queue_ms, _HANDLER_MS, handler_ms)
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


_FAST_REPLY: Final = _U16.pack(_REPLY_FLAGS) + short(JSON) + _U32.pack(48) + _QUEUE_MS
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
    match (found.headers or _NO_HEADERS).get("x-death"):
        case [{"reason": str(reason), "queue": str(queue)}, *_]:
            return Notice(correlation_id, reason, queue)
    return None


def read_times(reply: Reply) -> tuple[float | None, float] | None:
    """Milliseconds from the client to the handler, where told, and in the handler; None where neither is told."""
    data = reply.properties
    at = 3 + data[2] + 4  # where the headers of a reply of rpcq's workers begin
    if data[at : at + 15] == _QUEUE_MS and data[at + 23 : at + 40] == _HANDLER_MS:
        _, queue_ms, _, handler_ms = _REPLY_TIMES.unpack_from(data, at)
        return queue_ms, handler_ms
    headers = amqp.decode(data).headers or _NO_HEADERS
    queue_ms, handler_ms = headers.get("rpcq-queue-ms"), headers.get("rpcq-handler-ms")
    return (queue_ms if isinstance(queue_ms, float) else None, handler_ms) if isinstance(handler_ms, float) else None


def read_body(reply: Reply) -> Any:
    """The value in a reply's body.

    Raises:
        InvalidReply: it has none that could be read.

    """
    executed: Literal["yes", "maybe"] = "yes" if reply.kind == RESULT else "maybe"
    if reply.kind not in (RESULT, ERROR):
        msg = f"the reply's type is {_text(reply.kind)!r}; this client reads 'result' and 'error'"
        raise InvalidReply(msg, executed="maybe")
    if reply.body is None:
        raise InvalidReply("the reply's body is over the limit (max_body)", executed=executed)
    if reply.content_type != JSON and not _is_json(reply.content_type):
        msg = f"the reply's content type is {_text(reply.content_type)!r}; this client reads application/json"
        raise InvalidReply(msg, executed=executed)
    try:
        return loads(reply.body)
    except NotCarried as error:
        raise InvalidReply(f"the reply cannot be taken: {error}", executed=executed) from error
    except ValueError as error:
        raise InvalidReply(f"the reply's body is not JSON: {error}", executed=executed) from error


def encode_control(kind: bytes, correlation_id: bytes, reply_to: bytes, deadline_ms: int | None = None) -> bytes:
    """The properties of a control message."""
    headers = {DEADLINE: deadline_ms} if deadline_ms is not None else None
    return amqp.encode(
        Properties(headers=headers, delivery_mode=1, correlation_id=correlation_id, reply_to=reply_to, type=kind)
    )
