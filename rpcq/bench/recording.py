"""Records what became of the calls of one generator: counters, histograms, and a row for each second."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import pydantic
from hdrh.histogram import HdrHistogram

from rpcq.bench.plan import Plan
from rpcq.bench.result import HIGHEST, NOT_DONE, new_histogram
from rpcq.errors import Executed
from rpcq.wire.replies import Reply, read_times

LATE: Final = 0.010
"""Seconds. A call that is sent more than this after it was due counts as sent late."""


@dataclass(slots=True)
class Tally:
    """Counts of one second.

    Attributes:
        offered: calls that were due in it.
        sent: calls that were sent in it.
        ok: calls that ended in it with a result.
        failed: calls that ended in it with an error.
        lag: the longest that the event loop was late in it, in seconds.
        latency: latencies of the calls that ended in it, as an encoded histogram; empty until the second is over.

    """

    offered: int = 0
    sent: int = 0
    ok: int = 0
    failed: int = 0
    lag: float = 0.0
    latency: str = ""


@dataclass(slots=True)
class Measured:
    """What one generator measured. Histograms are encoded and count microseconds; all other times are seconds.

    It has more than 15 fields because it is a plain record that another process reads as JSON.

    Attributes:
        began: when measuring began, as seconds since the epoch.
        seconds: how long it measured.
        sent: calls that were sent.
        ok: calls that ended with a result.
        errors: class of the error -> calls that ended with it.
        executed: "no", "maybe" or "yes" -> calls that failed and did not, may have, or did run.
        warm_up: calls that were made before measuring began.
        ended: calls of `sent` that ended with a result or an error, or were not done in time.
        stray: replies that belonged to no call.
        mismatched: results that belonged to another call.
        late: calls that were sent late.
        dropped: calls that were not sent, because too many were under way.
        cpu: seconds of processor time.
        histograms: "latency", "service", "confirm", "queue", "handler", "transport", "lag", and "step-0", "step-1", ...
        series: number of the second -> its counts.
        failed_by_step: number of the step -> calls that ended in it with an error.
        ended_by_step: number of the step -> calls that ended in it.

    """

    began: float = 0.0
    seconds: float = 0.0
    sent: int = 0
    ok: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    executed: Counter[str] = field(default_factory=Counter)
    warm_up: int = 0
    ended: int = 0
    stray: int = 0
    mismatched: int = 0
    late: int = 0
    dropped: int = 0
    cpu: float = 0.0
    histograms: dict[str, str] = field(default_factory=dict)
    series: dict[int, Tally] = field(default_factory=dict)
    failed_by_step: dict[int, int] = field(default_factory=dict)
    ended_by_step: dict[int, int] = field(default_factory=dict)

    def percentile(self, name: str, percent: float) -> float:
        """The percentile of a histogram in milliseconds; 0 if there is no such histogram."""
        if name not in self.histograms:
            return 0.0
        found = HdrHistogram.decode(self.histograms[name].encode()).get_value_at_percentile(percent) / 1000
        return float(found)

    def to_json(self) -> bytes:
        """The measurements as JSON, for `read_measured` in another process."""
        return pydantic.TypeAdapter(Measured).dump_json(self)


def read_measured(text: bytes) -> Measured:
    """The measurements of a generator, from their JSON."""
    return pydantic.TypeAdapter(Measured).validate_json(text)


class Failure(NamedTuple):
    """How a call or a job failed.

    Attributes:
        kind: class of the error, or `NOT_DONE`.
        executed: whether its handler ran.

    """

    kind: str
    executed: Executed


class Recorder:
    """Records the calls of one generator. Times are those of `time.perf_counter()`.

    Values are counted in dicts, which is cheap, and go into the histograms once a second.

    Args:
        plan: what the generator does.

    Attributes:
        measured: what was recorded so far.
        began: when measuring begins; earlier calls are warm-up.

    """

    def __init__(self, plan: Plan) -> None:
        self.measured = Measured()
        self._is_job = plan.is_job
        self.began = 0.0
        self._counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))  # microseconds -> calls
        self._latencies: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))  # the same, by second
        self._histograms: dict[str, HdrHistogram] = {}
        ends, self._step_ends = 0.0, []
        for phase in plan.phases:
            ends += phase.seconds
            self._step_ends.append(ends)
        planned = ends or plan.own_seconds
        self._last = int(planned) - 1 if planned != math.inf else -1

    def start(self, after: float) -> None:
        """Begin to measure `after` seconds from now."""
        self.began = time.perf_counter() + after
        self.measured.began = time.time() + after

    def offered(self, due: float) -> None:
        """A call was due."""
        self._tally(due).offered += 1

    def sent(self, due: float, sent: float) -> bool:
        """A call was sent; returns whether it is measured, and not warm-up."""
        if due < self.began:
            self.measured.warm_up += 1
            return False
        self.measured.sent += 1
        self._tally(sent).sent += 1
        if sent - due > LATE:
            self.measured.late += 1
        return True

    def cancelled(self) -> None:
        """A call was cancelled, because the test ended."""
        self.measured.ended += 1
        self.measured.errors[NOT_DONE if self._is_job else "cancelled"] += 1
        self.measured.executed["maybe"] += 1

    def confirmed(self, due: float, sent: float, now: float) -> None:
        """The broker confirmed a job."""
        if due >= self.began:
            self._counts["confirm"][int((now - sent) * 1e6)] += 1

    def ended(self, due: float, sent: float, now: float, failure: Failure | None, reply: Reply | None) -> None:
        """A call ended, with a result or with an error."""
        measured = self.measured
        measured.ended += 1
        tally = self._tally(now)
        # Timers of event loops may fire up to a millisecond early.
        latency, service = int((now - min(due, sent)) * 1e6), int((now - sent) * 1e6)
        self._counts["latency"][latency] += 1
        self._counts["service"][service] += 1
        if reply is not None:
            self._count_parts(reply, service)
        self._latencies[self.second_of(now)][latency] += 1
        if failure is None:
            measured.ok += 1
            tally.ok += 1
        else:
            measured.errors[failure.kind] += 1
            measured.executed[failure.executed] += 1
            tally.failed += 1
        if len(self._step_ends) > 1:
            self._counts[f"step-{self._step_of(due)}"][latency] += 1
            step = self._step_of(now)
            if failure is None or failure.kind != NOT_DONE:
                measured.ended_by_step[step] = measured.ended_by_step.get(step, 0) + 1
            if failure is not None:
                measured.failed_by_step[step] = measured.failed_by_step.get(step, 0) + 1

    def lagged(self, now: float, seconds: float) -> None:
        """The event loop was late by `seconds`; a value below 0 counts as 0."""
        self._counts["lag"][int(max(0.0, seconds) * 1e6)] += 1
        tally = self._tally(now)
        tally.lag = max(tally.lag, seconds)

    def second_of(self, at: float) -> int:
        """The number of the second.

        What ends just after the last second of the plan counts in that second: a second with a few calls alone would
        look like a stall.
        """
        second = int(at - self.began) if at >= self.began else 0
        return second - 1 if 0 <= self._last == second - 1 else second

    def flush(self, last: int) -> Tally:
        """Put the counts into the histograms; returns the counts of the second `last`, which is complete."""
        for name, counts in self._counts.items():
            histogram = self._histograms.get(name)
            if histogram is None:
                histogram = self._histograms[name] = new_histogram()
            _record(histogram, counts)
            counts.clear()
        series = self.measured.series
        for second in [it for it in self._latencies if it <= last]:
            histogram = new_histogram()
            _record(histogram, self._latencies.pop(second))
            series.setdefault(second, Tally()).latency = histogram.encode().decode()
        return series.get(last, Tally())

    def finish(self) -> Measured:
        """Put everything into the histograms, and encode them."""
        self.flush(int(self.measured.seconds) + 2)
        self.measured.histograms = {name: it.encode().decode() for name, it in self._histograms.items()}
        return self.measured

    def _count_parts(self, reply: Reply, service_us: int) -> None:
        """Count how long a call was in each part of its way."""
        times = read_times(reply)
        if times is None:
            return
        queue_ms, handler_ms = times
        self._counts["handler"][int(handler_ms * 1000)] += 1
        if queue_ms is not None:
            self._counts["queue"][int(queue_ms * 1000)] += 1
            self._counts["transport"][max(0, service_us - int((queue_ms + handler_ms) * 1000))] += 1

    def _tally(self, at: float) -> Tally:
        second = self.second_of(at)
        tally = self.measured.series.get(second)
        if tally is None:
            tally = self.measured.series[second] = Tally()
        return tally

    def _step_of(self, at: float) -> int:
        after = at - self.began
        return next((i for i, ends in enumerate(self._step_ends) if after < ends), len(self._step_ends) - 1)


def _record(histogram: HdrHistogram, counts: dict[int, int]) -> None:
    for value, count in counts.items():
        histogram.record_value(min(value, HIGHEST), count)
