"""`rpcq queues` as a real process on RabbitMQ, with and without the management API.

The tests share a namespace, because each namespace has a ladder of 24 queues; each test has a service of its own.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rpcq import Client, Cron, GiveUp, Retry, Service, Worker
from rpcq.cli import queues as command
from rpcq.cli.options import USAGE
from rpcq.cli.queues import Row
from rpcq.observability.management import management_of
from rpcq.observability.queues import QueueDepth, QueueWatch
from rpcq.url import parse
from support.broker import Broker, Setup
from support.broker import broker as a_broker
from support.command import Process, Rpcq, wait_until
from support.load import until

pytestmark = pytest.mark.long

SHARED = f"t{secrets.token_hex(8)}"


class Mailing:
    """A service with jobs in all states."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = f"s{secrets.token_hex(6)}"
        self.service = Service(self.name)
        self.go_on = asyncio.Event()

        @self.service.job
        async def hold() -> None:
            await self.go_on.wait()

        @self.service.job
        async def bounce() -> None:
            raise GiveUp("bounced")

        @self.service.job(retry=Retry(max_attempts=2, initial_backoff=3600, max_backoff=3600))
        async def fail() -> None:
            raise ValueError("text")

        @self.service.job(schedule=Cron("0 0 1 1 *", tz="UTC"))
        async def yearly() -> None: ...

        @self.service.method
        async def ask() -> None: ...

        self.hold, self.bounce, self.fail = hold, bounce, fail

    def worker(self) -> Worker:
        return Worker(self.service, url=self.url, namespace=SHARED, job_prefetch=2, grace=0.1)

    async def fill(self) -> None:
        """Leave five jobs that wait, two dead letters, and one that is delayed."""
        async with Client(self.url, namespace=SHARED) as client:
            async with self.worker() as worker:
                await client.send_many(self.bounce, [{}, {}])
                await client.send(self.fail)
                await until(lambda: worker._jobs is not None and worker._jobs.finished == 3)
            await client.send_many(self.hold, [{}] * 5)


@pytest.fixture
def rpcq(rabbitmq_url: str, tmp_path: Path) -> Iterator[Rpcq]:
    found = Rpcq(rabbitmq_url, SHARED, tmp_path)
    yield found
    for process in found.processes:
        process.kill()


def shown(rpcq: Rpcq, *arguments: str) -> tuple[dict[str, list[str]], str]:
    """The rows of the table by what the queue is for, and all that was printed."""
    ran = rpcq.run("queues", *arguments, RPCQ_NAMESPACE=SHARED)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split() for line in ran.stdout.splitlines() if line.strip().startswith(f"{SHARED}.")]
    return {row[1]: row for row in rows}, ran.stdout + ran.stderr


def objects(rpcq: Rpcq, *arguments: str) -> dict[str, dict[str, Any]]:
    ran = rpcq.run("queues", "--json", *arguments, RPCQ_NAMESPACE=SHARED)
    assert ran.returncode == 0, ran.stderr
    return {it["kind"]: it for it in json.loads(ran.stdout)["queues"]}


async def test_without_the_management_api_depths_and_consumers_are_shown_and_what_is_not_known(rpcq: Rpcq) -> None:
    mailing = Mailing(rpcq.url)
    await mailing.fill()
    table, printed = await asyncio.to_thread(shown, rpcq, mailing.name, "--management", "")
    name = f"{SHARED}.job.{mailing.name}"
    assert list(table) == ["calls", "jobs", "suspects", "dead", "tickets", "delayed", "lost"]
    assert table["jobs"] == [name, "jobs", "5", "-", "-", "0", "-", "-", "-"]
    assert table["suspects"][:3] == [f"{name}:suspects", "suspects", "0"]
    assert table["dead"][:3] == [f"{SHARED}.dead.{mailing.name}", "dead", "2"]
    assert table["dead"][-1].endswith("s")  # its age in seconds
    assert table["delayed"][0] == f"{SHARED}.delay.*"
    assert int(table["delayed"][2]) >= 1
    assert "without the management API, not known: unacked, moving, in/s, acked/s" in printed

    found = await asyncio.to_thread(objects, rpcq, mailing.name, "--management", "")
    assert found["jobs"] == {
        "service": mailing.name,
        "queue": name,
        "kind": "jobs",
        "lane": "normal",
        "subscription": "",
        "messages": 5,
        "consumers": 0,
        "source": "declare",
        **dict.fromkeys(("unacknowledged", "moving", "published", "acknowledged", "oldest")),
    }
    assert 0 <= found["dead"]["oldest"] < 600
    # It was looked at, and is still there.
    assert (await asyncio.to_thread(objects, rpcq, mailing.name, "--management", ""))["dead"]["messages"] == 2


async def test_without_a_name_the_services_are_those_whose_workers_answer(rpcq: Rpcq) -> None:
    there, gone = Mailing(rpcq.url), Mailing(rpcq.url)
    async with gone.worker():
        pass
    async with there.worker():
        _, printed = await asyncio.to_thread(shown, rpcq, "--management", "")
    assert f"{SHARED}.job.{there.name}" in printed
    assert gone.name not in printed
    assert "only services whose workers answer are shown" in printed
    _, printed = await asyncio.to_thread(shown, rpcq, gone.name, "--management", "")
    assert f"{SHARED}.job.{gone.name}" in printed


def test_a_service_that_nobody_declared_has_no_queues(rpcq: Rpcq) -> None:
    table, printed = shown(rpcq, "nobody", "--management", "")
    assert (table, printed) == ({}, f"no queues of service 'nobody' in namespace '{SHARED}'\n")
    assert objects(rpcq, "nobody", "--management", "") == {}


async def test_a_watch_looks_again_until_it_is_interrupted(rpcq: Rpcq) -> None:
    mailing = Mailing(rpcq.url)
    async with mailing.worker():
        pass
    arguments = ["queues", mailing.name, "--json", "--watch", "0.2", "--management", "", "--namespace", SHARED]
    process = Process([sys.executable, "-m", "rpcq", *arguments], rpcq.folder, rpcq.environment())
    rpcq.processes.append(process)
    found: list[dict[str, Any]] = []

    def read() -> None:
        assert process._process.stdout is not None
        found.append({it["kind"]: it for it in json.loads(process._process.stdout.readline())["queues"]})

    await asyncio.to_thread(read)
    async with Client(rpcq.url, namespace=SHARED) as client:
        await client.send(mailing.hold)
    async with asyncio.timeout(20):
        while found[-1]["jobs"]["messages"] == 0:
            await asyncio.to_thread(read)
    assert found[0]["jobs"]["messages"] == 0
    process.signal(signal.SIGINT)
    assert await asyncio.to_thread(process.ended) != 0
    assert "Traceback" not in "".join(process.lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--watch", "0"], "--watch must be a number of seconds above 0; got 0"),
        (["--wait", "nan"], "--wait must be "),
        (["a:b"], "the name of a service must"),
        (["--url", "memory://"], "the broker must be RabbitMQ; got the in-process broker"),
        (["--management", "localhost"], "management must be a URL"),
    ],
)
def test_what_cannot_be_looked_at_is_named(rpcq: Rpcq, arguments: list[str], message: str) -> None:
    assert message in rpcq.refused("queues", *arguments, code=USAGE)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m 0s"), (3599, "59m 59s"), (3660, "1h 1m"), (90_000, "1d 1h")],
)
def test_an_age_has_two_units(seconds: float, text: str) -> None:
    row = Row(QueueDepth("s", "q", 1, 0, 0, "management", "dead"), seconds)
    assert row.cells()[-1] == text


def test_the_names_of_queues_are_no_markup_and_control_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    command._print([Row(QueueDepth("s", "[bold]q[/]\x1b[2J", 1, 0, 0, "management"), None)], "n", None, clear=True)
    assert "[bold]q[/]\\x1b[2J" in capsys.readouterr().out


# The management API.


@pytest.fixture(scope="module")
def managed() -> Iterator[tuple[Broker, str]]:
    """A broker with the management API, and where that is."""
    setup = Setup(
        config="management.tcp.port = {ports[0]}\ncollect_statistics_interval = 500\nloopback_users.guest = false\n",
        files=lambda _: {"enabled_plugins": b"[rabbitmq_management].\n"},
        ports=1,
    )
    with a_broker(setup=setup) as own:
        yield own, f"http://127.0.0.1:{next(iter(own.ports.values()))}"


async def test_the_management_api_knows_all_services_all_columns_and_no_age_of_jobs(
    managed: tuple[Broker, str], tmp_path: Path
) -> None:
    broker, management = managed
    rpcq = Rpcq(broker.url, SHARED, tmp_path)
    mailing, idle = Mailing(broker.url), Mailing(broker.url)
    async with idle.worker():
        pass
    await mailing.fill()
    async with mailing.worker():
        found: dict[str, dict[str, Any]] = {}

        async def look() -> bool:
            ran = await asyncio.to_thread(
                rpcq.run, "queues", "--json", "--management", management, RPCQ_NAMESPACE=SHARED
            )
            found.clear()
            found.update({f"{it['service']} {it['kind']}": it for it in json.loads(ran.stdout)["queues"]})
            jobs = found.get(f"{mailing.name} jobs", {})
            delayed = found.get(" delayed", {})
            counted = jobs.get("unacknowledged"), jobs.get("published"), delayed.get("messages")
            return counted[0] == 2 and counted[1] is not None and counted[2] == 1

        async with asyncio.timeout(40):
            while not await look():  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.2)
        jobs, dead = found[f"{mailing.name} jobs"], found[f"{mailing.name} dead"]
        assert (jobs["messages"], jobs["consumers"], jobs["moving"], jobs["source"]) == (3, 1, 0, "management")
        assert jobs["oldest"] is None
        assert (dead["messages"], dead["unacknowledged"]) == (2, 0)
        assert 0 <= dead["oldest"] < 600
        assert f"{idle.name} calls" in found
        assert found[" lost"]["messages"] == 0

        watch = QueueWatch([mailing.service], broker.url, namespace=SHARED, management=management)
        seen = {it.kind: it for it in await watch.look()}
        assert list(seen) == ["calls", "jobs", "suspects", "dead", "tickets", "delayed", "lost"]
        assert (seen["jobs"].messages, seen["delayed"].messages, seen["delayed"].moving) == (3, 1, 0)
        printed = await asyncio.to_thread(
            rpcq.run, "queues", mailing.name, "--management", management, RPCQ_NAMESPACE=SHARED
        )
        assert "not known" not in printed.stdout + printed.stderr
        wrong = management.replace("//", "//guest:wrong@")
        printed = await asyncio.to_thread(rpcq.run, "queues", "--management", wrong, RPCQ_NAMESPACE=SHARED)
        assert "the management API did not answer: the response is 401" in printed.stderr
        assert f"{SHARED}.job.{mailing.name}" in printed.stdout
        mailing.go_on.set()


async def test_rabbitmq_does_not_tell_the_time_of_the_first_message_of_a_quorum_queue(
    managed: tuple[Broker, str],
) -> None:
    """If this fails, a newer RabbitMQ does, and the age of the oldest job can be shown."""
    broker, management = managed
    mailing = Mailing(broker.url)
    await mailing.fill()
    api = management_of(parse(broker.url), management)
    assert api is not None
    columns = ("messages_ready", "head_message_timestamp")

    def look() -> dict[str, Any]:
        return api.queue(f"{SHARED}.job.{mailing.name}", columns) or {}

    await asyncio.to_thread(wait_until, lambda: look().get("messages_ready") == 5)
    assert look().get("head_message_timestamp") is None
