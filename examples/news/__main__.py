"""Serve the newsroom, with a process for each of its services and two for browsers, on the broker of RPCQ_URL.

Open the address that is printed. Ctrl-C ends all.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
from contextlib import ExitStack

from examples.stage import pages
from examples.stage.workers import Programs, Workers


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listening.getsockname()[1] for listening in found]


def main() -> int:
    """Run the command."""
    parser = pages.parser("python -m examples.news", __doc__)
    parser.add_argument("--web", type=int, nargs="+", help="ports of the web; all services run elsewhere then")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="news-") as folder:
        os.environ.setdefault("NEWS_FOLDER", folder)  # the services inherit it
        from examples.news import setup  # noqa: PLC0415 - the modules of the services read the environment
        from examples.news.app import create_app  # noqa: PLC0415
        from examples.news.gateway import Gateway  # noqa: PLC0415

        asyncio.run(setup.create_tables())
        setup.declare()
        programs: dict[str, Programs] = {}
        ports = asked.web or _free_ports(2)  # the same ones each time that they are started
        if not asked.web:
            for name in ("editor", "mobile", "emails"):
                programs[name] = Workers(setup.TARGETS[name], "--job-prefetch", "4", most=1)
            for number, port in enumerate(ports, 1):
                name = f"web-{number}"
                programs[name] = Programs("examples.news.web", "--name", name, "--port", str(port))
        gateway = Gateway([f"http://127.0.0.1:{port}" for port in ports])
        try:
            for program in programs.values():
                program.start()
            return pages.serve(create_app(gateway, programs), asked.host, asked.port, on_stop=gateway.close)
        finally:
            for program in programs.values():
                program.stop()


if __name__ == "__main__":
    sys.exit(main())
