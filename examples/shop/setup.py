"""Makes what has to be there before anything runs: tables, stock, and the queues of all services.

Queues come first of all: what is published before a subscription has its queue is not in it.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys

from sqlalchemy import MetaData
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from examples.shop import analytics, inventory, notification, orders, outside, payment, shipping
from rpcq import outbox

NAMES = ("orders", "payment", "inventory", "shipping", "notification", "analytics")
"""The services; each is a module of that name."""

SERVICES = (
    orders.orders,
    payment.payment,
    inventory.inventory,
    shipping.shipping,
    notification.notification,
    analytics.analytics,
)


def target(name: str) -> str:
    """What `rpcq worker` calls a service."""
    return f"examples.shop.{name}:{name}"


async def create_tables() -> None:
    """Make all tables, and fill the stock, unless they are there."""
    for module in (orders, payment, inventory, shipping, notification, analytics):
        await _create(module.engine, module.Base.metadata, outbox.metadata)
    await _create(outside.engine, outside.Base.metadata)
    for article, free in inventory.STOCK.items():
        async with AsyncSession(inventory.engine) as db:
            db.add(inventory.Stock(article=article, free=free))
            try:
                await db.commit()
            except IntegrityError:
                await db.rollback()  # it is there
    await inventory.engine.dispose()  # as in `_create`


async def _create(engine: AsyncEngine, *tables: MetaData) -> None:
    async with engine.begin() as connection:
        for each in tables:
            await connection.run_sync(each.create_all)
    await engine.dispose()  # its connections belong to this event loop


def declare() -> None:
    """Declare the queues of all services.

    Raises:
        CalledProcessError: `rpcq setup` failed, and said why.

    """
    command = [sys.executable, "-m", "rpcq", "setup", *map(target, NAMES)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own


if __name__ == "__main__":
    asyncio.run(create_tables())
    declare()
