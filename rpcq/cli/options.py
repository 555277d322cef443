"""What the commands share: options, exit codes, consoles.

An option that is not given is left to the library, which takes it from the environment or from its defaults: so the
same program finds the same settings however it is started.
"""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console

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
"""The defaults."""

FAILED, USAGE, NO_BROKER, REFUSED, NOT_TAKEN, TIMED_OUT, NO_RESULT = range(1, 8)
"""Exit codes, besides 0."""

EXIT_CODES = (
    "Exit codes: 1 the handler or authorize raised, 2 an argument or a setting cannot be used, 3 the broker cannot be "
    "used, 4 it did not run, and never will: its parameters or its method are wrong, or it is not allowed, 5 it did "
    "not run, and may be tried again: nobody serves it, or a queue is full, 6 the deadline passed, 7 it ran or may "
    "have run, and its result is lost."
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
"""For what goes wrong; in colour on a terminal alone."""


class Level(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


Url = Annotated[
    str | None,
    typer.Option(
        envvar="RPCQ_URL", show_envvar=True, help="The broker: amqp://user:password@host:port/vhost, or memory://."
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option(envvar="RPCQ_NAMESPACE", help="Prefix of all queues and exchanges.", show_default=CLIENT.namespace),
]
LogLevel = Annotated[Level, typer.Option(envvar="RPCQ_LOG_LEVEL", help="How much is logged, on standard error.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait for the answers of workers.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def given(**options: Any) -> Any:
    """The options that were given, as keyword arguments."""
    return {name: value for name, value in options.items() if value is not None}


def exit_code(error: RpcqError) -> int:
    """What the command ends with over an error."""
    return next((code for kinds, code in _BY_ERROR if isinstance(error, kinds)), USAGE)


def default_name(command: str) -> str | None:
    """What a command's client is called in the broker's list, unless the environment says it."""
    return None if os.environ.get("RPCQ_NAME") else f"rpcq-{command}"
