"""aio-pika's JsonRPC on the other side: a pattern with conventions of its own, which many Python programs use."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aio_pika
import pytest
from aio_pika.patterns import JsonRPC
from aio_pika.patterns.rpc import JsonRPCError

from rpcq import Client, InvalidReply, Service, Worker

ROBUST = "amq_[0-9a-f]{32}"
"""The names of reply queues on a robust connection, which aio-pika makes itself; otherwise the broker names them."""


@pytest.fixture(params=["plain", "robust"])
async def peer(request: pytest.FixtureRequest, rabbitmq_url: str) -> AsyncIterator[JsonRPC]:
    connect = aio_pika.connect_robust if request.param == "robust" else aio_pika.connect
    async with await connect(rabbitmq_url) as connection:
        found = await JsonRPC.create(await connection.channel())
        yield found
        await found.close()


async def test_a_client_of_jsonrpc_calls_the_default_method(
    rabbitmq_url: str, namespace: str, own_queue: str, peer: JsonRPC
) -> None:
    service = Service("multiply", queue=own_queue, default_types=("call",))

    @service.method
    async def multiply(x: int, y: int) -> int:
        return x * y

    async with Worker(service, url=rabbitmq_url, namespace=namespace, reply_to=(ROBUST,)):
        assert await peer.call(own_queue, {"x": 6, "y": 7}) == 42
        with pytest.raises(JsonRPCError) as caught:
            await peer.call(own_queue, {"x": 6, "y": "seven"})
        assert caught.value.args[1]["code"] == "INVALID_ARGUMENT"


async def test_a_client_of_rpcq_calls_a_server_of_jsonrpc_and_sees_what_it_says_of_an_error(
    rabbitmq_url: str, namespace: str, own_queue: str, peer: JsonRPC
) -> None:
    async def divide(*, x: int, y: int) -> float:
        return x / y

    await peer.register(own_queue, divide)
    async with Client(rabbitmq_url, namespace=namespace, timeout=10.0) as client:
        server = client.with_options(queue=own_queue)
        assert await server.call("divide", x=6, y=4) == 1.5
        with pytest.raises(InvalidReply, match="ZeroDivisionError") as caught:
            await server.call("divide", x=6, y=0)
    assert caught.value.executed == "maybe"
    assert caught.value.details["error"]["type"] == "ZeroDivisionError"
