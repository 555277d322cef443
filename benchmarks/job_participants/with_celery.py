"""Celery: publisher confirms by an option, late acknowledgement by an option, one process without a pool (`solo`).

It has no way to send several at once: they are sent one after the other, each with its confirm. Several threads are not
quicker, because they share one interpreter.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from celery import Celery
from celery.worker import WorkController
from kombu import Queue

from benchmarks.job_participants import TEXT, Ended, Options, Send

PACKAGES = ("celery", "kombu", "amqp")
PROMISES = "confirms (an option), one at a time; acks_late (an option)"
LEVELS = 28
"""Of its own delay queues, which a worker declares."""


def made(options: Options, ended: Ended) -> tuple[Celery, Any]:
    """The app and its task."""
    name = f"{options.namespace}.celery"
    app = Celery(name, broker=options.url)
    app.conf.update(
        broker_transport_options={"confirm_publish": True},
        broker_native_delayed_delivery_queue_type="quorum",
        task_queues=[Queue(name, routing_key=name, queue_arguments={"x-queue-type": "quorum"})],
        task_default_queue=name,
        task_default_exchange=name,
        task_acks_late=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=options.prefetch,
        worker_concurrency=1,
        worker_hijack_root_logger=False,
    )

    @app.task(name="nothing")  # type: ignore[untyped-decorator]  # it ships no types
    def nothing(text: str) -> None:  # noqa: ARG001 - the parameter is part of the job
        ended()

    return app, nothing


@asynccontextmanager
async def worker(options: Options, ended: Ended) -> AsyncIterator[None]:
    """Run jobs while inside, in a thread: its worker blocks."""
    logging.getLogger("celery").setLevel(logging.ERROR)
    app, _ = made(options, ended)
    controller = WorkController(
        app=app, pool_cls="solo", without_heartbeat=True, without_mingle=True, without_gossip=True
    )
    running = asyncio.create_task(asyncio.to_thread(controller.start))
    try:
        yield
    finally:
        # As operators do it: `controller.stop` from another thread waits for ever.
        await asyncio.to_thread(app.control.shutdown, destination=[controller.hostname])
        await running


@asynccontextmanager
async def sender(options: Options) -> AsyncIterator[Send]:
    """Be connected while inside."""
    app, task = made(options, lambda: None)
    with app.connection_for_write() as connection:
        for each in app.amqp.queues.values():
            each(connection).declare()

    async def send(count: int) -> None:
        for _ in range(count):
            task.delay(text=TEXT)

    try:
        yield send
    finally:
        app.close()


def names(options: Options) -> tuple[list[str], list[str]]:
    """The queues and the exchanges."""
    name = f"{options.namespace}.celery"
    levels = [f"celery_delayed_{level}" for level in range(LEVELS)]
    return [name, *levels], [
        name,
        "celery_delayed_delivery",
        *levels,
        "celeryev",
        "celery.pidbox",
        "reply.celery.pidbox",
    ]
