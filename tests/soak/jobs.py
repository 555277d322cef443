"""Many jobs through several workers while these and the broker are killed, and an oracle that reads the effects.

    PYTHONPATH=tests python -m soak.jobs --jobs 100000 --kills 50 --seed 1

Some jobs are poison: they kill the process that runs them. Some hang until their timeout. Some fail once, some take a
while, some run in a thread. Workers are killed at random, each time after another part of all effects; half-way, the
broker is restarted. Then every job that was confirmed must have had its effect, except the poisonous and the hanging
ones, each of which must be a dead letter; no other may be one; and every queue must be empty. How often an effect
happened twice is counted: a job is done at least once.

Every choice comes from the seed; what the machine makes of it does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rpcq import Client
from rpcq.wire.job_queues import JobTopology
from soak.jobs_worker import DONE, HANG_ATTEMPTS, HUNG, LINE, POISON, SERVICE, path_of
from soak.report import say
from soak.stage import environment
from support import broker as brokers

KINDS = {"quick": 80, "slow": 5, "thread": 5, "again": 10}
"""The innocent jobs, with their shares."""
REASONS = {"poison": "delivery_limit", "hang": "attempts"}
AHEAD = 0.05
"""The share of all jobs that may wait: the rest is sent while workers and the broker are killed."""
BATCH = 100
SEND_TIMEOUT = 120.0
DOUBLES = 240.0
"""Seconds that workers have for the doubles of jobs that are done or dead, which may also be on the ladder.

There they may stand still for 180 s after a restart of the broker: docs/explanations/jobs.md, "Delays and retries".
"""


@dataclass
class Plan:
    """What is to happen."""

    jobs: int
    kills: int
    poison: int
    hang: int
    restart: str
    workers: int
    minutes: float
    seed: int


@dataclass
class Found:
    """What happened."""

    version: str = ""
    seconds: float = 0.0
    kills: int = 0
    restarts: int = 0
    ends: Counter[int] = field(default_factory=Counter)
    done: Counter[int] = field(default_factory=Counter)
    died: Counter[int] = field(default_factory=Counter)
    """A poisonous job -> how often it killed its process."""
    hung: Counter[int] = field(default_factory=Counter)
    dead: list[dict[str, object]] = field(default_factory=list)
    """Dead letters, as `rpcq dlq list --json` prints them."""
    numbers: dict[str, int] = field(default_factory=dict)
    """The ID of a job -> its number."""
    queued: dict[str, int] = field(default_factory=dict)
    """What is left in each queue that is not empty, once all workers have stopped."""


class Soak:
    """A run."""

    def __init__(self, plan: Plan, folder: Path, broker: brokers.Broker) -> None:
        dice = random.Random(plan.seed)
        special = dice.sample(range(plan.jobs), plan.poison + plan.hang)
        kinds = dict.fromkeys(special[: plan.poison], "poison") | dict.fromkeys(special[plan.poison :], "hang")
        ordinary = dice.choices([*KINDS], weights=[*KINDS.values()], k=plan.jobs)
        self.kinds = [kinds.get(number, kind) for number, kind in enumerate(ordinary)]
        self.plan = plan
        self.folder = folder
        self.broker = broker
        self.namespace = f"soak-{secrets.token_hex(4)}"
        self.found = Found(version=broker.version)
        self._dice = dice
        self._slots: list[asyncio.subprocess.Process | None] = [None] * plan.workers
        self._sent = 0
        self._environment = environment() | {"RPCQ_URL": broker.url, "RPCQ_NAMESPACE": self.namespace}
        self._environment["RPCQ_HEARTBEAT"] = "5"

    @property
    def innocents(self) -> set[int]:
        return {number for number, kind in enumerate(self.kinds) if kind not in REASONS}

    def progress(self) -> int:
        """About how many effects there were."""
        return sum(path.stat().st_size for path in self.folder.glob("effects-*")) // LINE

    async def run(self) -> Found:
        began = time.monotonic()
        keeping = [asyncio.create_task(self._keep(slot)) for slot in range(self.plan.workers)]
        acting = [asyncio.create_task(each) for each in (self._send(), self._strike(), self._tell())]
        try:
            async with asyncio.timeout(self.plan.minutes * 60):
                await asyncio.gather(*acting[:2])
                await self._until_done()
        except TimeoutError:
            say(f"not all is done within {self.plan.minutes:g} minutes")
        finally:
            for task in (*acting, *keeping):
                task.cancel()
            await asyncio.gather(*acting, *keeping, return_exceptions=True)
            await self._stop()
        self.found.seconds = time.monotonic() - began
        self._read()
        self.found.dead = await self._letters()
        await self._look()
        return self.found

    # What plays.

    async def _keep(self, slot: int) -> None:
        """Start a worker whenever there is none in this slot."""
        while True:
            with (self.folder / f"log-{slot}").open("ab") as log:
                command = (sys.executable, "-m", "soak.jobs_worker", str(self.folder))
                process = await asyncio.create_subprocess_exec(*command, env=self._environment, stdout=log, stderr=log)
            self._slots[slot] = process
            self.found.ends[await process.wait()] += 1

    def _serving(self) -> list[asyncio.subprocess.Process]:
        return [
            process
            for process in self._slots
            if process is not None
            and process.returncode is None
            and path_of(self.folder, "serves", process.pid).exists()
        ]

    async def _send(self) -> None:
        while not self._serving():  # noqa: ASYNC110 - the first worker declares the queues: another process
            await asyncio.sleep(0.05)
        async with Client(self.broker.url, namespace=self.namespace, heartbeat=5) as client:
            sender = client.with_options(timeout=SEND_TIMEOUT)

            async def send(kind: str, numbers: list[int]) -> None:
                jobs = await sender.send_many(f"{SERVICE}.{kind}", [{"number": number} for number in numbers])
                self.found.numbers |= {job.id: number for job, number in zip(jobs, numbers, strict=True)}

            for first in range(0, len(self.kinds), BATCH):
                while self._sent - self.progress() > AHEAD * len(self.kinds):  # noqa: ASYNC110 - other processes
                    await asyncio.sleep(0.05)
                numbers: dict[str, list[int]] = {}
                for number in range(first, min(first + BATCH, len(self.kinds))):
                    numbers.setdefault(self.kinds[number], []).append(number)
                await asyncio.gather(*(send(*each) for each in numbers.items()))
                self._sent = len(self.found.numbers)

    async def _strike(self) -> None:
        """Kill workers, and restart the broker half-way, each time after another part of the effects."""
        moments = sorted(self._dice.uniform(0.02, 0.98) for _ in range(self.plan.kills))
        restart = 0.5 if self.plan.restart != "none" else 2.0
        for moment in sorted([*moments, restart]):
            if moment > 1:
                continue
            while self.progress() < moment * len(self.kinds):  # noqa: ASYNC110 - other processes
                await asyncio.sleep(0.01)
            if moment == restart:
                await asyncio.to_thread(self._restart)
                self.found.restarts += 1
                continue
            while not (serving := self._serving()):  # noqa: ASYNC110 - other processes
                await asyncio.sleep(0.01)
            self._dice.choice(serving).kill()
            self.found.kills += 1

    def _restart(self) -> None:
        if self.plan.restart == "kill":
            self.broker.kill()
            self.broker.start()
        else:
            self.broker.restart()

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(15)
            found = self.found
            say(f"{self._sent} sent, about {self.progress()} effects, {found.kills} kills, {found.ends.total()} ends")

    async def _until_done(self) -> None:
        """Wait until all have had their effects, or are dead."""
        while True:
            self._read()
            if self.innocents <= self.found.done.keys():
                dead = {self.found.numbers[str(letter["id"])] for letter in await self._letters()}
                if len(dead) >= self.plan.poison + self.plan.hang:
                    break
            await asyncio.sleep(1)
        until = time.monotonic() + DOUBLES
        while await self._queued() and time.monotonic() < until:  # noqa: ASYNC110 - the broker tells nobody
            await asyncio.sleep(1)

    async def _stop(self) -> None:
        """Let all workers end in an orderly way, which takes some grace time at most."""
        left = [process for process in self._slots if process is not None and process.returncode is None]
        for process in left:
            process.terminate()
        async with asyncio.TaskGroup() as group:
            for process in left:
                group.create_task(process.wait())
        self.found.ends.update(process.returncode or 0 for process in left)

    # What is found.

    def _read(self) -> None:
        counts: dict[str, Counter[int]] = {}
        for path in self.folder.glob("effects-*"):
            for line in path.read_text("ascii").split():
                counts.setdefault(line[0], Counter())[int(line[1:])] += 1
        self.found.done = counts.get(DONE, Counter())
        self.found.died = counts.get(POISON, Counter())
        self.found.hung = counts.get(HUNG, Counter())

    async def _letters(self) -> list[dict[str, object]]:
        command = (sys.executable, "-m", "rpcq", "dlq", "list", SERVICE, "--json", "--limit", "100000")
        process = await asyncio.create_subprocess_exec(
            *command, env=self._environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return [json.loads(line) for line in out.splitlines()]

    async def _look(self) -> None:
        """Count what is left. Right after consumers have gone, what they held may not have come back yet."""
        for _ in range(20):
            self.found.queued = await self._queued()
            if not self.found.queued:
                break
            await asyncio.sleep(0.5)

    async def _queued(self) -> dict[str, int]:
        """The messages in each queue that is not empty, but for dead letters."""
        vhost = brokers.vhost_of(self.broker.url)
        dead = JobTopology(self.namespace).dead_queue(SERVICE).name
        rows = await asyncio.to_thread(
            self.broker.ctl, "list_queues", "--quiet", "--no-table-headers", "--vhost", vhost, "name", "messages"
        )
        counts = {name: int(count) for name, _, count in (row.partition("\t") for row in rows.splitlines())}
        return {
            name: count
            for name, count in counts.items()
            if count and name.startswith(f"{self.namespace}.") and name != dead
        }


def verdict(plan: Plan, kinds: list[str], found: Found) -> list[str]:
    """What must not be; empty if all is well."""
    problems = []
    dead: dict[int, list[str]] = {}
    for letter in found.dead:
        number = found.numbers.get(str(letter["id"]), -1)
        dead.setdefault(number, []).append(str(letter["reason"]))
    innocents = {number for number, kind in enumerate(kinds) if kind not in REASONS}
    if len(found.numbers) != plan.jobs:
        problems.append(f"{plan.jobs - len(found.numbers)} jobs were not sent")
    if lost := innocents - found.done.keys() - dead.keys():
        problems.append(f"{len(lost)} jobs are lost: {_some(kinds, lost)}")
    if innocent := innocents & dead.keys():
        problems.append(f"{len(innocent)} innocent jobs are dead: {_some(kinds, innocent)}")
    if -1 in dead:
        problems.append("there are dead letters of jobs that nobody sent")
    for number, kind in enumerate(kinds):
        reasons = set(dead.get(number, ()))
        if kind in REASONS and reasons != {REASONS[kind]}:
            problems.append(f"job {number} ({kind}) must be dead because of {REASONS[kind]}; found {reasons or 'none'}")
    if found.kills != plan.kills or found.restarts != (plan.restart != "none"):
        problems.append(f"{found.kills} kills and {found.restarts} restarts: not as many as planned")
    if found.queued:
        problems.append(f"left in queues: {found.queued}")
    return problems


def _some(kinds: list[str], numbers: set[int]) -> str:
    return ", ".join(f"{number} ({kinds[number]})" for number in sorted(numbers)[:10])


def report(plan: Plan, found: Found, problems: list[str]) -> None:
    """Say what came of it."""
    doubled = {number: count for number, count in found.done.items() if count > 1}
    reasons = Counter(str(letter["reason"]) for letter in found.dead)
    letters = len({letter["id"] for letter in found.dead})
    say(f"\nRabbitMQ {found.version}, Python {platform.python_version()}, seed {plan.seed}\n")
    say(
        f"{len(found.numbers)} jobs in {found.seconds:.0f} s through {plan.workers} workers; {found.kills} random "
        f"kills, {found.died.total()} by poison, {found.restarts} restart of the broker ({plan.restart}); "
        f"{len(problems)} violations of the oracle\n"
    )
    say(f"done: {len(found.done)}; effects that happened more than once: {len(doubled)}, of which")
    say(f"  {sum(doubled.values()) - len(doubled)} effects too many; the most of one job: {max(found.done.values())}")
    say(f"dead: {letters} jobs in {len(found.dead)} letters: {', '.join(f'{reasons[it]} {it}' for it in reasons)}")
    if found.died:
        say(f"a poisonous job ran {min(found.died.values())} to {max(found.died.values())} times")
    if found.hung:
        least, most = min(found.hung.values()), max(found.hung.values())
        say(f"a hanging job ran {least} to {most} times; it has {HANG_ATTEMPTS} attempts")
    say(f"how worker processes ended: {', '.join(f'{count} with {code}' for code, count in found.ends.items())}")
    for problem in problems:
        say(f"\nVIOLATION: {problem}")


def show_logs(folder: Path) -> None:
    """Say what the workers said last."""
    for path in sorted(folder.glob("log-*")):
        say(f"\nthe end of {path.name}:\n{path.read_text('utf-8', 'replace')[-2000:]}")


async def play(plan: Plan) -> list[str]:
    """Run it on a broker of its own; returns the violations. A SIGTERM ends it, with all that it has started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with (
        tempfile.TemporaryDirectory(prefix="rpcq-soak-") as name,
        brokers.broker(setup=brokers.Setup()) as broker,
    ):
        soak = Soak(plan, Path(name), broker)
        found = await soak.run()
        problems = verdict(plan, soak.kinds, found)
        report(plan, found, problems)
        if problems:
            show_logs(Path(name))
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="soak.jobs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=100_000, help="default 100000, the special ones included")
    parser.add_argument("--kills", type=int, default=50, help="default 50; of a worker, at random")
    parser.add_argument("--poison", type=int, default=10, help="default 10: jobs that kill their process")
    parser.add_argument("--hang", type=int, default=10, help="default 10: jobs that hang beyond their timeout")
    parser.add_argument("--restart", choices=("orderly", "kill", "none"), default="orderly", help="of the broker")
    parser.add_argument("--workers", type=int, default=4, help="default 4")
    parser.add_argument("--minutes", type=float, default=30.0, help="default 30: the longest that it may take")
    parser.add_argument("--seed", type=int, default=None, help="default: another each time; it is printed")
    given = vars(parser.parse_args())
    if given["seed"] is None:
        given["seed"] = random.SystemRandom().getrandbits(32)
    logging.getLogger("rpcq").setLevel(logging.CRITICAL)
    plan = Plan(**given)
    say(f"seed {plan.seed}, process {os.getpid()}")
    try:
        return 1 if asyncio.run(play(plan)) else 0
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM


if __name__ == "__main__":
    sys.exit(main())
