"""One process of a contender, as in `python -m benchmarks.job_participants rpcq sender --prefetch 9 ...`.

The runner starts it, with the broker in RPCQ_URL (on the command line, others could read the password).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Callable

import uvloop

from benchmarks.job_participants import MODULES, Options, Participant, load
from benchmarks.participants.__main__ import version
from benchmarks.processes import Line, broker_url, obey, say


async def send(participant: Participant, options: Options) -> None:
    """Send, as the runner says: `at_once` jobs together, again and again, for `seconds`; or `count` jobs in all."""
    clock = time.perf_counter
    warm: set[int] = set()
    async with participant.sender(options) as send_jobs:

        async def on_command(line: Line) -> None:
            at_once: int = line["at_once"]
            if "count" in line:
                for left in range(line["count"], 0, -at_once):
                    await send_jobs(min(at_once, left))
                say("filled")
                return
            extra = 0
            if at_once not in warm:
                warm.add(at_once)
                await send_jobs(at_once)
                extra = at_once
            times: list[float] = []
            cpu, until = time.process_time(), clock() + line["seconds"]
            while not times or clock() < until:
                began = clock()
                await send_jobs(at_once)
                times.append(clock() - began)
            say("sent", times=times, extra=extra, cpu=time.process_time() - cpu)

        names = {name: version(name) for name in participant.PACKAGES}
        say("ready", versions=names)
        await obey(on_command)


def counting(count: int, all_ended: Callable[[], object]) -> tuple[Callable[[], None], list[tuple[float, float]]]:
    """What is called at each end of a job; and the wall and CPU times of the first and the last of `count` ends."""
    numbers = itertools.count(1)  # next() of it is atomic: jobs may end in several threads
    marks: list[tuple[float, float]] = []

    def ended() -> None:
        number = next(numbers)
        if number == 1:
            marks.append((time.perf_counter(), time.process_time()))
        if number == count:
            marks.append((time.perf_counter(), time.process_time()))
            all_ended()

    return ended, marks


async def run_jobs(participant: Participant, options: Options) -> None:
    """When the runner says so, be a worker until it has run `count` jobs; once, since Celery can start once only."""
    loop = asyncio.get_running_loop()

    async def on_command(line: Line) -> None:
        done = asyncio.Event()
        ended, marks = counting(line["count"], lambda: loop.call_soon_threadsafe(done.set))
        async with participant.worker(options, ended):
            await done.wait()
        (began, cpu_began), (stopped, cpu_stopped) = marks
        say("drained", seconds=stopped - began, cpu=cpu_stopped - cpu_began)

    say("ready")
    await obey(on_command)


def main() -> None:
    """Read the arguments and run on uvloop, which those that have an event loop use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MODULES)
    parser.add_argument("role", choices=("sender", "worker"))
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--prefetch", type=int, required=True)
    given = parser.parse_args()
    options = Options(url=broker_url(), namespace=given.namespace, prefetch=given.prefetch)
    role = send if given.role == "sender" else run_jobs
    uvloop.run(role(load(given.name), options))


if __name__ == "__main__":
    main()
