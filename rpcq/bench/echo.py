"""The built-in target: a service that echoes nonces, and records which ones it has seen.

As a process: `python -m rpcq.bench.echo`, with its settings as a line of JSON on standard input. It writes "ready",
serves until its standard input closes, and writes what it has seen.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rpcq import logs
from rpcq.bench.generator import NONCES
from rpcq.errors import RpcqError
from rpcq.runtime.process import run
from rpcq.service import Service
from rpcq.worker import Worker

METHOD = "echo"


@dataclass(slots=True)
class NonceRecord:
    """The nonces that handlers have seen.

    Attributes:
        runs: number of runs of handlers.
        doubled: runs with a nonce that was seen before.
        bits: number of the generator -> a bit for each of its nonces.

    """

    runs: int = 0
    doubled: int = 0
    bits: dict[int, bytearray] = field(default_factory=dict)

    def add(self, nonce: int) -> None:
        """Record that a handler ran with this nonce."""
        self.runs += 1
        generator, number = divmod(nonce, NONCES)
        at, bit = divmod(number, 8)
        bits = self.bits.setdefault(generator, bytearray())
        if at >= len(bits):
            bits.extend(bytes(max(1024, at + 1 - len(bits))))
        if bits[at] & 1 << bit:
            self.doubled += 1
        bits[at] |= 1 << bit

    def merge(self, others: Iterable[NonceRecord]) -> NonceRecord:
        """Add what others saw to this; returns this."""
        for other in others:
            self.runs += other.runs
            self.doubled += other.doubled
            for generator, theirs in other.bits.items():
                ours = self.bits.setdefault(generator, bytearray())
                ours.extend(bytes(max(0, len(theirs) - len(ours))))
                both = int.from_bytes(ours, "big") & int.from_bytes(theirs.ljust(len(ours), b"\0"), "big")
                self.doubled += both.bit_count()
                for at, byte in enumerate(theirs):
                    ours[at] |= byte
        return self

    def to_json(self) -> str:
        """The record as JSON, for `read_nonces` in another process."""
        bits = {generator: base64.b85encode(zlib.compress(each)).decode() for generator, each in self.bits.items()}
        return json.dumps({"runs": self.runs, "doubled": self.doubled, "bits": bits})


def read_nonces(text: str | bytes) -> NonceRecord:
    """The record of a worker, from its JSON."""
    found = json.loads(text)
    bits = {int(it): bytearray(zlib.decompress(base64.b85decode(each))) for it, each in found["bits"].items()}
    return NonceRecord(found["runs"], found["doubled"], bits)


def echo_service(
    name: str, queue_type: Literal["classic", "quorum"], simulate: float, *, is_job: bool = False
) -> tuple[Service, NonceRecord]:
    """A service that returns its nonce after `simulate` seconds, and the record of the nonces it sees.

    Its only method is `METHOD`, or with `is_job` its only job; the queues of jobs have one type.
    """
    service, nonces = Service(name, queue_type=queue_type), NonceRecord()

    async def echo(nonce: int, payload: str) -> int:  # noqa: ARG001 - it only makes the request larger
        nonces.add(nonce)
        if simulate:
            await asyncio.sleep(simulate)
        return nonce

    if is_job:
        service.job(name=METHOD)(echo)
    else:
        service.method(name=METHOD)(echo)
    return service, nonces


async def serve(settings: Mapping[str, Any]) -> None:
    """Serve until standard input closes."""
    service, nonces = echo_service(
        settings["service"], settings["queue_type"], settings["simulate"], is_job=settings["is_job"]
    )
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    ended = asyncio.Event()

    class Pipe(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            del exc
            ended.set()

    try:
        async with Worker(
            service,
            url=settings["url"],
            namespace=settings["namespace"],
            prefetch=settings["prefetch"],
            job_prefetch=settings["prefetch"],
            name="rpcq-bench-worker",
        ):
            _say("ready")
            await asyncio.get_running_loop().connect_read_pipe(Pipe, sys.stdin)
            await ended.wait()
    except RpcqError as error:
        _say(f"error {type(error).__name__}: {error}".replace("\n", " "))
    else:
        _say(nonces.to_json())


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - read by the process that started this one


def main() -> None:
    """Run as a process."""
    logs.configure("WARNING")
    run(serve(json.loads(sys.stdin.readline())))


if __name__ == "__main__":
    main()
