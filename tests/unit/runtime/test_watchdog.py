"""The watchdog, with real loops that are really blocked."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

from rpcq import Client, Service, Worker
from rpcq.runtime.watchdog import Watchdog
from support.logged import event_of

LIMIT = 0.1
BLOCK = 0.25
BLOCKED, GOES_ON, STOOD_STILL = "event loop blocked", "event loop goes on", "event loop stood still"

Run = Callable[[Coroutine[Any, Any, None]], None]


def new_uvloop() -> asyncio.AbstractEventLoop:
    loop: asyncio.AbstractEventLoop = pytest.importorskip("uvloop").new_event_loop()
    return loop


def run(main: Coroutine[Any, Any, None], new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
    with asyncio.Runner(debug=True, loop_factory=new_loop) as runner:
        runner.run(main)


def run_uvloop(main: Coroutine[Any, Any, None]) -> None:
    run(main, new_uvloop)


def new_eager() -> asyncio.AbstractEventLoop:
    """One that runs a task's first step where it is made; CPython has it from 3.12 on."""
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)
    return loop


def run_eager(main: Coroutine[Any, Any, None]) -> None:
    run(main, new_eager)


RUNS = {"asyncio": run, "uvloop": run_uvloop} | ({"eager": run_eager} if hasattr(asyncio, "eager_task_factory") else {})
every_loop = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


@pytest.fixture(autouse=True)
def logs(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.DEBUG, logger="rpcq")
    yield caplog
    assert not [it for it in threading.enumerate() if it.name == "rpcq-watchdog"]


def said(logs: pytest.LogCaptureFixture) -> list[str]:
    return [event_of(record) for record in logs.records if event_of(record) in (BLOCKED, GOES_ON, STOOD_STILL)]


def records(logs: pytest.LogCaptureFixture, message: str) -> list[dict[str, Any]]:
    return [vars(record) for record in logs.records if event_of(record) == message]


def name(task: asyncio.Task[Any]) -> dict[str, Any]:
    return {"method": f"m.{task.get_name()}", "correlation_id": "c-1"}


async def block(seconds: float = BLOCK) -> None:
    time.sleep(seconds)  # noqa: ASYNC251 - what all this is about


def line_of(function: Callable[..., object], offset: int = 1) -> str:
    code = function.__code__
    return f"test_watchdog.py:{code.co_firstlineno + offset} in {code.co_qualname}"


async def titled(blocking: Callable[[], Coroutine[Any, Any, None]], title: str) -> None:
    """Name the task from inside: a loop that starts tasks at once names them afterwards."""
    task = asyncio.current_task()
    assert task is not None
    task.set_name(title)
    await blocking()


async def until_told(
    logs: pytest.LogCaptureFixture,
    count: int = 1,
    blocking: Callable[[], Coroutine[Any, Any, None]] = block,
    title: str = "slow",
) -> None:
    """Block until it is told; again where a busy machine kept the watchdog itself from looking in time."""
    while said(logs).count(GOES_ON) < count:
        before = len(said(logs))
        await asyncio.create_task(titled(blocking, title))
        while len(said(logs)) == before or said(logs)[-1] == BLOCKED:  # noqa: ASYNC110 - nothing sets an event
            await asyncio.sleep(0.01)


@every_loop
def test_it_names_the_handler_that_blocks_and_where_it_stands_and_tells_how_long_it_took(
    run: Run, logs: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        watchdog = Watchdog(asyncio.get_running_loop(), LIMIT, name)
        await until_told(logs)
        watchdog.close()
        assert watchdog.blocks == 1
        assert watchdog.longest >= BLOCK

    run(main())
    assert [it for it, _ in itertools.groupby(said(logs)) if it != STOOD_STILL] == [BLOCKED, GOES_ON]
    for record in (*records(logs, BLOCKED), *records(logs, GOES_ON)):
        assert record["levelno"] == logging.WARNING
        assert record["method"] == "m.slow"
        assert record["correlation_id"] == "c-1"
        assert record["at"] == line_of(block)
    assert records(logs, BLOCKED)[0]["blocked_for"] >= LIMIT
    assert records(logs, GOES_ON)[0]["blocked_for"] >= BLOCK


def test_two_blocks_are_told_one_by_one(logs: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        watchdog = Watchdog(asyncio.get_running_loop(), LIMIT, name)
        for count, title in enumerate(("first", "second"), 1):
            await until_told(logs, count, title=title)
        watchdog.close()
        assert watchdog.blocks == 2

    run(main())
    assert [it for it, _ in itertools.groupby(said(logs)) if it != STOOD_STILL] == [BLOCKED, GOES_ON] * 2
    assert [it["method"] for it in records(logs, GOES_ON)] == ["m.first", "m.second"]
    assert [it for it, _ in itertools.groupby(records(logs, BLOCKED), lambda it: it["method"])] == [
        "m.first",
        "m.second",
    ]


def test_it_says_rarely_that_it_still_hangs(logs: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        watchdog = Watchdog(asyncio.get_running_loop(), LIMIT, name)
        await until_told(logs, blocking=lambda: block(0.8))
        watchdog.close()
        assert watchdog.blocks == 1

    run(main())
    told = [record["blocked_for"] for record in records(logs, BLOCKED)]
    assert len(told) >= 2
    assert all(later >= 2 * earlier - 0.002 for earlier, later in itertools.pairwise(told))  # it is rounded
    assert records(logs, GOES_ON)[0]["blocked_for"] >= 0.8


@every_loop
def test_it_points_at_the_code_that_called_a_library_and_not_at_what_runs_the_loop(
    run: Run, logs: pytest.LogCaptureFixture
) -> None:
    async def by_a_library() -> None:
        subprocess.run(["sleep", str(BLOCK)], check=True)  # noqa: ASYNC221

    async def by_a_callback() -> None:
        asyncio.get_running_loop().call_soon(time.sleep, BLOCK)  # no task, and no code but the library's

    async def main() -> None:
        watchdog = Watchdog(asyncio.get_running_loop(), LIMIT, name)
        await asyncio.sleep(0.05)
        await until_told(logs, 1, by_a_library)
        await until_told(logs, 2, by_a_callback)
        watchdog.close()

    run(main())
    assert records(logs, BLOCKED)[0]["at"] == line_of(by_a_library)
    of_a_callback = records(logs, GOES_ON)[1]
    assert "method" not in of_a_callback
    assert "test_watchdog" not in of_a_callback["at"]


def test_it_tells_of_c_code_that_holds_up_its_own_thread(logs: pytest.LogCaptureFixture) -> None:
    size, took = 18, 0.0
    while took < 1.5 * LIMIT:
        size += 1
        began = time.thread_time()
        re.match("(a+)+$", "a" * size + "b")
        took = time.thread_time() - began

    async def backtrack() -> None:
        nonlocal took
        began = time.monotonic()
        re.match("(a+)+$", "a" * size + "b")
        took = time.monotonic() - began

    async def main() -> None:
        watchdog = Watchdog(asyncio.get_running_loop(), LIMIT, name)
        await asyncio.sleep(0.05)
        await until_told(logs, 1, backtrack, "backtrack")
        watchdog.close()
        assert watchdog.longest >= took

    run(main())
    assert records(logs, GOES_ON)[0]["blocked_for"] >= round(took, 3)
    assert {it.get("method", "m.backtrack") for it in records(logs, BLOCKED)} == {"m.backtrack"}


def test_nothing_is_said_where_nothing_blocks(logs: pytest.LogCaptureFixture) -> None:
    async def awaits() -> None:
        for _ in range(100):
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)

    async def main() -> None:
        watchdog = Watchdog(asyncio.get_running_loop(), 0.5, name)
        await asyncio.sleep(0.3)
        await asyncio.gather(*(awaits() for _ in range(10)))
        watchdog.close()
        assert (watchdog.blocks, watchdog.longest) == (0, 0.0)

    run(main())
    assert not said(logs)


def test_a_loop_that_does_not_run_is_not_blocked(logs: pytest.LogCaptureFixture) -> None:
    with asyncio.Runner() as runner:
        watchdog = Watchdog(runner.get_loop(), LIMIT, name)
        time.sleep(BLOCK)
        runner.run(asyncio.sleep(0.05))
        time.sleep(BLOCK)
        watchdog.close()
    assert BLOCKED not in said(logs)


@every_loop
def test_it_can_be_closed_while_the_loop_is_blocked(run: Run, logs: pytest.LogCaptureFixture) -> None:
    closed_after = []

    async def main() -> None:
        watchdog = Watchdog(asyncio.get_running_loop(), LIMIT, name)

        def close() -> None:
            while BLOCKED not in said(logs):
                time.sleep(0.01)
            watchdog.close()
            closed_after.append(watchdog._thread.is_alive())
            released.set()

        released = threading.Event()
        closer = threading.Thread(target=close)
        closer.start()
        released.wait()  # blocks the loop until then
        closer.join()
        watchdog.close()  # again
        await asyncio.sleep(0.05)

    run(main())
    assert closed_after == [False]
    assert GOES_ON not in said(logs)


@every_loop
def test_a_loop_that_is_closed_first_ends_it(run: Run, logs: pytest.LogCaptureFixture) -> None:
    watchdogs: list[Watchdog] = []

    async def main() -> None:
        watchdogs.append(Watchdog(asyncio.get_running_loop(), LIMIT, name))
        await asyncio.sleep(0.05)

    run(main())
    watchdogs[0]._thread.join()  # by itself
    watchdogs[0].close()
    run(main())
    watchdogs[1].close()
    assert not said(logs)


def test_what_cannot_be_named_is_told_nonetheless(logs: pytest.LogCaptureFixture) -> None:
    def no_name(task: asyncio.Task[Any]) -> dict[str, Any]:
        raise LookupError(task.get_name())

    async def main() -> None:
        watchdog = Watchdog(asyncio.get_running_loop(), LIMIT, no_name)
        for count in (1, 2):
            await until_told(logs, count, title="nameless")
        watchdog.close()
        assert watchdog.blocks == 2

    run(main())
    assert "LookupError: nameless" in logs.text
    assert {it["at"] for it in records(logs, BLOCKED)} == {line_of(block)}


@every_loop
def test_a_handler_that_blocks_is_named_from_its_first_step_on(run: Run, logs: pytest.LogCaptureFixture) -> None:
    service = Service("things")

    @service.method(name="block")
    async def blocks() -> None:
        await block()

    @service.method(name="later")
    async def later() -> None:
        await asyncio.sleep(0.01)
        await block()

    async def main() -> None:
        worker = Worker(service, url="memory://", blocked_after=LIMIT)
        async with worker, Client("memory://") as client:
            for method in ("block", "later"):
                while not any(it.get("method") == f"things.{method}" for it in records(logs, BLOCKED)):
                    await client.call(f"things.{method}")
                    await asyncio.sleep(0.05)
            assert worker.in_flight == 0

    run(main())


STOPPED = """
import asyncio, logging, sys, time
from rpcq.runtime.watchdog import Watchdog

logging.basicConfig(stream=sys.stdout, format="%(event)s")

async def work():
    while True:
        until = time.monotonic() + 0.005
        while time.monotonic() < until:
            pass
        await asyncio.sleep(0)

def name(task):
    print("named", flush=True)
    return {}

async def main():
    watchdog = Watchdog(asyncio.get_running_loop(), 0.5, name)
    tasks = [asyncio.create_task(work()) for _ in range(BUSY)]
    await asyncio.sleep(0.1)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    await asyncio.sleep(0.3)
    watchdog.close()
    print(watchdog.blocks, flush=True)
    [task.cancel() for task in tasks]

asyncio.run(main())
"""


def test_no_handler_is_blamed_for_a_process_that_was_stopped() -> None:
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", STOPPED.replace("BUSY", str(busy))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for busy in (0, 1)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGSTOP)
        while any(psutil.Process(it.pid).status() != psutil.STATUS_STOPPED for it in processes):
            time.sleep(0.01)
        time.sleep(1.2)
        for process in processes:
            process.send_signal(signal.SIGCONT)
        for process in processes:
            *told, blocks = process.communicate("\n")[0].splitlines()
            assert set(told) == {STOOD_STILL}
            assert blocks == "0"
