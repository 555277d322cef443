"""Orders with jobs through an outbox and an inbox, while app, relay, workers, broker and database are killed.

    PYTHONPATH=tests python -m soak.outbox --orders 20000 --kills 40 --seed 1

One program writes orders on PostgreSQL, each with its job in the same transaction, and relays them; another one relays,
too; two do the jobs, whose effect is a row. Some transactions are rolled back, some to a savepoint. At random moments,
one of the programs, the broker or the database is killed with SIGKILL, and started again. At the end, every order that
is committed must have exactly one effect, and nothing else must have one. A queue beside those of the service gets a
copy of each job: for each order key, the first copies must be in the order of the commits. The service is ordered: for
each order key, the effects must be in that order, too.

Every choice of what to kill comes from the seed; what the machine makes of it does not.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import aio_pika
from sqlalchemy import Table, create_engine, func, select

from rpcq.errors import BrokerError
from rpcq.options import ConnectionOptions
from rpcq.outbox import metadata
from rpcq.outbox.tables import dead, inbox, outbox
from rpcq.transport.opening import open_admin
from rpcq.url import parse
from rpcq.wire.job_queues import ORDERED_LANES, JobTopology
from soak.jobs import show_logs
from soak.outbox_programs import SERVICE, effects, orders, own
from soak.report import say
from soak.stage import environment
from support import broker as brokers
from support import postgres as databases

VICTIMS = {"app": 4, "relay": 4, "worker-0": 3, "worker-1": 3, "broker": 1, "database": 2}
"""What is killed, with its share."""
PAUSES = (0.3, 2.0)
"""Seconds between two kills."""
SAY_EVERY = 15
"""Looks between two lines of what is done, while nothing is killed any more."""


@dataclass
class Plan:
    orders: int
    kills: int
    minutes: float
    seed: int


@dataclass
class Found:
    version: str = ""
    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    orders: dict[int, int] = field(default_factory=dict)
    """The ID of an order that is committed -> its key."""
    effects: Counter[int] = field(default_factory=Counter)
    done: list[int] = field(default_factory=list)
    """The orders of the effects, in the order in which these happened."""
    ghosts: int = 0
    left: dict[str, int] = field(default_factory=dict)
    copies: list[tuple[int, int, bool]] = field(default_factory=list)
    """Each job that the broker got: its order, its key, whether it was rolled back."""


class Soak:
    """A run."""

    def __init__(self, plan: Plan, folder: Path, broker: brokers.Broker, database: databases.Postgres) -> None:
        self.plan = plan
        self.folder = folder
        self.broker = broker
        self.database = database
        self.namespace = f"soak-{secrets.token_hex(4)}"
        self.found = Found(version=broker.version)
        self._began = time.monotonic()
        self._engine = create_engine(database.url.replace("postgresql://", "postgresql+psycopg://"), pool_pre_ping=True)
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._environment = environment() | {
            "RPCQ_URL": broker.url,
            "RPCQ_NAMESPACE": self.namespace,
            "RPCQ_HEARTBEAT": "5",
            "RPCQ_DATABASE": database.url.replace("postgresql://", "postgresql+asyncpg://"),
        }

    def _command(self, name: str) -> tuple[str, ...]:
        if name == "relay":
            return (sys.executable, "-m", "rpcq", "outbox", "relay")
        return (sys.executable, "-m", "soak.outbox_programs", name.partition("-")[0], str(self.folder))

    async def run(self) -> Found:
        began = self._began = time.monotonic()
        metadata.create_all(self._engine)
        own.create_all(self._engine)
        await self._tap()
        keeping = [asyncio.create_task(self._keep(name)) for name in VICTIMS if name not in ("broker", "database")]
        try:
            async with asyncio.timeout(self.plan.minutes * 60):
                await self._strike()
                while await asyncio.to_thread(self._count) < self.plan.orders:  # noqa: ASYNC110 - other processes
                    await asyncio.sleep(0.5)
                (self.folder / "enough").touch()
                await self._until_done()
        except TimeoutError:
            say(f"not all is done within {self.plan.minutes:g} minutes")
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)
            for process in self._processes.values():
                if process.returncode is None:
                    process.terminate()
            await asyncio.gather(*(process.wait() for process in self._processes.values()))
        self.found.seconds = time.monotonic() - began
        self._read()
        await self._read_tap()
        self._engine.dispose()
        return self.found

    # What plays.

    async def _keep(self, name: str) -> None:
        """Start a program whenever it does not run."""
        while True:
            with (self.folder / f"log-{name}").open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *self._command(name), env=self._environment, stdout=log, stderr=log
                )
            self._processes[name] = process
            await process.wait()
            await asyncio.sleep(0.1)

    async def _strike(self) -> None:
        dice = random.Random(self.plan.seed)
        # One of each at least; the broker's own turn comes once more at most for every few others.
        victims = [*VICTIMS, *dice.choices([*VICTIMS], weights=[*VICTIMS.values()], k=self.plan.kills)]
        victims = victims[: max(self.plan.kills, len(VICTIMS))]
        dice.shuffle(victims)
        for number, victim in enumerate(victims):
            # Evenly among the orders, so that there is load at each.
            share = number / (len(victims) + 1)
            while await asyncio.to_thread(self._count) < self.plan.orders * share:  # noqa: ASYNC110 - the same
                await asyncio.sleep(0.1)
            await asyncio.sleep(dice.uniform(*PAUSES))
            await self._say(f"kill {victim}")
            if victim == "broker":
                await asyncio.to_thread(self.broker.kill)
                await asyncio.sleep(dice.uniform(0, 2))
                await asyncio.to_thread(self.broker.start)
            elif victim == "database":
                await asyncio.to_thread(self.database.down, kill=True)
                await asyncio.sleep(dice.uniform(0, 2))
                await asyncio.to_thread(self.database.up)
            elif (process := self._processes.get(victim)) is not None and process.returncode is None:
                process.kill()
            self.found.kills[victim] += 1

    def _count(self, table: Table = orders) -> int:
        with self._engine.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(table)).scalar_one())

    async def _say(self, what: str) -> None:
        counts = [await asyncio.to_thread(self._count, table) for table in (orders, outbox, effects)]
        written, waiting, done = counts
        seconds = time.monotonic() - self._began
        say(f"{seconds:5.0f} s, {written} orders, {waiting} rows to send, {done} effects: {what}")

    async def _queues(self) -> str:
        """What waits in the queues, so that a run which does not end says where the jobs are."""
        topology, url, found = JobTopology(self.namespace), parse(self.broker.url), []
        queues = [*topology.queues(SERVICE, lanes=False, ordered=True), *topology.shared_queues()]
        try:
            async with open_admin(url, ConnectionOptions(), *url.hosts[0]) as admin:
                for queue in queues:
                    state = await admin.queue(queue.name)
                    if state is not None and state.messages:
                        found.append(f"{queue.name.partition('.')[2]} {state.messages}")
        except BrokerError as error:
            return f"the queues cannot be looked at: {error}"
        return ", ".join(found) or "the queues are empty, besides what workers hold"

    async def _until_done(self) -> None:
        """Wait until the outbox is empty and each order has its effect; then a little longer, for doubles."""
        for turn in itertools.count():
            if turn % SAY_EVERY == 0:
                await self._say(f"wait until all is done; {await self._queues()}")
            await asyncio.to_thread(self._read)
            if not self.found.left["outbox"] and self.found.orders.keys() <= self.found.effects.keys():
                break
            await asyncio.sleep(1)
        await asyncio.sleep(3)

    # What is found.

    def _read(self) -> None:
        with self._engine.connect() as connection:
            # Effects first: an order that is committed in between may lack its effect, and none has one too many.
            rows = connection.execute(select(effects.c.order_id, effects.c.is_ghost).order_by(effects.c.id)).all()
            self.found.done = [order for order, is_ghost in rows if not is_ghost]
            self.found.effects = Counter(self.found.done)
            self.found.ghosts = sum(is_ghost for _, is_ghost in rows)
            rows = connection.execute(select(orders.c.id, orders.c.key)).all()
            self.found.orders = {row.id: row.key for row in rows}
            for name, table in (("outbox", outbox), ("dead", dead), ("inbox", inbox)):
                self.found.left[name] = connection.execute(select(func.count()).select_from(table)).scalar_one()

    async def _tap(self) -> None:
        """Have a copy of each job kept. The service's queues come first: a job that only has a copy counts as sent."""
        topology, url = JobTopology(self.namespace), parse(self.broker.url)
        async with open_admin(url, ConnectionOptions(), *url.hosts[0]) as admin:
            await admin.declare(topology.exchanges(), topology.queues(SERVICE, lanes=False, ordered=True))
        async with await aio_pika.connect(self.broker.url) as connection:
            channel = await connection.channel()
            exchange = await channel.get_exchange(topology.jobs.name)
            queue = await channel.declare_queue(
                f"{self.namespace}.tap", durable=True, arguments={"x-queue-type": "quorum"}
            )
            for key in (SERVICE, *(f"{SERVICE}:{lane}" for lane in ORDERED_LANES)):
                await queue.bind(exchange, key)

    async def _read_tap(self) -> None:
        async with await aio_pika.connect(self.broker.url) as connection:
            channel = await connection.channel()
            queue = await channel.declare_queue(f"{self.namespace}.tap", passive=True)
            count = queue.declaration_result.message_count or 0
            if not count:
                return
            async with queue.iterator(no_ack=True) as copies:
                async for message in copies:
                    found = json.loads(message.body)
                    self.found.copies.append((found["order_id"], found["key"], found["is_ghost"]))
                    if len(self.found.copies) == count:
                        break


def verdict(plan: Plan, found: Found) -> list[str]:
    """What must not be; empty if all is well."""
    problems = []
    if len(found.orders) < plan.orders:
        problems.append(f"there are {len(found.orders)} orders, and not {plan.orders}")
    if lost := found.orders.keys() - found.effects.keys():
        problems.append(f"{len(lost)} orders have no effect: {sorted(lost)[:10]}")
    if doubled := [number for number, count in found.effects.items() if count > 1]:
        problems.append(f"{len(doubled)} orders have several effects: {sorted(doubled)[:10]}")
    if unknown := found.effects.keys() - found.orders.keys():
        problems.append(f"{len(unknown)} effects are of orders that were rolled back: {sorted(unknown)[:10]}")
    ghosts = [number for number, _, is_ghost in found.copies if is_ghost or number not in found.orders]
    if found.ghosts or ghosts:
        problems.append(f"{found.ghosts} effects and {len(ghosts)} jobs are of what was rolled back: {ghosts[:10]}")
    if found.left["outbox"] or found.left["dead"]:
        problems.append(f"rows are left: {found.left}")
    if found.left["inbox"] != sum(found.effects.values()):
        problems.append(f"{found.left['inbox']} keys are in the inbox, and {sum(found.effects.values())} effects")
    sent = {number: key for number, key, _ in found.copies}  # each at the place of its first copy
    problems += _out_of_order("sent", sent.items())
    problems += _out_of_order("done", ((number, found.orders.get(number, 0)) for number in found.done))
    if missing := found.orders.keys() - sent.keys():
        problems.append(f"{len(missing)} orders are not in the copies: {sorted(missing)[:10]}")
    return problems


def _out_of_order(what: str, found: Iterable[tuple[int, int]]) -> list[str]:
    """Which orders came after a later one of their order key; key 0 stands for none."""
    problems = []
    last: Counter[int] = Counter()
    for number, key in found:
        if key and number < last[key]:
            problems.append(f"order {number} of key {key} was {what} after order {last[key]}")
        last[key] = max(last[key], number)
    return problems


def report(plan: Plan, found: Found, problems: list[str]) -> None:
    """Say what came of it."""
    say(f"\nRabbitMQ {found.version}, Python {platform.python_version()}, seed {plan.seed}\n")
    kills = ", ".join(f"{found.kills[name]} of {name}" for name in VICTIMS)
    say(
        f"{len(found.orders)} orders in {found.seconds:.0f} s; {found.kills.total()} kills ({kills}); "
        f"{len(problems)} violations of the oracle\n"
    )
    distinct = len({number for number, *_ in found.copies})
    say(
        f"{sum(found.effects.values())} effects; {len(found.copies)} jobs for {distinct} orders: the others are doubles"
    )
    for problem in problems[:20]:
        say(f"\nVIOLATION: {problem}")


async def play(plan: Plan) -> list[str]:
    """Run it on a broker and a database of its own; returns the violations."""
    with (
        tempfile.TemporaryDirectory(prefix="rpcq-soak-") as name,
        brokers.broker(setup=brokers.Setup()) as broker,
        databases.postgres(own=True) as database,
    ):
        say(f"seed {plan.seed}: {broker.origin}, {database.origin}")
        soak = Soak(plan, Path(name), broker, database)
        found = await soak.run()
        problems = verdict(plan, found)
        report(plan, found, problems)
        if problems:
            show_logs(Path(name))
        return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=30.0, help="at most so long")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "big"))
    return 1 if asyncio.run(play(Plan(**vars(parser.parse_args())))) else 0


if __name__ == "__main__":
    sys.exit(main())
