"""`rpcq worker`: load the services, serve them, stop on a signal."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, Unpack

import typer

from rpcq import logs
from rpcq.cli.depth import job_queues, watch_depth
from rpcq.cli.observing import Observing
from rpcq.cli.options import FAILED, WORKER, Level, LogLevel, Namespace, Url, given
from rpcq.cli.scaling import Scaling, check_scaling, read_processes
from rpcq.cli.supervising import SUPERVISED, Watch, supervise
from rpcq.environment import URL_FILE, broker_url, options_from, variable
from rpcq.errors import ConfigurationError
from rpcq.options import WorkerKwargs, WorkerOptions
from rpcq.runtime.process import run
from rpcq.service import Service
from rpcq.url import parse
from rpcq.worker import Worker

SETTLING: Final = 10.0
"""Seconds for what becomes of a job after its timeout: the broker has to confirm its retry or its dead letter."""

log = logs.get_logger("rpcq.worker")


def worker(  # over 50 lines, because typer reads the options from the parameters
    services: Annotated[list[str], typer.Argument(help="One or more services to serve: module:service.")],
    url: Url = None,
    prefetch: Annotated[
        int | None,
        typer.Option(
            envvar="RPCQ_PREFETCH", help="Calls of each service that run at once.", show_default=str(WORKER.prefetch)
        ),
    ] = None,
    job_prefetch: Annotated[
        int | None,
        typer.Option(
            envvar="RPCQ_JOB_PREFETCH",
            help="Jobs of each service that run at once.",
            show_default=str(WORKER.job_prefetch),
        ),
    ] = None,
    processes: Annotated[
        str,
        typer.Option(
            envvar="RPCQ_PROCESSES",
            metavar="NUMBER|MIN:MAX",
            help="Number of worker processes. A process that dies is started again. With MIN:MAX, as many as "
            "--scale-on-depth says.",
        ),
    ] = "1",
    scale_on_depth: Annotated[
        int | None,
        typer.Option(
            envvar="RPCQ_SCALE_ON_DEPTH",
            help="Jobs that may wait for each process: when there are more, processes are started; when there are "
            "fewer for a while, one is stopped. Needs --processes MIN:MAX.",
        ),
    ] = None,
    scale_every: Annotated[
        float,
        typer.Option(envvar="RPCQ_SCALE_EVERY", help="Seconds between two looks at the number of jobs that wait."),
    ] = 5.0,
    grace: Annotated[
        float | None,
        typer.Option(
            envvar="RPCQ_GRACE", help="Seconds that running handlers have to end.", show_default=f"{WORKER.grace:g}"
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(envvar="RPCQ_NAME", help="The name of this worker.", show_default=WORKER.name),
    ] = None,
    namespace: Namespace = None,
    reload: Annotated[
        bool,
        typer.Option(
            "--reload",
            help="Start again when a Python file in this folder changes; for development. After an error in the user's "
            "own code, such as a syntax error or a lifespan that fails, wait until a Python file changes.",
        ),
    ] = False,
    http: Annotated[
        str | None,
        typer.Option(
            envvar="RPCQ_HTTP",
            metavar="HOST:PORT",
            help="Serve /metrics, /livez and /readyz at this address; ':9100' is on all interfaces. Further processes "
            "use the next ports. Needs the extra `metrics`.",
        ),
    ] = None,
    log_calls: Annotated[
        float,
        typer.Option(envvar="RPCQ_LOG_CALLS", min=0, max=1, help="The share of requests to log, from 0 to 1."),
    ] = 0.0,
    trace_calls: Annotated[
        float | None,
        typer.Option(
            envvar="RPCQ_TRACE_CALLS",
            min=0,
            max=1,
            help="Trace requests with OpenTelemetry: the share, from 0 to 1, of the requests outside a trace that "
            "begin one. Needs the extra `tracing`, and an SDK, for example from `opentelemetry-instrument`.",
        ),
    ] = None,
    log_level: LogLevel = Level.INFO,
) -> None:
    """Serve services until SIGTERM or Ctrl-C, then let running handlers end. A second signal stops at once.

    The exit code is 0 if all handlers ended, and 1 if a handler was cut off.
    """
    logs.configure(log_level.upper())
    options = given(prefetch=prefetch, job_prefetch=job_prefetch, grace=grace, name=name, namespace=namespace)
    if not os.environ.get(SUPERVISED):
        numbers = read_processes(processes)
        check_scaling(numbers, scale_on_depth, scale_every, reload=reload)
        observing = given(http=http, log_calls=log_calls, trace_calls=trace_calls, log_level=log_level.value)
        if scale_on_depth is not None:
            scaled = Scaling(numbers, scale_on_depth)
            _supervise_scaled(services, url, options, observing, scaled, scale_every)
        if numbers.most > 1 or reload:
            _supervise(services, given(url=url) | options | observing, numbers.most, reload=reload)
    observers = Observing(http, log_calls, trace_calls).nth(int(os.environ.get(SUPERVISED) or 1))
    run(serve(load_services(services), url, observers, **options))


def _supervise_scaled(
    paths: list[str],
    url: str | None,
    options: dict[str, Any],
    observing: Mapping[str, object],
    scaling: Scaling,
    every: float,
) -> NoReturn:
    services = load_services(paths)  # its own: for the names of their queues
    broker, found = parse(broker_url(url)), options_from(WorkerOptions, options)
    if broker.scheme == "memory":
        raise ConfigurationError("--scale-on-depth needs RabbitMQ; got memory://, which is inside each process")
    watch = partial(watch_depth, broker, found, job_queues(services, found.namespace), every)
    if "grace" not in options:  # so that a process that is stopped cuts off no job
        options["grace"] = grace_of(services)
    _supervise(paths, given(url=url) | options | observing, scaling.bounds.most, scaling=scaling, watch=watch)


def grace_of(services: Iterable[Service]) -> float:
    """Seconds in which each job and each event that runs has ended, by its timeout; at least those of a worker."""
    timeouts = [each.timeout or 0 for it in services for each in (*it.jobs.values(), *it.subscriptions.values())]
    return max(WORKER.grace, max(timeouts, default=0) + SETTLING)


def _supervise(
    services: list[str],
    options: Mapping[str, object],
    processes: int,
    *,
    reload: bool = False,
    scaling: Scaling | None = None,
    watch: Watch | None = None,
) -> NoReturn:
    # The processes get the options in their environment, where other users cannot read the URL's password.
    environment = os.environ | {variable(name): str(value) for name, value in options.items()}
    if "url" in options:
        environment.pop(URL_FILE, None)  # the option beats both variables, of which only one may be set
    command = [sys.executable, "-m", "rpcq", "worker", *services, "--processes", "1"]
    folder = Path.cwd() if reload else None
    clean = run(supervise(command, environment, processes, reload=folder, scaling=scaling, watch=watch))
    sys.exit(0 if clean else FAILED)


def load_services(paths: Sequence[str]) -> list[Service]:
    """Load services by their paths, `module:service`; modules may also be in the working directory.

    Raises:
        ConfigurationError: a module or a service does not exist; the message names it.

    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return [_load(path) for path in paths]


def _load(path: str) -> Service:
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute or module_name.startswith("."):
        msg = f"a service must be given as module:service, such as consumer_service.echo:echo; got {path!r}"
        raise ConfigurationError(msg)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise  # the module exists, and imports one that does not: the traceback shows where
        msg = f"there is no module {error.name!r} (from {path!r}); looked in {Path.cwd()} and on the Python path"
        raise ConfigurationError(msg) from error
    service = getattr(module, attribute, None)
    if not isinstance(service, Service):
        offered = [name for name, value in vars(module).items() if isinstance(value, Service)]
        what = f"no service {attribute!r}" if service is None else f"{attribute!r}, which is not a Service"
        msg = f"module {module_name!r} has {what}; its services: {', '.join(offered) or 'none'}"
        raise ConfigurationError(msg)
    return service


async def serve(
    services: Sequence[Service], url: str | None, observing: Observing, **options: Unpack[WorkerKwargs]
) -> None:
    """Serve until SIGTERM or Ctrl-C; a second signal stops at once.

    Returns only if all handlers ended. Otherwise the process exits here, with exit code 1: a thread or a handler that
    cannot be stopped would delay the exit without limit.
    """
    if broker_url(url).startswith("memory:"):
        log.warning("memory:// is inside this process: no other process can reach these services")
    async with observing.worker(services, url, **options) as worker:
        clean = await _serve(worker)
    if not clean:
        _cut_off()


async def _serve(worker: Worker) -> bool:
    # A worker makes and drops thousands of small objects a second, and few of them are in cycles. By default the
    # garbage collector runs after every 700 new objects, and visits all imported modules too: more cost than gain.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    loop = asyncio.get_running_loop()
    stopping = False

    def on_signal() -> None:
        nonlocal stopping
        if stopping:
            _cut_off()  # cancelling is not enough: the worker may not have begun to stop, and would wait for handlers
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
    """The pipe from the supervisor; it closes when the supervisor ends, even if that was killed."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end

    def connection_lost(self, exc: Exception | None) -> None:
        """The supervisor has ended."""
        del exc
        self._on_end()
