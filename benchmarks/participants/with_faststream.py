"""FastStream's `RabbitBroker.request`, which uses direct reply-to.

It validates the parameters with pydantic, has publisher confirms and a timeout, all by default. Its broker object lets
one request through at a time, whatever is gathered on it: each one holds a lock while it consumes from the reply
queue, publishes and waits for its answer. We drive it concurrently, as its users do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from faststream.rabbit import Channel, RabbitBroker, RabbitQueue

from benchmarks.participants import Call, Options

PACKAGES = ("faststream", "aio-pika", "aiormq")


@asynccontextmanager
async def worker(options: Options) -> AsyncIterator[None]:
    """Serve while inside."""
    # By default it logs two lines a message: that would be measured, too, and it can be turned off.
    broker = RabbitBroker(options.url, default_channel=Channel(prefetch_count=options.prefetch), logger=None)

    @broker.subscriber(RabbitQueue(f"{options.namespace}.faststream.add", durable=True, auto_delete=True))
    async def add(x: int, y: int) -> int:
        return x + y

    async with broker:
        await broker.start()
        yield


@asynccontextmanager
async def client(options: Options) -> AsyncIterator[Call]:
    """Be connected while inside."""
    async with RabbitBroker(options.url, logger=None) as broker:
        name = f"{options.namespace}.faststream.add"

        async def call(i: int) -> int:
            answer = await broker.request({"x": i, "y": 1}, name)
            return cast("int", await answer.decode())

        yield call
