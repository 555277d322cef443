"""A TCP proxy between rpcq and a broker, for what a network does to connections."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import sys
import termios
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

Filter = Callable[[bytes], bytes]

CHUNK = 65_536
IN_FLIGHT = 1024  # pieces that a delay may hold: it costs no throughput, and is bounded all the same
TICKS = 20  # per second, at which a throttled stream gets its next bytes
HEAD = 4096  # bytes in which a client has said its name


def unchanged(data: bytes) -> bytes:
    return data


@dataclass(slots=True)
class Faults:
    """What is done to bytes that go one way, on every connection. A change takes effect at once, also on what waits.

    Attributes:
        frozen: nothing is passed on, nor that the sender closed or was reset.
        delay: seconds after which a piece is passed on; later pieces do not wait for it in addition.
        rate: bytes per second that a connection passes on at most; 0 for no limit.
        split: bytes in each write; 0 for what came with one read.
        filter: what becomes of what came with one read.
    """

    changed: asyncio.Event = field(default_factory=asyncio.Event, init=False, repr=False)
    frozen: bool = False
    delay: float = 0
    rate: float = 0
    split: int = 0
    filter: Filter = unchanged

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if name != "changed":
            self.wake()

    def wake(self) -> None:
        """Let everything that waits look again whether it has to."""
        self.changed.set()
        self.changed = asyncio.Event()

    def heal(self) -> None:
        self.frozen, self.delay, self.rate, self.split, self.filter = False, 0, 0, 0, unchanged


class Stream:
    """One way of one connection.

    Attributes:
        passed: bytes that were passed on.
    """

    def __init__(self, connection: Connection, faults: Faults) -> None:
        self.passed = 0
        self._connection = connection
        self._faults = faults
        self._cut_at: int | None = None
        self._ready = 0.0  # the time at which all that was passed on is paid for, where there is a rate
        self._pieces: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue(IN_FLIGHT)

    def cut(self, after: int | None) -> None:
        """Reset the connection as soon as so many more bytes are delivered; None for never."""
        self._cut_at = None if after is None else self.passed + after
        if after == 0:
            self._connection.reset()

    async def hold(self, due: Callable[[], float] = lambda: 0.0) -> None:
        """Wait while this is frozen, and until it is due: both are looked at again at each change of the faults."""
        loop = asyncio.get_running_loop()
        while (frozen := self._faults.frozen or self._connection.frozen) or due() > loop.time():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(None if frozen else due()):
                    await self._faults.changed.wait()

    async def read(self, reader: asyncio.StreamReader, heard: Callable[[bytes], None]) -> None:
        loop = asyncio.get_running_loop()
        data: bytes | None = None
        while data != b"":
            await self.hold()
            try:
                data = await reader.read(CHUNK)
            except OSError:
                await self._pieces.put((loop.time(), None))
                return
            heard(data)
            await self._pieces.put((loop.time(), data))
            if not self._faults.delay:
                await self._pieces.join()  # back-pressure: read on when that is written

    async def write(self, writer: asyncio.StreamWriter, reading: asyncio.Task[None]) -> bool:
        """Pass on what was read, with its end. Whether that succeeded."""
        try:
            while True:
                came, data = await self._pieces.get()
                await self.hold(lambda came=came: came + self._faults.delay)
                if data is None:
                    self._connection.reset()
                    return False
                if not data:
                    if writer.can_write_eof():
                        writer.write_eof()
                    else:
                        writer.close()
                    return True
                await self._pass(self._faults.filter(data), writer)
                self._pieces.task_done()
        except OSError:
            return False  # that side is gone: the stream that reads from it tells the other one, unless that is frozen
        finally:
            reading.cancel()

    async def _pass(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        faults = self._faults
        while data:
            rate_size = max(1, int(faults.rate / TICKS)) if faults.rate else len(data)
            part = data[: min(faults.split or len(data), rate_size)]
            start = max(loop.time(), self._ready)

            def due(start: float = start, size: int = len(part)) -> float:
                return start + size / faults.rate if faults.rate else 0.0

            await self.hold(due)
            self._ready = due()
            if self._cut_at is not None:
                part = part[: self._cut_at - self.passed]
            data = data[len(part) :]
            self.passed += len(part)
            writer.write(part)
            await writer.drain()
            if self.passed == self._cut_at:
                while _unsent(writer):  # noqa: ASYNC110 - which a RST would take back; the kernel tells of no change
                    await asyncio.sleep(0.001)
                self._connection.reset()
                raise ConnectionResetError("cut here")
            if faults.split:
                # A reader in this event loop gets its turn, twice as the first time it may come after this task.
                await asyncio.sleep(0)
                await asyncio.sleep(0)


class Connection:
    """A connection of a client, and its counterpart with the broker.

    Attributes:
        up: the stream to the broker.
        down: the stream from the broker.
        role: what rpcq uses it for, once it said so: "consuming" or "publishing"; "" for others.
        frozen: whether this one is frozen, whatever the others are.
    """

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.frozen = False
        self.role = ""
        self.up = Stream(self, proxy.up)
        self.down = Stream(self, proxy.down)
        self._proxy = proxy
        self._reader = reader
        self._writers = [writer]
        self._head = b""
        self._task: asyncio.Task[None] | None = None
        self._over = False

    def freeze(self) -> None:
        """Freeze both ways of this connection only."""
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        self._proxy.up.wake()
        self._proxy.down.wake()

    def cut(self, *, up: int | None = None, down: int | None = None) -> None:
        """Reset this connection as soon as so many more bytes went that way; None for never."""
        self.up.cut(up)
        self.down.cut(down)

    def reset(self) -> None:
        """Close both sides with a RST, whatever is still on its way."""
        self._end()
        if self._task is not None:
            self._task.cancel()

    async def run(self, host: str, port: int) -> None:
        if self._over:
            return
        self._task = asyncio.current_task()
        try:
            await self.up.hold()  # as what opens a connection would be held
            reader, writer = await asyncio.open_connection(host, port)
            self._writers.append(writer)
            for each in self._writers:
                # What is drained is in the kernel, but for a byte: with 0, a TLS transport stays paused with none left.
                each.transport.set_write_buffer_limits(high=1)
                each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.TaskGroup() as group:
                ways = (
                    (self.up, self._reader, writer, self._listen),
                    (self.down, reader, self._writers[0], lambda data: None),
                )
                writing = [
                    group.create_task(stream.write(end, group.create_task(stream.read(start, heard))))
                    for stream, start, end, heard in ways
                ]
            if all(task.result() for task in writing):
                for each in self._writers:
                    if not each.is_closing():
                        each.close()
                    await each.wait_closed()
        except OSError:
            pass  # the broker is not there, or a side is gone: so is the other
        finally:
            self._end()
            for each in self._writers:
                with contextlib.suppress(OSError):
                    await each.wait_closed()

    def _end(self) -> None:
        self._over = True
        for writer in self._writers:
            if (sock := _socket(writer)) is not None:
                # Without it, an abort is a FIN where nothing is left unread.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
        with contextlib.suppress(ValueError):
            self._proxy.connections.remove(self)

    def _listen(self, data: bytes) -> None:
        if not self.role and len(self._head) < HEAD:
            self._head += data
            self.role = role(self._head)


def role(head: bytes) -> str:
    """The last word of the connection's name in `connection.start-ok`, if it is one of rpcq's roles."""
    _, _, value = head.partition(b"connection_nameS")
    size = int.from_bytes(value[:4], "big")
    name = value[4 : 4 + size]
    word = name.rpartition(b" ")[2] if len(name) == size else b""
    return word.decode() if word in {b"consuming", b"publishing"} else ""


def _socket(writer: asyncio.StreamWriter) -> socket.socket | None:
    """None once it is closed."""
    try:
        sock: socket.socket | None = writer.get_extra_info("socket")  # TLS has none then
    except AttributeError:  # and fails from Python 3.14 on
        return None
    return sock if sock is not None and sock.fileno() != -1 else None


def _unsent(writer: asyncio.StreamWriter) -> int:
    """Bytes that the peer's kernel has not acknowledged, as far as that is to be hoped for."""
    if (sock := _socket(writer)) is None:
        return 0
    in_kernel = int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    return writer.transport.get_write_buffer_size() + in_kernel


@dataclass
class Proxy:
    """Passes bytes on, until told otherwise. What it is told holds for all connections, also for those to come.

    Attributes:
        url: the broker's, through this.
        up: the faults of what goes to the broker.
        down: the faults of what comes from the broker.
        refusing: new connections are closed at once.
        connections: those that are open, in the order in which they were opened.
    """

    url: str
    up: Faults = field(default_factory=Faults)
    down: Faults = field(default_factory=Faults)
    refusing: bool = False
    connections: list[Connection] = field(default_factory=list)
    _cut: dict[str, int | None] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _errors: list[BaseException] = field(default_factory=list)

    @property
    def to_broker(self) -> Filter:
        """What becomes of each piece of bytes that a client sends."""
        return self.up.filter

    @to_broker.setter
    def to_broker(self, what: Filter) -> None:
        self.up.filter = what

    @property
    def from_broker(self) -> Filter:
        """What becomes of each piece of bytes that the broker sends."""
        return self.down.filter

    @from_broker.setter
    def from_broker(self, what: Filter) -> None:
        self.down.filter = what

    def both(self, **faults: object) -> None:
        """Set the faults of both ways."""
        for way in (self.up, self.down):
            for name, value in faults.items():
                setattr(way, name, value)

    def freeze(self) -> None:
        """Pass nothing on, and close nothing: a peer that is gone without a word."""
        self.both(frozen=True)

    def thaw(self) -> None:
        """The end of every freeze, also of one way or of one connection."""
        self.both(frozen=False)
        for connection in self.connections:
            connection.thaw()

    def cut(self, *, up: int | None = None, down: int | None = None) -> None:
        """Reset each connection as soon as so many more bytes of it went that way; None for never."""
        self._cut = {"up": up, "down": down}
        for connection in list(self.connections):
            connection.cut(**self._cut)

    def reset(self) -> None:
        """Cut every connection with a RST."""
        for connection in list(self.connections):
            connection.reset()

    def refuse(self) -> None:
        self.refusing = True

    def allow(self) -> None:
        self.refusing = False

    def heal(self) -> None:
        """Pass everything on again, as at the beginning."""
        self.up.heal()
        self.down.heal()
        self.thaw()
        self.cut()
        self.allow()

    def with_role(self, role: str) -> list[Connection]:
        """The open connections that rpcq uses for that: "consuming" or "publishing"."""
        return [connection for connection in self.connections if connection.role == role]

    def __len__(self) -> int:
        return len(self.connections)

    def _serve(
        self, host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Coroutine[None, None, None]:
        """What is to be run for a new connection, which is known at once, so that none is left behind."""
        connection = Connection(self, reader, writer)
        self.connections.append(connection)
        if self.refusing:
            connection.reset()
        else:
            connection.cut(**self._cut)
        return connection.run(host, port)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._errors.append(error)


@asynccontextmanager
async def proxy(broker_url: str, port: int = 0) -> AsyncIterator[Proxy]:
    """A proxy to the broker of a URL, on that port, or on one that is free.

    Raises:
        BaseExceptionGroup: at the end, what went wrong inside, as in a filter; it has reset the connection before.
    """
    parts = urlsplit(broker_url)
    made = Proxy("")

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(made._serve(parts.hostname or "", parts.port or 5672, reader, writer))
        made._tasks.add(task)
        task.add_done_callback(made._done)

    server = await asyncio.start_server(connected, "127.0.0.1", port)
    port = server.sockets[0].getsockname()[1]
    credentials, at, _ = parts.netloc.rpartition("@")
    made.url = urlunsplit(parts._replace(netloc=f"{credentials}{at}127.0.0.1:{port}"))
    try:
        yield made
    finally:
        server.close()
        made.refuse()  # what was accepted, and has not come here yet
        made.reset()
        while made._tasks:
            await asyncio.wait(made._tasks)
        await server.wait_closed()
        if made._errors:
            raise BaseExceptionGroup("the proxy failed", made._errors)
