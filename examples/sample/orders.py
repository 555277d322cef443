"""The orders service, which calls the stock service."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from uuid import uuid4

from examples.sample.contracts import Order, OrdersApi, StockApi, TooExpensive
from rpcq import Client, Context, Retry, Service, with_options


@dataclass
class State:
    """What the handlers share."""

    stock: StockApi
    placed: list[Order] = field(default_factory=list)


@asynccontextmanager
async def lifespan() -> AsyncGenerator[State, None]:
    """One client for all calls, as long as the worker runs."""
    async with Client(name="orders") as client:
        yield State(client.bind(StockApi))


orders = Service(api=OrdersApi, lifespan=lifespan)


@orders.method
async def place(context: Context[State], sku: str, quantity: int = 1, *, limit: Decimal | None = None) -> Order:
    """Order an article, if all of it costs no more than `limit`."""
    state = context.state
    article = await with_options(state.stock, timeout=2.0, retry=Retry(max_attempts=3)).find(sku)
    order = Order(uuid4(), sku, quantity, article.price * quantity)
    if limit is not None and order.total > limit:
        raise TooExpensive(order.total, limit)
    await with_options(state.stock.take, metadata={"x-order": str(order.number)})(sku, quantity)
    state.placed.append(order)
    return order


@orders.method
async def placed(context: Context[State]) -> list[Order]:
    """Return the orders that were placed, the oldest first."""
    return context.state.placed
