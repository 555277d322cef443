"""Behind pgbouncer in transaction mode: relay and inbox work with the settings that the guide gives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from rpcq import Service
from rpcq.outbox import Inbox, Outbox
from rpcq.outbox.tables import inbox as inbox_table
from rpcq.outbox.tables import outbox as rows_table
from support.load import until
from support.pgbouncer import pgbouncer
from support.places import Place
from support.stores import Order, Store, orders

UNPREPARED = {"prepare_threshold": None}
SETTINGS: dict[str, dict[str, Any]] = {
    "psycopg": {"connect_args": UNPREPARED},
    "psycopg-async": {"connect_args": UNPREPARED},
    "asyncpg": {
        "poolclass": NullPool,
        "connect_args": {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"rpcq_{uuid4()}",
        },
    },
}


@pytest.fixture
def through(database_url: str) -> Iterator[str]:
    with pgbouncer(database_url) as url:
        yield url


@pytest.mark.parametrize(
    "driver",
    ["asyncpg", *(pytest.param(it, marks=pytest.mark.long) for it in SETTINGS if it != "asyncpg")],
    indirect=True,
)
async def test_jobs_are_sent_in_order_and_done_once_through_a_pool_of_transactions(
    driver: str, database_url: str, through: str, home: Place, service: Service
) -> None:
    service = Service(f"{service.name}-ordered", ordered=True)
    direct = Store("psycopg", database_url)  # it makes the tables
    store = Store(driver, through, create=False, **SETTINGS[driver])
    outbox = Outbox(store.engine, home.url, namespace=home.namespace)

    if store.is_blocking:

        @service.job(once=Inbox(store.engine), name="charge")
        def charge(db: Session, number: int) -> None:
            db.add(Order(number))
    else:

        @service.job(once=Inbox(store.engine), name="charge")
        async def charge_async(db: AsyncSession, number: int) -> None:
            db.add(Order(number))

    keyed = outbox.with_options(order_key="k")
    async with outbox, Outbox(store.engine, home.url, namespace=home.namespace), home.worker(service, remember=0):
        await asyncio.gather(
            *(store.write(lambda db, n=n: keyed.send(db, f"{service.name}.charge", number=n)) for n in range(30))
        )
        await until(lambda: direct.count(inbox_table) == 30)
        await until(lambda: not direct.count(rows_table))
    assert sorted(number for _, number, _ in direct.asked(orders.select())) == [*range(30)]
    await store.close()
    await direct.close()
