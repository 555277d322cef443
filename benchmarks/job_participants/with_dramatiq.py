"""Dramatiq: publisher confirms by an option; messages are acknowledged when they were processed.

It declares classic queues; a few lines make them quorum queues. It has no way to send several at once: they are sent
one after the other, each with its confirm.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from benchmarks.job_participants import TEXT, Ended, Options, Send

PACKAGES = ("dramatiq", "pika")
PROMISES = "confirms (an option), one at a time; acknowledges when done; quorum queues by a subclass"
THREADS = 8
"""Of a worker: its default."""


class QuorumBroker(RabbitmqBroker):  # type: ignore[misc]  # it ships no types for this
    """The same with quorum queues, also for its delayed messages."""

    def _build_queue_arguments(self, queue_name: str) -> dict[str, Any]:
        return {**super()._build_queue_arguments(queue_name), "x-queue-type": "quorum"}


def made(options: Options, ended: Ended) -> tuple[RabbitmqBroker, Any]:
    """The broker and its actor."""
    broker = QuorumBroker(url=options.url, confirm_delivery=True)

    @dramatiq.actor(broker=broker, queue_name=f"{options.namespace}.dramatiq", actor_name="nothing")
    def nothing(text: str) -> None:  # noqa: ARG001 - the parameter is part of the job
        ended()

    return broker, nothing


@asynccontextmanager
async def worker(options: Options, ended: Ended) -> AsyncIterator[None]:
    """Run jobs while inside."""
    broker, _ = made(options, ended)
    running = dramatiq.Worker(broker, worker_threads=THREADS)
    running.queue_prefetch = options.prefetch
    running.start()
    try:
        yield
    finally:
        await asyncio.to_thread(running.stop)
        broker.close()


@asynccontextmanager
async def sender(options: Options) -> AsyncIterator[Send]:
    """Be connected while inside."""
    broker, actor = made(options, lambda: None)

    async def send(count: int) -> None:
        for _ in range(count):
            actor.send(text=TEXT)

    try:
        yield send
    finally:
        broker.close()


def names(options: Options) -> tuple[list[str], list[str]]:
    """The queues and the exchanges."""
    name = f"{options.namespace}.dramatiq"
    return [name, f"{name}.DQ", f"{name}.XQ"], []
