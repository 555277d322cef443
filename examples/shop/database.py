"""The databases: each service has tables of its own, and reads those of no other.

`SHOP_DATABASE` is the URL. `{service}` in it becomes the service's name, for a database each. SQLite is for one
machine, and a file has one writer at a time: so the default is a file for each service. PostgreSQL may also be one
database for all.
"""

from __future__ import annotations

import os

from sqlalchemy.ext.asyncio import AsyncEngine

from examples.stage.databases import open_engine


def database(service: str) -> AsyncEngine:
    """The database of a service."""
    given = os.environ.get("SHOP_DATABASE", "sqlite+aiosqlite:///shop-{service}.sqlite")
    return open_engine(given.replace("{service}", service))
