"""What rpcq keeps in memory, on a real broker: two bounds, and exit code 1 if one is broken.

    RPCQ_URL=amqp://guest:guest@localhost/ python -m benchmarks.memory

1. A client with 100 000 calls in flight stays under 300 MB.
2. Over 1 000 000 calls, client and worker grow by less than 5 MB after the first 100 000.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import secrets
import sys

import uvloop

from benchmarks.processes import (
    BenchmarkError,
    Line,
    broker_channel,
    broker_url,
    obey,
    remove_leftovers,
    run,
    say,
    started,
)

MB = 1_000_000
MOST_HELD = 300 * MB
MOST_GROWTH = 5 * MB
PREFETCH = 1000
SERVICE = "memory"
VERDICT = {True: "ok", False: "BROKEN"}
DEADLINE = 600.0
"""Seconds, for each of the two measurements."""


# The processes.


async def worker(namespace: str) -> None:
    """Serve `add`, and `hold`, which answers nobody before the runner says so."""
    from rpcq import Service, Worker

    service = Service(SERVICE)
    released = asyncio.Event()

    @service.method
    async def add(x: int, y: int) -> int:
        return x + y

    @service.method
    async def hold(x: int) -> int:
        await released.wait()
        return x

    async def release(_: Line) -> None:
        released.set()

    async with Worker(service, url=broker_url(), prefetch=PREFETCH, namespace=namespace):
        say("ready")
        await obey(release)


async def client(namespace: str) -> None:
    """Make the calls that the runner asks for."""
    from rpcq import Client

    async with Client(broker_url(), namespace=namespace, max_in_flight=100_000) as connected:
        await connected.wait_for_service(SERVICE, timeout=30)
        service = connected.service(SERVICE)

        async def hold(calls: int) -> None:
            """All at once; nothing of this returns before the worker lets it."""
            patient = service.with_options(timeout=DEADLINE)
            say("called")
            answers = await asyncio.gather(*(patient.hold(x=i) for i in range(calls)))
            assert answers == list(range(calls))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            say("answered", peak=peak if sys.platform == "darwin" else peak * 1024)

        async def repeat(calls: int, in_flight: int, first: int) -> None:
            """Report when `first` calls have been answered, and at the end."""
            numbers = iter(range(calls))
            answered = 0

            async def caller() -> None:
                nonlocal answered
                for i in numbers:
                    assert await service.add(x=i, y=1) == i + 1
                    answered += 1
                    if answered == first:
                        say("first")

            async with asyncio.TaskGroup() as group:
                for _ in range(in_flight):
                    group.create_task(caller())
            say("all")

        async def on_command(line: Line) -> None:
            if line.pop("do") == "hold":
                await hold(**line)
            else:
                await repeat(**line)

        say("ready")
        await obey(on_command)


# The runner.


async def held(namespace: str, calls: int) -> bool:
    """Measure the client while all calls are in flight."""
    async with (
        started("the worker", "benchmarks.memory", "--role", "worker", "--namespace", namespace) as (worker, _),
        started("the client", "benchmarks.memory", "--role", "client", "--namespace", namespace) as (client, _),
        broker_channel(broker_url()) as (_, channel),
    ):
        before = client.resident_bytes()
        client.write({"do": "hold", "calls": calls})
        await client.read("called")
        # The broker is the one to say that they are really on their way: what the worker does not hold waits there.
        waiting = 0
        for _ in range(int(DEADLINE)):
            found = await channel.queue_declare(f"{namespace}.req.{SERVICE}", passive=True)
            waiting = found.message_count or 0
            if waiting >= calls - PREFETCH:
                break
            await asyncio.sleep(0.2)
        else:
            raise BenchmarkError(f"of {calls:,} calls, only {waiting:,} wait at the broker")
        resident = client.resident_bytes()
        worker.write({"do": "release"})
        peak = int((await client.read("answered", DEADLINE))["peak"])
    good = max(resident, peak) < MOST_HELD
    print(
        f"{calls:,} calls in flight: client {resident / MB:.0f} MB (idle {before / MB:.0f} MB; "
        f"{(resident - before) / calls:,.0f} bytes a call, tasks included), "
        f"peak until the last answer {peak / MB:.0f} MB, bound {MOST_HELD / MB:.0f} MB: {VERDICT[good]}",
        flush=True,
    )
    return good


async def growth(namespace: str, calls: int, in_flight: int) -> bool:
    """Measure client and worker after the first tenth of the calls and at the end."""
    async with (
        started("the worker", "benchmarks.memory", "--role", "worker", "--namespace", namespace) as (worker, _),
        started("the client", "benchmarks.memory", "--role", "client", "--namespace", namespace) as (client, _),
    ):
        client.write({"do": "repeat", "calls": calls, "in_flight": in_flight, "first": calls // 10})
        await client.read("first", DEADLINE)
        first = {it.name: it.resident_bytes() for it in (client, worker)}
        await client.read("all", DEADLINE)
        last = {it.name: it.resident_bytes() for it in (client, worker)}
    good = True
    for name, resident in last.items():
        grown = resident - first[name]
        good = good and grown < MOST_GROWTH
        print(
            f"{calls:,} calls, {in_flight:,} in flight: {name} {first[name] / MB:.1f} MB after {calls // 10:,}, "
            f"{resident / MB:.1f} MB at the end, growth {grown / MB:+.1f} MB, bound {MOST_GROWTH / MB:.0f} MB: "
            f"{VERDICT[grown < MOST_GROWTH]}",
            flush=True,
        )
    return good


async def main(given: argparse.Namespace) -> int:
    """Take both measurements, each with fresh processes."""
    namespace = f"rpcq-bench-{secrets.token_hex(4)}"
    url = broker_url()
    async with broker_channel(url):
        pass  # better to say now that there is no broker than once for each process
    try:
        good = [await held(namespace, given.held), await growth(namespace, given.calls, given.in_flight)]
    finally:
        await remove_leftovers(url, namespace, [SERVICE])
    return 0 if all(good) else 1


def start() -> None:
    """Be the runner, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held", type=int, default=100_000, help="calls in flight for 1., default 100000")
    parser.add_argument("--calls", type=int, default=1_000_000, help="calls for 2., default 1000000")
    parser.add_argument("--in-flight", type=int, default=1000, help="calls in flight for 2., default 1000")
    parser.add_argument("--role", choices=("worker", "client"), help=argparse.SUPPRESS)
    parser.add_argument("--namespace", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        uvloop.run((worker if given.role == "worker" else client)(given.namespace))
    else:
        run(main(given))


if __name__ == "__main__":
    start()
