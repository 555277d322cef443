"""The properties of jobs, bytes <-> values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcq.errors import TooLarge
from rpcq.wire.jobs import JobMessage, check_headers, encode_dead, encode_job, read_job
from rpcq.wire.properties import MalformedProperties, Properties, decode, encode

NAMES = st.text("abcdefgh-_.0123456789", min_size=1, max_size=60)
TIMES = st.none() | st.integers(0, 2**62)
HEADERS = st.dictionaries(st.text("abc", min_size=1).map("x-".__add__), st.text(max_size=20), max_size=3)


@given(NAMES, NAMES, NAMES, st.integers(1, 10**6), TIMES, TIMES, st.integers(0, 10), HEADERS)
def test_what_is_written_is_read(
    job_id: str,
    name: str,
    key: str,
    attempt: int,
    first: int | None,
    expires: int | None,
    unknown: int,
    headers: dict[str, str],
) -> None:
    job = JobMessage(
        id=job_id,
        name=name,
        body=b"{}",
        key=key,
        attempt=attempt,
        first_sent_ms=first,
        expires_ms=expires,
        unknown=unknown,
        earlier=unknown // 2,
        app_id="shop",
        headers=headers,
    )
    found = read_job(encode_job(job, 5000), b"{}", redelivered=False)
    job.first_sent_ms = 5000 if first is None else first
    job.published_s = 5
    assert found == job
    assert found.metadata == headers


def test_it_is_persistent_and_names_itself_twice() -> None:
    found = decode(encode_job(JobMessage(id="7", name="work", body=b"", key="7"), 5999))
    assert (found.delivery_mode, found.message_id, found.correlation_id) == (2, b"7", b"7")
    assert (found.type, found.timestamp, found.headers) == (b"work", 5, {"rpcq-first-sent": 5999})


def read(*, redelivered: bool = False, **fields: Any) -> JobMessage:
    properties = Properties(**{"message_id": b"7", "type": b"work", **fields})
    return read_job(encode(properties), b"", redelivered=redelivered)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"message_id": None}, "a job must have a message_id"),
        ({"content_type": b"text/html"}, "the content type must be application/json; got 'text/html'"),
        ({"content_encoding": b"gzip"}, "the body must have no content encoding; got 'gzip'"),
        ({"headers": {"rpcq-idempotency-key": ""}}, "rpcq-idempotency-key must be a string of 1 to 255 bytes"),
        ({"headers": {"rpcq-idempotency-key": 5}}, "rpcq-idempotency-key must be a string of 1 to 255 bytes; got 5"),
        ({"headers": {"rpcq-attempt": 0}}, "rpcq-attempt must be a whole number of at least 1; got 0"),
        ({"headers": {"rpcq-attempt": "x"}}, "rpcq-attempt must be a whole number of at least 1; got 'x'"),
        ({"headers": {"rpcq-expires": 1.5}}, r"rpcq-expires must be a whole number of milliseconds; got 1\.5"),
    ],
)
def test_what_cannot_be_read_says_why(fields: dict[str, Any], problem: str) -> None:
    import re

    assert re.search(problem, read(**fields).problem)


def test_a_foreign_job_needs_an_id_only() -> None:
    assert not read().problem
    assert read(message_id=None, correlation_id=b"c").id == "c"


@pytest.mark.parametrize(
    ("headers", "redelivered", "returns"),
    [
        ({}, False, 0),
        ({}, True, 1),
        ({"x-delivery-count": 7}, False, 0),  # a sender wrote it
        ({"x-delivery-count": 7}, True, 7),
        ({"x-delivery-count": 1, "x-acquired-count": 4}, True, 4),
        ({"x-delivery-count": "many"}, True, 1),
        ({"x-delivery-count": -5}, True, 1),
    ],
)
def test_returns_are_counted_by_the_broker_alone(headers: dict[str, Any], redelivered: bool, returns: int) -> None:
    assert read(redelivered=redelivered, headers=headers).returns == returns


def test_the_brokers_headers_are_never_published_again() -> None:
    headers = {
        "x-death": [{"queue": "q"}],
        "x-first-death-queue": "q",
        "x-delivery-count": 5,
        "x-acquired-count": 5,
        "x-opt-enqueue-time": 5,
        "rpcq-dead-reason": "attempts",
        "x-mine": "kept",
        "traceparent": "00-0-0-01",
        "CC": ["elsewhere"],
        "BCC": ["elsewhere"],
    }
    again = decode(encode_job(read(redelivered=True, headers=headers), 5000)).headers
    assert again == {"x-mine": "kept", "traceparent": "00-0-0-01", "rpcq-first-sent": 5000}


def test_a_dead_letter_keeps_what_the_job_came_with() -> None:
    came = Properties(
        content_type=b"text/html",
        headers={"x-mine": "kept", "rpcq-attempt": 2, "x-death": [], "x-delivery-count": 3, "CC": ["elsewhere"]},
        reply_to=b"q",
        expiration=b"5",
        user_id=b"shop",
        message_id=b"7",
    )
    letter = decode(encode_dead(encode(came), {"rpcq-dead-reason": "invalid"}))
    assert letter.headers == {"x-mine": "kept", "rpcq-attempt": 2, "rpcq-dead-reason": "invalid"}
    assert (letter.content_type, letter.message_id) == (b"text/html", b"7")
    assert letter.reply_to is None  # its watcher has been told
    assert (letter.expiration, letter.user_id, letter.delivery_mode) == (None, None, 2)


def test_a_user_is_not_published_again_because_the_worker_is_another_one() -> None:
    assert decode(encode_job(read(user_id=b"shop"), 5000)).user_id is None


def test_properties_that_are_none_are_an_error_and_headers_have_a_limit() -> None:
    with pytest.raises(MalformedProperties):
        read_job(b"\xff\xff", b"", redelivered=False)
    check_headers({"x-a": "b" * 8000})
    with pytest.raises(TooLarge, match="the headers are 8208 bytes; the limit is 8192"):
        check_headers({"x-a": "b" * 8199})


@pytest.mark.parametrize(
    ("fields", "since"),
    [
        ({}, 5_200),
        ({"due_ms": 9_000}, 9_000),  # a delay is no time in the queue
        ({"due_ms": 5_000}, 5_200),  # a tick, at which it was sent a little late
        ({"published_s": 6}, None),  # a replay
        ({"published_s": None}, None),
        ({"first_sent_ms": None}, None),
        ({"attempt": 2}, None),
        ({"unknown": 1}, None),
        ({"returns": 1}, None),
        ({"earlier": 1}, None),
    ],
)
def test_since_when_a_job_waits_is_known_if_it_only_waited(fields: dict[str, Any], since: int | None) -> None:
    job = JobMessage(**{"id": "7", "name": "work", "body": b"{}", "first_sent_ms": 5_200, "published_s": 5, **fields})
    assert job.waits_since_ms == since
