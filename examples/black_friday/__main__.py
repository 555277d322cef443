"""Send a crowd to the shop, on the broker of RPCQ_URL, and write a report.

The card company is slow, and the workers become more while orders wait. The exit code is 0 if all orders are settled
and the books add up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from examples.black_friday.crowd import Crowd
    from examples.black_friday.sampling import Sampling

OPENS = 180.0
"""Seconds that the shop has to open."""

TELL_EVERY = 5.0
"""Seconds between two lines on the terminal."""

STOP_SECONDS = 60.0
"""Seconds that a process has to end when it is stopped."""

MISSING = (
    "SHOP_DATABASE must be the URL of an empty database in PostgreSQL, as in "
    "postgresql+asyncpg://shop@localhost/shop; in a file of SQLite, one charge waits for the other, and more workers "
    "would be of no use"
)

OTHERS = ("orders", "inventory", "shipping", "notification", "analytics")
"""Services whose workers are one pool. Payment has a pool of its own: it is what is slow."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m examples.black_friday",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--orders", type=int, default=10_000, help="orders (default: 10000)")
    made.add_argument("--seconds", type=float, default=60.0, help="seconds in which they come (default: 60)")
    made.add_argument("--takes", type=float, default=0.5, help="seconds that a charge takes (default: 0.5)")
    made.add_argument("--processes", default="1:6", help="processes of payment, at least and at most (default: 1:6)")
    made.add_argument("--others", default="1:4", help="processes of all other services (default: 1:4)")
    made.add_argument("--depth", type=int, default=100, help="--scale-on-depth of both pools (default: 100)")
    made.add_argument("--prefetch", type=int, default=8, help="--job-prefetch of both pools (default: 8)")
    made.add_argument("--webs", type=int, default=2, help="processes of the web app (default: 2)")
    made.add_argument("--kill", type=float, help="kill a worker of payment so many seconds after the first order")
    made.add_argument("--patience", type=float, default=1800.0, help="seconds to wait for the end (default: 1800)")
    made.add_argument("--report", type=Path, default=Path("build/black-friday.html"), help="where to write it")
    return made


def main() -> int:
    """Run the command."""
    asked = parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not os.environ.get("SHOP_DATABASE", "").startswith("postgresql"):
        print(MISSING, file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        # The modules of the shop read the environment when they are imported.
        from examples.shop import setup  # noqa: PLC0415

        asyncio.run(setup.create_tables())
        setup.declare()
        ports = _free_ports(asked.webs)
        for port in ports:
            _start(stack, "examples.shop", "--no-workers", "--port", str(port))
        scaling = ("--scale-on-depth", str(asked.depth), "--scale-every", "1", "--job-prefetch", str(asked.prefetch))
        worker = ("rpcq", "worker", "--log-level", "warning", *scaling)
        targets = [setup.target(name) for name in OTHERS]
        pools = {
            "payment": _start(
                *(stack, *worker, "--processes", asked.processes, setup.target("payment")),
                ORDERS_TAKES=str(asked.takes),
            ),
            "others": _start(stack, *worker, "--processes", asked.others, *targets),
        }
        bases = [f"http://127.0.0.1:{port}" for port in ports]
        return asyncio.run(run(asked, bases, pools))


async def run(asked: argparse.Namespace, bases: list[str], pools: Mapping[str, subprocess.Popen[bytes]]) -> int:
    """Let the crowd come, wait until all is settled, and write the report.

    Raises:
        TimeoutError: the shop does not open.
        RuntimeError: workers did not start.

    """
    from examples.black_friday import sampling  # noqa: PLC0415 - as in `main`
    from examples.black_friday.crowd import Crowd  # noqa: PLC0415
    from examples.black_friday.report import Outcome, page  # noqa: PLC0415
    from examples.shop import books  # noqa: PLC0415

    pids = {name: process.pid for name, process in pools.items()}
    await _opened(bases, pools)
    crowd, seen = Crowd(bases, asked.orders, asked.seconds), sampling.Sampling(pids)
    killed: list[int] = []
    async with asyncio.TaskGroup() as group:
        beside = [group.create_task(seen.run()), group.create_task(_tell(crowd, seen))]
        if asked.kill is not None:
            beside.append(group.create_task(_kill(asked.kill, pids["payment"], killed)))
        await crowd.come()
        faults = await _settled(asked.patience)
        for task in beside:
            task.cancel()
    found = await sampling.times()
    faults += [f"{it} was promised, and is not there" for it in crowd.promised if it not in found]
    if len(found) > len(crowd.promised) + crowd.unanswered:
        faults.append(f"{len(found)} orders, and {len(crowd.promised)} were promised")
    outcome = Outcome(
        came=crowd.came,
        answers=crowd.answers,
        postponed=crowd.postponed,
        unanswered=crowd.unanswered,
        killed=bool(killed),
        samples=seen.samples,
        times=found,
        faults=faults,
        settings={name: str(value) for name, value in vars(asked).items() if name != "report"}
        | {"books": str(await books.read())},
    )
    asked.report.parent.mkdir(parents=True, exist_ok=True)
    asked.report.write_text(page(outcome), "utf-8")
    print(outcome.verdict)
    print(f"{crowd.postponed} times a customer was asked to come again; {crowd.unanswered} lost their connection")
    print(f"taken in {outcome.rush:.0f} s, settled after {outcome.settled:.0f} s; report: {asked.report}")
    return 1 if faults else 0


async def _opened(bases: list[str], pools: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Wait until each web app answers, and each pool has a worker."""
    from examples.black_friday.sampling import workers  # noqa: PLC0415

    async with asyncio.timeout(OPENS), httpx.AsyncClient() as client:
        for base in bases:
            while not await _answers(client, base):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.2)
        while not all(workers(process.pid) for process in pools.values()):
            if ended := [name for name, process in pools.items() if process.poll() is not None]:
                raise RuntimeError(f"the workers of {ended[0]} did not start")
            await asyncio.sleep(0.2)


async def _answers(client: httpx.AsyncClient, base: str) -> bool:
    try:
        return (await client.get(f"{base}/state")).is_success
    except httpx.TransportError:
        return False


async def _settled(patience: float) -> list[str]:
    """Wait until the books add up: what does not, if they still do not after so many seconds."""
    from examples.shop import books  # noqa: PLC0415

    until = time.monotonic() + patience
    while faults := (await books.read()).faults():
        if time.monotonic() > until:
            return faults
        await asyncio.sleep(1)
    return []


async def _kill(after: float, supervisor: int, killed: list[int]) -> None:
    """Kill a worker with SIGKILL: what it holds is delivered again, and its supervisor starts another one."""
    from examples.black_friday.sampling import workers  # noqa: PLC0415

    await asyncio.sleep(after)
    while not (found := workers(supervisor)):  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.1)
    os.kill(found[0], signal.SIGKILL)
    killed.append(found[0])
    print(f"killed worker {found[0]} of payment", flush=True)


async def _tell(crowd: Crowd, seen: Sampling) -> None:
    began = time.monotonic()
    while True:
        await asyncio.sleep(TELL_EVERY)
        if not seen.samples:
            continue
        now = seen.samples[-1]
        said = [
            f"{time.monotonic() - began:4.0f} s: {len(crowd.came):,} customers came, {len(crowd.promised):,} taken",
            f"{now.outbox:,} in the outbox, {sum(now.waiting.values()):,} events wait",
            "processes: " + ", ".join(f"{number} of {name}" for name, number in now.processes.items()),
        ]
        print("; ".join(said), flush=True)


def _free_ports(number: int) -> list[int]:
    """Ports that nobody uses."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(number)]
        for it in found:
            it.bind(("127.0.0.1", 0))
        return [int(it.getsockname()[1]) for it in found]


def _start(stack: contextlib.ExitStack, *arguments: str, **environ: str) -> subprocess.Popen[bytes]:
    """Start `python -m ...`, which ends with the stack."""
    command = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(command, env=os.environ | environ, stdout=subprocess.DEVNULL)  # noqa: S603 - our own
    stack.callback(_stop, process)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
