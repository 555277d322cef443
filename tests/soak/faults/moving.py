"""Requests that are moved, as a shovel or "Move messages" of the management UI does: by a consumer that is not rpcq's.

It takes them from a *classic* request queue, never from one that delivers once, and publishes them through the default
exchange as they are, with all properties and headers. That is how a worker knows them: they have the header CC, and did
not come through the exchange for requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import aiormq
from aiormq.abc import AbstractChannel, DeliveredMessage

from soak.faults import Fault
from soak.stage import SERVICES, Stage

PREFETCH = 50
SECONDS = 20.0
"""That moving may take, where the broker does not answer."""


def foreign(fault: Callable[[Stage, random.Random, AbstractChannel], Awaitable[None]]) -> Fault:
    """Have it done on a channel of a connection of its own; that the broker is away, or cuts it, is no matter."""

    @functools.wraps(fault)
    async def strike(stage: Stage, dice: random.Random) -> None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(SECONDS):
                connection = await aiormq.connect(dice.choice(list(stage.ground.urls)))
                try:
                    channel = await connection.channel(publisher_confirms=dice.choice([True, False]))
                    await channel.basic_qos(prefetch_count=PREFETCH)
                    await fault(stage, dice, channel)
                finally:
                    await connection.close()

    return strike


async def _take(stage: Stage, channel: AbstractChannel, queue: str, seconds: float) -> AsyncIterator[DeliveredMessage]:
    """Requests from a queue, as they come within that time."""
    came: asyncio.Queue[DeliveredMessage] = asyncio.Queue()

    async def take(message: DeliveredMessage) -> None:
        stage.taken += 1
        came.put_nowait(message)

    consuming = await channel.basic_consume(queue, take)
    until = time.monotonic() + seconds
    with contextlib.suppress(TimeoutError):
        while (left := until - time.monotonic()) > 0:
            yield await asyncio.wait_for(came.get(), left)
    assert consuming.consumer_tag is not None
    await channel.basic_cancel(consuming.consumer_tag)
    while not came.empty():  # else they would be redelivered as the connection ends, which is another fault
        yield came.get_nowait()


async def _publish(channel: AbstractChannel, message: DeliveredMessage, queue: str) -> None:
    with contextlib.suppress(aiormq.DeliveryError):  # the queue is full or gone: the request is lost
        await channel.basic_publish(message.body, routing_key=queue, properties=message.header.properties)


async def _ack(channel: AbstractChannel, message: DeliveredMessage) -> None:
    assert message.delivery_tag is not None
    await channel.basic_ack(message.delivery_tag)


async def _moved(stage: Stage, dice: random.Random, channel: AbstractChannel, start: str, end: str) -> None:
    pause = dice.choice([0.0, 0.0, 0.05])
    async for message in _take(stage, channel, start, dice.uniform(0.5, 2)):
        await asyncio.sleep(pause)
        await _publish(channel, message, end)
        await _ack(channel, message)


@foreign
async def moved_to_the_same_queue(stage: Stage, dice: random.Random, channel: AbstractChannel) -> None:
    queue = dice.choice(stage.queues)
    await _moved(stage, dice, channel, queue, queue)


@foreign
async def moved_to_the_other_queue(stage: Stage, dice: random.Random, channel: AbstractChannel) -> None:
    start, end = dice.sample(stage.queues, 2)
    await _moved(stage, dice, channel, start, end)


@foreign
async def moved_away_and_back(stage: Stage, dice: random.Random, channel: AbstractChannel) -> None:
    """To a queue of somebody else's, where they stay for a while, and back or on to the other service."""
    start = dice.choice(stage.queues)
    place = f"{stage.scene.namespace}-parked-{secrets.token_hex(4)}"
    await channel.queue_declare(place, auto_delete=True, arguments={"x-expires": 60_000})
    async for message in _take(stage, channel, start, dice.uniform(0.3, 1)):
        await _publish(channel, message, place)
        await _ack(channel, message)
    await asyncio.sleep(dice.uniform(0, 1))
    end = dice.choice([start, start, *stage.queues])
    async for message in _take(stage, channel, place, 1.0):
        await _publish(channel, message, end)
        await _ack(channel, message)


@foreign
async def taken_and_dropped(stage: Stage, dice: random.Random, channel: AbstractChannel) -> None:
    """Held unacknowledged for a moment by one whose connection ends then: they are redelivered."""
    async for _ in _take(stage, channel, dice.choice(stage.queues), dice.uniform(0.1, 0.5)):
        pass
    await asyncio.sleep(dice.uniform(0, 1.5))


@foreign
async def moved_and_dropped(stage: Stage, dice: random.Random, channel: AbstractChannel) -> None:
    """Published again by one whose connection ends before it acknowledges: both are there."""
    end = dice.choice(stage.queues)
    async for message in _take(stage, channel, dice.choice(stage.queues), dice.uniform(0.1, 0.5)):
        await _publish(channel, message, end)
    await asyncio.sleep(dice.uniform(0, 1.5))


@foreign
async def taken_and_given_back(stage: Stage, dice: random.Random, channel: AbstractChannel) -> None:
    """As who looks at messages in the management UI: they are requeued, some after having been copied."""
    async for message in _take(stage, channel, dice.choice(stage.queues), dice.uniform(0.3, 1)):
        if dice.random() < 0.3:
            await _publish(channel, message, dice.choice(stage.queues))
        assert message.delivery_tag is not None
        await channel.basic_reject(message.delivery_tag, requeue=True)


@foreign
async def copied(stage: Stage, dice: random.Random, channel: AbstractChannel) -> None:
    """Copies of all requests, which a queue of somebody else's gets too, are published again while those run."""
    place = f"{stage.scene.namespace}-copies-{secrets.token_hex(4)}"
    await channel.queue_declare(place, auto_delete=True, arguments={"x-expires": 60_000})
    await channel.queue_bind(place, f"{stage.scene.namespace}.requests", dice.choice(SERVICES))
    times = dice.choice([1, 1, 3])
    seconds = dice.uniform(0.3, 1)
    if dice.random() < 0.5:
        await asyncio.sleep(1)  # then most have been answered
    async for message in _take(stage, channel, place, seconds):
        for _ in range(times):
            await _publish(channel, message, dice.choice(stage.queues))
        await _ack(channel, message)


FAULTS: tuple[Fault, ...] = (
    moved_to_the_same_queue,
    moved_to_the_other_queue,
    moved_away_and_back,
    taken_and_dropped,
    moved_and_dropped,
    taken_and_given_back,
    copied,
)
