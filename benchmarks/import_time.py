"""How long `import rpcq` takes, against importing the four libraries that it stands on: at most 1.3 times as long.

Every import happens in a fresh process, which times the import alone and not the start of the interpreter; the two take
turns, and the medians count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = "import rpcq"
THEIRS = "import aio_pika, pydantic, orjson, structlog"
MOST = 1.3


def seconds(statement: str) -> float:
    """Time `statement` in a fresh process."""
    code = f"import time; began = time.perf_counter(); {statement}; print(time.perf_counter() - began)"
    # Installed packages come with their bytecode: a checkout must be allowed to keep its own, too.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if ran.returncode:
        sys.exit(f"error: `{statement}` failed; see above")
    return float(ran.stdout)


def main() -> None:
    """Measure, print, and exit with 1 if the bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for statement in (OURS, THEIRS):
        seconds(statement)  # compiles to bytecode and fills the page cache
    taken: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for _ in range(rounds):
        for statement, times in taken.items():
            times.append(seconds(statement))
    for statement, times in taken.items():
        middle, least, most = statistics.median(times) * 1e3, min(times) * 1e3, max(times) * 1e3
        print(f"{statement:45} {middle:6.0f} ms   ({least:.0f} to {most:.0f}, {rounds} rounds)")
    ratio = statistics.median(taken[OURS]) / statistics.median(taken[THEIRS])
    print(f"ratio {ratio:.2f}, at most {MOST}: {'ok' if ratio <= MOST else 'BROKEN'}")
    sys.exit(ratio > MOST)


if __name__ == "__main__":
    main()
