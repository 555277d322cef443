"""How late delayed jobs are: `client.with_options(delay=...)`, with the worker in the same process.

    RPCQ_URL=amqp://guest:guest@localhost/ python -m benchmarks.delays --jobs 1000 --rate 500

Each job has a delay of its own between `--least` and `--most` seconds. Late is the time from `Job.due`, the end of the
delay rounded up to 0.25 s, to the begin of the handler, by one clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from datetime import UTC, datetime

from rpcq import Context, Service
from rpcq.testing import running


async def measure(jobs: int, rate: float, least: float, most: float, seed: int) -> dict[str, float]:
    """Send the jobs, and wait until each one has run."""
    service = Service("late")
    late: list[float] = []
    done = asyncio.Event()

    @service.job
    async def note(context: Context) -> None:
        assert context.due is not None
        late.append((datetime.now(UTC) - context.due).total_seconds() * 1000)
        if len(late) >= jobs:
            done.set()

    choose = random.Random(seed)  # noqa: S311 - the same delays each time
    async with running(service, url=os.environ["RPCQ_URL"], job_prefetch=200) as client:
        begun = time.monotonic()
        sending = []
        for number in range(jobs):
            await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
            maker = client.with_options(delay=choose.uniform(least, most))
            sending.append(asyncio.create_task(maker.send(note)))
        await asyncio.gather(*sending)
        sent_in = time.monotonic() - begun
        await done.wait()
    late.sort()
    return {
        "jobs": len(late),
        "sent_per_s": jobs / sent_in,
        "p50_ms": statistics.median(late),
        "p99_ms": late[int(len(late) * 0.99) - 1],
        "max_ms": late[-1],
        "min_ms": late[0],
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=500.0, help="jobs sent in a second")
    parser.add_argument("--least", type=float, default=0.25, help="the shortest delay, seconds")
    parser.add_argument("--most", type=float, default=10.0, help="the longest delay, seconds")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    found = asyncio.run(measure(given.jobs, given.rate, given.least, given.most, given.seed))
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))


if __name__ == "__main__":
    main()
