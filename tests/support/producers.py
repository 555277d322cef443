"""The example services as programs, and workers for the producer, each a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

from support.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 30.0

WORKER = """
import asyncio, sys
from rpcq import Service, Worker

echo = Service("echo")

@echo.method(idempotent=True)
async def process(message: str, delay: float = 0.0) -> str:
    if "break" in message:
        raise ValueError("the secret reason")
    if "other" in message:
        return "Consumer processed: something else"
    print("began", message, flush=True)
    try:
        await asyncio.sleep(delay)
    except asyncio.CancelledError:
        print("cancelled", message, flush=True)
        raise
    return f"Consumer processed: {message}"

async def main():
    async with Worker(echo, namespace=sys.argv[1], grace=0.1):
        print("up", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
"""Tells what its handlers begin, and which of them are cancelled."""

FORWARDER = """
import asyncio, sys
from support.proxy import proxy

async def main():
    async with proxy(sys.argv[1], port=int(sys.argv[2])):
        print("up", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
"""A proxy of its own process: these tests have no event loop for one."""


def environment(url: str | None) -> dict[str, str]:
    """That of a program: this broker, and else no settings of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RPCQ_", "COLUMNS"))}
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return kept | {"PYTHONPATH": path} | ({} if url is None else {"RPCQ_URL": url})


def run(*arguments: str, url: str | None) -> subprocess.CompletedProcess[str]:
    """Run a Python to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        cwd=ROOT,
        env=environment(url),
    )


@contextmanager
def program(*arguments: str, url: str | None = None, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A Python that ends with the block; `more` goes into its environment."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=environment(url) | more,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=SECONDS)
        finally:
            process.kill()


def out(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


@contextmanager
def serving(url: str | None, namespace: str, *arguments: str) -> Iterator[str]:
    """The producer as a web app on a free port: where it is."""
    options = ("-m", "producer_service", "serve", "--port", "0", "--namespace", namespace, *arguments)
    with program(*options, url=url) as process:
        line = out(process).readline()
        assert line.startswith("serving http://127.0.0.1:"), line
        yield line.split()[1]


@contextmanager
def worker(url: str, namespace: str) -> Iterator[IO[str]]:
    """A worker that serves: what it tells, by lines."""
    with program("-c", WORKER, namespace, url=url) as process:
        assert out(process).readline() == "up\n"
        yield out(process)


def told(lines: IO[str], *, cancelled: int) -> list[str]:
    """What a worker tells until so many of its handlers have been cancelled; waits for that, up to pytest's timeout."""
    found: list[str] = []
    while sum(it.startswith("cancelled") for it in found) < cancelled:
        line = lines.readline()
        assert line, "the worker ended"
        found.append(line.strip())
    return found


class Away:
    """A broker behind a port where nobody listens, until it is let through."""

    def __init__(self, url: str) -> None:
        self._url = url
        (self.port,) = free_ports(1)

    @property
    def url(self) -> str:
        parts = urlsplit(self._url)
        credentials, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{credentials}{at}127.0.0.1:{self.port}"))

    @contextmanager
    def back(self) -> Iterator[None]:
        with program("-c", FORWARDER, self._url, str(self.port)) as process:
            assert out(process).readline() == "up\n"
            yield
