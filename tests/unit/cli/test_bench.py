"""`rpcq bench` as a real process, on RabbitMQ and on memory://."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pika
import psutil
import pytest

from rpcq.bench.result import Report, read_report
from rpcq.url import parse
from support.broker import Broker
from support.command import Process, Rpcq, wait_until

SHARED = f"t{secrets.token_hex(8)}"

QUICK = ("--warmup", "200ms")


def report_of(path: Path) -> Report:
    return read_report(path.read_bytes(), path.name)


def run(
    rpcq: Rpcq, *arguments: str, code: int = 0, memory: bool = False
) -> tuple[subprocess.CompletedProcess[str], Report]:
    path = rpcq.folder / "report.json"
    where = ("--url", "memory://") if memory else ("--namespace", rpcq.namespace)
    ran = rpcq.run("bench", *arguments, *QUICK, "--json", str(path), *where)
    assert ran.returncode == code, ran.stderr + ran.stdout
    return ran, report_of(path)


# The built-in echo.


@pytest.mark.long
@pytest.mark.parametrize("memory", [True, False], ids=["memory", "rabbitmq"])
def test_the_open_model_sends_what_is_due_and_every_call_is_accounted_for(rpcq: Rpcq, memory: bool) -> None:
    ran, report = run(rpcq, "--rate", "300", "--duration", "2s", memory=memory)
    (one,) = report.runs
    assert (one.model, one.sent, one.ok, one.failed) == ("open", 600, 600, 0)
    assert one.sent == one.ok + one.failed == one.latency.count == one.service_time.count
    assert (one.checked, one.correct, one.lost, one.duplicated, one.mismatched) == (True, True, 0, 0, 0)
    assert one.handled == one.sent + one.warm_up == 660
    assert one.offered == pytest.approx(300)
    assert sum(it.offered or 0 for it in one.series) == sum(it.sent for it in one.series) == 600
    assert sum(it.ok for it in one.series) == 600
    assert one.handler is not None
    assert one.queue is not None
    assert one.handler.count == one.queue.count == 600
    assert "Open model" in ran.stdout
    assert "1/2 s: " in ran.stderr
    assert report.settings["model"] == "open"
    assert report.host["broker"].startswith("in this process" if memory else "RabbitMQ")


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "rabbitmq"])
def test_the_closed_model_makes_so_many_calls_and_is_labelled_as_hiding_stalls(rpcq: Rpcq, memory: bool) -> None:
    ran, report = run(rpcq, "--concurrency", "20", "-n", "1001", memory=memory)
    (one,) = report.runs
    assert (one.model, one.sent, one.ok, one.offered) == ("closed", 1001, 1001, None)
    assert one.handled == one.sent + one.warm_up
    assert one.warm_up
    assert "hides stalls" in re.sub(r"\s+", " ", ran.stdout)


@pytest.mark.long
@pytest.mark.parametrize("kind", [(), ("--job",)], ids=["calls", "jobs"])
def test_several_generators_and_workers_are_one_test(rpcq: Rpcq, kind: tuple[str, ...]) -> None:
    arguments = ("--processes", "2", "--workers", "2", "--queue-type", "quorum", "--arrivals", "poisson", "--seed", "5")
    _, report = run(rpcq, *kind, "--rate", "200", "--duration", "2s", *arguments)
    (one,) = report.runs
    assert one.ok == one.sent == one.latency.count
    assert one.sent == pytest.approx(400, rel=0.3)
    assert one.correct
    assert one.handled == one.sent + one.warm_up


@pytest.mark.long
def test_what_the_tool_counts_is_what_the_broker_and_the_handlers_count(rpcq: Rpcq) -> None:
    """A service that counts for itself, and a queue that gets a copy of every request."""
    (rpcq.folder / "counting.py").write_text(
        "from rpcq import Service\n"
        "counting = Service('counting')\n"
        "@counting.method\n"
        "async def count(x: int) -> int:\n"
        "    print(x, file=file, flush=True)\n"
        "    return x\n"
        "file = open('counted', 'a')\n"
    )
    rpcq.worker("counting:counting")
    with pika.BlockingConnection(pika.URLParameters(rpcq.url)) as connection:
        channel = connection.channel()
        copies = channel.queue_declare("", exclusive=True).method.queue
        channel.queue_bind(copies, f"{rpcq.namespace}.requests", "counting")
        lines = rpcq.folder / "lines.jsonl"
        lines.write_text("".join(json.dumps({"x": x}) + "\n" for x in range(10)))
        began = time.monotonic()
        _, report = run(rpcq, "counting.count", "--rate", "250", "--duration", "2s", "--params-file", str(lines))
        assert time.monotonic() - began > 2.2
        (one,) = report.runs
        counted = (rpcq.folder / "counted").read_text().split()
        assert one.sent == one.ok == 500
        assert len(counted) == one.sent + one.warm_up
        assert channel.queue_declare(copies, passive=True).method.message_count == len(counted)
        assert {counted.count(str(x)) for x in range(10)} == {len(counted) // 10}  # each line in turn
        channel.queue_delete(f"{rpcq.namespace}.req.counting")
    assert (one.checked, one.handled) == (False, None)


@pytest.mark.long
def test_a_stall_shows_in_the_open_model(rpcq: Rpcq) -> None:
    """The worker is stopped for 2 s of 5: the calls that were due in them waited."""
    rpcq.folder.joinpath("report.json").unlink(missing_ok=True)
    command = ("bench", "--namespace", rpcq.namespace, "--rate", "200", "--duration", "5s", *QUICK)
    bench = rpcq.start(*command, "--json", str(rpcq.folder / "report.json"))
    bench.wait_for(lambda: any(line.startswith("1/5 s") for line in bench.lines))
    (worker,) = [it for it in children(bench) if "rpcq.bench.echo" in it.cmdline()]
    worker.suspend()
    time.sleep(2)
    worker.resume()
    assert bench.ended() == 0
    (one,) = report_of(rpcq.folder / "report.json").runs
    assert one.sent == one.ok == 1000
    assert one.latency.max >= 1900
    assert one.latency.percentiles["99"] > 1500
    assert one.latency.percentiles["50"] < 1000
    assert max(it.depth or 0 for it in one.series) + 100 > 100  # prefetch is at the worker, the rest waits


def children(process: Process) -> list[psutil.Process]:
    return psutil.Process(process._process.pid).children(recursive=True)


@pytest.mark.long
def test_ctrl_c_ends_it_with_the_report_of_what_was_done_and_leaves_nothing(rpcq: Rpcq) -> None:
    path = rpcq.folder / "report.json"
    bench = rpcq.start(
        "bench", "--namespace", rpcq.namespace, "--rate", "100", "--duration", "60s", "--json", str(path)
    )
    bench.wait_for(lambda: any(line.startswith("2/60 s") for line in bench.lines))
    started = children(bench)
    assert len(started) == 2
    bench.signal(signal.SIGINT)
    assert bench.ended() == 130
    report = report_of(path)
    (one,) = report.runs
    assert report.interrupted
    assert 100 < one.sent == one.ok < 1000
    assert one.correct
    wait_until(lambda: not any(it.is_running() for it in started))
    assert "Open model" in bench.output()


@pytest.mark.long
def test_steps_are_reported_one_by_one(rpcq: Rpcq) -> None:
    _, report = run(rpcq, "--step", "100:300:100", "--duration", "500ms", "--ramp", "500ms", memory=True)
    (one,) = report.runs
    assert [it.rate for it in one.steps] == [50, 100, 200, 300]
    assert [it.latency.count for it in one.steps] == [25, 50, 100, 150]
    assert one.sent == 325


@pytest.mark.long
def test_a_target_slower_than_the_rate_is_reported_and_calls_above_the_limit_are_dropped(rpcq: Rpcq) -> None:
    arguments = ("--simulate", "500ms", "--in-flight", "20", "--rate", "200", "--duration", "1s")
    _, report = run(rpcq, *arguments, memory=True)
    (one,) = report.runs
    assert one.dropped > 50
    assert one.sent + one.dropped == 200
    assert any("not sent" in why for why in one.bottleneck)


# Jobs.


@pytest.fixture
def jobs(rpcq: Rpcq) -> Rpcq:
    """The command in a namespace whose delay queues are declared once for all these tests."""
    return Rpcq(rpcq.url, SHARED, rpcq.folder, rpcq.processes)


@pytest.mark.long
@pytest.mark.parametrize("memory", [True, False], ids=["memory", "rabbitmq"])
def test_jobs_are_sent_when_they_are_due_and_each_is_followed_until_it_is_done(
    jobs: Rpcq, broker: Broker, memory: bool
) -> None:
    ran, report = run(jobs, "--job", "--rate", "200", "--duration", "1s", "--simulate", "20ms", memory=memory)
    (one,) = report.runs
    assert (one.kind, one.model, one.sent, one.ok, one.failed) == ("jobs", "open", 200, 200, 0)
    assert (one.checked, one.correct, one.lost, one.duplicated, one.mismatched) == (True, True, 0, 0, 0)
    assert one.handled == one.sent + one.warm_up == 240
    assert one.confirm is not None
    assert one.confirm.count == one.latency.count == one.service_time.count == 200
    assert one.confirmed == pytest.approx(200)
    assert one.latency.min >= one.service_time.min >= 19
    assert report.settings["is_job"]
    assert "200 jobs/s confirmed of 200 offered" in re.sub(r"\s+", " ", ran.stdout)
    if not memory and broker.can_ctl:
        listed = broker.ctl("list_queues", "--vhost", parse(broker.url).vhost, "name")
        assert f"{jobs.namespace}.delay.00" in listed
        assert f"{jobs.namespace}.job.bench-" not in listed
        assert f"{jobs.namespace}.dead.bench-" not in listed


@pytest.mark.long
def test_jobs_that_are_not_done_in_time_are_counted_and_no_success(rpcq: Rpcq) -> None:
    arguments = ("--job", "--rate", "20", "--duration", "1s", "--simulate", "1500ms", "--timeout", "500ms")
    ran, report = run(rpcq, *arguments, "--fail-if", "not_done>0", code=1, memory=True)
    (one,) = report.runs
    assert (one.sent, one.ok, one.not_done) == (20, 0, 20)
    assert one.errors == {"not done": 20}
    assert one.executed == {"maybe": 20}
    assert one.confirm is not None
    assert (one.confirm.count, one.achieved) == (20, 0.0)
    assert one.latency.min >= 490
    assert "failed: not_done > 0: the value is 20" in ran.stderr


def test_jobs_of_a_service_of_yours_are_counted_by_what_became_of_them(jobs: Rpcq) -> None:
    (jobs.folder / "mails.py").write_text(
        "from rpcq import GiveUp, Service\n"
        "mails = Service('mails')\n"
        "@mails.job\n"
        "async def post(x: int) -> None:\n"
        "    print(x, file=file, flush=True)\n"
        "    if x == 3:\n"
        "        raise GiveUp('no')\n"
        "file = open('posted', 'a')\n"
    )
    jobs.worker("mails:mails")
    lines = jobs.folder / "lines.jsonl"
    lines.write_text("".join(json.dumps({"x": x}) + "\n" for x in range(10)))
    _, report = run(jobs, "mails.post", "--job", "--rate", "100", "--duration", "1s", "--params-file", str(lines))
    (one,) = report.runs
    assert (one.sent, one.ok, one.errors, one.executed) == (100, 90, {"JobFailed gave_up": 10}, {"yes": 10})
    assert (one.checked, one.handled) == (False, None)
    posted = (jobs.folder / "posted").read_text().split()
    assert len(posted) == one.sent + one.warm_up
    with pika.BlockingConnection(pika.URLParameters(jobs.url)) as connection:
        channel = connection.channel()
        for queue in ("job.mails", "job.mails:suspects", "dead.mails"):
            channel.queue_delete(f"{jobs.namespace}.{queue}")


# What comes out.


@pytest.mark.long
def test_it_writes_what_it_is_asked_for(rpcq: Rpcq) -> None:
    files = {kind: rpcq.folder / f"out.{kind}" for kind in ("csv", "hgrm", "html")}
    arguments = [it for kind, path in files.items() for it in (f"--{kind}", str(path))]
    _, report = run(rpcq, "--rate", "100", "--duration", "1s", "--repeat", "2", *arguments, memory=True)
    assert len(report.runs) == 2
    assert len(files["csv"].read_text().splitlines()) >= 2
    assert "Percentile" in files["hgrm"].read_text()
    assert files["html"].read_text().startswith("<!doctype html>")
    printed = rpcq.run("bench", "--url", "memory://", "--rate", "50", "--duration", "1s", "--json", "-")
    assert read_report(printed.stdout, "output").runs[0].sent == 50
    compared = rpcq.run("bench", "compare", str(rpcq.folder / "report.json"), str(rpcq.folder / "report.json"))
    assert compared.returncode == 0, compared.stderr
    assert "p99" in compared.stdout


@pytest.mark.long
def test_conditions_decide_the_exit_code(rpcq: Rpcq) -> None:
    common = ("--rate", "100", "--duration", "1s", "--simulate", "30ms")
    run(rpcq, *common, "--fail-if", "p50<20ms", "--fail-if", "errors>0", memory=True)
    ran, _ = run(rpcq, *common, "--fail-if", "p50>20ms", "--fail-if", "errors>0", code=1, memory=True)
    assert "failed: " in ran.stderr
    assert "p50" in ran.stderr
    assert "errors" not in ran.stderr.partition("failed: ")[2]


@pytest.mark.long
def test_errors_of_the_target_are_counted_by_kind(rpcq: Rpcq) -> None:
    rpcq.worker()
    _, report = run(rpcq, "things.fail", "secret=x", "--rate", "50", "--duration", "1s")
    (one,) = report.runs
    assert (one.sent, one.ok, one.errors, one.executed) == (50, 0, {"RemoteError": 50}, {"yes": 50})


# What cannot be.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rate", "5", "--concurrency", "5"), "closed model"),
        (("-n", "5"), "--concurrency"),
        (("--job", "--concurrency", "5"), "--rate or --step"),
        (("--job", "--queue-type", "classic"), "leave out --queue-type"),
        (("--job", "--idempotent"), "leave it out with --job"),
        (("x=5",), "service.method"),
        (("--fail-if", "p99>>50"), "p99>>50"),
        (("--step", "5:1:1"), "FROM:TO:BY"),
        (("things.add", "x=1", "--payload", "5"), "built-in echo"),
        (("--url", "memory://", "--processes", "2"), "memory://"),
        (("--json", "/nowhere/at/all"), "/nowhere/at/all"),
        (("--params-file", "/nowhere"), "/nowhere"),
        (("compare", "one.json"), "two reports"),
        (("compare", "services.py", "services.py"), "is not a report"),
    ],
)
def test_what_does_not_go_together_is_named_before_anything_is_sent(
    rpcq: Rpcq, arguments: tuple[str, ...], said: str
) -> None:
    assert said in rpcq.refused("bench", *arguments, code=2)


def test_a_wrong_time_is_named(rpcq: Rpcq) -> None:
    ran = rpcq.run("bench", "--duration", "soon", "--url", "memory://")
    assert ran.returncode == 2
    assert "soon" in ran.stderr


@pytest.mark.long
def test_a_service_without_a_worker_is_reported_at_once(rpcq: Rpcq) -> None:
    assert "no worker of 'nobody'" in rpcq.refused(
        "bench", "nobody.there", "--rate", "5", "--namespace", rpcq.namespace, code=5
    )


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_one_that_fails_leaves_one_line_on_the_terminal(rpcq: Rpcq, term: str) -> None:
    ours, theirs = pty.openpty()
    ran = subprocess.Popen(
        [sys.executable, "-m", "rpcq", "bench", "--url", "amqp://localhost:1/", "--duration", "1s"],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        cwd=rpcq.folder,
        env=rpcq.environment(TERM=term, COLUMNS="200"),
    )
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error
        while read := os.read(ours, 65536):
            printed += read
    os.close(ours)
    assert ran.wait(30) == 3
    if term != "dumb":
        assert b"starting" in printed  # there was a spinner
    (line,) = [line for line in left_on_screen(printed.decode()) if line]
    assert line.startswith("BrokerUnreachable: cannot reach amqp://localhost:1: ")


def left_on_screen(printed: str) -> list[str]:
    """The lines that a terminal shows after this: it may go up, go back, and erase a line."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", printed, re.DOTALL):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
            lines += [""] * (row - len(lines) + 1)
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece == "\x1b[1A":
            row -= 1
        elif not piece.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + 1 :]
            column += 1
    return lines


def test_without_its_extra_it_says_what_to_install(rpcq: Rpcq) -> None:
    (rpcq.folder / "hdrh.py").write_text("raise ModuleNotFoundError('hdrh', name='hdrh')\n")
    environment = os.pathsep.join([str(rpcq.folder), rpcq.environment()["PYTHONPATH"]])
    assert "pip install '.[bench]'" in rpcq.refused("bench", "--url", "memory://", code=2, PYTHONPATH=environment)


def test_without_jinja2_a_page_is_refused_before_anything_is_measured(rpcq: Rpcq) -> None:
    (rpcq.folder / "jinja2.py").write_text("raise ModuleNotFoundError('jinja2', name='jinja2')\n")
    environment = os.pathsep.join([str(rpcq.folder), rpcq.environment()["PYTHONPATH"]])
    arguments = ("bench", "--url", "memory://", "--html", "page.html")
    said = rpcq.refused(*arguments, code=2, PYTHONPATH=environment)
    assert "--html needs the package jinja2: in a clone of rpcq, run pip install '.[bench]'" in said
