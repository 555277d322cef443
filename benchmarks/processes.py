"""The processes of a benchmark, and the lines of JSON between them and the runner.

A process gets commands on its standard input and reports on its standard output. It ends when its input ends, so that
none outlives its runner, however that one ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn

import aiormq
import psutil  # type: ignore[import-untyped]  # it ships no types
from aiormq.abc import AbstractChannel, AbstractConnection
from yarl import URL

Line = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
READY_WITHIN = 60.0
"""Seconds that a process has for its imports, its connection and, a client, for finding its worker."""
CLOSE_WITHIN = 5.0
"""Seconds that a process has to close its connection, before it is terminated."""


class BenchmarkError(Exception):
    """The benchmark cannot go on; the message says why."""


# The runner's side.


class Process:
    """A process of the benchmark, as its runner sees it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        """Take over `process`; `name` is for messages."""
        self.name = name
        self.ps = psutil.Process(process.pid)
        self._process = process

    async def read(self, event: str, within: float = READY_WITHIN) -> Line:
        """Wait at most `within` seconds for the line that reports `event`.

        Raises:
            BenchmarkError: the process ended, reported something else or nothing in time.
        """
        assert self._process.stdout is not None
        try:
            raw = await asyncio.wait_for(self._process.stdout.readline(), within)
        except TimeoutError:
            raise BenchmarkError(f"{self.name} did not report {event!r} within {within:g} s") from None
        if not raw:
            code = await self._process.wait()
            raise BenchmarkError(f"{self.name} ended (exit code {code}) before it reported {event!r}; see above")
        line: Line = json.loads(raw)
        if line["event"] != event:
            raise BenchmarkError(f"{self.name} reported {line!r}, not {event!r}")
        return line

    def write(self, command: Line) -> None:
        """Send a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        return cpu_seconds(self.ps)

    def resident_bytes(self) -> int:
        """The resident set now."""
        return int(self.ps.memory_info().rss)

    async def end(self) -> None:
        """Let the process close its connection; failing that, make it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        for insist in (self._process.terminate, self._process.kill):
            try:
                await asyncio.wait_for(self._process.wait(), CLOSE_WITHIN)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    insist()
            else:
                return
        await self._process.wait()


@contextlib.asynccontextmanager
async def started(
    name: str, module: str, *arguments: str, checkout: Path = ROOT
) -> AsyncIterator[tuple[Process, Line]]:
    """Run `python -m module arguments` in a checkout while inside; gives the process and its line `ready`."""
    async with running(name, sys.executable, "-m", module, *arguments, folder=checkout) as found:
        yield found


@contextlib.asynccontextmanager
async def running(
    name: str, *command: str, folder: Path = ROOT, environ: dict[str, str] | None = None
) -> AsyncIterator[tuple[Process, Line]]:
    """Run a command in a folder while inside; gives the process and its line `ready`."""
    process = Process(
        name,
        await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=folder,
            env=environ,
            # Ctrl-C is for the runner alone: it ends the processes in order, without a traceback from each.
            start_new_session=True,
        ),
    )
    try:
        yield process, await process.read("ready")
    finally:
        await process.end()


def run(main: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a runner's `main` and exit with its code; SIGTERM unwinds it as Ctrl-C does, so that its processes end."""

    async def with_sigterm() -> int:
        task = asyncio.ensure_future(main)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    try:
        sys.exit(asyncio.run(with_sigterm()))
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)


# The side of the process itself.


def say(event: str, **values: Any) -> None:
    """Report to the runner."""
    print(json.dumps({"event": event, **values}), flush=True)


class _InputEndedError(Exception):
    pass


async def obey(handle: Callable[[Line], Awaitable[None]]) -> None:
    """Handle commands until the input ends; what is still being handled then is cancelled."""

    async def handle_one(line: bytes) -> None:
        await handle(json.loads(line))

    async def handle_all(group: asyncio.TaskGroup) -> NoReturn:
        while line := await reader.readline():
            group.create_task(handle_one(line))
        # The runner may be gone, and then nobody else ends a process that hangs while it closes.
        loop.call_later(2 * CLOSE_WITHIN, os._exit, 1)
        raise _InputEndedError

    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        async with asyncio.TaskGroup() as group:
            await handle_all(group)
    except* _InputEndedError:
        pass


# The broker.


def broker_url() -> str:
    """The broker to measure on.

    Raises:
        BenchmarkError: RPCQ_URL is not set.
    """
    url = os.environ.get("RPCQ_URL", "")
    if not url.startswith(("amqp://", "amqps://")):
        raise BenchmarkError(
            "set RPCQ_URL to the RabbitMQ to measure on, as in RPCQ_URL=amqp://guest:guest@localhost/; "
            "or run `make bench`, which starts one"
        )
    return url


@contextlib.asynccontextmanager
async def broker_channel(url: str) -> AsyncIterator[tuple[AbstractConnection, AbstractChannel]]:
    """A connection of the runner's own, and a channel on it.

    Raises:
        BenchmarkError: the broker cannot be reached.
    """
    try:
        connection = await asyncio.wait_for(aiormq.connect(url), 10)
    except (OSError, TimeoutError, aiormq.AMQPError) as error:
        raise BenchmarkError(f"cannot connect to the RabbitMQ at {URL(url).with_user(None)}: {error!r}") from error
    try:
        yield connection, await connection.channel()
    finally:
        await connection.close()


async def remove_leftovers(url: str, namespace: str, services: list[str]) -> None:
    """Delete what rpcq declares durably: every run has a namespace of its own, which nobody needs afterwards."""
    from rpcq.wire.topology import Topology

    async with broker_channel(url) as (_, channel):
        for service in services:
            await channel.queue_delete(f"{namespace}.req.{service}")
        for exchange in Topology(namespace).exchanges():
            await channel.exchange_delete(exchange.name)


def broker_process(url: str) -> psutil.Process | None:
    """The broker's process, if it runs on this machine and outside a container, and if we may look."""
    parsed = URL(url)
    port = parsed.port or (5671 if parsed.scheme == "amqps" else 5672)
    try:
        # Only an address of this machine can be bound.
        with socket.create_server((socket.gethostbyname(parsed.host or "localhost"), 0)):
            pass
        listening = psutil.net_connections("tcp")
        for connection in listening:
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                if process.name().startswith("beam"):
                    return process
    except (OSError, psutil.Error):
        pass
    return None


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)
