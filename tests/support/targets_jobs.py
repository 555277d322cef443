"""A worker of jobs that dies at a chosen point, once: `targets_jobs.py FOLDER POINT SERVICE`; the broker by RPCQ_URL.

Each effect is a line in FOLDER/effects. POINT is one of those below, or "none". Whoever dies leaves FOLDER/died first,
so that its successor lives. RPCQ_TEST_GENERATION=old leaves out what the service has of late.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from rpcq import GiveUp, Retry, RetryLater, Service, Worker
from rpcq.jobs.moving import Mover
from rpcq.jobs.running import JobRunner
from rpcq.transport.base import Published

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


def effect(name: str) -> bool:
    """Do it; returns whether that is the first time."""
    with (FOLDER / "effects").open("a") as file:
        file.write(f"{name}\n")
    return (FOLDER / "effects").read_text().split().count(name) == 1


@service.job
async def work(name: str) -> None:
    die("before the effect")
    effect(name)
    die("after the effect")


@service.job(at_most_once=True)
async def once(name: str) -> None:
    await work(name)


@service.job(retry=FAST)
async def fail_once(name: str) -> None:
    if effect(name):
        raise ValueError("the first time")


@service.job
async def later(name: str, seconds: float) -> None:
    if effect(name):
        raise RetryLater(seconds)


@service.job
async def give_up(name: str) -> None:
    effect(name)
    raise GiveUp("hopeless")


@service.job
async def poison(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@service.job(retry=FAST)
async def hold(name: str) -> None:
    """Runs until there is a file FOLDER/go; fails the first time."""
    is_first = effect(name)
    while not (FOLDER / "go").exists():  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.01)
    if is_first:
        raise ValueError("the first time")


if os.environ.get("RPCQ_TEST_GENERATION") != "old":

    @service.job
    async def newest(name: str) -> None:
        effect(name)


def dying(method: Any, before: str) -> Any:
    def around(self: JobRunner, run: Any, *rest: Any) -> Any:
        die(before if run.id in moved else f"{before}, done")
        return method(self, run, *rest)

    return around


def noting(method: Any) -> Any:
    def around(self: Mover, run: Any, *rest: Any) -> Any:
        die("before the move")
        moved.add(run.id)
        (FOLDER / "moving").touch()
        return method(self, run, *rest)

    return around


def telling(method: Any) -> Any:
    def around(self: Mover, message: Any, published: Published) -> Any:
        (FOLDER / f"move-{published.value}").touch()
        return method(self, message, published)

    return around


JobRunner._acknowledge = dying(JobRunner._acknowledge, "after the move is confirmed")  # type: ignore[method-assign]
Mover.move = noting(Mover.move)  # type: ignore[method-assign]
Mover.published = telling(Mover.published)  # type: ignore[method-assign]


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with Worker(service, namespace=NAMESPACE, job_prefetch=10):
        (FOLDER / f"serves-{os.getpid()}").touch()
        await stop.wait()


asyncio.run(main())
