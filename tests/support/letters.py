"""Looks at the messages of a queue without taking them out: dead letters, and what was lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from rpcq.options import ConnectionOptions
from rpcq.transport.base import Delivery, Listener, Subscription
from rpcq.transport.opening import open_transport
from rpcq.wire.properties import Properties, decode
from rpcq.wire.topology import Queue


@dataclass
class Letter:
    properties: Properties
    body: bytes

    @property
    def headers(self) -> dict[str, Any]:
        return self.properties.headers or {}

    @property
    def id(self) -> str:
        return (self.properties.message_id or b"").decode()


class Letters:
    """The messages of a queue, as they come; they are held, and go back when this ends."""

    def __init__(self) -> None:
        self.found: list[Letter] = []
        self._came = asyncio.Event()

    def take(self, delivery: Delivery) -> None:
        self.found.append(Letter(decode(delivery.properties), delivery.body or b""))
        self._came.set()

    async def wait_for(self, count: int) -> list[Letter]:
        """Wait, within the test's own timeout, until there are so many."""
        while len(self.found) < count:
            self._came.clear()
            await self._came.wait()
        return self.found


@asynccontextmanager
async def letters(url: str, queue: Queue) -> AsyncIterator[Letters]:
    found = Letters()
    transport = open_transport(url, ConnectionOptions())
    nothing = Listener(*[lambda *_: None] * 5)
    await transport.start([], [Subscription(queue, found.take, prefetch=1000)], nothing)
    try:
        yield found
    finally:
        await transport.close()
