"""The tables of outbox and inbox. Pure.

They are in a MetaData of their own: `metadata.create_all(engine)` makes them, and `add_tables` puts them into the
MetaData of a program whose migrations are made from that. All times are milliseconds since the epoch.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
)
from sqlalchemy.orm import registry

metadata: Final = MetaData()
"""The tables `rpcq_outbox`, `rpcq_outbox_dead` and `rpcq_inbox`."""

# SQLite numbers rows by itself only where the type is exactly INTEGER.
_ID: Final = BigInteger().with_variant(Integer, "sqlite")


def _message() -> list[Column[Any]]:
    """The columns of a message, new ones for each table."""
    return [
        Column("id", _ID, Identity(always=False), primary_key=True),
        Column("message_id", String(255), nullable=False),
        Column("label", String(255), nullable=False),
        Column("order_key", String(255)),
        Column("exchange", String(255), nullable=False),
        Column("routing_key", String(255), nullable=False),
        Column("properties", LargeBinary, nullable=False),
        Column("body", LargeBinary, nullable=False),
        Column("created", BigInteger, nullable=False),
    ]


outbox: Final = Table(
    "rpcq_outbox",
    metadata,
    *_message(),
    Column("due", BigInteger),
    Column("tries", Integer, nullable=False),
    Column("error", Text),
    sqlite_autoincrement=True,  # else SQLite gives the number of a deleted row to the next one
)
"""Messages to be published. `due` is when, or when to try again; NULL is at once."""

Index("rpcq_outbox_message_id", outbox.c.message_id)
Index(
    "rpcq_outbox_due", outbox.c.due, postgresql_where=outbox.c.due.is_not(None), sqlite_where=outbox.c.due.is_not(None)
)
Index(
    "rpcq_outbox_order_key",
    outbox.c.order_key,
    outbox.c.id,
    postgresql_where=outbox.c.order_key.is_not(None),
    sqlite_where=outbox.c.order_key.is_not(None),
)

dead: Final = Table(
    "rpcq_outbox_dead",
    metadata,
    *_message(),
    Column("died", BigInteger, nullable=False),
    Column("reason", String(50), nullable=False),
    Column("error", Text, nullable=False),
    sqlite_autoincrement=True,
)
"""Messages that cannot be published, with the reason: `unroutable` or `too_large`."""

inbox: Final = Table(
    "rpcq_inbox",
    metadata,
    Column("consumer", String(1000), nullable=False),
    Column("key", String(255), nullable=False),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("done", BigInteger, nullable=False),
    PrimaryKeyConstraint("consumer", "key"),
)
"""What is done: a job by its idempotency key, which is its ID unless its sender gave one."""

Index("rpcq_inbox_done", inbox.c.done)


class OutboxRow:
    """A row of `rpcq_outbox` that is to be written with its session's transaction."""

    id: int
    message_id: str
    label: str
    order_key: str | None
    exchange: str
    routing_key: str
    properties: bytes
    body: bytes
    created: int
    due: int | None
    tries: int


registry(metadata=metadata).map_imperatively(OutboxRow, outbox)


def add_tables(target: MetaData) -> None:
    """Add the three tables to the MetaData of a program: its migrations contain them then.

    Args:
        target: such as `Base.metadata`. Tables that it has already are left alone.

    """
    for table in metadata.tables.values():
        if table.key not in target.tables:
            table.to_metadata(target)
