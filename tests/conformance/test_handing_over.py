"""Queues with a single active consumer that is followed in order: nothing of the queue is skipped or overtaken."""

from __future__ import annotations

import asyncio

import pytest

from rpcq.transport.base import Published
from rpcq.wire.topology import Queue
from support.seam import End, Seam, taken, until


@pytest.fixture
def lane(seam: Seam) -> Queue:
    arguments = {"x_queue_type": "quorum", "x_delivery_limit": 20}
    return seam.queue(lasts=True, x_single_active_consumer=True, **arguments)


async def fill(sender: End, lane: Queue, count: int) -> None:
    for number in range(count):
        assert await sender.sent(lane.name, b"%d" % number) is Published.CONFIRMED


async def test_who_follows_gets_first_what_was_handed_over_in_its_order(seam: Seam, lane: Queue) -> None:
    async with (
        seam.opened(taken(lane, prefetch=4, in_order=True)) as active,
        seam.opened(taken(lane, prefetch=10, in_order=True)) as waiting,
    ):
        await fill(active, lane, 8)
        held = [await active.inbox.next() for _ in range(4)]
        held[0].ack()
        held[2].ack()
        await active.transport.hand_over(lane.name)
        got = [await waiting.inbox.next() for _ in range(6)]
        assert [it.body for it in got] == [b"1", b"3", b"4", b"5", b"6", b"7"]
        assert [it.redelivered for it in got[:2]] == [True, True]
        held[1].ack()  # it has gone back: this does nothing
        assert await active.sent(active.names[-1]) is Published.CONFIRMED
        assert active.of("consuming") == ["up"], "the session goes on"
        assert [it.body for it in active.inbox.all[:4]] == [b"0", b"1", b"2", b"3"]


async def test_nothing_overtakes_while_consumers_hand_over_again_and_again(seam: Seam, lane: Queue) -> None:
    """Each consumer acknowledges some, and hands over while others are on their way."""
    async with (
        seam.opened(taken(lane, prefetch=5, in_order=True)) as one,
        seam.opened(taken(lane, prefetch=5, in_order=True)) as other,
        seam.opened() as sender,
    ):
        seen: list[int] = []

        async def take(end: End, at: int) -> int:
            """Acknowledge what came, in order; returns how much was looked at."""
            for delivery in end.inbox.all[at : at + 2]:
                assert delivery.body is not None
                seen.append(int(delivery.body))
                delivery.ack()
            return len(end.inbox.all)

        sending = asyncio.create_task(fill(sender, lane, 200))
        looked = {one: 0, other: 0}
        while len(set(seen)) < 200:
            for end in (one, other):
                looked[end] = await take(end, looked[end])
                if len(end.inbox.all) > 2:
                    await end.transport.hand_over(lane.name, again=True)
                    looked[end] = len(end.inbox.all)
            await asyncio.sleep(0.001)
        await sending
    assert seen == sorted(seen), "what is not acknowledged comes again, and nothing later before"


async def test_after_stop_consuming_a_queue_in_order_is_consumed_until_it_is_handed_over(
    seam: Seam, lane: Queue
) -> None:
    async with (
        seam.opened(taken(lane, prefetch=1, in_order=True)) as active,
        seam.opened(taken(lane, prefetch=9, in_order=True)) as waiting,
    ):
        await fill(active, lane, 1)
        held = await active.inbox.next()
        await active.transport.stop_consuming()
        await fill(active, lane, 2)
        await waiting.barrier()
        assert not waiting.inbox.all, "the first one is in hand"
        held.ack()
        assert await active.transport.settled(lane.name)
        await active.transport.hand_over(lane.name, again=True)
        assert [(await waiting.inbox.next()).body for _ in range(2)] == [b"0", b"1"]
        assert len(active.inbox.all) <= 2, "after stop_consuming, it does not consume again"


async def test_what_is_settled_stays_settled_when_the_session_is_cut(seam: Seam, lane: Queue) -> None:
    async with (
        seam.opened(taken(lane, prefetch=20, in_order=True)) as active,
        seam.opened(taken(lane, prefetch=20, in_order=True)) as waiting,
    ):
        first = active
        for number in range(50):
            assert await waiting.sent(lane.name, b"%d" % number) is Published.CONFIRMED
            delivery = await first.inbox.next()
            assert delivery.body == b"%d" % number
            delivery.ack()
            assert await first.transport.settled(lane.name)
            if number % 10 == 9:
                times = first.of("consuming").count("up")
                first.cut_one("consuming")
                await until(lambda end=first, times=times: end.of("consuming").count("up") > times)
                first = waiting if first is active else active
        assert not [it for end in (active, waiting) for it in end.inbox.all if it.redelivered]


async def test_nothing_is_settled_without_a_session(seam: Seam, lane: Queue) -> None:
    async with seam.opened(taken(lane, prefetch=1, in_order=True)) as end:
        end.cut_one("consuming")
        await until(lambda: end.of("consuming")[-1] == "lost")
        assert not await end.transport.settled(lane.name)
        await end.transport.hand_over(lane.name)
        await until(lambda: end.of("consuming")[-1] == "up")
