"""Broker users that may do what clients and workers need, and nothing else; with the patterns of `docs/security.md`."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import aio_pika
import aiormq.exceptions
import pytest

from rpcq import CallTimeout, Service, Worker
from rpcq.errors import AccessRefused
from rpcq.options import ConnectionOptions
from rpcq.transport.opening import open_admin
from rpcq.url import parse
from rpcq.wire.topology import Queue, Topology
from security.realm import CLIENT, KINDS, SERVED, WORKER, Place
from support.late import let_others_speak_first
from support.load import READY, first

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
        assert [it.host for it in await first(client.workers(service, wait=READY), 1)]
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
        let_others_speak_first(client)
        with pytest.raises(CallTimeout, match="expired in the queue"):
            await client.with_options(timeout=1).call(f"{service}.add", x=1, y=2)


async def test_both_sides_come_back_with_the_rights_of_the_page(place: Place) -> None:
    async with place.worker() as worker, place.client() as client:
        for end in (worker, client):
            for session in (end._transport._consuming, end._transport._publishing):  # type: ignore[attr-defined]
                session._link.protocol.abort()
        await client.wait_for_service("things", timeout=20)
        assert await client.call("things.add", x=1, y=2) == 3


# What is refused.


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
    bank, stranger = f"{place.topology.namespace}.bank", Topology(f"{place.topology.namespace}-2")
    url = parse(place.broker.url)
    async with open_admin(url, ConnectionOptions(), *url.hosts[0]) as admin:
        other = stranger.request_queue("things", "classic")
        await admin.declare(stranger.exchanges(), [Queue(bank, durable=True), other])
        try:
            async with await aio_pika.connect(place.users["client"]) as connection:
                requests = await (await connection.channel()).get_exchange(place.topology.requests.name, ensure=False)
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


@contextmanager
def may_hear(place: Place, service: str) -> Iterator[None]:
    """Let the worker hear what is asked of another service."""
    own, parts = urlsplit(place.users["worker"]).username or "", urlsplit(place.broker.url)
    for name in (service, "things"):
        place.broker.ctl(
            *("set_topic_permissions", "-p", parts.path.removeprefix("/") or "/", own),
            *(place.topology.control.name, "^$", f"^({name}|@all)$"),
        )
        if name == service:
            yield


async def test_a_worker_of_another_service_is_refused_its_control_messages_and_its_queue_by_name(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(AccessRefused, match="access to topic 'others'"):
        await place.worker("worker", "others").start()
    with may_hear(place, "others"), pytest.raises(AccessRefused, match=re.escape(place.queue("others"))):
        await place.worker("worker", "others").start()


async def test_a_worker_whose_queue_nobody_declared_says_how_it_is_done(place: Place) -> None:
    missing = Worker(
        _new_service(), url=place.users["worker"], namespace=place.topology.namespace, reply_exchange=place.exchange
    )
    with may_hear(place, "new"), pytest.raises(AccessRefused, match="rpcq setup"):
        await missing.start()


def _new_service() -> Service:
    service = Service("new")

    @service.method
    async def work() -> None: ...

    return service
