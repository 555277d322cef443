"""Several replies in one message: bytes <-> values."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcq.wire import batches, replies
from rpcq.wire.batches import MAX_BATCH, MAX_ENTRY, Entry
from rpcq.wire.properties import Properties, encode
from rpcq.wire.replies import ERROR, REPLIES, RESULT, Reply

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
