"""A worker of jobs with order keys: `targets_ordered.py FOLDER SERVICE`; the broker by RPCQ_URL.

Each attempt is two lines in FOLDER/attempts: one when it begins, and one when it has ended. A line is its kind
(`begins`, `done`, `failed` or `hopeless`), the order key, the number of the job, and the process ID of the worker.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

from rpcq import Context, GiveUp, Retry, Service, Worker

FOLDER = Path(sys.argv[1])

service = Service(sys.argv[2], ordered=True)


def note(kind: str, context: Context, number: int) -> None:
    line = f"{kind} {context.order_key} {number} {os.getpid()}\n"
    with (FOLDER / "attempts").open("a") as file:
        file.write(line)  # one write: it is there as a whole, or not at all


@service.job(retry=Retry(max_attempts=8, initial_backoff=0.05, max_backoff=0.5))
async def work(number: int, poison: bool, context: Context) -> None:
    note("begins", context, number)
    if poison:
        os.kill(os.getpid(), signal.SIGKILL)
    await asyncio.sleep(random.uniform(0, 0.02))
    if number % 10 == 3 and context.attempt == 1:
        note("failed", context, number)
        raise ValueError(number)
    if number == 25 and str(context.order_key).endswith("0"):
        note("hopeless", context, number)
        raise GiveUp("never")
    note("done", context, number)


async def main() -> None:
    worker = Worker(service, namespace=os.environ["RPCQ_NAMESPACE"], connect_timeout=60)  # many start at once
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.request_stop)

    async def say_that_it_serves() -> None:
        while not worker.connected:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)
        (FOLDER / f"serves-{os.getpid()}").touch()

    saying = asyncio.create_task(say_that_it_serves())
    clean = await worker.run()
    await saying
    sys.exit(0 if clean else 1)


asyncio.run(main())
