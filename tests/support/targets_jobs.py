"""A worker of jobs that dies at a chosen point, once: `targets_jobs.py FOLDER POINT SERVICE`; the broker by RPCQ_URL.

Each effect is a line in FOLDER/effects. POINT is one of those below, or "none". Whoever dies leaves FOLDER/died first,
so that its successor lives.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from rpcq import GiveUp, Retry, Service, Worker
from rpcq.jobs.running import JobRunner

FOLDER, POINT = Path(sys.argv[1]), sys.argv[2]
NAMESPACE = os.environ["RPCQ_NAMESPACE"]
FAST = Retry(max_attempts=3, initial_backoff=0.2, max_backoff=0.2)

service = Service(sys.argv[3])
moved: set[str] = set()


def die(point: str) -> None:
    """End this process as kill -9 does, if this is the point, and the first time."""
    if point != POINT:
        return
    try:
        (FOLDER / "died").touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def effect(name: str) -> None:
    with (FOLDER / "effects").open("a") as file:
        file.write(f"{name}\n")


@service.job
async def work(name: str) -> None:
    die("before the effect")
    effect(name)
    die("after the effect")


@service.job(retry=FAST)
async def fail_once(name: str) -> None:
    effect(name)
    if (FOLDER / "effects").read_text().split().count(name) == 1:
        raise ValueError("the first time")


@service.job
async def give_up(name: str) -> None:
    effect(name)
    raise GiveUp("hopeless")


def dying(method: Any, before: str) -> Any:
    def around(self: JobRunner, run: Any, *rest: Any) -> Any:
        die(before if run.id in moved else f"{before}, done")
        return method(self, run, *rest)

    return around


def noting(method: Any) -> Any:
    def around(self: JobRunner, run: Any, *rest: Any) -> Any:
        die("before the move")
        moved.add(run.id)
        return method(self, run, *rest)

    return around


JobRunner._acknowledge = dying(JobRunner._acknowledge, "after the move is confirmed")  # type: ignore[method-assign]
JobRunner._move = noting(JobRunner._move)  # type: ignore[method-assign]


async def main() -> None:
    async with Worker(service, namespace=NAMESPACE, job_prefetch=10):
        (FOLDER / f"serves-{os.getpid()}").touch()
        await asyncio.Event().wait()


asyncio.run(main())
