"""Charges cards, and gives money back."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.shop import outside
from examples.shop.database import database
from examples.shop.events import (
    InventoryFailed,
    OrderPlaced,
    PaymentProcessed,
    PaymentRefunded,
    PaymentRefused,
    ShippingFailed,
)
from examples.shop.relaying import relaying
from examples.shop.undoing import RETRY
from rpcq import Service
from rpcq.observability.tracing import Tracing
from rpcq.outbox import Inbox, Outbox

engine = database("payment")
inbox = Inbox(engine)
outbox = Outbox(engine, observers=[Tracing()])


class Base(DeclarativeBase):
    """The tables of this service."""


class Payment(Base):
    """What a customer has paid."""

    __tablename__ = "payments"
    order_id: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int]
    refunded: Mapped[bool] = mapped_column(default=False)


payment = Service("payment", lifespan=lambda: relaying(outbox))


@payment.on(OrderPlaced, once=inbox, retry=RETRY, timeout=60)
async def charge(event: OrderPlaced, db: AsyncSession) -> None:
    """Charge the card, and say so: payment, event and the inbox's key are one transaction, which `once=inbox` commits.

    Killed before that, it runs again: the card company has the order's ID as its key, and charges nobody twice. If it
    fails at each attempt, the event is a dead letter, and the order stays placed until somebody replays it.
    """
    try:
        await outside.charge(event.order_id, event.card, event.cents)
    except outside.CardRefusedError as error:
        outbox.publish(db, PaymentRefused(order_id=event.order_id, why=str(error)))
        return
    db.add(Payment(order_id=event.order_id, cents=event.cents))
    outbox.publish(
        db,
        PaymentProcessed(
            order_id=event.order_id,
            customer=event.customer,
            article=event.article,
            count=event.count,
            country=event.country,
        ),
    )


@payment.on(InventoryFailed, ShippingFailed, once=inbox, retry=RETRY, timeout=60)
async def refund(event: InventoryFailed | ShippingFailed, db: AsyncSession) -> None:
    """Give the money back for an order of which nothing comes."""
    paid = await db.get_one(Payment, event.order_id)
    await outside.refund(event.order_id)
    paid.refunded = True
    outbox.publish(db, PaymentRefunded(order_id=event.order_id, why=event.why))
