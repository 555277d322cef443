"""The properties of an AMQP message, bytes <-> values. Pure.

A content header has them after its body size (AMQP 0-9-1 specification, 4.2.6.1); numbers are big-endian:

    U16 flags | the values of the flagged properties, in the order of `_LAYOUT`

    short string   U8 length | bytes
    field table    U32 bytes of all entries | entries: short string name | U8 type | value
    field array    U32 bytes of all items | items: U8 type | value

The types in tables and arrays are those of RabbitMQ's errata (https://www.rabbitmq.com/amqp-0-9-1-errata), where they
differ from the specification. Short strings stay bytes, because a correlation ID may have any bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

MAX_DEPTH: Final = 16
"""Tables and arrays that are nested deeper are refused."""

CONTENT_TYPE: Final = 0x8000
CONTENT_ENCODING: Final = 0x4000
HEADERS: Final = 0x2000
DELIVERY_MODE: Final = 0x1000
PRIORITY: Final = 0x0800
CORRELATION_ID: Final = 0x0400
REPLY_TO: Final = 0x0200
EXPIRATION: Final = 0x0100
MESSAGE_ID: Final = 0x0080
TIMESTAMP: Final = 0x0040
TYPE: Final = 0x0020
USER_ID: Final = 0x0010
APP_ID: Final = 0x0008
CLUSTER_ID: Final = 0x0004

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_I64: Final = struct.Struct(">q")
_F64: Final = struct.Struct(">d")
_DECIMAL: Final = struct.Struct(">Bi")
_FIXED: Final[dict[int, struct.Struct]] = {
    ord(kind): struct.Struct(layout)
    for kind, layout in {
        "t": ">?",
        "b": ">b",
        "B": ">B",
        "s": ">h",
        "u": ">H",
        "I": ">i",
        "i": ">I",
        "l": ">q",
        "L": ">q",
        "f": ">f",
        "d": ">d",
    }.items()
}


class MalformedProperties(ValueError):
    """The bytes are not the properties of an AMQP message."""


class NestedTooDeep(MalformedProperties):
    """Tables or arrays in the headers are nested deeper than `MAX_DEPTH`; all else can be read with `flat`."""


@dataclass
class Properties:
    """The properties of one message; None where absent. Short strings are bytes of at most 255."""

    content_type: bytes | None = None
    content_encoding: bytes | None = None
    headers: dict[str, Any] | None = None
    delivery_mode: int | None = None
    priority: int | None = None
    correlation_id: bytes | None = None
    reply_to: bytes | None = None
    expiration: bytes | None = None
    message_id: bytes | None = None
    timestamp: int | None = None
    type: bytes | None = None
    user_id: bytes | None = None
    app_id: bytes | None = None
    cluster_id: bytes | None = None


LENGTHS: Final = tuple(bytes((length,)) for length in range(256))
"""The length of a short string as one byte; looking it up is faster than making it."""


def short(value: bytes) -> bytes:
    """A short string: one byte of length, then at most 255 bytes."""
    if len(value) > 255:
        msg = f"a short string of AMQP must have at most 255 bytes; got {len(value)}"
        raise ValueError(msg)
    return LENGTHS[len(value)] + value


def encode(properties: Properties) -> bytes:
    """Encode the flags and the values, as in a content header."""
    flags, parts = 0, [b""]
    for flag, name, kind in _LAYOUT:
        value = getattr(properties, name)
        if value is None:
            continue
        flags |= flag
        if kind == "s":
            parts.append(short(value))
        elif kind == "t":
            parts.append(encode_table(value))
        elif kind == "o":
            parts.append(bytes((value,)))
        else:
            parts.append(struct.pack(">Q", value))
    parts[0] = _U16.pack(flags)
    return b"".join(parts)


# The order on the wire. Kinds: (s)hort string, (t)able, (o)ctet, (q)uad: 64 bits.
_LAYOUT: Final = (
    (CONTENT_TYPE, "content_type", "s"),
    (CONTENT_ENCODING, "content_encoding", "s"),
    (HEADERS, "headers", "t"),
    (DELIVERY_MODE, "delivery_mode", "o"),
    (PRIORITY, "priority", "o"),
    (CORRELATION_ID, "correlation_id", "s"),
    (REPLY_TO, "reply_to", "s"),
    (EXPIRATION, "expiration", "s"),
    (MESSAGE_ID, "message_id", "s"),
    (TIMESTAMP, "timestamp", "q"),
    (TYPE, "type", "s"),
    (USER_ID, "user_id", "s"),
    (APP_ID, "app_id", "s"),
    (CLUSTER_ID, "cluster_id", "s"),
)


def decode(data: bytes, *, flat: bool = False) -> Properties:
    """Decode what `encode` gives. With `flat`, a header that is a table or an array is None.

    Raises:
        NestedTooDeep: the headers are nested deeper than `MAX_DEPTH`; never with `flat`.
        MalformedProperties: there are too few or too many bytes, or a type that AMQP does not have.

    """
    found = Properties()
    read_table = _read_flat_table if flat else _read_table
    try:
        flags = data[0] << 8 | data[1]
        at = 2
        for flag, name, kind in _LAYOUT:
            if not flags & flag:
                continue
            if kind == "s":
                end = at + 1 + data[at]
                setattr(found, name, data[at + 1 : end])
                at = end
            elif kind == "t":
                end = at + 4 + _U32.unpack_from(data, at)[0]
                found.headers = read_table(data, at + 4, end, 0)
                at = end
            elif kind == "o":
                setattr(found, name, data[at])
                at += 1
            else:
                found.timestamp = struct.unpack_from(">Q", data, at)[0]
                at += 8
    except (IndexError, struct.error) as error:
        raise MalformedProperties("the properties end early") from error
    if at != len(data) or flags & 3:  # the lowest bits are no properties
        msg = f"the properties do not match their flags {flags:#06x}: {at} of {len(data)} bytes were read"
        raise MalformedProperties(msg)
    return found


def encode_table(table: dict[str, Any]) -> bytes:
    """Encode a field table, with its length.

    Values may be bool, int, float, Decimal, str, bytes, datetime, None, and lists and dicts of these.

    Raises:
        ValueError: a value is out of its type's range, or nested too deep.
        TypeError: a value has another type.

    """
    try:
        body = b"".join([short(name.encode()) + _encode_value(value, 0) for name, value in table.items()])
    except struct.error as error:
        msg = f"a header is out of its type's range: {error}"
        raise ValueError(msg) from error
    return _U32.pack(len(body)) + body


def _encode_value(value: Any, depth: int) -> bytes:
    if depth >= MAX_DEPTH and isinstance(value, list | tuple | dict):
        msg = f"headers must be nested at most {MAX_DEPTH} deep"
        raise ValueError(msg)
    match value:
        case bool():
            return b"t\x01" if value else b"t\x00"
        case int():
            return b"l" + _I64.pack(value)
        case str():
            raw = value.encode()
            return b"S" + _U32.pack(len(raw)) + raw
        case bytes():
            return b"x" + _U32.pack(len(value)) + value
        case float():
            return b"d" + _F64.pack(value)
        case None:
            return b"V"
        case Decimal():
            return _encode_decimal(value)
        case datetime():
            return b"T" + struct.pack(">Q", int(value.timestamp()))
        case list() | tuple():
            items = b"".join([_encode_value(item, depth + 1) for item in value])
            return b"A" + _U32.pack(len(items)) + items
        case dict():
            items = b"".join([short(name.encode()) + _encode_value(item, depth + 1) for name, item in value.items()])
            return b"F" + _U32.pack(len(items)) + items
    msg = f"a header cannot carry {type(value).__name__}"
    raise TypeError(msg)


def _encode_decimal(value: Decimal) -> bytes:
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int) or exponent > 9 or len(digits) > 10:  # NaN, infinite, or over 32 bits
        msg = f"a header cannot carry the decimal {value}"
        raise ValueError(msg)
    number = int("".join(map(str, digits))) * 10 ** max(exponent, 0)
    return b"D" + _DECIMAL.pack(max(-exponent, 0), -number if sign else number)


def _read_table(data: bytes, at: int, end: int, depth: int) -> dict[str, Any]:
    if depth > MAX_DEPTH:
        msg = f"headers must be nested at most {MAX_DEPTH} deep"
        raise NestedTooDeep(msg)
    if end > len(data):
        raise MalformedProperties("a table is too long for its place")
    table = {}
    while at < end:
        name_end = at + 1 + data[at]
        name = data[at + 1 : name_end].decode("utf-8", "replace")
        kind = data[name_end]
        if kind == 0x6C:  # l: the most frequent type, which deadlines have
            table[name] = _I64.unpack_from(data, name_end + 1)[0]
            at = name_end + 9  # past the type and 8 bytes
        else:
            table[name], at = _read_value(data, name_end + 1, kind, depth)
    if at != end:
        raise MalformedProperties("a value in a table is longer than the table")
    return table


def _read_flat_table(data: bytes, at: int, end: int, _depth: int) -> dict[str, Any]:
    """Read a table; its tables and arrays are skipped by their length, and read as None."""
    if end > len(data):
        raise MalformedProperties("a table is too long for its place")
    table: dict[str, Any] = {}
    while at < end:
        name_end = at + 1 + data[at]
        name = data[at + 1 : name_end].decode("utf-8", "replace")
        kind, at = data[name_end], name_end + 1
        if kind in b"AF":
            table[name], at = None, at + 4 + _U32.unpack_from(data, at)[0]
        else:
            table[name], at = _read_value(data, at, kind, 0)
    if at != end:
        raise MalformedProperties("a value in a table is longer than the table")
    return table


def _read_value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """Read the value at `at`; returns it and the offset after it."""
    if kind in b"SxAF":
        start, end = at + 4, at + 4 + _U32.unpack_from(data, at)[0]
        if end > len(data):
            raise MalformedProperties("a value is too long for its place")
        if kind == 0x53:  # S
            raw = data[start:end]
            try:
                return raw.decode(), end
            except UnicodeDecodeError:
                return raw, end
        if kind == 0x78:  # x
            return data[start:end], end
        if kind == 0x46:  # F
            return _read_table(data, start, end, depth + 1), end
        return _read_array(data, start, end, depth + 1), end
    if fixed := _FIXED.get(kind):
        return fixed.unpack_from(data, at)[0], at + fixed.size
    if kind == 0x56:  # V
        return None, at
    if kind == 0x54:  # T
        seconds = struct.unpack_from(">Q", data, at)[0]
        try:
            return datetime.fromtimestamp(seconds, UTC), at + 8
        except (OverflowError, ValueError, OSError):
            return seconds, at + 8
    if kind == 0x44:  # D
        scale, digits = _DECIMAL.unpack_from(data, at)
        return Decimal(f"{digits}E-{scale}"), at + 5  # arithmetic would round by the user's decimal context
    msg = f"a table has a value of type {kind:#04x}, which AMQP does not have"
    raise MalformedProperties(msg)


def _read_array(data: bytes, at: int, end: int, depth: int) -> list[Any]:
    if depth > MAX_DEPTH:
        msg = f"headers must be nested at most {MAX_DEPTH} deep"
        raise NestedTooDeep(msg)
    items = []
    while at < end:
        value, at = _read_value(data, at + 1, data[at], depth)
        items.append(value)
    if at != end:
        raise MalformedProperties("a value in an array is longer than the array")
    return items
