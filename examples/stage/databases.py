"""SQLite for examples with several processes: those who read do not wait for the one who writes."""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

CONNECTIONS = 10
"""The most connections of a process to PostgreSQL, which has an end of them: who needs one more waits."""

BUSY = 30.0
"""Seconds that a transaction in a SQLite file waits for the one before it."""


def open_engine(url: str | URL) -> AsyncEngine:
    """The engine of a database: PostgreSQL, or SQLite with what several processes need."""
    url = make_url(url)
    if url.get_backend_name() != "sqlite":
        return create_async_engine(url, pool_size=CONNECTIONS, max_overflow=0)
    engine = create_async_engine(url, connect_args={"timeout": BUSY})
    event.listen(engine.sync_engine, "connect", _write_ahead)
    return engine


def _write_ahead(connection: Any, _record: object) -> None:
    """Let those who read not wait for the one who writes."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()
