"""What a call's outcome claims is what is known: cases in which more was claimed, or less."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import pytest

from rpcq import (
    CallError,
    CallTimeout,
    Client,
    ClosedError,
    Context,
    DomainError,
    OutcomeUnknown,
    RemoteError,
    Retry,
    Service,
    ServiceUnavailable,
)
from rpcq.transport.base import Delivery, Listener, Message, Outgoing, Published, Subscription
from rpcq.transport.opening import open_transport
from rpcq.wire import replies
from rpcq.wire.properties import Properties, decode, encode
from rpcq.wire.topology import Queue, Topology
from support.late import let_others_speak_first
from support.places import Place

QUEUE_TYPE_MATTERS = False  # one kind of queue for each transport; `make test-faults` has the others


class Stranger:
    """A program that is not rpcq's: a transport that publishes, and keeps what comes to its queues."""

    def __init__(self, place: Place, *queues: Queue) -> None:
        from rpcq.options import ConnectionOptions

        self.topology = Topology(place.namespace)
        self.came: list[Delivery] = []
        self._queues = queues
        self._transport = open_transport(place.url, ConnectionOptions(namespace=place.namespace))

    async def __aenter__(self) -> Self:
        nothing = Listener(lambda _: None, lambda _: None, lambda: None, lambda _: None, lambda _: None)
        subscriptions = [Subscription(queue, self._take, no_ack=True) for queue in self._queues]
        own = Subscription(Queue("", exclusive=True, auto_delete=True), self._take, no_ack=True)
        await self._transport.start(self.topology.exchanges(), [*subscriptions, own], nothing)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.close()

    def _take(self, delivery: Delivery) -> None:
        self.came.append(delivery)

    async def send(self, exchange: str, key: str, properties: bytes, body: bytes) -> Published:
        settled: asyncio.Future[Published] = asyncio.get_running_loop().create_future()
        message = Message(exchange.encode(), key.encode(), b"", properties, body, settled.set_result)
        self._transport.publish(message)
        return await asyncio.wait_for(settled, 5)


def intercepted(client: Client) -> list[Outgoing]:
    """The requests that a client sends from now on."""
    sent: list[Outgoing] = []
    publish = client._transport.publish

    def keep(message: Outgoing) -> None:
        sent.append(message)
        publish(message)

    client._transport.publish = keep  # type: ignore[method-assign]
    return sent


def expiring(client: Client, milliseconds: int) -> None:
    """Have what a client sends from now on expire in its queue so soon, whatever its deadline is."""
    publish = client._transport.publish

    def publish_expiring(message: Outgoing) -> None:
        properties = decode(message.properties)
        properties.expiration = b"%d" % milliseconds
        message.properties = encode(properties)
        publish(message)

    client._transport.publish = publish_expiring  # type: ignore[method-assign]


async def fails(call: Any) -> CallError:
    with pytest.raises(CallError) as caught:
        await call
    return caught.value


@asynccontextmanager
async def declared(place: Place, *services: Service) -> AsyncIterator[None]:
    """The queues of services that nobody serves."""
    async with Stranger(place):  # the in-process broker is there as long as somebody is
        for service in services:
            async with place.worker(service):
                pass
        yield


def working(place: Place, name: str = "things") -> tuple[Service, list[str]]:
    service, runs = place.service(name), []

    @service.method
    async def work() -> str:
        runs.append(name)
        return name

    @service.method
    async def result(x: int) -> int:
        runs.append(name)
        return 2 * x

    return service, runs


# Requests that expire, and where they go.


async def test_an_expiry_proves_that_nothing_ran_only_on_a_quorum_queue_and_only_for_a_while(place: Place) -> None:
    service, _ = working(place)
    # Ten seconds of heartbeat: this client may be sure for half a second, and the call's request expires at 0.9 s.
    for disconnected_timeout, sure in ((60.0, True), (20.5, False)):
        async with declared(place, service), place.client(disconnected_timeout=disconnected_timeout) as client:
            let_others_speak_first(client)
            error = await fails(client.with_options(timeout=1.0).call("things.work"))
            assert isinstance(error, CallTimeout)
            assert "expired in the queue" in str(error)
            assert error.executed == ("no" if sure and place.queue_type == "quorum" else "maybe")


async def test_with_a_heartbeat_of_half_that_time_no_expiry_proves_anything(place: Place) -> None:
    service, _ = working(place)
    async with declared(place, service), place.client(heartbeat=30) as client:
        let_others_speak_first(client)
        error = await fails(client.with_options(timeout=0.5).call("things.work"))
        assert "expired in the queue" in str(error)
        assert error.executed == "maybe"


async def test_an_expired_request_does_not_reach_a_queue_that_is_called_like_the_service(place: Place) -> None:
    name = f"{place.namespace}-things"
    service, _ = working(place, name)
    old = Queue(name, durable=True, auto_delete=True)
    async with declared(place, service), Stranger(place, old) as stranger, place.client() as client:
        let_others_speak_first(client)
        error = await fails(client.with_options(timeout=0.5).call(f"{name}.work"))
        assert "expired in the queue" in str(error)
        assert stranger.came == []


async def test_what_a_request_queue_gives_up_reaches_no_business_queue_whatever_its_sender_asks_for(
    place: Place,
) -> None:
    service, _ = working(place)
    other, runs = working(place, "others")
    bank = Queue(f"{place.namespace}.bank", durable=True, auto_delete=True)
    async with declared(place, service), place.worker(other), Stranger(place, bank) as stranger:
        queue = stranger.topology.request_queue("others", place.queue_type).name
        properties = Properties(
            headers={"CC": [bank.name, queue, "others"]}, type=b"work", expiration=b"0", correlation_id=b"c"
        )
        for _ in range(20):
            assert await stranger.send(f"{place.namespace}.requests", "things", encode(properties), b"{}") in (
                Published.CONFIRMED,
                Published.REFUSED,
            )
        await asyncio.sleep(0.3)
        assert stranger.came == []
    # Those that were routed to "others" at once came by its own exchange: that is what anybody may call.
    assert len(runs) <= 20


async def test_two_queues_of_one_service_never_run_a_call_twice_or_tell_no_of_it(place: Place) -> None:
    """It was changed from one kind to the other, and the old queue is still there."""
    service, runs = place.service(), []

    @service.method
    async def work() -> str:
        runs.append(1)
        await asyncio.sleep(1.5)  # a copy in the old queue would expire before
        return "done"

    other = Service("things", queue_type="classic" if place.queue_type == "quorum" else "quorum")
    other.method(name="work")(work)
    async with declared(place, other), place.worker(service), place.client() as client:
        expiring(client, 500)
        call = client.with_options(timeout=30).call("things.work")
        if place.queue_type == "quorum":
            assert await call == "done"
            assert runs == [1]
        else:  # clients send to the queue that delivers once alone, where there is one
            error = await fails(call)
            assert (type(error), error.executed, runs) == (CallTimeout, "no", [])


async def test_a_client_notices_that_a_service_has_another_queue_since(place: Place) -> None:
    topology = Topology(place.namespace)
    classic, quorum = (Service("things", queue_type=kind) for kind in ("classic", "quorum"))
    for service in (classic, quorum):
        service.method(name="work")(_nothing)
    async with place.client() as client:
        sent = intercepted(client)
        keys = (topology.once_queue("things").encode(), b"things")
        async with place.worker(classic):
            await client.call("things.work")
            await client.call("things.work")
            assert [it.routing_key for it in sent] == [keys[0], keys[1], keys[1]]
            assert client.counts()["resent"] == 0
            sent.clear()
        async with place.worker(quorum):
            await client.call("things.work")  # it is bound under the service's name as well
            client._sender._not_once[b"things"] -= 5.0
            client._sender.failed(_last_call(sent), Published.REFUSED, 0)  # more would have been known
            await client.call("things.work")
            assert [it.routing_key for it in sent] == [keys[1], keys[0]]


async def _nothing() -> None: ...


def _last_call(sent: list[Outgoing]) -> Any:
    return sent[-1].call  # type: ignore[attr-defined]  # a request's


# Requests that are moved.


async def test_a_request_that_is_published_again_is_not_taken_for_its_own_reply(place: Place) -> None:
    service, runs = working(place)
    async with declared(place, service), place.client() as client, Stranger(place) as stranger:
        sent = intercepted(client)
        call = asyncio.create_task(client.with_options(timeout=20).call("things.result", x=21))
        while not sent or place.namespace.encode() not in sent[-1].exchange:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        request = sent[-1]
        queue = stranger.topology.request_queue("things", place.queue_type).name
        await stranger.send("", queue, request.properties, request.body)  # as a shovel does: with its CC
        async with place.worker(service):
            assert await call == 42  # of the two that are in the queue now, one runs
        assert client.counts()["stray_replies"] >= 1
    assert runs == ["things"]


async def test_a_request_that_was_moved_is_not_run(place: Place) -> None:
    service, runs = working(place)
    async with place.worker(service), place.client() as client, Stranger(place) as stranger:
        encoder = client._sender.encoder
        assert encoder is not None
        now_ms = int(time.time() * 1000)
        properties = decode(encoder.encode(b"by hand", b"work", 5000, now_ms + 5000, b"", notify=True))
        properties.reply_to = None
        queue = stranger.topology.request_queue("things", place.queue_type).name
        for has_copy in (True, False):
            if not has_copy:  # from a client that is not rpcq's, and sends to the queue
                assert properties.headers is not None
                del properties.headers["CC"]
            await stranger.send("", queue, encode(properties), b"{}")
        while not runs:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
    assert runs == ["things"]


async def test_a_reply_of_a_server_that_copies_headers_is_a_reply(place: Place) -> None:
    async with place.client() as client:
        sent = intercepted(client)
        own = Queue(f"{place.namespace}.copying", durable=True, auto_delete=True)
        async with Stranger(place, own) as stranger:
            call = asyncio.create_task(client.with_options(queue=own.name, timeout=5).call("work"))
            while not stranger.came:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
            asked = decode(stranger.came[0].properties)
            headers = {**(asked.headers or {}), "x-death": [{"reason": "expired", "queue": own.name, "count": 1}]}
            reply = Properties(headers=headers, correlation_id=asked.correlation_id, type=b"result")
            assert asked.reply_to is not None
            await stranger.send("", asked.reply_to.decode(), encode(reply), b'"done"')
            assert await call == "done"
        assert len(sent) == 1


# Deadlines.


@pytest.mark.parametrize("seconds", [0.0005, 0.001, 0.002, 0.004])
async def test_a_timeout_of_a_moment_is_a_timeout(place: Place, seconds: float) -> None:
    service, runs = place.service(), []

    @service.method
    async def work(nonce: int) -> None:
        runs.append(nonce)

    async with place.worker(service), place.client() as client:
        await client.wait_for_service("things")
        told = {}
        for nonce in range(20):
            try:
                await client.with_options(timeout=seconds).call("things.work", nonce=nonce)
            except CallTimeout as error:
                told[nonce] = error.executed
            else:
                told[nonce] = "yes"
        await client.call("things.work", nonce=20)  # whatever was sent before has run, or never will
    assert {nonce for nonce, executed in told.items() if executed == "yes"} <= set(runs)
    assert set(runs).isdisjoint(nonce for nonce, executed in told.items() if executed == "no")


async def test_the_first_timeout_of_half_a_millisecond_says_that_nothing_was_sent(place: Place) -> None:
    async with place.client() as client:
        error = await fails(client.with_options(timeout=0.0005).call("things.work"))
        assert isinstance(error, CallTimeout)
        assert (error.executed, error.retryable) == ("no", True)


async def test_a_call_of_a_handler_that_runs_into_the_inherited_deadline_is_a_timeout_of_the_outer_call_too(
    place: Place,
) -> None:
    outer, inner, began = place.service("outer"), place.service("inner"), asyncio.Event()
    async with place.client() as client:

        @inner.method
        async def hang() -> None:
            await asyncio.get_running_loop().create_future()

        @outer.method
        async def inherits() -> None:
            began.set()
            await client.call("inner.hang")

        @outer.method
        async def has_its_own() -> None:
            await client.with_options(timeout=0.2).call("inner.hang")

        async with place.worker(outer, inner):
            let_others_speak_first(client)
            while not began.is_set():  # a call that comes too late does not begin
                error = await fails(client.with_options(timeout=1.0).call("outer.inherits"))
            assert isinstance(error, CallTimeout)
            assert error.executed == "yes"
            error = await fails(client.with_options(timeout=20.0).call("outer.has_its_own"))
            assert isinstance(error, RemoteError)


# What handlers raise, and handlers that are not entered.


class Full(DomainError):
    def __init__(self) -> None:
        super().__init__("full", executed="no", retryable=True)


async def test_what_a_handler_raises_has_run_whatever_it_says_of_itself(place: Place) -> None:
    service, runs = place.service(errors=[Full]), []

    @service.method
    async def work() -> None:
        runs.append(1)
        raise Full

    async with place.worker(service), place.client() as client:
        caller = client.with_options(errors=(Full,), retry=Retry(codes=("full",), initial_backoff=0.01))
        error = await fails(caller.call("things.work"))
        assert isinstance(error, Full)
        assert (error.executed, error.retryable, runs) == ("yes", False, [1])


async def test_a_def_handler_for_which_no_thread_can_be_started_has_not_run_and_never_does(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, runs = place.service(), []

    @service.method
    def work(nonce: int) -> int:
        runs.append(nonce)
        return nonce

    start, refusing = threading.Thread.start, True

    def may_start(thread: threading.Thread) -> None:
        if refusing and thread.name.startswith("rpcq_"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", may_start)
    async with place.worker(service), place.client() as client:
        error = await fails(client.with_options(timeout=0.5).call("things.work", nonce=1))
        assert error.executed != "yes"
        refusing = False
        assert await client.with_options(timeout=5).call("things.work", nonce=2) == 2  # sent again, or at once
        await asyncio.sleep(0.1)
    assert runs == [2]


# Ends.


async def test_closing_a_client_wakes_calls_that_wait_to_be_made_again_and_tells_their_last_error(
    place: Place,
) -> None:
    service, runs = place.service(errors=[Full]), []

    @service.method(idempotent=True)
    async def work() -> None:
        runs.append(1)
        raise Full

    async with place.worker(service), place.client() as client:
        retry = Retry(codes=("full",), initial_backoff=1000.0, max_backoff=1000.0)
        caller = client.with_options(errors=(Full,), idempotent=True, retry=retry, timeout=1000)
        calls = [asyncio.create_task(caller.call("things.work")) for _ in range(20)]
        while len(runs) < 20 or client._calls:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        waiting = [call for call in calls if not call.done()]
        assert client.in_flight == len(waiting) > 0
        await asyncio.wait_for(client.close(), 5)
        for call in calls:
            error = await asyncio.wait_for(fails(call), 1)
            assert isinstance(error, Full)
            assert error.executed == "yes"
        assert client.in_flight == 0
        with pytest.raises(ClosedError):
            await caller.call("things.work")


async def test_who_asks_for_workers_hears_of_the_end_of_the_client_at_once(place: Place) -> None:
    client = place.client()
    await client.connect()

    async def ask() -> list[object]:
        return [it async for it in client.workers(wait=30)]

    asking = asyncio.create_task(ask())
    client._sessions.closed()  # as when the connection is lost: the next one cannot even ask
    late = asyncio.create_task(ask())
    await asyncio.sleep(0.05)
    await client.close()
    assert await asyncio.wait_for(asyncio.gather(asking, late), 2) == [[], []]


async def test_calls_that_are_made_while_connecting_fails_end_with_it(place: Place) -> None:
    client = place.client()
    failing = asyncio.Event()

    async def start(*_: object) -> None:
        await failing.wait()
        raise ConnectionRefusedError

    client._transport.start = start  # type: ignore[method-assign]
    connecting = asyncio.create_task(client.connect())
    await asyncio.sleep(0)
    calls = [asyncio.create_task(client.with_options(timeout=60).call("things.work")) for _ in range(3)]
    await asyncio.sleep(0.02)
    failing.set()
    with pytest.raises(ConnectionRefusedError):
        await connecting
    for call in calls:
        error = await asyncio.wait_for(fails(call), 1)
        assert isinstance(error, ServiceUnavailable)
        assert error.executed == "no"


async def test_several_calls_of_one_correlation_id_free_their_slots_after_a_cut(place: Place) -> None:
    service, release = place.service(), asyncio.Event()

    @service.method
    async def work(context: Context) -> str:
        await release.wait()
        return context.correlation_id

    async with place.worker(service, prefetch=20) as worker, place.client() as client:
        encoder = client._sender.encoder
        assert encoder is not None
        async with Stranger(place) as stranger:
            now_ms = int(time.time() * 1000)
            raw = encoder.encode(b"the same", b"work", 30_000, now_ms + 30_000, b"", notify=False)
            for _ in range(20):
                await stranger.send(f"{place.namespace}.requests", "things", raw, b"{}")
            while worker.in_flight < 20:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
            await place.cut(worker)
            while not worker.connected:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            release.set()
            while worker.in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            assert len(await asyncio.gather(*(client.call("things.work") for _ in range(40)))) == 40


async def test_a_worker_that_cannot_declare_one_of_its_queues_takes_nothing_from_the_others(place: Place) -> None:
    good, runs = working(place, "good")
    bad, _ = working(place, "bad")
    topology = Topology(place.namespace)
    other = Queue(topology.request_queue("bad", place.queue_type).name, durable=True, auto_delete=True)
    async with declared(place, good), Stranger(place, other), place.client() as client:
        call = asyncio.create_task(client.with_options(timeout=10).call("good.work"))
        await asyncio.sleep(0.2)
        worker = place.worker(good, bad)
        with pytest.raises(ConnectionError):
            await worker.start()
        assert (runs, worker.in_flight) == ([], 0)
        async with place.worker(good):
            assert await call == "good"


async def test_a_worker_whose_start_is_cancelled_leaves_nothing_running(place: Place) -> None:
    service, began, ended = place.service(), asyncio.Event(), asyncio.Event()

    @service.method
    async def work() -> None:
        began.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    worker = place.worker(service)
    start = worker._transport.start

    async def start_and_wait(*args: Any) -> None:
        await start(*args)
        await asyncio.get_running_loop().create_future()

    worker._transport.start = start_and_wait  # type: ignore[method-assign]
    starting = asyncio.create_task(worker.start())
    async with place.client() as client:
        call = asyncio.create_task(client.with_options(timeout=10).call("things.work"))
        while not began.is_set():
            await asyncio.sleep(0.01)
            if call.done():
                call = asyncio.create_task(client.with_options(timeout=10).call("things.work"))
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert ended.is_set()
        assert worker.in_flight == 0
        error = await fails(call)
        assert isinstance(error, OutcomeUnknown)
        assert error.executed == "maybe"


def test_a_signal_that_is_no_outcome_carries_its_reason() -> None:
    from rpcq.calls.outcomes import CallEvent, event_of_reply

    body = b'{"code": "ABORTED", "executed": "maybe", "message": "it was redelivered"}'
    assert event_of_reply(replies.Reply(b"1", replies.ERROR, body)) == (CallEvent.WORKER_LOST, "it was redelivered")
