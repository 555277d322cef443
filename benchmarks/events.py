"""What more subscriptions cost a publisher, and what a dead and a failing one cost the others.

    RPCQ_URL=amqp://guest:guest@localhost/ python -m benchmarks.events --rounds 10

Figures are ratios within one run, of rounds that alternate:

- `publish_ratio`: the time to publish to ten subscriptions, by the time to publish to one; one by one, and 100 at once.
  No worker runs meanwhile. `client_cpu_ratio` is the same of the CPU time of the publisher: the client's part in it.
- `pace_ratio`: the time until eight subscriptions have run all events, with a dead one (no worker) and one that always
  fails beside them, by the time without these two.

It also checks that each of the eight has run each event, and that the dead one gets all of them when it is back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from rpcq import Client, Event, Retry, Service, Worker
from rpcq.events import queues
from rpcq.options import ConnectionOptions
from rpcq.testing import running
from rpcq.transport.opening import open_admin
from rpcq.url import parse
from rpcq.wire.events import EventTopology

WINDOW = 100
NEVER = Retry(max_attempts=8, initial_backoff=600, max_backoff=3600)


class One(Event, name="bench.one"):
    """An event with one subscription."""

    number: int


class Ten(Event, name="bench.ten"):
    """An event with ten subscriptions."""

    number: int


def listening(kind: type[Event], count: int, prefix: str) -> Service:
    """A service with so many subscriptions that do nothing."""
    service = Service(prefix)

    async def nothing(event: Any) -> None: ...

    for number in range(count):
        service.on(kind, name=f"s{number}")(nothing)
    return service


class Took(NamedTuple):
    """How long something took.

    Attributes:
        seconds: of real time.
        cpu: seconds of CPU time of this process.

    """

    seconds: float
    cpu: float


async def timed(client: Client, kind: type[Any], events: int, window: int) -> Took:
    """How long it takes to publish events, so many at once."""
    free = asyncio.Semaphore(window)

    async def publish(number: int) -> None:
        async with free:
            await client.publish(kind(number=number))

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(publish(number) for number in range(events)))
    return Took(time.perf_counter() - began, time.process_time() - cpu)


async def clear(url: str, namespace: str, services: Iterable[Service]) -> None:
    """Delete the queues and exchanges that workers of these services have declared."""
    topology, broker, services = EventTopology(namespace), parse(url), [*services]
    found = [*queues.shared(topology, services), *(it for each in services for it in queues.waiting(topology, each))]
    exchanges = [*queues.exchanges(topology, services)]
    async with open_admin(broker, ConnectionOptions(), *broker.hosts[0]) as admin:
        await admin.delete([it.name for it in found], [it.name for it in exchanges])


async def publishing(url: str, rounds: int, events: int) -> dict[str, float]:
    """What ten subscriptions cost a publisher, by what one costs."""
    ratios: dict[int, list[Took]] = {1: [], WINDOW: []}
    one, ten = listening(One, 1, "one"), listening(Ten, 10, "ten")
    async with running(url=url) as client:
        async with Worker(one, ten, url=url, namespace=client.options.namespace, connect_timeout=60):
            pass  # it declares the queues; workers would share the CPU with the publisher
        for window, found in ratios.items():
            many = events if window > 1 else max(10, events // 20)
            for turn in range(rounds + 1):
                to_one, to_ten = [await timed(client, kind, many, window) for kind in (One, Ten)]
                if turn:  # the first round declares, and warms up
                    found.append(Took(to_ten.seconds / to_one.seconds, to_ten.cpu / to_one.cpu))
        await clear(url, client.options.namespace, [one, ten])
    return {
        "publish_ratio_one_by_one": statistics.median(it.seconds for it in ratios[1]),
        f"publish_ratio_{WINDOW}_at_once": statistics.median(it.seconds for it in ratios[WINDOW]),
        f"client_cpu_ratio_{WINDOW}_at_once": statistics.median(it.cpu for it in ratios[WINDOW]),
    }


class Eight:
    """Eight subscriptions that work, beside a dead one and one that always fails, or without them.

    Args:
        name: the prefix of their services' names, and of the event's.
        url: the broker.
        namespace: the namespace.
        with_bad: whether the two are there.

    """

    def __init__(self, name: str, url: str, namespace: str, *, with_bad: bool) -> None:
        class Happened(Event, name=f"bench.{name}"):
            number: int

        self.kind = Happened
        self.ran: list[Counter[int]] = [Counter() for _ in range(8)]
        self.late: Counter[int] = Counter()
        self.changed = asyncio.Event()
        self._bad: list[Worker] = []
        self._options: dict[str, Any] = {"url": url, "namespace": namespace, "grace": 1.0}
        self.services = [self._working(f"{name}-{at}", ran) for at, ran in enumerate(self.ran)]
        self.dead, self.failing = Service(f"{name}-dead"), Service(f"{name}-failing")

        @self.dead.on(Happened)
        async def count(event: Any) -> None:
            self.late[event.number] += 1
            self.changed.set()

        @self.failing.on(Happened, retry=NEVER)
        async def fail(_: Any) -> None:
            raise ValueError("always")

        self._served = [*self.services, self.failing] if with_bad else self.services

    def _working(self, name: str, ran: Counter[int]) -> Service:
        service = Service(name)

        @service.on(self.kind)
        async def work(event: Any) -> None:
            ran[event.number] += 1
            self.changed.set()

        return service

    async def until(self, counters: list[Counter[int]], total: int) -> None:
        """Wait until each of the counters has so many events."""
        while any(len(counter) < total for counter in counters):
            self.changed.clear()
            await self.changed.wait()

    async def open(self) -> Worker:
        """Declare the queue of the dead one, stop it, and start the others."""
        if self.failing in self._served:
            async with Worker(self.dead, **self._options):
                pass
        worker = Worker(*self._served, **self._options)
        await worker.start()
        return worker


async def pacing(url: str, rounds: int, events: int) -> dict[str, float]:
    """What a dead and a failing subscription cost eight others."""
    ratios: list[float] = []
    async with running(url=url) as client:
        namespace = client.options.namespace
        good, bad = (Eight(it, url, namespace, with_bad=it == "bad") for it in ("good", "bad"))
        workers = [await good.open(), await bad.open()]
        for turn in range(rounds + 1):
            seconds = []
            for eight in (good, bad):
                began = time.perf_counter()
                base = turn * events
                await asyncio.gather(*(client.publish(eight.kind(number=base + at)) for at in range(events)))
                await eight.until(eight.ran, base + events)
                seconds.append(time.perf_counter() - began)
            if turn:
                ratios.append(seconds[1] / seconds[0])
        total = (rounds + 1) * events
        lost = sum(total - len(counter) for eight in (good, bad) for counter in eight.ran)
        async with Worker(bad.dead, url=url, namespace=namespace):
            await bad.until([bad.late], total)
        for worker in workers:
            await worker.stop()
        await clear(
            url, namespace, [it for eight in (good, bad) for it in (*eight.services, eight.dead, eight.failing)]
        )
    return {"pace_ratio": statistics.median(ratios), "lost": lost, "late_for_the_dead_one": len(bad.late)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--events", type=int, default=1000, help="events of a round")
    given = parser.parse_args()
    for measure in (publishing, pacing):
        found = asyncio.run(measure(os.environ["RPCQ_URL"], given.rounds, given.events))
        print(json.dumps(found, indent=2), flush=True)


if __name__ == "__main__":
    main()
