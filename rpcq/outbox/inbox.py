"""The inbox: a handler's changes, and the key of its job, are one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from inspect import isclass
from typing import Any, Final

from sqlalchemy import BigInteger, Connection, bindparam, delete, event, func, select, tuple_
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

from rpcq.errors import ConfigurationError, UsageError
from rpcq.once import Found, NotBegun, NotCommitted, OnceKey
from rpcq.options import check_seconds
from rpcq.outbox.databases import AnyEngine, Database, lock_key, same_database, shown, sync_engine
from rpcq.outbox.tables import OutboxRow, inbox
from rpcq.runtime import clock

MOST_PRUNED: Final = 10_000
"""Rows that one statement of `prune` deletes."""

_ERRORS: Final = "rpcq_errors"
"""In `Connection.info`: how many errors of the database it has had."""

_COLUMNS: Final = ("consumer", "key", "fingerprint", "done")
_VALUES: Final = tuple(bindparam(name, type_=inbox.c[name].type) for name in _COLUMNS)
_MINE: Final = (inbox.c.consumer == bindparam("consumer"), inbox.c.key == bindparam("key"))

# One statement, so that a key costs one round trip. It waits for nobody: if another transaction is about to do the
# same, it has the lock. https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADVISORY-LOCKS
_ENTER: Final = (
    postgresql.insert(inbox)
    .from_select(_COLUMNS, select(*_VALUES).where(func.pg_try_advisory_xact_lock(bindparam("lock", type_=BigInteger))))
    .on_conflict_do_nothing()
    .returning(inbox.c.done)
)
# SQLite has one writer at a time: this waits for it, up to the connection's timeout.
_ENTER_FILE: Final = (
    inbox.insert()
    .prefix_with("OR IGNORE")
    .values(dict(zip(_COLUMNS, _VALUES, strict=True)))
    .execution_options(preserve_rowcount=True)  # for SQLite before 3.35, which has no RETURNING
)
_FOUND: Final = select(inbox.c.fingerprint).where(*_MINE)


class Inbox:
    """Makes the changes of a handler happen once, however often its job comes.

        @payments.job(once=Inbox(engine))
        async def charge(db: AsyncSession, order: int) -> None:
            db.add(Payment(order))
            outbox.send(db, receipt, order=order)

    The handler gets its session in the parameter that is annotated `AsyncSession`, or, in a `def`, `Session`. Its
    transaction has the key of the job; it is committed after the handler, and before the job is acknowledged. If the
    handler raises, it is rolled back. So the handler must neither commit nor roll back; for a part that may fail,
    there is `db.begin_nested()`.

    A job whose key is there is acknowledged, and does not run. While another worker has the key in a transaction, the
    job is put off for 5 seconds. If the database cannot be used, it is put off, too, from a second up to a minute;
    neither counts as an attempt. If the connection is lost in the commit, the job is tried again, and the key says
    whether it is done. What the handler does elsewhere, such as an e-mail, may happen more than once.

    Args:
        engine: an `AsyncEngine` for `async def` handlers, or an `Engine` for `def` handlers, of PostgreSQL or SQLite;
            the tables must exist, see `rpcq.outbox.metadata`.
        sessions: makes the sessions; None for `sessionmaker(engine, expire_on_commit=False)`.

    Raises:
        ConfigurationError: the engine cannot be used, or `sessions` are of another database, or of the other kind.

    """

    def __init__(
        self, engine: AnyEngine, *, sessions: sessionmaker[Any] | async_sessionmaker[Any] | None = None
    ) -> None:
        self._given = engine
        self._engine = sync_engine(engine)
        self._is_async = isinstance(engine, AsyncEngine)
        maker: Any = async_sessionmaker if self._is_async else sessionmaker
        if sessions is None:
            sessions = maker(engine, expire_on_commit=False)
        elif not isinstance(sessions, maker):
            msg = f"sessions must be made by {maker.__name__}(...), as the engine is {type(engine).__name__}"
            raise ConfigurationError(f"{msg}; got {sessions!r:.200}")
        self._sessions: Any = sessions
        bind = sessions.kw.get("bind")
        if bind is None:
            self._sessions = partial(sessions, bind=engine)
        elif not same_database(sync_engine(bind), self._engine):
            of, than = shown(sync_engine(bind)), shown(self._engine)
            raise ConfigurationError(f"sessions must be of the inbox's database, {than}; got those of {of}")
        self._is_server = self._engine.dialect.name == "postgresql"
        for each in {self._engine, self._engine if bind is None else sync_engine(bind)}:
            event.listen(each, "handle_error", _note_error)

    # For `rpcq.once.Once`.

    def gives(self, label: str, annotation: Any, *, is_async: bool) -> bool:
        """Whether a handler's parameter with this annotation gets the session.

        Raises:
            ConfigurationError: it would get one that does not fit the handler or the engine.

        """
        if not isclass(annotation) or not issubclass(annotation, Session | AsyncSession):
            return False
        if is_async is not self._is_async or issubclass(annotation, AsyncSession) is not self._is_async:
            handler = "an async def" if is_async else "a def"
            msg = f"{label}, {handler}, takes a session of type {annotation.__name__}"
            raise ConfigurationError(f"{msg}, and has once=Inbox(...), {self._fix()}")
        return True

    def missing(self, *, is_async: bool) -> str:
        """What is wrong with a handler that takes no session."""
        if is_async is not self._is_async:
            return f"has once=Inbox(...), {self._fix()}"
        kind = "AsyncSession" if self._is_async else "Session"
        return f"has once=Inbox(...), and must take its session in a parameter that is annotated {kind}"

    def _fix(self) -> str:
        if self._is_async:
            return (
                "whose AsyncEngine is for async def handlers with an AsyncSession: give it create_engine(...) for a def"
            )
        return "whose Engine is for def handlers with a Session: give it create_async_engine(...) for an async def"

    @asynccontextmanager
    async def open(self, key: OnceKey) -> AsyncIterator[AsyncSession]:
        """A session whose transaction has the key; see `rpcq.once.Once`."""
        session: AsyncSession = self._sessions()
        try:
            try:
                entered = await session.run_sync(self._enter, key)
            except NotBegun:
                raise
            except Exception as error:
                raise NotBegun(Found.FAILED) from error
            yield session
            await session.run_sync(self._leave, key, *entered)
        except BaseException:
            # To its end, also if this task is cancelled: its connection is not left in a transaction.
            await asyncio.shield(asyncio.get_running_loop().create_task(session.close()))
            raise

    @contextmanager
    def open_blocking(self, key: OnceKey) -> Iterator[Session]:
        """The same for a `def` handler."""
        session: Session = self._sessions()
        try:
            try:
                entered = self._enter(session, key)
            except NotBegun:
                raise
            except Exception as error:
                raise NotBegun(Found.FAILED) from error
            yield session
            self._leave(session, key, *entered)
        except BaseException:
            session.close()
            raise

    def _enter(self, session: Session, key: OnceKey) -> tuple[SessionTransaction, int]:
        transaction = session.begin()
        connection = _connection(session)
        errors = connection.info.get(_ERRORS, 0)
        values: dict[str, Any] = {**key._asdict(), "done": clock.now_ms()}
        if self._is_server:
            values["lock"] = lock_key("rpcq", "once", key.consumer, key.key)
        if self._is_server:
            is_new = connection.execute(_ENTER, values).first() is not None
        else:
            is_new = connection.execute(_ENTER_FILE, values).rowcount == 1
        if is_new:
            return transaction, errors
        found = connection.execute(_FOUND, {"consumer": key.consumer, "key": key.key}).scalar_one_or_none()
        if found is None:
            raise NotBegun(Found.HELD)
        raise NotBegun(Found.DONE if bytes(found) == key.fingerprint else Found.OTHER)

    def _leave(self, session: Session, key: OnceKey, transaction: SessionTransaction, errors: int) -> None:
        if session.get_transaction() is not transaction or not transaction.is_active:
            msg = f"the handler of {key.consumer} must leave commit and rollback to the inbox"
            raise UsageError(f"{msg}: use db.begin_nested() for a part that may fail")
        session.flush()  # what it refuses is the handler's own error
        connection = _connection(session)
        if connection.info.get(_ERRORS, 0) != errors:
            # The handler swallowed an error. PostgreSQL answers the commit of a transaction that has failed with a
            # rollback, and no error: https://www.postgresql.org/docs/current/sql-commit.html
            connection.execute(_FOUND, {"consumer": key.consumer, "key": key.key}).scalar_one()
        try:
            session.commit()
        except Exception as error:
            raise NotCommitted(f"the commit failed: {type(error).__name__}: {error}") from error
        session.close()

    # Pruning.

    async def prune(self, seconds: float) -> int:
        """Delete the keys of what was done that long ago. A job that comes again after that runs again.

        It deletes 10 000 at a time, each time in a transaction of its own. `rpcq outbox prune` does the same.

        Args:
            seconds: the age; longer than a job can wait, be retried, or be replayed from the dead letters.

        Returns:
            How many.

        Raises:
            ConfigurationError: that is no number of seconds above 0.
            sqlalchemy.exc.SQLAlchemyError: the database cannot be used.

        """
        check_seconds("seconds", seconds)
        before = clock.now_ms() - round(seconds * 1000)
        database = Database(self._given)
        total, deleted = 0, MOST_PRUNED
        try:
            while deleted == MOST_PRUNED:
                async with database.transaction() as run:
                    deleted = await run(prune, before)
                total += deleted
        finally:
            database.close()
        return total


def prune(connection: Connection, before: int) -> int:
    """Delete up to `MOST_PRUNED` keys of what was done before a time, in milliseconds since the epoch."""
    key = tuple_(inbox.c.consumer, inbox.c.key)
    old = select(inbox.c.consumer, inbox.c.key).where(inbox.c.done < before).limit(MOST_PRUNED)
    return connection.execute(delete(inbox).where(key.in_(old))).rowcount


def _connection(session: Session) -> Connection:
    """The connection of a session to the database of these tables; it may have others."""
    return session.connection(bind_arguments={"mapper": OutboxRow})


def _note_error(context: ExceptionContext) -> None:
    if context.connection is not None and not context.connection.invalidated:
        context.connection.info[_ERRORS] = context.connection.info.get(_ERRORS, 0) + 1
