"""A page of static files without a build step, and the server that shows it."""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Header, HTTPException
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

GRACE = 5
"""Seconds that requests have to end when the server stops."""

STAGE = Path(__file__).parent / "static"


def add_page(app: FastAPI, folder: Path) -> None:
    """Serve the files of an example, `/` being its `index.html`, and those of all examples under `/stage`."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(folder / "index.html", headers={"cache-control": "no-cache"})

    app.mount("/stage", StaticFiles(directory=STAGE))
    app.mount("/static", StaticFiles(directory=folder))


async def from_this_site(sec_fetch_site: Annotated[str, Header()] = "none") -> None:
    """Refuse what another site lets a browser do: a page that kills processes must not obey any page that is open."""
    if sec_fetch_site not in ("same-origin", "none"):
        raise HTTPException(403, "This may be done from this site's own page alone.")


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of an example that is a page."""
    made = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    made.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for a free one (default: 8000)")
    return made


class Server(uvicorn.Server):
    """Prints its address once it listens, because port 0 means any free port.

    Args:
        config: that of uvicorn.
        on_stop: called when it begins to stop, so that streams can end.
        announces: whether it prints its address.

    """

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None] | None, *, announces: bool) -> None:
        super().__init__(config)
        self._on_stop = on_stop
        self._announces = announces

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and print the address after the app's lifespan has begun."""
        await super().startup(sockets)
        if self.started and self._announces:
            for listening in sockets or []:
                host, port = listening.getsockname()[:2]
                print(f"serving http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: requests have `GRACE` seconds to end."""
        if self._on_stop is not None:
            self._on_stop()
        await super().shutdown(sockets)


def serve(
    app: FastAPI, host: str, port: int, *, on_stop: Callable[[], None] | None = None, announces: bool = True
) -> int:
    """Serve until SIGTERM or Ctrl-C. The exit code is 0 after that, and 2 if the app cannot be served.

    Args:
        app: the app.
        host: the address to listen on.
        port: the port; 0 for a free one.
        on_stop: called when the server begins to stop: streams have to end then, which would last for ever.
        announces: whether to print the address.

    """
    # SIGTERM acts like Ctrl-C: uvicorn lets requests end, and then raises the signal again.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", ws="none", timeout_graceful_shutdown=GRACE)
    server = Server(config, on_stop, announces=announces)
    with config.bind_socket() as listening, contextlib.suppress(KeyboardInterrupt):
        server.run([listening])
    return 0 if server.started else 2
