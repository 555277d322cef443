"""Many concurrent calls of `echo.process`, each answer checked."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from consumer_service.contracts import EchoApi
from rpcq import CallError, Client


@dataclass
class Summary:
    """What became of the requests.

    Attributes:
        latencies: seconds from call to answer, of those that were answered.
        seconds: from the first call to the last answer.
    """

    sent: int = 0
    matched: int = 0
    mismatched: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def calls_per_second(self) -> float:
        """Answers over the whole time."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def percentile(self, percent: float) -> float:
        """Seconds within which this part of the answers came (nearest rank)."""
        ranked = sorted(self.latencies)
        return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))] if ranked else 0.0

    @property
    def ok(self) -> bool:
        """Every request got its own answer."""
        return self.sent > 0 and self.matched == self.sent


async def send(
    client: Client,
    *,
    requests: int,
    concurrency: int,
    delay: float = 0.0,
    timeout: float = 30.0,  # noqa: ASYNC109 - each call's, not this function's
    on_answer: Callable[[], None] = lambda: None,
) -> Summary:
    """Send `requests` calls, up to `concurrency` at once; `on_answer` is called after each."""
    echo = client.with_options(timeout=timeout).bind(EchoApi)
    summary = Summary()
    numbers = iter(range(requests))

    async def caller() -> None:
        for number in numbers:
            message = f"request {number}"
            summary.sent += 1
            began = time.perf_counter()
            try:
                answer = await echo.process(message=message, delay=delay)
            except CallError as error:
                summary.errors[type(error).__name__] += 1
            else:
                summary.latencies.append(time.perf_counter() - began)
                if answer == f"Consumer processed: {message}":
                    summary.matched += 1
                else:
                    summary.mismatched += 1
            on_answer()

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(min(requests, concurrency))))
    summary.seconds = time.perf_counter() - began
    return summary
