"""rpcq against its peers: calls a second, latency and CPU time, with 1, 100 and 1000 calls in flight.

    RPCQ_URL=amqp://guest:guest@localhost/ python -m benchmarks.peers

Every contender has a client and a worker process, which stay connected throughout. In every round the contenders take
turns, so that whatever else the machine does meets all of them; the medians of the rounds count, and above all the
ratios between them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import secrets
import statistics
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # it ships no types
from rich.console import Console
from rich.table import Table

from benchmarks.foreign import Ground, all_grounds
from benchmarks.participants import MODULES, PEERS, PROGRAMS
from benchmarks.processes import (
    ROOT,
    Line,
    Process,
    broker_channel,
    broker_url,
    cpu_seconds,
    remove_leftovers,
    run,
    running,
    started,
)

OURS = "rpcq"
WARM_UP = 0.3
PREFETCH = 1000
DEFAULT = (*PEERS, *PROGRAMS)
RABBITMQ = Ground()
"""Nothing but the RabbitMQ."""
MEASURED_WITHIN = 120.0
"""Seconds, beyond the time to measure: warm-up and the last answers of a contender that serves one call at a time."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one measurement found."""

    calls_per_second: float
    p50_ms: float
    p99_ms: float
    client_us: float
    """CPU microseconds a call; so are the next two."""
    worker_us: float
    broker_us: float | None
    """None if there is no broker, or its process cannot be seen. It includes whatever else it was asked meanwhile."""


@dataclass(frozen=True, slots=True)
class Contender:
    """The two processes of a contender."""

    name: str
    client: Process
    worker: Process
    versions: dict[str, str]

    async def measure(self, broker: psutil.Process | None, in_flight: int, seconds: float) -> Round:
        """Measure once, with `in_flight` concurrent callers for `seconds`."""

        def cpu() -> tuple[float, float | None]:
            return self.worker.cpu_seconds(), cpu_seconds(broker) if broker else None

        self.client.write({"in_flight": in_flight, "warm_up": WARM_UP, "seconds": seconds})
        await self.client.read("start", MEASURED_WITHIN)
        worker_before, broker_before = cpu()
        await self.client.read("stop", MEASURED_WITHIN + seconds)
        worker_after, broker_after = cpu()
        result = await self.client.read("result", MEASURED_WITHIN)
        micro = 1e6 / max(result["calls"], 1)
        in_broker = None if broker_before is None or broker_after is None else broker_after - broker_before
        return Round(
            calls_per_second=result["calls"] / result["seconds"],
            p50_ms=result["p50"] * 1e3,
            p99_ms=result["p99"] * 1e3,
            client_us=result["cpu"] * micro,
            worker_us=(worker_after - worker_before) * micro,
            broker_us=None if in_broker is None else in_broker * micro,
        )


@contextlib.asynccontextmanager
async def contender(
    name: str,
    namespace: str,
    *,
    prefetch: int = PREFETCH,
    checkout: Path = ROOT,
    on: Ground = RABBITMQ,
) -> AsyncIterator[Contender]:
    """Start the worker of a contender and then its client, as a checkout has them; both end on leaving."""

    def process(role: str, server: str) -> contextlib.AbstractAsyncContextManager[tuple[Process, Line]]:
        title = f"the {role} of {name}"
        if on.program is not None:
            environ = {**os.environ, "RPCQ_URL": on.url}
            return running(title, on.program, role, namespace, str(prefetch), environ=environ)
        arguments = ["--namespace", namespace, "--prefetch", str(prefetch)]
        if server:  # which the participants of an earlier commit do not know
            arguments += ["--server", server]
        return started(title, "benchmarks.participants", name, role, *arguments, checkout=checkout)

    async with (
        process("worker", on.server) as (worker, ready),
        process("client", ready.get("address") or on.server) as (client, _),
    ):
        yield Contender(name, client, worker, {**on.versions, **ready["versions"]})


Results = dict[int, dict[str, list[Round]]]
"""Calls in flight -> contender -> one entry a round."""


def median(rounds: Iterable[Round], of: Callable[[Round], float | None]) -> float | None:
    """The median of what `of` gives; None if it gives None."""
    values = [value for it in rounds if (value := of(it)) is not None]
    return statistics.median(values) if values else None


def ratios(ours: list[Round], theirs: list[Round], of: Callable[[Round], float]) -> str:
    """Ours by theirs: of the medians, and the least and most of any round."""
    each = [of(us) / of(them) for us, them in zip(ours, theirs, strict=True) if of(them)]
    if not each:
        return "-"
    middle = statistics.median(map(of, ours)) / statistics.median(map(of, theirs))
    return f"{middle:.3g} ({min(each):.3g} to {max(each):.3g})"


def table(in_flight: int, contenders: dict[str, list[Round]]) -> Table:
    """The results for one number of calls in flight."""
    found = Table(title=f"{in_flight:,} in flight", title_justify="left", title_style="bold")
    found.add_column("")
    for heading in ("calls/s", "min to max", "p50 ms", "p99 ms", "CPU us/call: client", "worker", "broker"):
        found.add_column(heading, justify="right")
    ours = contenders.get(OURS)
    if ours:
        found.add_column("rpcq/it: calls/s", justify="right")
        found.add_column("rpcq/it: p50", justify="right")
    for name, rounds in contenders.items():
        rates = [it.calls_per_second for it in rounds]
        cells = [
            name,
            f"{statistics.median(rates):,.0f}",
            f"{min(rates):,.0f} to {max(rates):,.0f}",
            f"{median(rounds, lambda it: it.p50_ms):.2f}",
            f"{median(rounds, lambda it: it.p99_ms):.2f}",
            f"{median(rounds, lambda it: it.client_us):.0f}",
            f"{median(rounds, lambda it: it.worker_us):.0f}",
            "-" if (broker := median(rounds, lambda it: it.broker_us)) is None else f"{broker:.0f}",
        ]
        if ours and name != OURS:
            cells += [
                ratios(ours, rounds, lambda it: it.calls_per_second),
                ratios(ours, rounds, lambda it: it.p50_ms),
            ]
        found.add_row(*cells)
    return found


async def main(given: argparse.Namespace) -> int:
    """Measure, print, and write the JSON file if one was asked for."""
    console = Console()
    if not console.is_terminal:
        # In a file or a CI's log, a line that is too long is better than one that is folded.
        console = Console(width=160)
    url = broker_url()
    async with broker_channel(url) as (connection, _):
        properties = connection.server_properties
    namespaces = {name: f"rpcq-bench-{secrets.token_hex(4)}" for name in given.only}
    versions = {"uvloop": version("uvloop")}
    machine_before = psutil.cpu_times()
    try:
        async with contextlib.AsyncExitStack() as stack:
            grounds, missing = await stack.enter_async_context(all_grounds(given.only, url))
            for name, why in missing.items():
                console.print(f"without {name}: {why}", highlight=False, soft_wrap=True, markup=False)
            results: Results = {in_flight: {name: [] for name in grounds} for in_flight in given.in_flight}
            with console.status("starting"):
                contenders = [
                    await stack.enter_async_context(
                        contender(name, namespaces[name], prefetch=given.prefetch, on=grounds[name])
                    )
                    for name in grounds
                ]
            with console.status("measuring") as status:
                for number in range(given.rounds):
                    for in_flight in given.in_flight:
                        for one in contenders:
                            status.update(f"round {number + 1} of {given.rounds}: {one.name}, {in_flight:,} in flight")
                            broker = grounds[one.name].broker
                            measured = await one.measure(broker, in_flight, given.seconds)
                            results[in_flight][one.name].append(measured)
            for one in contenders:
                versions |= one.versions
            machine_after = psutil.cpu_times()
    finally:
        for each in namespaces.values():
            await remove_leftovers(url, each, ["calculator"])

    for in_flight, by_name in results.items():
        console.print(table(in_flight, by_name))
    about = {
        "loop": "uvloop, in all processes of Python",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": dict(sorted(versions.items())),
        "broker": f"{as_text(properties.get('product'))} {as_text(properties.get('version'))}",
        "rounds": given.rounds,
        "seconds": given.seconds,
        "prefetch": given.prefetch,
        "missing": missing,
        "stolen_percent": stolen_percent(machine_before, machine_after),
    }
    console.print(
        f"{about['python']}; {about['loop']}; {', '.join(f'{name} {it}' for name, it in sorted(versions.items()))}; "
        f"{about['broker']}; {given.rounds} rounds of {given.seconds:g} s; workers hold up to {given.prefetch:,}; "
        f"{psutil.cpu_count()} CPUs, {about['stolen_percent']:.0f} % of their time stolen by other virtual machines",
        highlight=False,
        soft_wrap=True,
    )
    if given.json:
        write_json(given.json, about, results)
    return 0


def write_json(path: Path, about: dict[str, Any], results: Results) -> None:
    """Write all rounds, so that others can compute what they like."""
    found = [
        {"in_flight": in_flight, "contender": name, "rounds": [asdict(it) for it in rounds]}
        for in_flight, by_name in results.items()
        for name, rounds in by_name.items()
    ]
    path.write_text(json.dumps({"about": about, "results": found}, indent=2) + "\n", encoding="utf-8")


def stolen_percent(before: Any, after: Any) -> float:
    """How much of this machine's CPU time its host gave to others meanwhile: noise. 0 where it does not tell."""
    stolen = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
    return float(100 * stolen / max(sum(after) - sum(before), 1e-9))


def as_text(value: object) -> str:
    """A broker's property, which may come as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    known = (*PEERS, *PROGRAMS, *(name for name in MODULES if name not in PEERS))

    def names(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"no such contender: {', '.join(sorted(unknown))}")
        return [name for name in known if name in text.split(",")]

    def numbers(text: str) -> list[int]:
        return [int(it) for it in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--seconds", type=float, default=1.75, help="measured time of a round, default 1.75")
    parser.add_argument("--in-flight", type=numbers, default=[1, 100, 1000], help="default 1,100,1000")
    parser.add_argument("--only", type=names, default=list(DEFAULT), help=f"default {','.join(DEFAULT)}")
    parser.add_argument(
        "--prefetch",
        type=int,
        default=PREFETCH,
        help=f"requests that a worker may hold, default {PREFETCH}; rpcq's own is 100",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds to FILE as well")
    return parser.parse_args()


if __name__ == "__main__":
    run(main(arguments()))
