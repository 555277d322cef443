"""FastStream: confirms, persistent messages by an option, acknowledged after the handler, parameters validated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue

from benchmarks.job_participants import TEXT, Ended, Options, Send

PACKAGES = ("faststream", "aio-pika", "aiormq")
PROMISES = "confirms, mandatory; acknowledges when done; parameters validated by the worker"


def queue(options: Options) -> RabbitQueue:
    """The queue."""
    return RabbitQueue(f"{options.namespace}.faststream", durable=True, queue_type=QueueType.QUORUM)


@asynccontextmanager
async def worker(options: Options, ended: Ended) -> AsyncIterator[None]:
    """Run jobs while inside."""
    # By default it logs two lines a message: that would be measured, too, and it can be turned off.
    broker = RabbitBroker(options.url, default_channel=Channel(prefetch_count=options.prefetch), logger=None)

    @broker.subscriber(queue(options))
    async def nothing(message: dict[str, str]) -> None:  # noqa: ARG001 - a single parameter gets the whole body
        ended()

    async with broker:
        await broker.start()
        yield
        await asyncio.sleep(0.2)  # the last acknowledgements are on their way


@asynccontextmanager
async def sender(options: Options) -> AsyncIterator[Send]:
    """Be connected while inside."""
    async with RabbitBroker(options.url, logger=None) as broker:
        declared = queue(options)
        await broker.declare_queue(declared)

        async def send(count: int) -> None:
            message = {"text": TEXT}
            await asyncio.gather(*(broker.publish(message, declared, persist=True) for _ in range(count)))

        yield send


def names(options: Options) -> tuple[list[str], list[str]]:
    """The queues and the exchanges."""
    return [queue(options).name], []
