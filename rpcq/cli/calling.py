"""`rpcq call`."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from rpcq import logs
from rpcq.cli.options import (
    CLIENT,
    Json,
    Level,
    LogLevel,
    Namespace,
    Url,
    default_name,
    exit_code,
    given,
)
from rpcq.cli.text import print_json
from rpcq.client import Client
from rpcq.errors import CallError, ConfigurationError, to_wire
from rpcq.options import check_seconds
from rpcq.runtime.process import run
from rpcq.terminal import printable_json
from rpcq.wire import bodies


def call(
    target: Annotated[str, typer.Argument(help="What to call: service.method.")],
    parameters: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=value for each parameter by name, or values by position. A value that is not valid JSON is "
            "text. A single - reads the parameters from standard input: a JSON object by name, or an array by position."
        ),
    ] = None,
    url: Url = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            envvar="RPCQ_TIMEOUT", help="Seconds until the call has ended.", show_default=f"{CLIENT.timeout:g}"
        ),
    ] = None,
    idempotent: Annotated[
        bool, typer.Option("--idempotent", help="Send the call again if an attempt may have been lost.")
    ] = False,
    wait: Annotated[
        float | None,
        typer.Option(
            help="Seconds to wait for a worker of the service to appear before the call is made, for one that was just "
            "started. They do not count towards the timeout. If no worker answers, the call is not made, and the exit "
            "code is 5. The broker has to be there already.",
            show_default="no wait",
        ),
    ] = None,
    queue: Annotated[str | None, typer.Option(help="Send to this queue; for servers other than rpcq.")] = None,
    namespace: Namespace = None,
    as_json: Json = False,
    log_level: LogLevel = Level.WARNING,
) -> None:
    """Call a method and print its result as JSON. With --json, an error is printed as JSON too."""
    logs.configure(log_level.upper())
    service = _service_of(target, queue, wait)
    args, params = read_parameters(parameters or [])

    async def once() -> Any:
        options = given(timeout=timeout, namespace=namespace, name=default_name("call"))
        async with Client(url, **options) as client:
            if wait is not None:
                await client.wait_for_service(service, timeout=wait)
            return await client.with_options(queue=queue, idempotent=idempotent).call(target, *args, **params)

    try:
        result = run(once())
    except CallError as error:
        if not as_json:
            raise
        fields = {"type": type(error).__name__, **to_wire(error), "correlation_id": error.correlation_id}
        print_json({"error": fields})
        raise typer.Exit(exit_code(error)) from error
    if as_json:
        print_json({"result": result})
    else:
        print(printable_json(json.dumps(result, indent=2, ensure_ascii=False)))


def _service_of(target: str, queue: str | None, wait: float | None) -> str:
    """The service that the target names; empty with `--queue`.

    Raises:
        ConfigurationError: the target is not `service.method`, or `--wait` cannot be used.

    """
    if wait is not None:
        check_seconds("--wait", wait)
    if queue is not None:
        if wait is not None:
            msg = "--wait must be without --queue: it asks rpcq's workers, and another server does not answer that"
            raise ConfigurationError(msg)
        return ""
    service, dot, _ = target.rpartition(".")
    if not dot:
        msg = (
            f"the target must be service.method; got {target!r}. 'rpcq list' shows services and their methods. For a "
            f"server other than rpcq, name its queue: rpcq call {target} --queue QUEUE"
        )
        raise ConfigurationError(msg)
    return service


def read_parameters(words: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """Read the parameters on the command line: `key=value` by name, all others by position.

    Raises:
        ConfigurationError: a name is given twice, or standard input is not valid JSON.

    """
    if words == ["-"]:
        return _from_input(sys.stdin.buffer.read())
    args: list[Any] = []
    params: dict[str, Any] = {}
    for text in words:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            args.append(_value(text))
        elif name in params:
            msg = f"a parameter must be given only once; got {name!r} twice"
            raise ConfigurationError(msg)
        else:
            params[name] = _value(value)
    return args, params


def _from_input(text: bytes) -> tuple[list[Any], dict[str, Any]]:
    try:
        value = bodies.loads(text)
    except ValueError as error:
        msg = f"standard input must be JSON: {error}"
        raise ConfigurationError(msg) from error
    if isinstance(value, dict):
        return [], value
    return (value if isinstance(value, list) else [value]), {}


def _value(text: str) -> Any:
    try:
        return bodies.loads(text.encode())  # the same parser as in a worker, with integers of any size
    except ValueError:
        return text
