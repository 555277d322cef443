"""Whether several workers get about the same number of calls, and whether quick calls wait for slow ones.

    RPCQ_URL=amqp://guest:guest@localhost/ python -m benchmarks.fairness

For handlers that take 0, 2 and 20 ms, four worker processes serve one service, and one client has 400 calls under way.
Then 19 of 20 calls are quick, and each 20th takes 20 ms. Each is measured with batching on, and then with it off.

    share   calls of the busiest worker, divided by those of the least busy
    p99     of the quick calls, or of all if there is one kind
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import statistics
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from benchmarks.processes import ROOT, broker_url, remove_leftovers, run
from rpcq import Client, Service, Worker

WORKERS = 4
SLOW_EVERY = 20


async def serve(namespace: str, *, batching: bool) -> None:
    """One worker; it says "ready", and how many calls it had when its input ends."""
    service = Service("things", batching=batching)
    had = 0

    @service.method
    async def work(seconds: float) -> None:
        nonlocal had
        had += 1
        if seconds:
            await asyncio.sleep(seconds)

    async with Worker(service, url=broker_url(), namespace=namespace):
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    print(json.dumps(had), flush=True)


@contextlib.asynccontextmanager
async def workers(namespace: str, *, batching: bool) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """Four workers that serve."""
    command = [sys.executable, "-m", "benchmarks.fairness", "--serve", namespace, "on" if batching else "off"]
    pipe = asyncio.subprocess.PIPE
    started = [
        await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT, env=os.environ)
        for _ in range(WORKERS)
    ]
    try:
        for worker in started:
            assert worker.stdout is not None
            await worker.stdout.readline()
        yield started
    finally:
        for worker in started:
            if worker.returncode is None:
                worker.kill()
            await worker.wait()


async def measure(name: str, quick: float, slow: float, given: argparse.Namespace, *, batching: bool) -> None:
    """Call for some seconds, and print a line."""
    namespace = f"fair-{secrets.token_hex(4)}"
    took: list[float] = []
    made = 0
    try:
        async with workers(namespace, batching=batching) as started:
            async with Client(broker_url(), namespace=namespace, batching=batching) as client:
                until = time.monotonic() + given.seconds

                async def caller() -> None:
                    nonlocal made
                    while time.monotonic() < until:
                        made += 1
                        seconds = quick if made % SLOW_EVERY else slow
                        began = time.perf_counter()
                        await client.call("things.work", seconds=seconds)
                        if seconds == quick:
                            took.append(time.perf_counter() - began)

                began = time.monotonic()
                await asyncio.gather(*(caller() for _ in range(given.in_flight)))
                elapsed = time.monotonic() - began
            had = [int((await worker.communicate(b""))[0]) for worker in started]
    finally:
        await remove_leftovers(broker_url(), namespace, ["things"])
    p99 = statistics.quantiles(took, n=100)[98]
    print(
        f"{name:22} batching {'on ' if batching else 'off'} {made / elapsed:10.0f} calls/s   "
        f"share {max(had) / max(1, min(had)):6.2f}   p99 {p99 * 1000:8.1f} ms",
        flush=True,
    )


async def main() -> int:
    """Measure and print; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--in-flight", type=int, default=400)
    parser.add_argument("--serve", nargs=2, metavar=("NAMESPACE", "BATCHING"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        await serve(given.serve[0], batching=given.serve[1] == "on")
        return 0
    kinds: list[tuple[str, Any, Any]] = [
        ("handlers of 0 ms", 0.0, 0.0),
        ("handlers of 2 ms", 0.002, 0.002),
        ("handlers of 20 ms", 0.02, 0.02),
        ("one slow of 20", 0.0, 0.02),
    ]
    for name, quick, slow in kinds:
        for batching in (True, False):
            await measure(name, quick, slow, given, batching=batching)
    return 0


if __name__ == "__main__":
    run(main())
