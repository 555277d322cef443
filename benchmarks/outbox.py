"""How fast a relay sends the rows of an outbox, and how fast one worker does jobs with an inbox, on PostgreSQL.

    export RPCQ_URL=amqp://guest:guest@localhost/ RPCQ_DATABASE=postgresql+asyncpg://user:password@localhost/test
    python -m benchmarks.outbox --rows 20000 --jobs 5000 --rounds 3

The tables of `rpcq.outbox` are made in that database if they are not there, and emptied. `relay` is from the first
look of the relay until the last row is deleted; `inbox` from the start of a worker, for which all jobs wait, until the
last one is acknowledged: each handler inserts one row of its own. `plain` is the same job without an inbox and without
a row. `latency_ms` is from the end of a commit to the handler, one job at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import statistics
import time
from typing import Any

from sqlalchemy import Column, Integer, MetaData, Table, delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from rpcq import Client, Service, Worker
from rpcq.outbox import Inbox, Outbox, metadata
from rpcq.outbox.tables import dead, inbox, outbox
from rpcq.runtime.process import run

own = MetaData()
effects = Table("rpcq_benchmark", own, Column("id", Integer, primary_key=True), Column("number", Integer))


async def emptied(engine: AsyncEngine) -> None:
    """Make the tables, and empty them."""
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.run_sync(own.create_all)
        for table in (outbox, dead, inbox, effects):
            await connection.execute(delete(table))


async def count(connection: AsyncConnection, table: Table) -> int:
    """How many rows a table has."""
    return int((await connection.execute(select(func.count()).select_from(table))).scalar_one())


async def until_empty(engine: AsyncEngine) -> None:
    """Wait until every row of the outbox is sent."""
    async with engine.connect() as connection:
        while await count(connection, outbox):
            await connection.rollback()
            await asyncio.sleep(0.01)


async def of_relay(engine: AsyncEngine, url: str, rows: int, keys: int) -> float:
    """Rows that a relay sends in a second; with `keys`, in order for each of so many order keys."""
    await emptied(engine)
    service = Service(f"bench{secrets.token_hex(4)}")

    @service.job
    async def work(number: int) -> None: ...

    box = Outbox(engine, url, name="bench")
    sessions = async_sessionmaker(engine)
    for start in range(0, rows, 1000):
        async with sessions.begin() as db:
            for number in range(start, min(rows, start + 1000)):
                keyed = box.with_options(order_key=f"k{number % keys}") if keys else box
                keyed.send(db, work, number=number)
    async with Worker(service, url=url):
        pass  # its queue is there from now on
    began = time.perf_counter()
    async with box:
        await until_empty(engine)
        return rows / (time.perf_counter() - began)


async def of_jobs(engine: AsyncEngine, url: str, jobs: int, concurrency: int, *, once: bool) -> float:
    """Jobs that one worker does in a second."""
    await emptied(engine)
    service = Service(f"bench{secrets.token_hex(4)}")
    left, done = jobs, asyncio.Event()

    def note() -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    if once:

        @service.job(once=Inbox(engine))
        async def work(db: AsyncSession, number: int) -> None:
            await db.execute(insert(effects).values(number=number))
            note()
    else:

        @service.job
        async def work(number: int) -> None:  # noqa: ARG001 - as many parameters as the other one
            note()

    async with Worker(service, url=url):
        pass
    async with Client(url) as client:
        name = f"{service.name}.work"
        for start in range(0, jobs, 500):
            await client.send_many(name, [{"number": number} for number in range(start, min(jobs, start + 500))])
    began = time.perf_counter()
    async with Worker(service, url=url, job_prefetch=concurrency) as worker:
        await done.wait()
        while worker.in_flight:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.001)
        seconds = time.perf_counter() - began
    if once:
        async with engine.connect() as connection:
            assert await count(connection, effects) == await count(connection, inbox) == jobs
    return jobs / seconds


async def of_latency(engine: AsyncEngine, url: str, jobs: int) -> float:
    """Milliseconds from the end of a commit to the handler: the median."""
    await emptied(engine)
    service = Service(f"bench{secrets.token_hex(4)}")
    came: asyncio.Queue[float] = asyncio.Queue()

    @service.job
    async def work() -> None:
        came.put_nowait(time.perf_counter())

    sessions = async_sessionmaker(engine)
    waits = []
    async with Worker(service, url=url), Outbox(engine, url) as box:
        for _ in range(jobs):
            async with sessions.begin() as db:
                box.send(db, work)
            committed = time.perf_counter()
            waits.append((await came.get() - committed) * 1000)
    return statistics.median(waits)


async def measure(given: Any) -> dict[str, Any]:
    """All figures: the median of the rounds, and the least and the most."""
    url = os.environ["RPCQ_URL"]
    engine = create_async_engine(os.environ["RPCQ_DATABASE"], pool_size=given.concurrency, max_overflow=4)
    found: dict[str, list[float]] = {}
    try:
        for _ in range(given.rounds):
            for name, measured in (
                ("relay_per_s", of_relay(engine, url, given.rows, 0)),
                ("relay_of_1000_keys_per_s", of_relay(engine, url, given.rows, 1000)),
                ("inbox_per_s", of_jobs(engine, url, given.jobs, given.concurrency, once=True)),
                ("plain_per_s", of_jobs(engine, url, given.jobs, given.concurrency, once=False)),
                ("latency_ms", of_latency(engine, url, 100)),
            ):
                found.setdefault(name, []).append(await measured)
    finally:
        await engine.dispose()
    return {
        name: {"median": round(statistics.median(each), 1), "least": round(min(each), 1), "most": round(max(each), 1)}
        for name, each in found.items()
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the outbox")
    parser.add_argument("--jobs", type=int, default=5000, help="jobs of the inbox")
    parser.add_argument("--concurrency", type=int, default=16, help="jobs at once, and connections to the database")
    parser.add_argument("--rounds", type=int, default=3)
    print(json.dumps(run(measure(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
