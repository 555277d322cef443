"""The publishing session of RabbitMQ's transport, with a connection that only notes what is written."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from rpcq.transport.base import Outgoing, Published
from rpcq.transport.rabbitmq.frames import Encoder
from rpcq.transport.rabbitmq.pending import Unconfirmed
from rpcq.transport.rabbitmq.publishing import HIGH_WATER, WRITE_SIZE, PublishingSession

SIZE = 1024


class Message(Outgoing):
    def on_published(self, published: Published) -> None:
        raise AssertionError(published)


def session(written: list[bytes]) -> PublishingSession:
    """A session that is up."""
    unused: Any = SimpleNamespace(hosts=[])
    it = PublishingSession(unused, unused, [], unused)
    it._up = True
    it._link = SimpleNamespace(protocol=SimpleNamespace(writable=True, write=written.append))  # type: ignore[assignment]
    channel: Any = SimpleNamespace(encoder=Encoder(1, 131_072), unconfirmed=Unconfirmed())
    it._channels, it._most_properties = [channel], SIZE
    return it


def publish(it: PublishingSession, messages: int) -> None:
    for _ in range(messages):
        it.publish(Message(b"", b"queue", b"id", b"", b"x" * SIZE))


async def test_the_broker_gets_the_first_messages_of_an_iteration_before_it_ends() -> None:
    written: list[bytes] = []
    it = session(written)
    publish(it, 1)
    assert len(written) == 1, "the first one goes at once"
    publish(it, WRITE_SIZE // SIZE - 1)
    assert len(written) == 1, "the next ones wait for each other"
    publish(it, 1)
    assert len(written) == 2
    assert len(written[1]) > WRITE_SIZE
    publish(it, 1)
    await asyncio.sleep(0)
    assert len(written) == 3, "the last one goes when the iteration ends"


async def test_an_iteration_publishes_no_more_than_the_high_water_mark_and_the_next_one_goes_on() -> None:
    written: list[bytes] = []
    it = session(written)
    published = 0
    while it.ready:
        publish(it, 1)
        published += 1
    assert published == HIGH_WATER // SIZE + 1
    await asyncio.sleep(0)
    assert it.ready
    assert sum(map(len, written)) > HIGH_WATER
