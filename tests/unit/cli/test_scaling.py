"""`rpcq worker --processes MIN:MAX --scale-on-depth N`: what is decided and looked at, and bad input.

`tests/faults/test_scaling.py` has it with worker processes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pika
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcq import AnyEvent, Service, Worker
from rpcq.cli.depth import job_queues, watch_depth
from rpcq.cli.options import WORKER
from rpcq.cli.scaling import LOOKS, MOST, Processes, Scaling, check_scaling, read_processes
from rpcq.cli.serving import SETTLING, grace_of
from rpcq.cli.supervising import supervise
from rpcq.errors import ConfigurationError
from rpcq.options import WorkerOptions
from rpcq.url import parse
from rpcq.wire.job_queues import ORDERED_LANES
from support.command import Rpcq
from support.ports import free_ports


def numbers(scaling: Scaling, depths: Sequence[int | None]) -> list[int]:
    """How many processes there are to be after each look."""
    found = []
    for depth in depths:
        scaling.look(depth)
        found.append(scaling.processes)
    return found


def test_it_begins_with_the_least() -> None:
    assert Scaling(Processes(2, 8), 100).processes == 2


def test_it_grows_at_once_to_as_many_as_the_depth_takes() -> None:
    assert numbers(Scaling(Processes(1, 8), 100), [100, 101, 450, 451, 2000]) == [1, 2, 5, 5, 8]


def test_it_shrinks_by_one_after_enough_looks_in_a_row() -> None:
    scaling = Scaling(Processes(1, 8), 100)
    assert numbers(scaling, [300, *[200] * (LOOKS - 1)]) == [3] * LOOKS
    assert numbers(scaling, [200]) == [2]
    assert numbers(scaling, [0] * LOOKS) == [2] * (LOOKS - 1) + [1]
    assert numbers(scaling, [0] * 3 * LOOKS) == [1] * 3 * LOOKS


@pytest.mark.parametrize("other", [201, 300, None])
def test_a_look_that_finds_more_or_nothing_begins_the_row_anew(other: int | None) -> None:
    scaling = Scaling(Processes(1, 8), 100)
    row = [0] * (LOOKS - 1)
    assert set(numbers(scaling, [300, *row, other, *row])) == {3}
    assert numbers(scaling, [0]) == [2]


def test_a_depth_in_the_gap_changes_nothing() -> None:
    assert set(numbers(Scaling(Processes(1, 8), 100), [250] + [201, 300] * 5 * LOOKS)) == {3}


def test_without_a_depth_the_number_stays() -> None:
    assert set(numbers(Scaling(Processes(1, 8), 100), [300] + [None] * 5 * LOOKS)) == {3}


def test_a_change_says_what_it_is_and_why() -> None:
    scaling = Scaling(Processes(1, 8), 100)
    grown = scaling.look(250)
    assert grown is not None
    assert (grown.before, grown.after, grown.waiting) == (1, 3, 250)
    assert grown.reason == "250 jobs wait: more than 100 for each process"
    assert [scaling.look(7) for _ in range(LOOKS - 1)] == [None] * (LOOKS - 1)
    shrunk = scaling.look(7)
    assert shrunk is not None
    assert (shrunk.before, shrunk.after, shrunk.waiting) == (3, 2, 7)
    assert shrunk.reason == f"at {LOOKS} looks in a row, no more than 200 jobs waited"


@given(
    least=st.integers(1, 5),
    more=st.integers(1, 5),
    depth=st.integers(1, 50),
    looks=st.lists(st.none() | st.integers(0, 600), max_size=60),
)
def test_whatever_it_sees_it_keeps_its_bounds_and_stops_one_at_most(
    least: int, more: int, depth: int, looks: list[int | None]
) -> None:
    scaling = Scaling(Processes(least, least + more), depth)
    for waiting in looks:
        before = scaling.processes
        change = scaling.look(waiting)
        assert least <= scaling.processes <= least + more
        assert scaling.processes >= before - 1
        assert (change is None) == (scaling.processes == before)
        assert change is None or (change.before, change.after) == (before, scaling.processes)
        if waiting is not None:  # never fewer than the depth takes, within the bounds
            assert scaling.processes >= min(-(-waiting // depth), least + more)


# Bad input.


def test_a_number_and_a_range_of_processes_are_read() -> None:
    assert read_processes("4") == Processes(4, 4)
    assert read_processes("1:8") == Processes(1, 8)
    assert read_processes(f"1:{MOST}") == Processes(1, MOST)


@pytest.mark.parametrize(
    "text",
    ["8:1", "0:4", "a:b", "4:4", "0", "1001", "1:1001", "", ":", "1:", ":8", "-1:4", "1:2:3", "1.5", "1:8 ", "²"],
)
def test_what_is_no_number_of_processes_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_processes(text)
    assert str(caught.value) == (
        "--processes must be a number from 1 to 1000, or a range MIN:MAX of them with MIN below MAX, such as 1:8; "
        f"got {text!r}"
    )


@pytest.mark.parametrize(
    ("processes", "depth", "every", "reload", "said"),
    [
        ("1", 100, 5.0, False, "--scale-on-depth needs a range of processes: --processes 1:8; got --processes 1"),
        ("4", 100, 5.0, False, "--scale-on-depth needs a range of processes: --processes 1:8; got --processes 4"),
        ("1:8", 0, 5.0, False, "--scale-on-depth must be a number of jobs, at least 1; got 0"),
        ("1:8", -3, 5.0, False, "--scale-on-depth must be a number of jobs, at least 1; got -3"),
        (
            "2:8",
            None,
            5.0,
            False,
            (
                "a range of processes needs the number of waiting jobs for each of them: --scale-on-depth 100; "
                "got --processes 2:8 alone"
            ),
        ),
        (
            "1:8",
            100,
            5.0,
            True,
            "--reload cannot be used with a range of processes: give one number to --processes",
        ),
        ("1:8", 100, 0.0, False, "--scale-every must be a number of seconds above 0; got 0.0"),
        ("1:8", 100, float("nan"), False, "--scale-every must be a number of seconds above 0; got nan"),
    ],
)
def test_options_of_scaling_that_do_not_fit_are_refused(
    processes: str, depth: int | None, every: float, reload: bool, said: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_scaling(read_processes(processes), depth, every, reload=reload)
    assert str(caught.value) == said


SCALED = ("--processes", "1:8", "--scale-on-depth", "100")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--scale-on-depth", "100"), "needs a range of processes"),
        (SCALED, "--scale-on-depth needs a service with jobs"),
        ((*SCALED, "--url", "memory://"), "--scale-on-depth needs RabbitMQ; got memory://"),
    ],
)
def test_the_command_refuses_what_cannot_be_scaled(rpcq: Rpcq, arguments: tuple[str, ...], said: str) -> None:
    assert said in rpcq.refused("worker", "services:things", *arguments, code=2)


# Looking at the queues.


@contextmanager
def watching(url: str, queues: list[str]) -> Iterator[list[int | None]]:
    """What looks at the queues find; they go on until the end of the block."""
    found: list[int | None] = []
    task = asyncio.create_task(watch_depth(parse(url), WorkerOptions(), queues, 0.01, found.append))
    try:
        yield found
        assert not task.done()
    finally:
        task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)


@pytest.mark.long
async def test_the_depth_is_that_of_all_queues_of_jobs_and_of_none_that_does_not_exist(
    rabbitmq_url: str, namespace: str
) -> None:
    one, two, calls = Service("one"), Service("two", lanes=True, ordered=True), Service("calls")
    one.job(name="work")(asyncio.sleep)
    two.job(name="work")(asyncio.sleep)
    queues = job_queues([one, two, calls], namespace)
    names = (
        "one",
        "one:suspects",
        "two",
        "two:high",
        "two:low",
        *(f"two:{lane}" for lane in ORDERED_LANES),
        "two:suspects",
    )
    assert queues == [f"{namespace}.job.{name}" for name in names]
    with watching(rabbitmq_url, queues) as found:
        await until(lambda: found == [0] or len(found) > 1)
        async with Worker(one, two, url=rabbitmq_url, namespace=namespace):
            pass
        with pika.BlockingConnection(pika.URLParameters(rabbitmq_url)) as connection:
            for queue, messages in zip(queues, range(1, len(queues) + 1), strict=True):
                for _ in range(messages):
                    connection.channel().basic_publish("", queue, b"")
        await until(lambda: found[-1] == sum(range(1, len(queues) + 1)))
        assert None not in found


async def test_a_depth_that_cannot_be_read_is_told_once_and_the_next_node_is_asked(
    rabbitmq_url: str, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rpcq.supervisor")
    parts = urlsplit(rabbitmq_url)
    user, _, here = parts.netloc.rpartition("@")
    closed = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    with watching(parts._replace(netloc=f"{user}@{closed},{here}").geturl(), [f"{namespace}.job.none"]) as found:
        await until(lambda: 0 in found)
    assert found[:3] == [None, None, 0]
    assert [record.event for record in caplog.records if record.name == "rpcq.supervisor"] == [
        "the depth of the job queues cannot be read; the processes stay",
        "the depth of the job queues can be read again",
    ]


# Supervising.


async def test_a_watch_that_fails_stops_all_processes_and_its_error_is_raised(tmp_path: Path) -> None:
    program = "import os, pathlib, time; pathlib.Path('began').write_text(str(os.getpid())); time.sleep(60)"
    command = [sys.executable, "-c", program]

    async def watch(found: Callable[[int | None], None]) -> None:
        while not ((tmp_path / "began").exists() and (tmp_path / "began").read_text()):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)
        raise LookupError("a bug")

    with chdir(tmp_path), pytest.raises(LookupError, match="a bug"):
        await supervise(command, os.environ, 2, reload=None, scaling=Scaling(Processes(1, 2), 1), watch=watch)
    assert not psutil.pid_exists(int((tmp_path / "began").read_text()))


def test_the_grace_of_scaled_workers_is_longer_than_any_job_or_event_may_run() -> None:
    jobs, events, neither = Service("jobs"), Service("events"), Service("neither")

    @jobs.job(timeout=70)
    async def do() -> None: ...

    @events.on("order.*", timeout=80)
    async def hear(event: AnyEvent) -> None: ...

    assert grace_of([jobs, neither]) == 70 + SETTLING
    assert grace_of([jobs, events]) == 80 + SETTLING
    assert grace_of([events]) == 80 + SETTLING
    assert grace_of([neither]) == WORKER.grace
