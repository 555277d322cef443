"""Jobs and database in one transaction: an outbox for what is sent, an inbox for effects that happen once.

Needs SQLAlchemy 2, and a driver: psycopg or asyncpg for PostgreSQL, sqlite3 or aiosqlite for SQLite.
"""

from rpcq.runtime.distribution import missing

try:
    import sqlalchemy  # noqa: F401 - everything here needs it
except ImportError as error:
    raise ImportError(missing("rpcq.outbox", "sqlalchemy", "outbox"), name=error.name) from error

from rpcq.outbox.inbox import Inbox
from rpcq.outbox.options import OutboxKwargs, OutboxOptions
from rpcq.outbox.outbox import Outbox
from rpcq.outbox.relay import Counts
from rpcq.outbox.rows import OutboxDepth
from rpcq.outbox.tables import add_tables, metadata

__all__ = ["Counts", "Inbox", "Outbox", "OutboxDepth", "OutboxKwargs", "OutboxOptions", "add_tables", "metadata"]
