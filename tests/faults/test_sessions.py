"""What becomes of calls when connections do what connections do."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import pytest

from rpcq import CallTimeout, Client, OutcomeUnknown, Overloaded, Service, ServiceUnavailable, Worker
from support.broker import Broker
from support.load import Overdue
from support.proxy import proxy


def things() -> tuple[Service, asyncio.Semaphore]:
    service, started = Service("things"), asyncio.Semaphore(0)

    @service.method
    async def quick(x: int) -> int:
        return x

    @service.method
    async def sleep(seconds: float) -> None:
        started.release()
        await asyncio.sleep(seconds)

    return service, started


HEARTBEAT = 3
"""Seconds: the broker drops who says nothing for two of them, as this process does while it stands still."""

KEPT = 3 * (HEARTBEAT + 1) + 1.5
"""Seconds: longer than the broker, aiormq or the watchdog would wait in vain."""


async def come_back(client: Client, *, within: float = 15) -> None:
    """The next call succeeds."""
    assert await asyncio.wait_for(client.call("things.quick", x=5), within) == 5


async def test_a_reset_settles_pending_calls_at_once_and_the_next_call_succeeds(
    rabbitmq_url: str, namespace: str
) -> None:
    service, started = things()
    async with (
        Worker(service, url=rabbitmq_url, namespace=namespace, grace=0.1),
        proxy(rabbitmq_url) as between,
        Client(between.url, namespace=namespace) as client,
    ):
        calls = [asyncio.create_task(client.call("things.sleep", seconds=20)) for _ in range(50)]
        for _ in calls:
            await started.acquire()
        overdue = Overdue(4)
        between.reset()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, OutcomeUnknown)
            assert outcome.executed == "maybe"
        assert not overdue.is_so
        overdue.stop()
        await come_back(client)
        assert client.in_flight == 0


async def test_a_call_right_after_aiormq_closed_the_socket_ends_as_lost_and_the_next_call_succeeds(
    rabbitmq_url: str, namespace: str
) -> None:
    """aiormq does that where its tasks are cancelled, as they are when the event loop ends."""
    service, _ = things()
    async with (
        Worker(service, url=rabbitmq_url, namespace=namespace),
        Client(rabbitmq_url, namespace=namespace) as client,
    ):
        await come_back(client)
        socket: Any = client._transport._publishing._link.protocol._transport_  # type: ignore[attr-defined]
        call = asyncio.create_task(client.call("things.quick", x=1))
        socket.write_eof()
        socket.close()
        with pytest.raises(OutcomeUnknown) as caught:
            await call
        assert caught.value.executed == "maybe"
        await come_back(client)


async def test_a_lost_session_comes_back_at_the_next_host(rabbitmq_url: str, namespace: str) -> None:
    service, _ = things()
    async with (
        Worker(service, url=rabbitmq_url, namespace=namespace),
        proxy(rabbitmq_url) as first,
        proxy(rabbitmq_url) as second,
    ):
        at = urlsplit(second.url).netloc.rpartition("@")[2]
        parts = urlsplit(first.url)
        both = urlunsplit(parts._replace(netloc=f"{parts.netloc},{at}"))
        async with Client(both, namespace=namespace) as client:
            assert (len(first), len(second)) == (2, 0)
            first.reset()
            async with asyncio.timeout(15):
                while len(second) < 2:  # noqa: ASYNC110 - what is waited for sets no event
                    await asyncio.sleep(0.01)
            assert len(first) == 0
            await come_back(client)


async def test_a_peer_that_is_gone_without_a_word_is_noticed_within_two_heartbeats(
    rabbitmq_url: str, namespace: str
) -> None:
    service, started = things()
    async with (
        Worker(service, url=rabbitmq_url, namespace=namespace, grace=0.1),
        proxy(rabbitmq_url) as between,
        Client(between.url, namespace=namespace, heartbeat=2) as client,
    ):
        call = asyncio.create_task(client.call("things.sleep", seconds=20))
        await started.acquire()
        between.freeze()
        with pytest.raises(OutcomeUnknown, match="the connection to the broker was lost") as caught:
            await call
        # In these words after two heartbeats; aiormq alone would wait for three of them and three seconds.
        told = re.search(r"nothing came from the broker for ([\d.]+) s", str(caught.value))
        assert told is not None, caught.value
        assert float(told[1]) >= 2 * 2
        between.thaw()
        await come_back(client)


async def test_a_quiet_connection_is_kept_by_heartbeats(rabbitmq_url: str, namespace: str) -> None:
    service, _ = things()
    async with (
        Worker(service, url=rabbitmq_url, namespace=namespace, heartbeat=HEARTBEAT) as worker,
        Client(rabbitmq_url, namespace=namespace, heartbeat=HEARTBEAT) as client,
    ):
        links = [
            session._link  # type: ignore[union-attr]
            for end in (worker, client)
            for session in (end._transport._consuming, end._transport._publishing)  # type: ignore[attr-defined]
        ]
        await client.call("things.sleep", seconds=KEPT)
        assert all(link is not None and link.protocol.lost is None for link in links)


@pytest.mark.long
async def test_a_busy_connection_is_not_given_up_though_aiormq_sees_none_of_its_messages(
    rabbitmq_url: str, namespace: str
) -> None:
    """aiormq gives up after three heartbeats without a frame, and the fast channel takes them all."""
    service, _ = things()
    async with (
        Worker(service, url=rabbitmq_url, namespace=namespace, heartbeat=HEARTBEAT) as worker,
        Client(rabbitmq_url, namespace=namespace, heartbeat=HEARTBEAT) as client,
    ):
        link = worker._transport._consuming._link  # type: ignore[attr-defined]
        until = time.monotonic() + KEPT
        while time.monotonic() < until:
            await client.call("things.quick", x=1)
        assert link.protocol.lost is None
        assert worker._transport._consuming._link is link  # type: ignore[attr-defined]


async def test_garbage_from_the_broker_ends_the_session_and_no_call_gets_a_wrong_answer(
    rabbitmq_url: str, namespace: str
) -> None:
    service, _ = things()
    async with (
        Worker(service, url=rabbitmq_url, namespace=namespace),
        proxy(rabbitmq_url) as between,
        Client(between.url, namespace=namespace) as client,
    ):
        await come_back(client)

        def spoil(data: bytes) -> bytes:
            return data[:-1] + b"\x00" if len(data) > 60 else data  # the end of a frame, of a reply or a confirm

        between.from_broker = spoil
        calls = [asyncio.create_task(client.with_options(timeout=5).call("things.quick", x=x)) for x in range(20)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        between.from_broker = lambda data: data
        for x, outcome in enumerate(outcomes):
            assert outcome == x or isinstance(outcome, OutcomeUnknown | ServiceUnavailable | CallTimeout)
        assert any(isinstance(outcome, OutcomeUnknown) for outcome in outcomes)
        await come_back(client)


async def test_a_blocked_broker_is_an_error_in_bounded_time_and_calls_go_on_afterwards(
    broker: Broker, rabbitmq_url: str, namespace: str
) -> None:
    if not broker.can_ctl:
        pytest.skip("RPCQ_TEST_URL gives no rabbitmqctl, without which no alarm can be raised")
    service, _ = things()
    async with (
        Worker(service, url=rabbitmq_url, namespace=namespace),
        Client(rabbitmq_url, namespace=namespace) as client,
    ):
        await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            # The broker says that it is blocked only to those that publish: what told it is not known to have run.
            outcomes = []
            while not outcomes or not isinstance(outcomes[-1], Overloaded):
                (outcome,) = await asyncio.gather(
                    client.with_options(timeout=1).call("things.quick", x=1), return_exceptions=True
                )
                outcomes.append(outcome)
            for outcome in outcomes[:-1]:
                assert outcome == 1 or (isinstance(outcome, CallTimeout) and outcome.executed == "maybe")
            assert outcomes[-1].executed == "no"
        finally:
            await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0.6")
        await come_back(client)


async def test_amqps_never_speaks_in_plain_text(namespace: str) -> None:
    first: asyncio.Queue[bytes] = asyncio.Queue()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first.put_nowait(await reader.read(100))
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ConnectionError, match=r"TLS|amqps"):
        await Client(f"amqps://guest:secret@127.0.0.1:{port}/", namespace=namespace).connect()
    said = await first.get()
    assert said[:2] == b"\x16\x03"  # a TLS handshake record
    assert b"AMQP" not in said
    assert b"secret" not in said
    server.close()
    await server.wait_closed()


class Swallowing:
    """The `close` of a channel, which in aiormq may swallow a cancellation, or make another error of it: one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
        self.began = asyncio.Event()
        close = aio_pika.Channel.close

        async def swallow(channel: Any, *args: Any) -> None:
            if not self.began.is_set():
                self.began.set()
                try:
                    await asyncio.sleep(10)
                except asyncio.CancelledError:
                    if error is not None:
                        raise error from None
            await close(channel, *args)

        monkeypatch.setattr(aio_pika.Channel, "close", swallow)


swallowing = pytest.mark.parametrize("error", [None, RuntimeError("aiormq's")], ids=["swallowed", "another error"])


@swallowing
async def test_closing_while_a_session_comes_back_ends_whatever_becomes_of_the_cancellation(
    rabbitmq_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    async with Client(rabbitmq_url, namespace=namespace) as client:
        closing = Swallowing(monkeypatch, error)
        client._transport._publishing._link.protocol.abort()  # type: ignore[attr-defined]
        await closing.began.wait()
        await asyncio.wait_for(client.close(), 5)
    assert len(asyncio.all_tasks()) == 1


@swallowing
async def test_who_gives_up_connecting_has_given_up_whatever_becomes_of_the_cancellation(
    rabbitmq_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    closing = Swallowing(monkeypatch, error)
    client = Client(rabbitmq_url, namespace=namespace)
    connecting = asyncio.create_task(client.connect())
    await closing.began.wait()
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    assert not client.connected
    assert len(asyncio.all_tasks()) == 1
