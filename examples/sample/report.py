"""Prints what is on the shelves, and what was ordered: a script, which needs no event loop."""

from __future__ import annotations

from decimal import Decimal

from examples.sample.contracts import OrdersApi, StockApi
from rpcq.sync import Client


def report(client: Client) -> str:
    """The report, as text."""
    placed = client.call(OrdersApi.placed)
    total = sum((order.total for order in placed), Decimal(0))
    lines = [f"{article.left:4} {article.sku} at {article.price}" for article in client.call(StockApi.articles)]
    return "\n".join([*lines, f"{len(placed)} orders, {total} in all"])


def main() -> None:
    """Connect to the broker of `RPCQ_URL`, and print the report."""
    with Client(name="report", timeout=5.0) as client:
        print(report(client))


if __name__ == "__main__":
    main()
