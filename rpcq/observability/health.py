"""`/metrics`, `/livez` and `/readyz` of a process, served from a thread: they answer while the event loop is blocked.

The server is the standard library's, as prometheus-client uses it, with limits. Needs prometheus-client.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from rpcq import logs
from rpcq.errors import ConfigurationError

BEAT: Final = 1.0
"""Seconds between two signs of life of the event loop."""

CLIENT_TIMEOUT: Final = 5.0
"""Seconds that a client has to send its request, and to take each part of the response."""

MAX_REQUEST: Final = 32 * 1024
"""Bytes of a request with its headers."""

MAX_CONNECTIONS: Final = 32
"""Connections that are served at once, each in a thread; further ones are closed."""

_ADDRESS: Final = re.compile(r"(?:(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\[\]:\s]*):)?(?P<port>[0-9]{1,5})\Z")

log = logs.get_logger("rpcq.health")

StartResponse = Callable[[str, list[tuple[str, str]]], Any]


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ":9100" (all interfaces), "127.0.0.1:9100" or "[::1]:9100".

    Raises:
        ConfigurationError: it is none.

    """
    match = _ADDRESS.match(text)
    if match is None or int(match["port"]) > 65535:
        msg = f"the address is {text!r}; it is HOST:PORT, or :PORT for all interfaces"
        raise ConfigurationError(msg)
    return (match["host"] or "0.0.0.0").strip("[]"), int(match["port"])  # noqa: S104 - as asked


class HealthServer:
    """Serves from `start`, in the event loop that is watched, until `close`.

    `/livez` says whether that loop lives: 503 once it has given no sign of life for `patience`, so that whoever runs
    the process starts it again. It says nothing of the broker: starting again mends none. `/readyz` says what `ready`
    says.

    Args:
        address: as `parse_address` takes it; port 0 takes a free one.
        ready: why the process cannot take work, or nothing; called from another thread.
        patience: seconds.
        registry: whose metrics; None for prometheus-client's own.

    Attributes:
        port: where it listens, once it was started.

    """

    def __init__(
        self,
        address: str,
        ready: Callable[[], str],
        *,
        patience: float = 20.0,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._host, self.port = parse_address(address)
        self._ready = ready
        self._patience = patience
        self._metrics = make_wsgi_app(REGISTRY if registry is None else registry)
        self._beat_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._server: Any = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen.

        Raises:
            ConfigurationError: it cannot; the message says why.

        """
        loop = asyncio.get_running_loop()
        server = type(
            "Server",
            (_Server,),
            {"address_family": socket.AF_INET6 if ":" in self._host else socket.AF_INET},
        )
        try:
            self._server = make_server(self._host, self.port, self._answer, server, handler_class=_Handler)
        except OSError as error:
            msg = f"cannot listen on {self._host}:{self.port}: {error.strerror or error}"
            raise ConfigurationError(msg) from error
        self.port = self._server.server_port
        self._beat(loop)
        self._thread = threading.Thread(target=self._server.serve_forever, name="rpcq-health", daemon=True)
        self._thread.start()
        log.info("health is served", host=self._host, port=self.port)

    def close(self) -> None:
        """Listen no more. Waits for the thread, which looks twice a second."""
        if self._timer is not None:
            self._timer.cancel()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if self._thread is not None:
            self._thread.join()

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self._beat_at = time.monotonic()
        self._timer = loop.call_later(BEAT, self._beat, loop)

    # In the threads of the server.

    def _answer(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO")
        if path == "/metrics":
            found: Iterable[bytes] = self._metrics(environ, start_response)
            return found
        if path == "/livez":
            silent = time.monotonic() - self._beat_at
            why = f"the event loop is blocked for {silent:.0f} s" if silent > self._patience else ""
        elif path == "/readyz":
            why = self._ready()
        else:
            start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
            return [b"there are /metrics, /livez and /readyz\n"]
        headers = [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")]
        start_response("503 Service Unavailable" if why else "200 OK", headers)
        return [f"{why or 'ok'}\n".encode()]


class _Server(ThreadingWSGIServer):
    """Has a thread for each of at most `MAX_CONNECTIONS`."""

    request_queue_size = 128  # with the default of five, connections of a burst are lost, and retried after a second

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin to serve a connection, or close it."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve it, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class _Request(io.RawIOBase):
    """What a client sends, at most `MAX_REQUEST`, and for at most `CLIENT_TIMEOUT` in all, however slowly it comes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._until = time.monotonic() + CLIENT_TIMEOUT
        self._size = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what comes next.

        Raises:
            OSError: the client takes too long, sends too much, or is gone.

        """
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        count = self._connection.recv_into(buffer)
        self._connection.settimeout(CLIENT_TIMEOUT)  # for the response
        self._size += count
        if self._size > MAX_REQUEST:
            raise ConnectionAbortedError
        return count


class _Response(io.BufferedIOBase):
    """What a client gets; it has `CLIENT_TIMEOUT` to take each part."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, part: Any) -> int:
        """Send a part, whole.

        Raises:
            OSError: the client takes too long, or is gone.

        """
        try:
            self._connection.sendall(part)
        except TimeoutError as error:  # of which the base would print a traceback
            raise ConnectionAbortedError from error
        return len(part)


class _Handler(WSGIRequestHandler):
    """Drops clients that are slow, or send too much, and writes no line for each request."""

    def setup(self) -> None:
        """Read by `_Request`, and answer by `_Response`."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Request(self.connection))
        self.wfile = _Response(self.connection)

    def handle(self) -> None:
        """Serve one request."""
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Nothing."""
