"""The observers of `rpcq worker`: metrics and health over HTTP, logs and traces of calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rpcq import logs
from rpcq.environment import broker_url
from rpcq.errors import ConfigurationError
from rpcq.observability.calls import CallLogs
from rpcq.observer import Observer
from rpcq.runtime.distribution import missing
from rpcq.service import Service
from rpcq.worker import Worker

if TYPE_CHECKING:
    from rpcq.observability.metrics import Metrics

log = logs.get_logger("rpcq.worker")


@dataclass(frozen=True)
class Observing:
    """The options `--http`, `--log-calls` and `--trace-calls`.

    Attributes:
        http: the address of `/metrics`, `/livez` and `/readyz`; None for no server.
        log_calls: the share of requests to log.
        trace_calls: the share of the requests outside a trace that begin one; None for no traces at all.

    """

    http: str | None = None
    log_calls: float = 0.0
    trace_calls: float | None = None

    def nth(self, number: int) -> Observing:
        """The options of one of several processes, counted from 1: each process has a port of its own."""
        host, _, port = (self.http or "").rpartition(":")
        if number == 1 or not port.isdecimal():  # the server reports an invalid port
            return self
        return replace(self, http=f"{host}:{int(port) + number - 1}")

    @asynccontextmanager
    async def worker(self, services: Sequence[Service], url: str | None, **options: object) -> AsyncIterator[Worker]:
        """A worker that is not started yet, with its observers, and with the HTTP server running.

        Raises:
            ConfigurationError: the address is not valid or in use, or a package is missing; the message names it.

        """
        metrics = None if self.http is None else _metrics()
        observers: list[Observer] = [] if metrics is None else [metrics]
        if self.log_calls:
            observers.append(CallLogs(self.log_calls))
        if self.trace_calls is not None:
            observers.append(_tracing(self.trace_calls))
        worker = Worker(*services, url=url, observers=observers, **options)  # type: ignore[arg-type]  # the options of a worker
        if metrics is None or self.http is None:
            yield worker
            return
        async with _serving_http(self.http, worker), _measuring_queues(metrics, worker, url):
            yield worker


def _metrics() -> Metrics:
    try:
        from rpcq.observability.metrics import Metrics  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigurationError(missing("--http", "prometheus-client", "metrics")) from error
    return Metrics()


def _tracing(ratio: float) -> Observer:
    try:
        from rpcq.observability.tracing import Tracing  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigurationError(missing("--trace-calls", "opentelemetry-api", "tracing")) from error
    return Tracing(ratio)


@asynccontextmanager
async def _serving_http(address: str, worker: Worker) -> AsyncIterator[None]:
    from rpcq.observability.health import HealthServer  # noqa: PLC0415 - an extra, which is installed here

    # The broker closes the connection of a worker that is silent for two heartbeats.
    server = HealthServer(address, worker.why_not_ready, patience=2 * worker.options.heartbeat)
    server.start()
    try:
        yield
    finally:
        server.close()


@asynccontextmanager
async def _measuring_queues(metrics: Metrics, worker: Worker, url: str | None) -> AsyncIterator[None]:
    if broker_url(url).startswith("memory:"):
        yield
        return
    from rpcq.observability.queues import QueueWatch  # noqa: PLC0415 - only for RabbitMQ

    options = worker.options
    watch = QueueWatch(
        worker.services,
        url,
        on_depth=metrics.on_depth,
        name=options.name,
        namespace=options.namespace,
        heartbeat=options.heartbeat,
        connect_timeout=options.connect_timeout,
    )
    task = asyncio.get_running_loop().create_task(watch.run())
    task.add_done_callback(_log_failure)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("depth of queues is no longer measured", exc_info=error)
