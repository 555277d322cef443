"""The databases: a SQLite file for each service, in the folder of `NEWS_FOLDER`. Each service reads its own alone."""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncEngine

from examples.stage.databases import open_engine


def database(name: str) -> AsyncEngine:
    """The database of a service."""
    return open_engine(f"sqlite+aiosqlite:///{Path(os.environ.get('NEWS_FOLDER', '.')).resolve()}/news-{name}.sqlite")
