"""What a flood of jobs with priority `low` costs those with priority `high`, with the worker in a process of its own.

    RPCQ_URL=amqp://guest:guest@localhost/ python -m benchmarks.lanes --low 10000 --rounds 3

Each round measures urgent jobs, sent at a constant rate (an open model), first without and then with a flood. The flood
is in its queue before the first urgent job is sent, and an urgent job counts only while part of the flood still waits.
The time is that from the call of `send` to the begin of the handler, by one clock. `p99_ratio` is of all rounds.

A job of the flood waits for `--work` seconds, as one that waits for a database does. With `--work 0`, it does nothing:
then the flood takes all of the worker's CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median, quantiles
from typing import TextIO

from benchmarks.events import clear
from rpcq import Client, Service, Worker

SERVICE = "lanes"
CHUNK = 1000


def serving(file: TextIO) -> Service:
    """The service. It notes in the file how long each urgent job has waited, and when each other one has ended."""
    service = Service(SERVICE, lanes=True)

    @service.job
    async def urgent(sent: float) -> None:
        file.write(f"urgent {sent} {time.time() - sent}\n")

    @service.job
    async def other(work: float) -> None:
        if work:
            await asyncio.sleep(work)
        file.write(f"other {time.time()} 0\n")

    return service


async def serve(path: Path) -> None:
    """Be the worker, until the process that started it closes the pipe."""
    with path.open("w", buffering=1) as file:
        async with Worker(serving(file), connect_timeout=60):
            print("serves", flush=True)
            await asyncio.to_thread(sys.stdin.read)


class Bench:
    """One run.

    Args:
        given: the arguments.
        client: sends.
        path: what the worker writes.

    """

    def __init__(self, given: argparse.Namespace, client: Client, path: Path) -> None:
        self.given = given
        self.client = client
        self.path = path
        self.low = 0
        self._read = 0
        self._lines: dict[str, list[tuple[float, float]]] = {"urgent": [], "other": []}

    def lines(self, kind: str) -> list[tuple[float, float]]:
        """What the worker has written."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode().splitlines():
            which, at, late = line.split()
            self._lines[which].append((float(at), float(late)))
        return self._lines[kind]

    async def flood(self) -> None:
        """Send the flood."""
        low = self.client.with_options(priority="low")
        for _ in range(self.given.low // CHUNK):
            await low.send_many(f"{SERVICE}.other", [{"work": self.given.work}] * CHUNK)
            self.low += CHUNK

    async def written(self, kind: str, count: int) -> list[tuple[float, float]]:
        """Wait until the worker has written so many lines; returns all of them."""
        while len(found := self.lines(kind)) < count:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)
        return found

    async def urgent(self, *, flooded: bool) -> list[float]:
        """Send urgent jobs for a while; returns how long those have waited that began before the end of the flood."""
        high = self.client.with_options(priority="high")
        before, begun, sending = len(self.lines("urgent")), time.monotonic(), []
        for number in range(int(self.given.rate * self.given.seconds)):
            await asyncio.sleep(max(0.0, begun + number / self.given.rate - time.monotonic()))
            sending.append(asyncio.create_task(high.send(f"{SERVICE}.urgent", sent=time.time())))
        await asyncio.gather(*sending)
        found = (await self.written("urgent", before + len(sending)))[before:]
        if not flooded:
            return [late for _, late in found]
        ended = max(at for at, _ in await self.written("other", self.low))
        return [late for sent, late in found if sent + late < ended]

    async def run(self) -> dict[str, float]:
        """All rounds."""
        waited: dict[str, list[float]] = {"without": [], "with": []}
        await self.urgent(flooded=False)  # the first ones declare, and warm up
        for _ in range(self.given.rounds):
            waited["without"] += await self.urgent(flooded=False)
            await self.flood()
            waited["with"] += await self.urgent(flooded=True)
        without, flooded = (quantiles(waited[kind], n=100)[98] * 1000 for kind in waited)
        return {
            "urgent_without": len(waited["without"]),
            "urgent_with": len(waited["with"]),
            "p50_without_ms": median(waited["without"]) * 1000,
            "p50_with_ms": median(waited["with"]) * 1000,
            "p99_without_ms": without,
            "p99_with_ms": flooded,
            "p99_ratio": flooded / without,
        }


async def measure(given: argparse.Namespace) -> dict[str, float]:
    """Start the worker, and measure."""
    namespace = f"lanes{os.getpid()}"
    environment = {**os.environ, "RPCQ_NAMESPACE": namespace}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs"
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.lanes", "--serve", str(path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            if await worker.stdout.readline() != b"serves\n":
                raise SystemExit("the worker did not start")
            async with Client(namespace=namespace) as client:
                return await Bench(given, client, path).run()
        finally:
            with suppress(ConnectionError):
                worker.stdin.close()
            await worker.wait()
            await clear(os.environ["RPCQ_URL"], namespace, [serving(sys.stdout)])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--low", type=int, default=10_000, help="jobs of the flood, in thousands")
    parser.add_argument("--work", type=float, default=0.01, help="seconds that each of them waits")
    parser.add_argument("--rate", type=float, default=100.0, help="urgent jobs sent in a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long they are sent")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        asyncio.run(serve(given.serve))
        return
    print(json.dumps({name: round(value, 2) for name, value in asyncio.run(measure(given)).items()}))


if __name__ == "__main__":
    main()
