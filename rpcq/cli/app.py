"""The `rpcq` command and its entry point."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rpcq.cli.bench import bench
from rpcq.cli.calling import call
from rpcq.cli.demo import demo
from rpcq.cli.dlq import dlq
from rpcq.cli.doctor import doctor, setup
from rpcq.cli.events import events
from rpcq.cli.looking import describe, list_services, ping
from rpcq.cli.options import EXIT_CODES, FAILED, USAGE, errors, exit_code
from rpcq.cli.outbox import outbox
from rpcq.cli.queues import queues
from rpcq.cli.schedules import schedules
from rpcq.cli.serving import worker
from rpcq.cli.text import plain
from rpcq.cli.topology import topology
from rpcq.cli.tracebacks import users_place, users_traceback
from rpcq.errors import CallError, RpcqError
from rpcq.runtime.process import own_version
from rpcq.url import mask_urls

app = typer.Typer(
    name="rpcq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rpcq {own_version()}")
        raise typer.Exit


@app.callback()
def _rpcq(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Call remote functions as awaitables, over RabbitMQ."""


app.command()(worker)
app.command(epilog=EXIT_CODES)(call)
app.command("list")(list_services)
app.command()(describe)
app.command()(ping)
app.command()(queues)
app.command()(doctor)
app.command()(setup)
app.add_typer(dlq)
app.add_typer(outbox)
app.command()(schedules)
app.add_typer(events)
app.add_typer(topology)
app.command()(bench)
app.command()(demo)


def main(arguments: list[str] | None = None) -> None:
    """The `rpcq` command."""
    try:
        app(args=arguments, prog_name="rpcq")
    except RpcqError as error:
        code = exit_code(error)
        who = type(error).__name__ if isinstance(error, CallError) or code != USAGE else "rpcq"
        place = users_place(error) if code == USAGE else ""
        text = f"{error} (at {place})" if place else error
        errors.print(plain(f"{who}:", "red"), plain(text, lines=True), soft_wrap=True)
        sys.exit(code)
    except Exception as error:  # noqa: BLE001 - the user's own code: a module that is imported, a lifespan
        errors.print(plain(mask_urls(users_traceback(error)), lines=True), end="", soft_wrap=True)
        sys.exit(FAILED)
