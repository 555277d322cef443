"""What operators get: health and metrics over HTTP, queue depths, alerts, and the page about them."""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import json
import pstats
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import yaml
from prometheus_client import CollectorRegistry, Info
from prometheus_client.core import Metric
from sqlalchemy import create_engine

from rpcq import Client, ConfigurationError, Service, Worker
from rpcq.cli.doctor import DISCONNECTED, UNCOUNTED_FROM, _examine, _policy
from rpcq.cli.observing import Observing
from rpcq.errors import STATUS_CODES
from rpcq.observability.health import MAX_CONNECTIONS, HealthServer, parse_address
from rpcq.observability.management import management_of
from rpcq.observability.metrics import Metrics
from rpcq.observability.queues import MANAGEMENT_AGAIN, Kind, QueueDepth, QueueWatch
from rpcq.observer import ObservedCall, ObservedJob, ObservedSend, Observer
from rpcq.options import ClientOptions
from rpcq.outbox import Outbox
from rpcq.outbox.watching import OutboxMetrics
from rpcq.url import parse
from rpcq.wire.events import EventTopology
from rpcq.wire.job_queues import LANES, ORDERED_LANES
from rpcq.wire.topology import Queue
from support.broker import Broker, Setup, vhost_of
from support.broker import broker as a_broker
from support.command import Process, Rpcq, wait_until
from support.load import until
from support.ports import free_ports
from support.proxy import proxy

ROOT = Path(__file__).parents[3]
ALERTS = ROOT / "docker/alerts.yml"
PAGE = (ROOT / "docs/operations.md").read_text("utf-8")


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


# Health.


def observed_worker(rpcq: Rpcq, *arguments: str) -> tuple[Process, str]:
    """A worker that serves its health, and where."""
    (port,) = free_ports(1)
    return rpcq.worker("services:things", "--http", f"127.0.0.1:{port}", *arguments), f"http://127.0.0.1:{port}"


def test_a_worker_serves_its_metrics_and_promtool_finds_no_fault_with_them(rpcq: Rpcq, promtool: str) -> None:
    worker, at = observed_worker(rpcq)
    assert rpcq.call("things.add", "x=1", "y=2").stdout == "3\n"
    rpcq.call_refused("things.fail", "secret=s3cr3t", code=1)
    assert get(f"{at}/livez") == (200, "ok\n")
    assert get(f"{at}/readyz") == (200, "ok\n")
    assert get(f"{at}/other")[0] == 404
    wanted = {  # a request is finished when the broker has its reply, and its caller may have that before
        'rpcq_worker_requests_finished_total{code="OK",method="add",service="things"} 1.0',
        'rpcq_worker_requests_finished_total{code="UNKNOWN",method="fail",service="things"} 1.0',
        f'rpcq_queue_consumers{{kind="calls",queue="{rpcq.namespace}.req.things",service="things"}} 1.0',
    }
    wait_until(lambda: wanted <= set(get(f"{at}/metrics")[1].splitlines()))
    status, text = get(f"{at}/metrics")
    assert status == 200
    assert "s3cr3t" not in text
    checked = subprocess.run([promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False)
    assert [line for line in checked.stderr.splitlines() if "rpcq_" in line] == []
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0


def neighbours() -> tuple[int, int]:
    """Two free ports in a row."""
    for _ in range(100):
        (first,) = free_ports(1)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", first + 1))
            return first, first + 1
    raise AssertionError("no two free ports in a row")


def test_each_of_several_processes_has_a_port_of_its_own(rpcq: Rpcq) -> None:
    first, second = neighbours()
    worker = rpcq.start(
        "worker", "--namespace", rpcq.namespace, "services:things", "--processes", "2", "--http", f"127.0.0.1:{first}"
    )
    worker.wait_for(lambda: sum('"worker started"' in line for line in worker.lines) == 2)
    for port in (first, second):
        assert get(f"http://127.0.0.1:{port}/readyz") == (200, "ok\n")
    children = psutil.Process(worker._process.pid).children()
    listening = [[it.laddr.port for it in child.net_connections() if it.status == "LISTEN"] for child in children]
    assert sorted(listening) == [[first], [second]]
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0


def test_a_port_that_is_taken_is_named(rpcq: Rpcq) -> None:
    _, at = observed_worker(rpcq)
    address = at.removeprefix("http://")
    said = rpcq.refused("worker", "--namespace", rpcq.namespace, "services:things", "--http", address, code=2)
    assert f"cannot listen on {address}" in said
    assert "HOST:PORT" in rpcq.refused("worker", "services:things", "--http", "nine", code=2)


async def test_a_worker_without_its_broker_lives_and_is_not_ready(rabbitmq_url: str, namespace: str) -> None:
    service = Service("things")
    service.method(name="work")(lambda: None)
    async with proxy(rabbitmq_url) as between, Worker(service, url=between.url, namespace=namespace) as worker:
        server = HealthServer("127.0.0.1:0", worker.why_not_ready, registry=CollectorRegistry())
        server.start()
        try:

            async def asked(path: str) -> tuple[int, str]:
                return await asyncio.to_thread(get, f"http://127.0.0.1:{server.port}/{path}")

            assert await asked("readyz") == (200, "ok\n")
            between.refuse()
            between.reset()
            await until(lambda: not worker.connected)
            status, why = await asked("readyz")
            assert status == 503
            assert "session to the broker is down" in why
            assert await asked("livez") == (200, "ok\n")
            between.allow()
            await until(lambda: worker.connected)
            assert await asked("readyz") == (200, "ok\n")
            await worker.stop()
            assert await asked("readyz") == (503, "the worker is stopped\n")
        finally:
            server.close()


async def test_an_event_loop_that_is_blocked_is_not_alive_and_one_that_goes_on_is() -> None:
    server = HealthServer("127.0.0.1:0", str, patience=1.5, registry=CollectorRegistry())
    server.start()
    found: list[tuple[int, str]] = []
    at = f"http://127.0.0.1:{server.port}/livez"
    try:
        assert await asyncio.to_thread(get, at) == (200, "ok\n")
        asked = asyncio.get_running_loop().run_in_executor(None, lambda: (time.sleep(2), found.append(get(at))))
        time.sleep(3)  # noqa: ASYNC251 - what it is about
        await asked
        assert found[0][0] == 503
        assert "the event loop is blocked for" in found[0][1]
        assert await asyncio.to_thread(get, at) == (200, "ok\n")
    finally:
        server.close()


@pytest.fixture
async def health(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """The port of a server that gives its clients one second."""
    monkeypatch.setattr("rpcq.observability.health.CLIENT_TIMEOUT", 1.0)
    registry = CollectorRegistry()
    Info("large", "More than a socket's buffers hold.", registry=registry).info({"text": "a" * 20_000_000})
    server = HealthServer("127.0.0.1:0", str, registry=registry)
    server.start()
    yield server.port
    server.close()


def serving() -> int:
    """The threads that serve a connection."""
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


async def test_idle_connections_have_a_bounded_number_of_threads_and_end(
    health: int, capfd: pytest.CaptureFixture[str]
) -> None:
    most = 0
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", health), 10)) for _ in range(200)]
        for connection in idle:
            most = max(most, serving())
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.to_thread(connection.recv, 1) == b""
        await until(lambda: serving() == 0)
    assert 0 < most <= MAX_CONNECTIONS
    assert await asyncio.to_thread(get, f"http://127.0.0.1:{health}/livez") == (200, "ok\n")
    assert "Traceback" not in capfd.readouterr().err


async def test_a_client_that_sends_a_byte_now_and_then_is_dropped(
    health: int, capfd: pytest.CaptureFixture[str]
) -> None:
    def trickle() -> float:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", health), 10) as connection, contextlib.suppress(ConnectionError):
            while time.monotonic() < began + 10:
                connection.sendall(b"G")
                time.sleep(0.2)
        return time.monotonic() - began

    assert await asyncio.to_thread(trickle) < 5
    await until(lambda: serving() == 0)
    assert "Traceback" not in capfd.readouterr().err


async def test_a_client_that_does_not_take_its_response_is_dropped(
    health: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", health), 10) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        await until(lambda: serving() == 1)
        await until(lambda: serving() == 0)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("request_", [b"GET /" + b"a" * 40_000, b"GET / HTTP/1.0\r\nA: " + b"a" * 40_000])
async def test_a_request_that_is_too_large_is_dropped(health: int, request_: bytes) -> None:
    def send() -> bytes:
        with socket.create_connection(("127.0.0.1", health), 10) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(request_)
            return connection.recv(1)
        return b""

    assert await asyncio.to_thread(send) == b""
    await until(lambda: serving() == 0)


@pytest.mark.parametrize(
    ("text", "address"),
    [(":9100", ("0.0.0.0", 9100)), ("9100", ("0.0.0.0", 9100)), ("[::1]:1", ("::1", 1)), ("a.b:2", ("a.b", 2))],
)
def test_an_address_is_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", ":", "host", "host:", "1:2:3", ":65536", "host:-1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="HOST:PORT"):
        parse_address(text)


def test_further_processes_take_the_ports_after_the_first() -> None:
    observing = Observing("127.0.0.1:9100", 0.5, 0.1)
    assert observing.nth(1) == observing
    assert observing.nth(3) == Observing("127.0.0.1:9102", 0.5, 0.1)
    assert Observing().nth(3) == Observing()
    assert Observing("nine").nth(3) == Observing("nine")


# Queues.


async def filled(url: str, namespace: str, kind: Any, count: int) -> Service:
    """A request queue with requests that nobody serves."""
    service = Service("things", queue_type=kind)
    service.method(name="work")(lambda: None)
    async with Worker(service, url=url, namespace=namespace):
        pass
    async with Client(url, namespace=namespace) as client:
        calls = [asyncio.ensure_future(client.call("things.work")) for _ in range(count)]
        async with asyncio.timeout(10):
            while await depth(url, namespace, service) < count:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.05)
    await asyncio.gather(*calls, return_exceptions=True)
    return service


async def depth(url: str, namespace: str, service: Service) -> int:
    (found,) = await QueueWatch([service], url, namespace=namespace, management="").look()
    return found.messages


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_the_depth_of_a_queue_is_asked_by_a_passive_declaration(
    rabbitmq_url: str, namespace: str, kind: Any
) -> None:
    service = await filled(rabbitmq_url, namespace, kind, 7)
    async with asyncio.timeout(10):
        by_name: list[QueueDepth] = []
        while not by_name:
            by_name = await QueueWatch(["things", "none"], rabbitmq_url, namespace=namespace, management="").look()
    (found,) = by_name
    assert (found.service, found.messages, found.consumers) == ("things", 7, 0)
    assert (found.unacknowledged, found.source) == (None, "declare")
    assert found.queue == f"{namespace}.{'req' if kind == 'classic' else 'once'}.things"
    assert await depth(rabbitmq_url, namespace, service) == 7


async def test_where_the_management_api_does_not_answer_queues_are_declared(
    rabbitmq_url: str, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rpcq")
    service = await filled(rabbitmq_url, namespace, "classic", 1)
    (port,) = free_ports(1)
    looks: list[QueueDepth] = []
    watch = QueueWatch(
        [service],
        rabbitmq_url,
        namespace=namespace,
        management=f"http://127.0.0.1:{port}",
        every=0.01,
        on_depth=looks.append,
    )
    assert [(it.messages, it.source) for it in await watch.look()] == [(1, "declare")]
    async with watching(watch):
        await until(lambda: len(looks) > MANAGEMENT_AGAIN)
    assert {(it.messages, it.source) for it in looks} == {(1, "declare")}
    # Once by `look`; by `run` once for so many looks, and it is tried again after them.
    assert caplog.text.count("the management API cannot be used") == 1 + -(-len(looks) // MANAGEMENT_AGAIN)


@asynccontextmanager
async def watching(watch: QueueWatch) -> AsyncIterator[None]:
    """The watch runs, and has not ended by itself at the end."""
    running = asyncio.create_task(watch.run())
    try:
        yield
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.wait([running])


def test_a_depth_names_the_subscription_or_the_lane_of_its_queue() -> None:
    events, name = EventTopology("n"), "mail.out"

    def depth(queue: Queue, kind: Kind) -> QueueDepth:
        return QueueDepth(name, queue.name, 0, 0, 0, "declare", kind)

    for lane in ("normal", *LANES, *ORDERED_LANES):
        of_jobs = depth(events.jobs.queue(name, lane), "jobs")
        assert (of_jobs.lane, of_jobs.subscription) == (lane, "")
    for queue, kind in ((events.queue(name, "ship", ()), "events"), (events.suspects(name, "ship"), "suspects")):
        of_events = depth(queue, kind)  # type: ignore[arg-type]  # one of `Kind`
        assert (of_events.lane, of_events.subscription) == ("", "ship")
    for other in (depth(events.jobs.suspects(name), "suspects"), depth(events.jobs.dead_queue(name), "dead")):
        assert (other.lane, other.subscription) == ("", "")


@pytest.fixture(scope="module")
def managed() -> Iterator[Broker]:
    """A broker with the management API, on its first further port."""
    setup = Setup(
        config="management.tcp.port = {ports[0]}\ncollect_statistics_interval = 500\nloopback_users.guest = false\n",
        files=lambda _: {"enabled_plugins": b"[rabbitmq_management].\n"},
        ports=1,
    )
    with a_broker(setup=setup) as own:
        yield own


@pytest.mark.long
async def test_the_management_api_also_tells_what_is_unacknowledged(managed: Broker, namespace: str) -> None:
    service, release = Service("things"), asyncio.Event()
    service.method(name="hold")(release.wait)
    management = f"http://127.0.0.1:{next(iter(managed.ports.values()))}"
    watch = QueueWatch([service], managed.url, namespace=namespace, management=management)
    async with (
        Worker(service, url=managed.url, namespace=namespace, prefetch=3),
        Client(managed.url, namespace=namespace) as client,
    ):
        calls = [asyncio.create_task(client.call("things.hold")) for _ in range(5)]
        expected = [QueueDepth("things", f"{namespace}.req.things", 2, 3, 1, "management")]
        async with asyncio.timeout(20):
            while [replace(it, published=None, acknowledged=None) for it in await watch.look()] != expected:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.2)
        wrong = QueueWatch(
            [service], managed.url, namespace=namespace, management=management.replace("//", "//guest:wrong@")
        )
        assert [(it.messages, it.source) for it in await wrong.look()] == [(2, "declare")]
        release.set()
        await asyncio.gather(*calls)


@pytest.mark.long
async def test_a_queue_that_the_user_may_not_ask_for_is_left_out(managed: Broker, namespace: str) -> None:
    """Up to RabbitMQ 4.2, everybody may ask for every queue."""
    service = Service("things")
    service.method(name="work")(lambda: None)
    service.job(name="note")(lambda: None)
    async with Worker(service, url=managed.url, namespace=namespace):
        pass
    managed.ctl("add_user", namespace, "pw")
    managed.ctl("set_permissions", "-p", vhost_of(managed.url), namespace, "^$", "^$", r"\.job\.things$|delay\.0.$")
    url = urlsplit(managed.url)
    as_them = url._replace(netloc=f"{namespace}:pw@{url.netloc.rpartition('@')[2]}").geturl()
    found = await QueueWatch([service], as_them, namespace=namespace, management="").look()
    is_free = managed.release < UNCOUNTED_FROM
    every = ["calls", "jobs", "suspects", "dead", "delayed", "lost"]
    assert [it.kind for it in found] == (every if is_free else ["jobs"])


@pytest.mark.long
async def test_the_doctor_looks_for_a_policy_that_makes_a_no_wrong(managed: Broker, namespace: str) -> None:
    """RabbitMQ knows the policy from 4.3 on; before, nothing comes back uncounted, and the doctor does not ask."""
    service = Service("things", queue_type="quorum")
    service.method(name="work")(asyncio.Event().wait)
    management = f"http://127.0.0.1:{next(iter(managed.ports.values()))}"
    knows = managed.release >= UNCOUNTED_FROM
    options = ClientOptions(namespace=namespace)

    async def said() -> list[str]:
        examined = _examine(parse(managed.url), managed.url, "a test", options, [service], management)
        return [f"{it.grade.name} {it.text} {it.fix}" async for it in examined if DISCONNECTED in it.text + it.fix]

    async with Worker(service, url=managed.url, namespace=namespace):
        if not knows:
            assert await said() == []
            return
        async with asyncio.timeout(20):
            while not any("no policy sets" in it for it in await said()):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.2)
        where = "-p", vhost_of(managed.url)
        policy = json.dumps({DISCONNECTED: 30_000})
        pattern = rf"^{namespace}\.once\."
        managed.ctl("set_policy", *where, namespace, pattern, policy, "--apply-to", "queues")
        async with asyncio.timeout(20):
            while "BAD" not in (told := " ".join(await said())):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        assert "to 30 s, and clients assume 60 s" in told
        assert "disconnected_timeout=30" in told


@pytest.mark.parametrize(
    ("answer", "grade", "text"),
    [
        ({"effective_policy_definition": {DISCONNECTED: 59_999}}, "BAD", "to 59.999 s, and clients assume 60 s"),
        ({"effective_policy_definition": {DISCONNECTED: 60_000}}, "GOOD", "no policy sets"),
        ({"effective_policy_definition": {"max-length": 5}}, "GOOD", "no policy sets"),
        ({"effective_policy_definition": None}, "GOOD", "no policy sets"),
        (
            {"effective_policy_definition": {DISCONNECTED: "soon"}},
            "DOUBT",
            "the policy is not known, because the management API failed",
        ),
        (None, "DOUBT", "the policy is not known, because the management API failed"),
    ],
)
async def test_what_the_doctor_makes_of_a_policy(answer: object, grade: str, text: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = json.dumps(answer).encode() if answer else b"no JSON"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        management = management_of(parse("amqp://localhost/"), f"http://127.0.0.1:{port}")
        found = await _policy(management, "rpcq.once.x", ClientOptions())
    assert (found.grade.name, text in found.text) == (grade, True)


async def test_without_a_management_api_the_doctor_says_that_a_policy_is_not_known() -> None:
    found = await _policy(None, "rpcq.once.x", ClientOptions())
    assert found.grade.name == "DOUBT"
    assert "--management" in found.fix


async def test_a_queue_that_crosses_its_threshold_is_told_once_each_way(rabbitmq_url: str, namespace: str) -> None:
    service = await filled(rabbitmq_url, namespace, "classic", 5)
    told: asyncio.Queue[tuple[int, bool]] = asyncio.Queue()
    looks: list[QueueDepth] = []

    def on_threshold(depth: QueueDepth, above: bool) -> None:
        told.put_nowait((depth.messages, above))
        raise RuntimeError("of the hook, which does not end the watch")

    def on_depth(depth: QueueDepth) -> None:
        looks.append(depth)
        raise RuntimeError("of the other hook")

    watch = QueueWatch(
        [service],
        rabbitmq_url,
        namespace=namespace,
        management="",
        every=0.05,
        threshold=3,
        on_threshold=on_threshold,
        on_depth=on_depth,
    )
    async with watching(watch), asyncio.timeout(10):
        assert await told.get() == (5, True)
        async with Worker(service, url=rabbitmq_url, namespace=namespace):
            assert (await told.get())[1] is False
        seen = len(looks)
        await until(lambda: len(looks) >= seen + 3)
    assert told.empty()


async def test_a_watch_outlives_a_broker_that_is_away(rabbitmq_url: str, namespace: str) -> None:
    service = await filled(rabbitmq_url, namespace, "classic", 1)
    looks: list[QueueDepth] = []
    async with proxy(rabbitmq_url) as between:
        watch = QueueWatch([service], between.url, namespace=namespace, management="", every=0.1, on_depth=looks.append)
        async with watching(watch):
            await until(lambda: looks)
            between.refuse()
            between.reset()
            await asyncio.sleep(0.3)
            between.allow()
            seen = len(looks)
            await until(lambda: len(looks) >= seen + 2)


async def test_a_watch_outlives_a_file_for_tls_that_is_gone(
    namespace: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"amqps://localhost:1/?cafile={tmp_path / 'gone.pem'}"
    async with watching(QueueWatch(["things"], url, namespace=namespace, every=0.01)):
        await until(lambda: caplog.text.count("queues cannot be looked at") >= 3)
    assert "gone.pem" in caplog.records[0].cause  # type: ignore[attr-defined]  # a field of the line


def test_what_cannot_be_watched_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="in-process"):
        QueueWatch(["things"], "memory://")
    with pytest.raises(ConfigurationError, match="every"):
        QueueWatch(["things"], "amqp://localhost", every=0)
    with pytest.raises(ConfigurationError, match="services must be one or more"):
        QueueWatch([], "amqp://localhost")
    with pytest.raises(ConfigurationError, match="management"):
        QueueWatch(["things"], "amqp://localhost", management="localhost")
    with pytest.raises(ConfigurationError, match="management") as caught:
        QueueWatch(["things"], "amqp://localhost", management="http://guest:s3cr3t")  # no host: it reads as a port
    assert "s3cr3t" not in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"observers must hold instances of rpcq\.observer\.Observer; got 5"):
        Client("memory://", observers=[5])  # type: ignore[list-item]


# What is off, costs nothing.


async def test_where_nobody_looks_no_function_of_observers_is_called(namespace: str) -> None:
    service = Service("things")

    @service.method
    async def add(x: int, y: int) -> int:
        return x + y

    @service.job
    async def note(x: int) -> None: ...

    url = f"memory://{namespace}"

    async def called(*observers: Observer) -> set[str]:
        """The functions of observers that calls and jobs run through."""
        async with (
            Worker(service, url=url, observers=observers) as worker,
            Client(url, observers=observers) as client,
        ):
            await client.call("things.add", x=1, y=1)
            await client.send(note, x=0)
            with cProfile.Profile() as profile:
                await asyncio.gather(*(client.call("things.add", x=i, y=1) for i in range(100)))
                await asyncio.gather(*(client.send(note, x=i) for i in range(2)))
                await until(lambda: not worker.in_flight)
        stats: Any = pstats.Stats(profile)
        watching = re.compile(r"observ|prometheus|opentelemetry|rpcq.logs.py|structlog")
        names = {f"{file}:{name}" for file, _, name in stats.stats if watching.search(f"{file}:{name}")}
        return {name for name in names if "/tests/" not in name}

    assert await called() == set()
    found = " ".join(await called(Metrics(CollectorRegistry())))  # so it would be seen
    assert all(name in found for name in ("on_call", "on_request", "on_send", "on_job"))


# Alerts, and the page.


def test_promtool_finds_no_fault_with_the_alerts(promtool: str) -> None:
    checked = subprocess.run([promtool, "check", "rules", str(ALERTS)], text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"] for rule in group["rules"]]


def known() -> set[str]:
    """The names of all metrics."""
    metrics = Metrics(CollectorRegistry())
    return names_of(metrics.collect())


def names_of(families: Iterable[Metric]) -> set[str]:
    return {family.name + {"counter": "_total", "info": "_info"}.get(family.type, "") for family in families}


def known_of_outbox() -> set[str]:
    return names_of(OutboxMetrics(Outbox(create_engine("sqlite:///nowhere.db"), "memory://")).collect())


def test_alerts_ask_for_metrics_that_there_are_and_the_page_says_what_to_do_about_each() -> None:
    names = known() | known_of_outbox()
    for rule in rules():
        for name in re.findall(r"rpcq_\w+", rule["expr"]):
            assert name.removesuffix("_bucket") in names, (rule["alert"], name)
    headings = re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)
    assert headings == [rule["alert"] for rule in rules()]


def test_methods_beyond_the_limit_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpcq.observability.counting.MAX_METHODS", 3)
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for number in (*range(5), 0, 4):
        call = ObservedCall(b"", "shop", f"m{number}", f"shop.m{number}")
        ended = metrics.on_call(call)
        call.code = "OK"
        ended(call)

    def counted(service: str, method: str) -> float | None:
        labels = {"service": service, "method": method, "code": "OK"}
        return registry.get_sample_value("rpcq_client_calls_finished_total", labels)

    assert [counted("shop", f"m{number}") for number in range(5)] == [2, 1, 1, None, None]
    assert counted("other", "") == 3


def test_jobs_beyond_the_limit_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpcq.observability.counting.MAX_METHODS", 3)
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for number in (*range(5), 0, 4):
        job = ObservedJob(b"", "shop", f"j{number}", f"shop.j{number}")
        job.ran = True
        ended = metrics.on_job(job)
        job.outcome, job.code = "dead", "attempts"
        ended(job)
        send = ObservedSend(b"", "shop", f"j{number}", f"shop.j{number}")
        sent = metrics.on_send(send)
        send.queued = "maybe"
        sent(send)

    def counted(service: str, method: str) -> tuple[float | None, ...]:
        labels = {"service": service, "method": method}
        value = registry.get_sample_value
        return (
            value("rpcq_worker_jobs_ended_total", {**labels, "outcome": "dead", "reason": "attempts"}),
            value("rpcq_client_jobs_sent_total", {**labels, "queued": "maybe"}),
            value("rpcq_worker_jobs_started_total", labels),
        )

    assert [counted("shop", f"j{number}") for number in range(5)] == [(2,) * 3, (1,) * 3, (1,) * 3, *[(None,) * 3] * 2]
    assert counted("other", "") == (3,) * 3


class Counted:
    """Metrics of calls that end with given codes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)

    def end(self, code: str, method: str = "price") -> None:
        call = ObservedCall(b"", "shop", method, f"shop.{method}")
        ended = self.metrics.on_call(call)
        call.code = code
        ended(call)

    def codes(self, method: str = "price") -> dict[str, float]:
        return self._by("code", "rpcq_client_calls_finished_total", method)

    def reasons(self) -> dict[str, float]:
        return self._by("reason", "rpcq_client_notices_total", None)

    def _by(self, label: str, name: str, method: str | None) -> dict[str, float]:
        samples = (sample for family in self.registry.collect() for sample in family.samples)
        return {it.labels[label]: it.value for it in samples if it.name == name and it.labels.get("method") == method}


def test_codes_that_a_worker_makes_up_are_counted_together_beyond_the_limit() -> None:
    counted = Counted()
    for number in range(500):
        counted.end(f"made_up_{number}")
    for code in ("OK", "CANCELLED", *STATUS_CODES, "made_up_7", "made_up_499"):
        counted.end(code)
    own = {f"made_up_{number}": 1.0 for number in range(50)}
    named = {"OK": 1.0, **dict.fromkeys(STATUS_CODES, 1.0), "CANCELLED": 2.0}
    assert counted.codes() == {**own, **named, "made_up_7": 2.0, "OTHER": 451.0}
    counted.end("made_up_499", "sell")
    assert counted.codes("sell") == {"made_up_499": 1.0}


@pytest.mark.parametrize("code", ["", "MADE_UP", "x" * 101, 'a"b', "a\nb", "OTHER"])
def test_what_is_no_code_is_counted_as_another(code: str) -> None:
    counted = Counted()
    counted.end(code)
    counted.end("out_of_stock")
    assert counted.codes() == {"OTHER": 1.0, "out_of_stock": 1.0}


def test_reasons_that_rabbitmq_does_not_have_are_counted_together() -> None:
    counted = Counted()
    for reason in ("expired", "delivery_limit", "rejected", "maxlen", "expired", *map(str, range(100))):
        counted.metrics.on_notice(reason)
    assert counted.reasons() == {"expired": 2, "delivery_limit": 1, "rejected": 1, "maxlen": 1, "OTHER": 100}


def test_the_page_has_every_metric_and_no_other() -> None:
    table = PAGE.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(rpcq_\w+)`", table)) == known()
    table = PAGE.partition("\n## Outbox\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(rpcq_\w+)`", table)) == known_of_outbox()


ALERT_TESTS = """
rule_files: [{alerts}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'rpcq_queue_messages{{service="shop",queue="rpcq.req.shop",kind="calls",instance="a"}}'
        values: '2000x20'
      - series: 'rpcq_queue_consumers{{service="shop",queue="rpcq.req.shop",kind="calls",instance="a"}}'
        values: '0x20'
      - series: 'rpcq_sessions{{role="consuming",instance="a"}}'
        values: '1x20'
      - series: 'rpcq_sessions_up{{role="consuming",instance="a"}}'
        values: '1x5 0x15'
      - series: 'rpcq_client_calls_finished_total{{service="shop",method="price",code="OK"}}'
        values: '0+90x20'
      - series: 'rpcq_client_calls_finished_total{{service="shop",method="price",code="ABORTED"}}'
        values: '0+10x20'
      - series: 'rpcq_client_calls_finished_total{{service="shop",method="sell",code="out_of_stock"}}'
        values: '0+100x20'
      - series: 'rpcq_client_notices_total{{reason="delivery_limit"}}'
        values: '0x10 3x10'
    alert_rule_test:
      - {{eval_time: 3m, alertname: RpcqSessionDown, exp_alerts: []}}
      - {{eval_time: 3m, alertname: RpcqWorkersLost, exp_alerts: []}}
      - eval_time: 10m
        alertname: RpcqSessionDown
        exp_alerts:
          - exp_labels: {{severity: page, role: consuming, instance: a}}
            exp_annotations: {{summary: "a has no consuming session to the broker"}}
      - eval_time: 10m
        alertname: RpcqNoConsumers
        exp_alerts:
          - exp_labels: {{severity: page, service: shop, queue: rpcq.req.shop}}
            exp_annotations: {{summary: "rpcq.req.shop has messages, and no consumer"}}
      - eval_time: 10m
        alertname: RpcqQueueDeep
        exp_alerts:
          - exp_labels: {{severity: page, service: shop, queue: rpcq.req.shop}}
            exp_annotations: {{summary: "2k requests wait in rpcq.req.shop"}}
      - eval_time: 15m
        alertname: RpcqCallsFail
        exp_alerts:
          - exp_labels: {{severity: page, service: shop, method: price}}
            exp_annotations: {{summary: "10% of the calls of shop.price fail"}}
    promql_expr_test:
      - expr: count(ALERTS{{alertname="RpcqWorkersLost", alertstate="firing"}})
        eval_time: 14m
        exp_samples: [{{value: 1}}]
"""


JOB_ALERT_TESTS = """
rule_files: [{alerts}]
evaluation_interval: 1m
tests:
  - name: backlogs
    interval: 1m
    input_series:
      - series: 'rpcq_queue_messages{{service="mail",queue="rpcq.job.mail",kind="jobs",instance="a"}}'
        values: '0x5 5000x40'
      - series: 'rpcq_worker_jobs_started_total{{service="mail",method="welcome",instance="a"}}'
        values: '0+10x10 100x35'
      - series: 'rpcq_queue_messages{{service="shop",queue="rpcq.job.shop",kind="jobs",instance="a"}}'
        values: '5000x45'
      - series: 'rpcq_worker_jobs_started_total{{service="shop",method="ship",instance="a"}}'
        values: '0+10x45'
      - series: 'rpcq_queue_consumers{{service="shop",queue="rpcq.job.shop",kind="jobs",instance="a"}}'
        values: '1x45'
      - series: 'rpcq_worker_job_queue_wait_seconds_bucket{{service="shop",method="ship",le="900"}}'
        values: '0+10x20 200+1x25'
      - series: 'rpcq_worker_job_queue_wait_seconds_bucket{{service="shop",method="ship",le="1800"}}'
        values: '0+10x45'
      - series: 'rpcq_worker_job_queue_wait_seconds_bucket{{service="shop",method="ship",le="+Inf"}}'
        values: '0+10x45'
    alert_rule_test:
      - {{eval_time: 20m, alertname: RpcqJobsStandStill, exp_alerts: []}}
      - eval_time: 40m
        alertname: RpcqJobsStandStill
        exp_alerts:
          - exp_labels: {{severity: page, service: mail, queue: rpcq.job.mail}}
            exp_annotations: {{summary: "5k jobs wait in rpcq.job.mail, and none was begun for 15 minutes"}}
      - {{eval_time: 40m, alertname: RpcqQueueDeep, exp_alerts: []}}
      - {{eval_time: 20m, alertname: RpcqJobsWaitLong, exp_alerts: []}}
      - eval_time: 40m
        alertname: RpcqJobsWaitLong
        exp_alerts:
          - exp_labels: {{severity: ticket, service: shop, method: ship}}
            exp_annotations: {{summary: "half of the jobs shop.ship wait 21m 40s before they start"}}
  - name: letters
    interval: 1m
    input_series:
      - series: 'rpcq_queue_messages{{service="mail",queue="rpcq.dead.mail",kind="dead",instance="a"}}'
        values: '0x5 3x15'
      - series: 'rpcq_queue_messages{{service="mail",queue="rpcq.dead.mail",kind="dead",instance="b"}}'
        values: '0x5 3x15'
      - series: 'rpcq_queue_messages{{service="",queue="rpcq.lost",kind="lost",instance="a"}}'
        values: '0x5 2x15'
      - series: 'rpcq_queue_messages{{service="",queue="rpcq.delay.*",kind="delayed",instance="a"}}'
        values: '9000x20'
      - series: 'rpcq_queue_moving{{service="",queue="rpcq.delay.*",kind="delayed",instance="a"}}'
        values: '5x20'
      - series: 'rpcq_queue_moving{{service="mail",queue="rpcq.job.mail",kind="jobs",instance="a"}}'
        values: '0x5 1x15'
    alert_rule_test:
      - {{eval_time: 4m, alertname: RpcqDeadLetters, exp_alerts: []}}
      - {{eval_time: 4m, alertname: RpcqLostMessages, exp_alerts: []}}
      - {{eval_time: 10m, alertname: RpcqMessagesStuck, exp_alerts: []}}
      - {{eval_time: 15m, alertname: RpcqNoConsumers, exp_alerts: []}}
      - {{eval_time: 15m, alertname: RpcqQueueDeep, exp_alerts: []}}
      - eval_time: 10m
        alertname: RpcqDeadLetters
        exp_alerts:
          - exp_labels: {{severity: ticket, service: mail, queue: rpcq.dead.mail}}
            exp_annotations: {{summary: "3 jobs of mail are dead letters"}}
      - eval_time: 10m
        alertname: RpcqLostMessages
        exp_alerts:
          - exp_labels: {{severity: page, queue: rpcq.lost}}
            exp_annotations: {{summary: "2 jobs are in rpcq.lost: their queues are gone"}}
      - eval_time: 18m
        alertname: RpcqMessagesStuck
        exp_alerts:
          - exp_labels: {{severity: page, queue: rpcq.job.mail}}
            exp_annotations: {{summary: "1 messages of rpcq.job.mail do not get into the queue that they are to go to"}}
  - name: a ladder that stands still
    interval: 1m
    input_series:
      - series: 'rpcq_queue_moving{{service="",queue="rpcq.delay.*",kind="delayed",instance="a"}}'
        values: '32x20'
    promql_expr_test:
      - expr: count(ALERTS{{alertname="RpcqMessagesStuck", queue="rpcq.delay.*", alertstate="firing"}})
        eval_time: 14m
        exp_samples: [{{value: 1}}]
  - name: attempts
    interval: 1m
    input_series:
      - series: 'rpcq_worker_jobs_ended_total{{service="mail",method="welcome",outcome="done",reason=""}}'
        values: '0+30x30'
      - series: 'rpcq_worker_jobs_ended_total{{service="mail",method="welcome",outcome="retried",reason="failed"}}'
        values: '0+10x30'
      - series: 'rpcq_worker_jobs_ended_total{{service="mail",method="report",outcome="done",reason=""}}'
        values: '0+90x30'
      - series: 'rpcq_worker_jobs_ended_total{{service="mail",method="report",outcome="retried",reason="failed"}}'
        values: '0+10x30'
      - series: 'rpcq_worker_jobs_ended_total{{service="mail",method="resize",outcome="suspect",reason="workers_lost"}}'
        values: '0x15 4x15'
    alert_rule_test:
      - eval_time: 20m
        alertname: RpcqJobsRetried
        exp_alerts:
          - exp_labels: {{severity: ticket, service: mail, method: welcome}}
            exp_annotations: {{summary: "25% of the attempts of mail.welcome have to be repeated"}}
      - {{eval_time: 15m, alertname: RpcqJobWorkersLost, exp_alerts: []}}
      - eval_time: 20m
        alertname: RpcqJobWorkersLost
        exp_alerts:
          - exp_labels: {{severity: page, service: mail, method: resize}}
            exp_annotations: {{summary: "workers that held jobs mail.resize were lost again and again"}}
"""


EVENT_ALERT_TESTS = """
rule_files: [{alerts}]
evaluation_interval: 1m
tests:
  - name: a subscription that stands still beside another that goes on
    interval: 1m
    input_series:
      - series: 'rpcq_queue_messages{{service="pay",queue="rpcq.sub.pay:charge",kind="events",instance="a"}}'
        values: '7x40'
      - series: 'rpcq_queue_messages{{service="pay",queue="rpcq.sub.pay:refund",kind="events",instance="a"}}'
        values: '7x40'
      - series: 'rpcq_worker_jobs_started_total{{service="pay",method="charge",instance="a"}}'
        values: '0+5x5 25x35'
      - series: 'rpcq_worker_jobs_started_total{{service="pay",method="refund",instance="a"}}'
        values: '0+5x40'
    alert_rule_test:
      - {{eval_time: 15m, alertname: RpcqEventsStandStill, exp_alerts: []}}
      - {{eval_time: 35m, alertname: RpcqJobsStandStill, exp_alerts: []}}
      - eval_time: 35m
        alertname: RpcqEventsStandStill
        exp_alerts:
          - exp_labels: {{severity: page, service: pay, queue: "rpcq.sub.pay:charge", method: charge}}
            exp_annotations: {{summary: "7 events wait in rpcq.sub.pay:charge, and none was begun for 15 minutes"}}
  - name: a backlog that is too long at today's pace
    interval: 1m
    input_series:
      - series: 'rpcq_queue_messages{{service="pay",queue="rpcq.sub.pay:charge",kind="events",instance="a"}}'
        values: '6000x40'
      - series: 'rpcq_queue_messages{{service="pay",queue="rpcq.sub.pay:charge",kind="events",instance="b"}}'
        values: '6000x40'
      - series: 'rpcq_worker_jobs_started_total{{service="pay",method="charge",instance="a"}}'
        values: '0+60x40'
      - series: 'rpcq_worker_jobs_started_total{{service="pay",method="charge",instance="b"}}'
        values: '0+60x40'
      - series: 'rpcq_queue_messages{{service="mail",queue="rpcq.job.mail",kind="jobs",instance="c"}}'
        values: '3000x40'
      - series: 'rpcq_worker_jobs_started_total{{service="mail",method="tell",instance="c"}}'
        values: '0+120x40'
      - series: 'rpcq_queue_messages{{service="still",queue="rpcq.job.still",kind="jobs",instance="d"}}'
        values: '3000x40'
      - series: 'rpcq_worker_jobs_started_total{{service="still",method="do",instance="d"}}'
        values: '5x40'
    alert_rule_test:
      - {{eval_time: 9m, alertname: RpcqBacklogLong, exp_alerts: []}}
      - eval_time: 30m
        alertname: RpcqBacklogLong
        exp_alerts:
          - exp_labels: {{severity: ticket, service: pay}}
            exp_annotations: {{summary: "pay needs 50m 0s for the jobs and events that wait"}}
  - name: subscribers that are lost
    interval: 1m
    input_series:
      - series: 'rpcq_queue_consumers{{service="pay",queue="rpcq.sub.pay:charge",kind="events",instance="a"}}'
        values: '2x5 _x90'
      - series: 'rpcq_queue_consumers{{service="mail",queue="rpcq.sub.mail:tell",kind="events",instance="b"}}'
        values: '1x5 0x90'
      - series: 'rpcq_queue_consumers{{service="ship",queue="rpcq.sub.ship:book",kind="events",instance="c"}}'
        values: '1x5 0x1 1x88'
      - series: 'rpcq_queue_consumers{{service="old",queue="rpcq.sub.old:do",kind="events",instance="d"}}'
        values: '0x95'
      - series: 'rpcq_queue_consumers{{service="mail",queue="rpcq.req.mail",kind="calls",instance="b"}}'
        values: '1x5 0x90'
    alert_rule_test:
      - {{eval_time: 5m, alertname: RpcqSubscriberLost, exp_alerts: []}}
      - eval_time: 20m
        alertname: RpcqSubscriberLost
        exp_alerts:
          - exp_labels: {{severity: page, service: pay, queue: "rpcq.sub.pay:charge"}}
            exp_annotations:
              summary: "rpcq.sub.pay:charge had consumers within the last hour, and has none that is known"
          - exp_labels: {{severity: page, service: mail, queue: "rpcq.sub.mail:tell"}}
            exp_annotations:
              summary: "rpcq.sub.mail:tell had consumers within the last hour, and has none that is known"
      - {{eval_time: 90m, alertname: RpcqSubscriberLost, exp_alerts: []}}
  - name: events that nobody hears any more
    interval: 1m
    input_series:
      - series: 'rpcq_client_events_published_total{{event="order.placed",queued="yes",heard="yes",instance="a"}}'
        values: '0+10x10 100x20'
      - series: 'rpcq_client_events_published_total{{event="order.placed",queued="yes",heard="no",instance="a"}}'
        values: '0x10 0+10x20'
      - series: 'rpcq_client_events_published_total{{event="shop.visited",queued="yes",heard="no",instance="a"}}'
        values: '0+10x30'
    alert_rule_test:
      - {{eval_time: 8m, alertname: RpcqEventsUnheard, exp_alerts: []}}
      - eval_time: 25m
        alertname: RpcqEventsUnheard
        exp_alerts:
          - exp_labels: {{severity: page, event: order.placed}}
            exp_annotations: {{summary: "100 events order.placed found no queue, and such events did before"}}
"""


OUTBOX_ALERT_TESTS = """
rule_files: [{alerts}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'rpcq_outbox_oldest_seconds{{job="payment",instance="a"}}'
        values: '0x5 0+60x15'
      - series: 'rpcq_outbox_oldest_seconds{{job="orders",instance="b"}}'
        values: '2x20'
      - series: 'rpcq_outbox_rows{{job="payment",state="dead",instance="a"}}'
        values: '0x10 2x10'
    alert_rule_test:
      - {{eval_time: 5m, alertname: RpcqOutboxStands, exp_alerts: []}}
      - {{eval_time: 9m, alertname: RpcqOutboxDead, exp_alerts: []}}
      - eval_time: 12m
        alertname: RpcqOutboxDead
        exp_alerts:
          - exp_labels: {{severity: ticket, job: payment}}
            exp_annotations: {{summary: "2 rows of an outbox cannot be sent"}}
      - eval_time: 10m
        alertname: RpcqOutboxStands
        exp_alerts:
          - exp_labels: {{severity: page, job: payment}}
            exp_annotations: {{summary: "rows of an outbox have waited for 4m 0s"}}
"""


@pytest.mark.parametrize(
    "tests",
    [ALERT_TESTS, JOB_ALERT_TESTS, EVENT_ALERT_TESTS, OUTBOX_ALERT_TESTS],
    ids=["calls", "jobs", "events", "outbox"],
)
def test_alerts_fire_when_they_should_and_not_before(promtool: str, tmp_path: Path, tests: str) -> None:
    test = tmp_path / "alerts_test.yml"
    test.write_text(tests.format(alerts=ALERTS))
    ran = subprocess.run([promtool, "test", "rules", str(test)], text=True, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
