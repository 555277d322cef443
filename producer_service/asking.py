"""Many concurrent calls of `echo.process`, with each answer as it comes.

`producer_service.load` measures and keeps only counts. This module keeps each answer; cancelling it cancels all calls.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from consumer_service.contracts import EchoApi
from rpcq import Overloaded, RpcqError, ServiceUnavailable
from rpcq.web import problem

MOST_REQUESTS: Final = 10_000
MOST_AT_ONCE: Final = 1_000
"""The most calls of one run, and the most of them under way at once."""

PERCENTILES: Final = (50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class Answer:
    """How one call ended.

    Attributes:
        number: the number of the call in its run, from 0.
        message: the message that was sent.
        answer: the result, or None.
        error: the error, or None.
        ended_ms: milliseconds from the start of the run to the end of the call.
        latency_ms: milliseconds from the start of the call to its end.

    """

    number: int
    message: str
    answer: str | None
    error: RpcqError | None
    ended_ms: float
    latency_ms: float

    @property
    def kind(self) -> str:
        """`matched`, `mismatched`, or the code of the error."""
        if self.error is not None:
            return str(problem(self.error).document.get("code", "INTERNAL"))
        return "matched" if self.answer == f"Consumer processed: {self.message}" else "mismatched"

    def as_json(self) -> dict[str, Any]:
        """The values for JSON, without the error's own text, which may name hosts and queues."""
        found: dict[str, Any] = {
            "message": self.message,
            "answer": self.answer,
            "latency_ms": round(self.latency_ms, 3),
            "error": None,
        }
        if self.error is not None:
            document = problem(self.error).document
            executed = document.get("executed", "maybe")
            found["error"] = {"code": self.kind, "title": document["title"], "executed": executed}
        return found


@dataclass(slots=True)
class Run:
    """Calls with these messages, `concurrency` at once. An object is used only once.

    Attributes:
        echo: the service; its options contain the timeout of each call.
        messages: one for each call.
        delay: seconds of simulated work in each call.
        concurrency: calls under way at once.
        sent: calls made so far.
        fresh: answers since the last `take`.
        counts: answers so far by `Answer.kind`.

    """

    echo: EchoApi
    messages: Sequence[str]
    delay: float
    concurrency: int
    sent: int = 0
    fresh: list[Answer] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    _latencies: list[float] = field(default_factory=list)
    _unserved: RpcqError | None = None
    _served: bool = False
    _began: float = field(default_factory=time.perf_counter)

    async def all(self) -> None:
        """Make all calls; an error ends only its own call. Cancelling this cancels the calls under way."""
        numbers = iter(range(len(self.messages)))

        async def caller() -> None:
            for number in numbers:  # shared: each caller that is free takes the next one
                answer = await self._ask(number)
                self.fresh.append(answer)  # read again after the wait: `take` replaces the list

        async with asyncio.TaskGroup() as callers:
            for _ in range(min(self.concurrency, len(self.messages))):
                callers.create_task(caller())

    def take(self) -> list[Answer]:
        """The answers since the last `take`."""
        taken, self.fresh = self.fresh, []
        return taken

    @property
    def unserved(self) -> RpcqError | None:
        """The error of the last call, if no call at all could be served; otherwise None."""
        return None if self._served else self._unserved

    def summary(self) -> dict[str, Any]:
        """Counts, seconds, calls a second and percentiles of latency in milliseconds, as JSON."""
        seconds = time.perf_counter() - self._began
        ended = self.counts.total()
        ordered = sorted(self._latencies)
        return {
            "requests": len(self.messages),
            "sent": self.sent,
            "ended": ended,
            "matched": self.counts["matched"],
            "mismatched": self.counts["mismatched"],
            "errors": {kind: count for kind, count in self.counts.items() if kind not in ("matched", "mismatched")},
            "seconds": round(seconds, 3),
            "per_second": round(ended / seconds, 1) if seconds > 0 else 0.0,
            "latency_ms": {f"p{it}" if it < 100 else "max": round(percentile(ordered, it), 3) for it in PERCENTILES},
        }

    async def _ask(self, number: int) -> Answer:
        message, answer, failed = self.messages[number], None, None
        self.sent += 1
        began = time.perf_counter()
        try:
            answer = await self.echo.process(message=message, delay=self.delay)
        except RpcqError as error:
            failed = error
        now = time.perf_counter()
        if isinstance(failed, ServiceUnavailable | Overloaded):
            self._unserved = failed
        else:
            self._served = True
        made = Answer(number, message, answer, failed, (now - self._began) * 1000, (now - began) * 1000)
        self.counts[made.kind] += 1
        self._latencies.append(made.latency_ms)
        return made


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of values in ascending order; 0 if there are no values."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0.0
