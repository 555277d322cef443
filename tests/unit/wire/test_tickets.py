"""Tickets: what they carry, and which of two goes on."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest

from rpcq.wire.tickets import NotATicket, Ticket, encode_ticket, read_ticket

TICKET = Ticket("daily", "cron 0 6 * * * UTC", since=1000, last=5000, seen=6000)


def test_a_ticket_comes_back_as_it_was() -> None:
    _, body = encode_ticket(TICKET, "id", "worker")
    assert read_ticket(body) == TICKET


def test_what_a_later_version_adds_is_left_out() -> None:
    _, body = encode_ticket(TICKET, "id", "worker")
    assert read_ticket(orjson.dumps({**orjson.loads(body), "more": 1})) == TICKET


@pytest.mark.parametrize(
    "body",
    [
        None,
        b"",
        b"[]",
        b"{}",
        b"nonsense",
        orjson.dumps({"job": "a", "schedule": "b", "since": 1.5, "last": 1, "seen": 1}),
        orjson.dumps({"job": "a", "schedule": "b", "since": True, "last": 1, "seen": 1}),
        orjson.dumps({"job": 1, "schedule": "b", "since": 1, "last": 1, "seen": 1}),
    ],
)
def test_what_is_no_ticket_is_refused(body: bytes | None) -> None:
    with pytest.raises(NotATicket):
        read_ticket(body)


def test_the_older_line_goes_on_and_within_it_the_ticket_that_is_further() -> None:
    later = replace(TICKET, last=7000)
    seed = replace(TICKET, since=9000, last=9000, seen=9000)  # another worker has started
    assert later.counts_before(TICKET)
    assert not TICKET.counts_before(later)
    assert TICKET.counts_before(seed)
    assert not seed.counts_before(TICKET)
    assert TICKET.counts_before(TICKET)
