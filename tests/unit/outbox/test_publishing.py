"""Rows on their way to the broker: what becomes of each, and that those of one key go one after another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rpcq.outbox import publishing
from rpcq.outbox.publishing import Row, publish
from rpcq.outbox.relay import UNCONFIRMED_PAUSES, UNROUTABLE_PAUSES, fate_of, is_sent
from rpcq.transport.base import Outgoing, Published


def row(number: int, order_key: str | None = None, tries: int = 0) -> Row:
    return Row(number, order_key, tries, f"m{number}", "rpcq.jobs", "s", b"", b"{}")


class Wire:
    """A transport that answers as it is told; messages that it does not know are confirmed in the next iteration."""

    can_publish = True

    def __init__(self, **answers: Published | None) -> None:
        self.answers = answers
        self.seen: list[str] = []

    def publish(self, message: Outgoing) -> None:
        name = message.correlation_id.decode()
        self.seen.append(name)
        answer = self.answers.get(name, Published.CONFIRMED)
        if answer is Published.UNSENT:
            message.on_published(answer)
        elif answer is not None:
            asyncio.get_running_loop().call_soon(message.on_published, answer)


async def test_rows_without_a_key_are_published_at_once_and_each_has_its_outcome() -> None:
    wire: Any = Wire(m2=Published.REFUSED, m3=Published.UNSENT)
    outcomes = await publish(wire, [row(1), row(2), row(3), row(4)])
    assert wire.seen == ["m1", "m2", "m3", "m4"]
    assert [outcomes[number].name for number in (1, 2, 3, 4)] == ["CONFIRMED", "REFUSED", "UNSENT", "CONFIRMED"]


@pytest.mark.parametrize("why", [Published.REFUSED, Published.RETURNED, Published.UNSENT, Published.UNKNOWN])
async def test_a_row_that_is_not_confirmed_stops_its_key_and_no_other(why: Published) -> None:
    wire: Any = Wire(m2=why)
    rows = [row(1, "a"), row(2, "a"), row(3, "a"), row(4, "b"), row(5, "b"), row(6)]
    outcomes = await publish(wire, rows)
    assert wire.seen == ["m1", "m4", "m6", "m2", "m5"]
    assert outcomes.pop(2) is why
    assert outcomes == dict.fromkeys((1, 4, 5, 6), Published.CONFIRMED)


async def test_a_row_whose_confirm_does_not_come_is_unknown_and_holds_the_others_up_only_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing, "QUIET", 0.05)
    wire: Any = Wire(m1=None)
    outcomes = await asyncio.wait_for(publish(wire, [row(1), row(2), row(3)]), 5)
    assert [outcomes[number].name for number in (1, 2, 3)] == ["UNKNOWN", "CONFIRMED", "CONFIRMED"]


async def test_a_confirm_that_comes_too_late_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "CONFIRM_TIMEOUT", 0.05)
    kept: list[Outgoing] = []

    class Slow(Wire):
        def publish(self, message: Outgoing) -> None:
            kept.append(message)

    slow: Any = Slow()
    outcomes = await publish(slow, [row(1, "a"), row(2, "a")])
    kept[0].on_published(Published.CONFIRMED)
    assert outcomes == {1: Published.UNKNOWN}
    assert len(kept) == 1


def test_what_becomes_of_a_row() -> None:
    assert is_sent(row(1), Published.CONFIRMED, "rpcq.events")
    assert not is_sent(row(1), Published.RETURNED, "rpcq.events")
    assert is_sent(row(1), Published.RETURNED, "rpcq.jobs")  # if that was the exchange for events
    assert not is_sent(row(1), None, "rpcq.events")
    assert fate_of(row(1), Published.UNSENT) is None
    large = fate_of(row(1), Published.TOO_LARGE)
    assert large is not None
    assert (large.pause_ms, large.reason) == (None, "too_large")
    pauses = [fate_of(row(1, tries=tries), Published.RETURNED) for tries in range(len(UNROUTABLE_PAUSES) + 1)]
    assert [it and it.pause_ms for it in pauses] == [*UNROUTABLE_PAUSES, None]
    assert pauses[-1] is not None
    assert pauses[-1].reason == "unroutable"
    for why in (Published.REFUSED, Published.UNKNOWN):  # as long as it takes
        tried = [fate_of(row(1, tries=tries), why) for tries in (0, 1, 100)]
        assert [it and it.pause_ms for it in tried] == [0, UNCONFIRMED_PAUSES[1], UNCONFIRMED_PAUSES[-1]]
