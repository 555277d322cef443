"""The databases: each service has tables of its own, and reads those of no other.

`ORDERS_DATABASE` is the URL. `{service}` in it becomes the service's name, for a database each. SQLite is for one
machine, and a file has one writer at a time: so the default is a file for each service. PostgreSQL may also be one
database for all.
"""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

BUSY = 30.0
"""Seconds that a transaction in a SQLite file waits for the one before it."""


def database(service: str) -> AsyncEngine:
    """The database of a service."""
    given = os.environ.get("ORDERS_DATABASE", "sqlite+aiosqlite:///orders-{service}.sqlite")
    url = make_url(given.replace("{service}", service))
    if url.get_backend_name() != "sqlite":
        return create_async_engine(url)
    engine = create_async_engine(url, connect_args={"timeout": BUSY})
    event.listen(engine.sync_engine, "connect", _write_ahead)
    return engine


def _write_ahead(connection: Any, _record: object) -> None:
    """Let those who read not wait for the one who writes."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()
