"""Taskiq on RabbitMQ (taskiq-aio-pika), as it comes: quorum queues, confirms, acknowledged when the result is saved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from taskiq.api import run_receiver_task
from taskiq_aio_pika import AioPikaBroker
from taskiq_aio_pika.exchange import Exchange
from taskiq_aio_pika.queue import Queue

from benchmarks.job_participants import TEXT, Ended, Options, Send

PACKAGES = ("taskiq", "taskiq-aio-pika", "aio-pika")
PROMISES = "confirms; acknowledges when done"


def made(options: Options, ended: Ended) -> tuple[AioPikaBroker, Any]:
    """The broker and its task."""
    name = f"{options.namespace}.taskiq"
    broker = AioPikaBroker(
        options.url,
        qos=options.prefetch,
        exchange=Exchange(name=name),
        task_queues=[Queue(name=name)],
        dead_letter_queue=Queue(name=f"{name}.dead"),
        delay_queue=Queue(name=f"{name}.delay"),
    )

    @broker.task(task_name="nothing")
    async def nothing(text: str) -> None:  # noqa: ARG001 - the parameter is part of the job
        ended()

    return broker, nothing


@asynccontextmanager
async def worker(options: Options, ended: Ended) -> AsyncIterator[None]:
    """Run jobs while inside."""
    broker, _ = made(options, ended)
    broker.is_worker_process = True
    await broker.startup()
    receiving = asyncio.create_task(run_receiver_task(broker, max_async_tasks=options.prefetch))
    try:
        yield
    finally:
        await asyncio.sleep(0.2)  # the last acknowledgements are on their way
        receiving.cancel()
        await asyncio.wait([receiving])
        await broker.shutdown()


@asynccontextmanager
async def sender(options: Options) -> AsyncIterator[Send]:
    """Be connected while inside."""
    broker, task = made(options, lambda: None)
    await broker.startup()

    async def send(count: int) -> None:
        await asyncio.gather(*(task.kiq(text=TEXT) for _ in range(count)))

    try:
        yield send
    finally:
        await broker.shutdown()


def names(options: Options) -> tuple[list[str], list[str]]:
    """The queues and the exchanges."""
    name = f"{options.namespace}.taskiq"
    return [name, f"{name}.dead", f"{name}.delay"], [name]
