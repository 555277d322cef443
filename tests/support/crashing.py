"""Workers and senders of jobs, as processes that die, and the oracle for what becomes of the jobs.

The oracle: a job that `send` returned for has had its effect, or is a dead letter that says why, or, if its queue was
deleted, is with the lost. When no worker is left, its queues and the ladder are empty: so nothing is unacknowledged.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika

from rpcq import Client
from rpcq.errors import BrokerUnreachable
from rpcq.jobs.letters import DeadLetter, Wanted
from rpcq.jobs.replaying import Letters
from rpcq.options import ConnectionOptions
from rpcq.transport.opening import open_admin
from rpcq.transport.rabbitmq.admin import Admin
from rpcq.url import parse
from rpcq.wire.events import EventTopology
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.topology import Queue, Topology

SUPPORT = Path(__file__).resolve().parent
SHARED = f"t{secrets.token_hex(8)}"
"""One namespace: each has a ladder of 24 queues."""

_declared: set[str] = set()  # URLs

Process = asyncio.subprocess.Process


async def until(condition: Callable[[], Any]) -> None:
    """Wait, within the test's own timeout."""
    while not condition():  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.02)


class Home:
    """Workers and senders of one service, as processes, and what they did."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.service = f"s{secrets.token_hex(6)}"
        self.topology = JobTopology(SHARED)
        self.environment = {**os.environ, "RPCQ_URL": url, "RPCQ_NAMESPACE": SHARED}

    # Processes.

    @asynccontextmanager
    async def worker(self, point: str = "none", *, url: str | None = None, old: bool = False) -> AsyncIterator[Process]:
        """A worker that dies at that point; it is killed at the end of the block."""
        environment = {**self.environment, "RPCQ_URL": url or self.url, "RPCQ_TEST_GENERATION": "old" if old else ""}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, SUPPORT / "targets_jobs.py", self.folder, point, self.service), env=environment
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

    async def stop(self, worker: Process) -> None:
        """Stop a worker in an orderly way."""
        worker.terminate()
        assert await worker.wait() == 0

    async def killed(self, worker: Process) -> None:
        """Wait until it has killed itself."""
        assert await worker.wait() == -signal.SIGKILL

    @asynccontextmanager
    async def sender(self, count: int, point: str) -> AsyncIterator[Process]:
        """A sender that dies at that point, after so many jobs; see `targets_sending.py`."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, SUPPORT / "targets_sending.py", self.service, "n", str(count), point),
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def dlq(self, *arguments: str) -> str:
        """Run `rpcq dlq`; returns what it printed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rpcq", "dlq", *arguments), env=self.environment, stdout=asyncio.subprocess.PIPE
        )
        said, _ = await process.communicate()
        assert process.returncode == 0, said
        return said.decode()

    def client(self, url: str | None = None, **options: Any) -> Client:
        return Client(url or self.url, namespace=SHARED, **options)

    async def send(self, *names: str, job: str = "work", **params: Any) -> dict[str, str]:
        """Send jobs; returns the name and the ID of each."""
        async with self.client() as client:
            sent = await client.send_many(f"{self.service}.{job}", [{"name": name, **params} for name in names])
        return {name: each.id for name, each in zip(names, sent, strict=True)}

    # Effects.

    def effects(self) -> Counter[str]:
        path = self.folder / "effects"
        return Counter(path.read_text().split()) if path.exists() else Counter()

    async def until_done(self, names: set[str], times: int = 1) -> None:
        await until(lambda: all(self.effects()[name] >= times for name in names))

    # The broker.

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[Admin]:
        url = parse(self.url)
        async with open_admin(url, ConnectionOptions(), *url.hosts[0]) as admin:
            yield admin

    @property
    def dead_queue(self) -> Queue:
        return self.topology.dead_queue(self.service)

    @property
    def queues(self) -> list[Queue]:
        """The queues of jobs that are to be done."""
        return [self.topology.queue(self.service), self.topology.suspects(self.service)]

    async def declare(self) -> None:
        """What `rpcq setup` does; what all services share, once."""
        exchanges, queues = [], [*self.queues, self.dead_queue]
        if self.url not in _declared:
            exchanges = Topology(SHARED).exchanges() + self.topology.exchanges()
            queues += self.topology.shared_queues()
        async with self.admin() as admin:
            await admin.declare(exchanges, queues)
        _declared.add(self.url)

    async def depths(self) -> dict[str, int]:
        """What waits: the messages that nobody holds, in the queues of the service and of the ladder."""
        found = {}
        async with await aio_pika.connect(self.url) as connection:
            channel = await connection.channel()
            for queue in (*self.queues, *self.topology.ladder.queues()):
                state = (await channel.declare_queue(queue.name, passive=True)).declaration_result
                if state.message_count:
                    found[queue.name] = state.message_count
        return found

    async def delayed(self, count: int) -> None:
        """Wait until the ladder holds so many messages."""
        names = {queue.name for queue in self.topology.ladder.queues()}
        found = 0
        while found < count:
            found = sum(depth for name, depth in (await self.depths()).items() if name in names)

    async def letters(self, queue: Queue | None = None) -> list[DeadLetter]:
        """The dead letters, or those of another queue; they stay."""
        while True:
            try:
                async with self.admin() as admin:
                    letters = Letters(admin, EventTopology(SHARED), (queue or self.dead_queue).name)
                    bound = (await letters.state()).messages
                    return [letter async for letter in letters.look(Wanted(), bound)]
            except BrokerUnreachable:
                continue  # a busy broker took too long to take them back: it did when the connection was closed

    async def lost(self) -> list[DeadLetter]:
        """The lost messages of this service."""
        found = await self.letters(Queue(self.topology.lost.name))
        return [letter for letter in found if letter.service == self.service]

    async def until_dead(self, count: int) -> list[DeadLetter]:
        while len(found := await self.letters()) < count:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.1)
        return found

    # The oracle.

    async def finish(self) -> None:
        """Let workers do all that is left, and stop them in an orderly way: afterwards nothing is unacknowledged."""
        while True:
            async with self.worker() as worker:
                while await self.depths():  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(0.05)
                await self.stop(worker)
            if not await self.depths():
                return

    async def check(self, confirmed: dict[str, str]) -> dict[str, DeadLetter]:
        """Hold the oracle to what `send` returned for, name -> ID; returns the dead letters by ID."""
        await self.finish()
        dead = {letter.job.id: letter for letter in await self.letters()}
        done = self.effects().keys()
        nowhere = {name for name, job_id in confirmed.items() if name not in done and job_id not in dead}
        assert not nowhere
        assert all(letter.reason and letter.error for letter in dead.values())
        return dead
