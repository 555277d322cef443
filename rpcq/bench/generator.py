"""Makes calls or sends jobs when they are due, and has each one recorded.

In the open model, calls are sent when they are due, and latency counts from then. A target that stalls gets as many
calls as one that does not, and the waiting time of each of them is measured. In the closed model, each caller waits for
its reply before it calls again.

A job is sent with `watch=True`: its worker tells when it is done.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import cycle
from typing import Any, Final

from rpcq.bench.plan import Plan
from rpcq.bench.recording import Failure, Measured, Recorder, Tally
from rpcq.bench.result import NOT_DONE
from rpcq.client import Client
from rpcq.errors import CallError, JobFailed, NoResult, SendError
from rpcq.wire.replies import Reply

BEAT: Final = 0.010
"""Seconds between two checks of how late the event loop is."""

GRACE: Final = 2.0
"""Seconds that calls have to end after their deadline, or after the test was interrupted."""

LEAD: Final = 0.05
"""Seconds between the start and the first call that is due."""

NONCES: Final = 1 << 40
"""Number of nonces that each generator has for itself."""


class Generator:
    """Makes the calls of a plan.

    Args:
        plan: what to do.
        client: makes the calls; it has to be open.
        on_second: called after each second with its number, and with how many calls were due, were sent, ended and
            failed in it, and their latencies.
        ask: makes the call with the given number instead of the plan's target, and returns whether the result belongs
            to that call.

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
        self._send = client.with_options(watch=True, timeout=plan.timeout).send
        self._client = client
        self._on_second = on_second
        self._recorder = Recorder(plan)
        self._next = 0
        self._reply: Reply | None = None
        self._payload = "x" * plan.payload
        self._lines: Iterator[dict[str, Any]] | None = cycle(plan.lines) if plan.lines else None
        self._under_way: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._interrupted = False

    def stop(self) -> None:
        """Send no more calls; those under way have `GRACE` seconds to end."""
        self._interrupted = True
        self._stopping.set()

    async def run(self) -> Measured:
        """Make all calls, and wait until they have ended."""
        recorder, measured = self._recorder, self._recorder.measured
        self._client.on_reply(self._on_reply)
        stray = self._client.unmatched_replies
        watching = asyncio.create_task(self._watch_loop())
        recorder.start(LEAD + self._plan.warm_up)
        try:
            cpu = await (self._open() if self._plan.phases else self._closed())
        finally:
            watching.cancel()
            self._client.on_reply(None)
        measured.cpu = _cpu() - cpu
        measured.stray = self._client.unmatched_replies - stray
        return recorder.finish()

    # The two models. Each returns the processor time at which measuring began.

    async def _open(self) -> float:
        plan, recorder, perf_counter = self._plan, self._recorder, time.perf_counter
        measured, began = recorder.measured, recorder.began
        cpu: float | None = None
        for at in plan.due():
            due = began - plan.warm_up + at
            ahead = due - perf_counter()
            if ahead > 0 or not self._next % 64:
                await self._pause(ahead)
            if self._stopping.is_set():
                break
            if due >= began:
                cpu = _cpu() if cpu is None else cpu
                recorder.offered(due)
            if len(self._under_way) >= plan.in_flight:
                measured.dropped += due >= began
                continue
            task = asyncio.create_task(self._one(due))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        planned = sum(it.seconds for it in plan.phases)
        if not self._stopping.is_set():
            await self._pause(began + planned - perf_counter())
        measured.seconds = max(0.0, perf_counter() - began) if self._interrupted else planned
        await self._all_ended()
        return _cpu() if cpu is None else cpu

    async def _closed(self) -> float:
        await self._pause(LEAD)
        began = self._recorder.began
        callers = [asyncio.create_task(self._caller()) for _ in range(self._plan.own_concurrency)]
        self._under_way.update(callers)
        await self._pause(began - time.perf_counter())
        cpu = _cpu()
        await asyncio.wait([*callers, asyncio.create_task(self._stopping.wait())], return_when="FIRST_COMPLETED")
        self._stopping.set()  # a caller has nothing left to do: the others stop too
        await self._all_ended()
        self._recorder.measured.seconds = max(0.0, time.perf_counter() - began)
        return cpu

    async def _caller(self) -> None:
        until = self._recorder.began + self._plan.own_seconds
        most = self._plan.own_calls
        measured, stopping = self._recorder.measured, self._stopping
        while not stopping.is_set():
            now = time.perf_counter()
            if now >= until or measured.sent >= most:
                return
            await self._one(now)

    async def _pause(self, seconds: float) -> None:
        if self._stopping.is_set() or seconds <= 0:
            await asyncio.sleep(0)
            return
        if seconds < 0.1:
            await asyncio.sleep(seconds)  # short enough that `stop` can wait for it
            return
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return

    async def _all_ended(self) -> None:
        """Wait for the calls under way until their deadline; after an interruption, for `GRACE` seconds only."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=GRACE if self._interrupted else self._plan.timeout + GRACE)
        for task in self._under_way:
            task.cancel()
        if self._under_way:
            await asyncio.gather(*self._under_way, return_exceptions=True)

    # One call.

    async def _one(self, due: float) -> None:
        number = self._next
        self._next = number + 1
        recorder, sent = self._recorder, time.perf_counter()
        measures = recorder.sent(due, sent)
        failure: Failure | None = None
        try:
            own = await (self._do_job(number, due, sent) if self._plan.is_job else self._ask(number))
            # Two statements: `+=` with the await in it would read the counter before the wait.
            recorder.measured.mismatched += not own
        except CallError as error:
            failure = Failure(type(error).__name__, error.executed)
        except SendError as error:
            failure = Failure("SendError", error.queued)  # what is not queued has not run
        except JobFailed as error:
            failure = Failure(f"JobFailed {error.reason}", error.executed)
        except TimeoutError:
            failure = Failure(NOT_DONE, "maybe")
        except asyncio.CancelledError:
            if measures:
                recorder.cancelled()
            raise
        reply, self._reply = self._reply, None  # it is this call's: no other task ran since it came
        if measures:
            recorder.ended(due, sent, time.perf_counter(), failure, reply)

    async def _ask_target(self, number: int) -> bool:
        args, params = self._parameters(number)
        result = await self._call(self._plan.target, *args, **params)
        return not self._plan.checks or bool(result == params["nonce"])

    async def _do_job(self, number: int, due: float, sent: float) -> bool:
        """Send a job and wait until it is done; returns whether its result belongs to it."""
        plan = self._plan
        args, params = self._parameters(number)
        job = await self._send(plan.target, *args, **params)
        now = time.perf_counter()
        self._recorder.confirmed(due, sent, now)
        try:
            result = await job.result(timeout=max(0.001, sent + plan.timeout - now))
        except NoResult:
            return True  # it is done, and what it returned does not matter
        return not plan.checks or bool(result == params["nonce"])

    def _parameters(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The parameters of a call, by position and by name."""
        plan = self._plan
        if plan.checks:
            return (), {"nonce": plan.number * NONCES + number, "payload": self._payload}
        if self._lines is not None:
            return (), next(self._lines)
        return plan.args, plan.params

    def _on_reply(self, reply: Reply) -> None:
        self._reply = reply  # of the call that continues next

    # Each second.

    async def _watch_loop(self) -> None:
        """Record how late the event loop is, and report each second."""
        reported = -1
        loop, recorder = asyncio.get_running_loop(), self._recorder
        while True:
            before = loop.time()
            await asyncio.sleep(BEAT)
            lag = loop.time() - before - BEAT
            now = time.perf_counter()
            if now < recorder.began:
                continue
            recorder.lagged(now, lag)
            second = recorder.second_of(now) - 1
            if second > reported:
                reported = second
                self._on_second(second, recorder.flush(second))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
