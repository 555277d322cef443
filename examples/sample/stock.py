"""The stock service. Its handlers are `def`: they run in threads, because SQLite blocks."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from decimal import Decimal
from threading import Lock

from examples.sample.contracts import Article, OutOfStock, StockApi, UnknownArticle
from rpcq import Context, Service

GOODS = (("coffee", "7.90", 1), ("tea", "4.50", 10))


class Shelves:
    """The shelves, in a database in memory."""

    def __init__(self) -> None:
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._lock = Lock()
        self._database.execute("CREATE TABLE shelf (sku TEXT PRIMARY KEY, price TEXT, stock INTEGER)")
        self._database.executemany("INSERT INTO shelf VALUES (?, ?, ?)", GOODS)

    def all(self) -> list[Article]:
        """Return all articles, by their name."""
        with self._lock:
            rows = self._database.execute("SELECT sku, price, stock FROM shelf ORDER BY sku").fetchall()
        return [Article(sku, Decimal(price), left) for sku, price, left in rows]

    def find(self, sku: str) -> Article:
        """Return one article."""
        for article in self.all():
            if article.sku == sku:
                return article
        raise UnknownArticle(sku)

    def take(self, sku: str, quantity: int) -> Article:
        """Take some of it, if there is enough."""
        with self._lock, self._database:
            taken = self._database.execute(
                "UPDATE shelf SET stock = stock - ? WHERE sku = ? AND stock >= ?", (quantity, sku, quantity)
            )
        article = self.find(sku)
        if not taken.rowcount:
            raise OutOfStock(sku, article.left)
        return article

    def close(self) -> None:
        """Close the database."""
        self._database.close()


@asynccontextmanager
async def shelves() -> AsyncGenerator[Shelves, None]:
    """Open the shelves for as long as the worker runs."""
    opened = Shelves()
    try:
        yield opened
    finally:
        opened.close()


stock = Service(api=StockApi, lifespan=shelves, queue_type="quorum")


@stock.method
def articles(context: Context[Shelves]) -> list[Article]:
    """Return all articles, by their name."""
    return context.state.all()


@stock.method
def find(context: Context[Shelves], sku: str) -> Article:
    """Return an article."""
    return context.state.find(sku)


@stock.method(timeout=5.0)
def take(context: Context[Shelves], sku: str, quantity: int = 1) -> Article:
    """Take some from the shelf; return what is left."""
    return context.state.take(sku, quantity)
