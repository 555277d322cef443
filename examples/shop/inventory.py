"""Puts goods aside for orders, and puts them back."""

from __future__ import annotations

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.shop.database import database
from examples.shop.events import (
    InventoryFailed,
    InventoryReleased,
    InventoryReserved,
    PaymentProcessed,
    ShippingFailed,
)
from examples.shop.relaying import relaying
from examples.shop.undoing import RETRY, undone
from rpcq import Context, GiveUp, Service
from rpcq.observability.tracing import Tracing
from rpcq.outbox import Inbox, Outbox

STOCK = {"tea": 100_000, "coffee": 100_000, "honey": 100_000, "truffles": 3}
"""How much there is of each article at the beginning."""

engine = database("inventory")
inbox = Inbox(engine)
outbox = Outbox(engine, observers=[Tracing()])


class Base(DeclarativeBase):
    """The tables of this service."""


class Stock(Base):
    """What is free of an article."""

    __tablename__ = "stock"
    article: Mapped[str] = mapped_column(primary_key=True)
    free: Mapped[int]


class Reservation(Base):
    """What is put aside for an order."""

    __tablename__ = "reservations"
    order_id: Mapped[str] = mapped_column(primary_key=True)
    article: Mapped[str]
    count: Mapped[int]
    released: Mapped[bool] = mapped_column(default=False)


inventory = Service("inventory", lifespan=lambda: relaying(outbox))


@inventory.on(PaymentProcessed, once=inbox, retry=RETRY, timeout=60)
async def reserve(event: PaymentProcessed, db: AsyncSession, context: Context) -> None:
    """Put goods aside. If there are none, say so: then the payment is undone."""

    def failed(why: str) -> InventoryFailed:
        return InventoryFailed(order_id=event.order_id, why=why)

    async with undone(outbox, db, context, failed):
        stock = await db.get(Stock, event.article, with_for_update=True)
        if stock is None or stock.free < event.count:
            raise GiveUp(f"there is not enough {event.article} left")
        stock.free -= event.count
        db.add(Reservation(order_id=event.order_id, article=event.article, count=event.count))
        reserved = InventoryReserved(order_id=event.order_id, customer=event.customer, country=event.country)
        outbox.publish(db, reserved)


@inventory.on(ShippingFailed, once=inbox, retry=RETRY, timeout=60)
async def release(event: ShippingFailed, db: AsyncSession) -> None:
    """Put goods back that cannot be shipped."""
    found = await db.get_one(Reservation, event.order_id)
    await db.execute(update(Stock).where(Stock.article == found.article).values(free=Stock.free + found.count))
    found.released = True
    outbox.publish(db, InventoryReleased(order_id=event.order_id))
