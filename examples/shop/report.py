"""Prints what is on the shelves, and what was ordered."""

from __future__ import annotations

import asyncio
from decimal import Decimal

from examples.shop.contracts import OrdersApi, StockApi
from rpcq import Client


async def report(client: Client) -> str:
    """The report, as text."""
    articles, placed = await asyncio.gather(client.bind(StockApi).articles(), client.bind(OrdersApi).placed())
    total = sum((order.total for order in placed), Decimal(0))
    lines = [f"{article.left:4} {article.sku} at {article.price}" for article in articles]
    return "\n".join([*lines, f"{len(placed)} orders, {total} in all"])


async def main() -> None:
    """Connect to the broker of `RPCQ_URL`, and print the report."""
    async with Client(name="report", timeout=5.0) as client:
        print(await report(client))


if __name__ == "__main__":
    asyncio.run(main())
