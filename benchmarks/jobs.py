"""Jobs: rpcq against the raw floor, Celery, Taskiq, Dramatiq and FastStream on one broker, with quorum queues.

    RPCQ_URL=amqp://guest:guest@localhost/ python -m benchmarks.jobs

Every contender has a process that sends; another one runs the jobs of a round. A round has four measurements: jobs
sent one by one, 100 and 1000 at once, each until the broker has confirmed them; and all of them, with more up to
`--jobs`, run by one worker. In every measurement the contenders take turns, so that whatever else the machine does
meets all of them; the medians of the rounds count, and above all the ratios to the floor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import secrets
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import aiormq
import psutil  # type: ignore[import-untyped]  # it ships no types
from rich.console import Console
from rich.table import Table

from benchmarks.job_participants import MODULES, Options, load
from benchmarks.peers import as_text, stolen_percent
from benchmarks.processes import Line, Process, broker_channel, broker_url, run, started

FLOOR = "floor"
SIZES = (1, 100, 1000)
TURNS = 20
"""Of each contender in a measurement of sending: the shorter a turn, the more alike is what others do meanwhile."""
WITHIN = 300.0
"""Seconds that a measurement may take, beyond the time to measure."""


@dataclass
class Found:
    """What was found of one contender: one entry a round.

    Attributes:
        seconds: jobs at once -> the median of the seconds that they took.
        rate: jobs at once -> jobs sent in a second, by that median.
        send_us: jobs at once -> CPU microseconds of the sender a job.
        run_rate: jobs run in a second.
        run_us: CPU microseconds of the worker a job.

    """

    seconds: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in SIZES})
    rate: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in SIZES})
    send_us: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in SIZES})
    run_rate: list[float] = field(default_factory=list)
    run_us: list[float] = field(default_factory=list)


@dataclass
class Contender:
    """A contender, with its process that sends."""

    name: str
    options: Options
    sender: Process
    promises: str
    versions: dict[str, str]
    queued: int = 0
    times: list[float] = field(default_factory=list)
    cpu: float = 0.0
    found: Found = field(default_factory=Found)

    async def send(self, at_once: int, seconds: float) -> None:
        """Have it send for so long."""
        self.sender.write({"at_once": at_once, "seconds": seconds})
        sent = await self.sender.read("sent", WITHIN)
        self.times += sent["times"]
        self.cpu += sent["cpu"]
        self.queued += len(sent["times"]) * at_once + sent["extra"]

    def sent(self, at_once: int) -> None:
        """Note what was found in all its turns of a round."""
        middle, count = statistics.median(self.times), len(self.times) * at_once
        self.found.seconds[at_once].append(middle)
        self.found.rate[at_once].append(at_once / middle)
        self.found.send_us[at_once].append(self.cpu / count * 1e6)
        self.times, self.cpu = [], 0.0

    async def fill(self, count: int) -> None:
        """Have at least so many jobs in the queue."""
        if (more := count - self.queued) > 0:
            self.sender.write({"at_once": 1000, "count": more})
            await self.sender.read("filled", WITHIN)
            self.queued += more

    async def drain(self) -> None:
        """Measure how a worker runs what is in the queue."""
        async with process(self.name, "worker", self.options) as (worker, _):
            worker.write({"count": self.queued})
            drained = await worker.read("drained", WITHIN)
        # The time runs from the end of the first job to that of the last.
        self.found.run_rate.append((self.queued - 1) / drained["seconds"])
        self.found.run_us.append(drained["cpu"] / (self.queued - 1) * 1e6)
        self.queued = 0


def process(name: str, role: str, options: Options) -> AbstractAsyncContextManager[tuple[Process, Line]]:
    """A process of a contender."""
    arguments = (name, role, "--namespace", options.namespace, "--prefetch", str(options.prefetch))
    return started(f"the {role} of {name}", "benchmarks.job_participants", *arguments)


@contextlib.asynccontextmanager
async def contender(name: str, url: str, prefetch: int) -> AsyncIterator[Contender]:
    """Start the process that sends; on leaving, it ends, and what was declared is deleted."""
    participant = load(name)
    options = Options(url, f"rpcq-bench-{secrets.token_hex(4)}", prefetch)
    async with (
        left_as_found(url, options.namespace, *participant.names(options)),
        process(name, "sender", options) as (sender, ready),
    ):
        yield Contender(name, options, sender, participant.PROMISES, ready["versions"])


@contextlib.asynccontextmanager
async def left_as_found(url: str, namespace: str, queues: list[str], exchanges: list[str]) -> AsyncIterator[None]:
    """Delete these on leaving. Celery has fixed names: what is there already stays."""

    async def exists(name: str, *, is_queue: bool) -> bool:
        channel = await connection.channel()  # a failed check closes it
        try:
            if is_queue:
                await channel.queue_declare(name, passive=True)
            else:
                await channel.exchange_declare(name, passive=True)
        except aiormq.exceptions.ChannelNotFoundEntity:
            return False
        await channel.close()
        return True

    def is_new(name: str) -> bool:
        return name.startswith(namespace)

    async with broker_channel(url) as (connection, _):
        queues = [name for name in queues if is_new(name) or not await exists(name, is_queue=True)]
        exchanges = [name for name in exchanges if is_new(name) or not await exists(name, is_queue=False)]
    try:
        yield
    finally:
        async with broker_channel(url) as (_, channel):
            for name in queues:
                await channel.queue_delete(name)
            for name in exchanges:
                await channel.exchange_delete(name)


def ratio(theirs: list[float], floor: list[float]) -> str:
    """Theirs by the floor's: of the medians, and the least and most of any round."""
    each = [their / its for their, its in zip(theirs, floor, strict=True)]
    return f"{statistics.median(theirs) / statistics.median(floor):.2f} ({min(each):.2f} to {max(each):.2f})"


Column = tuple[str, Callable[[Found], list[float]], float]
"""A heading, what is shown of each round, and by what that is multiplied."""


def table(contenders: list[Contender], title: str, *columns: Column) -> Table:
    """The medians, and their ratios to the floor's."""
    found = Table(title=title, title_justify="left", title_style="bold")
    found.add_column("")
    floor = next((each.found for each in contenders if each.name == FLOOR), None)
    for heading, _, _ in columns:
        found.add_column(heading, justify="right")
        if floor is not None:
            found.add_column("/ floor", justify="right")
    for each in contenders:
        cells = [each.name]
        for _, of, factor in columns:
            cells.append(f"{statistics.median(of(each.found)) * factor:,.4g}")
            if floor is not None:
                cells.append(ratio(of(each.found), of(floor)))
        found.add_row(*cells)
    return found


def columns_of(size: int) -> list[Column]:
    """What is shown of jobs that were sent, so many at once."""
    shown: Column = ("jobs/s", lambda it: it.rate[size], 1.0)
    if size == 1:
        shown = ("p50 ms", lambda it: it.seconds[size], 1e3)
    return [shown, ("CPU us/job", lambda it: it.send_us[size], 1.0)]


async def send_in_turns(contenders: list[Contender], at_once: int, seconds: float) -> None:
    """Measure how all of them send, in short turns."""
    for _ in range(TURNS):
        for each in contenders:
            if sum(each.times) < seconds:  # what is slow has had its time after fewer turns
                await each.send(at_once, seconds / TURNS)
    for each in contenders:
        each.sent(at_once)


async def main(given: argparse.Namespace) -> int:
    """Measure, print, and write the JSON file if one was asked for."""
    console = Console()
    if not console.is_terminal:
        # In a file or a CI's log, a line that is too long is better than one that is folded.
        console = Console(width=200)
    url = broker_url()
    async with broker_channel(url) as (connection, _):
        properties = connection.server_properties
    before = psutil.cpu_times()
    async with contextlib.AsyncExitStack() as stack:
        with console.status("starting"):
            contenders = [await stack.enter_async_context(contender(name, url, given.prefetch)) for name in given.only]
        with console.status("measuring") as status:
            for number in range(given.rounds):
                for at_once in SIZES:
                    status.update(f"round {number + 1} of {given.rounds}: {at_once} sent at once")
                    await send_in_turns(contenders, at_once, given.seconds)
                for each in contenders:
                    status.update(f"round {number + 1} of {given.rounds}: {each.name} runs jobs")
                    await each.fill(given.jobs)
                    await each.drain()
        after = psutil.cpu_times()

    for size in SIZES:
        console.print(table(contenders, f"sent, {size:,} at once", *columns_of(size)))
    columns = ("jobs/s", lambda it: it.run_rate, 1.0), ("CPU us/job", lambda it: it.run_us, 1.0)
    console.print(table(contenders, "empty jobs, run by one worker", *columns))
    for each in contenders:
        console.print(f"{each.name}: {each.promises}", highlight=False, soft_wrap=True)
    versions = {"uvloop": version("uvloop")}
    for each in contenders:
        versions |= each.versions
    about = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": dict(sorted(versions.items())),
        "broker": f"{as_text(properties.get('product'))} {as_text(properties.get('version'))}",
        "rounds": given.rounds,
        "seconds": given.seconds,
        "jobs": given.jobs,
        "prefetch": given.prefetch,
        "stolen_percent": stolen_percent(before, after),
    }
    console.print(
        f"{about['python']}; {', '.join(f'{name} {it}' for name, it in sorted(versions.items()))}; {about['broker']}; "
        f"{given.rounds} rounds of {given.seconds:g} s, and {given.jobs:,} jobs; workers hold up to {given.prefetch}; "
        f"{psutil.cpu_count()} CPUs, {about['stolen_percent']:.0f} % of their time stolen by other virtual machines",
        highlight=False,
        soft_wrap=True,
    )
    if given.json:
        results = {each.name: vars(each.found) for each in contenders}
        given.json.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n", encoding="utf-8")
    return 0


def arguments() -> argparse.Namespace:
    """Read the command line."""

    def names(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(MODULES):
            raise argparse.ArgumentTypeError(f"no such contender: {', '.join(sorted(unknown))}")
        return [name for name in MODULES if name in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--seconds", type=float, default=1.0, help="time of each measurement of sending, default 1")
    parser.add_argument(
        "--jobs", type=int, default=5000, help="the least number of jobs that a worker runs, default 5000"
    )
    parser.add_argument("--prefetch", type=int, default=100, help="jobs that a worker may hold, default 100")
    parser.add_argument("--only", type=names, default=list(MODULES), help=f"default {','.join(MODULES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds to FILE as well")
    return parser.parse_args()


if __name__ == "__main__":
    run(main(arguments()))
