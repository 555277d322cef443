"""Generators and workers that run in processes of their own, and talk to this process line by line.

A generator can also run in this process: with `memory://`, it has to.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol

from rpcq.bench.generator import Generator
from rpcq.bench.plan import Plan
from rpcq.bench.recording import Measured, Tally, read_measured
from rpcq.client import Client
from rpcq.errors import RpcqError

READY: Final = 30.0
"""Seconds that a process has to start and connect, and to end."""

LONGEST_LINE: Final = 64 * 1024 * 1024
"""Bytes. A generator sends all its measurements as one line."""


class RunningGenerator(Protocol):
    """A generator that is connected, and can begin."""

    def stop(self) -> None:
        """Send no more calls."""

    async def measure(self, on_second: Callable[[int, Tally], None]) -> Measured:
        """Make all calls; `on_second` is called after each second."""


class _Local(RunningGenerator):
    """A generator in this process."""

    def __init__(self, plan: Plan, client: Client) -> None:
        self._plan = plan
        self._client = client
        self._generator: Generator | None = None
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True
        if self._generator is not None:
            self._generator.stop()

    async def measure(self, on_second: Callable[[int, Tally], None]) -> Measured:
        self._generator = Generator(self._plan, self._client, on_second)
        if self._stopped:
            self._generator.stop()
        return await self._generator.run()


class _Remote(RunningGenerator):
    """A generator in a process of its own: `rpcq.bench.generating`."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def stop(self) -> None:
        self._process.send(b"stop")

    async def measure(self, on_second: Callable[[int, Tally], None]) -> Measured:
        self._process.send(b"go")
        while True:
            line = await self._process.read(seconds=None)
            kind, _, rest = line.partition(" ")
            if kind == "measured":
                return read_measured(rest.encode())
            second, tally = json.loads(rest)
            on_second(second, Tally(**tally))


@asynccontextmanager
async def running_generator(plan: Plan) -> AsyncIterator[RunningGenerator]:
    """Start a generator and connect it."""
    if plan.url.startswith("memory:"):
        async with Client(plan.url, namespace=plan.namespace, max_in_flight=plan.in_flight + 1) as client:
            yield _Local(plan, client)
        return
    async with running("rpcq.bench.generating") as process:
        process.send(plan.to_json())
        await process.read("ready")
        yield _Remote(process)


class Process:
    """A Python module that runs as a process. Both sides send lines of text."""

    def __init__(self, process: asyncio.subprocess.Process, module: str) -> None:
        self._process = process
        self._module = module

    def send(self, line: bytes) -> None:
        """Send a line, unless the input of the process is closed."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        if not self._process.stdin.is_closing():
            self._process.stdin.write(line + b"\n")

    def close(self) -> None:
        """Close the input of the process, which ends it."""
        assert self._process.stdin is not None  # noqa: S101
        self._process.stdin.close()

    async def read(self, expected: str = "", seconds: float | None = READY) -> str:
        """The next line, which has to begin with `expected`.

        Raises:
            RpcqError: the process sent an error or another line, ended, or sent nothing within `seconds`.

        """
        assert self._process.stdout is not None  # noqa: S101
        try:
            async with asyncio.timeout(seconds):
                line = (await self._process.stdout.readline()).decode()
        except TimeoutError as error:
            raise RpcqError(f"{self._module} did not answer within {seconds:g} s") from error
        if not line:
            raise RpcqError(f"{self._module} ended unexpectedly, with exit code {await self._process.wait()}")
        if line.startswith("error "):
            raise RpcqError(line.removeprefix("error ").strip())
        if not line.startswith(expected):
            raise RpcqError(f"{self._module} sent an unexpected line: {line!r}")
        return line.rstrip("\n")


@asynccontextmanager
async def running(module: str) -> AsyncIterator[Process]:
    """Run a module as a process; in the end, close its input and wait for it, or kill it after `READY` seconds."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LONGEST_LINE,
        start_new_session=True,  # Ctrl-C then goes to this process only, which stops the others
    )
    found = Process(process, module)
    try:
        yield found
    finally:
        found.close()
        try:
            async with asyncio.timeout(READY):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
