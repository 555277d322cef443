"""A worker with a schedule of one second: `targets_schedules.py FOLDER SERVICE`; the broker by RPCQ_URL.

Each tick that it does is a line in FOLDER/ticks: its time in milliseconds, and its idempotency key.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from rpcq import Context, Every, Service, Worker

FOLDER = Path(sys.argv[1])

service = Service(sys.argv[2])


@service.job(schedule=Every(1, missed="all"))
async def tick(context: Context) -> None:
    assert context.due is not None
    line = f"{round(context.due.timestamp() * 1000)} {context.idempotency_key}\n"
    with (FOLDER / "ticks").open("a") as file:
        file.write(line)  # one write: it is there as a whole, or not at all


async def main() -> None:
    async with Worker(service, namespace=os.environ["RPCQ_NAMESPACE"]):
        (FOLDER / f"serves-{os.getpid()}").touch()
        await asyncio.Event().wait()


asyncio.run(main())
