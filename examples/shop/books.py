"""The books of the shop: what has to be equal when nothing is under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Executable, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from examples.shop import analytics, inventory, notification, orders, outside, payment, shipping
from examples.shop.analytics import Fact
from examples.shop.inventory import Reservation
from examples.shop.notification import Mail
from examples.shop.orders import Order
from examples.shop.outside import Done
from examples.shop.payment import Payment
from examples.shop.shipping import Parcel


@dataclass(frozen=True)
class Books:
    """Numbers of all services, each from its own tables; and of the world outside, from that of others.

    Attributes:
        orders: how many orders are in each state.
        charged: cards that were charged, as the shop knows it.
        refunded: those of them that have their money back.
        reserved: reservations.
        released: those of them that are back in stock.
        parcels: parcels that a carrier has.
        mails: e-mails that the provider has taken.
        facts: how many events of each name have happened.
        outside: how many charges, refunds, parcels and mails there are, as those say who did them.

    """

    orders: dict[str, int]
    charged: int
    refunded: int
    reserved: int
    released: int
    parcels: int
    mails: int
    facts: dict[str, int]
    outside: dict[str, int]

    @property
    def taken(self) -> int:
        """All orders."""
        return sum(self.orders.values())

    def faults(self) -> list[str]:
        """What does not add up, once nothing is under way any more.

        That is: each order is done or cancelled, and each was charged at most once; what is charged and not refunded is
        reserved and not released, shipped, and done; each customer was told once.
        """
        done, cancelled = self.orders.get("done", 0), self.orders.get("cancelled", 0)
        outside = {name: self.outside.get(name, 0) for name in ("charge", "refund", "parcel", "mail")}
        equal: dict[str, tuple[int, int]] = {
            "orders = done + cancelled": (self.taken, done + cancelled),
            "done = charged - refunded": (done, self.charged - self.refunded),
            "done = reserved - released": (done, self.reserved - self.released),
            "done = parcels": (done, self.parcels),
            "orders = mails": (self.taken, self.mails),
            "charged, here and at the card company": (self.charged, outside["charge"]),
            "refunded, here and at the card company": (self.refunded, outside["refund"]),
            "parcels, here and at the carrier": (self.parcels, outside["parcel"]),
            "mails, here and at the provider": (self.mails, outside["mail"]),
            "orders, here and in analytics": (self.taken, self.facts.get("order.placed", 0)),
            "mails, here and in analytics": (self.mails, self.facts.get("notification.sent", 0)),
        }
        return [f"{name}: {one} and {other}" for name, (one, other) in equal.items() if one != other]


async def read() -> Books:
    """Read the books. Each number is of a moment of its own."""
    return Books(
        orders=dict(await _rows(orders.engine, select(Order.state, func.count()).group_by(Order.state))),
        charged=await _count(payment.engine, select(func.count()).select_from(Payment)),
        refunded=await _count(payment.engine, select(func.count()).where(Payment.refunded)),
        reserved=await _count(inventory.engine, select(func.count()).select_from(Reservation)),
        released=await _count(inventory.engine, select(func.count()).where(Reservation.released)),
        parcels=await _count(shipping.engine, select(func.count()).select_from(Parcel)),
        mails=await _count(notification.engine, select(func.count()).select_from(Mail)),
        facts=dict(await _rows(analytics.engine, select(Fact.name, func.count()).group_by(Fact.name))),
        outside=dict(await _rows(outside.engine, select(Done.what, func.count()).group_by(Done.what))),
    )


async def _rows(engine: AsyncEngine, statement: Executable) -> list[Any]:
    async with AsyncSession(engine) as db:
        return [tuple(row) for row in await db.execute(statement)]


async def _count(engine: AsyncEngine, statement: Executable) -> int:
    ((number,),) = await _rows(engine, statement)
    return int(number)
