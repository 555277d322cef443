"""What people do with the messages of a queue in RabbitMQ's management page, as docs/wire.md says of it.

The page gets messages with `basic.get` and settles them at once; to move them it publishes them again.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import aio_pika
import pytest

from rpcq import CallTimeout, Client, OutcomeUnknown, Service, Worker
from rpcq.wire.topology import Topology


def service(name: str, ran: list[Any], queue_type: Literal["classic", "quorum"] = "classic") -> Service:
    found = Service(name, queue_type=queue_type)

    @found.method
    async def work(n: int) -> int:
        ran.append((name, n))
        return n

    return found


async def in_queue(channel: aio_pika.abc.AbstractChannel, name: str, *, no_ack: bool) -> Any:
    queue = await channel.get_queue(name, ensure=False)
    while (message := await queue.get(no_ack=no_ack, fail=False)) is None:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0.01)
    return message


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize("how", ["requeue", "reject", "automatic ack", "move"])
async def test_a_request_that_somebody_got_by_hand_is_never_run_and_its_caller_gets_a_maybe(
    rabbitmq_url: str, namespace: str, queue_type: Literal["classic", "quorum"], how: str
) -> None:
    ran: list[Any] = []
    topology = Topology(namespace)
    place: dict[str, Any] = {"url": rabbitmq_url, "namespace": namespace}
    served, other = service("things", ran, queue_type), service("other", ran)
    async with Worker(served, other, **place):
        pass  # the queues are there from now on
    timeout = 1.0 if how == "automatic ack" else 20.0
    async with (
        Client(rabbitmq_url, namespace=namespace, timeout=timeout) as client,
        await aio_pika.connect(rabbitmq_url) as connection,
    ):
        channel = await connection.channel()
        call = asyncio.create_task(client.call("things.work", n=1))
        message = await in_queue(
            channel, topology.request_queue("things", queue_type).name, no_ack=how == "automatic ack"
        )
        if how == "move":
            moved = aio_pika.Message(
                message.body,
                headers=message.headers,
                type=message.type,
                correlation_id=message.correlation_id,
                reply_to=message.reply_to,
                content_type=message.content_type,
            )
            await channel.default_exchange.publish(moved, topology.request_queue("other", "classic").name)
            await message.ack()
        elif how != "automatic ack":
            await message.reject(requeue=how == "requeue")
        async with Worker(served, other, **place):
            with pytest.raises(CallTimeout if how == "automatic ack" else OutcomeUnknown) as caught:
                await call
        stray = client.counts()["stray_replies"]
    assert caught.value.executed == "maybe"
    assert stray == (how == "move")  # the copy for the reply queue, by the request's CC
    assert ran == []
