"""The crowd: customers who order when they want to, however slow the shop is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from examples.shop.outside import BAD_CARD

KINDS: tuple[dict[str, Any], ...] = (
    *({"article": article, "count": count} for article in ("tea", "coffee", "honey") for count in (1, 2, 3)),
    {"article": "tea", "country": "Atlantis"},
    *({"article": article, "country": "Poland"} for article in ("tea", "coffee", "honey")),
    {"article": "honey", "card": BAD_CARD},
    *({"article": article} for article in ("tea", "coffee", "honey")),
)
"""What customers order, one after the other. Two kinds come to nothing: one is undone, one is refused."""

CONNECTIONS = 200
"""Connections of the crowd at once. Who comes when all are in use waits in line, and the time counts."""

TICK = 0.01
"""Seconds between two looks who is due."""

PATIENCE = 60.0
"""Seconds that a customer waits for an answer."""


@dataclass
class Crowd:
    """Customers, and what they were told.

    Attributes:
        bases: addresses of the shop; customers take turns, as a load balancer would let them.
        orders: how many there are to be.
        seconds: the time in which they come.
        came: when each order was due, in seconds since the epoch.
        promised: IDs of the orders that the shop has taken ("202").
        answers: for each of them, when it was due, and the seconds until the answer.
        postponed: times that the shop was full, and asked a customer to come again ("503").
        unanswered: customers whose connection broke: the shop may have taken their order, or not.

    """

    bases: Sequence[str]
    orders: int
    seconds: float
    came: list[float] = field(default_factory=list)
    promised: list[str] = field(default_factory=list)
    answers: list[tuple[float, float]] = field(default_factory=list)
    postponed: int = 0
    unanswered: int = 0

    async def come(self) -> None:
        """Let all of them order, and wait for their answers."""
        # The server closes connections that are idle for 5 s: none that is older may be used for an order.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CONNECTIONS, keepalive_expiry=2)
        line = asyncio.Semaphore(CONNECTIONS)  # not the client's own limit, which looks at all who wait each time
        async with httpx.AsyncClient(timeout=PATIENCE, limits=limits) as client, asyncio.TaskGroup() as group:
            began = time.time()
            for number in range(self.orders):
                due = began + number * self.seconds / self.orders
                if (early := due - time.time()) > TICK:  # several customers come in one tick
                    await asyncio.sleep(early)
                self.came.append(due)
                group.create_task(self._order(client, line, number, due))

    async def _order(self, client: httpx.AsyncClient, line: asyncio.Semaphore, number: int, due: float) -> None:
        order = {"customer": f"customer-{number}@example.org", **KINDS[number % len(KINDS)]}
        address = f"{self.bases[number % len(self.bases)]}/orders"
        try:
            while True:
                async with line:
                    response = await client.post(address, json=order)
                if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    break
                self.postponed += 1
                await asyncio.sleep(float(response.headers["retry-after"]))
        except httpx.TransportError:
            self.unanswered += 1
            return
        response.raise_for_status()
        self.promised.append(response.json()["id"])
        self.answers.append((due, time.time() - due))
