"""A queue of calls, requests or replies that wait until a message can be published."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Backlog(Generic[T]):
    """Items that wait until there is a way for them; a task takes them out as soon as there is one.

    There is no task while nothing waits.

    Args:
        is_ready: whether there is a way now.
        ready: waits until there may be a way.
        take: called with each item in order, inside the event loop; it must not raise.

    Attributes:
        items: what waits, in order. To look whether it is empty is cheaper than to ask for the length of the backlog.

    """

    def __init__(
        self, is_ready: Callable[[], bool], ready: Callable[[], Awaitable[object]], take: Callable[[T], None]
    ) -> None:
        self._is_ready = is_ready
        self._ready = ready
        self._take = take
        self.items: OrderedDict[T, None] = OrderedDict()
        self._task: asyncio.Task[None] | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self.items)

    def add(self, item: T) -> None:
        """Let it wait behind all others."""
        self.items[item] = None
        self._empty.clear()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def discard(self, item: T) -> None:
        """Let it not wait any more, if it did."""
        self.items.pop(item, None)
        self._note()

    def clear(self) -> None:
        """Forget all that waits."""
        self.items.clear()
        self._empty.set()

    async def emptied(self) -> None:
        """Wait until nothing waits."""
        await self._empty.wait()

    async def close(self) -> None:
        """Forget all that waits, and end the task."""
        self.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _note(self) -> None:
        if not self.items:
            self._empty.set()

    async def _run(self) -> None:
        while self.items:
            await self._ready()
            while self.items and self._is_ready():
                item, _ = self.items.popitem(last=False)
                self._take(item)
            self._note()
