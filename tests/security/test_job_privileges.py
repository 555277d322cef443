"""Broker users that may send, do or replay jobs, and nothing else; with the patterns of `docs/security.md`."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import aiormq.exceptions
import pytest
from aio_pika.abc import AbstractChannel

from rpcq import Client, Context, Every, GiveUp, Retry, Service, Worker
from rpcq.errors import AccessRefused
from rpcq.options import ConnectionOptions
from rpcq.transport.base import Message, Published
from rpcq.transport.opening import open_admin
from rpcq.url import parse
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.jobs import JobMessage, encode_job
from rpcq.wire.topology import Exchange, Queue, Topology
from security.realm import Deed, add_user, bind, consume, publish
from support.broker import Broker
from support.letters import letters

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
DELAYED = "0." * 23 + "1."
"""The bits of a delay of 250 ms."""


@dataclass
class Home:
    """A namespace that an administrator has set up for jobs, and users that may use it."""

    broker: Broker
    namespace: str
    users: dict[str, str] = field(default_factory=dict)

    @property
    def jobs(self) -> JobTopology:
        return JobTopology(self.namespace)

    @property
    def exchange(self) -> str:
        return f"{self.namespace}.replies"

    def client(self, user: str = "sender") -> Client:
        return Client(self.users[user], namespace=self.namespace, reply_exchange=self.exchange)

    def worker(self, service: Service, user: str = "jobworker") -> Worker:
        url = self.users[user]
        return Worker(service, url=url, namespace=self.namespace, reply_exchange=self.exchange, grace=1)

    def topology(self) -> tuple[list[Exchange], list[Queue]]:
        jobs = self.jobs
        queues = [*jobs.shared_queues(), Topology(self.namespace).request_queue("calculator", "classic")]
        for name in ("calculator", "others"):
            queues += [*jobs.queues(name, lanes=True, ordered=True), jobs.tickets(name)]
        return Topology(self.namespace).exchanges(self.exchange) + jobs.exchanges(), queues

    async def declare(self) -> None:
        await self.admin("declare", *self.topology())

    async def delete(self) -> None:
        exchanges, queues = self.topology()
        await self.admin("delete", [queue.name for queue in queues], [exchange.name for exchange in exchanges])

    async def admin(self, what: str, *arguments: object) -> Any:
        url = parse(self.broker.url)
        async with open_admin(url, ConnectionOptions(), *url.hosts[0]) as admin:
            return await getattr(admin, what)(*arguments)

    async def dlq(self, *arguments: str, user: str = "replayer") -> tuple[int, str]:
        """Run `rpcq dlq`; returns its exit code and what it printed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rpcq", "dlq", *arguments, "--namespace", self.namespace),
            env={**os.environ, "RPCQ_URL": self.users[user], "PYTHONPATH": str(ROOT), "COLUMNS": "500"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        return process.returncode or 0, said.decode()


@pytest.fixture(scope="module")
def home(broker: Broker) -> Iterator[Home]:
    if not broker.can_ctl:
        pytest.skip("no users can be made: RPCQ_TEST_URL names a broker whose rabbitmqctl is not at hand")
    found = Home(broker, f"t{secrets.token_hex(8)}")
    asyncio.run(found.declare())  # RabbitMQ 4.3 knows topic permissions only for an exchange that is there
    for role in ("sender", "latersender", "jobworker", "replayer"):
        found.users[role] = add_user(broker, found.namespace, role, role, "calculator")
    yield found
    asyncio.run(found.delete())
    for url in found.users.values():
        broker.ctl("delete_user", urlsplit(url).username or "")


def calculator(ran: list[str], *, lanes: bool = False) -> Service:
    service = Service("calculator", lanes=lanes)

    @service.job(retry=Retry(initial_backoff=0.01, max_backoff=0.01))
    async def add(name: str, context: Context) -> None:
        ran.append(name)
        if name == "again" and context.attempt == 1:
            raise ValueError("the first time")
        if name == "dead":
            raise GiveUp("hopeless")

    @service.method
    async def total() -> int:
        return len(ran)

    return service


async def until(ran: list[str], *expected: str) -> None:
    """Wait until all of these ran; what a lost session did not acknowledge may run again."""
    async with asyncio.timeout(30):
        while not Counter(expected) <= Counter(ran):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.02)


async def dead(home: Home, count: int) -> None:
    """Wait until there are so many dead letters."""
    async with letters(home.broker.url, home.jobs.dead_queue("calculator")) as found, asyncio.timeout(30):
        await found.wait_for(count)


# What works.


async def test_jobs_are_sent_done_retried_buried_and_replayed_with_the_rights_of_the_page(home: Home) -> None:
    ran: list[str] = []
    async with home.worker(calculator(ran)), home.client() as client:
        for name in ("once", "again", "dead"):
            await client.send("calculator.add", name=name)
        await until(ran, "once", "again", "again", "dead")
        await dead(home, 1)
        code, said = await home.dlq("list", "calculator", "--json")
        assert code == 0, said
        assert '"reason":"gave_up"' in said
        code, said = await home.dlq("replay", "calculator", "--yes")
        assert (code, said) == (0, "replayed 1 dead letter\n")
        await until(ran, "once", "again", "again", "dead", "dead")
        await dead(home, 1)
    code, said = await home.dlq("purge", "calculator", "--yes")
    assert (code, said) == (0, "deleted 1 dead letter\n")
    code, said = await home.dlq("list", "--lost")
    assert code == 0, said


async def test_jobs_are_sent_for_later_with_the_rights_of_the_page(home: Home) -> None:
    ran: list[str] = []
    async with home.worker(calculator(ran)), home.client("latersender") as client:
        await client.with_options(delay=0.5).send("calculator.add", name="later")
        await client.send("calculator.add", name="now")
        await until(ran, "later", "now")


async def test_jobs_of_all_lanes_are_sent_done_retried_and_delayed_with_the_rights_of_the_page(home: Home) -> None:
    ran: list[str] = []
    service = calculator(ran, lanes=True)
    async with home.worker(service), home.client() as client, home.client("latersender") as later:
        for priority in ("high", "low"):
            await client.with_options(priority=priority).send("calculator.add", name="again")
            await later.with_options(priority=priority, delay=0.25).send("calculator.add", name="later")
        await until(ran, *["again"] * 4, *["later"] * 2)


async def test_jobs_are_sent_at_the_ticks_of_a_schedule_with_the_rights_of_the_page(home: Home) -> None:
    service, ticks = Service("calculator"), asyncio.Event()

    @service.job(schedule=Every(0.5))
    async def tick() -> None:
        ticks.set()

    async with home.worker(service), asyncio.timeout(60):
        await ticks.wait()


async def test_both_sides_come_back_with_the_rights_of_the_page(home: Home) -> None:
    ran: list[str] = []
    async with home.worker(calculator(ran)) as worker, home.client() as client:
        await client.send("calculator.add", name="before")
        await until(ran, "before")
        for end in (worker, client):
            for session in (end._transport._consuming, end._transport._publishing):  # type: ignore[attr-defined]
                session._link.protocol.abort()
        await client.send("calculator.add", name="again")
        await until(ran, "before", "again", "again")


async def test_suspects_and_what_is_given_back_reach_their_service_with_the_rights_of_the_page(home: Home) -> None:
    ran: list[str] = []
    async with home.client() as client:
        await client.send("calculator.add", name="suspect")
    async with await aio_pika.connect(home.broker.url) as connection:
        for _ in range(2):  # its worker is lost twice
            channel = await connection.channel()
            queue = await channel.get_queue(home.jobs.queue("calculator").name, ensure=False)
            while await queue.get(fail=False) is None:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.02)
            await channel.close()
    async with home.worker(calculator(ran)) as worker:
        await until(ran, "suspect")
        # What runs at most once, and did not begin, is published again without a delay.
        exchange, key = home.jobs.ladder.route(0, home.jobs.address("calculator"))
        message = JobMessage(id="given-back", key="given-back", name="add", body=b'{"name": "given back"}')
        published: asyncio.Future[Published] = asyncio.get_running_loop().create_future()
        properties = encode_job(message, 0)
        worker._transport.publish(Message(exchange, key, b"", properties, message.body, published.set_result))
        assert await published is Published.CONFIRMED
        await until(ran, "suspect", "given back")


async def test_what_setup_did_not_declare_is_named(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    jobs = home.jobs
    try:
        await home.admin("delete", [], [jobs.jobs.name])
        async with home.client() as client:
            with pytest.raises(AccessRefused, match=r"jobs' does not exist: a user who may .* must run 'rpcq setup'"):
                await client.send("calculator.add", name="x")
        await home.declare()
        await home.admin("delete", [jobs.suspects("calculator").name])
        with pytest.raises(AccessRefused, match=r"suspects' .*: a user who may declare it must run 'rpcq setup'"):
            await home.worker(calculator([])).start()
        await home.declare()
        await home.admin("delete", [jobs.ladder.name(5)])
        with caplog.at_level(logging.ERROR):
            async with home.worker(calculator([])):
                pass
        (record,) = [it for it in caplog.records if "queue does not exist" in it.getMessage()]
        assert f"{jobs.ladder.name(5)}" in record.getMessage()
        assert "rpcq setup" in record.getMessage()
    finally:
        await home.declare()


# What is refused.


async def _get(channel: AbstractChannel, queue: str) -> None:
    await (await channel.get_queue(queue, ensure=False)).get()


async def _lead(channel: AbstractChannel, source: str, key: str, destination: str) -> None:
    """Bind an exchange to an exchange."""
    await (await channel.get_exchange(destination, ensure=False)).bind(source, key)


async def _tap(channel: AbstractChannel, exchange: str, key: str) -> None:
    """Bind a queue of one's own to an exchange."""
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange, key)


async def _tap_as(channel: AbstractChannel, home: Home, user: str, exchange: str, key: str) -> None:
    """The same with a queue that a user who sends may declare."""
    queue = await channel.declare_queue(f"{home.namespace}.reply.{user}.{secrets.token_hex(4)}", exclusive=True)
    await queue.bind(exchange, key)


ANYBODY: dict[str, Deed] = {
    "read another service's jobs": lambda channel, home, _: consume(channel, home.jobs.queue("others").name),
    "look at another service's jobs": lambda channel, home, _: _get(channel, home.jobs.queue("others").name),
    "read another service's jobs of high priority": lambda channel, home, _: consume(
        channel, home.jobs.queue("others", "high").name
    ),
    "read another service's suspects": lambda channel, home, _: consume(channel, home.jobs.suspects("others").name),
    "read another service's dead letters": lambda channel, home, _: consume(
        channel, home.jobs.dead_queue("others").name
    ),
    "read what is delayed": lambda channel, home, _: consume(channel, home.jobs.ladder.name(3)),
    "put a job into a queue past the exchange": lambda channel, home, _: publish(
        channel, "", home.jobs.queue("calculator").name
    ),
    "declare a queue of jobs": lambda channel, home, _: channel.declare_queue(f"{home.jobs.queue('others').name}-mine"),
    "declare a queue of jobs anew": lambda channel, home, _: channel.declare_queue(
        home.jobs.queue("calculator").name, durable=True
    ),
    "declare a queue of dead letters": lambda channel, home, _: channel.declare_queue(
        home.jobs.dead_queue("mine").name, durable=True
    ),
    "declare an exchange": lambda channel, home, _: channel.declare_exchange(f"{home.namespace}.mine"),
    "delete a queue of jobs": lambda channel, home, _: channel.queue_delete(home.jobs.queue("calculator").name),
    "delete the queue of what is lost": lambda channel, home, _: channel.queue_delete(home.jobs.lost.name),
    "delete an exchange": lambda channel, home, _: channel.exchange_delete(home.jobs.jobs.name),
    "publish to what is lost": lambda channel, home, _: publish(channel, home.jobs.lost.name, ""),
    "bind a queue of jobs elsewhere": lambda channel, home, _: bind(
        channel, home.jobs.queue("calculator").name, home.jobs.jobs.name, "mine"
    ),
    "lead jobs to another exchange": lambda channel, home, _: _lead(
        channel, home.jobs.jobs.name, "others", home.jobs.due.name
    ),
    "lead delayed jobs to another exchange": lambda channel, home, _: _lead(
        channel, home.jobs.due.name, "#", home.jobs.dead.name
    ),
}
SENDS: dict[str, Deed] = ANYBODY | {
    "read jobs": lambda channel, home, _: consume(channel, home.jobs.queue("calculator").name),
    "read dead letters": lambda channel, home, _: consume(channel, home.jobs.dead_queue("calculator").name),
    "read what is lost": lambda channel, home, _: consume(channel, home.jobs.lost.name),
    "listen in on jobs": lambda channel, home, user: _tap_as(channel, home, user, home.jobs.jobs.name, "calculator"),
    "listen in on what is delayed": lambda channel, home, user: _tap_as(
        channel, home, user, home.jobs.ladder.name(0), "#"
    ),
    "publish to what is due": lambda channel, home, _: publish(channel, home.jobs.due.name, f"{DELAYED}job.calculator"),
    "forge a dead letter": lambda channel, home, _: publish(channel, home.jobs.dead.name, "job.calculator"),
    "call a service": lambda channel, home, _: publish(channel, Topology(home.namespace).requests.name, "calculator"),
}
SENDER: dict[str, Deed] = SENDS | {
    "delay a job": lambda channel, home, _: publish(channel, home.jobs.ladder.name(0), f"{DELAYED}job.calculator"),
}
LATER_SENDER: dict[str, Deed] = SENDS | {
    "delay what is no job": lambda channel, home, _: publish(
        channel, home.jobs.ladder.name(0), f"{DELAYED}calculator:suspects"
    ),
}
WORKER: dict[str, Deed] = ANYBODY | {
    "send a job": lambda channel, home, _: publish(channel, home.jobs.jobs.name, "calculator"),
    "read dead letters": lambda channel, home, _: consume(channel, home.jobs.dead_queue("calculator").name),
    "read what is lost": lambda channel, home, _: consume(channel, home.jobs.lost.name),
    "put a job into another service's queue": lambda channel, home, _: publish(
        channel, home.jobs.due.name, f"{DELAYED}job.others"
    ),
    "put a job into another service's lane": lambda channel, home, _: publish(
        channel, home.jobs.due.name, f"{DELAYED}job.others:high"
    ),
    "put a job among another service's suspects": lambda channel, home, _: publish(
        channel, home.jobs.due.name, "others:suspects"
    ),
    "delay a job for another service": lambda channel, home, _: publish(
        channel, home.jobs.ladder.name(0), f"{DELAYED}job.others"
    ),
    "put into the ladder what comes out nowhere": lambda channel, home, _: publish(
        channel, home.jobs.ladder.name(0), f"{DELAYED}x"
    ),
    "write a dead letter of another service": lambda channel, home, _: publish(
        channel, home.jobs.dead.name, "job.others"
    ),
    "listen in on jobs": lambda channel, home, _: _tap(channel, home.jobs.jobs.name, "others"),
    "listen in on what is due": lambda channel, home, _: _tap(channel, home.jobs.due.name, "#"),
    "listen in on what is delayed": lambda channel, home, _: _tap(channel, home.jobs.ladder.name(0), "#"),
    "listen in on dead letters": lambda channel, home, _: _tap(channel, home.jobs.dead.name, "#"),
    "listen in on what is lost": lambda channel, home, _: _tap(channel, home.jobs.lost.name, ""),
    "call a service": lambda channel, home, _: publish(channel, Topology(home.namespace).requests.name, "calculator"),
}
REPLAYER: dict[str, Deed] = ANYBODY | {
    "read jobs": lambda channel, home, _: consume(channel, home.jobs.queue("calculator").name),
    "publish to what is due": lambda channel, home, _: publish(channel, home.jobs.due.name, f"{DELAYED}job.calculator"),
    "forge a dead letter": lambda channel, home, _: publish(channel, home.jobs.dead.name, "job.calculator"),
    "declare a queue": lambda channel, home, _: channel.declare_queue(exclusive=True),
    "call a service": lambda channel, home, _: publish(channel, Topology(home.namespace).requests.name, "calculator"),
}
DEEDS = {"sender": SENDER, "latersender": LATER_SENDER, "jobworker": WORKER, "replayer": REPLAYER}


@pytest.mark.parametrize(
    ("user", "deed"), [pytest.param(user, it, id=f"{user}: {it}") for user, deeds in DEEDS.items() for it in deeds]
)
async def test_what_a_user_must_not_do_is_refused(home: Home, user: str, deed: str) -> None:
    async with await aio_pika.connect(home.users[user]) as connection:
        channel = await connection.channel()
        with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
            await DEEDS[user][deed](channel, home, urlsplit(home.users[user]).username or "")


async def test_a_worker_that_leads_messages_into_the_ladder_holds_up_nobody(home: Home) -> None:
    """It may write to the exchanges and queues of the ladder, so it may bind them to what it may read."""
    jobs, ran = home.jobs, []
    control = Topology(home.namespace).control.name
    async with await aio_pika.connect(home.users["jobworker"]) as connection:
        await bind(await connection.channel(), jobs.ladder.name(1), control, "calculator")
    before = (await home.admin("queue", jobs.lost.name)).messages
    try:
        async with await aio_pika.connect(home.broker.url) as connection:
            at = await (await connection.channel()).get_exchange(control, ensure=False)
            for _ in range(40):  # RabbitMQ dead-letters at most 32 messages of a queue at a time
                await at.publish(aio_pika.Message(b"", type="hello"), "calculator")
        async with home.worker(calculator(ran)), home.client() as client:
            await client.send("calculator.add", name="again")
            await until(ran, "again", "again")
        while (await home.admin("queue", jobs.lost.name)).messages < before + 40:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    finally:
        async with await aio_pika.connect(home.broker.url) as connection:
            queue = await (await connection.channel()).get_queue(jobs.ladder.name(1), ensure=False)
            await queue.unbind(control, "calculator")


async def test_the_further_keys_of_a_message_are_held_to_the_topic_permissions_from_4_0_on(home: Home) -> None:
    """RabbitMQ 3.10 looks at the routing key alone, as the page says."""
    to_others = f"{DELAYED}job.others"
    async with await aio_pika.connect(home.users["jobworker"]) as connection:
        at = await (await connection.channel()).get_exchange(home.jobs.due.name, ensure=False)
        message = aio_pika.Message(b"{}", message_id="x", headers={"CC": [to_others]})
        if home.broker.version.startswith("3."):
            await at.publish(message, f"{DELAYED}job.calculator")
            await home.admin("delete", [home.jobs.queue(name).name for name in ("calculator", "others")])
            await home.declare()
        else:
            with pytest.raises(aiormq.exceptions.ChannelAccessRefused, match=re.escape(to_others)):
                await at.publish(message, f"{DELAYED}job.calculator")
