"""What a handler batch gains: one method with `batch=Batch(32, 0.005)` and one without, for the same work.

    RPCQ_URL=amqp://guest:guest@localhost/ python -m benchmarks.batches

The work takes 20 ms and 1 ms for each call, one run at a time, as on a GPU. Each caller calls again as soon as it has
its result. Client and worker are in this process, which mostly waits. Both methods are measured in turn, in each round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from typing import Final

from rpcq import Batch, Client, Service
from rpcq.testing import running

ONCE: Final = 0.020
EACH: Final = 0.001
"""Seconds of one run of the handler, and for each of its calls."""


def make_service(sizes: list[int]) -> Service:
    """The two methods, which share one device; `sizes` gets the sizes of batches."""
    service = Service("batches")
    device = asyncio.Lock()

    @service.method
    async def one(x: int) -> int:
        async with device:
            await asyncio.sleep(ONCE + EACH)
        return x + 1

    @service.method(batch=Batch(max_size=32, max_wait=0.005))
    async def together(x: list[int]) -> list[int]:
        sizes.append(len(x))
        async with device:
            await asyncio.sleep(ONCE + EACH * len(x))
        return [it + 1 for it in x]

    return service


async def calls_per_second(client: Client, method: str, callers: int, seconds: float) -> float:
    """Let the callers call for some seconds; returns how many calls ended in a second."""
    until = time.monotonic() + seconds
    done = 0

    async def call() -> None:
        nonlocal done
        while time.monotonic() < until:
            assert await client.call(f"batches.{method}", x=done) > 0
            done += 1

    began = time.monotonic()
    await asyncio.gather(*(call() for _ in range(callers)))
    return done / (time.monotonic() - began)


async def measure(callers: int, seconds: float, rounds: int) -> dict[str, float]:
    """The calls per second with and without a batch, and their ratio: medians of some rounds."""
    sizes: list[int] = []
    service = make_service(sizes)
    found: dict[str, list[float]] = {"one": [], "together": [], "ratio": []}
    async with running(service, url=os.environ["RPCQ_URL"]) as client:
        await calls_per_second(client, "together", callers, 0.2)  # warm
        for _ in range(rounds):
            one = await calls_per_second(client, "one", callers, seconds)
            together = await calls_per_second(client, "together", callers, seconds)
            for name, value in (("one", one), ("together", together), ("ratio", together / one)):
                found[name].append(value)
    return {
        **{name: statistics.median(values) for name, values in found.items()},
        "least_ratio": min(found["ratio"]),
        "median_size": statistics.median(sizes),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each method in each round")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    found = asyncio.run(measure(given.callers, given.seconds, given.rounds))
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))


if __name__ == "__main__":
    main()
