"""Worker processes that are started and stopped by the number of jobs that wait, and the same with KEDA's queries."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pika
import pytest
import yaml

from rpcq import Client, Service, Worker
from rpcq.cli.scaling import LOOKS
from rpcq.options import JobOptions
from rpcq.url import parse
from rpcq.wire.job_queues import JobTopology
from support.broker import Setup
from support.broker import broker as a_broker
from support.command import Process, Rpcq, wait_until

ROOT = Path(__file__).parents[2]

JOBS = """
import asyncio
from pathlib import Path

from rpcq import Service

jobs = Service("jobs")

@jobs.job(timeout=60)
async def work(number: int) -> None:
    with Path("begun").open("a") as begun:
        begun.write(f"{number}\\n")
    await asyncio.sleep(0.05)
    while not Path("go").exists():
        await asyncio.sleep(0.05)
    with Path("done").open("a") as done:
        done.write(f"{number}\\n")
"""


@pytest.fixture
def rpcq(rabbitmq_url: str, namespace: str, tmp_path: Path) -> Iterator[Rpcq]:
    found = Rpcq(rabbitmq_url, namespace, tmp_path)
    yield found
    for process in found.processes:
        process.kill()


def scaled(rpcq: Rpcq, *arguments: str) -> Process:
    """A worker whose number of processes follows the depth, and serves with the first of them."""
    (rpcq.folder / "jobs.py").write_text(JOBS)
    worker = rpcq.start("worker", "jobs:jobs", "--namespace", rpcq.namespace, *arguments)
    worker.wait_for(lambda: starts(worker) == 1)
    return worker


def starts(worker: Process) -> int:
    return sum('"worker started"' in line for line in worker.lines)


def changes(worker: Process) -> list[tuple[int, int]]:
    """The changes of the number of processes: before and after each."""
    events = ("more worker processes", "one worker process less")
    return [(line["before"], line["processes"]) for line in worker.logged() if line["event"] in events]


def counted(rpcq: Rpcq, name: str) -> Counter[str]:
    path = rpcq.folder / name
    return Counter(path.read_text().split() if path.exists() else ())


async def send(rpcq: Rpcq, count: int) -> None:
    async with Client(rpcq.url, namespace=rpcq.namespace) as client:
        assert len(await client.send_many("jobs.work", [{"number": number} for number in range(count)])) == count


def test_processes_are_started_for_a_burst_and_stopped_after_it_and_no_job_runs_twice(rpcq: Rpcq) -> None:
    worker = scaled(rpcq, "--processes", "1:3", "--scale-on-depth", "20", "--scale-every", "0.1", "--job-prefetch", "2")
    asyncio.run(send(rpcq, 60))
    worker.wait_for(lambda: starts(worker) == 3)
    (rpcq.folder / "go").touch()
    worker.wait_for(lambda: changes(worker)[-1] == (2, 1))
    worker.wait_for(lambda: sum('"worker process stopped"' in line for line in worker.lines) == 2)
    assert changes(worker)[-2:] == [(3, 2), (2, 1)]
    assert max(after for _, after in changes(worker)) == 3
    stopped = [line for line in worker.logged() if line["event"] == "worker process stopped"]
    assert [(line["number"], line["exit_code"]) for line in stopped] == [(3, 0), (2, 0)]
    wait_until(lambda: counted(rpcq, "done").total() == 60)
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0
    assert counted(rpcq, "begun") == counted(rpcq, "done") == Counter(map(str, range(60)))
    reasons = [line["reason"] for line in worker.logged() if "reason" in line]
    assert "jobs wait: more than 20 for each process" in reasons[0]
    assert reasons[-1] == f"at {LOOKS} looks in a row, no more than 20 jobs waited"


@pytest.mark.long
@pytest.mark.parametrize("shrinks", ["before", "after"])
def test_the_end_of_all_processes_and_of_one_that_is_too_many_cut_off_no_job(rpcq: Rpcq, shrinks: str) -> None:
    """A process that gets a second signal cuts off its jobs."""
    every = "0.1" if shrinks == "before" else "0.5"
    worker = scaled(rpcq, "--processes", "1:2", "--scale-on-depth", "1", "--scale-every", every, "--job-prefetch", "1")
    asyncio.run(send(rpcq, 3))
    wait_until(lambda: counted(rpcq, "begun").total() == 2)  # one in each process, and one waits
    if shrinks == "before":
        worker.wait_for(lambda: changes(worker) == [(1, 2), (2, 1)])
    worker.signal(signal.SIGTERM)
    if shrinks == "after":
        time.sleep(0.5 * (LOOKS + 2))  # time for as many looks as it takes for one less
    (rpcq.folder / "go").touch()
    assert worker.ended() == 0
    assert counted(rpcq, "begun") == counted(rpcq, "done")
    assert counted(rpcq, "done").total() == 2


@pytest.mark.long
@pytest.mark.timeout(150)
def test_a_burst_of_2000_jobs_is_done_by_8_processes_of_which_1_is_left_and_no_job_runs_twice(rpcq: Rpcq) -> None:
    (rpcq.folder / "go").touch()
    worker = scaled(
        rpcq, "--processes", "1:8", "--scale-on-depth", "100", "--scale-every", "0.5", "--job-prefetch", "2"
    )
    asyncio.run(send(rpcq, 2000))
    wait_until(lambda: counted(rpcq, "done").total() >= 2000, 60)
    wait_until(lambda: changes(worker)[-1] == (2, 1), 60)
    found = changes(worker)
    assert max(after for _, after in found) == 8
    assert found[-7:] == [(number, number - 1) for number in range(8, 1, -1)]
    worker.wait_for(lambda: sum('"worker process stopped"' in line for line in worker.lines) == 7)
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0
    assert counted(rpcq, "begun") == counted(rpcq, "done") == Counter(map(str, range(2000)))


# KEDA: its queries.


MANIFEST = ROOT / "docker/keda.yml"
PAGE = ROOT / "docs/howto/scaling.md"


@asynccontextmanager
async def emails_held(url: str, namespace: str) -> AsyncIterator[None]:
    """A service `emails` with 8 jobs, of which its worker holds 3."""
    emails, began, release = Service("emails", lanes=True), asyncio.Semaphore(0), asyncio.Event()

    @emails.job
    async def hold() -> None:
        began.release()
        await release.wait()

    async with (
        Worker(emails, url=url, namespace=namespace, job_prefetch=3),
        Client(url, namespace=namespace) as client,
    ):
        await client.send_many("emails.hold", [{}] * 8)
        for _ in range(3):
            await began.acquire()
        yield
        release.set()


async def test_the_manifest_for_keda_asks_for_the_jobs_that_wait(rabbitmq_url: str, namespace: str) -> None:
    documents = {it["kind"]: it for it in yaml.safe_load_all(MANIFEST.read_text())}
    deployment, scaled_object = documents["Deployment"], documents["ScaledObject"]
    pod = deployment["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert command[:3] == ["rpcq", "worker", "emails:emails"]
    assert JobOptions().timeout < int(command[command.index("--grace") + 1]) < pod["terminationGracePeriodSeconds"]
    assert scaled_object["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (trigger,) = scaled_object["spec"]["triggers"]
    asked = trigger["metadata"]
    assert (trigger["type"], asked["protocol"], asked["mode"]) == ("rabbitmq", "amqp", "QueueLength")
    assert asked["queueName"] == JobTopology("rpcq").queue("emails").name
    queue = asked["queueName"].replace("rpcq", namespace, 1)

    def depth() -> int:
        # Neither durable nor auto-delete, as KEDA asks: the broker does not compare that of a passive declaration.
        with pika.BlockingConnection(pika.URLParameters(rabbitmq_url)) as connection:
            found = connection.channel().queue_declare(queue, passive=True, durable=False, auto_delete=False)
            return int(found.method.message_count)

    async with emails_held(rabbitmq_url, namespace):
        assert await asyncio.to_thread(depth) == 5


@pytest.mark.long
async def test_the_page_has_a_trigger_for_keda_that_asks_for_all_jobs_that_are_not_done(namespace: str) -> None:
    (text,) = re.findall(r"^```yaml\n(# part of a ScaledObject\n.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (trigger,) = yaml.safe_load(text)["spec"]["triggers"]
    asked = trigger["metadata"]
    assert (trigger["type"], asked["protocol"], asked["mode"]) == ("rabbitmq", "http", "QueueLength")
    assert asked["useRegex"] == "true"
    names = [queue.name for queue in JobTopology("rpcq").waiting("emails", lanes=True, ordered=False)]
    others = [JobTopology("rpcq").queue(name).name for name in ("emailsx", "emails-2", "xemails")]
    assert all(re.search(asked["queueName"], name) for name in names)
    assert not any(re.search(asked["queueName"], name) for name in others)
    pattern = asked["queueName"].replace("rpcq", namespace, 1)

    setup = Setup(
        config="management.tcp.port = {ports[0]}\ncollect_statistics_interval = 500\nloopback_users.guest = false\n",
        files=lambda _: {"enabled_plugins": b"[rabbitmq_management].\n"},
        ports=1,
    )
    with a_broker(setup=setup) as own:
        broker = parse(own.url)
        # As getQueueInfoViaHTTP of pkg/scalers/rabbitmq_scaler.go in KEDA 2.
        where = f"http://127.0.0.1:{own.ports[next(iter(own.ports))]}/api/queues/{quote_plus(broker.vhost)}"
        query = f"?page=1&use_regex=true&pagination=false&name={quote_plus(pattern)}&page_size=100"
        user = base64.b64encode(f"{broker.user}:{broker.password}".encode()).decode()
        request = urllib.request.Request(where + query, headers={"Authorization": f"Basic {user}"})

        def answer() -> dict[str, Any]:
            with urllib.request.urlopen(request, timeout=10) as response:
                return json.load(response)

        async with emails_held(own.url, namespace), asyncio.timeout(30):
            while True:  # the API counts every now and then
                found = await asyncio.to_thread(answer)
                if sum(it.get("messages", 0) for it in found["items"]) == 8:
                    break
                await asyncio.sleep(0.2)
            assert found["page_count"] == 1
            assert {it["name"].replace(namespace, "rpcq", 1) for it in found["items"]} == set(names)
