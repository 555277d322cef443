"""The shop's information desk. What it does now and then goes wrong, so that there is something to see."""

from __future__ import annotations

import asyncio
import random

from examples.shop.orders import PRICES
from rpcq import DomainError, GiveUp, Retry, Service


class UnknownArticle(DomainError):
    """The shop does not have it."""


desk = Service("desk", errors=[UnknownArticle])


@desk.method(idempotent=True)
async def quote(article: str, count: int = 1) -> int:
    """What so many articles cost, in cents."""
    if article not in PRICES:
        raise UnknownArticle(article)
    await asyncio.sleep(random.expovariate(100))
    return PRICES[article] * count


@desk.job(retry=Retry(max_attempts=4, initial_backoff=1), timeout=10)
async def thank(customer: str) -> None:
    """Send a card to a customer. One of ten is lost by the printer; without an address, there is nothing to do."""
    if "@" not in customer:
        raise GiveUp(f"{customer} is no address")
    await asyncio.sleep(random.expovariate(50))
    if random.random() < 0.1:  # noqa: S311
        raise OSError("the printer lost the card")
