"""What is left of a call where client and worker do nothing: blocking sockets, frames made beforehand.

No library could be quicker: there is no event loop, no encoding, no matching, no confirm, no acknowledgement, no
deadline. What remains is the broker, and the waking up of its process and ours. One call at a time, whatever is asked.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any

from pamqp import commands, frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader, ProtocolHeader

from benchmarks.participants import Call, Options
from benchmarks.processes import BenchmarkError
from rpcq.url import parse

PACKAGES = ("pamqp",)
CHANNEL = 1
BUFFER = 65_536
REPLY = b"floor"


class Connection:
    """One connection with one channel, which waits for each answer of the broker."""

    def __init__(self, url: str) -> None:
        broker = parse(url)
        if broker.scheme != "amqp":
            raise BenchmarkError(f"the floor has no TLS: it is measured over amqp://, not {broker.scheme}://")
        self.socket = socket.create_connection(broker.hosts[0])
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self.socket.sendall(ProtocolHeader().marshal())
        self._read()
        self.ask(commands.Connection.StartOk({}, "PLAIN", f"\0{broker.user}\0{broker.password}"), 0)
        self._write(commands.Connection.TuneOk(2047, 131_072, 0), 0)
        self.ask(commands.Connection.Open(broker.vhost), 0)
        self.ask(commands.Channel.Open(), CHANNEL)

    def ask(self, what: Any, channel: int = CHANNEL) -> Any:
        """Send a method; the answer."""
        self._write(what, channel)
        return self._read()

    def consume(self, queue: str, **arguments: bool) -> str:
        """Declare a queue and consume it; its name."""
        name: str = self.ask(commands.Queue.Declare(queue=queue, **arguments)).queue
        self.ask(commands.Basic.Consume(queue=name, no_ack=True, consumer_tag="floor"))
        return name

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def _write(self, what: Any, channel: int) -> None:
        self.socket.sendall(frame.marshal(what, channel))

    def _read(self) -> Any:
        while True:
            if len(self._rest) >= 7 and len(self._rest) >= int.from_bytes(self._rest[3:7], "big") + 8:
                size, _, what = frame.unmarshal(self._rest)
                self._rest = self._rest[size:]
                return what
            self._rest += self.socket.recv(BUFFER)


def message(routing_key: str, body: bytes, reply_to: str | None = None) -> bytes:
    """The frames that publish it."""
    properties = commands.Basic.Properties(correlation_id="0123456789abcdef-1", reply_to=reply_to)
    frames = (
        commands.Basic.Publish(exchange="", routing_key=routing_key),
        ContentHeader(body_size=len(body), properties=properties),
        ContentBody(body),
    )
    return b"".join(frame.marshal(each, CHANNEL) for each in frames)


def answer(consuming: Connection, publishing: Connection) -> None:
    """Answer whatever comes, until the connection is closed. All requests are of one client, which asks first."""
    reply = b""
    while request := consuming.socket.recv(BUFFER):
        if not reply:
            at = request.index(b"amq.gen-")
            reply = message(request[at : at + request[at - 1]].decode(), REPLY)
        publishing.socket.sendall(reply)


@asynccontextmanager
async def worker(options: Options) -> AsyncIterator[None]:
    """Serve while inside."""
    with closing(Connection(options.url)) as publishing, closing(Connection(options.url)) as consuming:
        consuming.consume(f"{options.namespace}.floor", auto_delete=True)
        answering = threading.Thread(target=answer, args=(consuming, publishing))
        answering.start()
        try:
            yield
        finally:
            consuming.socket.shutdown(socket.SHUT_RDWR)  # which ends what it reads
            answering.join()


@asynccontextmanager
async def client(options: Options) -> AsyncIterator[Call]:
    """Be connected while inside."""
    with closing(Connection(options.url)) as publishing, closing(Connection(options.url)) as consuming:
        reply_to = consuming.consume("", exclusive=True)
        request = message(f"{options.namespace}.floor", b'{"x":1,"y":1}', reply_to)

        async def call(i: int) -> int:
            publishing.socket.sendall(request)
            if REPLY not in consuming.socket.recv(BUFFER):
                raise AssertionError("what came is no reply")
            await asyncio.sleep(0)  # let the measuring go on
            return i + 1  # nobody computed it

        yield call
