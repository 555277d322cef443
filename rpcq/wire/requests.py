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
from rpcq.wire.bodies import JSON, is_json, text
from rpcq.wire.properties import LENGTHS, MalformedProperties, Properties, short

DEADLINE: Final = "rpcq-deadline"
TIMEOUT: Final = "rpcq-timeout"
KEY: Final = "rpcq-idempotency-key"
ATTEMPT: Final = "rpcq-attempt"

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_TIMES: Final = struct.Struct(">15sq14sq")
_DEADLINE_NAME: Final = short(DEADLINE.encode()) + b"l"
_TIMEOUT_NAME: Final = short(TIMEOUT.encode()) + b"l"


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
        method=text(found.type) if found.type else None,
        deadline_ms=headers.get(DEADLINE),
        timeout_ms=headers.get(TIMEOUT),
        app_id=text(found.app_id),
        attempt=headers.get(ATTEMPT, 1),
        idempotency_key=headers.get(KEY),
        headers=headers,
        has_copy="CC" in headers,
        user=text(found.user_id),
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
    if content_type is not None and not is_json(content_type):
        return f"the content type is {text(content_type)!r}; this worker reads application/json"
    if found.content_encoding:
        return f"the body is encoded as {text(found.content_encoding)!r}; this worker reads it as it is"
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
