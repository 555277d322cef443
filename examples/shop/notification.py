"""Writes e-mails to customers."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.shop import outside
from examples.shop.database import database
from examples.shop.events import NotificationSent, OrderCancelled, OrderShipped
from examples.shop.relaying import relaying
from examples.shop.undoing import RETRY
from rpcq import GiveUp, Service
from rpcq.observability.tracing import Tracing
from rpcq.outbox import Inbox, Outbox

engine = database("notification")
inbox = Inbox(engine)
outbox = Outbox(engine, observers=[Tracing()])


class Base(DeclarativeBase):
    """The tables of this service."""


class Mail(Base):
    """An e-mail that the provider has taken."""

    __tablename__ = "mails"
    order_id: Mapped[str] = mapped_column(primary_key=True)
    subject: Mapped[str]


notification = Service("notification", lifespan=lambda: relaying(outbox))


@notification.on(OrderShipped, OrderCancelled, once=inbox, retry=RETRY, timeout=60)
async def tell(event: OrderShipped | OrderCancelled, db: AsyncSession) -> None:
    """Tell the customer how the order ended.

    If the provider refuses the shop's key, somebody has to look: a dead letter, which is replayed with a new key.
    """
    subject = "Your order is on its way"
    if isinstance(event, OrderCancelled):
        subject = f"Your order is cancelled: {event.why}"
    try:
        await outside.mail(event.order_id, event.customer, subject)
    except outside.BadKeyError as error:
        raise GiveUp(str(error)) from error
    db.add(Mail(order_id=event.order_id, subject=subject))
    outbox.publish(db, NotificationSent(order_id=event.order_id))
