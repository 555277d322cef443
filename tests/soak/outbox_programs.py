"""The programs of the soak of outbox and inbox: `python -m soak.outbox_programs app|worker FOLDER`.

The database is that of RPCQ_DATABASE, with asyncpg; the broker and the namespace are by RPCQ_....
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
from pathlib import Path

import asyncpg
from sqlalchemy import Boolean, Column, Identity, Integer, MetaData, Table, insert
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from rpcq import Retry, Service, Worker
from rpcq.outbox import Inbox, Outbox

SERVICE = "payments"
JOB = f"{SERVICE}.charge"
KEYS = 24
"""Order keys. Jobs of key 0 have none."""
ROLLED_BACK = 0.15
"""The share of transactions that are rolled back, wholly or to a savepoint."""
SOON = Retry(max_attempts=1000, initial_backoff=0.05, max_backoff=1.0)

APP_CONNECTIONS = 18
WORKER_CONNECTIONS = 10
"""Connections of the app, and of each of the two workers.

With those of the relay and of the soak they are fewer than the database has (`support.postgres`). Otherwise a program
whose pool is empty gets none, because the others keep theirs, and nothing goes on.
"""

own = MetaData()
orders = Table("orders", own, Column("id", Integer, Identity(), primary_key=True), Column("key", Integer))
effects = Table(
    "effects",
    own,
    Column("id", Integer, Identity(), primary_key=True),
    Column("order_id", Integer),
    Column("is_ghost", Boolean),
)


def engine_of(connections: int) -> AsyncEngine:
    return create_async_engine(os.environ["RPCQ_DATABASE"], pool_size=connections, max_overflow=0, pool_pre_ping=True)


async def write(key: int, outbox: Outbox, engine: AsyncEngine, enough: Path) -> None:
    """Write orders of one key, one after another, each with its job; some are rolled back."""
    sessions = async_sessionmaker(engine)
    keyed = outbox.with_options(order_key=f"k{key}") if key else outbox
    dice = random.Random()
    while not os.path.exists(enough):  # noqa: ASYNC240, PTH110 - one quick question
        try:
            async with sessions.begin() as db:
                number = (await db.execute(insert(orders).values(key=key).returning(orders.c.id))).scalar_one()
                chance = dice.random()
                if chance < ROLLED_BACK / 2:
                    savepoint = await db.begin_nested()
                    keyed.send(db, JOB, order_id=number, key=key, is_ghost=True)
                    await db.flush()
                    await savepoint.rollback()
                keyed.send(db, JOB, order_id=number, key=key, is_ghost=False)
                if ROLLED_BACK / 2 < chance < ROLLED_BACK:
                    await db.flush()
                    await db.rollback()
        except (SQLAlchemyError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            logging.getLogger("app").warning("not written: %r", error)
            await asyncio.sleep(0.2)
        await asyncio.sleep(dice.uniform(0, 0.05))


async def app(folder: Path) -> None:
    """Write orders, and relay their jobs, until there are enough."""
    engine = engine_of(APP_CONNECTIONS)
    outbox = Outbox(engine)
    async with outbox:
        await asyncio.gather(*(write(key, outbox, engine, folder / "enough") for key in range(KEYS)))
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        await stopping.wait()


async def worker(_: Path) -> None:
    """Do the jobs, each with its effect in one transaction."""
    engine = engine_of(WORKER_CONNECTIONS)
    service = Service(SERVICE, ordered=True)

    @service.job(once=Inbox(engine), retry=SOON, timeout=30)
    async def charge(db: AsyncSession, order_id: int, key: int, is_ghost: bool) -> None:
        await db.execute(insert(effects).values(order_id=order_id, is_ghost=is_ghost))

    serving = Worker(service, job_prefetch=16, remember=0)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.request_stop)
    await serving.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run({"app": app, "worker": worker}[sys.argv[1]](Path(sys.argv[2])))
