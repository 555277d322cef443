"""The connections of clients for programs that block: where they are, and how they end with their process."""

from __future__ import annotations

import asyncio
import atexit
import os
import warnings
from contextlib import suppress
from typing import Final

from rpcq import client as asynchronous
from rpcq import logs
from rpcq.calls import late
from rpcq.errors import UsageError
from rpcq.runtime import blocking
from rpcq.transport.opening import loops_of_memory
from rpcq.url import parse

log = logs.get_logger("rpcq.client")

_connections: Final[set[Connection]] = set()
"""The open connections of this process, to be closed at its end."""
_inherited: Final[set[Connection]] = set()
"""Those of the parent process, kept: if they were collected, they would close sockets and complain."""
_closing: Final[set[asyncio.Task[None]]] = set()
"""Tasks that close connections, kept until they end."""


class Connection:
    """An open client, and the event loop that it is in."""

    __slots__ = ("__weakref__", "client", "late", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, client: asynchronous.Client) -> None:
        self.loop = loop
        self.client = client
        self.late = late.Late(client.topology, client.options.timeout)
        _connections.add(self)

    def close(self) -> None:
        """Close it, unless its event loop has ended."""
        _connections.discard(self)
        if blocking.runs_here(self.loop) or not self.loop.is_running():
            self.close_later()
            return
        with suppress(blocking.Abandoned):  # what ran in the loop has ended with it
            blocking.run(self.loop, self.client.close)

    def close_later(self) -> None:
        """Have it closed, without waiting for that."""
        _connections.discard(self)
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._begin_to_close)

    def _begin_to_close(self) -> None:
        closing = self.loop.create_task(self.client.close())
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)


def loop_of(url: str) -> asyncio.AbstractEventLoop:
    """The event loop for the connections: that of the broker, if that is in memory.

    Raises:
        UsageError: several event loops have a broker of this name.

    """
    broker = parse(url)
    if broker.scheme != "memory":
        return blocking.shared_loop()
    found = loops_of_memory(broker.hosts[0][0])
    if len(found) > 1:
        raise UsageError(f"{url} is the URL of a broker in {len(found)} event loops; give each a name of its own")
    return found[0] if found else blocking.shared_loop()


def left_open(connection: Connection) -> None:
    """Close the connections of a client that was collected, and that nobody closed."""
    warnings.warn("a client of rpcq.sync was not closed; use `with Client() as client`, or close()", ResourceWarning, 2)
    connection.close_later()


def _at_exit() -> None:
    loop = blocking.shared_loop_now()
    clients = [connection.client for connection in _connections if connection.loop is loop]

    async def close() -> None:
        begun = [task for task in _closing if task.get_loop() is loop]
        for error in await asyncio.gather(*(client.close() for client in clients), *begun, return_exceptions=True):
            if error is not None:
                log.error("client not closed at the end of the process", exc_info=error)

    blocking.end_shared_loop(close)


def _forked() -> None:
    _inherited.update(_connections)
    _connections.clear()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
