"""`rpcq worker`: find the services, serve them, stop on a signal."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn, Unpack

import typer

from rpcq import logs
from rpcq.cli.options import FAILED, WORKER, Level, LogLevel, Namespace, Url, given
from rpcq.cli.supervising import SUPERVISED, supervise
from rpcq.cli.watching import Watching
from rpcq.errors import ConfigurationError
from rpcq.options import WorkerKwargs
from rpcq.runtime.process import run
from rpcq.service import Service
from rpcq.worker import Worker


def worker(
    services: Annotated[list[str], typer.Argument(help="What to serve: module:service, once or more.")],
    url: Url = None,
    prefetch: Annotated[
        int | None,
        typer.Option(
            envvar="RPCQ_PREFETCH", help="Calls of each service that run at once.", show_default=str(WORKER.prefetch)
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            envvar="RPCQ_PROCESSES", min=1, max=1000, help="Worker processes. One that dies is started again."
        ),
    ] = 1,
    grace: Annotated[
        float | None,
        typer.Option(
            envvar="RPCQ_GRACE", help="Seconds that running calls have to end.", show_default=f"{WORKER.grace:g}"
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(envvar="RPCQ_NAME", help="What this worker is called.", show_default=WORKER.name),
    ] = None,
    namespace: Namespace = None,
    reload: Annotated[
        bool, typer.Option("--reload", help="Start again when a Python file here changes; for development.")
    ] = False,
    http: Annotated[
        str | None,
        typer.Option(
            envvar="RPCQ_HTTP",
            metavar="HOST:PORT",
            help="Serve /metrics, /livez and /readyz, as in ':9100' (all interfaces). Further processes take the ports "
            "after it. Needs the extra `metrics`.",
        ),
    ] = None,
    log_calls: Annotated[
        float,
        typer.Option(envvar="RPCQ_LOG_CALLS", min=0, max=1, help="The share of requests that is logged, from 0 to 1."),
    ] = 0.0,
    trace_calls: Annotated[
        float | None,
        typer.Option(
            envvar="RPCQ_TRACE_CALLS",
            min=0,
            max=1,
            help="Trace requests with OpenTelemetry: the share of those outside a trace that begins one. Needs the "
            "extra `tracing`, and an SDK, as `opentelemetry-instrument` sets it up.",
        ),
    ] = None,
    log_level: LogLevel = Level.INFO,
) -> None:
    """Serve services until SIGTERM or Ctrl-C, then let what runs end. A second signal ends it at once.

    The exit code is 0 if everything that ran could end, and 1 if something was cut off.
    """
    logs.configure(log_level.upper())
    if (processes > 1 or reload) and not os.environ.get(SUPERVISED):
        # The settings go to the processes by the environment: there, others cannot read the URL's password.
        settings = {
            "RPCQ_URL": url,
            "RPCQ_PREFETCH": prefetch,
            "RPCQ_GRACE": grace,
            "RPCQ_NAME": name,
            "RPCQ_NAMESPACE": namespace,
            "RPCQ_HTTP": http,
            "RPCQ_LOG_CALLS": log_calls,
            "RPCQ_TRACE_CALLS": trace_calls,
            "RPCQ_LOG_LEVEL": log_level.value,
        }
        environment = os.environ | {key: str(value) for key, value in given(**settings).items()}
        command = [sys.executable, "-m", "rpcq", "worker", *services, "--processes", "1"]
        sys.exit(
            0 if run(supervise(command, environment, processes, reload=Path.cwd() if reload else None)) else FAILED
        )
    watching = Watching(http, log_calls, trace_calls).nth(int(os.environ.get(SUPERVISED) or 1))
    found = load_services(services)
    run(serve(found, url, watching, **given(prefetch=prefetch, grace=grace, name=name, namespace=namespace)))


def load_services(paths: Sequence[str]) -> list[Service]:
    """The services that `module:service` paths name; modules are looked for in the working directory too.

    Raises:
        ConfigurationError: there is no such module or service; the message says which.

    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return [_load(path) for path in paths]


def _load(path: str) -> Service:
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute or module_name.startswith("."):
        msg = f"{path!r} is not of the form module:service, as in consumer_service.echo:echo"
        raise ConfigurationError(msg)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise  # the module is there, and misses another one: its own traceback says where
        msg = f"there is no module {error.name!r} (from {path!r}); looked in {Path.cwd()} and on the Python path"
        raise ConfigurationError(msg) from error
    service = getattr(module, attribute, None)
    if not isinstance(service, Service):
        offered = [name for name, value in vars(module).items() if isinstance(value, Service)]
        there = f"it has {', '.join(offered)}" if offered else "it has none"
        what = "no service" if service is None else "something that is no Service, called"
        msg = f"module {module_name!r} has {what} {attribute!r}; {there}"
        raise ConfigurationError(msg)
    return service


async def serve(
    services: Sequence[Service], url: str | None, watching: Watching, **options: Unpack[WorkerKwargs]
) -> None:
    """Serve until SIGTERM or Ctrl-C; a second one ends it at once.

    Returns only if everything that ran could end. Otherwise the process ends here, with exit code 1: a thread or a
    handler that does not let itself be stopped would hold it up for as long as it likes.
    """
    async with watching.worker(services, url, **options) as worker:
        clean = await _serve(worker)
    if not clean:
        _cut_off()


async def _serve(worker: Worker) -> bool:
    # A worker makes and drops thousands of small objects a second, few of which are cycles: by default the garbage
    # collector looks for them after each 700 more, and at all that was imported, which costs more than it finds.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    loop = asyncio.get_running_loop()
    stopping = False

    def on_signal() -> None:
        nonlocal stopping
        if stopping:
            _cut_off()  # not by cancelling: it may not have come to its stop yet, and would then take its time
        stopping = True
        worker.request_stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if os.environ.get(SUPERVISED):
        await loop.connect_read_pipe(lambda: _Pipe(on_signal), sys.stdin)
    return await worker.run()


def _cut_off() -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    os._exit(FAILED)


class _Pipe(asyncio.Protocol):
    """The pipe from a supervisor: it closes when that is gone, however it went."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end

    def connection_lost(self, exc: Exception | None) -> None:
        """The supervisor is gone."""
        del exc
        self._on_end()
