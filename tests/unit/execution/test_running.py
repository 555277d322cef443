"""How runs of handlers end: what they return or raise, and why they were interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from rpcq import Context, Service
from rpcq.errors import ServiceUnavailable
from rpcq.execution import Around, Enter, Executor, running
from rpcq.invocation import Interruption, Invocation, Refused
from rpcq.runtime.deadline import Deadline
from support.runs import Recorded

SECONDS = 5.0
SOON = 0.02
"""Seconds until a deadline that comes."""


class Asked(Invocation):
    def context(self) -> Context:
        return Context(self.method.service, self.method.name, "id", Deadline(self.deadline))

    def names(self) -> dict[str, Any]:
        return {"method": self.method.label}


class Begin:
    """Begins runs of functions."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def __call__(
        self, handler: Callable[..., Any], *args: Any, seconds: float = SECONDS, around: Around | None = None
    ) -> Recorded:
        service = Service("service")
        service.method(name="method")(handler)
        run, now = Recorded(), time.monotonic()
        self.executor.begin(run, Asked(service.methods["method"], (args, {}), now + seconds), now, around)
        return run


@pytest.fixture
async def begin() -> AsyncIterator[Begin]:
    """An executor with one thread."""
    executor = Executor(threads=1)
    executor.open()
    yield Begin(executor)
    await executor.abandon([])


class Blocking:
    """A `def` handler that says when it is entered, and returns when it may."""

    def __init__(self) -> None:
        self.entered = 0
        self.goes_on = threading.Event()

    def handler(self) -> str:
        self.entered += 1
        self.goes_on.wait(SECONDS)
        return "ran on"


@pytest.fixture
def blocking() -> Iterator[Blocking]:
    blocking = Blocking()
    yield blocking
    blocking.goes_on.set()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.002)


async def forever() -> None:
    await asyncio.Event().wait()


async def nothing() -> None: ...


# Returned and raised.


async def test_what_a_coroutine_returns_ends_its_run(begin: Begin) -> None:
    async def double(x: int) -> int:
        await asyncio.sleep(0.01)
        return 2 * x

    run = begin(double, 4)
    assert await run.end() == ("returned", 8)
    assert run.began
    assert run.invocation is None
    assert run.timeout is None
    assert 5 < run.handler_ms < 5000


async def test_what_a_function_returns_in_its_thread_ends_its_run(begin: Begin) -> None:
    def ran_in(context: Context) -> tuple[str, str]:
        return threading.current_thread().name, context.correlation_id

    run = begin(ran_in)
    how, (thread, correlation_id) = await run.end()
    assert (how, correlation_id) == ("returned", "id")
    assert thread.startswith("rpcq")
    assert not run.ran_on
    assert not run.outlasts


@pytest.mark.parametrize("in_thread", [False, True])
async def test_what_a_handler_raises_ends_its_run(begin: Begin, in_thread: bool) -> None:
    error = ValueError("no")

    async def fail() -> None:
        raise error

    def fail_in_thread() -> None:
        raise error

    run = begin(fail_in_thread if in_thread else fail)
    assert await run.end() == ("raised", error)
    assert run.began


async def test_a_handler_that_cancels_itself_has_raised(begin: Begin) -> None:
    async def cancel() -> None:
        raise asyncio.CancelledError

    how, error = await begin(cancel).end()
    assert how == "raised"
    assert isinstance(error, asyncio.CancelledError)
    assert "cancelled itself" in str(error)


async def test_the_code_around_a_handler_gives_the_result_and_may_leave_the_handler_out(begin: Begin) -> None:
    async def twice(enter: Enter) -> Any:
        return 2 * await enter()

    async def instead(_: Enter) -> str:
        return "stored"

    async def three() -> int:
        return 3

    entered = begin(three, around=twice)
    assert (await entered.end(), entered.began) == (("returned", 6), True)
    left_out = begin(three, around=instead)
    assert (await left_out.end(), left_out.began) == (("returned", "stored"), False)


async def test_where_no_thread_can_be_started_the_run_has_raised_a_refusal(begin: Begin) -> None:
    def ran() -> None: ...

    await begin(ran).end()
    await begin.executor.abandon([])
    run = begin(ran)
    how, error = await run.end()
    assert how == "raised"
    assert isinstance(error, Refused)
    assert isinstance(error.error, ServiceUnavailable)
    assert not run.began


# Interrupted.


async def test_a_handler_whose_caller_is_gone_is_cancelled(begin: Begin) -> None:
    run = begin(forever)
    await until(lambda: run.began)
    begin.executor.cancel(run)
    assert await run.end() == ("interrupted", Interruption.CANCELLED)
    assert run.task is not None
    assert run.timeout is None


async def test_a_run_whose_caller_is_gone_before_its_first_step_never_enters_the_handler(begin: Begin) -> None:
    run = begin(forever)
    begin.executor.cancel(run)
    assert run.ends == [("interrupted", Interruption.CANCELLED)]
    await asyncio.sleep(0.01)
    assert len(run.ends) == 1
    assert not run.began


async def test_a_handler_that_runs_until_its_deadline_is_cancelled_then(begin: Begin) -> None:
    run = begin(forever, seconds=SOON)
    assert await run.end() == ("interrupted", Interruption.TIMED_OUT)
    assert run.handler_ms > 0


async def test_a_handler_that_still_waits_for_a_thread_at_its_deadline_has_not_begun_and_never_does(
    begin: Begin, blocking: Blocking
) -> None:
    def after_it() -> str:
        return "after it"

    first = begin(blocking.handler)
    await until(lambda: blocking.entered)
    second = begin(blocking.handler, seconds=SOON)
    assert await second.end() == ("interrupted", Interruption.TIMED_OUT_UNBEGUN)
    blocking.goes_on.set()
    assert await first.end() == ("returned", "ran on")
    assert await begin(after_it).end() == ("returned", "after it")
    assert blocking.entered == 1
    assert not second.began


async def test_handlers_that_run_when_all_are_abandoned_are_cut_off_and_say_whether_they_had_begun(
    begin: Begin, blocking: Blocking
) -> None:
    in_task, in_thread = begin(forever), begin(blocking.handler)
    await until(lambda: in_task.began and blocking.entered)
    waits_for_thread = begin(blocking.handler)
    await asyncio.sleep(0.01)
    without_a_step = begin(forever)
    await begin.executor.abandon([in_task, in_thread, waits_for_thread, without_a_step])
    assert in_task.ends == in_thread.ends == [("interrupted", Interruption.CUT_OFF)]
    assert waits_for_thread.ends == without_a_step.ends == [("interrupted", Interruption.CUT_OFF_UNBEGUN)]
    assert in_thread.outlasts
    assert not waits_for_thread.outlasts


async def test_a_handler_that_does_not_let_itself_be_cancelled_is_cut_off_once_and_its_result_is_dropped(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "CANCEL_TIMEOUT", 0.02)
    goes_on = asyncio.Event()

    async def stick() -> str:
        while not goes_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await goes_on.wait()
        return "too late"

    run = begin(stick)
    await until(lambda: run.began)
    await begin.executor.abandon([run])
    assert run.ends == [("interrupted", Interruption.CUT_OFF)]
    goes_on.set()
    assert run.task is not None
    await run.task
    assert len(run.ends) == 1


@pytest.mark.parametrize("why", [Interruption.CANCELLED, Interruption.TIMED_OUT])
async def test_a_thread_runs_on_after_its_run_was_interrupted_and_its_result_is_dropped(
    begin: Begin, blocking: Blocking, why: Interruption
) -> None:
    run = begin(blocking.handler, seconds=SOON if why is Interruption.TIMED_OUT else SECONDS)
    await until(lambda: blocking.entered)
    if why is Interruption.CANCELLED:
        begin.executor.cancel(run)
    assert await run.end() == ("interrupted", why)
    assert run.began
    assert run.ran_on
    assert run.outlasts
    blocking.goes_on.set()
    await until(lambda: not run.outlasts)
    assert run.result is not None
    assert (await run.result).value == "ran on"
    assert len(run.ends) == 1


async def test_a_run_that_is_written_off_has_no_end_and_its_handler_is_cancelled(begin: Begin) -> None:
    run = begin(forever, seconds=SOON)
    await until(lambda: run.began)
    begin.executor.write_off(run)
    assert run.task is not None
    await asyncio.wait([run.task])
    await asyncio.sleep(2 * SOON)  # its deadline passes
    assert run.ends == []


async def test_a_thread_that_is_written_off_goes_on_and_one_that_waits_never_begins(
    begin: Begin, blocking: Blocking
) -> None:
    runs = begin(blocking.handler)
    waits_for_thread = begin(blocking.handler)
    await until(lambda: blocking.entered == 1 and waits_for_thread.thread is not None)
    for run in (waits_for_thread, runs):
        begin.executor.write_off(run)
    assert runs.outlasts
    assert not waits_for_thread.outlasts
    blocking.goes_on.set()
    await until(lambda: not runs.outlasts)
    assert (runs.ends, waits_for_thread.ends, blocking.entered) == ([], [], 1)


async def test_code_around_a_handler_that_swallows_the_cancellation_cannot_enter_it_any_more(begin: Begin) -> None:
    entered = asyncio.Event()

    async def swallow(enter: Callable[[], Awaitable[Any]]) -> Any:
        entered.set()
        with contextlib.suppress(asyncio.CancelledError):
            await forever()
        return await enter()

    run = begin(nothing, around=swallow)
    await entered.wait()
    begin.executor.cancel(run)
    assert await run.end() == ("interrupted", Interruption.CANCELLED)
    assert not run.began
    late = begin(nothing, seconds=SOON, around=swallow)
    assert await late.end() == ("interrupted", Interruption.TIMED_OUT_UNBEGUN)
