"""A channel on which the broker refuses messages for long: another one takes its place, and no message pays for it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from rpcq.transport.base import Message, Published
from support.logged import event_of
from support.seam import SECONDS, End, Seam, taken, until


@pytest.fixture
async def full(rabbitmq_url: str, namespace: str) -> AsyncIterator[End]:
    """A transport with a queue that has room for none but the one in hand and another, and with one that has room."""
    seam = Seam(rabbitmq_url, namespace)
    small = seam.queue("small", x_max_length=1, x_overflow="reject-publish")
    async with seam.opened(taken(small, prefetch=1), taken(seam.queue("large"), no_ack=True)) as end:
        for _ in range(2):
            assert await end.sent(end.names[0]) is Published.CONFIRMED
        yield end


async def refused(end: End) -> None:
    """Publish one after another, until the time has come to replace the channel."""
    publishing = publishing_of(end)
    while not publishing._replacing:
        assert await end.sent(end.names[0]) is Published.REFUSED
        await asyncio.sleep(0.01)


def publishing_of(end: End) -> Any:
    transport: Any = end.transport
    return transport._publishing


def hang(end: End) -> None:
    """Let the broker open no channel on this connection any more: it does not answer."""

    async def channel(**_: Any) -> None:
        await asyncio.Event().wait()

    publishing_of(end)._link.channel = channel


async def test_it_is_replaced_under_load_and_each_message_has_its_one_outcome(full: End) -> None:
    publishing = publishing_of(full)
    (first,) = publishing._channels
    told: Counter[tuple[int, Published]] = Counter()
    done = asyncio.Event()

    async def publisher(queue: int) -> None:
        while not done.is_set():
            told[queue, await full.sent(full.names[queue], b"%d" % queue)] += 1

    publishers = [asyncio.create_task(publisher(queue)) for queue in (0, 1) for _ in range(20)]
    async with asyncio.timeout(SECONDS):
        await until(lambda: publishing._channels[-1] is not first)
        await until(lambda: len(publishing._channels) == 1 and not publishing._replacing)
    before = told[1, Published.CONFIRMED]
    await until(lambda: told[1, Published.CONFIRMED] > before + 100)
    done.set()
    await asyncio.gather(*publishers)
    assert told.keys() == {(0, Published.REFUSED), (1, Published.CONFIRMED)}
    assert not first.unconfirmed
    assert len(publishing._link.protocol._frames.channels) == 1
    await full.barrier()
    assert len(full.inboxes[1].all) == told[1, Published.CONFIRMED]
    assert full.of("publishing") == ["up"]


async def test_it_is_replaced_less_and_less_often_while_refusals_go_on_and_as_at_first_after_a_quiet_minute(
    full: End,
) -> None:
    publishing, now = publishing_of(full), 1000.0
    loop = publishing._loop
    publishing._loop = SimpleNamespace(time=lambda: now, create_task=loop.create_task)

    async def gaps(count: int) -> list[float]:
        """Seconds of refusals, one every second, after which channels were replaced."""
        nonlocal now
        found: list[float] = []
        while len(found) < count:
            began = now
            while not publishing._replacing:
                now += 1
                publishing._on_refused(publishing._channels[-1])
            found.append(now - began - 1)  # the first one begins it
            await until(lambda: not publishing._replacing)
        return found

    assert await gaps(8) == [2, 4, 8, 16, 32, 60, 60, 60]
    now += 60
    assert await gaps(2) == [2, 4]
    publishing._loop = loop


async def test_no_more_than_three_are_open_where_messages_on_them_are_never_confirmed(full: End) -> None:
    publishing = publishing_of(full)
    channels = publishing._channels
    for count in (1, 2, 3, 3):
        channels[-1].unconfirmed._waiting[0] = Message(b"", b"", b"", b"", b"", lambda _: None, mandatory=False)
        assert len(channels) == count
        channels[-1].refused_at = 0.0
        publishing._on_refused(channels[-1])
        await until(lambda count=count: len(channels) == min(count + 1, 3))
    assert await full.sent(full.names[1]) is Published.CONFIRMED
    for each in [*channels]:
        each.unconfirmed._waiting.clear()
    await until(lambda: len(channels) == 1)


async def test_where_no_other_can_be_opened_it_goes_on(full: End, caplog: pytest.LogCaptureFixture) -> None:
    publishing = publishing_of(full)
    (first,) = publishing._channels
    hang(full)
    await refused(full)
    await until(lambda: not publishing._replacing)
    assert "a channel refuses messages, but could not be replaced" in [event_of(record) for record in caplog.records]
    assert publishing._channels == [first]
    assert await full.sent(full.names[1]) is Published.CONFIRMED


async def test_a_session_that_is_lost_while_it_is_replaced_comes_back(full: End) -> None:
    publishing = publishing_of(full)
    hang(full)
    await refused(full)
    full.cut_one("publishing")
    await until(lambda: full.of("publishing") == ["up", "lost", "up"])
    assert await full.sent(full.names[1]) is Published.CONFIRMED
    (channel,) = publishing._channels
    await until(lambda: not publishing._replacing)
    assert publishing._channels == [channel]
    assert await full.sent(full.names[0]) is Published.REFUSED


async def test_closing_while_it_is_replaced_leaves_nothing_behind(full: End) -> None:
    hang(full)
    await refused(full)
    (replacing,) = publishing_of(full)._replacing
    await full.transport.close()
    assert replacing.cancelled()
    assert len(asyncio.all_tasks()) == 1
