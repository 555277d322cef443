"""Requests: their properties, bytes <-> values. Pure; `docs/wire.md` is the contract."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from rpcq.errors import TooLarge
from rpcq.options import MAX_HEADERS, OWNED_HEADERS
from rpcq.wire import properties as amqp
from rpcq.wire.bodies import JSON, LINES, text, why_not_read
from rpcq.wire.properties import LENGTHS, MalformedProperties, NestedTooDeep, short

METHOD: Final = "rpcq-method"
DEADLINE: Final = "rpcq-deadline"
TIMEOUT: Final = "rpcq-timeout"
KEY: Final = "rpcq-idempotency-key"
ATTEMPT: Final = "rpcq-attempt"
BATCHES: Final = "rpcq-batches"

REQUESTS: Final = b"requests"
"""The type of a message batch, which has several requests; see `rpcq.wire.batches`. It is one with `LINES` alone."""

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_I32: Final = struct.Struct(">i")
_MAX_I32: Final = (1 << 31) - 1

# The properties of a client's request, as `RequestEncoder` packs them and `_read_fast` parses them by hand. Numbers are
# big-endian. A short string is U8 length, bytes; an entry of the headers' table is short name, U8 type, value.
#
#   U16    flags                                        _REQUEST_FLAGS, + TYPE if there is a method, + USER_ID
#   short  content_type     "application/json", or "application/x-ndjson" for a message batch
#   U32    bytes of the headers' table, up to delivery_mode
#            short "CC", "A", U32 bytes of the array:   _CC_START; only if the caller is to be notified of an expiry
#              "S", U32 length, reply_to
#            short "rpcq-batches", "t", 1               _BATCHES; only after `CC`, if the client reads message batches
#            short "rpcq-deadline", "l", I64            _TIMES: _TIMES_SIZE bytes
#            short "rpcq-timeout", "l", I64
#            or, to a queue that foreign programs may serve, in types that old clients know:
#            short "rpcq-deadline", "S", U32 13, digits  _OLD_TIMES: _OLD_TIMES_SIZE bytes
#            short "rpcq-timeout", "I", I32
#            further entries                            from `encode_headers`; with any, `_read_fast` gives up
#   U8     delivery_mode    1
#   short  correlation_id
#   short  reply_to
#   short  expiration       milliseconds in decimal digits
#   short  type             the method's name            only with the flag TYPE
#   short  user_id                                       only with the flag USER_ID
#   short  app_id           the client's name
_CC_START: Final = short(b"CC") + b"A"
_BATCHES: Final = short(BATCHES.encode()) + b"t\x01"
_BATCHES_SIZE: Final = len(_BATCHES)
_DEADLINE_NAME: Final = short(DEADLINE.encode()) + b"l"
_TIMEOUT_NAME: Final = short(TIMEOUT.encode()) + b"l"
_TIMES: Final = struct.Struct(f">{len(_DEADLINE_NAME)}sq{len(_TIMEOUT_NAME)}sq")
_TIMES_SIZE: Final = _TIMES.size
_OLD_DEADLINE_NAME: Final = short(DEADLINE.encode()) + b"S" + _U32.pack(13)
_OLD_TIMEOUT_NAME: Final = short(TIMEOUT.encode()) + b"I"
_OLD_TIMES: Final = struct.Struct(f">{len(_OLD_DEADLINE_NAME)}s13s{len(_OLD_TIMEOUT_NAME)}si")
_OLD_TIMES_SIZE: Final = _OLD_TIMES.size
_ATTEMPT_NAME: Final = short(ATTEMPT.encode()) + b"I"


def encode_headers(
    *, key: str | None, attempt: int, metadata: Mapping[str, str], trace: Mapping[str, str] | None = None
) -> bytes:
    """Encode the headers of a request besides its times and its `CC`, as entries of a field table.

    Their types are strings and int32, which old clients know, because foreign programs may serve the queue. `trace` is
    left out if there is no room for it, because a call must not fail for that.

    Raises:
        TooLarge: the headers are over 8 KiB.

    """
    headers: dict[str, Any] = dict(metadata)
    if key is not None:
        headers[KEY] = key
    entries = amqp.encode_table(headers)[4:]  # without the table's length
    if attempt > 1:
        entries += _ATTEMPT_NAME + _I32.pack(attempt)
    if len(entries) > MAX_HEADERS:
        msg = f"the headers are {len(entries)} bytes; the limit is {MAX_HEADERS}"
        raise TooLarge(msg)
    if trace is not None:
        further = amqp.encode_table(dict(trace))[4:]
        if len(entries) + len(further) <= MAX_HEADERS:
            entries += further
    return entries


def _old_times(deadline_ms: int, left_ms: int) -> bytes:
    """Encode the times of a request in types that old clients know."""
    digits = b"%013d" % deadline_ms
    if len(digits) == 13 and left_ms <= _MAX_I32:
        return _OLD_TIMES.pack(_OLD_DEADLINE_NAME, digits, _OLD_TIMEOUT_NAME, left_ms)
    return amqp.encode_table({DEADLINE: digits.decode(), TIMEOUT: str(left_ms)})[4:]  # from the year 2286 on


_REQUEST_FLAGS: Final = (
    amqp.CONTENT_TYPE
    | amqp.HEADERS
    | amqp.DELIVERY_MODE
    | amqp.CORRELATION_ID
    | amqp.REPLY_TO
    | amqp.EXPIRATION
    | amqp.APP_ID
)
"""The properties of every request of a client; `TYPE` and `USER_ID` are added where they apply."""


class RequestEncoder:
    """Encodes the properties of a client's requests. Parts that all of them share are encoded once.

    Args:
        reply_to: the client's reply queue, in the current session.
        app_id: the client's name.
        user: the client's user at the broker if its requests carry it; else empty.
        batches: whether the client reads message batches, as requests through the requests exchange then say.
        content_type: of the bodies; `LINES` for message batches, whose `method` is `REQUESTS`.

    """

    def __init__(
        self, reply_to: str, app_id: str, user: str = "", *, batches: bool = False, content_type: bytes = JSON
    ) -> None:
        self.reply_to = reply_to.encode()
        address = b"S" + _U32.pack(len(self.reply_to)) + self.reply_to
        self._cc = _CC_START + _U32.pack(len(address)) + address + (_BATCHES if batches else b"")
        flags = _REQUEST_FLAGS | amqp.USER_ID if user else _REQUEST_FLAGS
        self._start = _U16.pack(flags) + short(content_type)
        self._start_typed = _U16.pack(flags | amqp.TYPE) + short(content_type)
        self._usual = self._start_typed + _U32.pack(_TIMES_SIZE + len(self._cc)) + self._cc
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
        """Encode the properties of one request.

        Args:
            correlation_id: 1 to 255 bytes.
            method: the method's name; empty for none.
            left_ms: milliseconds until the deadline.
            deadline_ms: the deadline, in milliseconds since the epoch.
            headers: further headers, from `encode_headers`.
            notify: the broker is to send a notice if the request expires (`CC`). Only for the requests exchange: any
                other exchange would route a copy of the request to the reply queue. Without it, foreign programs may
                serve the queue, so the headers have types that old clients know.

        """
        # The request expires a little before the deadline, so that the notice arrives in time.
        expiration = b"%d" % (left_ms - (1000 if left_ms > 10_000 else left_ms // 10) or 1)
        if method and notify and not headers:
            start = self._usual
            times = _TIMES.pack(_DEADLINE_NAME, deadline_ms, _TIMEOUT_NAME, left_ms)
        else:
            if notify:
                cc, times = self._cc, _TIMES.pack(_DEADLINE_NAME, deadline_ms, _TIMEOUT_NAME, left_ms)
            else:
                cc, times = b"", _old_times(deadline_ms, left_ms)
            size = _U32.pack(len(cc) + len(times) + len(headers))
            start = (self._start_typed if method else self._start) + size + cc
        return b"".join(
            (
                start,
                times,
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
    """The content of a request's properties.

    Attributes:
        correlation_id: the call's correlation ID, or its `message_id` if it has none; empty if the caller gave neither.
        reply_to: the queue for the reply; empty if no reply is wanted.
        method: the method's name, or None for the service's only or default method.
        deadline_ms: the deadline, in milliseconds since the epoch, or None.
        timeout_ms: milliseconds that were left when it was sent, or None.
        app_id: the caller's name; empty if it gave none.
        attempt: 1 + the number of earlier attempts that may have run.
        idempotency_key: the call's key, the same for all its attempts; or None.
        headers: all headers; may be left empty if there are only its times and `CC`.
        problem: why it may not run; empty if it may.
        has_copy: whether it has the header `CC`: only requests sent through the requests exchange have it.
        user: the broker's user that sent it, checked by the broker; empty if the request does not carry it.
        reads_batches: whether the client reads several replies in one message.
        is_batch: whether it is a message batch, whose body has the requests.

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
    reads_batches: bool = False
    is_batch: bool = False

    @property
    def metadata(self) -> dict[str, str]:
        """The caller's own headers: those that begin with `x-` and are not RabbitMQ's."""
        return {
            name: value
            for name, value in self.headers.items()
            if name.startswith("x-") and isinstance(value, str) and not OWNED_HEADERS.match(name)
        }


_NO_HEADERS: Final[Mapping[str, Any]] = MappingProxyType({})  # shared by all requests without headers
_METHOD_OF_BATCH: Final = REQUESTS.decode()
_FAST_START: Final = _U16.pack(_REQUEST_FLAGS | amqp.TYPE) + short(JSON)
_FAST_START_NAMED: Final = _U16.pack(_REQUEST_FLAGS | amqp.TYPE | amqp.USER_ID) + short(JSON)
_FAST_BATCH: Final = _U16.pack(_REQUEST_FLAGS | amqp.TYPE) + short(LINES)
_FAST_BATCH_NAMED: Final = _U16.pack(_REQUEST_FLAGS | amqp.TYPE | amqp.USER_ID) + short(LINES)


def read_request(data: bytes) -> Request:
    """Read the properties of a request.

    Raises:
        MalformedProperties: `data` is not the properties of an AMQP message.

    """
    is_named = False
    if data.startswith(_FAST_START) or (is_named := data.startswith(_FAST_START_NAMED)):  # from a client of rpcq
        at = len(_FAST_START)
    elif data.startswith(_FAST_BATCH) or (is_named := data.startswith(_FAST_BATCH_NAMED)):
        at = len(_FAST_BATCH)
    else:
        return _read_any(data)
    try:
        fast = _read_fast(data, at, is_named)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise MalformedProperties("the properties of a request are malformed") from error
    if fast is None:
        return _read_any(data)
    if at == len(_FAST_BATCH):
        fast.is_batch = fast.method == _METHOD_OF_BATCH
        if not fast.is_batch:
            fast.problem = why_not_read(LINES, None)
    return fast


def _read_any(data: bytes) -> Request:
    """Read a request of any client."""
    problem = ""
    try:
        found = amqp.decode(data)
    except NestedTooDeep as error:
        found, problem = amqp.decode(data, flat=True), str(error)
    headers = found.headers or _NO_HEADERS
    request = Request(
        correlation_id=found.correlation_id or found.message_id or b"",
        reply_to=found.reply_to or b"",
        method=headers.get(METHOD) or (text(found.type) if found.type else None),
        deadline_ms=_number(headers.get(DEADLINE)),
        timeout_ms=_number(headers.get(TIMEOUT)),
        app_id=text(found.app_id),
        attempt=headers.get(ATTEMPT, 1),
        idempotency_key=headers.get(KEY),
        headers=headers,
        has_copy="CC" in headers,
        user=text(found.user_id),
        reads_batches=headers.get(BATCHES) is True,
        is_batch=found.type == REQUESTS and found.content_type == LINES and not found.content_encoding,
    )
    why = "" if request.is_batch else why_not_read(found.content_type, found.content_encoding)
    if not why and request.user and "\ufffd" in request.user:
        why = f"the property user_id must be UTF-8; got {found.user_id!r:.300}"
    request.problem = problem or why or problem_of(request)
    if type(request.method) is not str:
        request.method = None
    return request


def _number(value: Any) -> Any:
    """The number of a header whose value is digits; any other value as it is."""
    is_digits = type(value) is str and value.isascii() and value.isdigit() and len(value) < 20  # about 64 bits
    return int(value) if is_digits else value


def _read_fast(data: bytes, at: int, is_named: bool) -> Request | None:
    """Read a request whose headers are its times, and perhaps `CC` and `rpcq-batches`; None if it has others.

    `at` is where the length of the headers' table is; `is_named` says that there is a `user_id`.
    """
    end = at + 4 + _U32.unpack_from(data, at)[0]
    at += 4
    has_copy = data.startswith(_CC_START, at)
    if has_copy:  # skip it: 4 bytes of `_CC_START`, 4 bytes of length, and the array
        at += 8 + _U32.unpack_from(data, at + 4)[0]
    reads_batches = data.startswith(_BATCHES, at)
    if reads_batches:
        at += _BATCHES_SIZE
    if at + _TIMES_SIZE == end:
        deadline_name, deadline, timeout_name, timeout = _TIMES.unpack_from(data, at)
        if deadline_name != _DEADLINE_NAME or timeout_name != _TIMEOUT_NAME:
            return None
    elif at + _OLD_TIMES_SIZE == end:
        deadline_name, digits, timeout_name, timeout = _OLD_TIMES.unpack_from(data, at)
        if deadline_name != _OLD_DEADLINE_NAME or timeout_name != _OLD_TIMEOUT_NAME or not digits.isdigit():
            return None
        deadline = int(digits)
    else:
        return None
    at = end + 2 + data[end + 1]  # after the delivery mode
    correlation_id = data[end + 2 : at]
    end = at + 1 + data[at]
    reply_to = data[at + 1 : end]
    end += 1 + data[end]  # skip the expiration, which is for the broker
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
        correlation_id,
        reply_to,
        method or None,
        deadline,
        timeout,
        app_id,
        1,
        None,
        _NO_HEADERS,
        "",
        has_copy,
        user,
        reads_batches,
    )


def problem_of(request: Request) -> str:
    """Why a request may not run, by its method, its times and its headers; or an empty string."""
    if request.method is not None and type(request.method) is not str:
        return f"the header {METHOD} must be a string; got {request.method!r:.300}"
    for name, value in ((DEADLINE, request.deadline_ms), (TIMEOUT, request.timeout_ms)):
        if value is not None and type(value) is not int:
            return f"the header {name} must be a whole number of milliseconds; got {value!r}"
    if type(request.attempt) is not int or request.attempt < 1:
        return f"the header {ATTEMPT} must be a whole number of at least 1; got {request.attempt!r}"
    key = request.idempotency_key
    if key is not None and (not isinstance(key, str) or not 1 <= len(key.encode()) <= 255):
        return f"the header {KEY} must be a string of 1 to 255 bytes; got {key!r:.50}"
    return ""
