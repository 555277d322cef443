"""Events through kills of workers, as real processes, and of the node: no subscription loses what was confirmed.

The oracle: an event that `publish` returned for has been run by each of the ten subscriptions, or is a dead letter of
it that says that its workers were lost again and again. When no worker is left, all queues are empty: nothing is
unacknowledged.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aio_pika
import pytest

from rpcq import Client, Event, SendError
from rpcq.jobs.letters import Wanted
from rpcq.jobs.replaying import Letters
from rpcq.options import ConnectionOptions
from rpcq.transport.opening import open_admin
from rpcq.url import parse
from rpcq.wire.events import EventTopology
from support.broker import Broker, Setup
from support.broker import broker as a_broker
from support.crashing import until

pytestmark = [pytest.mark.long, pytest.mark.timeout(500)]

WORD = f"k{secrets.token_hex(6)}"
SUPPORT = Path(__file__).resolve().parents[1] / "support"
SUBSCRIPTIONS = [f"s{number}" for number in range(10)]
WORKERS = 3
KILLS = 12
PAUSES = (0.2, 1.5)
"""Seconds between two kills of workers."""


class Happened(Event, name=f"{WORD}.happened"):
    number: int


@pytest.fixture
def own() -> Iterator[Broker]:
    """A broker that is killed."""
    with a_broker(setup=Setup("loopback_users.guest = false\n")) as made:
        yield made


@dataclass
class Crew:
    """Workers that are started again whenever they end, and what they have run."""

    url: str
    namespace: str
    folder: Path
    node_dies: bool
    _kept: dict[int, asyncio.subprocess.Process] = field(default_factory=dict)
    _keeping: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        self._keeping = [asyncio.create_task(self._keep(number)) for number in range(WORKERS)]
        await until(lambda: len(self.serving()) == WORKERS)

    async def _keep(self, number: int) -> None:
        environment = {**os.environ, "RPCQ_URL": self.url, "RPCQ_NAMESPACE": self.namespace, "RPCQ_HEARTBEAT": "5"}
        command = sys.executable, SUPPORT / "targets_events.py", self.folder, WORD
        while True:
            process = await asyncio.create_subprocess_exec(*command, env=environment)
            self._kept[number] = process
            code = await process.wait()
            # A worker that starts while the node is down ends: whoever runs it is to start it again.
            assert code == -signal.SIGKILL or (code == 1 and self.node_dies)
            await asyncio.sleep(0.1)

    def serving(self) -> list[asyncio.subprocess.Process]:
        """The workers that have started and live."""
        for task in self._keeping:
            if task.done():
                task.result()  # a worker ended by itself
        return [
            it for it in self._kept.values() if it.returncode is None and (self.folder / f"serves-{it.pid}").exists()
        ]

    async def stop(self) -> None:
        """Stop all in an orderly way."""
        for task in self._keeping:
            task.cancel()
        problems = await asyncio.gather(*self._keeping, return_exceptions=True)
        self._keeping.clear()
        assert all(isinstance(it, asyncio.CancelledError) for it in problems), problems
        living = [it for it in self._kept.values() if it.returncode is None]
        await until(lambda: len(self.serving()) == len(living))
        for process in living:
            process.terminate()
        assert [await process.wait() for process in living] == [0] * len(living)

    def kill(self) -> None:
        """End what is left, whatever the test's end."""
        for process in self._kept.values():
            if process.returncode is None:
                process.kill()

    def ran(self) -> dict[str, Counter[int]]:
        """How often each subscription has run each event."""
        found: dict[str, Counter[int]] = {name: Counter() for name in SUBSCRIPTIONS}
        for path in self.folder.glob("effects-*"):
            for line in path.read_text().splitlines():
                name, number = line.split()
                found[name][int(number)] += 1
        return found


async def dead_in(url: str, topology: EventTopology, name: str) -> set[str]:
    """The IDs of the dead letters of a service; each is there because its workers were lost."""
    broker = parse(url)
    async with open_admin(broker, ConnectionOptions(), *broker.hosts[0]) as admin:
        letters = Letters(admin, topology, topology.jobs.dead_queue(name).name)
        found = [letter async for letter in letters.look(Wanted(), (await letters.state()).messages)]
    assert {letter.reason for letter in found} <= {"delivery_limit"}
    return {letter.job.id for letter in found}


async def left_in(url: str, topology: EventTopology) -> dict[str, int]:
    """What waits in the queues of the subscriptions, in those of their suspects, and in those of delays."""
    names = [topology.queue(name, "work", []).name for name in SUBSCRIPTIONS]
    names += [topology.suspects(name, "work").name for name in SUBSCRIPTIONS]
    names += [queue.name for queue in topology.jobs.ladder.queues()]
    found: dict[str, int] = {}
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        for name in names:
            found[name] = (await channel.declare_queue(name, passive=True)).declaration_result.message_count or 0
    return {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("with_node", [False, True], ids=["workers", "workers and node"])
async def test_workers_that_are_killed_lose_no_event_in_any_subscription(
    own: Broker, tmp_path: Path, with_node: bool
) -> None:
    topology, dice, stop = EventTopology("killed"), random.Random(18), asyncio.Event()
    crew = Crew(own.url, "killed", tmp_path, with_node)
    confirmed: dict[int, str] = {}
    failed: dict[int, SendError] = {}

    async def publish(client: Client, first: int) -> None:
        number = first
        while not stop.is_set():
            try:
                confirmed[number] = (await client.publish(Happened(number=number))).id
            except SendError as error:
                failed[number] = error
            number += 4
            await asyncio.sleep(0.02)

    try:
        await crew.start()
        await asyncio.sleep(2)  # the queues are new: see `Broker.kill`
        async with Client(own.url, namespace="killed", timeout=60, heartbeat=5) as client:
            publishing = [asyncio.create_task(publish(client, first)) for first in range(4)]
            for number in range(KILLS):
                await asyncio.sleep(dice.uniform(*PAUSES))
                if with_node and number == KILLS // 2:
                    await asyncio.to_thread(own.kill)
                    await asyncio.to_thread(own.start)
                await until(crew.serving)
                dice.choice(crew.serving()).kill()
            stop.set()
            await asyncio.gather(*publishing)
        while True:
            ran, lost = crew.ran(), False
            for name in SUBSCRIPTIONS:
                missing = {message_id for number, message_id in confirmed.items() if not ran[name][number]}
                lost = lost or bool(missing and missing - await dead_in(own.url, topology, name))
            if not lost and not await left_in(own.url, topology):
                break
            await asyncio.sleep(0.5)
        await crew.stop()
    finally:
        crew.kill()
    assert not await left_in(own.url, topology)
    ran = crew.ran()
    unsent = {number for number, error in failed.items() if error.queued == "no"}
    assert not any(ran[name].keys() & unsent for name in SUBSCRIPTIONS)
    doubled = sum(each.total() - len(each) for each in ran.values())
    dead = [len(await dead_in(own.url, topology, name)) for name in SUBSCRIPTIONS]
    sys.stderr.write(f"{len(confirmed)} events, {KILLS} kills; {doubled} doubled runs, {sum(dead)} dead letters\n")
