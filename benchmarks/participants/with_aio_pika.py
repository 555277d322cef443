"""aio-pika's own RPC pattern, set up as its documentation does, with its JSON variant instead of pickle.

Its channels have publisher confirms and it publishes its requests as `mandatory`, both by default; it has no deadlines
and validates nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from aio_pika import connect_robust
from aio_pika.patterns import JsonRPC

from benchmarks.participants import Call, Options

PACKAGES = ("aio-pika", "aiormq")


@asynccontextmanager
async def worker(options: Options) -> AsyncIterator[None]:
    """Serve while inside."""

    async def add(*, x: int, y: int) -> int:
        return x + y

    connection = await connect_robust(options.url)
    async with connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=options.prefetch)
        # Exclusive instead of the pattern's default for its reply queue, transient but shared: newer RabbitMQ refuses
        # that. It makes no difference to a call.
        rpc = await JsonRPC.create(channel, exclusive=True)
        await rpc.register(f"{options.namespace}.aio-pika.add", add, durable=True, auto_delete=True)
        yield


@asynccontextmanager
async def client(options: Options) -> AsyncIterator[Call]:
    """Be connected while inside."""
    connection = await connect_robust(options.url)
    async with connection:
        rpc = await JsonRPC.create(await connection.channel(), exclusive=True)
        name = f"{options.namespace}.aio-pika.add"

        async def call(i: int) -> int:
            return cast("int", await rpc.call(name, {"x": i, "y": 1}))

        yield call
