"""Gives parcels to a carrier."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.shop import outside
from examples.shop.database import database
from examples.shop.events import InventoryReserved, OrderShipped, ShippingFailed
from examples.shop.relaying import relaying
from examples.shop.undoing import RETRY, undone
from rpcq import Context, GiveUp, Service
from rpcq.observability.tracing import Tracing
from rpcq.outbox import Inbox, Outbox

engine = database("shipping")
inbox = Inbox(engine)
outbox = Outbox(engine, observers=[Tracing()])


class Base(DeclarativeBase):
    """The tables of this service."""


class Parcel(Base):
    """What a carrier has."""

    __tablename__ = "parcels"
    order_id: Mapped[str] = mapped_column(primary_key=True)
    country: Mapped[str]


shipping = Service("shipping", lifespan=lambda: relaying(outbox))


@shipping.on(InventoryReserved, once=inbox, retry=RETRY, timeout=60)
async def ship(event: InventoryReserved, db: AsyncSession, context: Context) -> None:
    """Book a parcel. If no carrier takes it, say so: then payment and stock are undone."""

    def failed(why: str) -> ShippingFailed:
        return ShippingFailed(order_id=event.order_id, why=why)

    async with undone(outbox, db, context, failed):
        try:
            await outside.book(event.order_id, event.country)
        except outside.NoCarrierError as error:
            raise GiveUp(str(error)) from error
        db.add(Parcel(order_id=event.order_id, country=event.country))
        outbox.publish(db, OrderShipped(order_id=event.order_id, customer=event.customer))
