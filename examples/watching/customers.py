"""Customers, as a program: they order, ask for prices, and look around. It serves the metrics of its client."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import random
import time

import httpx
from prometheus_client import start_http_server

from examples.watching.desk import thank
from rpcq import Client, Event, RemoteError, RpcqError
from rpcq.observability.metrics import Metrics

KINDS = (
    *({"article": "tea", "count": 2}, {"article": "coffee"}, {"article": "honey", "country": "Poland"}),
    *({"article": "tea", "card": "4000 0000 0000 0002"}, {"article": "coffee", "country": "Atlantis"}),
)
"""What customers order; the last two orders come to nothing."""

WAVE = 60.0
"""Seconds from one rush to the next."""

OPENS = 120.0
"""Seconds that the shop has to open."""

log = logging.getLogger("customers")


class ShopVisited(Event, name="shop.visited"):
    """Somebody has looked around."""

    customer: str


async def is_open(shop: httpx.AsyncClient) -> bool:
    """Whether the shop answers."""
    try:
        return (await shop.get("/state")).is_success
    except httpx.TransportError:
        return False


async def one(client: Client, shop: httpx.AsyncClient, number: int) -> None:
    """One customer, who asks, orders, and perhaps gets a card."""
    customer = f"customer-{number}@example.org"
    await client.publish(ShopVisited(customer=customer))
    with contextlib.suppress(RemoteError):  # the shop has no caviar
        await client.service("desk").quote(article="caviar" if number % 20 == 0 else "tea", count=3)
    response = await shop.post("/orders", json={"customer": customer, **KINDS[number % len(KINDS)]})
    response.raise_for_status()
    if number % 3 == 0:
        await client.send(thank, customer="nobody" if number % 60 == 0 else customer)


async def noted(client: Client, shop: httpx.AsyncClient, number: int) -> None:
    """The same; what cannot be reached is logged, as a web shop does whose customers come again."""
    try:
        await one(client, shop, number)
    except (RpcqError, httpx.HTTPError) as error:
        log.warning("a customer left: %s: %s", type(error).__name__, error)


async def come(base: str, rate: float) -> None:
    """Let customers come, at times more and at times less, until it is cancelled.

    Raises:
        TimeoutError: the shop does not open.

    """
    async with (
        Client(observers=[Metrics()], name="customers") as client,
        httpx.AsyncClient(base_url=base, timeout=30) as shop,
        asyncio.TaskGroup() as group,
    ):
        await client.wait_for_service("desk", timeout=OPENS)
        async with asyncio.timeout(OPENS):
            while not await is_open(shop):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.5)
        began, number = time.monotonic(), 0
        while True:
            number += 1
            group.create_task(noted(client, shop, number))
            at = math.sin(2 * math.pi * (time.monotonic() - began) / WAVE)
            await asyncio.sleep(random.expovariate(rate * (1 + 0.8 * at)))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m examples.watching.customers", description=__doc__)
    parser.add_argument("base", help="the shop's address")
    parser.add_argument("--rate", type=float, default=4.0, help="customers a second, in the mean (default: 4)")
    parser.add_argument("--metrics", type=int, required=True, metavar="PORT", help="where to serve the metrics")
    asked = parser.parse_args()
    start_http_server(asked.metrics, "127.0.0.1")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(come(asked.base, asked.rate))


if __name__ == "__main__":
    main()
