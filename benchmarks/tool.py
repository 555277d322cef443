"""What `rpcq bench` itself costs: its closed model against the bare loop of `benchmarks.peers`, 1000 calls in flight.

    RPCQ_URL=amqp://guest:guest@localhost/ python -m benchmarks.tool

Both have one client and one worker process on the same broker, and take turns. Also prints what the open model achieves
of 5 000 calls a second, and how its rate agrees with a stopwatch.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.peers import PREFETCH, contender
from rpcq import Client
from rpcq.bench.result import Run, read_report

IN_FLIGHT = 1000


WATCHED = """
import time
from rpcq import Service

watched = Service("watched")
times = []

@watched.method
async def note() -> int:
    times.append(time.monotonic())
    return len(times)

@watched.method
async def rate() -> float:
    found = (len(times) - 1) / (times[-1] - times[0])
    times.clear()
    return found
"""


def bench(*arguments: str) -> Run:
    """A run of the tool."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        subprocess.run(
            [sys.executable, "-m", "rpcq", "bench", *arguments, "--json", str(path)],
            check=True,
            capture_output=True,
        )
        (run,) = read_report(path.read_bytes(), path.name).runs
    assert run.correct, run
    return run


async def compare(rounds: int, seconds: float) -> None:
    """The bare loop and the tool by turns."""
    ratios = []
    async with contender("rpcq", f"bench-{secrets.token_hex(4)}") as bare:
        for number in range(1, rounds + 1):
            loop = await bare.measure(None, IN_FLIGHT, seconds)
            arguments = ("--concurrency", str(IN_FLIGHT), "--duration", f"{seconds}s", "--prefetch", str(PREFETCH))
            tool = await asyncio.to_thread(bench, *arguments)
            ratios.append(tool.achieved / loop.calls_per_second)
            print(f"round {number}: {loop.calls_per_second:,.0f} and {tool.achieved:,.0f} calls/s: {ratios[-1]:.2f}x")
    middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
    print(f"the tool makes {middle:.2f}x the calls of the bare loop ({least:.2f} to {most:.2f})")


def offer(rounds: int) -> None:
    """What is achieved of what is offered."""
    for _ in range(rounds):
        run = bench("--rate", "5000", "--duration", "5s")
        print(
            f"offered {run.offered:,.0f}, achieved {run.achieved:,.0f} calls/s; {run.late} late, {run.dropped} dropped"
        )


async def watch(rounds: int) -> None:
    """What the tool says, and what a worker that looks at its own clock says."""
    namespace = f"bench-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "watched.py").write_text(WATCHED)
        command = [sys.executable, "-m", "rpcq", "worker", "watched:watched", "--namespace", namespace]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL) as worker:  # noqa: ASYNC220 - nothing else runs yet
            async with Client(namespace=namespace) as client:
                await client.wait_for_service("watched")
                for _ in range(rounds):
                    arguments = ("--concurrency", "200", "-n", "100000", "--warmup", "0s", "--namespace", namespace)
                    run = await asyncio.to_thread(bench, "watched.note", *arguments)
                    by_watch = await client.call("watched.rate")
                    ratio = run.achieved / by_watch
                    print(f"the tool says {run.achieved:,.0f} calls/s, a stopwatch {by_watch:,.0f}: {ratio:.3f}x")
            worker.terminate()


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    asked = parser.parse_args()
    asyncio.run(compare(asked.rounds, asked.seconds))
    offer(3)
    asyncio.run(watch(3))


if __name__ == "__main__":
    main()
