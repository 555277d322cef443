"""Several replies, or requests, in one message: bytes <-> values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcq.wire import batches, replies, requests
from rpcq.wire.batches import MAX_BATCH, MAX_ENTRY, MAX_REQUESTS, Entry
from rpcq.wire.bodies import LINES
from rpcq.wire.properties import Properties, encode
from rpcq.wire.replies import ERROR, REPLIES, RESULT, Reply
from rpcq.wire.requests import REQUESTS, Request, RequestEncoder

IDS = st.from_regex(rb"[0-9A-Za-z._:-]{1,255}", fullmatch=True)
JSON = st.recursive(st.none() | st.integers() | st.text(), lambda it: st.lists(it, max_size=3), max_leaves=5).map(
    lambda it: json.dumps(it).encode()
)
MS = st.floats(0, 1e9)
ENTRIES = st.lists(st.builds(Entry, IDS, st.sampled_from([RESULT, ERROR]), st.none() | MS, MS, JSON), min_size=1)


def message(body: bytes | None, properties: bytes | None = None) -> Reply:
    properties = batches.write_properties(b"replies-1") if properties is None else properties
    found = replies.read_reply(properties, body, b"amq.gen-1")
    assert isinstance(found, Reply)
    return found


@given(ENTRIES)
def test_replies_are_read_as_they_were_written(entries: list[Entry]) -> None:
    assert all(batches.fits(it.correlation_id, it.body) for it in entries)
    body = batches.write_replies(entries)
    assert len(body) <= sum(it.size for it in entries) + 2
    batch = message(body)
    assert (batch.kind, batch.problem, batch.correlation_id) == (REPLIES, "", b"replies-1")
    found = batches.read_replies(batch)
    assert [(it.correlation_id, it.kind, it.body) for it in found] == [
        (it.correlation_id, it.kind, it.body) for it in entries
    ]
    for entry, reply in zip(entries, found, strict=True):
        times = replies.read_times(reply)
        if entry.queue_ms is None:
            assert times is None
        else:
            assert times == pytest.approx((entry.queue_ms, entry.handler_ms), abs=0.001)


@pytest.mark.parametrize(
    ("correlation_id", "body", "expected"),
    [
        (b"a-1.2:B_", b"1", True),
        (b"", b"1", False),
        (b'a"b', b"1", False),
        (b"a\\", b"1", False),
        (b"a\n", b"1", False),
        ("é".encode(), b"1", False),
        (b"\xff", b"1", False),
        (b"a", b"[1,\n2]", False),
        (b"a", b"1" * MAX_ENTRY, True),
        (b"a", b"1" * (MAX_ENTRY + 1), False),
    ],
)
def test_what_is_large_or_would_have_to_be_escaped_goes_alone(
    correlation_id: bytes, body: bytes, expected: bool
) -> None:
    assert batches.fits(correlation_id, body) is expected


def test_a_message_batch_is_one_by_its_type_and_content_type() -> None:
    for content_type in (b"application/json", b"text/csv", None):
        batch = message(b"[]", encode(Properties(content_type=content_type, type=REPLIES, correlation_id=b"1")))
        assert batch.kind == REPLIES
        if content_type == b"text/csv":
            with pytest.raises(ValueError, match="text/csv"):
                batches.read_replies(batch)
    assert message(b"[]", encode(Properties(content_type=b"application/x-ndjson", type=RESULT))).problem


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (None, "over 65536 bytes"),
        (b"[]" + b"\n" * MAX_BATCH, "over 65536 bytes"),
        (b"", "EOF"),
        (b"nothing", "expected"),
        (b"{}", "it has 0 bodies"),
        (b'[["a","result",1,1]]', "it has 0 bodies"),
        (b'[["a","result",1,1]]\n1\n2', "it has 2 bodies"),
        (b"[5]\n1", "the head of a reply must be"),
        (b'[["a","result"]]\n1', "the head of a reply must be"),
        (b'[["a","result",null,1]]\n1', "the head of a reply must be"),
        (b'[["a","result","1",1]]\n1', "the head of a reply must be"),
        (b'[[1,"result",1,1]]\n1', "the head of a reply must be"),
        (b'[["a",null,1,1]]\n1', "the head of a reply must be"),
        (b'[["a","result",1e999,1]]\n1', "beyond the range of a float"),
    ],
)
def test_what_is_no_message_batch_is_refused_as_a_whole(body: bytes | None, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        batches.read_replies(message(body))


@given(st.binary(max_size=200))
def test_whatever_bytes_a_message_batch_has_they_are_read_or_refused(data: bytes) -> None:
    for body in (data, b'[["a","result",1,1]]\n' + data):
        try:
            found = batches.read_replies(message(body))
        except ValueError:
            continue
        assert len(found) == body.count(b"\n")


@pytest.mark.parametrize("takes", [0, 2, 12, 2**31 - 1])
def test_a_message_with_replies_says_how_many_calls_its_service_takes(takes: int) -> None:
    body = batches.write_replies([Entry(b"a", RESULT, 1.0, 1.0, b"1")])
    assert message(body, batches.write_properties(b"replies-1", takes)).takes == takes
    single = replies.ReplyEncoder().encode(RESULT, b"a", 1.5, 2.5, takes)
    found = replies.read_reply(single, b"1", b"amq.gen-1")
    assert isinstance(found, Reply)
    assert (found.takes, found.correlation_id, found.kind) == (takes, b"a", RESULT)
    assert replies.read_times(found) == (1.5, 2.5)


@pytest.mark.parametrize("value", [-1, 0, "12", 12.0, True, None])
def test_what_is_no_number_of_calls_says_nothing(value: Any) -> None:
    properties = encode(Properties(type=RESULT, correlation_id=b"a", headers={"rpcq-takes": value}))
    found = replies.read_reply(properties, b"1", b"amq.gen-1")
    assert isinstance(found, Reply)
    assert found.takes == 0


# Requests.

USERS = st.sampled_from(["", "shop"])
METHODS = st.from_regex(rb"[A-Za-z0-9_-]{1,100}", fullmatch=True)
HEADERS = st.fixed_dictionaries(
    {}, optional={"rpcq-idempotency-key": st.text(min_size=1, max_size=20), "x-a": st.text(max_size=20)}
)
WRITTEN = st.lists(st.tuples(IDS, METHODS, st.integers(1, 10**9), HEADERS, JSON), min_size=1, max_size=20)


def carrier(user: str = "", **headers: str) -> Request:
    encoder = RequestEncoder("amq.gen-1", "shop", user, batches=True, content_type=LINES)
    further = requests.encode_headers(key=None, attempt=1, metadata=headers) if headers else b""
    found = requests.read_request(encoder.encode(b"batch-1", REQUESTS, 5000, 10**12, further, notify=True))
    assert (found.is_batch, found.problem, found.correlation_id) == (True, "", b"batch-1")
    return found


@given(WRITTEN, USERS, st.booleans())
def test_requests_are_read_as_they_were_written(
    written: list[tuple[bytes, bytes, int, dict[str, str], bytes]], user: str, has_headers: bool
) -> None:
    batch = carrier(user, **({"x-all": "1"} if has_headers else {}))
    heads = [batches.write_head(*it[:4]) for it in written]
    found = batches.read_requests(batch, batches.write_requests(heads, [it[4] for it in written]))
    assert [body for _, body in found] == [it[4] for it in written]
    for (request, _), (correlation_id, method, left_ms, headers, _) in zip(found, written, strict=True):
        assert not request.problem
        assert (request.correlation_id, request.method) == (correlation_id, method.decode())
        assert (request.timeout_ms, request.deadline_ms) == (left_ms, 10**12 - 5000 + left_ms)
        assert request.idempotency_key == headers.get("rpcq-idempotency-key")
        expected = {"x-all": "1"} if has_headers else {}
        assert request.metadata == expected | ({"x-a": headers["x-a"]} if "x-a" in headers else {})
        assert (request.reply_to, request.app_id, request.user) == (b"amq.gen-1", "shop", user)
        assert (request.attempt, request.has_copy, request.reads_batches) == (1, True, True)


def test_requests_of_a_client_that_sends_few_fields_are_read() -> None:
    batch = requests.read_request(encode(Properties(content_type=LINES, type=REQUESTS, reply_to=b"amq.gen-1")))
    assert (batch.is_batch, batch.problem) == (True, "")
    (one, _), (other, body) = batches.read_requests(
        batch, b'[["a",null,500],["b","",600,{"rpcq-method":"add","rpcq-attempt":2}]]\n1\n'
    )
    assert (one.method, one.timeout_ms, one.deadline_ms, one.has_copy, one.reads_batches) == (
        None,
        500,
        None,
        False,
        False,
    )
    assert (other.method, other.timeout_ms, other.attempt, body) == ("add", 600, 2, b"")


@pytest.mark.parametrize(
    ("properties", "is_batch"),
    [
        (Properties(content_type=LINES, type=REQUESTS), True),
        (Properties(content_type=b"application/json", type=REQUESTS), False),
        (Properties(type=REQUESTS), False),
        (Properties(content_type=LINES, type=b"add"), False),
        (Properties(content_type=LINES, content_encoding=b"gzip", type=REQUESTS), False),
    ],
)
def test_requests_are_a_message_batch_by_type_and_content_type_together(properties: Properties, is_batch: bool) -> None:
    found = requests.read_request(encode(properties))
    assert found.is_batch is is_batch
    assert bool(found.problem) is (properties.content_type == LINES and not is_batch)


def test_one_method_called_requests_is_no_message_batch_even_if_a_client_of_rpcq_calls_it() -> None:
    for content_type, method in ((b"application/json", REQUESTS), (LINES, b"add")):
        encoder = RequestEncoder("amq.gen-1", "shop", content_type=content_type)
        found = requests.read_request(encoder.encode(b"id", method, 5000, 10**12, b"", notify=True))
        assert (found.is_batch, bool(found.problem)) == (False, content_type == LINES)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (None, "over 65536 bytes"),
        (b"[" + b" " * MAX_BATCH + b"]", "over 65536 bytes"),
        (b"", "EOF"),
        (b"[]", "no requests"),
        (b'[["a","add",1]]', "it has 0 bodies"),
        (b'[["a","add",1]]\n1\n2', "it has 2 bodies"),
        (b'[["a","add",1],["b","add",1]]\n1', "it has 1 bodies"),
        (b"[5]\n1", "must begin with an ID"),
        (b"[[]]\n1", "must begin with an ID"),
        (b'[["","add",1]]\n1', "must begin with an ID"),
        (b'[["' + b"a" * 256 + b'","add",1]]\n1', "must begin with an ID"),
        (b'[[1,"add",1]]\n1', "must begin with an ID"),
    ],
)
def test_what_is_no_message_with_requests_is_refused_as_a_whole(body: bytes | None, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        batches.read_requests(carrier(), body)


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ('["b"]', "the head of a request must be"),
        ('["b","add"]', "the head of a request must be"),
        ('["b",5,100]', "the head of a request must be"),
        ('["b","add",1.5]', "the head of a request must be"),
        ('["b","add",true]', "the head of a request must be"),
        ('["b","add","100"]', "the head of a request must be"),
        (f'["b","add",{2**63}]', "the head of a request must be"),
        ('["b","add",100,5]', "the head of a request must be"),
        ('["b","add",100,{},1]', "the head of a request must be"),
        ('["b","add",100,{"rpcq-attempt":0}]', "rpcq-attempt must be"),
        ('["b","add",100,{"rpcq-attempt":"1"}]', "rpcq-attempt must be"),
        ('["b","add",100,{"rpcq-idempotency-key":""}]', "rpcq-idempotency-key must be"),
        ('["b","add",100,{"rpcq-method":5}]', "rpcq-method must be"),
        ('["b","add",100,{"x-a":"' + "1" * 9000 + '"}]', "at most 8192 bytes"),
    ],
)
def test_one_head_that_cannot_be_read_is_the_problem_of_its_request_alone(head: str, why: str) -> None:
    found = batches.read_requests(carrier(), f'[["a","add",100],{head},["c","add",100]]\n1\n2\n3'.encode())
    assert [it.correlation_id for it, _ in found] == [b"a", b"b", b"c"]
    assert [bool(it.problem) for it, _ in found] == [False, True, False]
    assert why in found[1][0].problem


def test_a_message_has_at_most_256_requests_and_more_are_refused_before_any_is_read() -> None:
    heads, bodies = ['["a","add",100]'] * MAX_REQUESTS, ["1"] * MAX_REQUESTS
    most = "\n".join((f"[{','.join(heads)}]", *bodies)).encode()
    assert len(batches.read_requests(carrier(), most)) == MAX_REQUESTS
    for more in (b"no JSON" + b"\n" * (MAX_REQUESTS + 1), most.replace(b"[[", b'[["b","add",1],[') + b"\n1"):
        with pytest.raises(ValueError, match="over 256 requests"):
            batches.read_requests(carrier(), more)


def test_requests_without_headers_of_their_own_share_those_of_the_message() -> None:
    batch = carrier(**{"x-all": "1" * 4000})
    heads = b'[["a","add",1],["b","add",1,{}],["c","add",1,{"x-a":"2"}]]\n1\n2\n3'
    (one, _), (other, _), (own, _) = batches.read_requests(batch, heads)
    assert one.headers is other.headers is batch.headers
    assert own.metadata == {"x-all": "1" * 4000, "x-a": "2"}


@given(st.binary(max_size=200))
def test_whatever_bytes_a_message_with_requests_has_they_are_read_or_refused(data: bytes) -> None:
    for body in (data, b'[["a","add",1]]\n' + data, b'[["a","add",1,' + data + b"]]\n1"):
        try:
            found = batches.read_requests(carrier(), body)
        except ValueError:
            continue
        assert len(found) == body.count(b"\n")
