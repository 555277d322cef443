"""A client and a worker that are hostile, know each other, and have the permissions of the page on security."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aio_pika
import aiormq.exceptions
import pika
import pytest
from aio_pika.abc import AbstractConnection, AbstractExchange, AbstractIncomingMessage, AbstractQueue

from rpcq import CallTimeout, Client, InvalidReply, OutcomeUnknown
from rpcq.options import ConnectionOptions
from rpcq.transport.opening import open_admin
from rpcq.url import parse
from rpcq.wire import bodies
from rpcq.wire.topology import Queue
from security.realm import CLIENT, WORKER, Deed, Place, reply_queue
from support.command import ROOT, Process

MOST_GROWTH = 200
"""MiB that the memory of the worker under attack may grow."""

MOST_BUSY = 1000
"""Milliseconds of the processor's time that its event loop may be busy at a stretch: far more than on any machine."""

MOST_BODY = 1024 * 1024


def filled(start: str, part: str, end: str) -> bytes:
    """The largest body that fits."""
    times = (MOST_BODY - len(start) - len(end)) // len(part)
    return (start + (part * times)[: -1 if part.endswith(",") else None] + end).encode()


def nested(depth: int) -> str:
    """A tree of which only the deepest leaf does not fit."""
    return '"?"' if not depth else f'{{"left": {nested(depth - 1)}, "right": 1}}'


EXPENSIVE: list[tuple[str, bytes]] = [
    ("rows", filled('{"rows": [', '{"article": "a", "count": [], "price": {}},', "]}")),
    ("rows", filled('{"rows": [', '"",', "]}")),
    ("mixed", filled('{"values": {"a": [', '"",', "]}}")),
    ("mixed", ("{" + ",".join(f'"k{it}":0' for it in range(80_000)) + "}").encode()),
    ("tree", f'{{"tree": {nested(20)}}}'.encode()),
    ("tree", f'{{"tree": {nested(60)}}}'.encode()),
    ("echo", filled("[", "1e9,", "]")),
    ("echo", b"[" * (MOST_BODY - 1)),
    ("echo", filled('["', "\\u00e9", '"]')),
    ("add", filled("[", "1" * 4000 + ",", "]")),
    ("add", filled('{"x": 1, "y": "', "a", '"}')),
]


@dataclass
class Attack:
    """What the hostile peers know, try, and bring about.

    Attributes:
        tried: attempts by their kind.
        successes: what must not be.
        victim: the name of the victim's reply queue, as the hostile worker learnt it.
        ids: the victim's correlation IDs that it learnt.
    """

    place: Place
    seconds: float
    tried: Counter[str] = field(default_factory=Counter)
    successes: list[str] = field(default_factory=list)
    victim: str = ""
    ids: list[str] = field(default_factory=list)

    async def go_on(self, attack: Callable[[], Awaitable[None]]) -> None:
        until = asyncio.get_running_loop().time() + self.seconds
        while asyncio.get_running_loop().time() < until:
            await attack()
            await asyncio.sleep(0.005)

    async def deeds(self, connection: AbstractConnection, deeds: dict[str, Deed]) -> None:
        """All that the user may not do."""
        for name, do in deeds.items():
            channel = await connection.channel()
            try:
                async with asyncio.timeout(10):
                    await do(channel, self.place, self.victim or "unknown")
            except (aiormq.exceptions.ChannelAccessRefused, aiormq.exceptions.ChannelLockedResource):
                self.tried[name] += 1
            except TimeoutError:
                self.tried["what the broker had no time to refuse"] += 1
            else:
                self.successes.append(name)

    def guesses(self) -> list[str]:
        """IDs that calls may have which are under way elsewhere."""
        found = []
        for known in self.ids[-3:]:
            prefix, count, secret = known.split("-")
            for ahead in range(-20, 60):
                number = f"{int(count, 16) + ahead:x}"
                found += [
                    f"{prefix}-{number}",
                    f"{prefix}-{number}-{secret}",
                    f"{prefix}-{number}-{secrets.token_hex(8)}",
                ]
        return found


async def consume(queue: AbstractQueue, take: Callable[[AbstractIncomingMessage], Awaitable[Any]]) -> None:
    await queue.consume(take, no_ack=True)  # type: ignore[arg-type]  # any awaitable will do


class HostileClient:
    """A client that sends what it likes."""

    def __init__(self, attack: Attack, connection: AbstractConnection, requests: AbstractExchange) -> None:
        self.attack = attack
        self._connection = connection
        self._requests = requests
        self._own = ""
        self._numbers = itertools.count()

    async def run(self, own: AbstractQueue) -> None:
        self._own = own.name
        await own.bind(self.attack.place.exchange, own.name)
        await consume(own, self._answered)
        attacks = (self._forge, self._write_elsewhere, self._replay, self._expend, self._overstep)
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(self._flood))
            for each in attacks:
                group.create_task(self.attack.go_on(each))

    async def _answered(self, message: AbstractIncomingMessage) -> None:
        kind = message.correlation_id or ""
        if kind == "replay":
            self.attack.tried["replays that were answered"] += 1
            if message.type == "result" or b"PERMISSION_DENIED" not in message.body:
                self.attack.successes.append(f"a replay was answered with {message.body[:100]!r}")
        elif kind.startswith("expensive"):
            self.attack.tried["expensive bodies that were answered"] += 1

    async def _ask(self, service: str, method: str, body: bytes, **properties: Any) -> None:
        message = aio_pika.Message(body, type=method, content_type="application/json", **properties)
        await self._requests.publish(message, service, mandatory=False)

    async def _forge(self) -> None:
        """Have a service reply to the victim."""
        body = bodies.encode_params((), {"value": "forged"}, 1000)
        for guess in self.attack.guesses()[:60]:
            await self._ask("others", "echo", body, reply_to=self.attack.victim, correlation_id=guess)
            self.attack.tried["replies to the victim, by a service"] += 1

    async def _write_elsewhere(self) -> None:
        place = self.attack.place
        copies = [f"{place.topology.namespace}.bank", "things", place.queue("others"), self.attack.victim]
        for service in ("things", "others"):
            await self._ask(service, "add", b"{}", expiration=0, headers={"CC": copies})
            self.attack.tried["requests with copies to other queues"] += 1

    async def _replay(self) -> None:
        for headers in ({}, {"x-token": secrets.token_hex(8)}):
            keyed = {"rpcq-idempotency-key": "order-17", **headers}
            await self._ask("others", "secret", b"{}", reply_to=self._own, correlation_id="replay", headers=keyed)
            self.attack.tried["replays"] += 1
        await asyncio.sleep(0.05)

    def _flood(self) -> None:
        """Ask the worker under attack as much as can be sent; in a thread, by a client that costs little."""
        until = time.monotonic() + self.attack.seconds
        kinds = itertools.cycle(("describe", "stats", "ping", "cancel", "nothing"))
        with pika.BlockingConnection(pika.URLParameters(self.attack.place.users["client"])) as connection:
            channel, control = connection.channel(), self.attack.place.topology.control.name
            while time.monotonic() < until:
                for _ in range(20):
                    named = f"flood-{secrets.token_hex(8)}"
                    question = pika.BasicProperties(type=next(kinds), reply_to=self._own, correlation_id=named)
                    channel.basic_publish(control, "others", b"", question)
                    self.attack.tried["questions"] += 1
                time.sleep(0.01)  # the others' turn: they share the interpreter

    async def _expend(self) -> None:
        for method, expensive in EXPENSIVE:
            named = f"expensive-{next(self._numbers)}"
            await self._ask("others", method, expensive, reply_to=self._own, correlation_id=named)
            self.attack.tried["expensive bodies"] += 1
            await asyncio.sleep(0.1)

    async def _overstep(self) -> None:
        await self.attack.deeds(self._connection, CLIENT)


async def hostile_client(attack: Attack) -> None:
    place = attack.place
    async with await aio_pika.connect(place.users["client"]) as connection:
        channel = await connection.channel(publisher_confirms=False)
        requests = await channel.get_exchange(place.topology.requests.name, ensure=False)
        await HostileClient(attack, connection, requests).run(await reply_queue(channel, place))


async def hostile_worker(attack: Attack) -> None:
    place = attack.place
    async with await aio_pika.connect(place.users["worker"]) as connection:
        channel = await connection.channel(publisher_confirms=False)
        replies = await channel.get_exchange(place.exchange, ensure=False)
        own = await channel.declare_queue(exclusive=True)
        for key in ("things", "@all"):  # what its permissions let it hear
            await own.bind(place.topology.control.name, key)

        async def reply(key: str, correlation_id: str, body: bytes, kind: str = "result") -> None:
            message = aio_pika.Message(body, type=kind, correlation_id=correlation_id, content_type="application/json")
            await replies.publish(message, key, mandatory=False)

        async def learn(message: AbstractIncomingMessage) -> None:
            """A call of the victim: it serves it, in its way."""
            if message.reply_to and message.correlation_id:
                attack.victim = message.reply_to
                attack.ids.append(message.correlation_id)
                _, expensive = EXPENSIVE[len(attack.ids) % len(EXPENSIVE)]
                await reply(message.reply_to, message.correlation_id, expensive)
                attack.tried["expensive replies"] += 1

        async def answer(message: AbstractIncomingMessage) -> None:
            """A question of the victim, to every worker."""
            if message.reply_to == attack.victim and message.correlation_id:
                for body in (EXPENSIVE[0][1], b"\x1b[2J", b'{"name": "[/]", "services": [[[[]]]]}'):
                    await reply(message.reply_to, message.correlation_id, body)
                attack.tried["answers for others"] += 1

        await consume(await channel.get_queue(place.queue("things"), ensure=False), learn)
        await consume(own, answer)

        async def forge() -> None:
            for guess in attack.guesses():
                await reply(attack.victim, guess, b'"forged"')
                attack.tried["replies to the victim"] += 1

        async with asyncio.TaskGroup() as group:
            group.create_task(attack.go_on(forge))
            group.create_task(attack.go_on(lambda: attack.deeds(connection, WORKER)))


async def victim(attack: Attack, client: Client, token: str, right: Counter[str]) -> None:
    """Calls that the peers try to spoil, and are right all the same."""
    keyed = client.with_options(idempotency_key="order-17", metadata={"x-token": token})
    patient = client.with_options(timeout=20)
    assert await keyed.call("others.secret") == "the secret"

    async def add() -> None:
        number = secrets.randbelow(1000)
        found = await patient.call("others.add", x=number, y=1)
        right["calls"] += 1
        if found != number + 1:
            attack.successes.append(f"{number} + 1 was told to be {found!r}")

    async def lead_on() -> None:
        """Call the service of the hostile worker."""
        try:
            await client.with_options(timeout=2, returns=list[int]).call("things.add", x=1, y=1)
        except (CallTimeout, InvalidReply, OutcomeUnknown):
            right["calls of the hostile worker"] += 1
        else:
            right["calls of the hostile worker with a result that fits"] += 1

    async def ask() -> None:
        found = [it async for it in client.workers(wait=1)]
        right["questions"] += any(service.name == "others" for it in found for service in it.services)
        assert await keyed.call("others.secret") == "the secret"

    async with asyncio.TaskGroup() as group:
        for each in (*[add] * 8, lead_on, ask):
            group.create_task(attack.go_on(each))


@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=[pytest.mark.long, pytest.mark.timeout(240)])])
async def test_hostile_peers_achieve_nothing(
    place: Place, seconds: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    token, bearing = secrets.token_hex(8), tmp_path / "bearing"
    attack, right = Attack(place, seconds), Counter[str]()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RPCQ_")},
        "RPCQ_URL": place.users["other worker"],
        "RPCQ_NAMESPACE": place.topology.namespace,
        "RPCQ_REPLY_EXCHANGE": place.exchange,
        "RPCQ_LOG_LEVEL": "warning",
        "RPCQ_TEST_TOKEN": token,
        "RPCQ_TEST_BEARING": str(bearing),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    url = parse(place.broker.url)
    bank = f"{place.topology.namespace}.bank"
    command = [sys.executable, "-m", "rpcq", "worker", "support.targets_guarded:others"]
    async with open_admin(url, ConnectionOptions(), *url.hosts[0]) as admin:
        await admin.declare([], [Queue(bank, durable=True)])
        try:
            with Process(command, tmp_path, environment) as worker:
                async with place.client("other client") as client:
                    await client.wait_for_service("others", timeout=20)
                    await asyncio.sleep(0.6)
                    before = json.loads(bearing.read_text())
                    async with asyncio.TaskGroup() as group:
                        group.create_task(hostile_worker(attack))
                        group.create_task(hostile_client(attack))
                        group.create_task(victim(attack, client, token, right))
                    assert await client.call("others.add", x=1, y=1) == 2
                    await asyncio.sleep(0.6)
                    after = json.loads(bearing.read_text())
            state = await admin.queue(bank)
        finally:
            await admin.delete([bank])
    figures = {**after, "grown_mib": after["most_mib"] - before["most_mib"], "lines": len(worker.lines)}
    sys.stdout.write(json.dumps({"right": right, "tried": attack.tried, **figures}, indent=1))
    record_property("figures", figures)
    assert attack.successes == []
    assert state is not None
    assert state.messages == 0
    assert min(right[it] for it in ("calls", "calls of the hostile worker", "questions")) > 0, right
    wanted = {*CLIENT, *WORKER, "replies to the victim", "replies to the victim, by a service", "replays", "questions"}
    assert not [it for it in (*wanted, "expensive bodies that were answered") if not attack.tried[it]]
    assert figures["grown_mib"] < MOST_GROWTH
    assert figures["longest_ms"] < MOST_BUSY
    assert figures["lines"] < 20 * seconds, "\n".join(worker.lines[-20:])
