"""Run the shop with customers, on the broker of RPCQ_URL, and watch it with Prometheus.

Open the addresses that are printed. Ctrl-C ends all.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from examples.shop.setup import NAMES
from examples.watching import prometheus

LOOK_EVERY = 0.5
"""Seconds between two looks whether all processes still run."""

STOP_SECONDS = 90.0
"""Seconds that a process has to end when it is stopped: the shop stops its own workers first."""


def main() -> int:
    """Run the command. The exit code is 0 after Ctrl-C, 1 if a process ended by itself, 2 without Prometheus."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.watching", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000, help="port of the shop (default: 8000)")
    parser.add_argument("--prometheus", type=int, default=9090, metavar="PORT", help="its port (default: 9090)")
    parser.add_argument(
        "--metrics", type=int, default=9500, metavar="PORT", help="first of the ports of metrics (default: 9500)"
    )
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks (default: 2)")
    parser.add_argument("--rate", default="4", help="customers a second, in the mean (default: 4)")
    asked = parser.parse_args()
    program = prometheus.found()
    if program is None:
        print(prometheus.MISSING, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ports = {name: asked.metrics + number for number, name in enumerate((*NAMES, "desk", "customers"))}
    base = f"http://127.0.0.1:{asked.port}"
    with tempfile.TemporaryDirectory(prefix="watching-") as made, contextlib.ExitStack() as stack:
        folder = Path(made)
        os.environ.setdefault("SHOP_DATABASE", f"sqlite+aiosqlite:///{folder}/{{service}}.sqlite")
        text = prometheus.configuration(ports | {"web": asked.port}, asked.every)
        (folder / "prometheus.yml").write_text(text, "utf-8")
        python = [sys.executable, "-m"]
        desk = ["examples.watching.desk:desk", "--http", f"127.0.0.1:{ports['desk']}"]
        shop = ["examples.shop", "--port", str(asked.port), "--metrics", str(asked.metrics)]
        customers = [base, "--rate", asked.rate, "--metrics", str(ports["customers"])]
        commands = (
            [*python, *shop],
            [*python, "rpcq", "worker", *desk],
            prometheus.command(program, folder, asked.prometheus),
            [*python, "examples.watching.customers", *customers],
        )
        running: list[subprocess.Popen[bytes]] = []
        stack.callback(_stop, running)
        for command in commands:
            running.append(subprocess.Popen(command))  # noqa: PERF401, S603 - each is stopped if the next cannot start
        print(f"Prometheus: http://127.0.0.1:{asked.prometheus}/alerts", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(LOOK_EVERY)
                ended = [it for it in running if it.poll() is not None]
                if ended:
                    print(f"a process ended by itself: {ended[0].args!r}", file=sys.stderr)
                    return 1
    return 0


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop all at once; one that does not end in time is killed."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
