"""Web apps under their own servers, in this event loop, and clients that leave when told to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import httpx
import uvicorn

SECONDS = 20.0


class NotStarted(Exception):
    """The server ended before it served."""


@asynccontextmanager
async def served(app: Any, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An ASGI app under uvicorn; a client of it."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", ws="none", **options))
        running = asyncio.create_task(_serve(server, listening))
        try:
            while not server.started:
                if running.done():
                    raise NotStarted
                await asyncio.sleep(0.01)
            async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as client:
                yield client
        finally:
            server.should_exit = True
            await running


async def _serve(server: uvicorn.Server, listening: socket.socket) -> None:
    with contextlib.suppress(SystemExit):  # how it says that the app did not start
        await server.serve([listening])


class Browser:
    """A connection over which requests are written by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def get(self, path: str) -> None:
        await self.send(f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())

    async def answer(self) -> tuple[int, bytes]:
        """The next response with a content-length: its status and its body."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), SECONDS)
        lines = head.decode().lower().split("\r\n")
        size = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
        return int(lines[0].split()[1]), await asyncio.wait_for(self.reader.readexactly(size), SECONDS)

    async def leave(self, how: Literal["close", "reset"] = "close") -> None:
        if how == "reset":
            sock = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


@asynccontextmanager
async def browser(client: httpx.AsyncClient) -> AsyncIterator[Browser]:
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    made = Browser(reader, writer)
    try:
        yield made
    finally:
        await made.leave()


async def answers(ask: Callable[[], Awaitable[httpx.Response]], status: int) -> httpx.Response:
    """Ask until that is the status."""
    async with asyncio.timeout(SECONDS):
        while (response := await ask()).status_code != status:  # noqa: ASYNC110 - the same
            await asyncio.sleep(0.02)
    return response
