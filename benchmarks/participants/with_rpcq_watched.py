"""rpcq with metrics, traces and logs of calls, at both ends: what they cost."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.participants import Call, Options, with_rpcq

if TYPE_CHECKING:
    from rpcq.observer import Observer


@dataclass(frozen=True)
class Watched:
    """A contender of which metrics are taken, and a share of its calls traced and logged.

    Spans go through the SDK's batch processor, and are written as JSON; so are logs; both to nowhere.
    """

    traced: float = 0.0
    logged: float = 0.0
    PACKAGES = (*with_rpcq.PACKAGES, "prometheus-client", "opentelemetry-sdk")

    @asynccontextmanager
    async def worker(self, options: Options) -> AsyncIterator[None]:
        """Serve while inside."""
        async with with_rpcq.worker(options, self._observers()):
            yield

    @asynccontextmanager
    async def client(self, options: Options) -> AsyncIterator[Call]:
        """Be connected while inside."""
        async with with_rpcq.client(options, self._observers()) as call:
            yield call

    def _observers(self) -> list[Observer]:
        from rpcq.observability.metrics import Metrics

        observers: list[Observer] = [Metrics()]
        nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
        if self.logged:
            from rpcq import logs
            from rpcq.observability.calls import CallLogs

            sys.stderr = nowhere
            logs.configure()
            observers.append(CallLogs(self.logged))
        if self.traced:
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

            from rpcq.observability.tracing import Tracing

            provider = TracerProvider()
            provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter(out=nowhere)))
            observers.append(Tracing(self.traced, provider))
        return observers


metrics = Watched()
sampled = Watched(traced=0.01, logged=0.01)
everything = Watched(traced=1.0, logged=1.0)
