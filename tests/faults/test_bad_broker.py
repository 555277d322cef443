"""Brokers that cannot be used: each is told as what it is, at once, and nothing is left open."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

import aio_pika
import psutil
import pytest

from rpcq import BrokerError, Client, ConfigurationError, Service, Worker
from rpcq.errors import AuthenticationFailed, BrokerUnreachable, ProtocolError, TopologyMismatch, VhostNotFound
from support.broker import Broker, with_vhost
from support.load import READY

SECRET = "s3cr3t-0f-this-test"
TIMEOUT = 30.0
"""Seconds that an attempt may take here: none needs them, on however slow a machine, but that of the next line."""

SHORT = 0.5
"""The same, where nothing ever comes and the attempt has to be given up."""

Open = Callable[..., Awaitable[None]]


class Lifespans:
    """A service that says whether it is being served."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.service = Service("things", lifespan=self._lifespan)
        self.service.method(self.work)

    async def work(self) -> None: ...

    @asynccontextmanager
    async def _lifespan(self) -> AsyncIterator[None]:
        self.told.append("entered")
        yield
        self.told.append("left")


async def open_client(url: str, namespace: str, connect_timeout: float = TIMEOUT) -> None:
    client = Client(url, namespace=namespace, connect_timeout=connect_timeout)
    try:
        await client.connect()
    finally:
        await client.close()


async def open_worker(url: str, namespace: str, connect_timeout: float = TIMEOUT) -> None:
    lifespans = Lifespans()
    worker = Worker(lifespans.service, url=url, namespace=namespace, connect_timeout=connect_timeout)
    try:
        await worker.start()
    finally:
        await worker.stop()
        assert lifespans.told == ["entered", "left"]


@pytest.fixture(params=[open_client, open_worker], ids=["client", "worker"])
def opening(request: pytest.FixtureRequest) -> Open:
    return request.param


@pytest.fixture(autouse=True)
def logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, logger="rpcq")
    return caplog


async def refused(logs: pytest.LogCaptureFixture, opening: Open, url: str, namespace: str) -> BrokerError:
    """Open what is refused: the same as `failed`, and it is told before the time of the attempt is over."""
    error, took = await failed(logs, opening, url, namespace, TIMEOUT)
    assert took < TIMEOUT
    return error


async def failed(
    logs: pytest.LogCaptureFixture, opening: Open, url: str, namespace: str, connect_timeout: float
) -> tuple[BrokerError, float]:
    """Open what cannot be: the error, once it is sure that nothing is left and nothing was told; and its seconds."""
    others, sockets = asyncio.all_tasks(), open_sockets()
    began = time.monotonic()
    with pytest.raises(BrokerError) as caught:
        await opening(url, namespace, connect_timeout)
    took = time.monotonic() - began
    await nothing_left(others, sockets)
    for text in (str(caught.value), repr(caught.value), logs.text):
        assert SECRET not in text
    return caught.value, took


def open_sockets() -> set[tuple[object, ...]]:
    """What this process has open to anywhere."""
    own = psutil.Process().net_connections("tcp")
    return {(it.fd, it.laddr, it.raddr) for it in own if it.raddr}


async def nothing_left(tasks: set[asyncio.Task[object]], sockets: set[tuple[object, ...]]) -> None:
    """No task and no socket beyond these, as soon as the loop has gone round a few times."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READY):
            while asyncio.all_tasks() - tasks or open_sockets() - sockets:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.005)
    assert not asyncio.all_tasks() - tasks
    assert not open_sockets() - sockets
    gc.collect()  # what was forgotten open complains now, and warnings are errors


@dataclass
class Peer:
    """Something that listens, and is no broker."""

    port: int
    heard: list[bytes] = field(default_factory=list)
    connected: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"amqp://user:{SECRET}@127.0.0.1:{self.port}/"


@asynccontextmanager
async def listening(says: bytes | None, *, hangs_up: bool = False) -> AsyncIterator[Peer]:
    """A server that answers with these bytes, or nothing at all, and then waits or hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer.connected.set()
        handlers.append(asyncio.current_task())
        try:
            if says is not None:
                peer.heard.append(await reader.read(8))
                writer.write(says)
            while not hangs_up and await reader.read(1024):
                pass
        except ConnectionError:
            pass
        finally:
            writer.close()

    handlers: list[asyncio.Task[None] | None] = []
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    peer = Peer(server.sockets[0].getsockname()[1])
    yield peer
    server.close()
    async with asyncio.timeout(READY):  # each ends when its client has closed
        await asyncio.gather(*(task for task in handlers if task is not None))


def a_closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def with_user(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{quote(user, safe='')}:{quote(password, safe='')}@{host}").geturl()


# What is wrong with the URL.


@pytest.mark.parametrize(
    ("url", "named"),
    [
        (f"http://user:{SECRET}@localhost/", "'http:"),
        (f"redis://user:{SECRET}@localhost/", "'redis:"),
        (f"amqp://user:{SECRET}@/vhost", "must name a host"),
        (f"amqp://user:{SECRET}@localhost:99999/", "a port from 1 to 65535"),
        (f"amqp://user:{SECRET}@localhost:port/", "localhost:***"),
        (f"amqp://user:{SECRET}@localhost/?heartbeat=5", "'heartbeat'"),
        (f"user:{SECRET}@localhost", "amqp://user:password@host"),
    ],
)
@pytest.mark.parametrize("kind", ["client", "worker"])
async def test_a_url_that_cannot_be_is_refused_before_anything_is_opened(
    url: str, named: str, kind: str, logs: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Client(url) if kind == "client" else Worker(Lifespans().service, url=url)
    assert named in str(caught.value)
    assert SECRET not in logs.text
    if "://" in url:  # without, nothing tells what is a password
        assert SECRET not in str(caught.value)


# Nobody there.


async def test_a_host_that_does_not_resolve_is_named(
    opening: Open, namespace: str, logs: pytest.LogCaptureFixture
) -> None:
    url = f"amqp://user:{SECRET}@no-such-host.invalid/"
    error = await refused(logs, opening, url, namespace)
    assert isinstance(error, BrokerUnreachable)
    assert "no-such-host.invalid:5672" in str(error)
    assert not error.permanent


async def test_a_port_that_nobody_listens_on_is_named(
    opening: Open, namespace: str, logs: pytest.LogCaptureFixture
) -> None:
    port = a_closed_port()
    error = await refused(logs, opening, f"amqp://user:{SECRET}@127.0.0.1:{port}/", namespace)
    assert isinstance(error, BrokerUnreachable)
    assert f"127.0.0.1:{port}" in str(error)


# Somebody else there.


@pytest.mark.parametrize(
    ("says", "hangs_up"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", True),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", False),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", False),
        (b"\x15\x03\x01\x00\x02\x02\x46", True),  # TLS: a fatal alert
        (b"\x00" * 64, False),
        (b"\xff" * 64, False),
        (b"AMQP\x03\x01\x00\x00", True),  # an AMQP 1.0 broker tells its version and hangs up
        (b"AMQP\x00\x00\x09\x01", True),
    ],
    ids=["http", "http kept open", "ssh", "tls", "zeros", "ones", "amqp 1.0", "the header back"],
)
async def test_what_does_not_speak_amqp_is_told_as_that(
    opening: Open, namespace: str, logs: pytest.LogCaptureFixture, says: bytes, hangs_up: bool
) -> None:
    async with listening(says, hangs_up=hangs_up) as peer:
        error = await refused(logs, opening, peer.url, namespace)
        assert peer.heard == [b"AMQP\x00\x00\x09\x01"], "it went on after the first answer"
    assert isinstance(error, ProtocolError)
    assert f"127.0.0.1:{peer.port}" in str(error)
    assert "not an AMQP 0-9-1 broker" in str(error)


@pytest.mark.parametrize("says", [None, b"", b"\x01\x00\x00"], ids=["nothing", "nothing after the header", "a bit"])
async def test_what_never_answers_is_given_up_after_the_connect_timeout(
    opening: Open, namespace: str, logs: pytest.LogCaptureFixture, says: bytes | None
) -> None:
    async with listening(says) as peer:
        error, took = await failed(logs, opening, peer.url, namespace, SHORT)
    assert took >= SHORT * 0.9
    assert isinstance(error, BrokerUnreachable)
    assert f"127.0.0.1:{peer.port}" in str(error)
    assert "did not answer within 0.5 s" in str(error)


async def test_what_hangs_up_at_once_is_unreachable(
    opening: Open, namespace: str, logs: pytest.LogCaptureFixture
) -> None:
    async with listening(None, hangs_up=True) as peer:
        error = await refused(logs, opening, peer.url, namespace)
    assert isinstance(error, BrokerUnreachable)
    assert f"127.0.0.1:{peer.port}" in str(error)


async def test_a_port_without_tls_is_never_spoken_to_in_plaintext(
    opening: Open, namespace: str, logs: pytest.LogCaptureFixture
) -> None:
    async with listening(b"AMQP\x00\x00\x09\x01") as peer:
        error = await refused(logs, opening, peer.url.replace("amqp:", "amqps:"), namespace)
        assert peer.heard
        assert all(heard[:1] == b"\x16" for heard in peer.heard), "something else than a TLS handshake was sent"
    assert isinstance(error, BrokerUnreachable)
    assert f"127.0.0.1:{peer.port}" in str(error)
    assert "TLS" in str(error)


async def test_a_connection_that_is_cancelled_while_it_opens_leaves_nothing_open(
    opening: Open, namespace: str, logs: pytest.LogCaptureFixture
) -> None:
    async with listening(None) as peer:
        others, sockets = asyncio.all_tasks(), open_sockets()
        task = asyncio.ensure_future(opening(peer.url, namespace))
        async with asyncio.timeout(READY):
            await peer.connected.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The peer's end of the connection is a socket of this process, too, until it has seen ours close.
        await nothing_left(others, sockets)
        assert SECRET not in logs.text


# RabbitMQ, and it refuses.


async def test_a_wrong_password_is_told_as_that_with_the_users_name(
    opening: Open, rabbitmq_url: str, namespace: str, logs: pytest.LogCaptureFixture
) -> None:
    url = with_user(rabbitmq_url, "guest", SECRET)
    error = await refused(logs, opening, url, namespace)
    assert isinstance(error, AuthenticationFailed)
    assert error.permanent
    assert "'guest'" in str(error)
    assert urlsplit(url).hostname in str(error)


async def test_a_user_that_does_not_exist_is_told_as_a_wrong_password(
    opening: Open, rabbitmq_url: str, namespace: str, logs: pytest.LogCaptureFixture
) -> None:
    url = with_user(rabbitmq_url, "no:such@user", SECRET)
    error = await refused(logs, opening, url, namespace)
    assert isinstance(error, AuthenticationFailed)
    assert "'no:such@user'" in str(error)


async def test_a_vhost_that_does_not_exist_is_named(
    opening: Open, rabbitmq_url: str, namespace: str, logs: pytest.LogCaptureFixture
) -> None:
    error = await refused(logs, opening, with_vhost(rabbitmq_url, f"{namespace}/none"), namespace)
    assert isinstance(error, VhostNotFound)
    assert error.permanent
    assert f"'{namespace}/none'" in str(error)


@asynccontextmanager
async def queue_of_others(url: str, name: str) -> AsyncIterator[None]:
    """A queue that somebody declared before."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(name, durable=True)
        yield
        await queue.delete(if_unused=False, if_empty=False)


async def test_a_queue_that_exists_with_other_arguments_is_named_and_the_worker_does_not_start(
    rabbitmq_url: str, namespace: str, logs: pytest.LogCaptureFixture
) -> None:
    name = f"{namespace}.req.things"
    async with queue_of_others(rabbitmq_url, name):
        error = await refused(logs, open_worker, rabbitmq_url, namespace)
    assert isinstance(error, TopologyMismatch)
    assert error.permanent
    assert repr(name) in str(error)
    assert "inequivalent arg 'x-" in str(error)  # RabbitMQ's own words for what differs


async def test_a_worker_whose_first_host_is_down_and_whose_queue_is_different_says_so(
    rabbitmq_url: str, namespace: str, logs: pytest.LogCaptureFixture
) -> None:
    name = f"{namespace}.req.things"
    async with queue_of_others(rabbitmq_url, name):
        error = await refused(logs, open_worker, with_hosts(rabbitmq_url, f"127.0.0.1:{a_closed_port()}"), namespace)
    assert isinstance(error, TopologyMismatch)


# Several hosts.


def with_hosts(url: str, *before: str) -> str:
    """The URL with other hosts before its own."""
    parts = urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{credentials}@{','.join([*before, host])}").geturl()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first", ["closed", "unresolvable", "mute", "http"])
async def test_the_next_host_is_tried_where_the_first_is_dead(rabbitmq_url: str, namespace: str, first: str) -> None:
    service = Lifespans().service

    @service.method
    async def double(x: int) -> int:
        return 2 * x

    says = b"HTTP/1.1 400 Bad Request\r\n\r\n" if first == "http" else None
    async with listening(says, hangs_up=False) as peer:
        hosts = {"closed": f"127.0.0.1:{a_closed_port()}", "unresolvable": "no-such-host.invalid"}
        url = with_hosts(rabbitmq_url, hosts.get(first, f"127.0.0.1:{peer.port}"))
        # So long each connection waits for the mute host, and so long RabbitMQ has to let it in and to declare.
        seconds = 5.0 if first == "mute" else TIMEOUT
        worker = Worker(service, url=url, namespace=namespace, connect_timeout=seconds)
        client = Client(url, namespace=namespace, connect_timeout=seconds)
        async with AsyncExitStack() as stack:
            await asyncio.gather(stack.enter_async_context(worker), stack.enter_async_context(client))
            assert await client.call("things.double", x=2) == 4


async def test_where_all_hosts_are_dead_the_last_one_is_named(
    opening: Open, namespace: str, logs: pytest.LogCaptureFixture
) -> None:
    first, second = a_closed_port(), a_closed_port()
    url = f"amqp://user:{SECRET}@127.0.0.1:{first},127.0.0.1:{second}/"
    error = await refused(logs, opening, url, namespace)
    assert isinstance(error, BrokerUnreachable)
    assert f"127.0.0.1:{second}" in str(error)


# Afterwards.


async def test_a_client_that_could_not_connect_is_closed(namespace: str) -> None:
    client = Client(f"amqp://127.0.0.1:{a_closed_port()}/", namespace=namespace)
    with pytest.raises(BrokerUnreachable):
        await client.connect()
    with pytest.raises(RuntimeError, match="closed"):
        await client.call("things.work")
    with pytest.raises(RuntimeError, match="closed"):
        await client.connect()
    await client.close()


async def test_the_broker_of_these_tests_can_be_used(opening: Open, broker: Broker, namespace: str) -> None:
    """Else all that is refused above would prove nothing."""
    await opening(broker.url, namespace)
