"""Counts all that happens, whatever it is."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.shop.database import database
from rpcq import AnyEvent, Service
from rpcq.outbox import Inbox

engine = database("analytics")
inbox = Inbox(engine)


class Base(DeclarativeBase):
    """The tables of this service."""


class Fact(Base):
    """Something that has happened."""

    __tablename__ = "facts"
    event_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(index=True)


analytics = Service("analytics")


@analytics.on("#", once=inbox)
async def note(event: AnyEvent, db: AsyncSession) -> None:
    """Note an event of whatever name: a new kind of event needs no change here."""
    db.add(Fact(event_id=event.id, name=event.name))
