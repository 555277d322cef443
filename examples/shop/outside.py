"""What is not the shop's: a card company, a carrier, a mail provider. They are played here, with tables of their own.

As those that they stand for, they take a key with each request. A second request with the same key is answered as the
first one was, and does nothing: so a service that was killed before it could note what it had asked for may simply ask
again.
"""

from __future__ import annotations

import asyncio
import os
import time

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.shop.database import database

BAD_CARD = "4000 0000 0000 0002"
"""The number of a card that is refused."""

COUNTRIES = ("Austria", "France", "Germany", "Poland")
"""Where the carrier goes to."""

TAKES = float(os.environ.get("ORDERS_TAKES", "0.03"))
"""Seconds that each of them takes: `ORDERS_TAKES`."""

engine = database("outside")
sessions = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    """The tables of others."""


class Done(Base):
    """What was asked for, and done: "charge", "refund", "parcel" or "mail"."""

    __tablename__ = "outside_done"
    what: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    about: Mapped[str]
    at: Mapped[float]


class Broken(Base):
    """What does not work at the moment: "mail"."""

    __tablename__ = "outside_broken"
    what: Mapped[str] = mapped_column(primary_key=True)


class CardRefusedError(Exception):
    """The card company refuses a card."""


class NoCarrierError(Exception):
    """The carrier does not go there."""


class BadKeyError(Exception):
    """The mail provider refuses the shop's key."""


async def charge(order_id: str, card: str, cents: int) -> None:
    """Charge a card, once for each order."""
    if card == BAD_CARD:
        raise CardRefusedError("the card company refuses the card")
    await _do("charge", order_id, f"{cents} cents, card ...{card[-4:]}")


async def refund(order_id: str) -> None:
    """Give the money back, once for each order."""
    await _do("refund", order_id, "all of it")


async def book(order_id: str, country: str) -> None:
    """Book a parcel, one for each order."""
    if country not in COUNTRIES:
        raise NoCarrierError(f"no carrier goes to {country}")
    await _do("parcel", order_id, country)


async def mail(key: str, to: str, subject: str) -> None:
    """Send an e-mail, one for each key."""
    if await is_broken("mail"):
        raise BadKeyError("the mail provider refuses our key")
    await _do("mail", key, f"{to}: {subject}")


async def is_broken(what: str) -> bool:
    """Whether something does not work at the moment."""
    async with sessions() as db:
        return await db.get(Broken, what) is not None


async def set_broken(what: str, *, broken: bool) -> None:
    """Let something not work, or work again."""
    async with sessions.begin() as db:
        await db.execute(delete(Broken).where(Broken.what == what))
        if broken:
            db.add(Broken(what=what))


async def _do(what: str, key: str, about: str) -> None:
    await asyncio.sleep(TAKES)
    async with sessions() as db:
        try:
            await db.execute(insert(Done).values(what=what, key=key, about=about, at=time.time()))
            await db.commit()
        except IntegrityError:
            await db.rollback()
            if (await db.scalars(select(Done.about).where(Done.what == what, Done.key == key))).one() != about:
                raise
