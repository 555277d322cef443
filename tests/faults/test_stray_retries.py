"""The queue of one service is deleted while its retries wait in the ladder of delays, which all services share.

The ladder of NServiceBus stops for all its users once 32 delayed messages have no target any more.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import quantiles

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel

from rpcq import Client, Context, Job, RetryLater, Service, Worker
from rpcq.wire.job_queues import JobTopology
from support.command import Rpcq

STRAYS = 1000
"""Retries that wait when their queue is deleted."""
WAVE = 20
"""Retries of the other service, four times a second."""
STRAY = 36
"""Seconds of these retries: all are put off before the first one is due."""
PAUSE, MARKER = 4, 12
"""Seconds of its retries: the level of the ladder that the strays pass last; and of the one that comes after all."""


class Street:
    """Two services whose retries go through one ladder."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.namespace = f"t{secrets.token_hex(8)}"
        self.topology = JobTopology(self.namespace)
        self.gone, self.other = Service("gone"), Service("other")
        self.late: dict[str, list[float]] = {"control": [], "beside": []}
        self.sent = Counter[str]()
        self.marked = asyncio.Event()
        put_off: dict[str, float] = {}

        @self.gone.job
        async def stray() -> None:
            raise RetryLater(STRAY)

        @self.other.job
        async def again(context: Context, kind: str) -> None:
            key = context.idempotency_key
            assert key is not None
            if context.attempt == 1:
                put_off[key] = time.monotonic()
                raise RetryLater(PAUSE)
            self.late[kind].append(time.monotonic() - put_off.pop(key) - PAUSE)

        @self.other.job
        async def mark(context: Context) -> None:
            if context.attempt == 1:
                raise RetryLater(MARKER)
            self.marked.set()

        self.stray, self.again, self.mark = stray, again, mark

    def worker(self, service: Service) -> Worker:
        return Worker(service, url=self.url, namespace=self.namespace, job_prefetch=200)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with self.worker(self.other), Client(self.url, namespace=self.namespace) as client:
            yield client

    async def wave(self, client: Client, kind: str) -> None:
        self.sent[kind] += len(await client.send_many(self.again, [{"kind": kind}] * WAVE))
        await asyncio.sleep(0.25)

    async def control(self, client: Client) -> None:
        """Retries of the other service while there are no others."""
        for _ in range(20):
            await self.wave(client, "control")
        while len(self.late["control"]) < self.sent["control"]:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.05)

    async def strays(self, client: Client, channel: AbstractChannel) -> list[Job]:
        """Retries that wait in the ladder, and whose queue is deleted."""
        queue = self.topology.queue(self.gone.name).name
        async with self.worker(self.gone) as doomed:
            sent = await client.send_many(self.stray, [{}] * STRAYS)
            while doomed._jobs is None or doomed._jobs.finished < STRAYS:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.05)
        assert await count(channel, queue) == 0, "all wait in the ladder"
        await channel.queue_delete(queue)
        return sent


async def count(channel: AbstractChannel, queue: str) -> int:
    return (await channel.declare_queue(queue, passive=True)).declaration_result.message_count or 0


@pytest.mark.long
@pytest.mark.timeout(400)
async def test_retries_whose_queue_is_deleted_are_kept_and_make_no_others_late(
    rabbitmq_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.command.SECONDS", 90.0)  # to list them all may take its time
    street = Street(rabbitmq_url)
    lost = street.topology.lost.name
    async with street.client() as client, await aio_pika.connect(rabbitmq_url) as connection:
        channel = await connection.channel()
        await street.control(client)
        strays = await street.strays(client, channel)
        while await count(channel, lost) < STRAYS:
            await street.wave(client, "beside")
        # One that is due later than all others: where any other is later still, it has not come when this one comes.
        await client.send(street.mark)
        await street.marked.wait()
        assert Counter({kind: len(found) for kind, found in street.late.items()}) == street.sent
    for kind, found in street.late.items():
        sys.stdout.write(f"{kind}: {len(found)} retries, late by {distribution(found)}\n")
    rpcq = Rpcq(rabbitmq_url, street.namespace, tmp_path)
    arguments = ("--namespace", street.namespace, "--lost", "--json", "--limit", "100000")
    listed = rpcq.run("dlq", "list", *arguments)
    assert listed.returncode == 0, listed.stderr
    letters = [json.loads(line) for line in listed.stdout.splitlines()]
    assert Counter(letter["id"] for letter in letters) == Counter(job.id for job in strays)
    assert {(letter["reason"], letter["address"], letter["attempt"]) for letter in letters} == {("lost", "job.gone", 2)}


def distribution(seconds: list[float]) -> str:
    p50, p99 = (quantiles(seconds, n=100)[at] * 1000 for at in (49, 98))
    return f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, at most {max(seconds) * 1000:.0f} ms"
