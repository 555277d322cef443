"""Metrics of an outbox for Prometheus. Needs prometheus-client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from rpcq import logs
from rpcq.errors import ConfigurationError
from rpcq.options import check_seconds
from rpcq.outbox.outbox import Outbox
from rpcq.outbox.rows import OutboxDepth
from rpcq.runtime.distribution import missing

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
except ImportError as error:
    raise ImportError(missing("OutboxMetrics", "prometheus-client", "metrics"), name=error.name) from error

log = logs.get_logger("rpcq.outbox")


class OutboxMetrics:
    """Counts the rows of an outbox for Prometheus, every few seconds while its block runs.

        async with outbox, OutboxMetrics(outbox):
            ...

    While the database cannot be used, it has no rows to show, and a warning is logged.

    Args:
        outbox: the outbox. What its relay in this process did is counted, too.
        registry: the registry that it adds itself to; None for prometheus-client's own.
        every: seconds between two looks; each counts all rows.

    Raises:
        ConfigurationError: `every` is not valid.

    """

    def __init__(self, outbox: Outbox, registry: CollectorRegistry | None = None, *, every: float = 15.0) -> None:
        check_seconds("every", every)
        if not isinstance(outbox, Outbox):
            raise ConfigurationError(f"outbox must be an Outbox; got {outbox!r:.100}")
        self._outbox = outbox
        self._registry = REGISTRY if registry is None else registry
        self._every = every
        self._depth: OutboxDepth | None = None
        self._task: asyncio.Task[None] | None = None
        self._seldom = logs.Seldom(log)

    async def __aenter__(self) -> Self:
        self._registry.register(self)
        self._task = asyncio.get_running_loop().create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._registry.unregister(self)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._every):
                    self._depth = await self._outbox.depth()
            except Exception as error:  # noqa: BLE001 - the driver's own; logged, and tried again
                self._depth = None
                self._seldom.warning("the outbox cannot be looked at", cause=f"{type(error).__name__}: {error}")
            await asyncio.sleep(self._every)

    def describe(self) -> list[Any]:
        """No families while it is registered: nothing was looked at yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families with their samples. May be called from another thread."""
        depth, counts = self._depth, self._outbox.counts()
        rows = GaugeMetricFamily("rpcq_outbox_rows", "Rows of the outbox.", labels=["state"])
        oldest = GaugeMetricFamily("rpcq_outbox_oldest_seconds", "Age of the oldest row that is to be sent now.")
        if depth is not None:
            for state in ("waiting", "retried", "later", "dead"):
                rows.add_metric([state], getattr(depth, state))
            oldest.add_metric([], depth.oldest or 0.0)
        yield rows
        yield oldest
        sent = CounterMetricFamily("rpcq_outbox_sent", "Rows that the relay of this process sent.")
        sent.add_metric([], counts.sent)
        yield sent
        retried = CounterMetricFamily("rpcq_outbox_retried", "Times that a row was not taken, and is tried again.")
        retried.add_metric([], counts.retried)
        yield retried
