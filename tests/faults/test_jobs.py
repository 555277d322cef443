"""Jobs through every crash of a worker, a sender and a node, with real processes.

The oracle: a job that `send` returned for has had its effect, or is a dead letter that says why; at the end, its
queues are empty, and nothing is unacknowledged.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aio_pika
import pytest

import rpcq.worker
from rpcq import BrokerError, Client, SendError, Service, Worker
from rpcq.jobs import outcomes
from rpcq.wire.jobs import JobTopology
from support.broker import Setup
from support.broker import broker as a_broker
from support.letters import letters

TARGET = Path(__file__).resolve().parents[1] / "support" / "targets_jobs.py"
SHARED = f"t{secrets.token_hex(8)}"
"""One namespace: each has a ladder of 24 queues."""

SENDER = """
import asyncio, os, sys
from rpcq import Client

async def main():
    async with Client(namespace=os.environ["RPCQ_NAMESPACE"]) as client:
        for number in range(100_000):
            job = await client.send(f"{sys.argv[1]}.work", name=f"{sys.argv[2]}-{number}")
            print(f"{sys.argv[2]}-{number}", flush=True)

asyncio.run(main())
"""


class Home:
    """Workers and senders of one service, as processes, and what they did."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.service = f"s{secrets.token_hex(6)}"
        self.topology = JobTopology(SHARED)
        self.environment = {**os.environ, "RPCQ_URL": url, "RPCQ_NAMESPACE": SHARED}

    @asynccontextmanager
    async def worker(self, point: str = "none") -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, TARGET, self.folder, point, self.service, env=self.environment
        )
        try:
            while not (self.folder / f"serves-{process.pid}").exists():
                assert process.returncode is None
                await asyncio.sleep(0.02)
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    def client(self) -> Client:
        return Client(self.url, namespace=SHARED)

    def effects(self) -> Counter[str]:
        path = self.folder / "effects"
        return Counter(path.read_text().split()) if path.exists() else Counter()

    async def until_done(self, names: set[str]) -> None:
        while not names <= self.effects().keys():  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)

    async def is_empty(self) -> bool:
        """Whether the queues of the service have no message, also none that a worker holds."""
        async with await aio_pika.connect(self.url) as connection:
            channel = await connection.channel()
            queues = [self.topology.queue(self.service).name, self.topology.suspects(self.service).name]
            # Without a consumer, what was held is ready again.
            found = [await channel.declare_queue(name, passive=True) for name in queues]
            return not any(queue.declaration_result.message_count for queue in found)


@pytest.fixture
def home(rabbitmq_url: str, tmp_path: Path) -> Home:
    return Home(rabbitmq_url, tmp_path)


@pytest.mark.parametrize(
    ("job", "point", "most"),
    [
        pytest.param("work", "before the effect", 1, marks=pytest.mark.long),
        ("work", "after the effect", 2),
        pytest.param("work", "after the move is confirmed, done", 2, marks=pytest.mark.long),
        pytest.param("fail_once", "before the move", 3, marks=pytest.mark.long),
        ("fail_once", "after the move is confirmed", 4),
        pytest.param("give_up", "before the move", 2, marks=pytest.mark.long),
        ("give_up", "after the move is confirmed", 2),
    ],
)
async def test_a_worker_that_is_killed_at_any_point_loses_no_job(home: Home, job: str, point: str, most: int) -> None:
    async with home.worker(), home.client() as client:
        pass
    async with home.client() as client:
        async with home.worker(point) as dying:
            sent = await client.send(f"{home.service}.{job}", name="a")
            await dying.wait()
            assert dying.returncode == -signal.SIGKILL
        async with home.worker():
            await home.until_done({"a"})
            if job == "give_up":
                async with letters(home.url, home.topology.dead_queue(home.service)) as dead:
                    found = await dead.wait_for(1)
                    assert {letter.id for letter in found} == {sent.id}
                    assert {letter.headers["rpcq-dead-reason"] for letter in found} == {"gave_up"}
            elif job == "fail_once":
                while home.effects()["a"] < 2:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)  # a double may be on its way
        assert 1 <= home.effects()["a"] <= most
        assert await home.is_empty()


async def test_a_sender_that_is_killed_loses_no_job_that_it_was_told_of(home: Home) -> None:
    async with home.worker():
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SENDER, home.service, "n", env=home.environment, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        confirmed = {(await process.stdout.readline()).decode().strip() for _ in range(200)}
        process.kill()
        rest, _ = await process.communicate()
        confirmed |= set(rest.decode().split("\n")[:-1])
        await home.until_done(confirmed)
        await asyncio.sleep(0.5)
    assert set(home.effects().values()) == {1}
    assert await home.is_empty()


@pytest.mark.long
@pytest.mark.timeout(240)
async def test_a_node_that_is_killed_loses_no_job_that_it_confirmed(tmp_path: Path) -> None:
    with a_broker(setup=Setup()) as own:
        home = Home(own.url, tmp_path)
        async with home.worker(), home.client() as client:
            await asyncio.sleep(2)  # the queues are new: see `Broker.kill`
            confirmed: set[str] = set()
            failed: list[SendError] = []

            async def send(first: int) -> None:
                for number in range(first, first + 250):
                    try:
                        name = ("work", "fail_once")[number % 2]
                        await client.with_options(timeout=120).send(f"{home.service}.{name}", name=f"n{number}")
                        confirmed.add(f"n{number}")
                    except SendError as error:
                        failed.append(error)

            async def strike() -> None:
                for _ in range(2):
                    before = len(confirmed)
                    while len(confirmed) < before + 150:  # noqa: ASYNC110 - no event tells
                        await asyncio.sleep(0.01)
                    await asyncio.to_thread(own.kill)
                    await asyncio.to_thread(own.start)

            await asyncio.gather(strike(), *(send(first * 250) for first in range(4)))
            await home.until_done(confirmed)
        assert {error.queued for error in failed} <= {"maybe"}
        assert len(confirmed) + len(failed) == 1000


CONSUMER_TIMEOUT = 2.0
"""Seconds that the impatient broker lets a consumer hold a message."""


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_a_thread_that_hangs_for_ever_is_dead_after_a_bounded_number_of_consumer_timeouts(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to RabbitMQ 4.2, a consumer timeout closes the channel, and the broker counts it.

    From 4.3 on, it cancels the consumer, and counts it in `x-acquired-count` alone: no delivery limit ends it.
    """
    limit = 4
    monkeypatch.setattr(rpcq.worker, "CONSUMER_TIMEOUT", round(CONSUMER_TIMEOUT * 1000))  # the consumer's own, for 4.3
    monkeypatch.setattr(outcomes, "DELIVERY_LIMIT", limit)
    service = Service(f"s{secrets.token_hex(6)}")
    began: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    end = threading.Event()

    @service.job(timeout=0.5)
    def hangs() -> None:
        began["hangs"] += 1
        end.wait(170)

    @service.job
    async def slow() -> None:
        began["slow"] += 1
        await asyncio.sleep(2 * CONSUMER_TIMEOUT)
        ended["slow"] += 1

    @service.job
    async def quick(number: int) -> None:
        ended[f"quick-{number}"] += 1

    config = f"consumer_timeout = {CONSUMER_TIMEOUT * 1000:.0f}\nloopback_users.guest = false\n"
    topology = JobTopology(namespace)
    with a_broker(setup=Setup(config)) as own:
        # How often it looks is no key of rabbitmq.conf.
        await asyncio.to_thread(own.ctl, "eval", "application:set_env(rabbit, channel_tick_interval, 500).")
        worker = Worker(service, url=own.url, namespace=namespace, grace=0.5)
        async with Client(own.url, namespace=namespace) as client, worker:
            sessions: list[str] = []
            lost = worker._transport._consuming._on_down  # type: ignore[attr-defined]

            def note(cause: BrokerError) -> None:
                sessions.append(str(cause))
                lost(cause)

            monkeypatch.setattr(worker._transport._consuming, "_on_down", note)  # type: ignore[attr-defined]
            await client.send(hangs)
            await client.send(slow)
            number = 0
            async with letters(own.url, topology.dead_queue(service.name)) as dead:
                while not dead.found:
                    await client.send(quick, number=number)
                    number += 1
                    await asyncio.sleep(0.2)
                (letter,) = dead.found
            await client.send(quick, number=number)  # it still consumes
            neighbours = {"slow", *(f"quick-{each}" for each in range(number + 1))}
            while not neighbours <= ended.keys() or worker.in_flight:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.02)
            end.set()
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("delivery_limit", "maybe")
    assert letter.properties.type == b"hangs"
    assert len(sessions) >= limit
    assert began == {"hangs": 1, "slow": 1}
    assert ended == dict.fromkeys(neighbours, 1)
