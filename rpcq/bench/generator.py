"""Makes calls when they are due, and notes what became of each.

In the open model, calls are sent when they are due, and latency counts from then: a target that stalls meets as many
callers as one that does not, and each of them waited. In the closed model, each caller waits for its answer before it
calls again.
"""

from __future__ import annotations

import asyncio
import math
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Final

import pydantic
from hdrh.histogram import HdrHistogram

from rpcq.bench.plan import Plan
from rpcq.bench.result import HIGHEST, new_histogram
from rpcq.client import Client
from rpcq.errors import CallError
from rpcq.wire.replies import Reply, read_times

LATE: Final = 0.010
"""Seconds after it was due, from when on a call was sent late."""

BEAT: Final = 0.010
"""Seconds between two looks at how late the event loop is."""

MOMENT: Final = 2.0
"""Seconds that calls have to end where a test is cut short, or after their deadline."""

LEAD: Final = 0.05
"""Seconds from the word to go until the first call is due."""

NONCES: Final = 1 << 40
"""Each generator has so many."""


@dataclass(slots=True)
class Tally:
    """What became of the calls that ended in one second, or were due in it."""

    offered: int = 0
    sent: int = 0
    ok: int = 0
    failed: int = 0
    lag: float = 0.0
    latency: str = ""


@dataclass(slots=True)
class Measured:
    """What one generator found. Histograms are encoded; times are microseconds there, and else seconds.

    Attributes:
        began: wall clock when measuring began, seconds since the epoch.
        seconds: how long it measured.
        sent: calls.
        ok: with a result.
        errors: by class.
        executed: of those that failed.
        warm_up: calls made before.
        ended: calls of which something was heard, of those that were sent.
        stray: replies that were for no call.
        mismatched: results of other calls.
        late: sent late.
        dropped: not sent.
        cpu: seconds of processor time.
        histograms: "latency", "service", "queue", "handler", "transport", "lag", and "step-0", "step-1", ...
        series: by second.

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
        """Milliseconds that so many of a histogram's values were not above; 0 where there are none."""
        if name not in self.histograms:
            return 0.0
        found = HdrHistogram.decode(self.histograms[name].encode()).get_value_at_percentile(percent) / 1000
        return float(found)

    def to_json(self) -> bytes:
        """For `read_measured` in another process."""
        return pydantic.TypeAdapter(Measured).dump_json(self)


def read_measured(text: bytes) -> Measured:
    """What a generator found, from its JSON."""
    return pydantic.TypeAdapter(Measured).validate_json(text)


class Generator:
    """Makes the calls of a plan.

    Args:
        plan: what to do.
        client: that calls; open.
        on_second: called after each second with how many calls have been sent and ended, what failed, and the
            latencies of that second.
        ask: makes the call of a number, instead of the plan's target, and says whether the answer was its own.

    """

    def __init__(
        self,
        plan: Plan,
        client: Client,
        on_second: Callable[[int, Tally], None],
        ask: Callable[[int], Awaitable[bool]] | None = None,
    ) -> None:
        self._plan = plan
        self._ask = self._ask_target if ask is None else ask
        self._call = client.with_options(timeout=plan.timeout, idempotent=plan.idempotent).call
        self._client = client
        self._on_second = on_second
        self._found = Measured()
        self._next = 0
        self._reply: Reply | None = None
        self._payload = "x" * plan.payload
        self._lines: Iterator[dict[str, Any]] | None = cycle(plan.lines) if plan.lines else None
        self._under_way: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._cut_short = False
        self._began = 0.0  # measuring, on time.perf_counter()
        self._counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))  # microseconds -> how many
        self._second: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self._histograms: dict[str, HdrHistogram] = {}
        ends, self._step_ends = 0.0, []
        for phase in plan.phases:
            ends += phase.seconds
            self._step_ends.append(ends)
        planned = ends or plan.own_seconds
        self._last = int(planned) - 1 if planned != math.inf else -1

    def stop(self) -> None:
        """Send no more; what is under way has a moment to end."""
        self._cut_short = True
        self._stopping.set()

    async def run(self) -> Measured:
        """Make all calls, and wait until they have ended."""
        self._client.on_reply(self._on_reply)
        stray = self._client.unmatched_replies
        looking = asyncio.create_task(self._look())
        self._began = time.perf_counter() + LEAD + self._plan.warm_up
        self._found.began = time.time() + LEAD + self._plan.warm_up
        try:
            cpu = await (self._open() if self._plan.phases else self._closed())
        finally:
            looking.cancel()
            self._client.on_reply(None)
        self._found.cpu = _cpu() - cpu
        self._found.stray = self._client.unmatched_replies - stray
        self._flush(int(self._found.seconds) + 2)
        self._found.histograms = {name: it.encode().decode() for name, it in self._histograms.items()}
        return self._found

    # The two models.

    async def _open(self) -> float:
        plan, perf_counter = self._plan, time.perf_counter
        begins = self._began - plan.warm_up
        cpu: float | None = None
        for at in plan.due():
            due = begins + at
            ahead = due - perf_counter()
            if ahead > 0 or not self._next % 64:
                await self._pause(ahead)
            if self._stopping.is_set():
                break
            if due >= self._began:
                cpu = _cpu() if cpu is None else cpu
                self._tally(due).offered += 1
            if len(self._under_way) >= plan.in_flight:
                self._found.dropped += due >= self._began
                continue
            task = asyncio.create_task(self._one(due))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        planned = sum(it.seconds for it in plan.phases)
        if not self._stopping.is_set():
            await self._pause(self._began + planned - perf_counter())
        self._found.seconds = max(0.0, perf_counter() - self._began) if self._cut_short else planned
        await self._all_ended()
        return _cpu() if cpu is None else cpu

    async def _closed(self) -> float:
        await self._pause(LEAD)
        callers = [asyncio.create_task(self._caller()) for _ in range(self._plan.own_concurrency)]
        self._under_way.update(callers)
        await self._pause(self._began - time.perf_counter())
        cpu = _cpu()
        await asyncio.wait([*callers, asyncio.create_task(self._stopping.wait())], return_when="FIRST_COMPLETED")
        self._stopping.set()  # the first caller that finds nothing left to do ends it for all
        await self._all_ended()
        self._found.seconds = max(0.0, time.perf_counter() - self._began)
        return cpu

    async def _caller(self) -> None:
        until = self._began + self._plan.own_seconds
        most = self._plan.own_calls
        found, stopping = self._found, self._stopping
        while not stopping.is_set():
            now = time.perf_counter()
            if now >= until or found.sent >= most:
                return
            await self._one(now)

    async def _pause(self, seconds: float) -> None:
        if self._stopping.is_set() or seconds <= 0:
            await asyncio.sleep(0)
            return
        if seconds < 0.1:
            await asyncio.sleep(seconds)  # a word to stop can wait so long
            return
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return

    async def _all_ended(self) -> None:
        """Wait for what is under way: until its deadline, or only for a moment where the test was cut short."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=MOMENT if self._cut_short else self._plan.timeout + MOMENT)
        for task in self._under_way:
            task.cancel()
        if self._under_way:
            await asyncio.gather(*self._under_way, return_exceptions=True)

    # One call.

    async def _one(self, due: float) -> None:
        number = self._next
        self._next = number + 1
        measures = due >= self._began
        sent = time.perf_counter()
        found = self._found
        if measures:
            found.sent += 1
            self._tally(sent).sent += 1
            if sent - due > LATE:
                found.late += 1
        else:
            found.warm_up += 1
        error: CallError | None = None
        try:
            own = await self._ask(number)
            found.mismatched += not own  # not in one: what was there before the wait would be added to
        except CallError as failed:
            error = failed
        except asyncio.CancelledError:
            if measures:
                found.ended += 1
                found.errors["cancelled"] += 1
                found.executed["maybe"] += 1
            raise
        reply, self._reply = self._reply, None  # nothing else ran since it came
        if measures:
            self._ended(due, sent, time.perf_counter(), error, reply)

    async def _ask_target(self, number: int) -> bool:
        plan = self._plan
        if plan.checks:
            nonce = plan.number * NONCES + number
            return bool(await self._call(plan.target, nonce=nonce, payload=self._payload) == nonce)
        if self._lines is not None:
            await self._call(plan.target, **next(self._lines))
        else:
            await self._call(plan.target, *plan.args, **plan.params)
        return True

    def _ended(self, due: float, sent: float, now: float, error: CallError | None, reply: Reply | None) -> None:
        found = self._found
        found.ended += 1
        tally = self._tally(now)
        # Timers of event loops come up to a millisecond early.
        latency, service = int((now - min(due, sent)) * 1e6), int((now - sent) * 1e6)
        self._counts["latency"][latency] += 1
        self._counts["service"][service] += 1
        if reply is not None:
            self._parts(reply, service)
        self._second[self._second_of(now)][latency] += 1
        if error is None:
            found.ok += 1
            tally.ok += 1
        else:
            found.errors[type(error).__name__] += 1
            found.executed[error.executed] += 1
            tally.failed += 1
        if len(self._step_ends) > 1:
            step = self._step(due)
            self._counts[f"step-{step}"][latency] += 1
            ended_in = self._step(now)
            found.ended_by_step[ended_in] = found.ended_by_step.get(ended_in, 0) + 1
            if error is not None:
                found.failed_by_step[ended_in] = found.failed_by_step.get(ended_in, 0) + 1

    def _on_reply(self, reply: Reply) -> None:
        self._reply = reply  # of the call that goes on next

    def _parts(self, reply: Reply, service_us: int) -> None:
        """Where the time of a call went."""
        times = read_times(reply)
        if times is None:
            return
        queue_ms, handler_ms = times
        self._counts["handler"][int(handler_ms * 1000)] += 1
        if queue_ms is not None:
            self._counts["queue"][int(queue_ms * 1000)] += 1
            self._counts["transport"][max(0, service_us - int((queue_ms + handler_ms) * 1000))] += 1

    def _tally(self, at: float) -> Tally:
        second = self._second_of(at)
        tally = self._found.series.get(second)
        if tally is None:
            tally = self._found.series[second] = Tally()
        return tally

    def _second_of(self, at: float) -> int:
        """Which second of the run; what ends a moment after the last one counts there, and not as one of few calls."""
        second = int(at - self._began) if at >= self._began else 0
        return second - 1 if 0 <= self._last == second - 1 else second

    def _step(self, at: float) -> int:
        after = at - self._began
        return next((i for i, ends in enumerate(self._step_ends) if after < ends), len(self._step_ends) - 1)

    # Each second.

    async def _look(self) -> None:
        """How late the event loop is; and once a second, what was counted goes into the histograms."""
        told = -1
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(BEAT)
            lag = loop.time() - before - BEAT
            now = time.perf_counter()
            if now < self._began:
                continue
            self._counts["lag"][int(max(0.0, lag) * 1e6)] += 1
            tally = self._tally(now)
            tally.lag = max(tally.lag, lag)
            second = self._second_of(now) - 1
            if second > told:
                told = second
                self._flush(second)
                self._on_second(second, self._found.series.get(second, Tally()))

    def _flush(self, last: int) -> None:
        for name, counts in self._counts.items():
            histogram = self._histograms.get(name)
            if histogram is None:
                histogram = self._histograms[name] = new_histogram()
            _record(histogram, counts)
            counts.clear()
        for second in [it for it in self._second if it <= last]:
            histogram = new_histogram()
            _record(histogram, self._second.pop(second))
            self._found.series.setdefault(second, Tally()).latency = histogram.encode().decode()


def _record(histogram: HdrHistogram, counts: dict[int, int]) -> None:
    for value, count in counts.items():
        histogram.record_value(min(value, HIGHEST), count)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
