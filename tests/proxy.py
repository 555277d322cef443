"""A TCP proxy between rpcq and a broker, for what a network does to connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit


@dataclass
class Proxy:
    """Passes bytes on, until told otherwise.

    Attributes:
        url: the broker's, through this.
        from_broker: what becomes of each piece of bytes that the broker sends.
    """

    url: str
    from_broker: Callable[[bytes], bytes] = lambda data: data
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def freeze(self) -> None:
        """Pass nothing on, and close nothing: a peer that is gone without a word."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def reset(self) -> None:
        """Cut every connection with a RST."""
        for writer in self._writers:
            writer.transport.abort()

    def __len__(self) -> int:
        return len(self._writers) // 2

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, from_broker: bool) -> None:
        try:
            while data := await reader.read(65_536):
                await self._flowing.wait()
                writer.write(self.from_broker(data) if from_broker else data)
                await writer.drain()
        except OSError:
            pass  # one side was reset: so is the other
        finally:
            writer.close()

    async def _serve(self, host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(host, port)
        self._writers |= {writer, upstream_writer}
        try:
            await asyncio.gather(
                self._pass(reader, upstream_writer, from_broker=False),
                self._pass(upstream_reader, writer, from_broker=True),
            )
        finally:
            self._writers -= {writer, upstream_writer}


@asynccontextmanager
async def proxy(broker_url: str) -> AsyncIterator[Proxy]:
    """A proxy to the broker of a URL, on a port of its own."""
    parts = urlsplit(broker_url)
    made = Proxy("")

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(made._serve(parts.hostname or "", parts.port or 5672, reader, writer))
        made._tasks.add(task)
        task.add_done_callback(made._tasks.discard)

    made._flowing.set()
    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    credentials, at, _ = parts.netloc.rpartition("@")
    made.url = urlunsplit(parts._replace(netloc=f"{credentials}{at}127.0.0.1:{port}"))
    try:
        yield made
    finally:
        server.close()
        for task in list(made._tasks):
            task.cancel()
        await asyncio.gather(*made._tasks, return_exceptions=True)
        made.reset()
        await server.wait_closed()
