"""Programs that block, as processes on a real RabbitMQ: how they end, fork, and are interrupted."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rpcq import Context, Service, Worker
from rpcq.sync import Client
from support.command import delete_queues
from support.proxy import proxy

pytestmark = pytest.mark.timeout(120)

SECONDS = 50.0
"""Seconds that a program may take: some fork ten times, and each child connects."""
ROOT = Path(__file__).resolve().parents[2]

PLAIN = """
import sys
sys.modules["uvloop"] = None  # as if it were not installed
"""

START = """
import atexit, gc, multiprocessing, os, sys, threading, warnings
from rpcq.sync import Client

warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
client = Client()
assert client.call("things.double", x=1) == 2
"""


@dataclass
class Things:
    """A service in this process, and what it has seen."""

    service: Service
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)


@pytest.fixture
async def things(rabbitmq_url: str, namespace: str) -> AsyncIterator[Things]:
    service = Service("things", queue_type="classic")
    made = Things(service)

    @service.method(idempotent=True)
    async def double(x: int) -> int:
        return 2 * x

    @service.method
    async def wait() -> None:
        made.waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            made.cancelled.set()
            raise

    @service.method
    async def seconds_left(context: Context) -> float:
        return context.deadline.remaining()

    async with Worker(service, url=rabbitmq_url, namespace=namespace, grace=0.1):
        yield made
    await asyncio.to_thread(delete_queues, rabbitmq_url, namespace, ["things"])


@asynccontextmanager
async def program(code: str, url: str, namespace: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program that shows every warning and every complaint about what was not closed."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("RPCQ_")}
    environment = {**outer, "RPCQ_URL": url, "RPCQ_NAMESPACE": namespace, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "default", "-c", code]  # not "-X dev": asyncio would tell of slow steps
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ran(code: str, url: str, namespace: str) -> tuple[int | None, str, str]:
    """The exit status of a program, and what it printed."""
    async with program(code, url, namespace) as process:
        out, err = await asyncio.wait_for(process.communicate(), SECONDS)
        return process.returncode, out.decode(), err.decode()


@pytest.fixture(params=["asyncio", "uvloop"])
def start(request: pytest.FixtureRequest) -> str:
    """How a program begins: with a client that it never closes."""
    return PLAIN + START if request.param == "asyncio" else START


# The end of a process.


@pytest.mark.parametrize(
    ("code", "status", "printed"),
    [
        pytest.param("", 0, "", id="at its end"),
        pytest.param("sys.exit(3)", 3, "", id="by sys.exit"),
        pytest.param("client.close(); client.close()", 0, "", id="after it was closed"),
        pytest.param(
            "atexit.register(lambda: print(client.call('things.double', x=2)))", 0, "4\n", id="with a last call"
        ),
        pytest.param(
            "threading.Thread(target=lambda: print(client.call('things.double', x=2))).start()",
            0,
            "4\n",
            id="after a thread",
        ),
    ],
)
async def test_a_process_ends_quietly_though_nobody_closed_the_client(
    things: Things, start: str, code: str, status: int, printed: str, rabbitmq_url: str, namespace: str
) -> None:
    assert await ran(start + code, rabbitmq_url, namespace) == (status, printed, "")


async def test_a_client_that_was_collected_before_is_warned_of_once(
    things: Things, start: str, rabbitmq_url: str, namespace: str
) -> None:
    status, printed, err = await ran(start + "del client; gc.collect()", rabbitmq_url, namespace)
    assert (status, printed) == (0, "")
    assert err.count("ResourceWarning") == 1
    assert "a client of rpcq.sync was not closed" in err
    assert "destroyed" not in err


async def test_a_process_ends_while_a_daemon_thread_waits_for_a_call(
    things: Things, start: str, rabbitmq_url: str, namespace: str
) -> None:
    code = """
from rpcq import OutcomeUnknown

def wait():
    try:
        client.call("things.wait")
    except OutcomeUnknown as error:
        print(error.executed, flush=True)

threading.Thread(target=wait, daemon=True).start()
sys.stdin.readline()
"""
    async with program(start + code, rabbitmq_url, namespace) as process:
        await asyncio.wait_for(things.waiting.wait(), SECONDS)
        out, err = await asyncio.wait_for(process.communicate(b"\n"), SECONDS)
    assert (process.returncode, err) == (0, b"client closed with calls under way count=1\n")
    assert out in (b"", b"maybe\n")  # a daemon thread may not come to print it


async def test_a_process_whose_broker_says_nothing_any_more_ends_in_bounded_time(
    things: Things, start: str, rabbitmq_url: str, namespace: str
) -> None:
    async with (
        proxy(rabbitmq_url) as between,
        program(start + "print('ready', flush=True); sys.stdin.readline()", between.url, namespace) as process,
    ):
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), SECONDS) == b"ready\n"
        between.freeze()
        # Before anybody notices that nothing comes: that takes two heartbeats, which are 20 s.
        out, err = await asyncio.wait_for(process.communicate(b"\n"), 19)
        assert (process.returncode, out, err) == (0, b"", b"")


# Forks.

FORKED = """
def child():
    assert not client.connected
    assert client.call("things.double", x=2) == 4
    assert client.connected

def fork(run):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sys.stdin.close()
    globals().pop("before", None)
    run()
    gc.collect()  # nothing of the parent is collected with complaints
    sys.exit(7)  # and so through the end of a process, with the parent's objects

before = client._connection.client
"""


@pytest.mark.parametrize("run", ["child", "lambda: None", "lambda: (child(), fork(child))"])
async def test_a_child_opens_its_own_connection_and_leaves_that_of_its_parent_alone(
    things: Things, start: str, run: str, rabbitmq_url: str, namespace: str
) -> None:
    code = f"""
print(fork({run}))
assert client.call("things.double", x=3) == 6
assert client._connection.client is before and before.connected
"""
    assert await ran(start + FORKED + code, rabbitmq_url, namespace) == (0, "7\n", "")


async def test_a_child_that_is_forked_while_threads_call_uses_the_client(
    things: Things, start: str, rabbitmq_url: str, namespace: str
) -> None:
    code = """
stop = threading.Event()

def work():
    while not stop.is_set():
        assert client.call("things.double", x=5) == 10

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
codes = [fork(child) for _ in range(10)]
stop.set()
for thread in threads:
    thread.join()
print(codes)
"""
    found = await ran(start + FORKED + code, rabbitmq_url, namespace)
    assert found == (0, f"{[7] * 10}\n", "")


async def test_a_pool_of_processes_uses_a_client_of_the_parent(
    things: Things, start: str, rabbitmq_url: str, namespace: str
) -> None:
    code = """
def double(x):
    return client.call("things.double", x=x)

with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(double, range(4)))
    pool.close()
    pool.join()
"""
    assert await ran(start + code, rabbitmq_url, namespace) == (0, "[0, 2, 4, 6]\n", "")


# Interrupts.


async def test_ctrl_c_while_a_call_waits_cancels_the_handler_and_the_client_goes_on(
    things: Things, start: str, rabbitmq_url: str, namespace: str
) -> None:
    code = """
try:
    client.call("things.wait")
except KeyboardInterrupt:
    print("interrupted", client.in_flight, flush=True)
print(client.call("things.double", x=4))
"""
    async with program(start + code, rabbitmq_url, namespace) as process:
        await asyncio.wait_for(things.waiting.wait(), SECONDS)
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(things.cancelled.wait(), SECONDS)
        out, err = await asyncio.wait_for(process.communicate(), SECONDS)
    assert (process.returncode, out, err) == (0, b"interrupted 0\n8\n", b"")


async def test_ctrl_c_that_nobody_catches_ends_the_process_and_cancels_the_handler(
    things: Things, start: str, rabbitmq_url: str, namespace: str
) -> None:
    async with program(start + "client.call('things.wait')", rabbitmq_url, namespace) as process:
        await asyncio.wait_for(things.waiting.wait(), SECONDS)
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), SECONDS)
        await asyncio.wait_for(things.cancelled.wait(), SECONDS)
    assert process.returncode == -signal.SIGINT
    assert err.count(b"Traceback") == 1
    assert err.endswith(b"KeyboardInterrupt\n")


async def test_ctrl_c_while_it_connects_leaves_nothing_open(
    things: Things, start: str, rabbitmq_url: str, namespace: str
) -> None:
    begun = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun.set()
        await reader.read()  # to its end
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    code = f"""
client.close()
client = Client({url!r}, connect_timeout=60.0)
try:
    client.connect()
except KeyboardInterrupt:
    print("interrupted", client.connected)
"""
    async with server, program(start + code, rabbitmq_url, namespace) as process:
        await asyncio.wait_for(begun.wait(), SECONDS)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), SECONDS)
    assert (process.returncode, out, err) == (0, b"interrupted False\n", b"")


# Connections.


async def test_it_comes_back_after_its_connections_were_cut_and_calls_wait_for_that(
    things: Things, rabbitmq_url: str, namespace: str
) -> None:
    def work() -> list[int]:
        with Client(between.url, namespace=namespace) as client:
            before = client.call("things.double", x=1)
            loop.call_soon_threadsafe(between.reset)
            found = [client.with_options(idempotent=True).call("things.double", x=x) for x in range(200)]
            return [before, *found]

    loop = asyncio.get_running_loop()
    async with proxy(rabbitmq_url) as between:
        assert await asyncio.to_thread(work) == [2, *(2 * x for x in range(200))]


async def test_threads_share_one_client_over_rabbitmq(things: Things, rabbitmq_url: str, namespace: str) -> None:
    def work() -> list[list[int]]:
        with Client(rabbitmq_url, namespace=namespace) as client, ThreadPoolExecutor(8) as pool:
            return [*pool.map(lambda n: [client.call("things.double", x=n * 50 + it) for it in range(50)], range(8))]

    assert await asyncio.to_thread(work) == [[2 * (n * 50 + it) for it in range(50)] for n in range(8)]


async def test_a_def_handler_passes_its_deadline_on(things: Things, rabbitmq_url: str, namespace: str) -> None:
    outer = Service("outer", queue_type="classic")

    @outer.method
    def ask() -> float:
        return float(client.call("things.seconds_left"))

    with Client(rabbitmq_url, namespace=namespace) as client:
        async with Worker(outer, url=rabbitmq_url, namespace=namespace):
            left = await asyncio.to_thread(client.with_options(timeout=20.0).call, "outer.ask")
    await asyncio.to_thread(delete_queues, rabbitmq_url, namespace, ["outer"])
    assert 0 < left <= 20  # a call of its own would have 30
