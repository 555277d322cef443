"""A namespace with broker users that have the permissions of `docs/security.md`, and what they must not do."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit, urlunsplit

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractQueue

from rpcq import Client, Service, Worker
from rpcq.options import ConnectionOptions
from rpcq.transport.opening import open_admin
from rpcq.url import parse
from rpcq.wire.delays import LEVELS
from rpcq.wire.topology import Topology
from support.broker import Broker

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"
SERVED = {"worker": "things", "other worker": "others"}
KINDS: dict[str, Literal["classic", "quorum"]] = {"things": "classic", "others": "quorum"}


def patterns(role: str, namespace: str, user: str, service: str) -> list[str]:
    """The regular expressions for configure, write and read, as the page has them, for names of this test."""
    form = rf"^rabbitmqctl set_permissions -p VHOST {role} \\\n((?: +'.*\n)+)"
    command = re.search(form, SECURITY.read_text(), re.MULTILINE)
    assert command is not None
    found = re.findall(r"'(.*)'", command[1])
    assert len(found) == 3
    return [renamed(it, namespace, user, service) for it in found]


def topic_patterns(role: str, namespace: str, user: str, service: str) -> list[tuple[str, str, str]]:
    """The exchanges that a role has topic permissions for, with their regular expressions for write and read."""
    form = rf"^ *rabbitmqctl set_topic_permissions -p VHOST {role} rpcq\.(\S+) +'(.*)' '(.*)'$"
    found = re.findall(form, SECURITY.read_text(), re.MULTILINE)
    return [
        (f"{namespace}.{each}", renamed(write, namespace, user, service), renamed(read, namespace, user, service))
        for exchange, write, read in found
        for each in (
            [exchange.replace("$level", f"{it:02}") for it in range(LEVELS)] if "$" in exchange else [exchange]
        )
    ]


def renamed(pattern: str, namespace: str, user: str, service: str) -> str:
    """A pattern of the page, where the user is called client, for the names of this test."""
    own = pattern.replace("rpcq\\.", f"{namespace}\\.").replace("calculator", service)
    return re.sub(r"reply\\\.(client|sender|latersender|publisher)\\\.", lambda _: f"reply\\.{re.escape(user)}\\.", own)


def add_user(broker: Broker, namespace: str, name: str, role: str, service: str) -> str:
    """Make a user with the permissions that the page gives to a role; returns the user's URL."""
    parts = urlsplit(broker.url)
    vhost = parts.path.removeprefix("/") or "/"
    user, password = f"{namespace}-{name.replace(' ', '-')}", secrets.token_hex(8)
    broker.ctl("add_user", user, password)
    said = role, namespace, user, service
    broker.ctl("set_permissions", "-p", vhost, user, *patterns(*said))
    with ThreadPoolExecutor(2) as pool:  # each command starts an Erlang of its own
        list(
            pool.map(
                lambda topic: broker.ctl("set_topic_permissions", "-p", vhost, user, *topic), topic_patterns(*said)
            )
        )
    at = f"{quote(user)}:{password}@{parts.hostname}:{parts.port or 5672}"
    return urlunsplit(("amqp", at, parts.path, "", ""))


@dataclass(frozen=True)
class Place:
    """A namespace that an administrator has set up, and users that may use it."""

    broker: Broker
    topology: Topology
    users: dict[str, str]

    @property
    def exchange(self) -> str:
        return f"{self.topology.namespace}.replies"

    def queue(self, service: str) -> str:
        return self.topology.request_queue(service, KINDS[service]).name

    def client(self, user: str = "client") -> Client:
        return Client(self.users[user], namespace=self.topology.namespace, reply_exchange=self.exchange)

    def worker(self, user: str = "worker", service: str | None = None) -> Worker:
        made = served(service or SERVED[user])
        return Worker(made, url=self.users[user], namespace=self.topology.namespace, reply_exchange=self.exchange)

    async def declare(self) -> None:
        queues = [self.topology.request_queue(name, kind) for name, kind in KINDS.items()]
        async with self._admin() as admin:
            await admin.declare(self.topology.exchanges(self.exchange), queues)

    async def delete(self) -> None:
        exchanges = [it.name for it in self.topology.exchanges(self.exchange)]
        async with self._admin() as admin:
            await admin.delete([self.queue(name) for name in KINDS], exchanges)

    def _admin(self):  # type: ignore[no-untyped-def]
        url = parse(self.broker.url)
        return open_admin(url, ConnectionOptions(), *url.hosts[0])


def served(name: str) -> Service:
    service = Service(name, queue_type=KINDS[name])

    @service.method
    async def add(x: int, y: int) -> int:
        return x + y

    @service.method
    async def wait() -> None:
        await asyncio.sleep(60)

    return service


async def publish(channel: AbstractChannel, exchange: str, key: str) -> None:
    at = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
    await at.publish(aio_pika.Message(b"{}", correlation_id="forged"), key)


async def consume(channel: AbstractChannel, queue: str) -> None:
    async def never(_: object) -> None: ...

    await (await channel.get_queue(queue, ensure=False)).consume(never)


async def bind(channel: AbstractChannel, queue: str, exchange: str, key: str) -> None:
    await (await channel.get_queue(queue, ensure=False)).bind(exchange, key)


async def _get(channel: AbstractChannel, queue: str) -> None:
    await (await channel.get_queue(queue, ensure=False)).get()


async def _purge(channel: AbstractChannel, queue: str) -> None:
    await (await channel.get_queue(queue, ensure=False)).purge()


async def reply_queue(channel: AbstractChannel, place: Place) -> AbstractQueue:
    """A reply queue of the client's user, as rpcq's clients have one."""
    user = urlsplit(place.users["client"]).username
    return await channel.declare_queue(
        f"{place.topology.namespace}.reply.{user}.{secrets.token_hex(4)}", exclusive=True
    )


async def _listen(channel: AbstractChannel, place: Place) -> None:
    queue = await reply_queue(channel, place)
    await queue.bind(place.topology.requests.name, "things")


async def _listen_to_notices(channel: AbstractChannel, place: Place, key: str) -> None:
    queue = await reply_queue(channel, place)
    await queue.bind(place.topology.notices.name, key)


async def _listen_to_replies(channel: AbstractChannel, place: Place, key: str) -> None:
    queue = await reply_queue(channel, place)
    await queue.bind(place.exchange, key)


async def _lead_elsewhere(channel: AbstractChannel, source: str, key: str, destination: str) -> None:
    """Bind an exchange to an exchange."""
    lead = await channel.get_exchange(destination, ensure=False)
    await lead.bind(source, key)


async def _listen_as_worker(channel: AbstractChannel, exchange: str, key: str) -> None:
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange, key)


Deed = Callable[[AbstractChannel, Any, str], Awaitable[object]]
"""What somebody tries: on a channel, in a place, with a name: of a victim's reply queue, or of the user."""

ANYBODY: dict[str, Deed] = {
    "read another service's requests": lambda channel, place, _: consume(channel, place.queue("others")),
    "read a client's replies": lambda channel, _, victim: consume(channel, victim),
    "look at a client's replies": lambda channel, _, victim: _get(channel, victim),
    "forge a reply through the default exchange": lambda channel, _, victim: publish(channel, "", victim),
    "put a request into a queue past the exchange": lambda channel, place, _: publish(
        channel, "", place.queue("others")
    ),
    "declare a request queue": lambda channel, place, _: channel.declare_queue(f"{place.queue('things')}-mine"),
    "declare a request queue anew": lambda channel, place, _: channel.declare_queue(
        place.queue("others"), durable=True
    ),
    "declare an exchange": lambda channel, place, _: channel.declare_exchange(f"{place.topology.namespace}.mine"),
    "delete a request queue": lambda channel, place, _: channel.queue_delete(place.queue("others")),
    "delete an exchange": lambda channel, place, _: channel.exchange_delete(place.topology.requests.name),
    "purge a request queue": lambda channel, place, _: _purge(channel, place.queue("others")),
    "bind a request queue elsewhere": lambda channel, place, _: bind(
        channel, place.queue("others"), place.topology.requests.name, "mine"
    ),
}
CLIENT: dict[str, Deed] = ANYBODY | {
    "read a service's requests": lambda channel, place, _: consume(channel, place.queue("things")),
    "forge a reply through the reply exchange": lambda channel, place, victim: publish(channel, place.exchange, victim),
    "listen in on requests": lambda channel, place, _: _listen(channel, place),
    "listen in on what a service gave up": lambda channel, place, _: _listen_to_notices(channel, place, "things"),
    "listen in on what a quorum queue gave up": lambda channel, place, _: _listen_to_notices(
        channel, place, place.queue("others")
    ),
    "listen in on all notices": lambda channel, place, _: _listen_to_notices(channel, place, "#"),
    "listen in on notices of three words": lambda channel, place, _: _listen_to_notices(channel, place, "*.*.*"),
    "listen in on another client's notices": _listen_to_notices,
    "listen in on another client's replies": _listen_to_replies,
    "listen in on all replies": lambda channel, place, _: _listen_to_replies(channel, place, "#"),
    "lead another client's replies to an exchange": lambda channel, place, victim: _lead_elsewhere(
        channel, place.exchange, victim, place.topology.requests.name
    ),
    "lead requests to an exchange": lambda channel, place, _: _lead_elsewhere(
        channel, place.topology.requests.name, "things", place.topology.control.name
    ),
    "declare a reply queue of another user": lambda channel, place, _: channel.declare_queue(
        f"{place.topology.namespace}.reply.mine", exclusive=True
    ),
    "forge a notice": lambda channel, place, victim: publish(channel, place.topology.notices.name, victim),
}
WORKER: dict[str, Deed] = ANYBODY | {
    "call a service": lambda channel, place, _: publish(channel, place.topology.requests.name, "others"),
    "cancel calls": lambda channel, place, _: publish(channel, place.topology.control.name, "others"),
    "declare a reply queue": lambda channel, place, _: channel.declare_queue(f"{place.topology.namespace}.reply.mine"),
    "listen in on replies": lambda channel, place, victim: _listen_as_worker(channel, place.exchange, victim),
    "listen in on notices": lambda channel, place, victim: _listen_as_worker(
        channel, place.topology.notices.name, victim
    ),
    "listen in on requests": lambda channel, place, _: _listen_as_worker(
        channel, place.topology.requests.name, "others"
    ),
    "hear what is asked of another service": lambda channel, place, _: _listen_as_worker(
        channel, place.topology.control.name, "others"
    ),
    "hear all that is asked": lambda channel, place, _: _listen_as_worker(channel, place.topology.control.name, "#"),
    "hear what is asked of services of one word": lambda channel, place, _: _listen_as_worker(
        channel, place.topology.control.name, "*"
    ),
}
