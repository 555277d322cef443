"""What tests of jobs share."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from rpcq import Service
from rpcq.wire.job_queues import JobTopology
from support.places import Place


class Done:
    """Counts what handlers did, and wakes the test."""

    def __init__(self) -> None:
        self.counts: Counter[Any] = Counter()
        self._changed = asyncio.Event()

    def note(self, what: Any) -> int:
        self.counts[what] += 1
        self._changed.set()
        return self.counts[what]

    async def until(self, condition: Callable[[Counter[Any]], bool]) -> None:
        while not condition(self.counts):
            self._changed.clear()
            await self._changed.wait()


def dead_queue(home: Place, service: Service) -> Any:
    return JobTopology(home.namespace).dead_queue(service.name)


async def settled(*workers: Any) -> None:
    """Wait until the workers have nothing in hand."""
    while any(worker.in_flight for worker in workers):  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(0.005)
