"""Many concurrent calls of `echo.process` whose answers are wanted one by one, as they come.

`producer_service.load` measures and keeps counts; this keeps each answer, and cancelling it cancels every call.
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
"""Calls of one run, and how many of them may be under way together."""

PERCENTILES: Final = (50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class Answer:
    """How one call ended.

    Attributes:
        number: which of the run, from 0.
        message: what was asked.
        answer: what came back, or None.
        error: why nothing did, or None.
        ended_ms: milliseconds from the start of the run until it ended.
        latency_ms: milliseconds that it took.

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

    def told(self) -> dict[str, Any]:
        """It as JSON. The error's own text may name hosts and queues, and is left out."""
        found: dict[str, Any] = {
            "message": self.message,
            "answer": self.answer,
            "latency_ms": round(self.latency_ms, 3),
            "error": None,
        }
        if self.error is not None:
            said = problem(self.error).document
            found["error"] = {"code": self.kind, "title": said["title"], "executed": said.get("executed", "maybe")}
        return found


@dataclass(slots=True)
class Run:
    """Calls with these messages, `concurrency` at once; used once.

    Attributes:
        echo: what is called; with the timeout that each call is to have.
        messages: one for each call.
        delay: seconds of simulated work in each.
        concurrency: calls under way at once.
        sent: calls made so far.
        fresh: answers that nobody has taken yet.
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
        """Make all calls; an error of one ends only that one. Cancelling this cancels those under way."""
        numbers = iter(range(len(self.messages)))

        async def caller() -> None:
            for number in numbers:  # shared: whoever is free takes the next
                answer = await self._ask(number)
                self.fresh.append(answer)  # to the list of now: the one of before the wait may have been taken

        async with asyncio.TaskGroup() as callers:
            for _ in range(min(self.concurrency, len(self.messages))):
                callers.create_task(caller())

    def take(self) -> list[Answer]:
        """The answers that came since the last time."""
        taken, self.fresh = self.fresh, []
        return taken

    @property
    def unserved(self) -> RpcqError | None:
        """Where no call at all could be served, why; the last one's error."""
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
    """The value that so many of these, in ascending order, are not above; 0 where there are none."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0.0
