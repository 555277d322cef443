"""The tables: uploads, their steps, and notices. SQLite here; with workers on several machines, PostgreSQL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from rpcq.outbox import metadata

BUSY = 30
"""Seconds that a process waits while another one writes."""


class Base(DeclarativeBase):
    """The tables of this example."""


class Upload(Base):
    """A file that somebody has uploaded.

    `left` is the number of steps that are not done. The transaction that brings it to 0 writes the job `notify`, too.
    """

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    size: Mapped[int]
    created: Mapped[float]
    left: Mapped[int]
    notified: Mapped[float | None]


class StepRow(Base):
    """A step of an upload, and the ID of its job. A time that is None says that it has not come to that."""

    __tablename__ = "steps"
    upload: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    sent: Mapped[float | None] = mapped_column(index=True)
    job: Mapped[str | None]
    began: Mapped[float | None]
    worker: Mapped[int | None]
    attempt: Mapped[int] = mapped_column(default=0)
    runs: Mapped[int] = mapped_column(default=0)
    error: Mapped[str | None]
    done: Mapped[float | None]
    size: Mapped[int | None]


class Notice(Base):
    """What a user is told. Nothing in this table keeps a second one out."""

    __tablename__ = "notices"
    id: Mapped[int] = mapped_column(primary_key=True)
    upload: Mapped[str] = mapped_column(index=True)
    text: Mapped[str]
    at: Mapped[float]


class Fault(Base):
    """A step that is made to fail, so that one can see what happens then."""

    __tablename__ = "faults"
    step: Mapped[str] = mapped_column(primary_key=True)


def open_database(folder: Path) -> Engine:
    """Open the database of a folder, and make its tables if they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = create_engine(f"sqlite:///{folder.resolve() / 'media.sqlite'}", connect_args={"timeout": BUSY})
    event.listen(engine, "connect", _prepare)
    for tables in (Base.metadata, metadata):
        for table in tables.sorted_tables:  # several processes may begin at once
            with engine.begin() as connection:
                connection.exec_driver_sql("begin immediate")
                table.create(connection, checkfirst=True)
    return engine


def _prepare(connection: Any, _record: object) -> None:
    connection.execute("pragma journal_mode = wal")  # who reads does not wait for who writes
