"""An example system as processes, each of which a test starts and kills by its name."""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from rpcq import Client
from rpcq.observability.queues import QueueWatch
from support.producers import ROOT, environment

WORKER = ("rpcq", "worker", "--log-level", "error")
FOR_WORKERS = ("calls", "jobs", "events", "suspects", "delayed")
"""The kinds of queues whose messages workers take, sooner or later."""


class Processes:
    """The processes of a system, on one broker and in a namespace of its own.

    Args:
        url: of the broker.
        commands: the name of a process -> what follows `python -m`; the first one says when it serves.
        settings: for their environment.
        workers: a service -> how many workers of it there must be before a test begins.
        watched: the services whose queues are looked at; also as `service:subscription`.

    Attributes:
        url: as given.
        namespace: of the system.

    """

    def __init__(
        self,
        url: str,
        commands: Mapping[str, Sequence[str]],
        settings: Mapping[str, str],
        workers: Mapping[str, int],
        watched: Sequence[str],
    ) -> None:
        self.url = url
        self.namespace = f"t{secrets.token_hex(8)}"
        self._commands = commands
        self._first = next(iter(commands))
        self._environment = environment(url) | {"RPCQ_NAMESPACE": self.namespace} | settings
        self._workers = workers
        self._watched = watched
        self._running: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, name: str) -> None:
        """Start a process; the first one serves then."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *self._commands[name]),
            cwd=ROOT,
            env=self._environment,
            stdout=asyncio.subprocess.PIPE if name == self._first else None,
        )
        self._running[name] = process
        if process.stdout is not None:
            assert (await process.stdout.readline()).startswith(b"serving ")

    async def start_all(self) -> None:
        """Start all processes, and wait for their workers."""
        for name in self._commands:
            await self.start(name)
        async with Client(self.url, namespace=self.namespace) as client:
            for service, count in self._workers.items():
                while len([found async for found in client.workers(service)]) < count:
                    pass

    async def kill(self, name: str) -> None:
        """Kill a process, as by `kill -9`."""
        self._running[name].kill()
        await self._running[name].wait()

    async def end(self) -> None:
        """Kill what still runs."""
        for process in self._running.values():
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def depths(self) -> dict[str, int]:
        """The messages that wait, by the kind of their queue."""
        watch = QueueWatch(self._watched, self.url, management="", namespace=self.namespace)
        found: Counter[str] = Counter()
        for depth in await watch.look():
            found[depth.kind] += depth.messages
        return dict(found)

    async def drained(self) -> dict[str, int]:
        """Wait until no message waits for a worker any more; then the same as `depths`."""
        while True:
            depths = await self.depths()
            if not any(depths.get(kind) for kind in FOR_WORKERS):
                return depths
            await asyncio.sleep(0.1)


Made = TypeVar("Made", bound=Processes)


@asynccontextmanager
async def running(system: Made) -> AsyncIterator[Made]:
    """The system with all its processes, until the block ends."""
    try:
        await system.start_all()
        await asyncio.sleep(2)  # the queues are new: see `Broker.kill`
        yield system
    finally:
        await system.end()
