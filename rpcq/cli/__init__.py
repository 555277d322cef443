"""The command line: `rpcq worker` and `rpcq call`. The only place that reads arguments and signals."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine
from enum import StrEnum
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from rpcq import logs, wire
from rpcq.cli.serving import load_services, serve
from rpcq.client import Client
from rpcq.errors import BrokerError, CallError, ConfigurationError, RpcqError
from rpcq.settings import ClientOptions, WorkerOptions

T = TypeVar("T")

CLIENT, WORKER = ClientOptions(), WorkerOptions()
"""The defaults."""

CALL_FAILED, USAGE, NO_BROKER = 1, 2, 3
"""Exit codes, besides 0: the call failed or a worker was cut off; a wrong argument; the broker cannot be used."""

app = typer.Typer(
    name="rpcq",
    help="Call remote functions as awaitables, over RabbitMQ.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True, highlight=False)


class Level(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


Url = Annotated[
    str | None,
    typer.Option(envvar="RPCQ_URL", help="The broker: amqp://user:password@host:port/vhost, or memory://."),
]
Namespace = Annotated[str, typer.Option(help="Prefix of all queues and exchanges.")]
LogLevel = Annotated[Level, typer.Option(help="How much is logged, on standard error.")]


@app.command()
def worker(
    services: Annotated[list[str], typer.Argument(help="What to serve: module:service, once or more.")],
    url: Url = None,
    prefetch: Annotated[int, typer.Option(help="Calls of each service that run at once.")] = WORKER.prefetch,
    grace: Annotated[float, typer.Option(help="Seconds that running calls have to end.")] = WORKER.grace,
    namespace: Namespace = WORKER.namespace,
    log_level: LogLevel = Level.INFO,
) -> None:
    """Serve services until SIGTERM or Ctrl-C, then let what runs end."""
    logs.configure(log_level.upper())
    found = load_services(services)
    run(serve(found, url, prefetch=prefetch, grace=grace, namespace=namespace))


@app.command()
def call(
    target: Annotated[str, typer.Argument(help="What to call: service.method.")],
    parameters: Annotated[
        list[str] | None,
        typer.Argument(help="key=value for each parameter by name, or values by position. Values are JSON, or text."),
    ] = None,
    url: Url = None,
    timeout: Annotated[float, typer.Option(help="Seconds until the call has ended.")] = CLIENT.timeout,
    queue: Annotated[str | None, typer.Option(help="Send to this queue, for servers that are not rpcq's.")] = None,
    namespace: Namespace = CLIENT.namespace,
    log_level: LogLevel = Level.WARNING,
) -> None:
    """Call a method and print its result as JSON."""
    logs.configure(log_level.upper())
    args, params = read_parameters(parameters or [])

    async def once() -> Any:
        async with Client(url, timeout=timeout, namespace=namespace, name="rpcq-call") as client:
            return await client.with_options(queue=queue).call(target, *args, **params)

    result = run(once())
    print(json.dumps(result, indent=2, ensure_ascii=False))


def read_parameters(given: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """Parameters as they stand on the command line: `key=value` by name, all others by position.

    Raises:
        ConfigurationError: a name is given twice.

    """
    args: list[Any] = []
    params: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            args.append(_value(text))
        elif name in params:
            msg = f"the parameter {name!r} is given twice"
            raise ConfigurationError(msg)
        else:
            params[name] = _value(value)
    return args, params


def _value(text: str) -> Any:
    try:
        return wire.loads(text.encode())  # as a worker reads it: integers of any size
    except ValueError:
        return text


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop where it is installed."""
    try:
        import uvloop  # noqa: PLC0415 - an extra
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def main(arguments: list[str] | None = None) -> None:
    """The `rpcq` command."""
    try:
        app(args=arguments, prog_name="rpcq")
    except CallError as error:
        errors.print(f"[red]{type(error).__name__}:[/]", error, soft_wrap=True)
        sys.exit(CALL_FAILED)
    except BrokerError as error:
        errors.print(f"[red]{type(error).__name__}:[/]", error, soft_wrap=True)
        sys.exit(NO_BROKER)
    except RpcqError as error:
        errors.print("[red]rpcq:[/]", error, soft_wrap=True)
        sys.exit(USAGE)
