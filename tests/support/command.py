"""The `rpcq` command as a real process, in a folder with a module `services`, on RabbitMQ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20.0
SECRET = "s3cr3t-0f-this-test"

SERVICES = '''
import asyncio
import time
from decimal import Decimal
from pathlib import Path

from rpcq import DomainError, Service

class OutOfStock(DomainError):
    """No more."""

things = Service("things", errors=[OutOfStock])
others = Service("others")
not_one = 5

@things.method
async def add(x: int, y: int) -> int:
    return x + y

@things.method
async def tell(value=None, *, again=None):
    return [value, again]

@things.method
async def fail(secret: str):
    raise ValueError(f"the text of this is not for callers: {secret}")

@things.method
async def sell():
    raise OutOfStock("none\\nleft")

@things.method
async def hold(name: str, until: str) -> str:
    """Runs until there is a file of that name."""
    Path(name).touch()
    while not Path(until).exists():
        await asyncio.sleep(0.01)
    return "released"

@things.method
def block(name: str) -> None:
    Path(name).touch()
    time.sleep(60)

@others.method
async def who() -> str:
    return "others"
'''


@dataclass
class Rpcq:
    """The command, in a folder with a module `services`, on one broker and namespace."""

    url: str
    namespace: str
    folder: Path
    processes: list[Process] = field(default_factory=list)

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RPCQ_", "COV_", "COLUMNS"))}
        return {**kept, "RPCQ_URL": self.url, "PYTHONPATH": str(ROOT), "TERM": "dumb", **more}

    def run(self, *arguments: str, given: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rpcq", *arguments],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            cwd=self.folder,
            env=self.environment(**environment),
            **({"stdin": subprocess.DEVNULL} if given is None else {"input": given}),
        )

    def call(self, *arguments: str, given: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("call", "--namespace", self.namespace, *arguments, given=given, **environment)

    def refused(self, *arguments: str, code: int, **environment: str) -> str:
        """Run what is to fail: the one line that says why."""
        return one_line(self.run(*arguments, **environment), code)

    def calls(self, each: Iterable[list[str]]) -> list[subprocess.CompletedProcess[str]]:
        """Several calls at once: a process takes its time to start."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda arguments: self.call(*arguments), each))

    def call_refused(self, *arguments: str, code: int) -> str:
        return self.refused("call", "--namespace", self.namespace, *arguments, code=code)

    def start(self, *arguments: str) -> Process:
        process = Process([sys.executable, "-m", "rpcq", *arguments], self.folder, self.environment())
        self.processes.append(process)
        return process

    def worker(self, *arguments: str) -> Process:
        """A worker that serves."""
        process = self.start("worker", "--namespace", self.namespace, *(arguments or ("services:things",)))
        process.wait_for(lambda: any("worker started" in line for line in process.lines))
        return process

    def until_there_is(self, name: str) -> None:
        wait_until((self.folder / name).exists)


def one_line(ran: subprocess.CompletedProcess[str], code: int) -> str:
    """What a command that failed says, and no more than that."""
    assert ran.returncode == code, ran.stderr
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr
    lines = ran.stderr.splitlines()
    assert len(lines) == 1, ran.stderr
    return lines[0]


class Process:
    """A process whose standard error is read as it comes."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def _read(self) -> None:
        assert self._process.stderr is not None
        self.lines.extend(line.rstrip("\n") for line in self._process.stderr)

    def wait_for(self, condition: Callable[[], object]) -> None:
        wait_until(lambda: condition() or self._process.poll() is not None)
        assert condition(), "\n".join(self.lines)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def ended(self) -> int:
        """Wait for its end: the exit code."""
        code = self._process.wait(SECONDS)
        self._reader.join(SECONDS)
        return code

    def output(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.read()

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self.ended()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()


def wait_until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


def delete_queues(url: str, namespace: str, services: Iterable[str] = ("things", "others")) -> None:
    import pika

    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        for service in services:
            for kind in ("req", "once"):
                channel.queue_delete(f"{namespace}.{kind}.{service}")
        for exchange in ("requests", "control"):
            channel.exchange_delete(f"{namespace}.{exchange}")
