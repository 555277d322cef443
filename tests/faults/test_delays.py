"""Many delayed jobs while their broker is killed, twice.

The oracle: each job that `send` confirmed is done, none before it is due; those that are done more than once have the
same ID and key each time; and none is a dead letter, or with the lost.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import aio_pika
import pytest

from rpcq import Client, Context, Job, Service, Worker
from rpcq.wire.job_queues import JobTopology
from support.broker import Broker, Setup
from support.broker import broker as a_broker

JOBS = 3000
LEAST, MOST = 5.0, 60.0
"""Seconds of the delays."""

STANDS_STILL = 180.0
"""Seconds after which RabbitMQ tries again to move a message for which it found no queue, because it had not recovered
its bindings when the message was due: `dead_letter_worker_publisher_confirm_timeout`."""

SLACK = 60.0
"""Seconds that a loaded machine, and the sessions of the worker, may take besides."""


class Delays:
    """A service, and what was done of its jobs."""

    def __init__(self) -> None:
        self.namespace = f"t{secrets.token_hex(8)}"
        self.topology = JobTopology(self.namespace)
        self.service = Service("late")
        self.runs: dict[str, list[tuple[float, str | None]]] = defaultdict(list)  # ID -> when and with which key

        @self.service.job
        async def note(context: Context) -> None:
            self.runs[context.correlation_id].append((time.time(), context.idempotency_key))

        self.note = note

    def worker(self, url: str) -> Worker:
        """A worker that does not remember what is done: doubles run."""
        return Worker(self.service, url=url, namespace=self.namespace, job_prefetch=200, remember=0)

    async def send(self, client: Client) -> list[Job]:
        choose = random.Random(17)
        sent: list[Job] = []
        while len(sent) < JOBS:
            delays = [choose.uniform(LEAST, MOST) for _ in range(100)]
            sent += await asyncio.gather(*(client.with_options(delay=delay).send(self.note) for delay in delays))
        return sent


async def strike(own: Broker) -> float:
    """Kill the node, and start it again; returns when it answered."""
    await asyncio.to_thread(own.kill)
    await asyncio.to_thread(own.start)
    return time.time()


async def wait(seconds: float, condition: Callable[[], bool]) -> None:
    """Wait for it, but not longer than that."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.1)


async def depths(url: str, queues: list[str]) -> list[int | None]:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        return [(await channel.declare_queue(queue, passive=True)).declaration_result.message_count for queue in queues]


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_of_3000_delayed_jobs_two_kills_of_the_node_lose_none_and_doubles_have_one_key() -> None:
    delays = Delays()
    runs = delays.runs
    with a_broker(setup=Setup()) as own:
        async with delays.worker(own.url), Client(own.url, namespace=delays.namespace, timeout=120) as client:
            await asyncio.sleep(2)  # the queues are new: see `Broker.kill`
            sent = await delays.send(client)
            await wait(MOST, lambda: len(runs) > JOBS // 10)
            await strike(own)
            before = len(runs)
            await wait(MOST / 4, lambda: len(runs) > before + JOBS // 10)
            back = await strike(own)
            left = JOBS - len(runs)
            await wait(STANDS_STILL + MOST + SLACK, lambda: len(runs) >= JOBS)
            await asyncio.sleep(5)  # for doubles
            queues = [delays.topology.dead_queue("late").name, delays.topology.lost.name]
            levels = [queue.name for queue in delays.topology.ladder.queues()]
            dead, lost, *held = await depths(own.url, [*queues, *levels])
    late = {
        job.id: min(when for when, _ in runs[job.id]) - job.due.timestamp() for job in sent if job.due and runs[job.id]
    }
    stood = [job.id for job in sent if runs[job.id] and runs[job.id][0][0] > back + STANDS_STILL - 10]
    doubled = [len(found) for found in runs.values() if len(found) > 1]
    sys.stdout.write(
        f"RabbitMQ {own.version}: {left} jobs left when the node was back the second time; "
        f"{len(doubled)} done more than once, {sum(doubled) - len(doubled)} runs too many; "
        f"the latest {max(late.values()):.1f} s after it was due; "
        f"{len(stood)} stood still for {STANDS_STILL:g} s; with the lost {lost}, dead {dead}\n"
    )
    assert {job.id for job in sent} == {name for name, found in runs.items() if found}
    assert all({key for _, key in runs[job.id]} == {job.key} for job in sent)
    assert min(late.values()) > -0.01
    assert (dead, lost) == (0, 0)
    assert not any(held)
