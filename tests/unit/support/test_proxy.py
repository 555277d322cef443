"""The proxy of the fault tests: every fault is the one that it says, and no byte is lost, added or moved by it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from pamqp import commands, frame

from support.proxy import Proxy, proxy

BYTES = random.Random(1).randbytes(300_000)
A_WHILE = 0.1
"""Seconds in which what is held back would long have come."""


@dataclass
class End:
    """The broker's end of a connection: sends back what it hears, unless it is quiet."""

    writer: asyncio.StreamWriter
    heard: bytearray = field(default_factory=bytearray)
    ended: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass
class Server:
    url: str
    quiet: bool = False
    ends: list[End] = field(default_factory=list)


@contextlib.asynccontextmanager
async def a_server() -> AsyncIterator[Server]:
    made = Server("")
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        end = End(writer)
        made.ends.append(end)
        try:
            while data := await reader.read(65_536):
                end.heard += data
                if not made.quiet:
                    writer.write(data)
                    await writer.drain()
            end.ended.set_result("closed")
        except ConnectionResetError:
            end.ended.set_result("reset")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    made.url = f"amqp://me:secret@127.0.0.1:{server.sockets[0].getsockname()[1]}/v"
    try:
        yield made
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


class Peer:
    """A client on a bare socket: it reads what was delivered before a reset, where a StreamReader would drop it."""

    def __init__(self) -> None:
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def get(self, size: int) -> bytes:
        """The next so many bytes, at least one read."""
        found = b""
        while len(found) < size:
            data = await self._loop.sock_recv(self.sock, size - len(found))
            assert data, f"closed after {found!r}"
            found += data
        return found

    async def rest(self) -> tuple[bytes, str]:
        """All until the end, and which end that is."""
        found = b""
        try:
            while data := await self._loop.sock_recv(self.sock, 65_536):
                found += data
        except ConnectionResetError:
            return found, "reset"
        return found, "closed"

    async def hears_nothing(self) -> bool:
        try:
            async with asyncio.timeout(A_WHILE):
                await self._loop.sock_recv(self.sock, 1)
        except TimeoutError:
            return True
        return False


class Setting:
    """A server, a proxy in front of it, and clients that were closed by the end of the test."""

    def __init__(self, server: Server, between: Proxy, peers: contextlib.ExitStack) -> None:
        self.server = server
        self.between = between
        self._peers = peers

    async def bare(self) -> Peer:
        """A client whose connection the proxy need not have taken."""
        peer = Peer()
        self._peers.callback(peer.sock.close)
        parts = urlsplit(self.between.url)
        await asyncio.get_running_loop().sock_connect(peer.sock, (parts.hostname, parts.port))
        return peer

    async def peer(self) -> Peer:
        """A client that reached the server."""
        peer = await self.bare()
        quiet, self.server.quiet = self.server.quiet, False
        await peer.send(b"?")
        assert await peer.get(1) == b"?"
        self.server.quiet = quiet
        return peer


@contextlib.asynccontextmanager
async def a_setting() -> AsyncIterator[Setting]:
    async with a_server() as server:
        with contextlib.ExitStack() as peers:
            async with proxy(server.url) as between:
                yield Setting(server, between, peers)


@pytest.fixture
async def setting() -> AsyncIterator[Setting]:
    async with a_setting() as made:
        yield made


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    files = len(os.listdir("/dev/fd"))  # noqa: PTH208 - no path is of interest
    yield
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert len(os.listdir("/dev/fd")) == files  # noqa: PTH208


@pytest.fixture
def clock() -> Iterator[float]:
    return time.monotonic()


async def until_open(between: Proxy, number: int) -> None:
    while len(between) != number:  # noqa: ASYNC110 - what is waited for sets no event
        await asyncio.sleep(0.001)


async def through(peer: Peer, data: bytes) -> bytes:
    """What comes back for it."""
    sending = asyncio.create_task(peer.send(data))
    found = await peer.get(len(data))
    await sending
    return found


async def test_bytes_and_ends_are_passed_on_both_ways(setting: Setting) -> None:
    assert setting.between.url.startswith("amqp://me:secret@127.0.0.1:")
    assert setting.between.url.endswith("/v")
    assert setting.between.url != setting.server.url
    peer = await setting.peer()
    assert await through(peer, BYTES) == BYTES
    peer.sock.shutdown(socket.SHUT_WR)
    assert await peer.rest() == (b"", "closed")
    assert await setting.server.ends[0].ended == "closed"
    await until_open(setting.between, 0)


async def test_an_end_leaves_the_other_way_open(setting: Setting) -> None:
    peer = await setting.peer()
    setting.server.quiet = True
    setting.server.ends[0].writer.write_eof()
    assert await peer.rest() == (b"", "closed")
    await peer.send(BYTES)
    peer.sock.shutdown(socket.SHUT_WR)
    assert await setting.server.ends[0].ended == "closed"
    assert bytes(setting.server.ends[0].heard) == b"?" + BYTES


async def test_a_reset_of_either_side_is_one_of_the_other(setting: Setting) -> None:
    first, second = await setting.peer(), await setting.peer()
    linger = (socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    first.sock.setsockopt(*linger)
    first.sock.close()
    assert await setting.server.ends[0].ended == "reset"
    setting.server.ends[1].writer.get_extra_info("socket").setsockopt(*linger)
    setting.server.ends[1].writer.transport.abort()
    assert await second.rest() == (b"", "reset")
    await until_open(setting.between, 0)


async def test_a_broker_that_is_not_there_resets_the_client(setting: Setting) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with proxy(f"amqp://127.0.0.1:{unused.getsockname()[1]}") as between:
            parts = urlsplit(between.url)
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            with pytest.raises(ConnectionResetError):
                await reader.read()
            writer.close()
            with pytest.raises(ConnectionResetError):
                await writer.wait_closed()
            assert len(between) == 0


async def test_a_proxy_resets_what_is_open_when_it_ends() -> None:
    async with a_server() as server:
        with contextlib.ExitStack() as peers:
            async with proxy(server.url) as between:
                setting = Setting(server, between, peers)
                used, frozen = await setting.peer(), await setting.peer()
                between.connections[1].freeze()
                await frozen.send(b"held")
                late = await setting.bare()
            assert await used.rest() == (b"", "reset")
            assert await frozen.rest() == (b"", "reset")
            assert (await late.rest())[0] == b""
            assert len(between) == 0


async def test_back_pressure_is_passed_on(setting: Setting) -> None:
    setting.server.quiet = True
    peer = await setting.peer()
    setting.server.ends[0].writer.transport.pause_reading()
    sent = refused = 0
    while refused < 10:
        try:
            sent += peer.sock.send(BYTES)
            refused = 0
        except BlockingIOError:
            refused += 1
        await asyncio.sleep(0.01 if refused else 0)
    (connection,) = setting.between.connections
    assert connection.up._pieces.qsize() == 0
    assert sent < 40_000_000  # the kernel's buffers, and not the proxy's memory
    setting.server.ends[0].writer.transport.resume_reading()
    while len(setting.server.ends[0].heard) < 1 + sent:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def test_a_frozen_proxy_passes_nothing_on_and_closes_nothing(setting: Setting) -> None:
    between = setting.between
    peer = await setting.peer()
    (end,) = setting.server.ends
    between.freeze()
    await peer.send(b"held")
    end.writer.write(b"too")
    assert await peer.hears_nothing()
    peer.sock.shutdown(socket.SHUT_WR)
    await asyncio.sleep(A_WHILE)
    assert bytes(end.heard) == b"?"
    assert not end.ended.done()
    between.thaw()
    assert await peer.rest() == (b"tooheld", "closed")


async def test_a_frozen_proxy_does_not_tell_of_a_reset(setting: Setting) -> None:
    peer = await setting.peer()
    setting.between.freeze()
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.sock.close()
    await asyncio.sleep(A_WHILE)
    assert not setting.server.ends[0].ended.done()
    assert len(setting.between) == 1
    setting.between.thaw()
    assert await setting.server.ends[0].ended == "reset"


async def test_what_is_opened_in_a_freeze_is_frozen_too(setting: Setting) -> None:
    setting.between.freeze()
    peer = await setting.bare()
    await peer.send(b"held")
    assert await peer.hears_nothing()
    assert setting.server.ends == []
    setting.between.thaw()
    assert await peer.get(4) == b"held"


async def test_one_way_can_be_frozen(setting: Setting) -> None:
    setting.server.quiet = True
    peer = await setting.peer()
    (end,) = setting.server.ends
    setting.between.up.frozen = True
    await peer.send(b"held")
    end.writer.write(b"passed")
    assert await peer.get(6) == b"passed"
    assert bytes(end.heard) == b"?"
    setting.between.up.frozen = False
    setting.between.down.frozen = True
    setting.server.quiet = False
    await peer.send(b"back")
    assert await peer.hears_nothing()
    assert bytes(end.heard) == b"?heldback"
    setting.between.heal()
    assert await peer.get(8) == b"heldback"


async def test_one_connection_can_be_frozen(setting: Setting) -> None:
    first, second = await setting.peer(), await setting.peer()
    setting.between.connections[0].freeze()
    await first.send(b"held")
    assert await through(second, b"passed") == b"passed"
    assert await first.hears_nothing()
    setting.between.connections[0].thaw()
    assert await first.get(4) == b"held"


async def test_a_reset_is_one_for_both_sides_of_every_connection(setting: Setting) -> None:
    parts = urlsplit(setting.between.url)
    peer = await setting.peer()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(b"?")
    assert await reader.readexactly(1) == b"?"
    assert len(setting.between) == 2
    setting.between.reset()
    assert len(setting.between) == 0
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    with pytest.raises(ConnectionResetError):
        await writer.wait_closed()
    assert await peer.rest() == (b"", "reset")
    assert [await end.ended for end in setting.server.ends] == ["reset", "reset"]
    assert await through(await setting.peer(), b"again") == b"again"


async def test_a_chosen_connection_is_reset_alone(setting: Setting) -> None:
    peers = [await setting.peer() for _ in range(3)]
    first, second, third = setting.between.connections
    second.reset()
    assert await peers[1].rest() == (b"", "reset")
    assert await setting.server.ends[1].ended == "reset"
    assert setting.between.connections == [first, third]
    for peer in (peers[0], peers[2]):
        assert await through(peer, b"still") == b"still"
    second.reset()  # has been, and is not an error


async def test_a_frozen_connection_can_be_reset(setting: Setting) -> None:
    peer = await setting.peer()
    setting.between.freeze()
    late = await setting.bare()
    await until_open(setting.between, 2)
    await peer.send(b"held")
    setting.between.reset()
    assert await peer.rest() == (b"", "reset")
    assert await late.rest() == (b"", "reset")
    assert await setting.server.ends[0].ended == "reset"


@pytest.mark.parametrize("split", [0, 1, 7])
@pytest.mark.parametrize("after", [1, 2, 1000])
async def test_a_cut_delivers_exactly_as_many_bytes_from_the_broker(setting: Setting, after: int, split: int) -> None:
    peer = await setting.peer()
    setting.between.down.split = split
    setting.between.cut(down=after)
    await peer.send(BYTES[:2000])
    assert await peer.rest() == (BYTES[:after], "reset")
    assert await setting.server.ends[0].ended == "reset"


async def test_a_cut_delivers_what_a_slow_reader_has_no_room_for_yet(setting: Setting) -> None:
    peer = await setting.peer()
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)  # the rest waits in the kernel of the proxy
    setting.server.quiet = True
    setting.between.cut(down=len(BYTES))
    setting.server.ends[0].writer.write(BYTES + b"not this")
    await asyncio.sleep(A_WHILE)
    assert await peer.rest() == (BYTES, "reset")


async def test_a_cut_delivers_exactly_as_many_bytes_to_the_broker(setting: Setting) -> None:
    received = bytearray()
    lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    class Broker(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            received.extend(data)

        def connection_lost(self, exc: Exception | None) -> None:
            lost.set_result(exc)

    server = await asyncio.get_running_loop().create_server(Broker, "127.0.0.1", 0)
    async with proxy(f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}") as between:
        between.cut(up=100)  # of what is opened later, too
        peer = await Setting(setting.server, between, setting._peers).bare()
        await peer.send(BYTES[:150])
        assert await peer.rest() == (b"", "reset")
        assert isinstance(await lost, ConnectionResetError)
        assert bytes(received) == BYTES[:100]
    server.close()
    await server.wait_closed()


async def test_a_cut_counts_from_when_it_is_asked_for_and_can_be_taken_back(setting: Setting) -> None:
    first, second = await setting.peer(), await setting.peer()
    setting.between.connections[1].cut(up=3)
    assert await through(first, b"abcdef") == b"abcdef"
    assert await through(second, b"ab") == b"ab"
    setting.between.cut()
    assert await through(second, b"abcdef") == b"abcdef"
    setting.between.connections[0].cut(down=0)
    assert await first.rest() == (b"", "reset")
    assert len(setting.between) == 1


async def test_a_delay_is_one_of_latency_and_not_of_throughput(setting: Setting, clock: float) -> None:
    peer = await setting.peer()
    setting.between.up.delay = 0.2
    sent, came = [], []
    for number in range(100):
        sent.append(time.monotonic())
        await peer.send(bytes([number]))
        await asyncio.sleep(0.002)  # pieces of their own
    for number in range(100):
        assert await peer.get(1) == bytes([number])
        came.append(time.monotonic())
    assert all(there - here >= 0.2 for here, there in zip(sent, came, strict=True))
    assert came[-1] - clock < 100 * 0.2  # which it would take if each waited for the one before


async def test_both_ways_are_delayed_and_healing_lets_go_at_once(setting: Setting, clock: float) -> None:
    peer = await setting.peer()
    setting.between.both(delay=0.1)
    assert await through(peer, b"there and back") == b"there and back"
    assert time.monotonic() - clock >= 0.2
    setting.between.both(delay=3600)
    await peer.send(b"held")
    assert await peer.hears_nothing()
    setting.between.heal()
    assert await peer.get(4) == b"held"


async def test_a_throttle_passes_on_no_more_bytes_a_second(setting: Setting, clock: float) -> None:
    peer = await setting.peer()
    setting.between.down.rate = 20_000
    await peer.send(BYTES[:8000])
    for quarter in range(4):
        assert await peer.get(2000) == BYTES[quarter * 2000 : (quarter + 1) * 2000]
        assert time.monotonic() - clock >= (quarter + 1) * 2000 / 20_000
    setting.between.down.rate = 0.001
    await peer.send(b"held")
    assert await peer.hears_nothing()
    setting.between.down.rate = 0
    assert await peer.get(4) == b"held"


async def test_pieces_are_split_and_come_one_by_one(setting: Setting) -> None:
    came: list[bytes] = []
    done = asyncio.Event()

    class Pieces(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            transport.write(BYTES[:1000])

        def data_received(self, data: bytes) -> None:
            came.append(data)
            if sum(map(len, came)) == 1000:
                done.set()
                self.transport.close()

    setting.between.down.split = 1
    parts = urlsplit(setting.between.url)
    await asyncio.get_running_loop().create_connection(Pieces, parts.hostname, parts.port)
    await done.wait()
    assert b"".join(came) == BYTES[:1000]
    assert len(came) > 500  # the kernel may join what is not read in time


@pytest.mark.parametrize("faults", [{"split": 997}, {"split": 4096, "delay": 0.05, "rate": 1_500_000}])
async def test_all_together_keep_bytes_and_their_order(setting: Setting, faults: dict[str, float]) -> None:
    peers = [await setting.peer(), await setting.peer()]
    setting.between.both(**faults)
    sums = {hashlib.sha256(data).digest() for data in await asyncio.gather(*(through(peer, BYTES) for peer in peers))}
    assert sums == {hashlib.sha256(BYTES).digest()}
    for connection in setting.between.connections:
        assert connection.up.passed == connection.down.passed == 1 + len(BYTES)


async def test_a_filter_changes_what_goes_one_way(setting: Setting) -> None:
    peer = await setting.peer()
    setting.between.to_broker = bytes.upper
    assert await through(peer, b"abc") == b"ABC"
    assert bytes(setting.server.ends[0].heard) == b"?ABC"
    setting.between.from_broker = lambda data: data[:-1] + b"!"
    assert await through(peer, b"abc") == b"AB!"
    setting.between.from_broker = lambda data: b""
    await peer.send(b"swallowed")
    assert await peer.hears_nothing()
    setting.between.heal()
    assert await through(peer, b"abc") == b"abc"
    (connection,) = setting.between.connections
    assert (connection.up.passed, connection.down.passed) == (19, 10)


async def test_an_error_of_a_filter_resets_its_connection_and_is_raised_at_the_end() -> None:
    def fail(data: bytes) -> bytes:
        raise LookupError("of the filter")

    async def use() -> None:
        async with a_setting() as setting:
            peer = await setting.peer()
            setting.between.to_broker = fail
            await peer.send(b"x")
            assert await peer.rest() == (b"", "reset")
            assert len(setting.between) == 0

    with pytest.raises(BaseExceptionGroup) as caught:
        await use()
    assert caught.group_contains(LookupError, match="of the filter")


async def test_new_connections_are_refused_until_they_are_allowed(setting: Setting) -> None:
    peer = await setting.peer()
    setting.between.refuse()
    for _ in range(3):
        refused = await setting.bare()
        assert (await refused.rest())[0] == b""
    assert len(setting.server.ends) == len(setting.between) == 1
    assert await through(peer, b"still") == b"still"
    setting.between.allow()
    assert await through(await setting.peer(), b"again") == b"again"


async def test_a_fault_that_there_is_not_is_an_error(setting: Setting) -> None:
    with pytest.raises(AttributeError):
        setting.between.up.dealy = 1
    with pytest.raises(AttributeError):
        setting.between.both(dealy=1)


def start_ok(name: str | None) -> bytes:
    properties = {"product": "p", "capabilities": {"basic.nack": True}}
    if name is not None:
        properties["connection_name"] = name
    return b"AMQP\0\0\x09\x01" + frame.marshal(commands.Connection.StartOk(properties, response="\0me\0secret"), 0)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("orders@host consuming", "consuming"),
        ("a publishing house publishing", "publishing"),
        ("publishing", "publishing"),
        ("", ""),
        ("somebody's", ""),
        ("consuming orders", ""),
        (None, ""),
    ],
)
async def test_a_connection_has_the_role_that_its_name_says(setting: Setting, name: str | None, role: str) -> None:
    peer = await setting.peer()
    (connection,) = setting.between.connections
    connection_said = start_ok(name)
    half = connection_said.find(b"connection_name") + 20
    assert await through(peer, connection_said[:half]) == connection_said[:half]
    assert connection.role == ""
    assert await through(peer, connection_said[half:]) == connection_said[half:]
    assert connection.role == role
    assert setting.between.with_role("consuming") == ([connection] if role == "consuming" else [])
