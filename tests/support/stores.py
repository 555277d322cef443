"""Databases for outbox and inbox: PostgreSQL and SQLite, with drivers that block and drivers that do not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, create_engine, event, select
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, registry, sessionmaker

from rpcq.outbox import metadata

DRIVERS = {
    "asyncpg": "postgresql+asyncpg",
    "psycopg-async": "postgresql+psycopg",
    "psycopg": "postgresql+psycopg",
    "aiosqlite": "sqlite+aiosqlite",
    "sqlite3": "sqlite",
}
BLOCKING = ("psycopg", "sqlite3")

own = MetaData()
orders = Table(
    "orders",
    own,
    Column("id", Integer, primary_key=True),
    Column("number", Integer, nullable=False),
    Column("note", String(100), nullable=False),
)


class Order:
    """A user's own row."""

    def __init__(self, number: int, note: str = "") -> None:
        self.number = number
        self.note = note


registry(metadata=own).map_imperatively(Order, orders)


class Store:
    """A database with the tables of outbox and inbox, and `orders`.

    Attributes:
        engine: with the driver that was asked for.
        sessions: makes its sessions.
        url: of its engine.
        plain: an engine that blocks, to look with.
    """

    def __init__(self, driver: str, url: str, *, create: bool = True, **options: Any) -> None:
        self.driver = driver
        self.is_blocking = driver in BLOCKING
        self.url = make_url(url).set(drivername=DRIVERS[driver])
        plain_driver = "sqlite" if "sqlite" in driver else "postgresql+psycopg"
        self.plain = create_engine(self.url.set(drivername=plain_driver))
        self.engine: Any
        self.sessions: Any
        if self.is_blocking:
            self.engine = create_engine(self.url, **options)
            self.sessions = sessionmaker(self.engine)
        else:
            self.engine = create_async_engine(self.url, **options)
            self.sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        for engine in (self.plain, self.engine):
            if "sqlite" in driver:
                event.listen(getattr(engine, "sync_engine", engine), "connect", write_ahead)
        if create:
            metadata.create_all(self.plain)
            own.create_all(self.plain)

    async def write(self, work: Callable[[Any], Any], *, commit: bool = True) -> Any:
        """Do something with a session, in a transaction."""
        if self.is_blocking:
            return await asyncio.to_thread(self._write, work, commit)
        async with self.sessions() as db, db.begin():
            found = work(db)
            if asyncio.iscoroutine(found):
                found = await found
            if not commit:
                await db.rollback()
        return found

    def _write(self, work: Callable[[Session], Any], commit: bool) -> Any:
        with self.sessions() as db, db.begin():
            found = work(db)
            if not commit:
                db.rollback()
        return found

    def asked(self, statement: Any) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        with self.plain.connect() as connection:
            return [tuple(row) for row in connection.execute(statement)]

    def count(self, table: Table) -> int:
        return len(self.asked(select(table)))

    def do(self, function: Callable[[Connection], Any]) -> Any:
        with self.plain.begin() as connection:
            return function(connection)

    async def close(self) -> None:
        self.plain.dispose()
        if self.is_blocking:
            self.engine.dispose()
        else:
            await self.engine.dispose()


def write_ahead(connection: Any, _: Any) -> None:
    """Let readers of a SQLite file not wait for its writer, and writers wait for each other."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.close()


def url_of(driver: str, folder: Path, database: Callable[[], str]) -> str:
    """The URL of a database for a driver: a new file, or what `database` makes."""
    return f"sqlite:///{folder}/app.db" if "sqlite" in driver else database()


__all__ = ["DRIVERS", "AsyncSession", "Order", "Store", "orders", "url_of", "write_ahead"]
