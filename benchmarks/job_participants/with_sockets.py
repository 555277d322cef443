"""The floor: blocking sockets, and frames made beforehand. No library can be quicker.

It sends messages of 100 bytes, and counts confirms. It reads deliveries by their size, which is the same for all of
them, and acknowledges half of what the prefetch allows with each frame. Nothing is encoded, decoded, matched or run.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

from pamqp import commands, frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from benchmarks.job_participants import BODY, Ended, Options, Send
from benchmarks.participants.with_sockets import BUFFER, CHANNEL, Connection

PACKAGES = ("pamqp",)
PROMISES = "confirms; acknowledges many at once; does nothing else"
CONFIRM = struct.Struct(">BHIIQ?B")
"""The frame of a confirm: kind, channel, length, method, number, multiple, end."""
FRAME_OVERHEAD = 8


def queue(options: Options) -> str:
    """The name of the queue."""
    return f"{options.namespace}.floor"


def declared(options: Options) -> Connection:
    """A connection; the queue is declared."""
    connection = Connection(options.url)
    arguments = {"x-queue-type": "quorum"}
    connection.ask(commands.Queue.Declare(queue=queue(options), durable=True, arguments=arguments))
    return connection


@asynccontextmanager
async def sender(options: Options) -> AsyncIterator[Send]:
    """Be connected while inside."""
    properties = commands.Basic.Properties(content_type="application/json", delivery_mode=2, message_id="0" * 22)
    frames = (
        commands.Basic.Publish(exchange="", routing_key=queue(options), mandatory=True),
        ContentHeader(body_size=len(BODY), properties=properties),
        ContentBody(BODY),
    )
    message = b"".join(frame.marshal(each, CHANNEL) for each in frames)
    with closing(declared(options)) as connection:
        connection.ask(commands.Confirm.Select())
        confirmed = sent = 0
        rest = b""

        async def send(count: int) -> None:
            nonlocal confirmed, sent, rest
            connection.socket.sendall(message * count)
            sent += count
            while confirmed < sent:
                rest += connection.socket.recv(BUFFER)
                whole = len(rest) // CONFIRM.size * CONFIRM.size
                for *_, number, multiple, _ in CONFIRM.iter_unpack(rest[:whole]):
                    if not multiple and number != confirmed + 1:
                        raise AssertionError("confirms of one queue come in order")
                    confirmed = number
                rest = rest[whole:]

        yield send


@asynccontextmanager
async def worker(options: Options, ended: Ended) -> AsyncIterator[None]:
    """Consume while inside, in a thread."""
    with closing(declared(options)) as connection:
        connection.ask(commands.Basic.Qos(prefetch_count=options.prefetch))
        consuming = threading.Thread(target=consume, args=(connection, queue(options), options.prefetch // 2, ended))
        consuming.start()
        try:
            yield
        finally:
            await asyncio.sleep(0.2)  # the last acknowledgement is on its way
            connection.socket.shutdown(socket.SHUT_RD)  # which ends what it reads
            consuming.join()


def consume(connection: Connection, name: str, several: int, ended: Ended) -> None:
    """Take what comes, until the connection is closed, and acknowledge `several` with one frame."""
    connection.ask(commands.Basic.Consume(queue=name, consumer_tag="floor"))
    rest = connection._rest  # noqa: SLF001 - what came together with the answer
    size = count = acknowledged = 0
    while True:
        if not size and (found := size_of_first(rest)):
            size = found
        if size:
            for _ in range(len(rest) // size):
                count += 1
                ended()
            rest = rest[len(rest) // size * size :]
            # What is left at the end is less than `several`: it waits for nobody.
            if count - acknowledged >= several or (not rest and count > acknowledged):
                connection.socket.sendall(frame.marshal(commands.Basic.Ack(count, multiple=True), CHANNEL))
                acknowledged = count
        data = connection.socket.recv(BUFFER)
        if not data:
            return
        rest += data


def size_of_first(data: bytes) -> int:
    """Bytes of the three frames of the first delivery; 0 if not all of it has come. Their sizes are all the same."""
    at = 0
    for _ in range(3):
        if len(data) < at + 7:
            return 0
        at += int.from_bytes(data[at + 3 : at + 7], "big") + FRAME_OVERHEAD
    return at if len(data) >= at else 0


def names(options: Options) -> tuple[list[str], list[str]]:
    """The queues and the exchanges."""
    return [queue(options)], []
