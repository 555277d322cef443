"""The wire contract: what is written is read as what it was, and what is no message is refused by name."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import enum
import itertools
import json
import math
import re
import struct
import uuid
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, RootModel, Secret, SecretBytes, SecretStr, field_serializer

from rpcq.errors import InvalidParams, InvalidReply, NotSerializable, TooLarge
from rpcq.options import MAX_HEADERS
from rpcq.wire import bodies, control, replies, requests
from rpcq.wire import properties as amqp
from rpcq.wire.bodies import JSON
from rpcq.wire.properties import MalformedProperties, Properties
from rpcq.wire.replies import ERROR, RESULT, Notice, Reply, ReplyEncoder
from rpcq.wire.requests import Request, RequestEncoder

dozens = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.text(alphabet="ABCxyz019_-", min_size=1, max_size=100)
IDS = st.binary(min_size=1, max_size=255)
MILLISECONDS = st.integers(min_value=0, max_value=2**62)
HEADERS = st.dictionaries(
    st.text(max_size=12).map(lambda it: f"x-{it}") | st.sampled_from(["x-death", requests.ATTEMPT, requests.DEADLINE]),
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=10) | st.just([{"reason": "x"}]),
    max_size=3,
)
SHORTS = st.none() | st.binary(max_size=40)
DEATH = {"x-death": [{"reason": "expired", "queue": "rpcq.req.a", "count": 1}]}
OWN = b"amq.gen-own"
"""The reply queue of the client that reads."""


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Item(BaseModel):
    sku: str = Field(alias="stockKeepingUnit")
    price: float | None = None


class Number(RootModel[float]):
    """A number alone."""


class Blob(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    data: bytes


class SilentBlob(BaseModel):
    data: bytes


class Exploding(BaseModel):
    x: int = 1

    @field_serializer("x")
    def explode(self, value: int) -> int:
        raise RuntimeError(str(value))


@dataclasses.dataclass
class Point:
    x: float
    y: int = 0


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def params(*args: Any, **named: Any) -> bytes:
    return bodies.encode_params(args, named, 1024)


# JSON.


@dozens
@given(JSON_VALUES)
def test_json_values_come_back_as_they_were(value: Any) -> None:
    assert bodies.loads(bodies.dumps(value)) == value
    assert json.loads(bodies.dumps(value)) == value


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**64), 10**100, 10**4000])
def test_integers_beyond_64_bits_survive(number: int) -> None:
    assert bodies.loads(bodies.dumps({"n": number})) == {"n": number}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "around",
    [
        float,
        lambda it: [it],
        lambda it: {"a": {"b": (1, it)}},
        Point,
        lambda it: [None, Point(it)],
        lambda it: Item(stockKeepingUnit="a", price=it),
        lambda it: {"a": [Item(stockKeepingUnit="NaN", price=it)]},
        Number,
    ],
)
def test_numbers_that_json_does_not_have_are_refused_wherever_they_stand(number: float, around: Any) -> None:
    with pytest.raises(ValueError, match="NaN and Infinity are not JSON"):
        bodies.dumps(around(number))


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "-Infinity",
        {"NaN": "Infinity"},
        ["NaN", None],
        'a "NaN" in quotes',
        None,
        [None],
        Decimal("NaN"),
        Item(stockKeepingUnit="Infinity"),
    ],
)
def test_the_names_of_such_numbers_may_stand_in_strings(value: Any) -> None:
    assert json.loads(bodies.dumps(value)) is None or json.loads(bodies.dumps(value))


@dozens
@given(st.text(), st.sampled_from(["NaN", "Infinity", "-Infinity", ",NaN]", '"NaN', "\\NaN"]), st.text())
def test_text_around_such_a_name_changes_nothing(before: str, name: str, after: str) -> None:
    value = {before: [before + name + after, name]}
    assert bodies.loads(bodies.dumps(value)) == value


@pytest.mark.parametrize(
    "text",
    [b"", b" ", b"{", b"[1,]", b"1,2", b"1 2", b"nul", b"'a'", b"NaN", b"[Infinity]", b"\xff", b'"\xff"', b'"\\ud800"'],
)
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"\A."):
        bodies.loads(text)


@pytest.mark.parametrize("number", [b"1e400", b"-1E+400", b"123456.7e999", b"1" + b"0" * 400 + b".5"])
@pytest.mark.parametrize("around", [b"%b", b"[%b]", b'{"a": [{"b": %b}]}'])
def test_a_number_beyond_a_float_is_refused_and_never_infinite(number: bytes, around: bytes) -> None:
    with pytest.raises(ValueError, match=r"a number is beyond the range of a float, about 1\.8e308"):
        bodies.loads(around.replace(b"%b", number))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"1e-400", 0.0),
        (b"0e999", 0.0),
        (b"[1e308, 1e-400]", [1e308, 0.0]),
        (b'{"1e400": "1e400"}', {"1e400": "1e400"}),
        (b"1" + b"0" * 400, 10**400),
    ],
)
def test_numbers_that_only_look_so_are_read(text: bytes, value: Any) -> None:
    assert bodies.loads(text) == value


@pytest.mark.parametrize("text", [b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000])
def test_json_nested_100_000_deep_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="recursion limit"):
        bodies.loads(text)


# Parameters.


@pytest.mark.parametrize(
    ("args", "named", "body"),
    [
        ((), {}, b"{}"),
        ((), {"x": 1, "y": "é"}, '{"x":1,"y":"é"}'.encode()),
        ((1,), {}, b"1"),
        ((1.5,), {}, b"1.5"),
        ((True,), {}, b"true"),
        ((None,), {}, b"null"),
        (("a",), {}, b'"a"'),
        ((Level.HIGH,), {}, b"3"),
        (([1, 2],), {}, b"[[1,2]]"),
        (((),), {}, b"[[]]"),
        (({"a": 1},), {}, b'[{"a":1}]'),
        ((date(2026, 1, 2),), {}, b'["2026-01-02"]'),
        ((1, "a"), {}, b'[1,"a"]'),
        ((None, None), {}, b"[null,null]"),
    ],
)
def test_parameters_are_an_object_by_name_an_array_by_position_and_a_lone_scalar_bare(
    args: tuple[Any, ...], named: dict[str, Any], body: bytes
) -> None:
    assert bodies.encode_params(args, named, 1024) == body


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05Z"),
        (date(2026, 1, 2), "2026-01-02"),
        (timedelta(seconds=90), "PT1M30S"),
        (Decimal("1.10"), "1.10"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Colour.RED, "red"),
        (b"bytes", "Ynl0ZXM="),
        (b"\xfb\xff", "-_8="),
        (bytes(range(256)), base64.urlsafe_b64encode(bytes(range(256))).decode()),
        (bytearray(b"\xff"), "_w=="),
        ([{"a": (b"\xff", None)}], [{"a": ["_w==", None]}]),
        ({b"\xff": 1}, {"_w==": 1}),
        (Blob(data=b"\xff"), {"data": "_w=="}),
        (Item(stockKeepingUnit="a", price=1.5), {"stockKeepingUnit": "a", "price": 1.5}),
        (Point(1.5, 2), {"x": 1.5, "y": 2}),
        ({7}, [7]),
        (frozenset({7}), [7]),
        ((1, 2), [1, 2]),
        ({1: "a"}, {"1": "a"}),
        pytest.param((it for it in (1, 2)), [1, 2], id="generator"),
    ],
    ids=repr,
)
def test_python_values_are_written_as_pydantic_writes_them(value: Any, text: Any) -> None:
    assert json.loads(params(x=value)) == {"x": text}


def _fails() -> Any:
    yield 1
    raise KeyError("x")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (object, "object"),
        (lambda: print, "builtin_function_or_method"),
        (lambda: range(3), "range"),
        (lambda: memoryview(b"a"), "memoryview"),
        (lambda: SilentBlob(data=b"\xff"), "SilentBlob"),
        (lambda: "half a \ud800 pair", "str"),
        (lambda: math.nan, "float"),
        (lambda: -math.inf, "float"),
        (lambda: {"a": [math.inf]}, "dict"),
        (lambda: Item(stockKeepingUnit="a", price=math.nan), "Item"),
        (Exploding, "Exploding"),
        (lambda: nested(100_000), "list"),
        (lambda: SecretStr("s3cr3t"), "SecretStr"),
        (lambda: [{"a": SecretBytes(b"s3cr3t")}], "list"),
        (lambda: {1: Secret[int](5)}, "dict"),
        (lambda: 10**4300, "int"),
        (lambda: {"a": [-(10**5000)]}, "dict"),
    ],
)
def test_a_parameter_that_json_cannot_carry_is_named_with_its_type(make: Any, kind: str) -> None:
    with pytest.raises(NotSerializable, match=rf"JSON cannot carry parameter 'bad', a {kind}: ") as caught:
        params(good=1, also=None, bad=make())
    assert isinstance(caught.value, TypeError)
    assert caught.value.executed == "no"
    with pytest.raises(NotSerializable, match=f"JSON cannot carry parameter 1, a {kind}: "):
        params("good", make(), None)
    with pytest.raises(NotSerializable, match=f"JSON cannot carry parameter 0, a {kind}: "):
        params(make())


def test_a_parameter_that_is_a_secret_is_told_with_its_mend_and_without_its_value() -> None:
    with pytest.raises(NotSerializable) as caught:
        params(user="a", password=SecretStr("s3cr3t"))
    said = (
        "parameter 'password', a SecretStr: a secret would arrive as asterisks; pass secret.get_secret_value() instead"
    )
    assert said in str(caught.value)
    assert "s3cr3t" not in repr(caught.value) + repr(caught.value.__cause__)
    assert params(password=SecretStr("s3cr3t").get_secret_value()) == b'{"password":"s3cr3t"}'


def test_a_parameter_of_asterisks_is_sent() -> None:
    assert params(x="**********", y=["**"]) == b'{"x":"**********","y":["**"]}'


def test_bytes_of_a_class_that_writes_them_as_text_are_refused_with_their_mend() -> None:
    with pytest.raises(NotSerializable, match=r"invalid utf-8 .*needs ConfigDict\(ser_json_bytes='base64'"):
        params(x=SilentBlob(data=b"\xff"))


def test_the_longest_integer_that_is_read_is_written() -> None:
    longest = 10**4300 - 1
    assert bodies.loads(bodies.encode_params(([longest],), {}, 5000)) == [[longest]]
    with pytest.raises(NotSerializable, match="an integer of more than 4300 digits cannot be read"):
        bodies.encode_params(([longest + 1],), {}, 5000)


def test_a_list_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(NotSerializable, match="parameter 'x', a list"):
        params(x=loop)


def test_a_culprit_that_is_gone_when_it_is_looked_for_is_refused_all_the_same() -> None:
    with pytest.raises(NotSerializable, match=r"JSON cannot carry the parameters: .*KeyError"):
        params(x=_fails())


def test_parameters_by_position_and_by_name_are_refused() -> None:
    with pytest.raises(InvalidParams, match="by position or by name, not both"):
        params(1, y=2)


def test_a_body_may_have_as_many_bytes_as_the_limit_and_no_more() -> None:
    assert len(bodies.encode_params(("é" * 10,), {}, 22)) == 22
    with pytest.raises(TooLarge, match=r"22 bytes of JSON; the limit is 21 \(max_body\)"):
        bodies.encode_params(("é" * 10,), {}, 21)


# Requests.


@pytest.mark.parametrize(
    ("method", "key", "attempt", "metadata", "notify"),
    list(itertools.product(["add", ""], [None, "k-1"], [1, 3], [{}, {"x-tenant": "a", "x-é": ""}], [True, False])),
)
def test_a_request_is_read_as_it_was_written(
    method: str, key: str | None, attempt: int, metadata: dict[str, str], notify: bool
) -> None:
    headers = requests.encode_headers(key=key, attempt=attempt, metadata=metadata)
    data = RequestEncoder("amq.gen-é", "shop").encode(b"id-1", method.encode(), 5000, 1_700_000, headers, notify=notify)
    assert amqp.decode(data) == Properties(
        content_type=JSON,
        headers={
            **({"CC": ["amq.gen-é"]} if notify else {}),
            requests.DEADLINE: 1_700_000 if notify else "0000001700000",
            requests.TIMEOUT: 5000,
            **metadata,
            **({requests.KEY: key} if key else {}),
            **({requests.ATTEMPT: attempt} if attempt > 1 else {}),
        },
        delivery_mode=1,
        correlation_id=b"id-1",
        reply_to="amq.gen-é".encode(),
        expiration=b"4500",
        type=method.encode() or None,
        app_id=b"shop",
    )
    request = requests.read_request(data)
    assert (request.correlation_id, request.reply_to) == (b"id-1", "amq.gen-é".encode())
    assert (request.method, request.app_id, request.problem) == (method or None, "shop", "")
    assert (request.deadline_ms, request.timeout_ms) == (1_700_000, 5000)
    assert (request.idempotency_key, request.attempt, request.metadata) == (key, attempt, metadata)


@dozens
@given(IDS, NAMES, MILLISECONDS, MILLISECONDS, st.text(max_size=60), NAMES, st.booleans(), st.booleans())
def test_any_request_is_read_as_it_was_written(
    correlation_id: bytes, method: str, left: int, deadline: int, reply_to: str, app_id: str, notify: bool, reads: bool
) -> None:
    encoder = RequestEncoder(reply_to, app_id, batches=reads)
    data = encoder.encode(correlation_id, method.encode(), left, deadline, b"", notify=notify)
    expected = Request(correlation_id, reply_to.encode(), method, deadline, left, app_id, has_copy=notify)
    expected.reads_batches = notify and reads  # said only to workers of rpcq
    found = amqp.decode(data)
    seen = requests.read_request(data)
    assert seen == expected if not seen.headers else dataclasses.replace(expected, headers=found.headers)
    assert requests.read_request(amqp.encode(dataclasses.replace(found, message_id=b"m"))) == dataclasses.replace(
        expected, headers=found.headers
    )


@pytest.mark.parametrize(("value", "reads"), [(True, True), (False, False), (1, False), ("true", False), (None, False)])
def test_a_client_reads_batches_if_it_says_so_with_a_boolean(value: Any, reads: bool) -> None:
    assert read(headers={requests.BATCHES: value}).reads_batches is reads


@pytest.mark.parametrize(
    ("left", "expiration"),
    [(1, b"1"), (0, b"1"), (5, b"5"), (10, b"9"), (1000, b"900"), (10_000, b"9000"), (30_000, b"29000")],
)
def test_a_request_expires_early_enough_for_the_notice_to_arrive_before_the_deadline(
    left: int, expiration: bytes
) -> None:
    data = RequestEncoder("q", "a").encode(b"i", b"m", left, 1, b"", notify=True)
    assert amqp.decode(data).expiration == expiration


def test_names_of_255_bytes_fit_and_longer_ones_are_refused() -> None:
    assert RequestEncoder("q" * 255, "a").encode(b"i" * 255, b"m" * 255, 1, 1, b"", notify=True)
    with pytest.raises(ValueError, match="255"):
        RequestEncoder("q" * 256, "a")


def test_headers_may_have_8_kib_together_and_no_more() -> None:
    fits = MAX_HEADERS - len(b"\x03x-aS....")
    assert len(requests.encode_headers(key=None, attempt=1, metadata={"x-a": "v" * fits})) == MAX_HEADERS
    with pytest.raises(TooLarge, match="the headers are 8193 bytes; the limit is 8192"):
        requests.encode_headers(key=None, attempt=1, metadata={"x-a": "v" * (fits + 1)})
    with pytest.raises(TooLarge, match="the limit is 8192"):
        requests.encode_headers(key="k" * 200, attempt=2, metadata={"x-a": "v" * (fits - 100)})


def read(**fields: Any) -> Request:
    return requests.read_request(amqp.encode(Properties(**fields)))


def test_a_request_of_a_plain_client_says_nothing_and_is_no_problem() -> None:
    assert read() == Request(b"", b"", None)
    assert read(reply_to=b"q", correlation_id=b"\xff\x00", delivery_mode=2).correlation_id == b"\xff\x00"


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        b"application/json",
        b"Application/JSON",
        b"application/json; charset=utf-8",
        b'application/json;charset="UTF-8"',
        b"application/json; charset=utf8",
        b"application/json; profile=x; charset=us-ascii",
        b"",
        b"text/plain",
        b"Text/Plain; charset=UTF-8; format=flowed",
        b"application/octet-stream",
        b"application/data",
    ],
)
def test_json_is_read_however_its_content_type_is_written(content_type: bytes | None) -> None:
    for encoding in (None, b"", b"utf-8", b"UTF8", b"binary", b"identity"):
        assert read(content_type=content_type, content_encoding=encoding).problem == ""
        data = amqp.encode(Properties(content_type=content_type, content_encoding=encoding, correlation_id=b"id"))
        reply = replies.read_reply(data, b"1", OWN)
        assert isinstance(reply, Reply)
        assert replies.read_body(reply) == 1


@pytest.mark.parametrize(
    "content_type",
    [
        b"application/msgpack",
        b"application/x-python-serialize",
        b"application/json; charset=latin-1",
        b"text/plain; charset=utf-8; charset=utf-16",
        b"text/html",
        b"application/jsonp",
        b"\xff",
    ],
)
def test_other_content_types_are_refused_by_name(content_type: bytes) -> None:
    said = content_type.decode("utf-8", "replace")
    assert read(content_type=content_type).problem == f"the content type must be application/json; got {said!r}"
    reply = replies.read_reply(amqp.encode(Properties(content_type=content_type)), b"1", OWN)
    assert isinstance(reply, Reply)
    with pytest.raises(InvalidReply, match="the content type must be application/json; got ") as caught:
        replies.read_body(reply)
    assert repr(said) in str(caught.value)
    assert "its body is '1'" in str(caught.value)


@pytest.mark.parametrize("content_type", [None, JSON, b"text/plain"])
@pytest.mark.parametrize("encoding", [b"gzip", b"GZIP", b"deflate", b"utf-16", b"base64", b"\xff"])
def test_an_encoded_body_is_refused_by_name(content_type: bytes | None, encoding: bytes) -> None:
    said = f"the body must have no content encoding; got {encoding.decode('utf-8', 'replace')!r}"
    assert read(content_type=content_type, content_encoding=encoding).problem == said
    data = amqp.encode(Properties(content_type=content_type, content_encoding=encoding))
    reply = replies.read_reply(data, b"1", OWN)
    assert isinstance(reply, Reply)
    with pytest.raises(InvalidReply, match=re.escape(said)):
        replies.read_body(reply)


def test_the_method_may_be_in_a_header_which_counts_before_the_type() -> None:
    assert read(headers={requests.METHOD: "add"}).method == "add"
    assert read(headers={requests.METHOD: "add"}, type=b"call").method == "add"
    assert read(headers={requests.METHOD: ""}, type=b"call").method == "call"
    strange = read(headers={requests.METHOD: 5}, type=b"call")
    assert (strange.method, strange.problem) == (None, "the header rpcq-method must be a string; got 5")


def test_a_request_without_a_correlation_id_has_its_message_id() -> None:
    assert read(message_id=b"m").correlation_id == b"m"
    assert read(message_id=b"m", correlation_id=b"").correlation_id == b"m"
    assert read(message_id=b"m", correlation_id=b"c").correlation_id == b"c"


def test_headers_that_are_nested_too_deep_are_a_problem_and_all_else_is_read() -> None:
    data = deep_headers(correlation_id=b"id", reply_to=b"amq.gen-1", type=b"add")
    request = requests.read_request(data)
    assert request.problem == "headers must be nested at most 16 deep"
    assert (request.correlation_id, request.reply_to, request.method) == (b"id", b"amq.gen-1", "add")
    assert request.has_copy
    assert request.metadata == {"x-user": "ada"}


def deep_headers(**properties: Any) -> bytes:
    """Properties with headers that `amqp.encode` refuses to write: a table, 40 tables deep, and a few others."""
    value = b""
    for _ in range(40):
        value = b"\x01aF" + struct.pack(">I", len(value)) + value
    entries = amqp.encode_table({"CC": ["amq.gen-1"], "x-user": "ada"})[4:] + value
    flat = amqp.encode(Properties(headers={}, **properties))
    return flat[:2] + struct.pack(">I", len(entries)) + entries + flat[6:]  # after the flags


def test_a_reply_whose_headers_are_nested_too_deep_is_read_without_them() -> None:
    data = deep_headers(correlation_id=b"id")
    reply = replies.read_reply(data, b"1", OWN)
    assert reply == Reply(b"id", RESULT, b"1")
    assert replies.read_times(reply) is None
    assert replies.read_reply(deep_headers(correlation_id=b"id", reply_to=OWN), b"1", OWN) is None


@pytest.mark.parametrize("name", [requests.DEADLINE, requests.TIMEOUT])
@pytest.mark.parametrize("value", [1.5, "5000.0", "-1", "", "٣", True, b"\xff", [1], datetime(2026, 1, 1, tzinfo=UTC)])
def test_times_that_are_no_whole_numbers_are_refused_by_name(name: str, value: Any) -> None:
    assert f"the header {name} must be a whole number of milliseconds; got " in read(headers={name: value}).problem


@pytest.mark.parametrize("kind", ["b", "B", "s", "u", "I", "i", "l", "L"])
def test_times_may_have_any_integer_type_of_amqp(kind: str) -> None:
    layout = {"b": ">b", "B": ">B", "s": ">h", "u": ">H", "I": ">i", "i": ">I", "l": ">q", "L": ">q"}[kind]
    entry = amqp.short(requests.TIMEOUT.encode()) + kind.encode() + struct.pack(layout, 100)
    data = struct.pack(">HI", amqp.HEADERS, len(entry)) + entry
    assert (requests.read_request(data).timeout_ms, requests.read_request(data).problem) == (100, "")


def test_times_may_be_strings_of_digits() -> None:
    found = read(headers={requests.DEADLINE: "1700000005000", requests.TIMEOUT: "5000"})
    assert (found.deadline_ms, found.timeout_ms, found.problem) == (1_700_000_005_000, 5000, "")


def test_a_request_to_a_queue_has_only_types_of_headers_that_old_clients_know() -> None:
    more = requests.encode_headers(key="k", attempt=3, metadata={"x-a": "b"}, trace={"traceparent": "00-1-2-01"})
    data = RequestEncoder("amq.gen-1", "app").encode(b"id", b"add", 5000, 1_700_000_005_000, more, notify=False)
    kinds = types_in(data)
    assert set(kinds.values()) == {"S", "I"}
    assert kinds[requests.DEADLINE] == "S"
    assert kinds[requests.TIMEOUT] == kinds[requests.ATTEMPT] == "I"


def types_in(data: bytes) -> dict[str, str]:
    """The types of the headers `S`, `I` and `l`, by name, read by hand."""
    at = 3 + data[2]
    end = at + 4 + int.from_bytes(data[at : at + 4], "big")
    at += 4
    found = {}
    while at < end:
        name_end = at + 1 + data[at]
        kind = chr(data[name_end])
        found[data[at + 1 : name_end].decode()] = kind
        at = name_end + 1
        at += {"I": 4, "l": 8}[kind] if kind != "S" else 4 + int.from_bytes(data[at : at + 4], "big")
    assert at == end
    return found


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True, None])
def test_an_attempt_that_is_no_whole_number_from_1_is_refused(value: Any) -> None:
    problem = read(headers={requests.ATTEMPT: value}).problem
    assert problem == f"the header {requests.ATTEMPT} must be a whole number of at least 1; got {value!r}"


@pytest.mark.parametrize("value", ["", "k" * 256, "é" * 128, 5, b"\xff"])
def test_an_idempotency_key_that_is_no_string_of_1_to_255_bytes_is_refused(value: Any) -> None:
    problem = read(headers={requests.KEY: value}).problem
    assert f"the header {requests.KEY} must be a string of 1 to 255 bytes; got " in problem
    assert len(problem) < 200


def test_a_type_that_is_no_text_is_no_method_and_nothing_worse() -> None:
    assert read(type=b"\xff").method == "\ufffd"
    assert read(type=b"").method is None


def test_headers_that_rabbitmq_owns_and_other_values_are_never_shown_as_metadata() -> None:
    mine = {"x-tenant": "a", "x-deathly": "b", "x-": ""}
    owned = ["x-death", "x-first-death-queue", "x-last-death-reason", "x-delivery-count", "x-opt-a", "x-acquired-count"]
    others = {"x-number": 5, "x-raw": b"\xff", "tenant": "c", "CC": ["q"], "traceparent": "00-1"}
    assert read(headers=mine | dict.fromkeys(owned, "forged") | others).metadata == mine


@pytest.mark.parametrize("metadata", [{}, {"x-a": "b"}])
def test_the_user_of_the_broker_stands_beside_the_clients_own_name(metadata: dict[str, str]) -> None:
    headers = requests.encode_headers(key=None, attempt=1, metadata=metadata)
    known = RequestEncoder("amq.gen-1", "shop", "billing").encode(b"id", b"add", 5000, 10**12, headers, notify=True)
    assert amqp.decode(known).user_id == b"billing"
    request, anonymous = requests.read_request(known), requests.read_request(_REQUEST)
    assert (request.user, request.app_id, request.method, request.metadata) == ("billing", "shop", "add", metadata)
    assert (anonymous.user, anonymous.app_id, amqp.decode(_REQUEST).user_id) == ("", "shop", None)


@dozens
@given(st.binary(max_size=80))
def test_whatever_bytes_a_request_has_they_are_read_or_malformed(data: bytes) -> None:
    for noise in (data, _REQUEST[: len(data)] + data, requests._FAST_START + data, requests._FAST_START_NAMED + data):
        with contextlib.suppress(MalformedProperties):
            assert isinstance(requests.read_request(noise), Request)


_REQUEST = RequestEncoder("amq.gen-1", "shop").encode(b"id", b"add", 5000, 10**12, b"", notify=True)
_READS = RequestEncoder("amq.gen-1", "shop", batches=True).encode(b"id", b"add", 5000, 10**12, b"", notify=True)
_KNOWN = RequestEncoder("amq.gen-1", "shop", "billing").encode(b"id", b"add", 5000, 10**12, b"", notify=True)
_REPLY = ReplyEncoder().encode(RESULT, b"id", 1.0, 2.0)


@pytest.mark.parametrize("data", [_REQUEST, _READS, _KNOWN, _REPLY])
def test_properties_that_end_early_or_go_on_too_long_are_malformed(data: bytes) -> None:
    reader = requests.read_request if data is not _REPLY else lambda it: replies.read_reply(it, b"", OWN)
    assert reader(data)
    for end in range(len(data)):
        with pytest.raises(MalformedProperties):
            reader(data[:end])
    with pytest.raises(MalformedProperties):
        reader(data + b"\x00")


@dozens
@given(st.data())
def test_flipped_bytes_of_a_request_are_read_as_the_slow_way_reads_them_or_malformed(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from([_REQUEST, _READS])))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        fast = requests.read_request(bytes(raw))
        found = amqp.decode(bytes(raw))
    except MalformedProperties:
        return
    headers = found.headers or {}
    assert fast.correlation_id == (found.correlation_id or b"")
    assert fast.reply_to == (found.reply_to or b"")
    assert (fast.method or "").encode() == (found.type or b"") or fast.headers
    assert (fast.deadline_ms, fast.timeout_ms) == (headers.get(requests.DEADLINE), headers.get(requests.TIMEOUT))
    assert fast.reads_batches is (headers.get(requests.BATCHES) is True)


# Replies.


@dozens
@given(st.sampled_from([RESULT, ERROR]), st.none() | IDS, st.none() | st.floats(0), st.floats(0))
def test_a_reply_is_read_as_it_was_written(
    kind: bytes, correlation_id: bytes | None, queue_ms: float | None, handler_ms: float
) -> None:
    data = ReplyEncoder().encode(kind, correlation_id, queue_ms, handler_ms)
    times = {"rpcq-queue-ms": queue_ms, "rpcq-handler-ms": handler_ms}
    assert amqp.decode(data) == Properties(
        content_type=JSON,
        headers=None if queue_ms is None else times,
        delivery_mode=1,
        correlation_id=correlation_id or b"",
        type=kind,
    )
    assert replies.read_reply(data, b"1", OWN) == Reply(correlation_id or b"", kind, b"1")


def _slow(found: Properties, body: bytes | None) -> Reply:
    kind = found.type or RESULT
    body = b"null" if body == b"" and kind == RESULT else body
    return Reply(
        found.correlation_id or b"", kind, body, bodies.why_not_read(found.content_type, found.content_encoding)
    )


@settings(dozens, max_examples=300)
@given(
    st.builds(
        Properties,
        content_type=SHORTS,
        content_encoding=st.none() | st.just(b"identity"),
        headers=st.none() | HEADERS,
        delivery_mode=st.none() | st.just(1),
        priority=st.none() | st.just(5),
        correlation_id=SHORTS,
        reply_to=st.none() | st.just(b"amq.gen-other"),
        message_id=st.none() | st.just(b"m"),
        type=SHORTS,
        app_id=st.none() | st.just(b"a"),
    )
)
@example(Properties(b"", None, {}, 1, correlation_id=b"", type=b""))
@example(Properties(JSON, None, {"x-death": "forged"}, 1, correlation_id=b"x-death", type=RESULT))
@example(Properties(JSON, None, {"x-death": [{"reason": "expired", "queue": "rpcq.once.a"}]}, 1, correlation_id=b"i"))
def test_a_reply_is_read_the_same_whether_the_fast_way_or_the_slow(found: Properties) -> None:
    assert replies.read_reply(amqp.encode(found), b"1", OWN) == _slow(found, b"1")


@pytest.mark.parametrize("more", [{}, {"type": b"add", "content_type": JSON, "delivery_mode": 1, "app_id": b"shop"}])
def test_a_request_that_its_queue_gave_up_is_a_notice(more: dict[str, Any]) -> None:
    data = amqp.encode(Properties(headers=DEATH | {requests.TIMEOUT: 5}, correlation_id=b"id", reply_to=OWN, **more))
    assert replies.read_reply(data, b"{}", OWN) == Notice(b"id", "expired", "rpcq.req.a")


@pytest.mark.parametrize("reply_to", [None, b"", b"amq.gen-other"])
def test_a_reply_of_a_server_that_copies_headers_is_no_notice(reply_to: bytes | None) -> None:
    data = amqp.encode(Properties(headers=DEATH, correlation_id=b"id", reply_to=reply_to))
    assert replies.read_reply(data, b"1", OWN) == Reply(b"id", RESULT, b"1")


@pytest.mark.parametrize("more", [{}, {"headers": {"CC": [OWN.decode()]}}, {"type": RESULT}])
def test_a_copy_of_a_request_of_ones_own_is_never_a_reply(more: dict[str, Any]) -> None:
    data = amqp.encode(Properties(correlation_id=b"id", reply_to=OWN, **more))
    assert replies.read_reply(data, b"1", OWN) is None


def test_a_notice_tells_the_last_death_first() -> None:
    deaths = [{"reason": "delivery_limit", "queue": "rpcq.once.a"}, *DEATH["x-death"]]
    data = amqp.encode(Properties(headers={"x-death": deaths}, reply_to=OWN))
    assert replies.read_reply(data, None, OWN) == Notice(b"", "delivery_limit", "rpcq.once.a")


@pytest.mark.parametrize("death", ["expired", [], ["expired"], [{"reason": "expired"}], [{"reason": 1, "queue": 2}]])
def test_a_death_that_tells_nothing_is_no_notice(death: Any) -> None:
    data = amqp.encode(Properties(headers={"x-death": death}, correlation_id=b"id", reply_to=OWN, type=b"add"))
    assert replies.read_reply(data, b"", OWN) is None


@settings(dozens, max_examples=300)
@given(st.binary(max_size=80))
def test_whatever_bytes_a_reply_has_they_are_read_or_malformed(data: bytes) -> None:
    for noise in (data, _REPLY[:2] + data, _REPLY[: 2 + len(JSON)] + data):
        with contextlib.suppress(MalformedProperties):
            assert isinstance(replies.read_reply(noise, b"", OWN), Reply | Notice | None)


@dozens
@given(st.data())
def test_flipped_bytes_of_a_reply_never_end_in_another_error(data: st.DataObject) -> None:
    raw = bytearray(_REPLY)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        reply = replies.read_reply(bytes(raw), b"1", OWN)
        found = amqp.decode(bytes(raw))
    except MalformedProperties:
        return
    assert reply == _slow(found, b"1")


@pytest.mark.parametrize("kind", [RESULT, ERROR])
def test_the_body_of_a_reply_is_read(kind: bytes) -> None:
    assert replies.read_body(Reply(b"", kind, b'{"a": [1, null]}')) == {"a": [1, None]}


def test_a_reply_without_a_type_counts_as_a_result() -> None:
    data = amqp.encode(Properties(correlation_id=b"id"))
    reply = replies.read_reply(data, b"55", OWN)
    assert reply == Reply(b"id", RESULT, b"55")
    assert replies.read_body(reply) == 55


@pytest.mark.parametrize(("kind", "said"), [(b"item", "'item'"), (b"Result", "'Result'"), (b"\xff", "'\ufffd'")])
def test_a_type_that_this_client_does_not_read_is_refused_by_name(kind: bytes, said: str) -> None:
    with pytest.raises(InvalidReply, match=f"the reply's type must be 'result' or 'error'; got {said}") as caught:
        replies.read_body(Reply(b"", kind, b"1"))
    assert caught.value.executed == "maybe"


@pytest.mark.parametrize(("kind", "executed"), [(RESULT, "yes"), (ERROR, "maybe")])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, r"over the limit \(max_body\)"),
        (b"", "is not JSON"),
        (b"oops", "is not JSON: .*; its body is 'oops' "),
        (b"x" * 300, "is not JSON: .*; its body is 'x{200}'[.]{3} "),
        (b"NaN", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xef\xbb\xbf1", r"is not JSON: it begins with a byte order mark \(U\+FEFF\)"),
        (b"\x1f\x8b\x08", "is not JSON: it is compressed with gzip"),
        (b"1e400", "beyond the range of a float"),
        (b'{"details": [-1E+999]}', "beyond the range of a float"),
    ],
)
def test_a_body_that_cannot_be_read_is_an_invalid_reply_that_says_whether_it_ran(
    kind: bytes, executed: str, body: bytes | None, said: str
) -> None:
    with pytest.raises(InvalidReply, match=said) as caught:
        replies.read_body(Reply(b"", kind, body))
    assert caught.value.executed == executed
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("kind", "executed"), [(RESULT, "yes"), (ERROR, "maybe")])
def test_a_reply_of_another_content_type_says_whether_it_ran(kind: bytes, executed: str) -> None:
    reply = replies.read_reply(amqp.encode(Properties(content_type=b"application/msgpack", type=kind)), b"1", OWN)
    assert isinstance(reply, Reply)
    with pytest.raises(InvalidReply, match="application/msgpack") as caught:
        replies.read_body(reply)
    assert caught.value.executed == executed


def test_an_empty_result_of_a_foreign_server_is_null_and_an_empty_error_is_none() -> None:
    for properties in (Properties(correlation_id=b"id"), Properties(correlation_id=b"id", type=RESULT)):
        reply = replies.read_reply(amqp.encode(properties), b"", OWN)
        assert isinstance(reply, Reply)
        assert replies.read_body(reply) is None
    error = replies.read_reply(amqp.encode(Properties(correlation_id=b"id", type=ERROR)), b"", OWN)
    assert isinstance(error, Reply)
    with pytest.raises(InvalidReply):
        replies.read_body(error)


def test_a_control_message_says_which_call_and_until_when() -> None:
    assert amqp.decode(control.encode_control(control.PING, b"id", b"q")) == Properties(
        delivery_mode=1, correlation_id=b"id", reply_to=b"q", type=b"ping"
    )
    assert amqp.decode(control.encode_control(control.CANCEL, b"id", b"q", 5)).headers == {requests.DEADLINE: 5}
