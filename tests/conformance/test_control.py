"""What workers say of themselves over the control exchange, and replies through an exchange of their own."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from decimal import Decimal

import pytest

from rpcq import CallTimeout, ClosedError, ConfigurationError, Context, DomainError, Service
from rpcq.control import MOST_ANSWERS, MOST_QUESTIONS, MethodInfo, ServiceInfo, WorkerInfo
from rpcq.transport.base import Message, Outgoing
from rpcq.wire import control
from rpcq.wire.bodies import dumps
from rpcq.wire.properties import Properties, encode
from support.late import let_others_speak_first
from support.load import READY, first, until
from support.places import Place

QUEUE_TYPE_MATTERS = False


class OutOfStock(DomainError):
    """Nothing is left."""


def shop(place: Place) -> Service:
    service = place.service("shop", errors=[OutOfStock])

    @service.method(idempotent=True, timeout=2.5)
    async def price(article: str, count: int = 1) -> Decimal:
        """What it costs.

        All of it.
        """
        return Decimal(count)

    @service.method
    async def order(context: Context, *articles: str):  # type: ignore[no-untyped-def]
        return len(articles)

    return service


async def workers(client, service: str | None = None, **options: float) -> list[WorkerInfo]:
    return [worker async for worker in client.workers(service, **options)]


async def names_of(client, service: str | None, count: int) -> set[str]:
    """The names of the workers that answer: of the first `count`, and of those that answer within a moment more."""
    found = [*await first(client.workers(service, wait=READY), count), *await workers(client, service, wait=0.3)]
    return {worker.name for worker in found}


async def test_a_worker_describes_itself_its_services_and_their_methods(place: Place) -> None:
    async with place.worker(shop(place), name="one", prefetch=7), place.client() as client:
        (worker,) = await first(client.workers("shop", wait=READY), 1)
    queue = f"{place.namespace}.{'once' if place.queue_type == 'quorum' else 'req'}.shop"
    assert worker.services == (
        ServiceInfo(
            name="shop",
            queue=queue,
            queue_type=place.queue_type,
            methods=(
                MethodInfo(
                    name="price",
                    signature="(article: str, count: int = 1) -> decimal.Decimal",
                    doc="What it costs.\n\nAll of it.",
                    idempotent=True,
                    timeout=2.5,
                    errors=("out_of_stock",),
                ),
                MethodInfo(name="order", signature="(*articles: str) -> Any", errors=("out_of_stock",)),
            ),
        ),
    )
    assert (worker.name, worker.host, worker.pid, worker.prefetch) == ("one", socket.gethostname(), os.getpid(), 7)


async def test_a_worker_of_a_version_that_does_not_describe_jobs_is_read(place: Place) -> None:
    method = {"name": "price", "signature": "()", "doc": "", "idempotent": False, "timeout": None, "errors": []}
    services = [{"name": "shop", "queue": "q", "queue_type": "classic", "methods": [method]}]
    old = {"name": "old", "host": "h", "pid": 1, "version": "0.1", "prefetch": 5, "services": services}
    async with place.worker(shop(place)) as worker, place.client() as client:
        worker._answerer._answers[control.DESCRIBE] = lambda: dumps(old)
        (found,) = await first(client.workers("shop", wait=READY), 1)
    assert (found.name, found.job_prefetch) == ("old", 0)
    assert found.services == (ServiceInfo("shop", "q", "classic", (MethodInfo("price", "()"),)),)
    assert (found.services[0].jobs, found.services[0].job_queue) == ((), "")


async def test_every_worker_answers_for_itself_and_only_those_of_the_service_are_asked(place: Place) -> None:
    other = place.service("other")

    @other.method
    async def work() -> None: ...

    async with (
        place.worker(shop(place), name="one"),
        place.worker(shop(place), other, name="two"),
        place.worker(other, name="three"),
        place.client() as client,
    ):
        assert await names_of(client, "shop", 2) == {"one", "two"}
        assert await names_of(client, "other", 2) == {"two", "three"}
        assert await names_of(client, None, 3) == {"one", "two", "three"}
        assert client._calls.unmatched == 0


async def test_asking_ends_at_once_where_nobody_is_there(place: Place) -> None:
    async with place.client() as client, asyncio.timeout(5):
        assert await workers(client, "nobody", wait=60) == []
        assert await workers(client, wait=60) == []
        assert not client._control._questions


async def test_who_needs_no_more_answers_may_stop_listening(place: Place) -> None:
    async with place.worker(shop(place)), place.client() as client, asyncio.timeout(5):
        answers = client.workers("shop", wait=60)
        assert (await anext(answers)).name == "rpcq"
        await answers.aclose()
        assert not client._control._questions


async def test_asking_while_the_client_closes_ends(place: Place) -> None:
    client, found = place.client(), []

    async def ask() -> None:
        async for worker in client.workers("shop", wait=60):
            found.append(worker)  # noqa: PERF401 - as they come

    async with place.worker(shop(place)):
        await client.connect()
        asking = asyncio.create_task(ask())
        await until(lambda: found)
        await client.close()
        async with asyncio.timeout(5):
            await asking
        assert len(found) == 1
    with pytest.raises(ClosedError):
        await workers(client)


async def test_a_name_that_no_service_can_have_is_refused(place: Place) -> None:
    async with place.client() as client:
        with pytest.raises(ConfigurationError, match="the name of a service must be"):
            await workers(client, "*")


async def test_stats_count_what_a_worker_did(place: Place) -> None:
    service = place.service()
    release = asyncio.Event()

    @service.method
    async def wait() -> None:
        await release.wait()

    @service.method
    async def work() -> None: ...

    async with place.worker(service, name="one"), place.client() as client:
        for _ in range(3):
            await client.call("things.work")
        held = [asyncio.create_task(client.call("things.wait")) for _ in range(2)]
        async with asyncio.timeout(READY):
            while True:
                (found,) = await first(client.stats("things", wait=READY), 1)
                if (found.in_flight, found.finished) == (2, 3):
                    break
        assert found.name == "one"
        assert found.uptime > 0
        assert abs(found.time_ms - time.time() * 1000) < 5000
        assert (found.refused_redeliveries, found.expired_on_arrival, found.unroutable_replies) == (0, 0, 0)
        release.set()
        await asyncio.gather(*held)


# Replies through an exchange of their own.


async def test_replies_go_through_a_reply_exchange_where_one_is_named(place: Place) -> None:
    exchange = f"{place.namespace}.replies"
    service = shop(place)
    async with (
        place.worker(service, reply_exchange=exchange),
        place.client(reply_exchange=exchange) as client,
        place.client(reply_exchange=exchange) as other,
    ):
        assert client._sender.encoder is not None
        assert client._sender.encoder.reply_to.startswith(f"{place.namespace}.reply.".encode())
        answers = await asyncio.gather(
            *(one.call("shop.price", article="a", count=i) for i in range(50) for one in (client, other))
        )
        assert answers == [str(i) for i in range(50) for _ in range(2)]
        assert await names_of(client, "shop", 1) == {"rpcq"}
        await client.wait_for_service("shop", timeout=READY)


async def test_a_reply_queue_has_another_name_after_a_cut_and_is_bound_again(place: Place) -> None:
    exchange = f"{place.namespace}.replies"
    async with (
        place.worker(shop(place), reply_exchange=exchange) as worker,
        place.client(reply_exchange=exchange) as client,
    ):
        before = client._sender.encoder
        await place.cut(client, worker)
        async with asyncio.timeout(10):
            while client._sender.encoder in (None, before):  # noqa: ASYNC110 - what is waited for sets no event
                await asyncio.sleep(0.01)
        assert client._sender.encoder is not None
        assert before is not None
        assert client._sender.encoder.reply_to != before.reply_to
        await client.wait_for_service("shop", timeout=10)
        assert await client.call("shop.price", article="a", count=3) == "3"


async def test_a_request_that_expires_is_told_past_the_reply_exchange(place: Place) -> None:
    exchange = f"{place.namespace}.replies"
    async with place.client(reply_exchange=exchange) as client:
        async with place.worker(shop(place), reply_exchange=exchange):
            pass  # the queue is there from now on, and nobody serves it
        let_others_speak_first(client)
        with pytest.raises(CallTimeout, match="expired in the queue"):
            await client.with_options(timeout=1).call("shop.price", article="a")


async def test_a_caller_that_does_not_name_the_reply_exchange_is_not_served(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async with place.worker(shop(place), reply_exchange=f"{place.namespace}.replies"), place.client() as client:
        with pytest.raises(CallTimeout):
            await client.with_options(timeout=0.5).call("shop.price", article="a")
    assert any("reply_exchange" in str(record.__dict__.get("cause")) for record in caplog.records)


# Peers that ask too much.


@pytest.mark.long
async def test_a_worker_has_few_answers_on_the_way_however_much_is_asked(place: Place) -> None:
    async with place.worker(shop(place)) as worker, place.client() as client:
        transport, most = worker._transport, 0
        publish = transport.publish

        def watched(message: Outgoing) -> None:
            nonlocal most
            publish(message)
            most = max(most, worker._answerer._unconfirmed)

        transport.publish = watched  # type: ignore[method-assign]
        # Each is answered: none of them is over the limit of questions.
        await asyncio.gather(*(first(client.workers("shop", wait=READY), 1) for _ in range(300)))
        assert most == MOST_ANSWERS
        await until(lambda: (worker._answerer._unconfirmed, len(worker._answerer._questions)) == (0, 0))
        asked = [worker._answerer.answer(b"ping", b"amq.gen-gone", b"%d" % it) for it in range(3 * MOST_QUESTIONS)]
        assert all(asked)
        assert len(worker._answerer._questions) <= MOST_QUESTIONS
        await client.wait_for_service("shop", timeout=10)


@pytest.mark.long
async def test_a_description_that_does_not_fit_leaves_its_docs_out_and_then_more(place: Place) -> None:
    async def methods(most: int) -> list[tuple[str, str, str]]:
        service = place.service("shop")

        async def long(article: int = 1) -> int:
            return article

        long.__doc__ = "word " * 400
        for number in range(20):
            service.method(name=f"m{number}")(long)
        async with place.worker(service, max_body=most), place.client() as client:
            (worker,) = await first(client.workers("shop", wait=READY), 1)
            return [(it.name, it.signature, it.doc[:4]) for it in worker.services[0].methods]

    names, signature = [f"m{number}" for number in range(20)], "(article: int = 1) -> int"
    assert await methods(100_000) == [(name, signature, "word") for name in names]
    assert await methods(4_000) == [(name, signature, "") for name in names]
    assert await methods(2_300) == [(name, "", "") for name in names]
    assert await methods(1_000) == []


async def test_an_answer_that_is_larger_than_the_client_takes_is_named(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async with place.worker(shop(place)), place.client(max_body=100) as client:
        while not any("larger than this client's max_body" in record.message for record in caplog.records):
            assert await workers(client, "shop", wait=0.5) == []


async def test_a_refused_request_that_wants_no_reply_is_logged_but_not_each(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async with place.worker(shop(place)) as worker, place.client() as client:
        properties = encode(Properties(type=b"steal"))
        for _ in range(200):
            exchange = client.topology.requests.name.encode()
            client._transport.publish(Message(exchange, b"shop", b"", properties, b"{}", lambda _: None))
        async with asyncio.timeout(10):
            while worker.counts()["finished"] < 200:  # noqa: ASYNC110 - what is waited for sets no event
                await asyncio.sleep(0.01)
    told = [record for record in caplog.records if "wants no reply" in record.message]
    assert 1 <= len(told) <= 10
    assert {record.code for record in told} == {"UNIMPLEMENTED"}  # type: ignore[attr-defined]
