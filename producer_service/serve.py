"""`python -m producer_service serve`: the page and `POST /process`.

The broker is in `--url`, `RPCQ_URL` or `RPCQ_URL_FILE`; without these, the broker and the worker run in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import sys

import uvicorn

from producer_service.app import create_app
from rpcq import ConfigurationError

GRACE: int = 10
"""Seconds that requests have to end when the server stops; streams end at once."""


def port(text: str) -> int:
    """Read a port; argparse makes a message of the ValueError if it is not valid."""
    if (number := int(text)) not in range(65536):
        raise ValueError
    return number


def arguments(given: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m producer_service serve", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=port, default=8000, help="port to listen on, 0 for a free one (default: 8000)")
    parser.add_argument("--url", help="the broker's URL (default: RPCQ_URL or RPCQ_URL_FILE, else memory://)")
    parser.add_argument("--namespace", default="rpcq", help="prefix of queues and exchanges (default: rpcq)")
    parser.add_argument(
        "--prefetch", type=int, default=100, help="prefetch of the worker that this starts (default: 100)"
    )
    parser.add_argument("--with-worker", action="store_true", help="also run consumer_service, in this process")
    return parser.parse_args(given)


class Server(uvicorn.Server):
    """Prints its address once it listens, because port 0 means any free port."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and print the address after the app's lifespan has begun."""
        await super().startup(sockets)
        if self.started:
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            for listening in sockets or []:
                print(f"serving http://{host}:{listening.getsockname()[1]}", flush=True)


def main(given: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code is 0 after that, and 2 if the app cannot be served."""
    # SIGTERM acts like Ctrl-C: uvicorn lets requests end, and then raises the signal again.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asked = arguments(given)
    try:
        app = create_app(asked.url, namespace=asked.namespace, with_worker=asked.with_worker, prefetch=asked.prefetch)
    except ConfigurationError as error:
        print(f"producer_service: {error}", file=sys.stderr)
        return 2
    config = uvicorn.Config(
        app,
        host=asked.host,
        port=asked.port,
        log_level="warning",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )
    server = Server(config)
    with config.bind_socket() as listening, contextlib.suppress(KeyboardInterrupt):
        server.run([listening])
    return 0 if server.started else 2
