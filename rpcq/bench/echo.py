"""The built-in target: a service that echoes nonces, and remembers which it has seen.

As a process: `python -m rpcq.bench.echo`, with its settings as JSON on standard input. It says "ready", serves until
its standard input closes, and says what it has seen.
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
from rpcq.runtime.process import run
from rpcq.service import Service
from rpcq.worker import Worker

METHOD = "echo"


@dataclass(slots=True)
class Seen:
    """Which nonces handlers have seen.

    Attributes:
        runs: how often handlers were run.
        doubled: how often with a nonce that they had seen before.
        bits: generator -> a bit for each of its nonces.

    """

    runs: int = 0
    doubled: int = 0
    bits: dict[int, bytearray] = field(default_factory=dict)

    def add(self, nonce: int) -> None:
        """A handler ran with this."""
        self.runs += 1
        generator, number = divmod(nonce, NONCES)
        at, bit = divmod(number, 8)
        bits = self.bits.setdefault(generator, bytearray())
        if at >= len(bits):
            bits.extend(bytes(max(1024, at + 1 - len(bits))))
        if bits[at] & 1 << bit:
            self.doubled += 1
        bits[at] |= 1 << bit

    def merge(self, others: Iterable[Seen]) -> Seen:
        """What all of them saw, together with this."""
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
        """For `read_seen` in another process."""
        bits = {generator: base64.b85encode(zlib.compress(each)).decode() for generator, each in self.bits.items()}
        return json.dumps({"runs": self.runs, "doubled": self.doubled, "bits": bits})


def read_seen(text: str | bytes) -> Seen:
    """What a worker saw, from its JSON."""
    found = json.loads(text)
    bits = {int(it): bytearray(zlib.decompress(base64.b85decode(each))) for it, each in found["bits"].items()}
    return Seen(found["runs"], found["doubled"], bits)


def echo_service(name: str, queue_type: Literal["classic", "quorum"], simulate: float) -> tuple[Service, Seen]:
    """A service whose one method gives back its nonce, after `simulate` seconds; and what it will have seen."""
    service, seen = Service(name, queue_type=queue_type), Seen()

    @service.method(name=METHOD)
    async def echo(nonce: int, payload: str) -> int:  # noqa: ARG001 - it is there to be carried
        seen.add(nonce)
        if simulate:
            await asyncio.sleep(simulate)
        return nonce

    return service, seen


async def serve(asked: Mapping[str, Any]) -> None:
    """Serve until standard input closes."""
    service, seen = echo_service(asked["service"], asked["queue_type"], asked["simulate"])
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    ended = asyncio.Event()

    class Pipe(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            del exc
            ended.set()

    async with Worker(
        service, url=asked["url"], namespace=asked["namespace"], prefetch=asked["prefetch"], name="rpcq-bench-worker"
    ):
        print("ready", flush=True)  # noqa: T201 - to whoever started this
        await asyncio.get_running_loop().connect_read_pipe(Pipe, sys.stdin)
        await ended.wait()
    print(seen.to_json(), flush=True)  # noqa: T201


def main() -> None:
    """Run as a process."""
    logs.configure("WARNING")
    run(serve(json.loads(sys.stdin.readline())))


if __name__ == "__main__":
    main()
