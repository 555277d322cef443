"""Calls that go to their handler together: how they are gathered, how each ends, and that each ends for itself.

At the end: any order of calls, cancellations, deadlines and ends of handlers, on a clock that the test moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import rpcq.runtime.timeouts
from rpcq import Batch, Context, Service
from rpcq.errors import ConfigurationError, DomainError, InvalidParams, ServiceUnavailable
from rpcq.execution import Executor, running
from rpcq.invocation import Interruption, Invocation, Refused, Unfit
from rpcq.runtime import deadline as deadlines
from rpcq.runtime.deadline import Deadline
from rpcq.service import Method
from support.held_loop import HeldLoop
from support.runs import Recorded

SECONDS = 5.0
SOON = 0.03
LATE = 60.0
"""Seconds that no test waits for."""


class Asked(Invocation):
    def context(self) -> Context:
        return Context(self.method.service, self.method.name, f"id {self.args or self.params}", Deadline(self.deadline))

    def names(self) -> dict[str, Any]:
        return {"method": self.method.label, "correlation_id": str(self.args)}


class Place:
    """An executor with two threads, and a handler."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.executor = Executor(threads=2, on_batch=lambda _, size, __: self.sizes.append(size))
        self.executor.open()
        self.method: Method

    def serve(self, handler: Callable[..., Any], **options: Any) -> None:
        service = Service("service")
        service.method(name="method", batch=Batch(**options))(handler)
        self.method = service.methods["method"]

    def begin(self, *args: Any, seconds: float = SECONDS, **params: Any) -> Recorded:
        run, now = Recorded(), time.monotonic()
        self.executor.begin(run, Asked(self.method, (args, params), now + seconds), now)
        return run

    async def values(self, runs: list[Recorded]) -> list[Any]:
        ends = [await run.end() for run in runs]
        assert {how for how, _ in ends} == {"returned"}
        return [value for _, value in ends]


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    found = Place()
    yield found
    await found.executor.abandon([])


class Held:
    """Handlers that get lists, say what they got, and end when they may."""

    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.goes_on = asyncio.Event()
        self.thread_goes_on = threading.Event()
        self.cancelled = 0

    async def handler(self, x: list[int]) -> list[int]:
        self.got.append(x)
        try:
            await self.goes_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return [10 * it for it in x]

    def in_thread(self, x: list[int]) -> list[int]:
        self.got.append(x)
        self.thread_goes_on.wait(SECONDS)
        return [10 * it for it in x]


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.thread_goes_on.set()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.002)


# Gathered.


async def test_calls_of_one_iteration_go_together_and_each_gets_its_own_result(place: Place) -> None:
    async def handler(x: list[int], *, y: list[int]) -> list[int]:
        assert len(x) == len(y)
        return [a - b for a, b in zip(x, y, strict=True)]

    place.serve(handler, max_wait=0)
    runs = [place.begin(x, y=1) for x in range(5)] + [place.begin(y=2, x=7)]
    assert await place.values(runs) == [-1, 0, 1, 2, 3, 5]
    assert place.sizes == [6]
    assert all(run.began and run.timeout is None and not run.outlasts for run in runs)


async def test_a_full_batch_begins_at_once_and_the_rest_when_it_has_waited(place: Place, held: Held) -> None:
    held.goes_on.set()
    place.serve(held.handler, max_size=2, max_wait=SOON)
    began = time.monotonic()
    runs = [place.begin(x) for x in range(3)]
    assert await place.values(runs[:2]) == [0, 10]
    assert await place.values(runs[2:]) == [20]
    assert time.monotonic() - began >= SOON * 0.9
    assert held.got == [[0, 1], [2]]


async def test_while_as_many_batches_run_as_may_calls_wait_and_the_next_batch_is_larger(
    place: Place, held: Held
) -> None:
    place.serve(held.handler, max_size=3, max_wait=0)
    first = place.begin(0)
    await until(lambda: held.got)
    others = [place.begin(x) for x in range(1, 5)]
    await asyncio.sleep(SOON)
    assert held.got == [[0]]
    held.goes_on.set()
    assert await place.values([first, *others]) == [0, 10, 20, 30, 40]
    assert held.got == [[0], [1, 2, 3], [4]]


async def test_max_concurrency_is_how_many_batches_run_at_once(place: Place, held: Held) -> None:
    place.serve(held.handler, max_size=1, max_concurrency=2)
    runs = [place.begin(x) for x in range(3)]
    await until(lambda: len(held.got) == 2)
    await asyncio.sleep(SOON)
    assert len(held.got) == 2
    held.goes_on.set()
    assert await place.values(runs) == [0, 10, 20]


async def test_once_it_is_to_hurry_no_call_waits_for_others(place: Place, held: Held) -> None:
    held.goes_on.set()
    place.serve(held.handler, max_wait=LATE)
    waits = place.begin(1)
    await asyncio.sleep(SOON)
    assert not waits.began
    place.executor.hurry()
    assert await waits.end() == ("returned", 10)
    assert await place.begin(2).end() == ("returned", 20)


async def test_a_def_handler_takes_its_list_in_a_thread(place: Place) -> None:
    def handler(x: list[int], contexts: list[Context]) -> list[str]:
        assert [it.method for it in contexts] == ["method", "method"]
        assert len({it.correlation_id for it in contexts}) == 2
        return [f"{it} {threading.current_thread().name[:4]}" for it in x]

    place.serve(handler, max_size=2)
    runs = [place.begin(1), place.begin(2)]
    assert await place.values(runs) == ["1 rpcq", "2 rpcq"]
    assert not any(run.outlasts for run in runs)


async def test_calls_that_a_handler_makes_inherit_the_latest_deadline_of_its_calls(place: Place) -> None:
    seen: list[float] = []

    async def handler(x: list[int]) -> list[int]:
        seen.append(deadlines.current.get() - time.monotonic())
        return x

    place.serve(handler, max_size=2)
    await place.values([place.begin(1, seconds=2.0), place.begin(2, seconds=4.0)])
    assert 3 < seen[0] <= 4


# Each ends for itself.


class Bad(DomainError):
    pass


@pytest.mark.parametrize("in_thread", [False, True])
async def test_an_exception_in_the_list_is_the_error_of_its_call_alone(place: Place, in_thread: bool) -> None:
    error = Bad("1")

    async def handler(x: list[int]) -> list[int | Bad]:
        return [error if it == 1 else it for it in x]

    def blocking(x: list[int]) -> list[int | Bad]:
        return [error if it == 1 else it for it in x]

    place.serve(blocking if in_thread else handler, max_size=3)
    runs = [place.begin(x) for x in range(3)]
    assert [await run.end() for run in runs] == [("returned", 0), ("raised", error), ("returned", 2)]


@pytest.mark.parametrize("in_thread", [False, True])
async def test_what_the_handler_raises_each_call_raises_with_the_same_traceback(place: Place, in_thread: bool) -> None:
    async def handler(x: list[int]) -> list[int]:
        raise Bad(str(len(x)))

    def blocking(x: list[int]) -> list[int]:
        raise Bad(str(len(x)))

    frames: list[int] = []

    class Counting(Recorded):
        def raised(self, invocation: Invocation, error: BaseException) -> None:
            frames.append(_frames(error))
            super().raised(invocation, error)

    place.serve(blocking if in_thread else handler, max_size=3)
    runs = [Counting() for _ in range(3)]
    now = time.monotonic()
    for run in runs:
        place.executor.begin(run, Asked(place.method, ((1,), {}), now + SECONDS), now)
    ends = [await run.end() for run in runs]
    assert [(how, str(error)) for how, error in ends] == [("raised", "3")] * 3
    assert len(set(frames)) == 1
    assert place.sizes == [3]


def _frames(error: BaseException) -> int:
    count, at = 0, error.__traceback__
    while at is not None:
        count, at = count + 1, at.tb_next
    return count


@pytest.mark.parametrize(
    ("value", "got"), [([1], "got 1"), ([1, 2, 3], "got 3"), (None, "got a NoneType"), ({1: 1, 2: 2}, "got a dict")]
)
async def test_a_handler_that_does_not_return_a_result_for_each_call_is_told_so_by_each_call(
    place: Place, value: Any, got: str
) -> None:
    async def handler(x: list[int]) -> Any:
        return value

    place.serve(handler, max_size=2)
    for run in [place.begin(1), place.begin(2)]:
        how, error = await run.end()
        assert how == "raised"
        assert isinstance(error, Unfit)
        assert error.error.executed == "yes"
        assert error.error.message == f"service.method must return a list of 2 results, one for each call; {got}"


async def test_a_handler_that_cancels_itself_has_raised_for_each_call(place: Place) -> None:
    async def handler(x: list[int]) -> list[int]:
        raise asyncio.CancelledError

    place.serve(handler, max_size=2)
    for run in [place.begin(1), place.begin(2)]:
        how, error = await run.end()
        assert how == "raised"
        assert "cancelled itself" in str(error)


async def test_a_call_that_leaves_before_its_batch_begins_never_reaches_the_handler(place: Place, held: Held) -> None:
    held.goes_on.set()
    place.serve(held.handler, max_wait=4 * SOON)
    stays, leaves, expires = place.begin(1), place.begin(2), place.begin(3, seconds=SOON)
    await asyncio.sleep(0.01)
    place.executor.cancel(leaves)
    assert await leaves.end() == ("interrupted", Interruption.CANCELLED)
    assert await expires.end() == ("interrupted", Interruption.TIMED_OUT_UNBEGUN)
    assert await stays.end() == ("returned", 10)
    assert held.got == [[1]]
    assert not leaves.began
    assert not leaves.outlasts
    assert place.sizes == [1]


@pytest.mark.parametrize("why", [Interruption.CANCELLED, Interruption.TIMED_OUT])
async def test_a_call_that_leaves_while_the_handler_runs_ends_alone_and_the_handler_goes_on(
    place: Place, held: Held, why: Interruption
) -> None:
    place.serve(held.handler, max_size=2)
    leaves = place.begin(1, seconds=SOON if why is Interruption.TIMED_OUT else SECONDS)
    stays = place.begin(2)
    await until(lambda: held.got)
    if why is Interruption.CANCELLED:
        place.executor.cancel(leaves)
    assert await leaves.end() == ("interrupted", why)
    assert leaves.ran_on
    assert leaves.outlasts
    held.goes_on.set()
    assert await stays.end() == ("returned", 20)
    assert not leaves.outlasts
    assert len(leaves.ends) == 1
    assert not held.cancelled


async def test_a_handler_whose_calls_have_all_left_is_cancelled_and_the_next_batch_begins(
    place: Place, held: Held
) -> None:
    place.serve(held.handler, max_size=2)
    leave = [place.begin(1, seconds=SOON), place.begin(2, seconds=SOON)]
    next_ones = [place.begin(3), place.begin(4)]
    for run in leave:
        assert await run.end() == ("interrupted", Interruption.TIMED_OUT)
    await until(lambda: len(held.got) == 2)
    assert held.cancelled == 1
    assert not any(run.outlasts for run in leave)
    held.goes_on.set()
    assert await place.values(next_ones) == [30, 40]


async def test_a_thread_whose_calls_have_all_left_goes_on_and_no_other_batch_begins_meanwhile(
    place: Place, held: Held
) -> None:
    place.serve(held.in_thread, max_size=1)
    leaves = place.begin(1, seconds=SOON)
    waits = place.begin(2)
    assert await leaves.end() == ("interrupted", Interruption.TIMED_OUT)
    assert leaves.ran_on
    assert leaves.outlasts
    await asyncio.sleep(SOON)
    assert held.got == [[1]]
    held.thread_goes_on.set()
    assert await waits.end() == ("returned", 20)
    assert not leaves.outlasts


async def test_calls_that_leave_before_a_thread_is_free_never_reach_the_handler(place: Place, held: Held) -> None:
    place.serve(held.in_thread, max_size=1, max_concurrency=4)
    busy = [place.begin(1), place.begin(2)]  # both threads
    await until(lambda: len(held.got) == 2)
    leaves, stays = place.begin(3, seconds=SOON), place.begin(4)
    assert await leaves.end() == ("interrupted", Interruption.TIMED_OUT_UNBEGUN)
    assert not leaves.ran_on
    assert not leaves.outlasts
    held.thread_goes_on.set()
    assert await place.values([*busy, stays]) == [10, 20, 40]
    assert held.got == [[1], [2], [4]]


async def test_where_no_thread_can_be_started_each_call_is_refused(place: Place) -> None:
    def handler(x: list[int]) -> list[int]:
        return x

    place.serve(handler, max_size=2)
    await place.values([place.begin(1), place.begin(2)])
    await place.executor.abandon([])
    for run in [place.begin(1), place.begin(2)]:
        how, error = await run.end()
        assert how == "raised"
        assert isinstance(error, Refused)
        assert isinstance(error.error, ServiceUnavailable)
        assert not run.began


@pytest.mark.parametrize("in_thread", [False, True])
async def test_batches_that_run_when_all_are_abandoned_are_cut_off_and_calls_that_wait_have_not_begun(
    place: Place, held: Held, in_thread: bool
) -> None:
    place.serve(held.in_thread if in_thread else held.handler, max_size=2)
    run = [place.begin(1), place.begin(2)]
    await until(lambda: held.got)
    wait = [place.begin(3), place.begin(4)]
    await asyncio.sleep(0.01)
    await place.executor.abandon([*run, *wait])
    assert [it.ends for it in run] == [[("interrupted", Interruption.CUT_OFF)]] * 2
    assert [it.ends for it in wait] == [[("interrupted", Interruption.CUT_OFF_UNBEGUN)]] * 2
    held.thread_goes_on.set()
    await asyncio.sleep(SOON)
    assert held.got == [[1, 2]]
    assert not [it for it in asyncio.all_tasks() if "batch" in it.get_name()]


async def test_a_handler_that_does_not_let_itself_be_cancelled_is_left_behind(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "CANCEL_TIMEOUT", 0.02)
    entered, goes_on = asyncio.Event(), asyncio.Event()

    async def stick(x: list[int]) -> list[int]:
        entered.set()
        while not goes_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await goes_on.wait()
        return x

    place.serve(stick, max_size=1)
    run = place.begin(1)
    await entered.wait()
    await place.executor.abandon([run])
    assert run.ends == [("interrupted", Interruption.CUT_OFF)]
    goes_on.set()
    await until(lambda: not run.outlasts)
    assert len(run.ends) == 1


# Defined.


async def test_parameters_of_one_call_are_validated_alone(place: Place) -> None:
    async def handler(x: list[int], y: tuple[int, ...] | None = None) -> list[int]:
        return x

    service = Service("service")
    with pytest.raises(ConfigurationError, match=r"'y' of service\.method must be a list"):
        service.method(name="method", batch=Batch())(handler)

    async def right(x: list[int], y: list[str] = ["a"]) -> list[int]:  # noqa: B006
        return x

    service.method(name="method", batch=Batch())(right)
    parameters = service.methods["method"].parameters
    assert parameters.read(b'{"x": 1}')[1] == {"x": 1, "y": "a"}
    with pytest.raises(InvalidParams, match="x: Input should be a valid integer"):
        parameters.read(b'{"x": [1]}')
    assert str(service.methods["method"].signature) == "(x: int, y: str = 'a') -> int"


async def test_a_batch_has_a_list_of_contexts() -> None:
    service = Service("service")

    async def handler(context: Context, x: list[int]) -> list[int]:
        return x

    with pytest.raises(ConfigurationError, match=r"'context' of service.method must be a list\[Context\]"):
        service.method(name="method", batch=Batch())(handler)


async def test_batch_must_be_a_batch() -> None:
    async def handler(x: list[int]) -> list[int]:
        return x

    with pytest.raises(ConfigurationError, match=r"batch must be a Batch\(...\) or None; got 32"):
        Service("service").method(name="method", batch=32)(handler)  # type: ignore[call-overload]


# Any order of all that.


class Entered:
    """A batch that the handler got, and what is to become of it."""

    def __init__(self, numbers: list[int], loop: asyncio.AbstractEventLoop) -> None:
        self.numbers = numbers
        self.end: asyncio.Future[list[Any]] = loop.create_future()
        self.over = False


INDEX = st.integers(0, 10_000)


class AnyOrder(RuleBasedStateMachine):
    """Each call ends once, with its own part, in time; and never more runs at once, or in one batch, than may."""

    @initialize(size=st.integers(1, 4), wait=st.sampled_from([0, 0.05, 1.0]), most=st.integers(1, 3))
    def open(self, size: int, wait: float, most: int) -> None:
        self.loop = HeldLoop()
        asyncio.set_event_loop(self.loop)
        self.patch = mock.patch.object(rpcq.runtime.timeouts, "time", SimpleNamespace(monotonic=lambda: self.loop.now))
        self.patch.start()
        self.options = Batch(size, wait, most)
        self.entered: list[Entered] = []
        self.runs: list[Recorded] = []
        self.begun: list[float] = []
        self.deadlines: list[float] = []
        self.sizes: list[int] = []
        service = Service("service")
        service.method(name="method", batch=self.options)(self.handle)
        self.method = service.methods["method"]
        self.executor = Executor(1, on_batch=lambda _, size, __: self.sizes.append(size))

        async def opened() -> None:
            self.executor.open()

        self.loop.run_until_complete(opened())

    async def handle(self, number: list[int]) -> list[int]:
        batch = Entered(number, self.loop)
        self.entered.append(batch)
        try:
            return await batch.end
        finally:
            batch.over = True

    def running(self) -> list[Entered]:
        return [it for it in self.entered if not it.over]

    @rule(seconds=st.sampled_from([0.03, 0.5, 5.0]), count=st.integers(1, 5))
    def call(self, seconds: float, count: int) -> None:
        for _ in range(count):
            run = Recorded()
            self.runs.append(run)
            self.begun.append(self.loop.now)
            self.deadlines.append(self.loop.now + seconds)
            invocation = Asked(self.method, ((len(self.runs) - 1,), {}), self.loop.now + seconds)
            self.executor.begin(run, invocation, self.loop.now)
        self.loop.settle_down()

    @rule(index=INDEX)
    def cancel(self, index: int) -> None:
        if under_way := [it for it in self.runs if not it.ends]:
            self.executor.cancel(under_way[index % len(under_way)])
            self.loop.settle_down()

    @rule(seconds=st.sampled_from([0.01, 0.05, 0.5, 2.0]))
    def wait(self, seconds: float) -> None:
        self.loop.pass_time(seconds)

    @rule(index=INDEX, bad=st.sets(st.integers(0, 3)), how=st.sampled_from(["list", "raise", "short", "no list"]))
    def end(self, index: int, bad: set[int], how: str) -> None:
        if not (running := self.running()):
            return
        batch = running[index % len(running)]
        under_way = [it for it in batch.numbers if not self.runs[it].ends]
        results: list[Any] = [Bad(str(it)) if at in bad else 10 * it for at, it in enumerate(batch.numbers)]
        if how == "raise":
            batch.end.set_exception(Bad("all"))
        else:
            batch.end.set_result({"list": results, "short": results[1:], "no list": None}[how])  # type: ignore[arg-type]
        self.loop.settle_down()
        for at, number in enumerate(batch.numbers):
            if number not in under_way:
                continue
            ((ended, what),) = self.runs[number].ends
            if how == "list" and at not in bad:
                assert (ended, what) == ("returned", 10 * number)
            else:
                assert ended == "raised"
                expected = {"list": str(number), "raise": "all"}.get(how)
                assert isinstance(what, Unfit) if expected is None else str(what) == expected

    @rule()
    def hurry(self) -> None:
        self.executor.hurry()
        self.loop.settle_down()

    @invariant()
    def no_more_than_may(self) -> None:
        assert len(self.running()) <= self.options.max_concurrency
        assert all(1 <= len(it.numbers) <= self.options.max_size for it in self.entered)
        got = [number for it in self.entered for number in it.numbers]
        assert len(got) == len(set(got))  # nothing runs twice

    @invariant()
    def each_ends_once_and_in_time_and_says_whether_it_ran(self) -> None:
        got = {number for it in self.entered for number in it.numbers}
        for number, run in enumerate(self.runs):
            assert len(run.ends) <= 1
            assert run.began == (number in got)
            if not run.ends:
                assert self.loop.now <= self.deadlines[number]
            elif run.ends[0] == ("interrupted", Interruption.TIMED_OUT):
                assert number in got
            elif run.ends[0] == ("interrupted", Interruption.TIMED_OUT_UNBEGUN):
                assert number not in got
            assert run.outlasts == any(number in it.numbers for it in self.running())

    @invariant()
    def nobody_waits_without_need(self) -> None:
        got = {number for it in self.entered for number in it.numbers}
        waiting = [it for it, run in enumerate(self.runs) if not run.ends and it not in got]
        if len(self.running()) < self.options.max_concurrency:
            assert len(waiting) < self.options.max_size
            assert all(self.loop.now - self.begun[it] <= self.options.max_wait + 0.02 for it in waiting)

    @invariant()
    def a_batch_that_nobody_waits_for_is_cancelled(self) -> None:
        assert all(any(not self.runs[number].ends for number in it.numbers) for it in self.running())

    def teardown(self) -> None:
        if not hasattr(self, "executor"):
            return
        self.loop.run_until_complete(self.executor.abandon(self.runs))  # type: ignore[arg-type]
        self.loop.settle_down()
        assert all(len(run.ends) == 1 for run in self.runs)
        assert sum(self.sizes) == sum(len(it.numbers) for it in self.entered)
        assert not asyncio.all_tasks(self.loop)
        self.patch.stop()
        self.loop.close()
        asyncio.set_event_loop(None)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
