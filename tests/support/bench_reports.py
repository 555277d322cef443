"""Reports of load tests, with real histograms, for tests."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache
from typing import Any

from hdrh.histogram import HdrHistogram

from rpcq.bench.result import Distribution, Report, Run, Second, Step, new_histogram

SETTINGS: dict[str, Any] = {
    "target": "bench.echo",
    "url": "amqp://guest:***@localhost:5672/",
    "namespace": "rpcq",
    "rate": 2000.0,
    "duration": 60.0,
    "warm_up": 2.0,
    "concurrency": None,
    "arrivals": "poisson",
    "payload": 256,
    "processes": 2,
    "workers": ["1 process", "prefetch 100"],
    "idempotent": False,
}

HOST: dict[str, Any] = {
    "platform": "Linux 6.1 x86_64",
    "cpus": 8,
    "python": "3.12.4",
    "rpcq": "0.1.0",
    "broker": "RabbitMQ 4.0.5",
}


def histogram(milliseconds: list[float]) -> HdrHistogram:
    found = new_histogram()
    for value in milliseconds:
        found.record_value(max(1, round(value * 1000)))
    return found


def spread(milliseconds: list[float]) -> Distribution:
    return _spread(tuple(milliseconds))


@cache
def _spread(milliseconds: tuple[float, ...]) -> Distribution:
    """Cached: tests use the same values many times, and the library is slow."""
    return Distribution.of(histogram(list(milliseconds)))


def empty() -> Distribution:
    return spread([])


def latencies(count: int, middle: float = 1.2, sigma: float = 0.35, seed: int = 1) -> list[float]:
    """Latencies of a target without stalls, in milliseconds: log-normal, and a few much longer."""
    chance = random.Random(seed)
    found = [middle * math.exp(chance.gauss(0, sigma)) for _ in range(count)]
    for at in chance.sample(range(count), count // 200):
        found[at] *= chance.uniform(3, 25)
    return found


def seconds(
    count: int, rate: int = 2000, seed: int = 1, stall: int | None = None, *, failing: bool = False
) -> list[Second]:
    """A series. In the second `stall` no call ends; in the next one, all calls that waited do."""
    chance = random.Random(seed)
    found = []
    for at in range(count):
        p50 = 1.2 * chance.uniform(0.9, 1.15)
        p99 = p50 * chance.uniform(3, 5)
        one = Second(
            at, rate, rate, rate, 0, p50, p99, p99 * chance.uniform(1.5, 6), chance.randrange(8), chance.uniform(0.1, 2)
        )
        if at == stall:
            one = replace(one, ok=0, p50=None, p99=None, max=None, depth=rate)
        elif stall is not None and at == stall + 1:
            one = replace(one, ok=2 * rate - 40, failed=40, p50=410.0, p99=980.0, max=1020.0, depth=120)
        if failing and at % 7 == 3:
            one = replace(one, ok=rate - at, failed=at)
        found.append(one)
    return found


def a_run(seed: int = 1, stall: int | None = 38, middle: float = 1.2, **changes: Any) -> Run:
    """A minute of the open model, in which the target stalls for a second."""
    values = latencies(6000, middle, seed=seed)
    service = [value * 0.97 for value in values]
    if stall is not None:
        values += [1000 * (1 - at / 100) for at in range(100)]
        service += [1000 * (1 - at / 100) * 0.9 if at < 5 else 2.0 for at in range(100)]
    failed = 40 if stall is not None else 0
    return replace(
        Run(
            model="open",
            began="2026-03-01T12:00:00+00:00",
            seconds=60.0,
            offered=2000.0,
            achieved=1999.3,
            sent=120_000,
            ok=120_000 - failed,
            errors={"CallTimeout": 31, "Overloaded": 9} if failed else {},
            executed={"no": 9, "maybe": 31, "yes": 0} if failed else {},
            warm_up=4000,
            checked=True,
            lost=0,
            duplicated=0,
            mismatched=0,
            handled=123_991,
            latency=spread(values),
            service_time=spread(service),
            queue=spread([value * 0.28 for value in service]),
            handler=spread([value * 0.11 for value in service]),
            transport=spread([value * 0.61 for value in service]),
            late=0,
            dropped=0,
            cpu=0.46,
            lag_p99=0.8,
            lag_max=2.4,
            bottleneck=(),
            series=tuple(seconds(60, seed=seed, stall=stall)),
        ),
        **changes,
    )


def jobs(**changes: Any) -> Run:
    """A minute of jobs: some were not done in time, one failed, two were done twice."""
    failed = {"not done": 38, "JobFailed attempts": 1, "SendError": 1}
    found = a_run(
        kind="jobs",
        errors=failed,
        executed={"maybe": 38, "yes": 1, "no": 1},
        duplicated=2,
        queue=None,
        handler=None,
        transport=None,
    )
    return replace(found, confirm=spread([value * 0.4 for value in latencies(6000)]), **changes)


def no_calls() -> Run:
    """A run that ended before any call was made."""
    return a_run(
        stall=None,
        seconds=0.0,
        offered=0.0,
        achieved=0.0,
        sent=0,
        ok=0,
        warm_up=0,
        handled=None,
        latency=empty(),
        service_time=empty(),
        queue=None,
        handler=None,
        transport=None,
        series=(),
        cpu=0.0,
        lag_p99=0.0,
        lag_max=0.0,
    )


def one_second() -> Run:
    return a_run(stall=None, seconds=1.0, sent=2000, ok=2000, series=tuple(seconds(1)))


def all_failed() -> Run:
    """There is no worker: each call ends at once with an error."""
    series = tuple(replace(it, ok=0, failed=it.sent, depth=None) for it in seconds(10))
    return a_run(
        stall=None,
        seconds=10.0,
        sent=20_000,
        ok=0,
        errors={"ServiceUnavailable": 20_000},
        executed={"no": 20_000},
        handled=0,
        queue=None,
        handler=None,
        transport=None,
        series=series,
    )


def closed() -> Run:
    series = tuple(replace(it, offered=None, depth=None) for it in seconds(20))
    run = a_run(stall=None, model="closed", offered=None, seconds=20.0, sent=40_000, ok=40_000, series=series)
    return replace(run, latency=run.service_time)


def an_hour() -> Run:
    """3600 seconds, of which one has the longest call of all."""
    series = seconds(3600, failing=True)
    series[1234] = replace(series[1234], max=4321.0)
    return a_run(stall=None, seconds=3600.0, sent=7_200_000, ok=7_200_000, series=tuple(series))


def stepped() -> Run:
    """Five rates; the target cannot keep up with the last one."""
    steps, series = [], []
    for index, rate in enumerate((1000, 2000, 4000, 8000, 16_000)):
        slow = 40.0 if index == 4 else 1.0
        steps.append(
            Step(
                rate=float(rate),
                begins=index * 10.0,
                seconds=10.0,
                achieved=min(rate, 11_200) * 0.999,
                failed=300 if index == 4 else 0,
                latency=spread(latencies(2000, 1.0 * slow + 0.1 * index, seed=index)),
            )
        )
        for second in seconds(10, rate, seed=index):
            slower = replace(second, at=index * 10 + second.at, ok=min(rate, 11_200))
            if index == 4 and second.p50 and second.p99 and second.max:
                slower = replace(slower, p50=second.p50 * 40, p99=second.p99 * 40, max=second.max * 40, failed=30)
            series.append(slower)
    return a_run(
        stall=None,
        seconds=50.0,
        offered=6200.0,
        achieved=5237.0,
        sent=310_000,
        ok=309_700,
        errors={"CallTimeout": 300},
        executed={"maybe": 300},
        series=tuple(series),
        steps=tuple(steps),
        bottleneck=("a generator used 97% of its core", "the event loop was 64 ms late at p99"),
        cpu=0.97,
        lag_p99=64.0,
        lag_max=130.0,
        late=812,
        dropped=11,
    )


def a_report(*runs: Run, interrupted: bool = False, **settings: Any) -> Report:
    return Report({**SETTINGS, **settings}, HOST, runs or (a_run(),), interrupted)


def repeated(count: int = 5, middle: float = 1.2) -> Report:
    """A report with several runs, which differ a little."""
    runs = [a_run(seed, None, middle * (1 + 0.02 * seed), achieved=2000.0 - seed) for seed in range(count)]
    return a_report(*runs, repeat=count)
