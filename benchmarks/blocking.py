"""What a call of `rpcq.sync.Client` costs, against the same call of `rpcq.Client`: one at a time, and from 8 threads.

    RPCQ_URL=amqp://guest:guest@localhost/ python -m benchmarks.blocking

The worker is a process of its own. The ways to call take turns in this process, on uvloop; the medians of the rounds
count, and above all the ratios, of which the least and the most of any round are printed too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import uvloop

from benchmarks.processes import CLOSE_WITHIN, READY_WITHIN, ROOT, BenchmarkError, broker_url, remove_leftovers
from rpcq import Client, sync

WARM_UP: Final = 0.3
THREADS: Final = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement.

    Attributes:
        rate: calls a second.
        p50: seconds.
        cpu: seconds of this process a call, the measuring included.

    """

    rate: float
    p50: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Times:
    """When to measure, on `time.perf_counter()`."""

    begin: float
    end: float

    @classmethod
    def after_warm_up(cls, seconds: float) -> Times:
        """From now on, after the warm-up."""
        begin = time.perf_counter() + WARM_UP
        return cls(begin, begin + seconds)


def blocking_caller(call: Callable[[int], int], times: Times) -> list[float]:
    """Call again and again; the seconds of each call that began in time."""
    clock, taken, began, number = time.perf_counter, [], 0.0, 0
    while (began := clock()) < times.end:
        assert call(number) == number + 1
        if began >= times.begin:
            taken.append(clock() - began)
        number += 1
    return taken


def measured(taken: list[list[float]], seconds: float, cpu: float) -> Measured:
    """What all callers together found."""
    each = [it for one in taken for it in one]
    return Measured(len(each) / seconds, statistics.median(each), cpu / len(each))


def by_sync(threads: int) -> Callable[[str, str, float], Measured]:
    """Measure `rpcq.sync.Client`, called by so many threads."""

    def measure(url: str, namespace: str, seconds: float) -> Measured:
        with sync.Client(url, namespace=namespace) as client:
            client.wait_for_service("calculator")
            add = client.service("calculator").add
            times = Times.after_warm_up(seconds)
            with ThreadPoolExecutor(threads) as pool:
                callers = [pool.submit(blocking_caller, lambda i: int(add(x=i, y=1)), times) for _ in range(threads)]
                cpu = cpu_between(times)
                return measured([caller.result() for caller in callers], seconds, cpu)

    return measure


def by_async(in_flight: int) -> Callable[[str, str, float], Measured]:
    """Measure `rpcq.Client`, called by so many tasks."""

    async def measure(url: str, namespace: str, seconds: float) -> Measured:
        async with Client(url, namespace=namespace) as client:
            await client.wait_for_service("calculator")
            add = client.service("calculator").add
            times = Times.after_warm_up(seconds)

            async def caller() -> list[float]:
                clock, taken, began, number = time.perf_counter, [], 0.0, 0
                while (began := clock()) < times.end:
                    assert await add(x=number, y=1) == number + 1
                    if began >= times.begin:
                        taken.append(clock() - began)
                    number += 1
                return taken

            looking = asyncio.get_running_loop().run_in_executor(None, cpu_between, times)
            taken = await asyncio.gather(*(caller() for _ in range(in_flight)))
            return measured(taken, seconds, await looking)

    return lambda *given: uvloop.run(measure(*given))


def cpu_between(times: Times) -> float:
    """The CPU seconds of this process in the measured time."""
    time.sleep(max(0.0, times.begin - time.perf_counter()))
    before = time.process_time()
    time.sleep(max(0.0, times.end - time.perf_counter()))
    return time.process_time() - before


WAYS: Final = {
    "async, 1 in flight": by_async(1),
    "sync, 1 thread": by_sync(1),
    f"async, {THREADS} in flight": by_async(THREADS),
    f"sync, {THREADS} threads": by_sync(THREADS),
}


@contextmanager
def worker(namespace: str) -> Iterator[None]:
    """A worker process, while inside."""
    command = [sys.executable, "-m", "benchmarks.participants", "rpcq", "worker"]
    with subprocess.Popen(
        [*command, "--namespace", namespace, "--prefetch", "1000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with ThreadPoolExecutor(1) as pool:
                line = pool.submit(process.stdout.readline).result(READY_WITHIN)
            if not line or json.loads(line)["event"] != "ready":
                raise BenchmarkError("the worker is not ready; see above")
            yield
        finally:
            process.stdin.close()
            try:
                process.wait(2 * CLOSE_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--seconds", type=float, default=1.5, help="measured time of each, default 1.5")
    given = parser.parse_args()
    try:
        url, namespace = broker_url(), f"rpcq-bench-{secrets.token_hex(4)}"
        found: dict[str, list[Measured]] = {name: [] for name in WAYS}
        with worker(namespace):
            for _ in range(given.rounds):
                for name, measure in WAYS.items():
                    found[name].append(measure(url, namespace, given.seconds))
        asyncio.run(remove_leftovers(url, namespace, ["calculator"]))
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    print(f"{'':22} {'calls/s':>9} {'p50 ms':>7} {'CPU us/call':>12}")
    for name, rounds in found.items():
        rate, p50, cpu = (statistics.median(getattr(it, of) for it in rounds) for of in ("rate", "p50", "cpu"))
        print(f"{name:22} {rate:9,.0f} {p50 * 1e3:7.2f} {cpu * 1e6:12.0f}")
    names = list(WAYS)
    for one, other in ((names[1], names[0]), (names[3], names[0]), (names[3], names[2])):
        each = [ours.rate / theirs.rate for ours, theirs in zip(found[one], found[other], strict=True)]
        print(f"{one} / {other}: {statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f}) of its calls/s")
    print(
        f"{platform.python_implementation()} {platform.python_version()}, {given.rounds} rounds of {given.seconds:g} s"
    )


if __name__ == "__main__":
    main()
