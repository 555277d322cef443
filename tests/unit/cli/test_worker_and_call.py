"""`rpcq worker` and `rpcq call`, as real processes on RabbitMQ."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from rpcq import ConfigurationError, __version__
from rpcq.cli import main
from rpcq.cli.calling import read_parameters
from rpcq.cli.serving import load_services
from rpcq.runtime.distribution import DISTRIBUTION
from support.command import SECONDS, SECRET, SERVICES, Process, Rpcq, one_line, wait_until

# Calling.


@pytest.mark.parametrize(
    ("given", "args", "params"),
    [
        ([], [], {}),
        (["x=1", "y=2"], [], {"x": 1, "y": 2}),
        (["1", "2"], [1, 2], {}),
        (["-1", "1.5", "true", "null"], [-1, 1.5, True, None], {}),
        (["x=9223372036854775808", "y=-18446744073709551617"], [], {"x": 2**63, "y": -(2**64) - 1}),
        (["text"], ["text"], {}),
        (["some text", "æøå"], ["some text", "æøå"], {}),
        (["x=text"], [], {"x": "text"}),
        (['x="5"', "y=5"], [], {"x": "5", "y": 5}),
        (["x=", "y=a=b"], [], {"x": "", "y": "a=b"}),
        (['x={"a": [1, null, 1.5]}', "y=[]"], [], {"x": {"a": [1, None, 1.5]}, "y": []}),
        (["NaN", "Infinity", "{", "01"], ["NaN", "Infinity", "{", "01"], {}),
        (["not-a-name=5", "=5"], ["not-a-name=5", "=5"], {}),
        (["1", "x=2"], [1], {"x": 2}),
    ],
)
def test_parameters_are_json_or_text_by_name_or_by_position(
    given: list[str], args: list[Any], params: dict[str, Any]
) -> None:
    found = read_parameters(given)
    assert found == (args, params)
    assert repr(found) == repr((args, params))  # 1 is not True


def test_the_version_is_told(rpcq: Rpcq) -> None:
    assert rpcq.run("--version").stdout == f"rpcq {metadata.version(DISTRIBUTION)}\n"
    assert __version__ == metadata.version(DISTRIBUTION)


def test_a_parameter_that_is_given_twice_is_named() -> None:
    with pytest.raises(ConfigurationError, match="got 'x' twice"):
        read_parameters(["x=1", "y=1", "x=2"])


def test_what_a_worker_serves_can_be_called_in_every_way(rpcq: Rpcq) -> None:
    rpcq.worker("services:things", "services:others")
    cases: list[tuple[list[str], Any]] = [
        (["things.add", "x=1", "y=18446744073709551616"], 18446744073709551617),
        (["things.add", "--", "-1", "2"], 1),
        (["things.tell", "some text"], ["some text", None]),
        (["things.tell", 'value={"a": [1, null, true, 1.5]}', "again=æ=b"], [{"a": [1, None, True, 1.5]}, "æ=b"]),
        (["others.who"], "others"),
    ]
    for (parameters, result), ran in zip(cases, rpcq.calls(it[0] for it in cases), strict=True):
        assert (ran.returncode, ran.stderr) == (0, ""), parameters
        assert json.loads(ran.stdout) == result


def test_a_call_that_fails_says_why_in_one_line_and_exits_by_the_kind_of_error(rpcq: Rpcq) -> None:
    worker = rpcq.worker()
    cases = [
        (["things.add", "x=[red]", "y=2"], r"InvalidParams: .*\bx\b", 4),
        (["things.add", "1", "y=2"], r"InvalidParams: .*not both", 4),
        (["things.none"], r"MethodNotFound: .*none", 4),
        (["nobody.none"], r"ServiceUnavailable: ", 5),
        (["things.hold", "name=held", "until=never", "--timeout", "0.3"], r"CallTimeout: .*executed=(yes|maybe)", 6),
        (["things.fail", f"secret={SECRET}"], r"RemoteError: .*incident=", 1),
    ]
    for (_, said, code), ran in zip(cases, rpcq.calls(it[0] for it in cases), strict=True):
        line = one_line(ran, code=code)
        assert re.match(said, line), line
        assert SECRET not in line
    failures = [line for line in worker.logged() if line["event"] == "handler failed"]
    assert [line["method"] for line in failures] == ["things.fail"]
    assert failures[0]["incident"] in line
    assert failures[0]["correlation_id"] in line
    assert "ValueError" in failures[0]["exception"]


def test_a_domain_errors_code_and_message_are_shown(rpcq: Rpcq) -> None:
    rpcq.worker()
    ran = rpcq.call("things.sell")
    assert ran.returncode == 1
    assert "out_of_stock" in ran.stderr
    assert "none\nleft" in ran.stderr  # as the service wrote it
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["work"], "the target must be service.method; got 'work'. 'rpcq list' shows"),
        (["work"], "rpcq call work --queue QUEUE"),
        (["things.add", "--wait", "0"], "--wait must be a number of seconds above 0; got 0"),
        (["add", "--queue", "q", "--wait", "1"], "--wait must be without --queue"),
        (["things.add", "x=1", "x=2"], "got 'x' twice"),
        (["things.add", "--url", f"http://me:{SECRET}@localhost"], "me:***@localhost"),
    ],
)
def test_a_call_that_cannot_be_says_why_in_one_line_and_exits_with_2(
    rpcq: Rpcq, arguments: list[str], said: str
) -> None:
    line = rpcq.call_refused(*arguments, code=2)
    assert line.startswith("rpcq: ")
    assert said in line
    assert SECRET not in line


@pytest.mark.parametrize("arguments", [["call"], ["worker"], ["call", "a.b", "--timeout", "soon"], ["nothing"]])
def test_arguments_that_are_none_exit_with_2_and_show_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert "Usage: rpcq" in said.err
    assert said.out == ""


def test_without_a_url_it_says_where_one_may_stand(rpcq: Rpcq) -> None:
    for arguments in (["call", "a.b"], ["worker", "services:things"]):
        assert "RPCQ_URL" in rpcq.refused(*arguments, code=2, RPCQ_URL="")


def test_a_broker_that_cannot_be_used_is_named_without_the_password_and_exits_with_3(rpcq: Rpcq) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    url = f"amqp://me:{SECRET}@127.0.0.1:{port}/"
    for arguments in (["call", "a.b"], ["worker", "services:things"]):
        line = rpcq.refused(*arguments, code=3, RPCQ_URL=url)
        assert line.startswith("BrokerUnreachable: ")
        assert f"127.0.0.1:{port}" in line
        assert SECRET not in line


def test_a_refused_password_exits_with_3_and_is_not_shown(rpcq: Rpcq) -> None:
    parts = urlsplit(rpcq.url)
    url = parts._replace(netloc=f"guest:{SECRET}@{parts.netloc.rpartition('@')[2]}").geturl()
    line = rpcq.call_refused("things.add", "--url", url, code=3)
    assert line.startswith("AuthenticationFailed: ")
    assert "'guest'" in line
    assert SECRET not in line


def test_a_call_may_go_to_a_queue_that_is_not_rpcqs(rpcq: Rpcq) -> None:
    rpcq.worker()
    ran = rpcq.call("add", "x=1", "y=2", "--queue", f"{rpcq.namespace}.req.things")
    assert (ran.returncode, ran.stdout) == (0, "3\n")


def test_a_call_waits_for_a_worker_that_is_just_started(rpcq: Rpcq) -> None:
    call = rpcq.start("call", "--namespace", rpcq.namespace, "things.add", "1", "2", "--wait", "20", "--timeout", "5")
    early = rpcq.call("things.add", "1", "2")  # takes as long, and has failed before there is a worker
    assert (early.returncode, early.stdout) == (5, "")
    rpcq.worker()
    assert call.ended() == 0
    assert call.output() == "3\n"


def test_a_call_whose_worker_does_not_come_is_not_made(rpcq: Rpcq) -> None:
    line = rpcq.call_refused("things.add", "1", "2", "--wait", "0.5", code=5)
    assert line.startswith("ServiceUnavailable: no worker of 'things' answered within 0.5 s")
    assert "executed=no" in line


@pytest.mark.parametrize(("file", "has_option"), [("url", False), ("nowhere", True)], ids=["file", "option"])
def test_several_processes_take_the_url_from_a_file_or_from_the_option_that_beats_it(
    rpcq: Rpcq, file: str, has_option: bool
) -> None:
    (rpcq.folder / "url").write_text(f"{rpcq.url}\n")
    options = ["--namespace", rpcq.namespace, "--processes", "2", *(["--url", rpcq.url] if has_option else [])]
    command = [sys.executable, "-m", "rpcq", "worker", "services:things", *options]
    worker = Process(command, rpcq.folder, rpcq.environment(RPCQ_URL="", RPCQ_URL_FILE=file))
    rpcq.processes.append(worker)
    worker.wait_for(lambda: sum('"worker started"' in line for line in worker.lines) == 2)
    assert rpcq.call("things.add", "1", "2", RPCQ_URL="", RPCQ_URL_FILE="url").stdout == "3\n"
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0


# What is served.

LIFESPAN = (
    "from contextlib import asynccontextmanager\nfrom rpcq import Service\n@asynccontextmanager\nasync def lifespan():"
)
SERVED = "things = Service('things', lifespan=lifespan)\n@things.method\ndef add(x: int) -> int: return x"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere:things", "there is no module 'nowhere'"),
        ("cli_services.deeper:things", "there is no module 'cli_services.deeper'"),
        ("cli_services:nothing", "module 'cli_services' has no service 'nothing'; its services: things, others"),
        ("cli_services:not_one", "has 'not_one', which is not a Service; its services: things, others"),
        ("cli_services", "must be given as module:service"),
        (":things", "must be given as module:service"),
        ("cli_services:", "must be given as module:service"),
        (".cli_services:things", "must be given as module:service"),
        ("no_services_here:things", "its services: none"),
    ],
)
def test_a_path_that_is_no_service_says_what_there_is(
    path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "no_services_here.py").touch()
    (tmp_path / "cli_services.py").write_text(SERVICES)
    try:
        with pytest.raises(ConfigurationError) as caught:
            load_services([path])
    finally:
        for name in ("no_services_here", "cli_services"):
            sys.modules.pop(name, None)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_service_exits_with_2(rpcq: Rpcq) -> None:
    line = rpcq.refused("worker", "services:things", "nowhere:things", code=2)
    assert line.startswith("rpcq: there is no module 'nowhere'")
    assert str(rpcq.folder) in line


BROKEN = {
    "import no_such_module_at_all": (
        ["broken.py:2"],
        "ModuleNotFoundError: No module named 'no_such_module_at_all'",
    ),
    "1 / 0": (["broken.py:2"], "ZeroDivisionError: division by zero"),
    "def (": (["broken.py:2"], "SyntaxError: invalid syntax"),
    "import other": (["broken.py:2", "other.py:1"], "SyntaxError: invalid syntax"),
    "import json\njson.loads('{')": (["broken.py:3"], "json.decoder.JSONDecodeError: Expecting property name .*"),
    "import pydantic\npydantic.TypeAdapter(int).validate_python('x')": (
        ["broken.py:3"],
        r"\(calls inside libraries are not shown: [1-3]; --log-level debug shows them\)",
    ),
    "try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise ValueError('amqp://me:hidden@there/')": (
        ["broken.py:3", "broken.py:5"],
        r"ValueError: amqp://me:\*\*\*@there/",
    ),
    f"{LIFESPAN}\n    def fail(): raise OSError('no database')\n    fail()\n    yield\n{SERVED}": (
        ["broken.py:7", "broken.py:6"],
        "OSError: no database",
    ),
    f"{LIFESPAN}\n    yield 1 / 0\n{SERVED}": (["broken.py:6"], "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("code", BROKEN)
def test_an_error_in_the_users_code_shows_the_users_own_frames_and_no_others(rpcq: Rpcq, code: str) -> None:
    places, last = BROKEN[code]
    (rpcq.folder / "broken.py").write_text(f"# the first line\n{code}\n")
    (rpcq.folder / "other.py").write_text("def (\n")
    ran = rpcq.run("worker", "--namespace", rpcq.namespace, "broken:things")
    assert (ran.returncode, ran.stdout) == (1, "")
    shown = re.findall(r'^  File "([^"]+)", line (\d+)', ran.stderr, re.MULTILINE)
    assert [f"{Path(file).name}:{line}" for file, line in shown] == places
    assert {Path(file).parent for file, _ in shown} == {rpcq.folder}
    assert re.fullmatch(last, ran.stderr.splitlines()[-1]), ran.stderr
    assert "typer" not in ran.stderr


def test_with_the_log_level_debug_all_frames_are_shown(rpcq: Rpcq) -> None:
    (rpcq.folder / "broken.py").write_text("1 / 0\n")
    ran = rpcq.run("worker", "broken:things", "--log-level", "debug")
    assert ran.returncode == 1
    assert "broken.py" in ran.stderr
    assert "typer" in ran.stderr


def test_an_installed_module_shows_its_frames_too(rpcq: Rpcq) -> None:
    site = rpcq.folder / "site-packages"
    site.mkdir()
    (site / "installed.py").write_text("def fail():\n    1 / 0\nfail()\n")
    path = os.pathsep.join([str(site), rpcq.environment()["PYTHONPATH"]])
    ran = rpcq.run("worker", "installed:things", PYTHONPATH=path)
    assert ran.returncode == 1
    assert re.findall(r'File "[^"]+/(\S+)", line (\d+)', ran.stderr) == [("installed.py", "3"), ("installed.py", "2")]


def test_a_definition_that_rpcq_refuses_is_one_line_with_its_place(rpcq: Rpcq) -> None:
    (rpcq.folder / "broken.py").write_text("from rpcq import Service\n\nthings = Service('a b')\n")
    line = rpcq.refused("worker", "broken:things", code=2)
    assert line.endswith("(at broken.py:3)")


def test_a_worker_in_its_own_process_says_that_no_other_process_can_reach_it(rpcq: Rpcq) -> None:
    worker = rpcq.worker("services:things", "--url", "memory://")
    assert [line["event"] for line in worker.logged()] == [
        "memory:// is inside this process: no other process can reach these services",
        "worker started",
    ]
    assert not any("memory://" in line["event"] for line in rpcq.worker().logged())


# Stopping.


@pytest.mark.long
def test_sigterm_lets_running_calls_end_takes_no_new_ones_and_exits_with_0(rpcq: Rpcq) -> None:
    worker = rpcq.worker()
    caller = rpcq.start("call", "--namespace", rpcq.namespace, "things.hold", "name=held", "until=release")
    rpcq.until_there_is("held")
    worker.signal(signal.SIGTERM)
    # It takes nothing new: this one waits in the queue until it has expired, a tenth of its timeout before its end.
    late = rpcq.call("things.add", "x=1", "y=2", "--timeout", "3")
    assert late.returncode == 6  # timed out
    assert late.stderr.startswith("CallTimeout: the request expired in the queue")
    (rpcq.folder / "release").touch()
    assert worker.ended() == 0
    assert caller.ended() == 0
    assert caller.output() == '"released"\n'
    assert worker.logged()[-1]["event"] == "worker stopped"
    assert worker.logged()[-1]["clean"] is True


def test_an_idle_worker_ends_at_once_at_ctrl_c(rpcq: Rpcq) -> None:
    worker = rpcq.worker()
    began = time.monotonic()
    worker.signal(signal.SIGINT)
    assert worker.ended() == 0
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("method", ["hold", "block"], ids=["async def", "def"])
def test_a_second_signal_ends_a_worker_at_once_and_exits_with_1(rpcq: Rpcq, method: str) -> None:
    worker = rpcq.worker("services:things", "--grace", "60")
    more = ["until=never"] if method == "hold" else []
    rpcq.start("call", "--namespace", rpcq.namespace, f"things.{method}", "name=held", *more)
    rpcq.until_there_is("held")
    worker.signal(signal.SIGTERM)
    late = rpcq.call("things.add", "x=1", "y=2", "--timeout", "0.3")  # the first signal has arrived
    assert late.returncode == 6  # timed out
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 1
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("method", ["hold", "block"], ids=["async def", "def"])
def test_after_the_grace_time_a_worker_ends_says_what_it_cut_off_and_exits_with_1(rpcq: Rpcq, method: str) -> None:
    worker = rpcq.worker("services:things", "--grace", "0.3")
    more = ["until=never"] if method == "hold" else []
    rpcq.start("call", "--namespace", rpcq.namespace, f"things.{method}", "name=held", *more)
    rpcq.until_there_is("held")
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 1
    assert time.monotonic() - began < 5
    logged = {line["event"]: line for line in worker.logged()}
    assert logged["calls cut off"]["count"] == 1
    assert len(logged["calls cut off"]["correlation_ids"]) == 1
    assert logged["worker stopped"]["clean"] is False


# Logs.


def test_logs_are_lines_of_json_where_nobody_reads_them_at_a_terminal(rpcq: Rpcq) -> None:
    worker = rpcq.worker("services:things", "services:others", "--prefetch", "7")
    rpcq.call("things.fail", f"secret={SECRET}")
    rpcq.call("things.add", "x=1", "y=2")
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0
    assert worker.output() == ""
    logged = worker.logged()  # each line is JSON
    for line in logged:
        assert {"event", "level", "logger", "timestamp"} <= line.keys()
    started, failed, stopped = logged
    assert (started["event"], failed["event"], stopped["event"]) == (
        "worker started",
        "handler failed",
        "worker stopped",
    )
    assert (started["services"], started["prefetch"]) == (["things", "others"], 7)
    password = urlsplit(rpcq.url).password
    assert started["url"] == (rpcq.url.replace(f":{password}@", ":***@") if password else rpcq.url)
    assert failed["level"] == "error"
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]+-[0-9a-f]{16}", failed["correlation_id"])
    assert failed["method"] == "things.fail"


def test_the_level_of_the_logs_can_be_chosen(rpcq: Rpcq) -> None:
    worker = rpcq.start("worker", "--namespace", rpcq.namespace, "services:things", "--log-level", "error")
    wait_until(lambda: rpcq.call("things.add", "x=1", "y=2").returncode == 0)
    rpcq.call("things.fail", "secret=x")
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0
    assert [line["event"] for line in worker.logged()] == ["handler failed"]


def test_a_caller_that_asks_for_more_logs_gets_them_beside_its_result(rpcq: Rpcq) -> None:
    rpcq.worker()
    ran = rpcq.call("things.add", "x=1", "y=2", "--log-level", "debug")
    assert (ran.returncode, ran.stdout) == (0, "3\n")
    lines = [json.loads(line) for line in ran.stderr.splitlines()]
    assert "client open" in [line["event"] for line in lines]
    password = urlsplit(rpcq.url).password
    assert f":{password}@" not in ran.stderr


def test_logs_are_readable_on_a_terminal(rpcq: Rpcq) -> None:
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "rpcq", "worker", "--namespace", rpcq.namespace, "services:things"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            cwd=rpcq.folder,
            env=rpcq.environment(TERM="xterm"),
        )
        os.close(theirs)
        shown = read_until(ours, "worker started")
        rpcq.call("things.fail", f"secret={SECRET}")
        shown += read_until(ours, "ValueError")
        process.send_signal(signal.SIGTERM)
        shown += read_until(ours, "worker stopped")
        assert process.wait(SECONDS) == 0
    finally:
        os.close(ours)
        process.kill()
        process.wait(SECONDS)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert '{"' not in plain
    assert "namespace=" in plain
    assert re.search(r"correlation_id=[0-9a-f]{8}-[0-9a-f]+-[0-9a-f]{16}", plain)
    assert "Traceback (most recent call last)" in plain
    password = urlsplit(rpcq.url).password
    assert f":{password}@" not in plain


def read_until(descriptor: int, wanted: str) -> str:
    """What a terminal shows until it has shown this."""
    shown, deadline = "", time.monotonic() + SECONDS
    while wanted not in re.sub(r"\x1b\[[0-9;]*m", "", shown):
        assert select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0], shown
        shown += os.read(descriptor, 65536).decode()
    return shown
