"""What happens in the shop meanwhile: queues, processes, outboxes, each second; and afterwards each order's times."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]  # it ships no types
from sqlalchemy import select

from examples.shop import orders, outside
from examples.shop.orders import Order
from examples.shop.outside import Done
from examples.shop.setup import SERVICES
from rpcq.observability.queues import QueueDepth, QueueWatch

EVERY = 1.0
"""Seconds between two samples."""


@dataclass(frozen=True)
class Sample:
    """A moment.

    Attributes:
        at: seconds since the epoch.
        waiting: events that wait in the queues of each service, and those that wait for their next attempt, as "".
        processes: worker processes of each pool.
        outbox: rows of the orders' outbox that are to be sent.

    """

    at: float
    waiting: Mapping[str, int]
    processes: Mapping[str, int]
    outbox: int


@dataclass(frozen=True)
class Times:
    """When an order was taken, paid, and its customer told; seconds since the epoch, None if that did not happen."""

    taken: float
    paid: float | None
    told: float | None


class Sampling:
    """Takes samples.

    Args:
        pools: the supervisor of each pool of workers, by its process ID.

    """

    def __init__(self, pools: Mapping[str, int]) -> None:
        self._pools = pools
        self._depths: dict[str, QueueDepth] = {}
        self.samples: list[Sample] = []

    async def run(self) -> None:
        """Take a sample each second, until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(QueueWatch(SERVICES, every=EVERY, management="", on_depth=self._note).run())
            while True:
                self.samples.append(await self._sample())
                await asyncio.sleep(EVERY)

    def _note(self, depth: QueueDepth) -> None:
        self._depths[depth.queue] = depth

    async def _sample(self) -> Sample:
        waiting: Counter[str] = Counter()
        for depth in self._depths.values():
            if depth.kind in ("events", "delayed"):
                waiting[depth.service] += depth.messages
        processes = {name: len(workers(pid)) for name, pid in self._pools.items()}
        return Sample(time.time(), dict(waiting), processes, (await orders.outbox.depth()).waiting)


def workers(supervisor: int) -> list[int]:
    """The worker processes of a supervisor, by their IDs."""
    try:
        children: list[psutil.Process] = psutil.Process(supervisor).children()
    except psutil.NoSuchProcess:
        return []
    found = [child for child in children if "worker" in " ".join(_command(child))]
    return sorted(child.pid for child in found)


def _command(process: psutil.Process) -> list[str]:
    try:
        found: list[str] = process.cmdline()
    except psutil.Error:  # it has ended
        return []
    return found


async def times() -> dict[str, Times]:
    """The times of each order, by its ID: as the shop says when it took it, and as the others say what they did."""
    async with outside.sessions() as db:
        found = (await db.execute(select(Done.what, Done.key, Done.at))).tuples().all()
    done = {(what, key): at for what, key, at in found}
    async with orders.sessions() as db:
        taken = (await db.execute(select(Order.id, Order.placed))).tuples().all()
    return {key: Times(at, done.get(("charge", key)), done.get(("mail", key))) for key, at in taken}
