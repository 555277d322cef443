"""`python -m producer_service`: send many concurrent requests and check every reply.

The broker is in `--url`, `RPCQ_URL` or `RPCQ_URL_FILE`; without these, the broker and the worker run in this process.
`python -m producer_service serve` does the same as a web app, with options of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from consumer_service.calculator import calculator
from consumer_service.echo import echo
from producer_service.load import send
from rpcq import Client, RpcqError, Worker
from rpcq.bench import Measured
from rpcq.cli.text import plain
from rpcq.environment import url_from_environment
from rpcq.runtime.distribution import missing

console = Console()


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m producer_service", description=__doc__)
    parser.add_argument("--url", help="the broker's URL (default: RPCQ_URL or RPCQ_URL_FILE, else memory://)")
    parser.add_argument("--requests", type=int, default=1000, help="calls to send (default: 1000)")
    parser.add_argument("--concurrency", type=int, default=200, help="calls under way at once (default: 200)")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds of simulated work in each call (default: 0)")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds until each call has ended (default: 30)")
    parser.add_argument("--wait", type=float, default=30.0, help="seconds to wait for a worker (default: 30)")
    parser.add_argument(
        "--prefetch", type=int, default=100, help="prefetch of the worker that this starts (default: 100)"
    )
    parser.add_argument("--namespace", default="rpcq", help="prefix of queues and exchanges (default: rpcq)")
    parser.add_argument("--with-worker", action="store_true", help="also start consumer_service, in its own process")
    found = parser.parse_args()
    found.url = found.url or url_from_environment() or "memory://"
    if found.requests < 1 or found.concurrency < 1:
        parser.error("--requests and --concurrency must be at least 1")
    return found


@asynccontextmanager
async def worker(asked: argparse.Namespace) -> AsyncIterator[str]:
    """Start a worker if one is needed, and yield a text that says where the worker runs."""
    if asked.url.startswith("memory:"):
        async with Worker(echo, calculator, url=asked.url, prefetch=asked.prefetch, namespace=asked.namespace):
            yield f"in this process, prefetch {asked.prefetch}"
    elif asked.with_worker:
        options = ["--prefetch", str(asked.prefetch), "--namespace", asked.namespace]
        environment = {**os.environ, "RPCQ_URL": asked.url}
        environment.pop("RPCQ_URL_FILE", None)  # only one of both may be set
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "consumer_service", *options, env=environment
        )
        try:
            yield f"process {process.pid}, prefetch {asked.prefetch}"
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()
    else:
        yield "running elsewhere"


async def run(asked: argparse.Namespace) -> Measured:
    """Connect, wait for a worker, send the requests, and return the measurements."""
    async with (
        worker(asked) as where,
        Client(asked.url, name="producer_service", namespace=asked.namespace) as client,
    ):
        with console.status(f"waiting for the service 'echo' (worker {where})"):
            await client.wait_for_service("echo", timeout=asked.wait)
        console.print(f"worker {where}; {asked.requests:,} requests, {asked.concurrency:,} at once")
        columns = TextColumn("calls"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
            bar = progress.add_task("calls", total=asked.requests)
            return await send(
                client,
                requests=asked.requests,
                concurrency=asked.concurrency,
                delay=asked.delay,
                timeout=asked.timeout,
                on_answers=lambda count: progress.advance(bar, count),
            )


def show(found: Measured) -> None:
    """Print the summary as a table."""
    table = Table(show_header=False)
    table.add_row("sent", f"{found.sent:,}")
    table.add_row("matched", f"{found.ok - found.mismatched:,}")
    table.add_row("mismatched", f"{found.mismatched:,}")
    table.add_row("errors", ", ".join(f"{count} {name}" for name, count in found.errors.items()) or "0")
    table.add_row("calls/s", f"{found.ended / found.seconds if found.seconds else 0:,.0f}")
    for percent in (50, 99):
        table.add_row(f"p{percent}", f"{found.percentile('latency', percent):.1f} ms")
    console.print(table)


def serve(given: list[str]) -> int:
    """Run the web app, which needs packages that the command line does not need."""
    try:
        from producer_service.serve import main as serving  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        what = missing("producer_service: serve", error.name or "starlette", "web")
        print(f"{what} ({error})", file=sys.stderr)
        return 2
    return serving(given)


def main() -> int:
    """Run the command; the exit code is 0 only if every request got its own reply."""
    if sys.argv[1:2] == ["serve"]:
        return serve(sys.argv[2:])
    try:
        found = asyncio.run(run(arguments()))
    except RpcqError as error:
        console.print(plain("producer_service:", "red"), plain(error))
        return 2
    except KeyboardInterrupt:
        return 130
    show(found)
    return 0 if found.sent and found.sent == found.ok - found.mismatched else 1


if __name__ == "__main__":
    sys.exit(main())
