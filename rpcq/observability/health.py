"""Serves `/metrics`, `/livez` and `/readyz` of a process from a thread, so also while the event loop is blocked.

It uses the server of the standard library, like prometheus-client, and adds limits. Needs prometheus-client.
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
"""Seconds between two times that the event loop notes that it runs."""

CLIENT_TIMEOUT: Final = 5.0
"""Seconds that a client has to send its request, and to take each part of the response."""

MAX_REQUEST: Final = 32 * 1024
"""Bytes of a request with its headers."""

MAX_CONNECTIONS: Final = 32
"""Connections that are served at the same time, each in a thread; further ones are closed."""

_ADDRESS: Final = re.compile(r"(?:(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\[\]:\s]*):)?(?P<port>[0-9]{1,5})\Z")

log = logs.get_logger("rpcq.health")

StartResponse = Callable[[str, list[tuple[str, str]]], Any]


def parse_address(text: str) -> tuple[str, int]:
    """Parse the host and the port of ":9100" (all interfaces), "127.0.0.1:9100" or "[::1]:9100".

    Raises:
        ConfigurationError: the text is not an address.

    """
    match = _ADDRESS.match(text)
    if match is None or int(match["port"]) > 65535:
        msg = f"the address must be HOST:PORT, or :PORT for all interfaces; got {text!r}"
        raise ConfigurationError(msg)
    return (match["host"] or "0.0.0.0").strip("[]"), int(match["port"])  # noqa: S104 - as asked


class HealthServer:
    """Serves from `start` until `close`. Call `start` in the event loop that it has to watch.

    `/livez` is 503 if that loop has not run for `patience` seconds; then the process should be started again. It does
    not depend on the broker: starting the process again does not fix a broker. `/readyz` is 503 if `ready` returns a
    reason.

    Args:
        address: as for `parse_address`; with port 0 it takes a free port.
        ready: returns why the process cannot take work, or an empty string; called in another thread.
        patience: seconds that the event loop may be blocked.
        registry: registry of the metrics; None for prometheus-client's own.

    Attributes:
        port: port that it listens on, once it was started.

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
        """Start to listen.

        Raises:
            ConfigurationError: it cannot listen on that address; the message says why.

        """
        loop = asyncio.get_running_loop()
        server = type(
            "Server",
            (_Server,),
            {"address_family": socket.AF_INET6 if ":" in self._host else socket.AF_INET},
        )
        try:
            self._server = make_server(self._host, self.port, self._respond, server, handler_class=_Handler)
        except OSError as error:
            msg = f"cannot listen on {self._host}:{self.port}: {error.strerror or error}"
            raise ConfigurationError(msg) from error
        self.port = self._server.server_port
        self._beat(loop)
        self._thread = threading.Thread(target=self._server.serve_forever, name="rpcq-health", daemon=True)
        self._thread.start()
        log.info("health is served", host=self._host, port=self.port)

    def close(self) -> None:
        """Stop listening. Waits up to half a second for the thread."""
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

    def _respond(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
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
            return [b"this server has /metrics, /livez and /readyz\n"]
        headers = [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")]
        start_response("503 Service Unavailable" if why else "200 OK", headers)
        return [f"{why or 'ok'}\n".encode()]


class _Server(ThreadingWSGIServer):
    """Serves each connection in a thread, and at most `MAX_CONNECTIONS` of them."""

    request_queue_size = 128  # the default of 5 drops connections of a burst; clients retry after 1 s

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start to serve a connection, or close it if there are too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class _Request(io.RawIOBase):
    """Reads a request: at most `MAX_REQUEST` bytes, in at most `CLIENT_TIMEOUT` seconds in all."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._until = time.monotonic() + CLIENT_TIMEOUT
        self._size = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes.

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
    """Writes a response; the client has `CLIENT_TIMEOUT` seconds to take each part."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, part: Any) -> int:
        """Send all of a part.

        Raises:
            OSError: the client takes too long, or is gone.

        """
        try:
            self._connection.sendall(part)
        except TimeoutError as error:  # for a TimeoutError, the base class would print a traceback
            raise ConnectionAbortedError from error
        return len(part)


class _Handler(WSGIRequestHandler):
    """Drops clients that are slow or send too much, and does not log each request."""

    def setup(self) -> None:
        """Read with `_Request`, and write with `_Response`."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Request(self.connection))
        self.wfile = _Response(self.connection)

    def handle(self) -> None:
        """Serve one request."""
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Do not log each request."""
