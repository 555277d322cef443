"""Queues that are deleted, declared differently or served by nobody; channels, vhosts and users that are taken away."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel

from rpcq import (
    CallTimeout,
    Client,
    InvalidParams,
    InvalidReply,
    OutcomeUnknown,
    RemoteError,
    Service,
    ServiceUnavailable,
    TooLarge,
    Worker,
)
from rpcq.errors import BrokerUnreachable, VhostNotFound
from rpcq.transport.rabbitmq.frames import Encoder
from support.broker import Broker, CtlFailed, Setup, vhost_of, with_vhost
from support.broker import broker as a_broker
from support.late import let_others_speak_first
from support.load import READY, Scene, WorkerProcess, until
from support.logged import event_of
from support.proxy import proxy

ODD_TAG = 1_000_000
"""A delivery tag that no channel here gets to."""

CONSUMER_TIMEOUT = 3.0
"""Seconds that a consumer may hold a message, where the broker is one that was set up so."""


@asynccontextmanager
async def channel_to(url: str) -> AsyncIterator[AbstractChannel]:
    """Somebody else's channel."""
    async with await aio_pika.connect(url) as connection:
        yield await connection.channel()


def logged(worker: WorkerProcess, event: str) -> list[dict[str, Any]]:
    """Its log's lines about an event."""
    return [line for line in map(json.loads, list(worker.lines)) if line["event"] == event]


def check_kinds(kinds: set[str], *expected: str) -> None:
    assert kinds <= {"result", *expected}, kinds


# Queues that nobody serves, or that are not there.


async def test_a_service_that_nobody_declared_and_one_that_nobody_serves_are_told_apart(scene: Scene) -> None:
    async with scene.client() as client:
        async with scene.load(client, timeout=30, think=0.05) as unknown:
            # Each caller gets to four calls: at their deadlines, that would take two minutes.
            await until(lambda: unknown.ledger.ended >= 200, what="calls to no service are not told at once")
        assert set(unknown.ledger.counts) == {"ServiceUnavailable/no"}

        worker = await scene.worker()
        worker.signal(signal.SIGTERM)
        assert await worker.exit_code() == 0
        unserved = scene.load(client, callers=0)
        let_others_speak_first(client)  # it is the broker's word that tells
        calling = client.with_options(timeout=2.5)

        async def call(nonce: str) -> Any:
            asked = calling.call("target.once", nonce=nonce)
            return await unserved.entered(nonce, asked, lambda _: False, seconds=30)

        errors = await asyncio.gather(*(call(f"unserved-{number}") for number in range(50)))
        proof = "no" if scene.queue_type == "quorum" else "maybe"
        assert unserved.ledger.counts == {f"CallTimeout/{proof}": 50}
        assert all("expired in the queue" in str(error) for error in errors)

        await scene.worker()
        async with scene.load(client) as served:
            await served.through()
        assert served.ledger.failed == 0
    await scene.check()


@pytest.mark.timeout(120)
async def test_a_request_queue_deleted_under_load_is_declared_again_and_calls_come_through(scene: Scene) -> None:
    workers = await scene.workers_of(2)
    async with scene.client() as client, scene.load(client, params={"seconds": 0.01}) as load:
        await load.through()
        async with channel_to(scene.url) as channel:
            await channel.queue_delete(scene.queue)
        await until(lambda: all(logged(worker, "session up again") for worker in workers))
        await load.through(500, 40)  # what was in the queue has ten seconds to its deadline
    # What was in the queue went with it, without a word; what was in hand is answered.
    check_kinds(set(load.ledger.counts), "ServiceUnavailable/no", "CallTimeout/maybe", "OutcomeUnknown/maybe")
    assert load.ledger.count(CallTimeout) + load.ledger.count(OutcomeUnknown) <= 50
    for worker in workers:
        assert worker.says("the broker cancelled the consumer")
    await scene.check()


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_a_queue_declared_differently_while_its_worker_was_away_is_named_and_served_once_it_is_mended(
    scene: Scene,
) -> None:
    async with scene.client() as client, proxy(scene.url) as between, channel_to(scene.url) as channel:
        worker = await scene.worker(url=between.url)
        async with scene.load(client, think=0.05) as before:
            await before.through()
            between.freeze()
            between.reset()
            await channel.queue_delete(scene.queue)
            await channel.declare_queue(scene.queue, durable=True, arguments={"x-max-length": 5})
            between.thaw()

            def tries() -> list[dict[str, Any]]:
                return logged(worker, "cannot come back yet")

            await until(lambda: any(line["error"] == "TopologyMismatch" for line in tries()))
            named = next(line for line in tries() if line["error"] == "TopologyMismatch")
            assert scene.queue in named["cause"]
            assert named["level"] == "error"
        # What was in hand is answered as soon as the worker can publish again; these are others.
        async with scene.load(client, think=0.05) as load:
            tried = len(tries())
            await asyncio.sleep(5)
            assert len(tries()) - tried <= 4, "somebody has to mend it: there is no hurry"
            assert load.ledger.counts["result"] == 0
            assert worker.is_alive

            await channel.queue_delete(scene.queue)
            await load.through(seconds=60)
        kinds = set(before.ledger.counts) | set(load.ledger.counts)
        check_kinds(kinds, "ServiceUnavailable/no", "CallTimeout/maybe", "OutcomeUnknown/maybe")
        assert load.ledger.count(ServiceUnavailable)
    await scene.check()


@pytest.mark.timeout(150)
async def test_a_reply_queue_deleted_under_load_settles_its_calls_and_calls_come_through(scene: Scene) -> None:
    await scene.worker("--prefetch", "200")
    slow = {"seconds": 0.1}
    async with scene.client() as client, asyncio.timeout(60):  # half of the time that its calls have
        async with (
            scene.load(client, timeout=120, params=slow) as plain,
            scene.load(client, timeout=120, params=slow, method="again", idempotent=True) as idempotent,
        ):
            await plain.through()
            assert client._sender.encoder is not None
            before = client._sender.encoder.reply_to
            # It is exclusive: nobody but its own connection may delete it, or an administrator.
            await client._transport._consuming._admin.queue_delete(before.decode())  # type: ignore[attr-defined]
            await until(lambda: plain.ledger.count(OutcomeUnknown), what="pending calls do not settle")
            await plain.through()
            await idempotent.through()
            assert client._sender.encoder is not None
            assert client._sender.encoder.reply_to != before
        check_kinds(set(plain.ledger.counts), "OutcomeUnknown/maybe")
        assert plain.ledger.failed <= 50
        assert idempotent.ledger.failed == 0
    await scene.check()


# Channels that the broker closes.


def counted(scene: Scene) -> Service:
    """The service of the worker processes, for a worker in this one."""
    service = Service("target", queue_type=scene.queue_type)
    runs = os.open(scene.runs, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    @service.method
    async def once(nonce: str) -> str:
        os.write(runs, f"{nonce}\n".encode())
        await asyncio.sleep(0.05)
        return nonce

    return service


async def test_a_channel_that_the_broker_closes_over_an_acknowledgement_costs_no_more_than_what_was_in_hand(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        scene.client() as client,
        Worker(counted(scene), url=scene.url, namespace=scene.namespace, prefetch=20) as worker,
        scene.load(client, timeout=30) as load,
    ):
        await load.through()
        session: Any = worker._transport._consuming  # type: ignore[attr-defined]
        link, channel = session._link, session._channels[0]
        encoder: Encoder = channel._unsettled._encoder
        with caplog.at_level(logging.WARNING, logger="rpcq"):
            link.protocol.write(encoder.ack(ODD_TAG))
            await until(lambda: session._link is not link, what="the broker took it")
        why = f"406 PRECONDITION_FAILED - unknown delivery tag {ODD_TAG}"
        assert any(why in getattr(record, "cause", "") for record in caplog.records)
        await load.through()
        assert session._link is not None
    check_kinds(set(load.ledger.counts), "OutcomeUnknown/maybe")
    assert load.ledger.failed <= 20
    if scene.queue_type == "quorum":  # a classic queue delivers what is in hand again, and it is taken as the same
        assert load.ledger.failed
    await scene.check()


@pytest.fixture(scope="module")
def impatient() -> Iterator[Broker]:
    """A broker that gives its consumers little time."""
    config = f"consumer_timeout = {CONSUMER_TIMEOUT * 1000:.0f}\nloopback_users.guest = false\n"
    with a_broker(setup=Setup(config)) as found:
        # How often it looks is no key of rabbitmq.conf.
        found.ctl("eval", "application:set_env(rabbit, channel_tick_interval, 500).")
        yield found


@pytest.mark.long
async def test_a_handler_that_outlasts_the_consumer_timeout_costs_its_worker_a_session_and_no_more(
    impatient: Broker, namespace: str, queue_type: Any, tmp_path: Path
) -> None:
    # From 4.3 on it is the business of quorum queues alone, where the consumer's own argument beats it.
    strikes = impatient.release < (4, 3)
    async with Scene(impatient.url, namespace, queue_type, tmp_path) as scene:
        worker = await scene.worker()
        async with scene.client() as client:
            async with (
                scene.load(client, callers=20, timeout=30) as quick,
                scene.load(client, callers=20, timeout=30, params={"seconds": CONSUMER_TIMEOUT * 1.7}) as slow,
            ):
                if strikes:
                    await until(lambda: logged(worker, "session up again"))
                    assert "delivery acknowledgement on channel" in logged(worker, "session down")[0]["cause"]
                await quick.through()
                await until(lambda: slow.ledger.ended >= 20)
            async with scene.load(client) as afterwards:
                await afterwards.through()
            assert afterwards.ledger.failed == 0
            check_kinds(set(quick.ledger.counts), "OutcomeUnknown/maybe")
            check_kinds(set(slow.ledger.counts), "OutcomeUnknown/maybe")
            if not strikes:
                assert (quick.ledger.failed, slow.ledger.failed, logged(worker, "session down")) == (0, 0, [])
            elif queue_type == "quorum":
                assert slow.ledger.count(OutcomeUnknown) >= 20
            else:  # it is delivered again to the worker that still runs it
                assert slow.ledger.count("result") >= 20
        await scene.check()


MOST = 1000
"""Bytes of a message, where the broker is one that was set up so."""


@pytest.fixture(scope="module")
def narrow() -> Iterator[Broker]:
    """A broker that takes small messages alone; RabbitMQ's own limit is 128 MiB, and 16 MiB from 4.0 on."""
    with a_broker(setup=Setup(f"max_message_size = {MOST}\nloopback_users.guest = false\n")) as found:
        yield found


@pytest.fixture(scope="module")
def tight() -> Iterator[Broker]:
    """A broker with the smallest frames that every version of RabbitMQ takes: from 4.1 on, 4096 is too little."""
    with a_broker(setup=Setup("frame_max = 8192\nloopback_users.guest = false\n")) as found:
        yield found


@asynccontextmanager
async def beside_load(narrow: Broker, namespace: str, queue_type: Any, folder: Path) -> AsyncIterator[Narrow]:
    """A worker and a client with larger limits than their broker; in the end, the load beside has been served."""
    async with Scene(narrow.url, namespace, queue_type, folder) as scene:
        worker = await scene.worker(RPCQ_MAX_BODY=str(4 * 1024 * 1024))
        async with scene.client(max_body=4 * 1024 * 1024) as client:
            async with scene.load(client, method="again", callers=20, idempotent=True) as load:
                await load.through()
                yield Narrow(scene, worker, client)
                await load.through()
            assert load.ledger.failed == 0
        await scene.check()


@dataclass
class Narrow:
    """What is there, where the broker takes small messages alone."""

    scene: Scene
    worker: WorkerProcess
    client: Client


async def test_a_request_that_the_broker_takes_for_too_large_is_told_so_and_costs_one_session(
    narrow: Broker, namespace: str, queue_type: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with beside_load(narrow, namespace, queue_type, tmp_path) as it:
        for size in (100_000, MOST, 3_000_000):
            for idempotent in (False, True):
                with pytest.raises(TooLarge, match=rf"max_message_size.*its body is {size + 12} bytes") as told:
                    await it.client.with_options(idempotent=idempotent).call("target.once", nonce="y" * size)
                assert (told.value.executed, told.value.retryable) == ("no", False)
        assert len(await it.client.call("target.once", nonce="z" * (MOST - 12))) == MOST - 12
    assert it.scene.ran("y") == []
    assert len(it.scene.ran("z")) == 1
    lost = [record for record in caplog.records if event_of(record) == "session down"]
    assert len(lost) == 1
    assert "raise its max_message_size, or lower max_body" in lost[0].cause  # type: ignore[attr-defined]


async def test_a_reply_that_the_broker_takes_for_too_large_is_an_invalid_reply_and_costs_one_session(
    narrow: Broker, namespace: str, queue_type: Any, tmp_path: Path
) -> None:
    async with beside_load(narrow, namespace, queue_type, tmp_path) as it:
        for number in range(3):
            with pytest.raises(InvalidReply, match="2097154 bytes of JSON, more than the broker takes") as told:
                await it.client.call("target.odd", nonce=f"large{number}", kind="large")
            assert told.value.executed == "yes"
        with pytest.raises(RemoteError, match="no to nested") as said_no:
            await it.client.call("target.deep", nonce="nested")
        assert (said_no.value.code, said_no.value.details) == ("refused", None)
        with pytest.raises(InvalidParams) as refused:  # told in so many words that it is larger than the request
            await it.client.call("target.once", **{f"a{number}": number for number in range(60)})
        assert (refused.value.executed, refused.value.details) == ("no", None)
    assert len(it.scene.ran("large")) == 3
    assert len(logged(it.worker, "session down")) == 1
    assert len(logged(it.worker, "a reply is larger than the broker takes (its max_message_size)")) == 5


async def test_headers_that_do_not_fit_into_a_frame_cost_their_call_alone(
    tight: Broker, namespace: str, queue_type: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with beside_load(tight, namespace, queue_type, tmp_path) as it:
        for size in (7000, 8050, 8100):
            caller = it.client.with_options(metadata={"x-note": "n" * size})
            if size > 7000:
                with pytest.raises(TooLarge, match=r"frame_max.*its properties are") as told:
                    await caller.call("target.once", nonce="y")
                assert (told.value.executed, told.value.retryable) == ("no", False)
            else:
                await caller.call("target.once", nonce="z")
    assert (it.scene.ran("y"), len(it.scene.ran("z"))) == ([], 1)
    assert [record for record in caplog.records if event_of(record) == "session down"] == []


async def test_a_broker_that_came_back_is_asked_again_how_much_it_takes(
    narrow: Broker, namespace: str, tmp_path: Path
) -> None:
    async with Client(narrow.url, namespace=namespace, max_body=4 * 1024 * 1024) as client:
        publishing: Any = client._transport._publishing  # type: ignore[attr-defined]
        set_up = publishing._set_up

        async def not_yet(_: object) -> None:
            publishing._set_up = set_up
            raise BrokerUnreachable("not yet")

        publishing._set_up = not_yet
        for _ in range(2):
            with pytest.raises(TooLarge):
                await client.call("nobody.there", text="x" * MOST)
        await until(lambda: client.connected)
        assert publishing._set_up == set_up
        assert publishing._most == MOST  # a try to come back that fails tells nothing of it
        publishing._link.protocol.abort()
        await until(lambda: not client.connected)
        await until(lambda: client.connected)
        assert publishing._most == sys.maxsize
        with pytest.raises(TooLarge):
            await client.call("nobody.there", text="x" * MOST)
        assert publishing._most == MOST


async def test_no_handler_gets_more_time_than_the_consumer_timeout_whatever_a_request_asks_for(scene: Scene) -> None:
    await scene.worker()
    async with scene.client() as client, scene.load(client) as load, channel_to(scene.url) as channel:
        await load.through()
        replies = await channel.declare_queue(exclusive=True)
        ten_hours = 10 * 3600 * 1000
        request = aio_pika.Message(
            json.dumps({"nonce": "ten-hours"}).encode(),
            correlation_id="1",
            reply_to=replies.name,
            type="left",
            headers={"rpcq-timeout": ten_hours, "rpcq-deadline": int(time.time() * 1000) + ten_hours},
        )
        exchange = await channel.get_exchange(f"{scene.namespace}.requests", ensure=False)
        await exchange.publish(request, "target")
        async with replies.iterator(timeout=READY) as came:
            reply = await anext(came)
        left = json.loads(reply.body)
        assert reply.type == "result"
        assert 20 * 60 < left <= 25 * 60  # RabbitMQ's own limit is 30 minutes
    await scene.check()


# Vhosts and users.


@dataclass(frozen=True)
class Place:
    """A vhost with one user, both of which an administrator may take away."""

    broker: Broker
    url: str
    """The administrator's."""
    user: str

    @property
    def vhost(self) -> str:
        return vhost_of(self.url)

    @property
    def users_url(self) -> str:
        parts = urlsplit(self.url)
        return parts._replace(netloc=f"{self.user}:secret@{parts.hostname}:{parts.port}").geturl()

    def permit(self, who: str, what: str = ".*") -> None:
        self.broker.ctl("set_permissions", "-p", self.vhost, who, what, what, what)

    def add_user(self) -> None:
        self.broker.ctl("add_user", self.user, "secret")
        self.permit(self.user)

    def cut(self) -> None:
        self.broker.ctl("close_all_user_connections", self.user, "cut by a test")

    # What is done to them.

    def delete_vhost(self) -> None:
        self.broker.drop_vhost(self.url)

    def make_vhost(self) -> None:
        self.broker.ctl("add_vhost", self.vhost)
        for who in ("guest", self.user):
            self.permit(who)

    def change_password(self) -> None:
        self.broker.ctl("change_password", self.user, "another")
        self.cut()

    def change_password_back(self) -> None:
        self.broker.ctl("change_password", self.user, "secret")

    def delete_user(self) -> None:
        self.broker.ctl("delete_user", self.user)

    def clear_permissions(self) -> None:
        self.broker.ctl("clear_permissions", "-p", self.vhost, self.user)
        self.cut()

    def permit_nothing(self) -> None:
        self.permit(self.user, "^$")
        self.cut()

    def permit_all(self) -> None:
        self.permit(self.user)


Deed = Callable[[Place], None]

REVOKED: dict[str, tuple[Deed, Deed, str]] = {
    "vhost": (Place.delete_vhost, Place.make_vhost, "VhostNotFound"),
    "password": (Place.change_password, Place.change_password_back, "AuthenticationFailed"),
    "user": (Place.delete_user, Place.add_user, "AuthenticationFailed"),
    "entry": (Place.clear_permissions, Place.permit_all, "VhostNotFound"),
    "rights": (Place.permit_nothing, Place.permit_all, "AccessRefused"),
}


async def revoke_and_mend(place: Place, scene: Scene, turn: asyncio.Lock, strike: Deed, mend: Deed, name: str) -> None:
    """Load on a vhost of its own, through what an administrator does."""
    worker = await scene.worker(url=place.users_url)

    def tries() -> list[dict[str, Any]]:
        return logged(worker, "cannot come back yet")

    # What it leaves behind is told by the other scene's client: here, tasks of other places come and go.
    async with Client(place.users_url, namespace=scene.namespace, heartbeat=5) as client:
        async with scene.load(client, callers=20, timeout=3, think=0.2) as load:
            await load.through(100)
            async with turn:
                await asyncio.to_thread(strike, place)
            await until(tries, what=f"{name}: nothing was told")
            await asyncio.sleep(6)
            # Both of its sessions say so; the first try of each may come while things are still being taken away.
            named = [line for line in tries() if line["error"] == name]
            assert named, tries()
            assert all(line["level"] == "error" for line in named)
            assert len(tries()) <= 8, "somebody has to mend it: there is no hurry"
            assert worker.is_alive
            await until(lambda: load.ledger.count("ServiceUnavailable/no"), what=f"{name}: callers are told nothing")
            async with turn:
                await asyncio.to_thread(mend, place)
            await load.through(100, 60)
        # The client may be back before the worker is: then calls expire in the queue.
        expired = "CallTimeout/no", "CallTimeout/maybe"
        check_kinds(set(load.ledger.counts), "ServiceUnavailable/no", "OutcomeUnknown/maybe", *expired)
        assert client.in_flight == 0
    await scene.check()


async def test_a_connection_that_was_refused_is_not_left_to_the_garbage_collector(
    rabbitmq_url: str, namespace: str
) -> None:
    """It runs in any thread, where aio-pika's finalizer has no event loop to close a connection in."""
    with pytest.raises(VhostNotFound):
        await Client(with_vhost(rabbitmq_url, "missing"), namespace=namespace).connect()
    warned: list[object] = []
    previous, sys.unraisablehook = sys.unraisablehook, lambda it: warned.append(it.exc_value)
    try:
        await asyncio.to_thread(gc.collect)
    finally:
        sys.unraisablehook = previous
    assert not warned


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_what_is_revoked_under_load_is_named_and_heals_when_mended_and_nobody_else_is_hit(
    broker: Broker, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    if not broker.can_ctl:
        pytest.skip("RPCQ_TEST_URL gives no rabbitmqctl, without which nothing can be revoked")
    places = {it: Place(broker, await asyncio.to_thread(broker.vhost), f"u{secrets.token_hex(6)}") for it in REVOKED}
    for place in places.values():
        await asyncio.to_thread(place.add_user)
    await scene.worker()
    # Six loads in one loop, beside as many workers: its debug mode would take more time than all else, and each
    # rabbitmqctl takes a processor for a second.
    asyncio.get_running_loop().set_debug(False)
    turn = asyncio.Lock()

    async def revoked(what: str, place: Place) -> None:
        folder = scene.folder / what
        folder.mkdir()
        async with Scene(place.url, scene.namespace, scene.queue_type, folder) as struck:
            await revoke_and_mend(place, struck, turn, *REVOKED[what])

    try:
        caplog.set_level(logging.WARNING, logger="rpcq")
        async with scene.client() as client:
            async with scene.load(client, callers=20, timeout=30, think=0.2) as others, asyncio.TaskGroup() as group:
                for what, place in places.items():
                    group.create_task(revoked(what, place))
            assert others.ledger.count("result") > 500
            assert others.ledger.failed == 0
        told = {record.error for record in caplog.records if event_of(record) == "cannot come back yet"}
        assert told >= {name for *_, name in REVOKED.values()}  # by the clients
    finally:
        for place in places.values():
            with contextlib.suppress(CtlFailed):  # a test that failed may have left them taken away
                await asyncio.to_thread(broker.drop_vhost, place.url)
                await asyncio.to_thread(broker.ctl, "delete_user", place.user)
    await scene.check()
