"""`rpcq worker --processes` and `--reload`: real processes that die, are killed, and change their files."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import psutil
import pytest

from support.command import SERVICES, Process, Rpcq, wait_until

STARTS = """
import os
from pathlib import Path
with Path("starts").open("a") as starts:
    starts.write("x")
"""


FAILING_LIFESPAN = """
from contextlib import asynccontextmanager
from rpcq import Service

@asynccontextmanager
async def lifespan():
    raise OSError("the database is down")
    yield

things = Service("things", lifespan=lifespan)

@things.method
async def add(x: int) -> int:
    return x
"""


def children(process: Process) -> list[psutil.Process]:
    return psutil.Process(process._process.pid).children()


def served(process: Process, times: int) -> Callable[[], bool]:
    return lambda: sum('"worker started"' in line for line in process.lines) >= times


@pytest.mark.long
def test_each_process_serves_and_one_that_is_killed_is_started_again(rpcq: Rpcq) -> None:
    worker = rpcq.start("worker", "--namespace", rpcq.namespace, "services:things", "--processes", "2")
    worker.wait_for(served(worker, 2))
    first = children(worker)
    assert len(first) == 2
    first[0].kill()
    worker.wait_for(served(worker, 3))
    assert any(
        line["event"] == "worker process died" and line["exit_code"] == -signal.SIGKILL for line in worker.logged()
    )
    now = {child.pid for child in children(worker)}
    assert first[1].pid in now
    assert first[0].pid not in now
    assert len(now) == 2
    assert rpcq.call("things.add", "1", "2").stdout == "3\n"
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0
    assert not any(psutil.pid_exists(pid) for pid in now)


@pytest.mark.long
def test_sigterm_lets_the_calls_of_all_processes_end(rpcq: Rpcq) -> None:
    worker = rpcq.start(
        "worker", "--namespace", rpcq.namespace, "services:things", "--processes", "2", "--prefetch", "1"
    )
    worker.wait_for(served(worker, 2))
    held = [
        rpcq.start("call", "--namespace", rpcq.namespace, "things.hold", f"name=held{i}", "until=released")
        for i in range(2)
    ]
    for i in range(2):
        rpcq.until_there_is(f"held{i}")
    worker.signal(signal.SIGTERM)
    (rpcq.folder / "released").touch()
    assert [call.ended() for call in held] == [0, 0]
    assert worker.ended() == 0


def test_a_second_signal_ends_all_processes_at_once_and_exits_with_1(rpcq: Rpcq) -> None:
    worker = rpcq.start("worker", "--namespace", rpcq.namespace, "services:things", "--processes", "2")
    worker.wait_for(served(worker, 2))
    rpcq.start("call", "--namespace", rpcq.namespace, "things.hold", "name=held", "until=never")
    rpcq.until_there_is("held")
    worker.signal(signal.SIGINT)
    worker.wait_for(lambda: len(children(worker)) == 1)
    worker.signal(signal.SIGINT)
    assert worker.ended() == 1


def test_the_processes_end_when_their_supervisor_is_killed(rpcq: Rpcq) -> None:
    worker = rpcq.start("worker", "--namespace", rpcq.namespace, "services:things", "--processes", "2")
    worker.wait_for(served(worker, 2))
    left = children(worker)
    worker.signal(signal.SIGKILL)
    wait_until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in left))


@pytest.mark.long
def test_a_process_that_dies_at_once_is_started_ever_more_slowly(rpcq: Rpcq) -> None:
    (rpcq.folder / "broken.py").write_text(STARTS + "os._exit(9)\n")
    worker = rpcq.start("worker", "broken:things", "--processes", "1", "--reload")
    worker.wait_for(lambda: sum("worker process died" in line for line in worker.lines) >= 3)
    pauses = [line["again_in"] for line in worker.logged() if line["event"] == "worker process died"]
    assert pauses[:3] == [0.5, 1.0, 2.0]
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 1
    assert len((rpcq.folder / "starts").read_text()) == 3


def test_what_no_process_can_serve_is_told_and_not_tried_again(rpcq: Rpcq) -> None:
    worker = rpcq.start("worker", "services:nothing", "--processes", "2")
    assert worker.ended() == 1
    assert "has no service 'nothing'" in "\n".join(worker.lines)
    assert "worker process died" not in "\n".join(worker.lines)


def test_the_urls_password_is_on_no_command_line(rpcq: Rpcq) -> None:
    worker = rpcq.start(
        "worker",
        "services:things",
        "--processes",
        "2",
        "--url",
        "amqp://me:s3cr3t@localhost:1/",
        "--log-level",
        "error",
    )
    wait_until(lambda: len(children(worker)) == 2)
    (own,) = {tuple(psutil.Process(child.ppid()).cmdline()) for child in children(worker)}
    for child in children(worker):
        wait_until(lambda child=child: tuple(child.cmdline()) != own)  # type: ignore[misc]  # it has that until it is executed
        assert "s3cr3t" not in " ".join(child.cmdline())
    worker.signal(signal.SIGTERM)
    worker.ended()


@pytest.mark.long
def test_a_worker_is_started_again_when_its_file_changes_and_mended_when_it_was_broken(rpcq: Rpcq) -> None:
    services = rpcq.folder / "services.py"
    text = services.read_text()
    worker = rpcq.start("worker", "--namespace", rpcq.namespace, "services:things", "--reload")
    worker.wait_for(served(worker, 1))
    worker.wait_for(lambda: any("watching for changes" in line for line in worker.lines))
    assert rpcq.call("things.add", "1", "2").stdout == "3\n"
    services.write_text("this is no Python")
    worker.wait_for(lambda: any("waiting until a Python file changes" in line for line in worker.lines))
    assert "SyntaxError: invalid syntax" in worker.lines
    assert not any("worker process died" in line for line in worker.lines)
    services.write_text(text.replace("return x + y", "return x + y + 1000"))
    worker.wait_for(served(worker, 2))
    assert rpcq.call("things.add", "1", "2").stdout == "1003\n"
    worker.signal(signal.SIGINT)
    assert worker.ended() == 0


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        (STARTS + "import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        (STARTS + "from rpcq import Service\nthings = Service('no dots.')\n", "rpcq: "),
        (STARTS + FAILING_LIFESPAN, "OSError: the database is down"),
    ],
    ids=["missing import", "definition", "lifespan"],
)
def test_what_fails_in_the_users_code_waits_for_a_change_and_is_not_started_again_before(
    rpcq: Rpcq, code: str, shown: str
) -> None:
    (rpcq.folder / "broken.py").write_text(code)
    worker = rpcq.start("worker", "--namespace", rpcq.namespace, "broken:things", "--reload")
    worker.wait_for(lambda: any("waiting until a Python file changes" in line for line in worker.lines))
    assert any(line.startswith(shown) for line in worker.lines), worker.lines
    assert len(worker.lines) < 12, worker.lines
    assert not any("watchfiles" in line or "typer" in line for line in worker.lines)
    # Before, it was started again after 0.5 s. A process that only waits for a change has not been by now.
    ran = rpcq.run("--version")
    assert ran.returncode == 0
    assert (rpcq.folder / "starts").read_text() == "x"
    (rpcq.folder / "broken.py").write_text(SERVICES)
    worker.wait_for(served(worker, 1))
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0


def test_a_worker_that_waits_for_a_change_ends_at_a_signal(rpcq: Rpcq) -> None:
    (rpcq.folder / "broken.py").write_text("1 / 0\n")
    worker = rpcq.start("worker", "broken:things", "--reload")
    worker.wait_for(lambda: any("waiting until a Python file changes" in line for line in worker.lines))
    worker.signal(signal.SIGINT)
    assert worker.ended() == 1


def test_without_watchfiles_reload_says_what_to_install(rpcq: Rpcq) -> None:
    (rpcq.folder / "watchfiles.py").write_text("raise ImportError\n")
    said = rpcq.refused("worker", "services:things", "--reload", code=2, PYTHONPATH=f"{rpcq.folder}{os.pathsep}.")
    assert "pip install '.[reload]'" in said
