"""This checkout against another commit: calls a second, latency and CPU time of both, in pairs.

    RPCQ_URL=amqp://guest:guest@localhost/ python -m benchmarks.commits HEAD~1

Both have a client and a worker process, which stay connected throughout. In each pair they are measured one after the
other, and the order changes from pair to pair, so that whatever else the machine does meets both. The medians of the
ratios count. Give a commit that differs in nothing to see how much the machine itself makes of it.
"""

from __future__ import annotations

import argparse
import contextlib
import secrets
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks.peers import OURS, Round, contender
from benchmarks.processes import ROOT, BenchmarkError, broker_process, broker_url, remove_leftovers, run

PREFETCH: Final = 100
"""A worker's own default."""

FIGURES: Final[dict[str, Callable[[Round], float | None]]] = {
    "calls/s": lambda it: it.calls_per_second,
    "p50": lambda it: it.p50_ms,
    "p99": lambda it: it.p99_ms,
    "CPU of the client": lambda it: it.client_us,
    "CPU of the worker": lambda it: it.worker_us,
    "CPU of the broker": lambda it: it.broker_us,
}


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A checkout of the commit, which is removed on leaving.

    Raises:
        BenchmarkError: there is no such commit.
    """

    def git(*arguments: str) -> None:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"git {' '.join(arguments)}: {done.stderr.strip()}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkout"
        git("worktree", "add", "--detach", str(path), commit)
        try:
            yield path
        finally:
            git("worktree", "remove", "--force", str(path))


def show(now: list[Round], before: list[Round]) -> None:
    """Print a line for each figure: its medians, and the median, the least and the most of the ratios."""
    for name, of in FIGURES.items():
        ours, theirs = [of(it) for it in now], [of(it) for it in before]
        if None in ours or None in theirs:
            continue  # the broker's process cannot be seen
        ratios = [a / b for a, b in zip(ours, theirs, strict=True) if a is not None and b]
        middles = [statistics.median(it for it in found if it is not None) for found in (ours, theirs)]
        print(
            f"  {name:18} {middles[0]:10.1f} now, {middles[1]:10.1f} before; "
            f"ratio {statistics.median(ratios):.4f} ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


async def main() -> int:
    """Measure and print; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare with, as git names it")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--in-flight", default="1000", help="calls, separated by commas: 1,1000")
    parser.add_argument("--seconds", type=float, default=1.75, help="of each measurement")
    parser.add_argument("--prefetch", type=int, default=PREFETCH)
    given = parser.parse_args()
    url = broker_url()
    broker = broker_process(url)
    token = secrets.token_hex(4)
    names = [f"bench-{token}-now", f"bench-{token}-before"]
    with checked_out(given.commit) as other:
        try:
            async with (
                contender(OURS, names[0], prefetch=given.prefetch) as now,
                contender(OURS, names[1], prefetch=given.prefetch, checkout=other) as before,
            ):
                for in_flight in map(int, given.in_flight.split(",")):
                    print(f"{in_flight} in flight, {given.pairs} pairs", flush=True)
                    ours: list[Round] = []
                    theirs: list[Round] = []
                    for number in range(given.pairs):
                        order = [(now, ours), (before, theirs)]
                        for side, rounds in order if number % 2 else reversed(order):
                            rounds.append(await side.measure(broker, in_flight, given.seconds))
                    show(ours, theirs)
        finally:
            for name in names:
                await remove_leftovers(url, name, ["calculator"])
    return 0


if __name__ == "__main__":
    run(main())
