"""A closed loop of callers, measured between two moments while it runs."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypedDict

from benchmarks.participants import Call


class WrongAnswerError(Exception):
    """A contender that answers wrongly need not be measured."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure; times in seconds."""

    in_flight: int
    warm_up: float
    seconds: float


class Result(TypedDict):
    """One measurement; all times in seconds."""

    calls: int
    seconds: float
    p50: float
    p99: float
    cpu: float
    """CPU time of this process, callers and bookkeeping of the measurement included."""


async def measure(call: Call, numbers: Iterator[int], plan: Plan, mark: Callable[[str], None]) -> Result:
    """Keep `plan.in_flight` calls going, and measure those that end within `plan.seconds` after the warm-up.

    The warm-up lasts until every caller has had an answer, and at least `plan.warm_up` seconds: a contender that serves
    one call after the other would otherwise look quick while its first callers are answered.

    `mark` is called with "start" and "stop" at the two ends of the measured time. After it, calls on their way are
    waited for, so that the next measurement starts from rest.

    Raises:
        ExceptionGroup: a call failed, or its answer was wrong (`WrongAnswerError`).
    """
    clock = time.perf_counter
    latencies: list[float] = []
    measuring = stopping = False
    cold = plan.in_flight
    all_warm = asyncio.Event()

    async def caller() -> None:
        nonlocal cold
        first = True
        while not stopping:
            number = next(numbers)
            called = clock()
            answer = await call(number)
            ended = clock()
            if answer != number + 1:
                raise WrongAnswerError(f"{number} + 1 is not {answer!r}")
            if measuring:
                latencies.append(ended - called)
            elif first:
                first = False
                cold -= 1
                if not cold:
                    all_warm.set()

    async with asyncio.TaskGroup() as group:
        for _ in range(plan.in_flight):
            group.create_task(caller())
        await asyncio.sleep(plan.warm_up)
        await all_warm.wait()
        mark("start")
        cpu, began = time.process_time(), clock()
        measuring = True
        await asyncio.sleep(plan.seconds)
        measuring, stopping = False, True
        took, cpu = clock() - began, time.process_time() - cpu
        mark("stop")
    latencies.sort()
    return Result(
        calls=len(latencies),
        seconds=took,
        p50=percentile(latencies, 0.50),
        p99=percentile(latencies, 0.99),
        cpu=cpu,
    )


def percentile(ordered: list[float], share: float) -> float:
    """The nearest rank, which is a latency that a call really had; not a number if there was no call."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else math.nan
