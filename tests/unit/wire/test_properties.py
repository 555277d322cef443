"""The codec of properties and field tables, with pamqp as its oracle."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal, Inexact, localcontext
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pamqp import commands
from pamqp import decode as pamqp_decode
from pamqp import encode as pamqp_encode
from pamqp.header import ContentHeader

from rpcq.wire.properties import (
    CLUSTER_ID,
    CONTENT_TYPE,
    CORRELATION_ID,
    DELIVERY_MODE,
    HEADERS,
    MAX_DEPTH,
    PRIORITY,
    TIMESTAMP,
    MalformedProperties,
    Properties,
    decode,
    encode,
    encode_table,
    short,
)

dozens = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)

STRINGS = (
    "content_type",
    "content_encoding",
    "correlation_id",
    "reply_to",
    "expiration",
    "message_id",
    "type",
    "user_id",
    "app_id",
    "cluster_id",
)
KINDS = b"tbBsuIilLfdDSATFVx"
"""Every type of a field table that RabbitMQ has, and `L` of older clients."""


# What is drawn.

epoch_seconds = st.integers(0, 0xFFFFFFFF)  # pamqp takes later ones for milliseconds
moments = epoch_seconds.map(lambda seconds: datetime.fromtimestamp(seconds, UTC))
decimals = st.builds(
    lambda digits, scale: Decimal(f"{digits}E-{scale}"), st.integers(-(2**31), 2**31 - 1), st.integers(0, 255)
)
long_ints = st.integers(-(2**63), 2**63 - 1)
names = st.text(max_size=30)


def tables_of(scalars: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    values = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
        max_leaves=8,
    )
    return st.dictionaries(names, values, max_size=6)


plain = st.none() | st.booleans() | long_ints | st.text(max_size=40) | decimals | moments
our_tables = tables_of(plain | st.floats(allow_nan=False) | st.binary(max_size=40))
pamqp_tables = tables_of(plain | st.floats(allow_nan=False, width=32) | st.binary(max_size=40).map(bytearray))

short_strings = st.binary(max_size=40) | st.binary(min_size=255, max_size=255)
octets = st.integers(0, 255)
our_properties = st.builds(
    Properties,
    **{name: st.none() | short_strings for name in STRINGS},
    headers=st.none() | our_tables,
    delivery_mode=st.none() | octets,
    priority=st.none() | octets,
    timestamp=st.none() | st.integers(0, 2**64 - 1),
)

short_texts = st.text(max_size=60).map(lambda text: text.encode())
readable_properties = st.builds(  # what pamqp can read: it has text for short strings
    Properties,
    **{name: st.none() | short_texts for name in STRINGS},
    headers=st.none() | our_tables,
    delivery_mode=st.none() | octets,
    priority=st.none() | octets,
    timestamp=st.none() | epoch_seconds,
)


# How values are compared.


def exactly(value: Any) -> Any:
    """A value and the types in it, for `==`: 1 is not True, a string not bytes, NaN itself, -0.0 not 0.0."""
    match value:
        case dict():
            return {name: exactly(item) for name, item in value.items()}
        case list():
            return [exactly(item) for item in value]
        case bytearray():
            return "bytes", bytes(value)
        case float():
            return "float", repr(value)
    return type(value).__name__, value


def as_pamqp_reads(properties: bytes) -> Properties:
    header = ContentHeader()
    header.unmarshal(struct.pack(">HHQ", 60, 0, 0) + properties)
    return from_pamqp(header.properties)


def from_pamqp(found: commands.Basic.Properties) -> Properties:
    def text(value: str | None) -> bytes | None:
        return None if value is None else value.encode()

    return Properties(
        content_type=text(found.content_type),
        content_encoding=text(found.content_encoding),
        headers=found.headers,
        delivery_mode=found.delivery_mode,
        priority=found.priority,
        correlation_id=text(found.correlation_id),
        reply_to=text(found.reply_to),
        expiration=text(found.expiration),
        message_id=text(found.message_id),
        timestamp=None if found.timestamp is None else int(found.timestamp.timestamp()),
        type=text(found.message_type),
        user_id=text(found.user_id),
        app_id=text(found.app_id),
        cluster_id=text(found.cluster_id) or None,  # pamqp has an empty one for none
    )


def assert_same(found: Properties, meant: Properties) -> None:
    assert exactly(asdict(found)) == exactly(asdict(meant))


def properties_of(table: bytes) -> bytes:
    """Properties that are only headers, of the entries of a field table."""
    return struct.pack(">HI", HEADERS, len(table)) + table


def read_table(entries: bytes) -> dict[str, Any]:
    found = decode(properties_of(entries)).headers
    assert found is not None
    return found


# Round trips, and the oracle.


@dozens
@given(our_properties)
def test_what_is_encoded_decodes_to_the_same(properties: Properties) -> None:
    assert_same(decode(encode(properties)), properties)


@dozens
@given(readable_properties)
def test_pamqp_reads_in_our_bytes_what_was_meant(properties: Properties) -> None:
    if not properties.cluster_id:
        properties.cluster_id = None
    assert_same(as_pamqp_reads(encode(properties)), properties)


@dozens
@given(
    texts=st.fixed_dictionaries(
        {name: st.none() | st.text(min_size=1, max_size=60) for name in STRINGS if name not in {"type", "cluster_id"}}
    ),
    message_type=st.none() | st.text(min_size=1, max_size=60),
    headers=st.none() | pamqp_tables,
    delivery_mode=st.none() | st.sampled_from((1, 2)),
    priority=st.none() | octets,
    timestamp=st.none() | moments,
)
def test_we_read_in_the_bytes_of_pamqp_what_was_meant(
    texts: dict[str, Any],
    message_type: str | None,
    headers: dict[str, Any] | None,
    delivery_mode: int | None,
    priority: int | None,
    timestamp: datetime | None,
) -> None:
    theirs = commands.Basic.Properties(
        **texts,
        message_type=message_type,
        headers=headers,
        delivery_mode=delivery_mode,
        priority=priority,
        timestamp=timestamp,
    )
    assert_same(decode(theirs.marshal()), from_pamqp(theirs))


@dozens
@given(our_tables)
def test_pamqp_reads_our_field_tables(table: dict[str, Any]) -> None:
    raw = encode_table(table)
    used, found = pamqp_decode.field_table(raw)
    assert used == len(raw)
    assert exactly(found) == exactly(table)


@dozens
@given(pamqp_tables)
def test_we_read_the_field_tables_of_pamqp(table: dict[str, Any]) -> None:
    assert exactly(read_table(pamqp_encode.field_table(table)[4:])) == exactly(table)


@pytest.mark.parametrize(
    ("kind", "raw", "value"),
    [
        ("t", b"\x00", False),
        ("t", b"\x01", True),
        ("b", b"\x80", -128),
        ("B", b"\xff", 255),
        ("s", b"\x80\x00", -32768),
        ("u", b"\xff\xff", 65535),
        ("I", b"\x80\x00\x00\x00", -(2**31)),
        ("i", b"\xff\xff\xff\xff", 2**32 - 1),
        ("l", b"\x80" + b"\x00" * 7, -(2**63)),
        ("L", b"\x7f" + b"\xff" * 7, 2**63 - 1),
        ("L", b"\xff" * 8, -1),
        ("f", b"\x3f\xc0\x00\x00", 1.5),
        ("d", b"\x3f\xf8" + b"\x00" * 6, 1.5),
        ("D", b"\x02\x00\x00\x30\x39", Decimal("123.45")),
        ("D", b"\x00\xff\xff\xff\xff", Decimal(-1)),
        ("D", b"\xff\x80\x00\x00\x00", Decimal("-2147483648E-255")),
        ("S", b"\x00\x00\x00\x03\xe2\x82\xac", "\u20ac"),
        ("S", b"\x00\x00\x00\x00", ""),
        ("S", b"\x00\x00\x00\x02\xff\x00", b"\xff\x00"),  # not UTF-8: as it is
        ("x", b"\x00\x00\x00\x02ab", b"ab"),
        ("V", b"", None),
        ("T", b"\x00\x00\x00\x00\x65\x92\x00\x80", datetime(2024, 1, 1, 0, 0, tzinfo=UTC)),
        ("A", b"\x00\x00\x00\x00", []),
        ("A", b"\x00\x00\x00\x05Vt\x01b\xff", [None, True, -1]),
        ("F", b"\x00\x00\x00\x00", {}),
        ("F", b"\x00\x00\x00\x09\x01aV\x01bB\x07\x00V", {"a": None, "b": 7, "": None}),
    ],
)
def test_every_type_of_a_field_table_is_read_as_pamqp_reads_it(kind: str, raw: bytes, value: Any) -> None:
    entries = b"\x03key" + kind.encode() + raw + b"\x04nextB\x07"
    found = read_table(entries)
    assert exactly(found) == exactly({"key": value, "next": 7})
    assert exactly(found) == exactly(pamqp_decode.field_table(struct.pack(">I", len(entries)) + entries)[1])


def test_every_type_is_in_the_list_of_types() -> None:
    assert {kind[0] for kind in pamqp_decode.TABLE_MAPPING} - {0} == set(KINDS)


def test_a_type_that_amqp_does_not_have_is_malformed() -> None:
    for kind in set(range(256)) - set(KINDS):
        with pytest.raises(MalformedProperties, match=f"{kind:#04x}"):
            read_table(b"\x01k" + bytes((kind,)) + bytes(16))


def test_a_time_that_datetime_cannot_hold_is_the_number_of_its_seconds() -> None:
    assert read_table(b"\x01kT" + struct.pack(">Q", 2**64 - 1)) == {"k": 2**64 - 1}
    assert read_table(b"\x01kT" + struct.pack(">Q", 10**12)) == {"k": 10**12}


def test_a_time_is_read_with_its_zone_and_written_from_any() -> None:
    elsewhere = datetime(2024, 5, 6, 7, 8, 9, 999_999, tzinfo=timezone(timedelta(hours=-3)))
    assert decode(encode(Properties(headers={"t": elsewhere}))).headers == {
        "t": datetime(2024, 5, 6, 10, 8, 9, tzinfo=UTC)
    }


def test_not_a_number_stays_what_it_is() -> None:
    assert exactly(read_table(encode_table({"k": float("nan")})[4:])) == {"k": ("float", "nan")}


def test_a_tuple_is_written_as_a_list() -> None:
    assert read_table(encode_table({"k": (1, (2,))})[4:]) == {"k": [1, [2]]}


def test_a_name_that_is_not_utf_8_is_read_with_replacements() -> None:
    assert read_table(b"\x02\xff\xfeV") == {"\ufffd\ufffd": None}


@pytest.mark.parametrize(
    ("decimal", "bits"),
    [("1E+3", 1000), ("2E+9", 2_000_000_000), ("-1.50", -150), ("-0", 0), ("0E-255", 0)],
)
def test_a_decimal_is_written_with_its_digits_whatever_its_exponent(decimal: str, bits: int) -> None:
    raw = encode_table({"k": Decimal(decimal)})
    assert struct.unpack(">i", raw[-4:]) == (bits,)
    assert read_table(raw[4:])["k"] == pamqp_decode.field_table(raw)[1]["k"] == Decimal(decimal)


def test_the_decimal_context_of_the_program_changes_no_value() -> None:
    number = Decimal("21474836.47")
    with localcontext() as context:
        context.prec = 3
        context.Emin = -10
        context.traps[Inexact] = True
        found = read_table(encode_table({"k": number, "small": Decimal("1E-255")})[4:])
    assert found == {"k": number, "small": Decimal("1E-255")}


# What cannot be written.


@pytest.mark.parametrize(
    "value",
    [
        2**63,
        -(2**63) - 1,
        datetime(1969, 12, 31, tzinfo=UTC),
        Decimal("NaN"),
        Decimal("-Infinity"),
        Decimal("1E+10"),
        Decimal("1E+999999"),
        Decimal(2**31),
        Decimal("0.12345678901"),
        Decimal("1E-256"),
        {"n" * 256: 1},
        "\ud800",
    ],
    ids=lambda value: f"{value!r:.30}".encode("ascii", "replace").decode(),
)
def test_a_header_out_of_its_range_is_a_value_error(value: Any) -> None:
    for table in ({"k": value}, {"k": [value]}, {"k": {"k": value}}):
        with pytest.raises(ValueError, match=r"."):
            encode_table(table)


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, bytearray(b"x")])
def test_a_header_of_a_foreign_type_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=type(value).__name__):
        encode_table({"k": [value]})


def test_a_short_string_has_at_most_255_bytes() -> None:
    assert short(b"a" * 255) == b"\xff" + b"a" * 255
    with pytest.raises(ValueError, match="256"):
        short(b"a" * 256)
    with pytest.raises(ValueError, match="256"):
        encode(Properties(correlation_id=b"a" * 256))
    with pytest.raises(ValueError, match="256"):
        encode_table({"a" * 256: 1})


# Depth.


def nested(depth: int, wrap: Callable[[Any], Any], core: Any) -> Any:
    for _ in range(depth):
        core = wrap(core)
    return core


wraps = pytest.mark.parametrize(
    "wrap", [lambda core: [core], lambda core: {"k": core}, lambda core: [{"k": core}]], ids=["array", "table", "both"]
)


@wraps
@pytest.mark.parametrize("core", [[], {}, 1])
def test_what_can_be_written_can_be_read_at_every_depth(wrap: Callable[[Any], Any], core: Any) -> None:
    written = 0
    for depth in range(2 * MAX_DEPTH):
        table = {"k": nested(depth, wrap, core)}
        try:
            raw = encode(Properties(headers=table))
        except ValueError as error:
            assert "nested" in str(error)  # noqa: PT017 - whether it is raised depends on the depth
            continue
        written = depth
        assert decode(raw).headers == table
    per_wrap = 2 if isinstance(wrap(0), list) and isinstance(wrap(0)[0], dict) else 1
    assert written == (MAX_DEPTH - (core != 1)) // per_wrap


def raw_nested(depth: int, kind: bytes) -> bytes:
    """Entries of a table that holds a value nested so deep, whatever that takes."""
    inner = b""
    name = b"\x01k" if kind == b"F" else b""
    for _ in range(depth):
        inner = name + kind + struct.pack(">I", len(inner)) + inner
    return inner if name else b"\x01k" + inner


@pytest.mark.parametrize("kind", [b"A", b"F"])
def test_what_is_nested_too_deep_is_malformed(kind: bytes) -> None:
    read_table(raw_nested(MAX_DEPTH, kind))
    for depth in (MAX_DEPTH + 1, MAX_DEPTH + 2, 2000):  # the last would exhaust Python's stack
        with pytest.raises(MalformedProperties, match="nested"):
            read_table(raw_nested(depth, kind))


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested"):
        encode_table({"k": endless})


# Damage.

RICH = Properties(
    content_type=b"application/json",
    content_encoding=b"",
    headers={
        "t": True,
        "l": -5,
        "S": "text",
        "x": b"\xff\xfe",
        "d": 2.5,
        "D": Decimal("1.25"),
        "V": None,
        "T": datetime(2024, 5, 6, tzinfo=UTC),
        "A": [1, [None, "two"], {"three": [3.0]}],
        "F": {"x-death": [{"reason": "expired", "count": 1}]},
    },
    delivery_mode=2,
    priority=9,
    correlation_id=b"\x00\xff opaque",
    reply_to=b"amq.gen-reply",
    expiration=b"60000",
    message_id=b"m",
    timestamp=1_700_000_000,
    type=b"add",
    user_id=b"guest",
    app_id=b"app",
    cluster_id=b"c",
)


def entry_ends(raw: bytes) -> list[int]:
    """Where one entry of a table's bytes ends and the next begins, as far as pamqp says."""
    ends, at = [], 0
    while at < len(raw):
        at += 1 + raw[at]
        at += pamqp_decode.embedded_value(raw[at:])[0]
        ends.append(at)
    return ends


def test_every_shortened_form_is_malformed() -> None:
    raw = encode(RICH)
    assert_same(decode(raw), RICH)
    for end in range(len(raw)):
        with pytest.raises(MalformedProperties):
            decode(raw[:end])


def test_every_table_cut_between_two_values_has_the_values_before() -> None:
    assert RICH.headers is not None
    raw = encode_table(RICH.headers)[4:]
    ends = entry_ends(raw)
    for end in range(1, len(raw)):
        if end in ends:
            assert read_table(raw[:end]) == dict(list(RICH.headers.items())[: ends.index(end) + 1])
        else:
            with pytest.raises(MalformedProperties):
                read_table(raw[:end])


@dozens
@given(st.binary(min_size=1, max_size=20))
def test_every_lengthened_form_is_malformed(more: bytes) -> None:
    for properties in (RICH, Properties(), Properties(headers={})):
        with pytest.raises(MalformedProperties):
            decode(encode(properties) + more)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80",
        b"\x00\x01",  # a second word of flags, which no property of AMQP 0-9-1 needs
        b"\x00\x02",
        b"\x80\x03\x00",
        struct.pack(">H", CONTENT_TYPE),
        struct.pack(">HB", CONTENT_TYPE, 255),
        struct.pack(">HB", CONTENT_TYPE | CORRELATION_ID, 255) + bytes(20),
        struct.pack(">HB", CONTENT_TYPE | HEADERS, 255),
        struct.pack(">HB", CONTENT_TYPE | TIMESTAMP, 255),
        struct.pack(">H", DELIVERY_MODE | PRIORITY) + b"\x01",
        struct.pack(">H", TIMESTAMP) + bytes(7),
        struct.pack(">H", CLUSTER_ID) + b"\x02a",
        struct.pack(">HH", HEADERS, 0),
        struct.pack(">HI", HEADERS, 1),
        struct.pack(">HI", HEADERS, 2**32 - 1),
        properties_of(b"\x01"),
        properties_of(b"\xff"),
        properties_of(b"\x01k"),
        properties_of(b"\x01kS"),
        properties_of(b"\x01kl\x00"),
        properties_of(b"\x01kI\x00\x00\x00"),
        properties_of(b"\x01kD\x00\x00\x00\x00"),
        properties_of(b"\x01kT\x00\x00\x00\x00"),
        properties_of(b"\x01kS\xff\xff\xff\xff"),
        properties_of(b"\x01kx\xff\xff\xff\xff"),
        properties_of(b"\x01kA\xff\xff\xff\xff"),
        properties_of(b"\x01kF\xff\xff\xff\xff"),
        properties_of(b"\x01kA\x00\x00\x00\x01I\x00\x00\x00\x00"),  # a value longer than its array
        properties_of(b"\x01kA\x00\x00\x00\x01B\x00V"),  # the same, and what it holds would be an entry
        properties_of(b"\x01kF\x00\x00\x00\x02\x01aV"),
        struct.pack(">H", HEADERS | CONTENT_TYPE) + b"\x01j\x00\x00\x00\x02\x01kV",
        struct.pack(">HI", HEADERS | PRIORITY, 3) + b"\x01kB\x05",  # the table's last value is not in the table
    ],
    ids=repr,
)
def test_bytes_that_are_not_properties_are_malformed(raw: bytes) -> None:
    with pytest.raises(MalformedProperties):
        decode(raw)


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    raw = bytearray(draw(whole))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        match draw(st.sampled_from(("flip", "set", "kind", "insert", "delete", "length"))):
            case "flip" if at < len(raw):
                raw[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if at < len(raw):
                raw[at] = draw(octets)
            case "kind" if at < len(raw):
                raw[at] = draw(st.sampled_from(KINDS))
            case "insert":
                raw[at:at] = draw(st.binary(max_size=6))
            case "delete":
                del raw[at : at + draw(st.integers(1, 6))]
            case "length":
                raw[at : at + 4] = struct.pack(">I", draw(st.integers(0, 40) | st.integers(0, 2**32 - 1)))
    return bytes(raw)


pieces_of_tables = st.one_of(
    st.sampled_from([b"\x01", b"\x01k", b"\x00", b"\xff"]),
    st.sampled_from([bytes((kind,)) for kind in KINDS]),
    st.integers(0, 30).map(lambda length: struct.pack(">I", length)),
    st.binary(max_size=9),
)
loose_tables = st.lists(pieces_of_tables, max_size=30).map(b"".join).map(properties_of)


@settings(dozens, max_examples=400)
@given(damaged(st.just(encode(RICH))) | damaged(our_properties.map(encode)) | loose_tables | st.binary(max_size=200))
def test_damaged_properties_are_malformed_or_a_value_and_nothing_else(raw: bytes) -> None:
    try:
        found = decode(raw)
    except MalformedProperties:
        return
    for name in STRINGS:
        value = getattr(found, name)
        assert value is None or (type(value) is bytes and len(value) <= 255)
    try:
        again = encode(found)
    except ValueError:  # a time past all numbers, or a name that grew by what stands for its bytes
        assume(False)
    assert_same(decode(again), found)


def test_a_header_as_long_as_a_frame_takes_one_step_for_each_byte() -> None:
    many = b"A" + struct.pack(">I", 100_000) + b"V" * 100_000
    assert read_table(b"\x01k" + many) == {"k": [None] * 100_000}
    with pytest.raises(MalformedProperties):
        read_table(b"\x01k" + many[:-1] + b"?")
