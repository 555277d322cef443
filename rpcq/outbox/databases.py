"""Engines of SQLAlchemy: which database one belongs to, and transactions for the event loop with either kind of engine.

An `AsyncEngine` is used in the event loop; an `Engine`, which blocks, in a thread of its own. What is done in a
transaction is a function of a `Connection` in both cases.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.util import find_spec
from typing import Any, Final, Protocol, TypeVar

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from rpcq.errors import ConfigurationError
from rpcq.runtime.distribution import missing_driver

T = TypeVar("T")

AnyEngine = Engine | AsyncEngine

ABANDON_TIMEOUT: Final = 5.0
"""Seconds that a connection has to open, and a transaction in a thread to end, once its task is cancelled."""

DATABASES: Final = ("postgresql", "sqlite")


def sync_engine(engine: AnyEngine) -> Engine:
    """The `Engine` itself, or the one inside of an `AsyncEngine`.

    Raises:
        ConfigurationError: it is no engine, or one of a database that cannot be used.

    """
    found = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    if not isinstance(found, Engine):
        msg = f"engine must be what create_engine or create_async_engine returned; got {engine!r:.200}"
        raise ConfigurationError(msg)
    if found.dialect.name not in DATABASES:
        raise ConfigurationError(f"engine must be one of PostgreSQL or SQLite; got one of {found.dialect.name!r}")
    if found.dialect.name == "sqlite" and _file(found.url) is None:
        msg = "engine must be one of a SQLite database in a file: one in memory is lost with its process"
        raise ConfigurationError(f"{msg}; got {shown(found)}")
    if found.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        msg = "engine must not have the isolation level AUTOCOMMIT: rows are to be committed with your own changes"
        raise ConfigurationError(msg)
    return found


def same_database(one: Engine, other: Engine) -> bool:
    """Whether two engines are of one database; their drivers, users and options may differ."""
    if one.pool is other.pool:
        return True
    if one.dialect.name == other.dialect.name == "sqlite":
        return _file(one.url) == _file(other.url)
    return _place(one) == _place(other)


def shown(engine: Engine) -> str:
    """The URL of an engine without its password, for texts of errors."""
    return engine.url.render_as_string(hide_password=True)


def lock_key(*parts: str) -> int:
    """The number of an advisory lock of PostgreSQL, a signed 64-bit integer."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big", signed=True)


def file_of(engine: Engine) -> str:
    """The path of a SQLite database."""
    found = _file(engine.url)
    assert found is not None  # noqa: S101 - `sync_engine` has checked it
    return found


def _place(engine: Engine) -> tuple[Any, ...]:
    url = engine.url
    host = url.host or url.query.get("host") or ""
    return engine.dialect.name, host, url.port or 5432, url.database or url.username


def _file(url: URL) -> str | None:
    name = url.database or ""
    if not name or name == ":memory:" or "mode=memory" in name or url.query.get("mode") == "memory":
        return None
    return name.removeprefix("file:").partition("?")[0]


def engine_from(url: str) -> Engine:
    """An engine that blocks, for the URL of a database as programs give it: `postgresql://...` or `sqlite:///...`.

    Without a driver in the URL, the one that is installed is used.

    Raises:
        ConfigurationError: the URL is not valid, or its driver is not installed or does not block.

    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        msg = "the database must be a URL such as postgresql://user:password@host/name or sqlite:////path/to/file.db"
        raise ConfigurationError(msg) from error
    backend, _, driver = parsed.drivername.partition("+")
    if backend in ("postgres", "postgresql"):
        if driver in ("", "asyncpg"):
            driver = next((it for it in ("psycopg", "psycopg2") if find_spec(it) is not None), "psycopg")
        parsed = parsed.set(drivername=f"postgresql+{driver}")
    elif driver == "aiosqlite":
        parsed = parsed.set(drivername="sqlite")
    try:
        return sync_engine(create_engine(parsed, pool_pre_ping=True))
    except ModuleNotFoundError as error:
        raise ConfigurationError(missing_driver("the database", error.name or "psycopg")) from error
    except SQLAlchemyError as error:
        raise ConfigurationError(f"the database cannot be used: {error}") from error


class Run(Protocol):
    """Runs a function with the connection of a transaction, and waits for it."""

    async def __call__(self, function: Callable[..., T], /, *args: Any) -> T:
        """Run `function(connection, *args)`."""


class Database:
    """Transactions of one engine, for the event loop.

    Args:
        engine: an `Engine` or an `AsyncEngine`.

    """

    def __init__(self, engine: AnyEngine) -> None:
        self.engine = sync_engine(engine)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._engine = engine
        self._threads: ThreadPoolExecutor | None = None

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Run]:
        """A transaction: committed at the end of the block, and rolled back if that raises or is cancelled."""
        if isinstance(self._engine, AsyncEngine):
            connection = await _connect(self._engine)
            try:
                async with connection.begin():
                    yield connection.run_sync
            finally:
                await asyncio.shield(asyncio.get_running_loop().create_task(connection.close()))
            return
        in_thread = self._in_thread
        blocking: Connection = await in_thread(self.engine.connect)
        try:
            yield partial(_run, in_thread, blocking)
            await in_thread(blocking.commit)
        finally:
            with suppress(SQLAlchemyError):  # the error that ended the block is the one to be raised
                await in_thread(blocking.close)  # rolls back what was not committed

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, "rpcq-outbox")
        future = asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future], timeout=ABANDON_TIMEOUT)  # a thread cannot be interrupted
            raise

    def close(self) -> None:
        """End the thread, if there is one. The engine is its owner's."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None


async def _connect(engine: AsyncEngine) -> AsyncConnection:
    """A connection. If this is cancelled, it is opened all the same, and closed: aiosqlite would leave it open."""
    loop = asyncio.get_running_loop()
    opening = loop.create_task(engine.connect().start())
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        await asyncio.wait([loop.create_task(_close(opening))], timeout=ABANDON_TIMEOUT)
        raise


async def _close(opening: asyncio.Task[AsyncConnection]) -> None:
    with suppress(Exception):  # nobody waits any more for what fails here
        await (await opening).close()


async def _run(
    in_thread: Callable[..., Any], connection: Connection, function: Callable[..., Any], /, *args: Any
) -> Any:
    return await in_thread(function, connection, *args)
