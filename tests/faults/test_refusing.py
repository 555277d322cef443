"""A channel on which the broker refuses messages for long: another one takes its place, and no message pays for it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from rpcq.transport.base import Settled
from seam import SECONDS, End, Seam, taken, until


@pytest.fixture
async def full(rabbitmq_url: str, namespace: str) -> AsyncIterator[End]:
    """A transport with a queue that has room for none but the one in hand and another, and with one that has room."""
    seam = Seam(rabbitmq_url, namespace)
    small = seam.queue("small", x_max_length=1, x_overflow="reject-publish")
    async with seam.opened(taken(small, prefetch=1), taken(seam.queue("large"), no_ack=True)) as end:
        for _ in range(2):
            assert await end.sent(end.names[0]) is Settled.CONFIRMED
        yield end


async def refused(end: End) -> None:
    """Publish one after another, until the time has come to replace the channel."""
    publishing = publishing_of(end)
    while publishing._replacing is None:
        assert await end.sent(end.names[0]) is Settled.REFUSED
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
    told: Counter[tuple[int, Settled]] = Counter()
    done = asyncio.Event()

    async def publisher(queue: int) -> None:
        while not done.is_set():
            told[queue, await full.sent(full.names[queue], b"%d" % queue)] += 1

    publishers = [asyncio.create_task(publisher(queue)) for queue in (0, 1) for _ in range(20)]
    async with asyncio.timeout(SECONDS):
        await until(lambda: publishing._channels[-1] is not first)
        await until(lambda: len(publishing._channels) == 1 and publishing._replacing is None)
    before = told[1, Settled.CONFIRMED]
    await until(lambda: told[1, Settled.CONFIRMED] > before + 100)
    done.set()
    await asyncio.gather(*publishers)
    assert told.keys() == {(0, Settled.REFUSED), (1, Settled.CONFIRMED)}
    assert not first.unconfirmed
    assert len(publishing._link.protocol._frames.lanes) == 1
    await full.barrier()
    assert len(full.inboxes[1].all) == told[1, Settled.CONFIRMED]
    assert full.of("publishing") == ["up"]


async def test_where_no_other_can_be_opened_it_goes_on(full: End, caplog: pytest.LogCaptureFixture) -> None:
    publishing = publishing_of(full)
    (first,) = publishing._channels
    hang(full)
    await refused(full)
    await until(lambda: publishing._replacing is None)
    assert "channel could not be replaced" in [record.getMessage() for record in caplog.records]
    assert publishing._channels == [first]
    assert await full.sent(full.names[1]) is Settled.CONFIRMED


async def test_a_session_that_is_lost_while_it_is_replaced_comes_back(full: End) -> None:
    publishing = publishing_of(full)
    hang(full)
    await refused(full)
    full.cut_one("publishing")
    await until(lambda: full.of("publishing") == ["up", "lost", "up"])
    assert await full.sent(full.names[1]) is Settled.CONFIRMED
    (channel,) = publishing._channels
    await until(lambda: publishing._replacing is None)
    assert publishing._channels == [channel]
    assert await full.sent(full.names[0]) is Settled.REFUSED


async def test_closing_while_it_is_replaced_leaves_nothing_behind(full: End) -> None:
    hang(full)
    await refused(full)
    replacing = publishing_of(full)._replacing
    await full.transport.close()
    assert replacing.cancelled()
    assert len(asyncio.all_tasks()) == 1
