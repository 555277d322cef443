"""What the commands share: options, exit codes, and the console for errors.

An option that is not given is left to the library, which reads it from the environment or uses its default. So a
command and a program have the same settings.
"""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console

from rpcq.environment import URL, URL_FILE
from rpcq.errors import (
    BrokerError,
    CallError,
    CallTimeout,
    InvalidParams,
    InvalidReply,
    MethodNotFound,
    OutcomeUnknown,
    Overloaded,
    PermissionDenied,
    RpcqError,
    ServiceUnavailable,
)
from rpcq.options import ClientOptions, WorkerOptions

CLIENT, WORKER = ClientOptions(), WorkerOptions()
"""The defaults, for help texts."""

FAILED, USAGE, NO_BROKER, REFUSED, NOT_TAKEN, TIMED_OUT, NO_RESULT = range(1, 8)
"""Exit codes, besides 0."""

EXIT_CODES = (
    "Exit codes: 1: the handler or authorize raised an error. 2: an argument or a setting is not valid. 3: the broker "
    "cannot be used. 4: the call did not run, and another try will not help: its parameters or its method are wrong, "
    "or the caller has no permission. 5: the call did not run, and may be tried again: no worker serves it, or a queue "
    "is full. 6: the deadline passed. 7: the call ran or may have run, and its result is lost."
)

_BY_ERROR: tuple[tuple[type[RpcqError] | tuple[type[RpcqError], ...], int], ...] = (
    ((InvalidParams, MethodNotFound, PermissionDenied), REFUSED),
    ((ServiceUnavailable, Overloaded), NOT_TAKEN),
    (CallTimeout, TIMED_OUT),
    ((OutcomeUnknown, InvalidReply), NO_RESULT),
    (CallError, FAILED),
    (BrokerError, NO_BROKER),
)

errors = Console(stderr=True, highlight=False)
"""For errors; in colour only on a terminal."""


class Level(StrEnum):
    """The least severe level that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _unless_from_environment(context: typer.Context, parameter: typer.CallbackParam, value: str | None) -> str | None:
    """The value of the option; None if it is that of a variable, which the library reads itself."""
    source = context.get_parameter_source(parameter.name or "")
    return None if source is not None and source.name == "ENVIRONMENT" else value


Url = Annotated[
    str | None,
    typer.Option(
        envvar=[URL, URL_FILE],
        show_envvar=True,
        callback=_unless_from_environment,
        help="The broker: amqp://user:password@host:port/vhost, or memory://. RPCQ_URL_FILE names a file with it.",
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option(envvar="RPCQ_NAMESPACE", help="Prefix of all queues and exchanges.", show_default=CLIENT.namespace),
]
LogLevel = Annotated[
    Level, typer.Option(envvar="RPCQ_LOG_LEVEL", help="The least severe level to log, on standard error.")
]
Wait = Annotated[float, typer.Option(help="Seconds to wait for answers of workers.")]
ManagementUrl = Annotated[
    str | None,
    typer.Option(
        "--management",
        envvar="RPCQ_MANAGEMENT",
        metavar="URL",
        help="The management API, such as http://localhost:15672; by default, RabbitMQ's own port; '' for none.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def given(**options: Any) -> Any:
    """The options that are not None, as keyword arguments."""
    return {name: value for name, value in options.items() if value is not None}


def exit_code(error: RpcqError) -> int:
    """The exit code of a command that fails with this error."""
    return next((code for kinds, code in _BY_ERROR if isinstance(error, kinds)), USAGE)


def default_name(command: str) -> str | None:
    """The name of a command's client in the broker's list of connections; None if RPCQ_NAME is set."""
    return None if os.environ.get("RPCQ_NAME") else f"rpcq-{command}"
