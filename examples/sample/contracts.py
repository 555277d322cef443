"""What callers know of the services: their methods, their types and their errors. Both sides import this."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol
from uuid import UUID

from rpcq import DomainError, contract


@dataclass(frozen=True)
class Article:
    """Something that the shop sells."""

    sku: str
    price: Decimal
    left: int


@dataclass(frozen=True)
class Order:
    """An order that was placed."""

    number: UUID
    sku: str
    quantity: int
    total: Decimal


class UnknownArticle(DomainError):
    """The shop does not sell this."""

    sku: str

    def __init__(self, sku: str) -> None:
        super().__init__(f"there is no {sku}")
        self.sku = sku


class OutOfStock(DomainError):
    """There is less than the caller asked for."""

    sku: str
    left: int

    def __init__(self, sku: str, left: int) -> None:
        super().__init__(f"only {left} of {sku} left")
        self.sku = sku
        self.left = left


class TooExpensive(DomainError):
    """The order costs more than its customer wants to pay."""

    total: Decimal
    limit: Decimal

    def __init__(self, total: Decimal, limit: Decimal) -> None:
        super().__init__(f"the order costs {total}, and the limit is {limit}")
        self.total = total
        self.limit = limit


@contract("stock", errors=[UnknownArticle, OutOfStock], idempotent=["articles", "find"])
class StockApi(Protocol):
    """Keeps the stock."""

    async def articles(self) -> list[Article]:
        """Return all articles, by their name."""
        ...

    async def find(self, sku: str) -> Article:
        """Return an article, or raise `UnknownArticle`."""
        ...

    async def take(self, sku: str, quantity: int = 1) -> Article:
        """Take some from the shelf; return what is left, or raise `OutOfStock`."""
        ...


@contract("orders", errors=[UnknownArticle, OutOfStock, TooExpensive], idempotent=["placed"])
class OrdersApi(Protocol):
    """Takes orders."""

    async def place(self, sku: str, quantity: int = 1, *, limit: Decimal | None = None) -> Order:
        """Order an article, if all of it costs no more than `limit`."""
        ...

    async def placed(self) -> list[Order]:
        """Return the orders that were placed, the oldest first."""
        ...
