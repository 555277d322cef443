"""Writes rows with a session's own transaction, and calls back when that is committed.

The rows are part of SQLAlchemy's unit of work: a rollback, also to a savepoint, drops them with everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

from sqlalchemy import event, func, select
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, SessionTransaction, scoped_session

from rpcq.errors import ConfigurationError, UsageError
from rpcq.outbox.databases import lock_key, same_database, shown
from rpcq.outbox.tables import OutboxRow

AnySession = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]

_WAKES: Final = "rpcq_outbox_wakes"
"""In `Session.info`: what is called after the commit."""


def session_of(db: Any) -> Session:
    """The `Session` that a session is, or has inside.

    Raises:
        ConfigurationError: it is no session.

    """
    if isinstance(db, scoped_session | async_scoped_session):
        db = db()
    found = db.sync_session if isinstance(db, AsyncSession) else db
    if not isinstance(found, Session):
        msg = "the first argument must be your Session or AsyncSession, with whose transaction it is written"
        raise ConfigurationError(f"{msg}; got {db!r:.200}")
    return found


def check_session(session: Session, engine: Any) -> None:
    """Check that a row that is written with a session is written to the database of an engine, in a transaction.

    Raises:
        ConfigurationError: the session is of another database, of none, or commits each statement by itself.
        UsageError: no transaction has begun.

    """
    try:
        bind = session.get_bind(OutboxRow)
    except UnboundExecutionError as error:
        msg = f"the session has no engine for the table rpcq_outbox: bind it to the one of {shown(engine)}"
        raise ConfigurationError(msg) from error
    if not same_database(bind.engine, engine):
        msg = f"the session is of another database, {shown(bind.engine)}, than the outbox, {shown(engine)}"
        raise ConfigurationError(f"{msg}: make an Outbox with the engine of the session, and relay it")
    if bind.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        raise ConfigurationError("the session must not have the isolation level AUTOCOMMIT: it has no transactions")
    if not session.in_transaction():
        msg = "the session is not in a transaction: write your changes and this one in `with session.begin():`"
        raise UsageError(f"{msg}; outside of one, send it with a client")


def write(session: Session, row: OutboxRow, wake: Callable[[], None]) -> None:
    """Let a row be written with the session's transaction; `wake` is called once that is committed."""
    session.info.setdefault(_WAKES, set()).add(wake)
    session.add(row)


@event.listens_for(Session, "before_flush")
def _lock_keys(session: Session, _context: Any, _instances: Any) -> None:
    """Take the lock of each key, so that rows of a key get their numbers in the order in which they are committed."""
    if _WAKES not in session.info:
        return
    keys = {row.order_key for row in session.new if isinstance(row, OutboxRow) and row.order_key is not None}
    if keys and session.get_bind(OutboxRow).dialect.name == "postgresql":
        for number in sorted(
            lock_key("rpcq", "order", key) for key in keys
        ):  # in one order: no two wait for each other
            session.execute(
                select(func.pg_advisory_xact_lock(number)),
                bind_arguments={"mapper": OutboxRow.__mapper__},  # type: ignore[attr-defined]  # a mapped class has it
            )


@event.listens_for(Session, "after_commit")
def _wake(session: Session) -> None:
    for wake in cast("set[Callable[[], None]]", session.info.get(_WAKES, ())):
        wake()


@event.listens_for(Session, "after_transaction_end")
def _forget(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:  # else it was a savepoint
        session.info.pop(_WAKES, None)
