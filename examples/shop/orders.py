"""Orders: taken at once, and followed until they are done or cancelled."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Literal

from pydantic import BaseModel, Field
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.shop.database import database
from examples.shop.events import (
    InventoryReserved,
    NotificationSent,
    OrderCancelled,
    OrderPlaced,
    OrderShipped,
    PaymentProcessed,
    PaymentRefunded,
    PaymentRefused,
)
from examples.shop.relaying import relaying
from examples.shop.undoing import RETRY
from rpcq import Service
from rpcq.observability.tracing import Tracing
from rpcq.outbox import Inbox, Outbox

PRICES = {"tea": 450, "coffee": 800, "honey": 650, "truffles": 9_900}
"""Cents of each article."""

State = Literal["placed", "paid", "reserved", "shipped", "done", "cancelled"]

REACHED: dict[type, State] = {
    PaymentProcessed: "paid",
    InventoryReserved: "reserved",
    OrderShipped: "shipped",
    NotificationSent: "done",
}

ORDER: tuple[State, ...] = ("placed", "paid", "reserved", "shipped", "done", "cancelled")
"""States, the earlier ones first: events of one order may come in any order, and an order never goes back."""

engine = database("orders")
inbox = Inbox(engine)
outbox = Outbox(engine, observers=[Tracing()])
sessions = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    """The tables of this service."""


class Order(Base):
    """An order, as far as it is known to have come."""

    __tablename__ = "orders"
    id: Mapped[str] = mapped_column(primary_key=True)
    customer: Mapped[str]
    article: Mapped[str]
    count: Mapped[int]
    cents: Mapped[int]
    country: Mapped[str]
    state: Mapped[str] = mapped_column(default="placed", index=True)
    why: Mapped[str] = mapped_column(default="")
    told: Mapped[bool] = mapped_column(default=False)
    placed: Mapped[float] = mapped_column(index=True)


class NewOrder(BaseModel):
    """What a customer fills in."""

    customer: Annotated[str, Field(min_length=1, max_length=100)]
    article: Literal["tea", "coffee", "honey", "truffles"]
    count: Annotated[int, Field(ge=1, le=10)] = 1
    country: Annotated[str, Field(min_length=1, max_length=100)] = "Germany"
    card: Annotated[str, Field(pattern=r"^[\d ]{12,23}$")] = "4242 4242 4242 4242"


async def place(new: NewOrder) -> str:
    """Take an order. It and its event are one transaction, in the orders' own database: nobody else need be there."""
    order_id, cents = secrets.token_hex(8), PRICES[new.article] * new.count
    async with sessions.begin() as db:
        db.add(
            Order(
                id=order_id,
                customer=new.customer,
                article=new.article,
                count=new.count,
                cents=cents,
                country=new.country,
                placed=time.time(),
            )
        )
        outbox.publish(db, OrderPlaced(order_id=order_id, cents=cents, **new.model_dump()))
    return order_id


orders = Service("orders", lifespan=lambda: relaying(outbox))


@orders.on(PaymentProcessed, InventoryReserved, OrderShipped, NotificationSent, once=inbox, retry=RETRY)
async def follow(
    event: PaymentProcessed | InventoryReserved | OrderShipped | NotificationSent, db: AsyncSession
) -> None:
    """Note how far an order has come."""
    order = await db.get_one(Order, event.order_id, with_for_update=True)
    if isinstance(event, NotificationSent):
        order.told = True
    state = REACHED[type(event)]
    if ORDER.index(state) > ORDER.index(order.state):
        order.state = state


@orders.on(PaymentRefused, PaymentRefunded, once=inbox, retry=RETRY)
async def cancel(event: PaymentRefused | PaymentRefunded, db: AsyncSession) -> None:
    """Cancel an order that is not paid, or no longer."""
    order = await db.get_one(Order, event.order_id, with_for_update=True)
    order.state, order.why = "cancelled", event.why
    outbox.publish(db, OrderCancelled(order_id=order.id, customer=order.customer, why=event.why))
