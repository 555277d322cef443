"""`rpcq list`, `describe`, `ping`, `doctor`, `setup`, `demo` and `call --json`, as real processes on RabbitMQ."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from urllib.parse import urlsplit

import pika
import pytest

from rpcq import Client, SendError
from support.broker import Broker
from support.command import ROOT, Rpcq, one_line

JOBS = """
from pathlib import Path
from rpcq import Service

mailing = Service("mailing", lanes=True, ordered=True)

@mailing.job
async def welcome(to: str) -> None:
    Path(f"welcomed-{to}").touch()
"""


def shown(ran: subprocess.CompletedProcess[str]) -> str:
    assert ran.returncode == 0, ran.stderr + ran.stdout
    return ran.stdout


# rpcq call --json, and standard input.


def test_a_result_and_an_error_are_json_for_programs(rpcq: Rpcq) -> None:
    rpcq.worker()
    good, refused, domain = rpcq.calls(
        [["things.add", "x=1", "y=2", "--json"], ["things.add", "x=no", "y=2", "--json"], ["things.sell", "--json"]]
    )
    assert (good.returncode, json.loads(good.stdout)) == (0, {"result": 3})
    error = json.loads(refused.stdout)["error"]
    assert (refused.returncode, refused.stderr) == (4, "")
    assert error["type"] == "InvalidParams"
    assert error["code"] == "INVALID_ARGUMENT"
    assert (error["executed"], error["retryable"]) == ("no", False)
    assert error["details"][0]["loc"] == ["x"]
    error = json.loads(domain.stdout)["error"]
    assert (domain.returncode, error["code"], error["message"]) == (1, "out_of_stock", "none\nleft")


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ('{"value": {"a": 1}, "again": 2}', [{"a": 1}, 2]),
        ('[["in an array"]]', [["in an array"], None]),
        ('"alone"', ["alone", None]),
    ],
)
def test_parameters_come_from_standard_input(rpcq: Rpcq, text: str, result: object) -> None:
    rpcq.worker()
    assert json.loads(shown(rpcq.call("things.tell", "-", given=text))) == result


def test_standard_input_that_is_not_json_is_told(rpcq: Rpcq) -> None:
    assert "standard input must be JSON" in one_line(rpcq.call("things.tell", "-", given="{"), code=2)


# Who is there.


@pytest.mark.long
def test_services_are_listed_described_and_pinged(rpcq: Rpcq) -> None:
    rpcq.worker("services:things", "services:others", "--name", "one", "--prefetch", "7")
    rpcq.worker("services:things", "--name", "two")
    own = {"RPCQ_NAMESPACE": rpcq.namespace}
    table = shown(rpcq.run("list", **own, COLUMNS="200"))
    assert re.search(rf"things\s+│ {rpcq.namespace}\.req\.things\s+│ 2\s+│ 107\s+│ add, block, fail, hold", table), (
        table
    )
    assert re.search(r"others\s+│ .*│ 1\s+│ 7\s+│ who", table), table
    assert "2 workers, 0 requests in hand" in table
    found = json.loads(shown(rpcq.run("list", "--json", **own)))
    assert (
        {worker["name"] for worker in found["workers"]} == {stats["name"] for stats in found["stats"]} == {"one", "two"}
    )

    told = shown(rpcq.run("describe", "things", **own))
    assert "add(x: int, y: int) -> int" in told
    assert "hold(name: str, until: str) -> str\n      Runs until there is a file of that name." in told
    assert "errors: out_of_stock" in told
    assert re.search(r"worker two on \S+, process \d+: rpcq \S+, prefetch 100", told), told
    assert "differ" not in told

    assert re.match(
        r"(one|two) on \S+, process \d+: [\d.]+ ms, 0 requests in hand\n", shown(rpcq.run("ping", "things", **own))
    )
    assert shown(rpcq.run("ping", "things", "--worker", "two", **own)).startswith("two on ")


@pytest.mark.long
def test_who_is_not_there_is_told(rpcq: Rpcq) -> None:
    rpcq.worker()
    own = {"RPCQ_NAMESPACE": rpcq.namespace}
    assert "no worker of 'others' answered" in rpcq.refused("describe", "others", code=5, **own)
    assert "no worker of 'others' answered" in rpcq.refused("ping", "others", code=5, **own)
    assert "no worker 'two' of 'things'" in rpcq.refused(
        "ping", "things", "--worker", "two", "--timeout", "0.3", code=5, **own
    )
    assert "no worker answered" in shown(rpcq.run("list", RPCQ_NAMESPACE=f"{rpcq.namespace}-empty"))


@pytest.mark.long
def test_a_time_that_is_none_is_named(rpcq: Rpcq) -> None:
    commands = (["list", "--wait"], ["describe", "things", "--wait"], ["ping", "things", "--timeout"])
    for command in (*commands, ["call", "things.add", "--timeout"]):
        option = command[-1] if command[0] != "call" else "timeout"
        said = rpcq.refused(*command, "nan", code=2)
        assert f"{option} must be a number of seconds above 0" in said
        assert said.endswith("; got nan")
    for seconds in ("0", "-1", "inf"):
        assert "--wait must be " in rpcq.refused("list", "--wait", seconds, code=2)


def test_settings_come_from_the_environment_and_arguments_beat_it(rpcq: Rpcq) -> None:
    rpcq.worker()
    assert shown(rpcq.run("call", "things.add", "1", "2", RPCQ_NAMESPACE=rpcq.namespace)) == "3\n"
    assert shown(rpcq.call("things.add", "1", "2", RPCQ_NAMESPACE="elsewhere", RPCQ_TIMEOUT="5")) == "3\n"
    said = rpcq.refused("call", "things.add", "1", "2", code=2, RPCQ_HEARTBEAT="often")
    assert "RPCQ_HEARTBEAT must be a number; got 'often'" in said


# Whether a broker can be used.


def lines(ran: subprocess.CompletedProcess[str], grade: str) -> list[str]:
    return [line[5:] for line in ran.stdout.splitlines() if line.startswith(grade.ljust(5))]


def test_the_doctor_finds_nothing_where_all_is_well(rpcq: Rpcq) -> None:
    rpcq.worker()
    ran = rpcq.run("doctor", "services:things", RPCQ_NAMESPACE=rpcq.namespace)
    assert ran.returncode == 0, ran.stdout
    assert not lines(ran, "bad")
    good = "\n".join(lines(ran, "ok"))
    assert f"(from RPCQ_URL), namespace '{rpcq.namespace}'; also from the environment: RPCQ_NAMESPACE" in good
    assert re.search(r"RabbitMQ \d+\.\d+", good)
    assert f"queue {rpcq.namespace}.req.things: 0 messages, 1 consumers" in good
    assert "workers: 1, of things" in good
    assert "clocks: 1 workers compared" in good


def test_the_doctor_names_what_is_wrong_and_how_to_fix_it(rpcq: Rpcq) -> None:
    with pika.BlockingConnection(pika.URLParameters(rpcq.url)) as connection:
        connection.channel().queue_declare(f"{rpcq.namespace}.req.things", durable=True)
    ran = rpcq.run("doctor", "services:things", RPCQ_NAMESPACE=rpcq.namespace)
    assert ran.returncode == 1, ran.stdout
    bad = "\n".join(lines(ran, "bad"))
    assert "exists with other arguments than rpcq's" in bad
    assert "no worker of 'things' answers" in bad
    assert "start a worker: rpcq worker" in ran.stdout


def test_the_doctor_names_an_exchange_whose_type_no_topic_permission_holds_for(rpcq: Rpcq) -> None:
    rpcq.worker()
    with pika.BlockingConnection(pika.URLParameters(rpcq.url)) as connection:
        connection.channel().exchange_declare(f"{rpcq.namespace}.replies", "direct", durable=True)
    ran = rpcq.run(
        "doctor", RPCQ_NAMESPACE=rpcq.namespace, RPCQ_REPLY_EXCHANGE=f"{rpcq.namespace}.replies", COLUMNS="1000"
    )
    assert ran.returncode == 1, ran.stdout
    assert any(f"the exchange '{rpcq.namespace}.replies' exists with other" in line for line in lines(ran, "bad"))


def test_the_doctor_tells_a_broker_that_cannot_be_reached_from_one_that_refuses(rpcq: Rpcq) -> None:
    at = urlsplit(rpcq.url)
    ran = rpcq.run("doctor", "--url", f"amqp://nobody:s3cr3t@{at.hostname}:{at.port or 5672},localhost:1/")
    assert ran.returncode == 1
    assert ran.stderr == ""  # no line that aio-pika or aiormq logged
    refused, unreachable = lines(ran, "bad")
    assert "refused the user 'nobody'" in refused
    assert "cannot reach amqp://localhost:1" in unreachable
    assert "s3cr3t" not in ran.stdout + ran.stderr


def test_the_doctor_says_where_its_url_comes_from(rpcq: Rpcq) -> None:
    (rpcq.folder / "url").write_text(f"{rpcq.url}\n")
    option, variable, file = (
        lines(rpcq.run("doctor", *arguments, **environment), "ok")[0]
        for arguments, environment in (
            (["--url", rpcq.url], {"RPCQ_URL": "memory://", "RPCQ_URL_FILE": "nowhere"}),
            ([], {}),
            ([], {"RPCQ_URL": "", "RPCQ_URL_FILE": "url"}),
        )
    )
    assert "(from --url), namespace 'rpcq'" in option
    assert "(from RPCQ_URL), namespace 'rpcq'" in variable
    assert "(from RPCQ_URL_FILE, url), namespace 'rpcq'" in file
    ran = rpcq.refused("doctor", code=2, RPCQ_URL_FILE="url")
    assert "only one of RPCQ_URL and RPCQ_URL_FILE may be set" in ran


def test_the_doctor_says_that_a_queue_is_not_there_yet_or_that_nobody_serves_it(rpcq: Rpcq) -> None:
    own = {"RPCQ_NAMESPACE": rpcq.namespace}
    assert any("does not exist" in line for line in lines(rpcq.run("doctor", "services:things", **own), "warn"))
    assert f"queues {rpcq.namespace}.req.things" in shown(rpcq.run("setup", "services:things", **own))
    ran = rpcq.run("doctor", "services:things", **own)
    assert any("0 messages, 0 consumers" in line for line in lines(ran, "bad"))


def test_the_doctor_says_that_a_queue_of_the_other_kind_gets_each_request_as_well(rpcq: Rpcq) -> None:
    rpcq.worker()
    with pika.BlockingConnection(pika.URLParameters(rpcq.url)) as connection:
        other = f"{rpcq.namespace}.once.things"
        channel = connection.channel()
        channel.queue_declare(other, durable=True, arguments={"x-queue-type": "quorum"})
        ran = rpcq.run("doctor", "services:things", RPCQ_NAMESPACE=rpcq.namespace)
        channel.queue_delete(other)
    assert ran.returncode == 1, ran.stdout
    (bad,) = lines(ran, "bad")
    assert bad.startswith(f"queue {other}: exists as well, with 0 consumers: rpcq's clients send only to {other}")
    assert f"delete it; the service's queue is {rpcq.namespace}.req.things" in " ".join(ran.stdout.split())


def test_setup_declares_what_a_worker_would(rpcq: Rpcq) -> None:
    exchange = f"{rpcq.namespace}.replies"
    told = shown(rpcq.run("setup", "services:things", "--namespace", rpcq.namespace, "--reply-exchange", exchange))
    assert exchange in told
    rpcq.worker()  # it would be refused a queue that is declared differently
    assert shown(rpcq.call("things.add", "1", "2")) == "3\n"
    with pika.BlockingConnection(pika.URLParameters(rpcq.url)) as connection:
        connection.channel().exchange_delete(exchange)


@pytest.mark.long
async def test_jobs_can_be_sent_once_setup_has_declared_their_queues(rpcq: Rpcq) -> None:
    (rpcq.folder / "mailing.py").write_text(JOBS)
    async with Client(rpcq.url, namespace=rpcq.namespace) as client:
        with pytest.raises(SendError, match="run `rpcq setup`"):
            await client.send("mailing.welcome", to="ada")
        told = shown(await asyncio.to_thread(rpcq.run, "setup", "mailing:mailing", "--namespace", rpcq.namespace))
        assert f"{rpcq.namespace}.job.mailing" in told
        assert f"{rpcq.namespace}.req." not in told
        assert f"{rpcq.namespace}.job.mailing:low" in told
        assert f"{rpcq.namespace}.job.mailing:k15" in told
        await client.with_options(priority="low").send("mailing.welcome", to="ada")
        await asyncio.to_thread(
            rpcq.worker, "mailing:mailing"
        )  # it would be refused a queue that is declared differently
        await asyncio.to_thread(rpcq.until_there_is, "welcomed-ada")
    own = {"RPCQ_NAMESPACE": rpcq.namespace}
    told = shown(await asyncio.to_thread(rpcq.run, "describe", "mailing", **own))
    assert told.startswith(
        f"mailing  jobs: queue {rpcq.namespace}.job.mailing, lanes high and low, ordered lanes k00 to k15\n"
    )
    assert "welcome(to: str) -> None\n      job, at most 8 attempts; runs at most 300 s each time" in told
    assert re.search(r"worker \S+ on \S+, process \d+: rpcq \S+, job prefetch 20\n", told), told
    found = json.loads(shown(await asyncio.to_thread(rpcq.run, "describe", "mailing", "--json", **own)))
    (job,) = found["workers"][0]["services"][0]["jobs"]
    assert (job["name"], job["signature"], job["timeout"]) == ("welcome", "(to: str) -> None", 300)
    table = shown(await asyncio.to_thread(rpcq.run, "list", **own, COLUMNS="200"))
    assert re.search(rf"mailing\s+│ {rpcq.namespace}\.job\.mailing\s+│ 1\s+│ 0\s+│\s+│ welcome", table), table


@pytest.mark.long
def test_the_doctor_looks_at_the_queues_of_jobs(rpcq: Rpcq) -> None:
    (rpcq.folder / "mailing.py").write_text(JOBS)
    own = {"RPCQ_NAMESPACE": rpcq.namespace}
    ran = rpcq.run("doctor", "mailing:mailing", **own)
    missing = "\n".join(lines(ran, "warn"))
    for name in (
        "delay.07",
        "lost",
        "job.mailing",
        "job.mailing:low",
        "job.mailing:k07",
        "job.mailing:suspects",
        "dead.mailing",
    ):
        assert f"queue {rpcq.namespace}.{name}: does not exist" in missing
    assert ".req.mailing" not in ran.stdout
    shown(rpcq.run("setup", "mailing:mailing", **own))
    ran = rpcq.run("doctor", "mailing:mailing", **own)
    assert f"{rpcq.namespace}.job.mailing: 0 messages, 0 consumers" in "\n".join(lines(ran, "bad"))
    assert "until then, jobs wait" in ran.stdout
    rpcq.worker("mailing:mailing")
    with pika.BlockingConnection(pika.URLParameters(rpcq.url)) as connection:
        connection.channel().basic_publish("", f"{rpcq.namespace}.dead.mailing", b"{}")
        ran = rpcq.run("doctor", "mailing:mailing", **own)
        assert ran.returncode == 0, ran.stdout
        assert "all 24 exist" in "\n".join(lines(ran, "ok"))
        assert f"{rpcq.namespace}.dead.mailing: 1 messages" in "\n".join(lines(ran, "warn"))
        assert "rpcq dlq list mailing" in ran.stdout
        level = f"{rpcq.namespace}.delay.03"
        connection.channel().exchange_delete(level)
        connection.channel().exchange_declare(level, "direct", durable=True)
    ran = rpcq.run("doctor", "mailing:mailing", COLUMNS="1000", **own)
    assert any(f"the exchange '{level}' exists with other" in line for line in lines(ran, "bad"))


def test_on_the_in_process_broker_there_is_nothing_to_examine_or_to_set_up(rpcq: Rpcq) -> None:
    assert "a broker inside each process" in shown(rpcq.run("doctor", "--url", "memory://"))
    assert "memory://" in rpcq.refused("setup", "services:things", "--url", "memory://", code=2)


# Showing it, and completion.


def test_the_demo_shows_calls_and_how_they_fail(tmp_path: object) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RPCQ_")}
    ran = subprocess.run(
        [sys.executable, "-m", "rpcq", "demo", "--calls", "500"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=ROOT,
        env={**environment, "COLUMNS": "120"},
    )
    told = shown(ran)
    assert "500 of 500 matched" in told
    assert re.findall(r"^    (\w+), executed '(\w+)'", told, re.MULTILINE) == [
        ("InvalidParams", "no"),
        ("OutOfStock", "yes"),
        ("CallTimeout", "yes"),
        ("ServiceUnavailable", "no"),
    ]
    assert "\x1b" not in told, "colours where nobody sees them"


def test_the_shell_completes_commands(rpcq: Rpcq) -> None:
    words = {"_RPCQ_COMPLETE": "complete_bash", "COMP_WORDS": "rpcq d", "COMP_CWORD": "1"}
    assert set(shown(rpcq.run(**words)).split()) == {"describe", "dlq", "doctor", "demo"}


def test_an_administrators_questions_leave_no_connection(rpcq: Rpcq, broker: Broker) -> None:
    shown(rpcq.run("doctor", "--namespace", rpcq.namespace))
    if broker.can_ctl:
        assert "rpcq admin" not in broker.ctl("list_connections", "client_properties")


# Schedules.


SCHEDULES = """
from rpcq import Cron, Every, Service

reports = Service("reports")

@reports.job(schedule=Cron("0 6 * * mon-fri", tz="Europe/Berlin", missed="all"))
async def daily() -> None: ...

@reports.job(schedule=Every(0.25))
async def beat() -> None: ...
"""


@pytest.mark.long
async def test_schedules_are_listed_with_their_ticks(rpcq: Rpcq) -> None:
    (rpcq.folder / "reporting.py").write_text(SCHEDULES)
    rpcq.worker("reporting:reports")
    own = {"RPCQ_NAMESPACE": rpcq.namespace}
    while True:
        found = json.loads(shown(await asyncio.to_thread(rpcq.run, "schedules", "--json", **own)))["schedules"]
        if found and found[0]["last"]:
            break
    beat, daily = found
    assert (beat["job"], beat["schedule"], beat["missed"]) == ("reports.beat", "every 0.25 s", "last")
    assert beat["last"] < beat["next"]
    assert (daily["job"], daily["schedule"]) == ("reports.daily", "cron 0 6 * * mon-fri Europe/Berlin")
    assert (daily["missed"], daily["last"]) == ("all", None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d 06:00:00\+0[12]:00", daily["next"])
    table = shown(await asyncio.to_thread(rpcq.run, "schedules", "reports", **own))
    assert "reports.daily" in table
    assert "no worker answered" in shown(
        await asyncio.to_thread(rpcq.run, "schedules", "others", "--wait", "0.1", **own)
    )
