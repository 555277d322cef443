"""Broker users that may do what clients and workers need, and nothing else; with the patterns of `docs/security.md`."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlsplit, urlunsplit

import aio_pika
import aiormq.exceptions
import pytest
from aio_pika.abc import AbstractChannel

from broker import Broker
from rpcq import CallTimeout, Client, Service, Worker
from rpcq.errors import AccessRefused
from rpcq.settings import ConnectionOptions
from rpcq.transport.opening import open_admin
from rpcq.transport.topology import Names, Queue
from rpcq.url import parse

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"
SERVED = {"worker": "things", "other worker": "others"}
KINDS: dict[str, Literal["classic", "quorum"]] = {"things": "classic", "others": "quorum"}


def patterns(role: str, namespace: str, service: str) -> list[str]:
    """The regular expressions for configure, write and read, as the page has them, for names of this test."""
    form = rf"^rabbitmqctl set_permissions -p VHOST {role} \\\n((?: +'.*\n)+)"
    command = re.search(form, SECURITY.read_text(), re.MULTILINE)
    assert command is not None
    found = re.findall(r"'(.*)'", command[1])
    assert len(found) == 3
    return [it.replace("rpcq\\.", f"{namespace}\\.").replace("calculator", service) for it in found]


def topic_patterns(namespace: str) -> list[str]:
    """The exchange that a client's topic permissions are for, and their regular expressions for write and read."""
    form = r"^rabbitmqctl set_topic_permissions -p VHOST client (\S+) '(.*)' '(.*)'$"
    command = re.search(form, SECURITY.read_text(), re.MULTILINE)
    assert command is not None
    exchange, *found = command.groups()
    return [exchange.replace("rpcq.", f"{namespace}."), *(it.replace("rpcq\\.", f"{namespace}\\.") for it in found)]


@dataclass(frozen=True)
class Place:
    """A namespace that an administrator has set up, and users that may use it."""

    broker: Broker
    names: Names
    users: dict[str, str]

    @property
    def exchange(self) -> str:
        return f"{self.names.namespace}.replies"

    def queue(self, service: str) -> str:
        return self.names.request_queue(service, KINDS[service]).name

    def client(self, user: str = "client") -> Client:
        return Client(self.users[user], namespace=self.names.namespace, reply_exchange=self.exchange)

    def worker(self, user: str = "worker", service: str | None = None) -> Worker:
        made = served(service or SERVED[user])
        return Worker(made, url=self.users[user], namespace=self.names.namespace, reply_exchange=self.exchange)

    async def declare(self) -> None:
        queues = [self.names.request_queue(name, kind) for name, kind in KINDS.items()]
        async with self._admin() as admin:
            await admin.declare(self.names.exchanges(self.exchange), queues)

    async def delete(self) -> None:
        exchanges = [it.name for it in self.names.exchanges(self.exchange)]
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


@pytest.fixture(scope="module")
def place(broker: Broker) -> Iterator[Place]:
    if not broker.can_ctl:
        pytest.skip("no users can be made: RPCQ_TEST_URL names a broker whose rabbitmqctl is not at hand")
    namespace = f"t{secrets.token_hex(8)}"
    parts = urlsplit(broker.url)
    vhost = parts.path.removeprefix("/") or "/"
    users: dict[str, str] = {}
    found = Place(broker, Names(namespace), users)
    asyncio.run(found.declare())  # RabbitMQ 4.3 knows topic permissions only for an exchange that is there
    for role in ("client", "other client", *SERVED):
        user, password = f"{namespace}-{role.replace(' ', '-')}", secrets.token_hex(8)
        broker.ctl("add_user", user, password)
        three = patterns(role.split()[-1], namespace, SERVED.get(role, ""))
        broker.ctl("set_permissions", "-p", vhost, user, *three)
        if "client" in role:
            broker.ctl("set_topic_permissions", "-p", vhost, user, *topic_patterns(namespace))
        at = f"{quote(user)}:{password}@{parts.hostname}:{parts.port or 5672}"
        users[role] = urlunsplit(("amqp", at, parts.path, "", ""))
    yield found
    asyncio.run(found.delete())
    for url in users.values():
        broker.ctl("delete_user", urlsplit(url).username or "")


# What works.


@pytest.mark.parametrize("user", SERVED)
async def test_calls_pings_and_cancellations_work_with_the_rights_of_the_page(place: Place, user: str) -> None:
    service = SERVED[user]
    async with place.worker(user) as worker, place.client() as client, place.client("other client") as other:
        await client.wait_for_service(service, timeout=10)
        sums = await asyncio.gather(
            *(it.call(f"{service}.add", x=i, y=1) for i in range(100) for it in (client, other))
        )
        assert sums == [i + 1 for i in range(100) for _ in range(2)]
        assert [it.host for it in [found async for found in client.workers(service, wait=0.5)]]
        call = asyncio.create_task(client.call(f"{service}.wait"))
        async with asyncio.timeout(10):
            while not worker.in_flight:  # noqa: ASYNC110 - what is waited for sets no event
                await asyncio.sleep(0.01)
            call.cancel()
            while worker.in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("service", KINDS)
async def test_the_notice_of_an_expiry_arrives_with_the_rights_of_the_page(place: Place, service: str) -> None:
    async with place.client() as client:
        # The broker tells a tenth of the timeout before the client's own clock would: time enough on a busy machine.
        with pytest.raises(CallTimeout, match="expired in the queue"):
            await client.with_options(timeout=3).call(f"{service}.add", x=1, y=2)


async def test_both_sides_come_back_with_the_rights_of_the_page(place: Place) -> None:
    async with place.worker() as worker, place.client() as client:
        for end in (worker, client):
            for session in (end._transport._consuming, end._transport._publishing):  # type: ignore[attr-defined]
                session._link.protocol.abort()
        await client.wait_for_service("things", timeout=20)
        assert await client.call("things.add", x=1, y=2) == 3


# What is refused.


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


async def _listen(channel: AbstractChannel, place: Place) -> None:
    queue = await channel.declare_queue(f"{place.names.namespace}.reply.{secrets.token_hex(4)}", exclusive=True)
    await queue.bind(place.names.requests.name, "things")


async def _listen_to_notices(channel: AbstractChannel, place: Place, key: str) -> None:
    queue = await channel.declare_queue(f"{place.names.namespace}.reply.{secrets.token_hex(4)}", exclusive=True)
    await queue.bind(place.names.notices.name, key)


async def _listen_to_replies(channel: AbstractChannel, place: Place, victim: str) -> None:
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(place.exchange, victim)


Deed = Callable[[AbstractChannel, Place, str], Awaitable[object]]

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
    "declare an exchange": lambda channel, place, _: channel.declare_exchange(f"{place.names.namespace}.mine"),
    "delete a request queue": lambda channel, place, _: channel.queue_delete(place.queue("others")),
    "delete an exchange": lambda channel, place, _: channel.exchange_delete(place.names.requests.name),
    "purge a request queue": lambda channel, place, _: _purge(channel, place.queue("others")),
    "bind a request queue elsewhere": lambda channel, place, _: bind(
        channel, place.queue("others"), place.names.requests.name, "mine"
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
    "forge a notice": lambda channel, place, victim: publish(channel, place.names.notices.name, victim),
}
WORKER: dict[str, Deed] = ANYBODY | {
    "call a service": lambda channel, place, _: publish(channel, place.names.requests.name, "others"),
    "cancel calls": lambda channel, place, _: publish(channel, place.names.control.name, "others"),
    "declare a reply queue": lambda channel, place, _: channel.declare_queue(f"{place.names.namespace}.reply.mine"),
    "listen in on replies": _listen_to_replies,
}


@pytest.mark.parametrize(
    ("user", "deed"),
    [pytest.param("client", it, id=f"client: {it}") for it in CLIENT]
    + [pytest.param("worker", it, id=f"worker: {it}") for it in WORKER],
)
async def test_what_a_user_must_not_do_is_refused(place: Place, user: str, deed: str) -> None:
    do = (CLIENT if user == "client" else WORKER)[deed]
    async with place.client("other client") as victim:
        assert victim._sender.encoder is not None
        replies = victim._sender.encoder.reply_to.decode()
        async with await aio_pika.connect(place.users[user]) as connection:
            channel = await connection.channel()
            refused = aiormq.exceptions.ChannelAccessRefused, aiormq.exceptions.ChannelLockedResource
            with pytest.raises(refused):
                await do(channel, place, replies)


@pytest.mark.parametrize("service", KINDS)
async def test_a_client_cannot_have_the_broker_write_into_other_queues(place: Place, service: str) -> None:
    """A request with a CC and an expiry is dead-lettered under its keys: once into whatever queue was called so."""
    bank, stranger = f"{place.names.namespace}.bank", Names(f"{place.names.namespace}-2")
    url = parse(place.broker.url)
    async with open_admin(url, ConnectionOptions(), *url.hosts[0]) as admin:
        other = stranger.request_queue("things", "classic")
        await admin.declare(stranger.exchanges(), [Queue(bank, durable=True), other])
        try:
            async with await aio_pika.connect(place.users["client"]) as connection:
                requests = await (await connection.channel()).get_exchange(place.names.requests.name, ensure=False)
                copies = [bank, other.name, "things", "others", place.queue("others")]
                for _ in range(300):
                    await requests.publish(aio_pika.Message(b"{}", expiration=0, headers={"CC": copies}), service)
            await asyncio.sleep(1)
            for name in (bank, other.name):
                state = await admin.queue(name)
                assert state is not None
                assert state.messages == 0
        finally:
            await admin.delete([bank, other.name], [it.name for it in stranger.exchanges()])


async def test_a_worker_of_another_service_is_refused_its_queue_by_name(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(AccessRefused, match=re.escape(place.queue("others"))):
        await place.worker("worker", "others").start()


async def test_a_worker_whose_queue_nobody_declared_says_how_it_is_done(place: Place) -> None:
    missing = Worker(
        _new_service(), url=place.users["worker"], namespace=place.names.namespace, reply_exchange=place.exchange
    )
    with pytest.raises(AccessRefused, match="rpcq setup"):
        await missing.start()


def _new_service() -> Service:
    service = Service("new")

    @service.method
    async def work() -> None: ...

    return service
