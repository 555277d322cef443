"""The tables of the shop, of billing and of analytics: one SQLite database here, one for each service elsewhere."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from rpcq.outbox import metadata

BUSY = 20
"""Seconds that a process waits while another one writes."""


class Base(DeclarativeBase):
    """The tables of this example."""


class User(Base):
    """Somebody who has signed up: the web app's."""

    __tablename__ = "users"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    address: Mapped[str]
    created: Mapped[float]
    confirmed: Mapped[bool] = mapped_column(default=False)


class Account(Base):
    """An account with nothing on it: billing's."""

    __tablename__ = "accounts"
    user_id: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int]


class SignUp(Base):
    """What analytics knows of a user: no name, no address."""

    __tablename__ = "sign_ups"
    user_id: Mapped[str] = mapped_column(primary_key=True)
    domain: Mapped[str]


def open_database(path: Path | None = None) -> Engine:
    """Open the database, and make its tables if they are not there; None for the one of `MAIL_DATABASE`."""
    file = path or Path(os.environ.get("MAIL_DATABASE", "mail.sqlite"))
    engine = create_engine(f"sqlite:///{file.resolve()}", connect_args={"timeout": BUSY})
    event.listen(engine, "connect", _prepare)
    for tables in (Base.metadata, metadata):
        for table in tables.sorted_tables:  # several processes may begin at once
            with engine.begin() as connection:
                connection.exec_driver_sql("begin immediate")
                table.create(connection, checkfirst=True)
    return engine


def _prepare(connection: Any, _record: Any) -> None:
    connection.execute("pragma journal_mode = wal")


@contextmanager
def opened() -> Generator[Engine]:
    """Open the database of `MAIL_DATABASE` for a while."""
    engine = open_database()
    try:
        yield engine
    finally:
        engine.dispose()


def add_once(engine: Engine, row: Base) -> None:
    """Add a row, unless there is one with its key: an event may come twice, and then the second does nothing."""
    values = {column.key: getattr(row, column.key) for column in row.__table__.columns}
    with engine.begin() as connection:
        connection.execute(insert(type(row)).values(values).on_conflict_do_nothing())
