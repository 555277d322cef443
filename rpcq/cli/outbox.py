"""`rpcq outbox`: the rows of an outbox, a relay for them, and those that cannot be published."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from rpcq import logs
from rpcq.cli.options import FAILED, Json, Level, LogLevel, Namespace, Url, errors, given
from rpcq.cli.text import plain, print_json
from rpcq.environment import broker_url, options_from
from rpcq.errors import ConfigurationError
from rpcq.options import ClientOptions
from rpcq.runtime.distribution import missing
from rpcq.runtime.process import run

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from rpcq.outbox.rows import DeadRow

T = TypeVar("T")

MOST_LISTED: Final = 1000
"""Rows that `dead` shows, and changes, if no other limit is given."""

DAY: Final = 24 * 3600

console = Console(highlight=False)

outbox = typer.Typer(
    name="outbox",
    no_args_is_help=True,
    help="Relay the jobs of an outbox, see what waits in it, and what cannot be published.",
)

Database = Annotated[
    str,
    typer.Option(
        envvar="RPCQ_DATABASE",
        metavar="URL",
        help="The database, such as postgresql://user:password@host/name or sqlite:////path/to/file.db.",
    ),
]


@outbox.command()
def setup(database: Database, log_level: LogLevel = Level.WARNING) -> None:
    """Create the tables of outbox and inbox, where they do not exist."""
    logs.configure(log_level.upper())

    def create(connection: Connection) -> None:
        from rpcq.outbox.tables import metadata  # noqa: PLC0415 - an extra

        metadata.create_all(connection)

    _do(database, create)


@outbox.command()
def status(database: Database, as_json: Json = False, log_level: LogLevel = Level.WARNING) -> None:
    """Print how many rows wait, are tried again, are due later or are dead, and the age of the oldest one."""
    logs.configure(log_level.upper())

    def look(connection: Connection) -> dict[str, Any]:
        from rpcq.outbox.rows import depth  # noqa: PLC0415 - an extra

        return asdict(depth(connection))

    found = _do(database, look)
    if as_json:
        print_json(found)
        return
    table = Table("waiting", "oldest", "retried", "later", "dead")
    oldest = "-" if found["oldest"] is None else f"{found['oldest']:.1f} s"
    table.add_row(str(found["waiting"]), oldest, *(str(found[name]) for name in ("retried", "later", "dead")))
    console.print(table)


@outbox.command()
def relay(
    database: Database,
    url: Url = None,
    namespace: Namespace = None,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve /metrics, /livez and /readyz there.")
    ] = None,
    log_level: LogLevel = Level.INFO,
) -> None:
    """Send the rows of an outbox until SIGTERM or Ctrl-C.

    Any number may run beside each other, and beside the programs that write the rows: one at a time sends.
    """
    logs.configure(log_level.upper())
    options = options_from(ClientOptions, given(namespace=namespace))
    run(_relay(database, broker_url(url), options, http))


async def _relay(database: str, url: str, options: ClientOptions, http: str | None) -> None:
    engine = _engine(database)
    from rpcq.outbox.outbox import Outbox  # noqa: PLC0415 - an extra

    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    given_options = {name: getattr(options, name) for name in ClientOptions.__dataclass_fields__}
    box = Outbox(engine, url, **given_options)
    try:
        await box.start(connect=True)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(box.stop)
            if http is not None:
                await stack.enter_async_context(_observed(box, http))
            await stopping.wait()
    finally:
        engine.dispose()


@asynccontextmanager
async def _observed(box: Any, http: str) -> AsyncIterator[None]:
    try:
        from rpcq.observability.health import HealthServer  # noqa: PLC0415 - an extra
        from rpcq.outbox.watching import OutboxMetrics  # noqa: PLC0415 - the same
    except ImportError as error:
        raise ConfigurationError(missing("--http", "prometheus-client", "metrics")) from error
    server = HealthServer(http, box.why_not_ready)
    server.start()
    try:
        async with OutboxMetrics(box):
            yield
    finally:
        server.close()


@outbox.command()
def dead(
    database: Database,
    ids: Annotated[
        list[int] | None, typer.Option("--id", help="Only the row with this number; may be repeated.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Put them back into the outbox, at its end.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete them: they are never sent.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most this many rows, the oldest first.")] = MOST_LISTED,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    as_json: Json = False,
    log_level: LogLevel = Level.WARNING,
) -> None:
    """List the rows that could not be published, and send or delete them."""
    logs.configure(log_level.upper())
    if retry and delete:
        raise ConfigurationError("--retry and --delete must not be given both")
    engine = _engine(database)
    from rpcq.outbox import rows  # noqa: PLC0415 - an extra

    found: list[DeadRow] = _do(engine, lambda connection: rows.dead_rows(connection, limit, ids))
    if not retry and not delete:
        _list(found, as_json=as_json)
        return
    what = "retry" if retry else "delete"
    if not yes:
        typer.confirm(f"{what} {len(found)} rows?", abort=True)
    change = rows.retry_dead if retry else rows.delete_dead
    count = _do(engine, lambda connection: change(connection, [row.id for row in found]))
    console.print(f"{count} rows {'go back into the outbox' if retry else 'are deleted'}")


@outbox.command()
def prune(
    database: Database,
    days: Annotated[float, typer.Option(help="The age, in days, of keys of the inbox that are deleted.")],
    log_level: LogLevel = Level.WARNING,
) -> None:
    """Delete old keys of the inbox: a job that comes again after that runs again."""
    logs.configure(log_level.upper())
    engine = _engine(database)
    from rpcq.outbox.inbox import Inbox  # noqa: PLC0415 - an extra

    count = _guarded(lambda: run(Inbox(engine).prune(days * DAY)))
    console.print(f"{count} keys are deleted")


def _list(found: list[DeadRow], *, as_json: bool) -> None:
    if as_json:
        for row in found:
            print_json(asdict(row) | {"body": row.body.decode("utf-8", "replace")})
        return
    if not found:
        console.print("no row is dead")
        return
    table = Table("id", "job", "message", "key", "written", "died", "reason", "error")
    for row in found:
        times = (datetime.fromtimestamp(ms / 1000, UTC).isoformat(" ", "seconds") for ms in (row.created, row.died))
        cells = (str(row.id), row.label, row.message_id, row.order_key or "-", *times, row.reason, row.error)
        table.add_row(*(plain(cell) for cell in cells))
    console.print(table)


def _engine(database: str) -> Engine:
    try:
        from rpcq.outbox.databases import engine_from  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigurationError(missing("rpcq outbox", "sqlalchemy", "outbox")) from error
    return engine_from(database)


def _do(database: str | Engine, work: Callable[[Connection], T]) -> T:
    """Do something in a transaction."""
    engine = _engine(database) if isinstance(database, str) else database

    def both() -> T:
        with engine.begin() as connection:
            return work(connection)

    return _guarded(both)


def _guarded(work: Callable[[], T]) -> T:
    """Say what is wrong with a database in one line, and what to do."""
    from sqlalchemy.exc import OperationalError, ProgrammingError, SQLAlchemyError  # noqa: PLC0415 - an extra

    try:
        return work()
    except SQLAlchemyError as error:
        text = str(getattr(error, "orig", None) or error)
        if isinstance(error, ProgrammingError | OperationalError) and "rpcq_" in text:
            text = f"{text.splitlines()[0]}; if the tables are missing, run `rpcq outbox setup`"
        errors.print(plain("database:", "red"), plain(text, lines=True), soft_wrap=True)
        raise typer.Exit(FAILED) from error
