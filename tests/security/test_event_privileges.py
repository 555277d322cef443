"""Broker users that may publish events, or run subscriptions, and nothing else, as `docs/security.md` has them."""

import asyncio
import secrets
from collections.abc import Iterator
from urllib.parse import urlsplit

import aio_pika
import aiormq.exceptions
import pytest
from aio_pika.abc import AbstractChannel

from rpcq import AnyEvent, Client, Context, Event, GiveUp, Retry, SendError, Service, Worker
from rpcq.events import queues
from rpcq.options import ConnectionOptions
from rpcq.transport.opening import open_admin
from rpcq.url import parse
from rpcq.wire.events import EventTopology
from rpcq.wire.topology import Topology
from security.realm import Deed, add_user, bind, consume, publish
from support.broker import Broker
from support.letters import letters

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

DELAYED = "0." * 23 + "1."


class Created(Event, name="order.privileges.created"):
    number: int


class Changed(Event, name="price.privileges.changed"):
    number: int


class Secret(Event, name="salary.privileges.changed"):
    pass


def calculator(ran: list[object]) -> Service:
    service = Service("calculator")

    @service.on(Created, retry=Retry(max_attempts=2, initial_backoff=0.01, max_backoff=0.01))
    async def add(event: Created, context: Context) -> None:
        ran.append((event.number, context.attempt))
        if event.number == 1:
            raise ValueError("again")
        if event.number == 2:
            raise GiveUp("no")

    @service.on("price.#", each_instance=True)
    async def cache(event: AnyEvent) -> None:
        ran.append(event.name)

    return service


def others() -> Service:
    service = Service("others")

    @service.on("salary.#")
    async def count(event: AnyEvent) -> None: ...

    return service


class Home:
    """A namespace that an administrator has set up, and users that may use it."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.namespace = f"t{secrets.token_hex(8)}"
        self.names = EventTopology(self.namespace)
        self.users: dict[str, str] = {}
        self.exchange = f"{self.namespace}.replies"

    def client(self) -> Client:
        return Client(self.users["publisher"], namespace=self.namespace, reply_exchange=self.exchange)

    def worker(self, service: Service) -> Worker:
        url = self.users["subscriber"]
        return Worker(service, url=url, namespace=self.namespace, reply_exchange=self.exchange, grace=1)

    async def admin(self, what: str) -> None:
        served = [calculator([]), others()]
        exchanges = Topology(self.namespace).exchanges(self.exchange) + queues.exchanges(self.names, served)
        own = queues.shared(self.names, served) + [it for each in served for it in queues.waiting(self.names, each)]
        url = parse(self.broker.url)
        async with open_admin(url, ConnectionOptions(), *url.hosts[0]) as admin:
            if what == "declare":
                await admin.declare(exchanges, own)
            else:
                await admin.delete([it.name for it in own], [it.name for it in exchanges])


@pytest.fixture(scope="module")
def home(broker: Broker) -> Iterator[Home]:
    if not broker.can_ctl:
        pytest.skip("no users can be made: RPCQ_TEST_URL names a broker whose rabbitmqctl is not at hand")
    found = Home(broker)
    asyncio.run(found.admin("declare"))  # RabbitMQ 4.3 knows topic permissions only for an exchange that is there
    for role in ("publisher", "subscriber"):
        found.users[role] = add_user(broker, found.namespace, role, role, "calculator")
    yield found
    asyncio.run(found.admin("delete"))
    for url in found.users.values():
        broker.ctl("delete_user", urlsplit(url).username or "")


async def test_events_are_published_done_retried_and_buried_with_the_rights_of_the_page(home: Home) -> None:
    ran: list[object] = []
    async with home.worker(calculator(ran)), home.client() as client, asyncio.timeout(60):
        for number in range(3):
            assert (await client.publish(Created(number=number))).heard
        async with letters(home.broker.url, home.names.jobs.dead_queue("calculator")) as dead:
            found = await dead.wait_for(2)
            assert {it.headers["rpcq-dead-reason"] for it in found} == {"attempts", "gave_up"}
        async with Client(home.broker.url, namespace=home.namespace, reply_exchange=home.exchange) as anybody:
            await anybody.publish(Changed(number=1))
            while "price.privileges.changed" not in ran:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.02)
    assert sorted(it for it in ran if isinstance(it, tuple)) == [(0, 1), (1, 1), (1, 2), (2, 1)]


async def test_an_event_of_another_name_is_not_published(home: Home) -> None:
    async with home.client() as client:
        with pytest.raises(SendError):
            await client.with_options(timeout=1).publish(Secret())


async def _tap(channel: AbstractChannel, home: Home, user: str, key: str) -> None:
    """Bind a queue of one's own to the events."""
    name = f"{home.namespace}.reply.{user}.{secrets.token_hex(4)}" if user.endswith("publisher") else None
    queue = await channel.declare_queue(name, exclusive=True)
    await queue.bind(home.names.events.name, key)


BOTH: dict[str, Deed] = {
    "publish an event of another name": lambda channel, home, _: publish(
        channel, home.names.events.name, "salary.changed"
    ),
    "read another service's events": lambda channel, home, _: consume(
        channel, home.names.queue("others", "count", ()).name
    ),
    "read another service's suspects": lambda channel, home, _: consume(
        channel, home.names.suspects("others", "count").name
    ),
    "read another service's dead letters": lambda channel, home, _: consume(
        channel, home.names.jobs.dead_queue("others").name
    ),
    "declare the queue of a subscription": lambda channel, home, _: channel.declare_queue(
        home.names.queue("calculator", "mine", ()).name, durable=True
    ),
    "delete the queue of a subscription": lambda channel, home, _: channel.queue_delete(
        home.names.queue("calculator", "add", ()).name
    ),
    "bind the queue of a subscription": lambda channel, home, _: bind(
        channel, home.names.queue("calculator", "add", ()).name, home.names.events.name, "salary.#"
    ),
    "listen in on events of another name": lambda channel, home, user: _tap(channel, home, user, "salary.#"),
    "listen in on all events": lambda channel, home, user: _tap(channel, home, user, "#"),
    "publish to what nobody hears": lambda channel, home, _: publish(channel, home.names.unheard.name, "order.x"),
    "put an event into another subscription": lambda channel, home, _: publish(
        channel, home.names.jobs.due.name, f"{DELAYED}sub.others:count"
    ),
    "write a dead letter of another service": lambda channel, home, _: publish(
        channel, home.names.jobs.dead.name, "sub.others:count"
    ),
    "delay an event of another service": lambda channel, home, _: publish(
        channel, home.names.jobs.ladder.name(0), f"{DELAYED}sub.others:count"
    ),
}
PUBLISHER: dict[str, Deed] = BOTH | {
    "read events": lambda channel, home, _: consume(channel, home.names.queue("calculator", "add", ()).name),
    "listen in on events of its own names": lambda channel, home, user: _tap(channel, home, user, "order.#"),
    "put an event into one subscription": lambda channel, home, _: publish(
        channel, home.names.jobs.due.name, f"{DELAYED}sub.calculator:add"
    ),
}
SUBSCRIBER: dict[str, Deed] = BOTH | {
    "publish an event": lambda channel, home, _: publish(channel, home.names.events.name, "price.changed"),
    "put a job into its service's queue": lambda channel, home, _: publish(
        channel, home.names.jobs.due.name, f"{DELAYED}job.calculator"
    ),
}
DEEDS = {"publisher": PUBLISHER, "subscriber": SUBSCRIBER}


@pytest.mark.parametrize(
    ("user", "deed"), [pytest.param(user, it, id=f"{user}: {it}") for user, deeds in DEEDS.items() for it in deeds]
)
async def test_what_a_user_must_not_do_is_refused(home: Home, user: str, deed: str) -> None:
    async with await aio_pika.connect(home.users[user]) as connection:
        channel = await connection.channel()
        with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
            await DEEDS[user][deed](channel, home, urlsplit(home.users[user]).username or "")
