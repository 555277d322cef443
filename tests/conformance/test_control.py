"""What workers say of themselves over the control exchange, and replies through an exchange of their own."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from decimal import Decimal

import pytest

from places import Place
from rpcq import CallTimeout, ClosedError, ConfigurationError, Context, DomainError, Service
from rpcq.control import MethodInfo, ServiceInfo, WorkerInfo, WorkerStats


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


async def stats(client, service: str | None = None) -> list[WorkerStats]:
    return [found async for found in client.stats(service, wait=0.5)]


async def test_a_worker_describes_itself_its_services_and_their_methods(place: Place) -> None:
    async with place.worker(shop(place), name="one", prefetch=7), place.client() as client:
        (worker,) = await workers(client, "shop", wait=0.5)
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
        assert {worker.name for worker in await workers(client, "shop", wait=0.5)} == {"one", "two"}
        assert {worker.name for worker in await workers(client, "other", wait=0.5)} == {"two", "three"}
        assert {worker.name for worker in await workers(client, wait=0.5)} == {"one", "two", "three"}
        assert client._calls.unmatched == 0


async def test_asking_ends_at_once_where_nobody_is_there(place: Place) -> None:
    async with place.client() as client, asyncio.timeout(5):
        assert await workers(client, "nobody", wait=60) == []
        assert await workers(client, wait=60) == []
        assert not client._control._asked


async def test_who_needs_no_more_answers_may_stop_listening(place: Place) -> None:
    async with place.worker(shop(place)), place.client() as client, asyncio.timeout(5):
        answers = client.workers("shop", wait=60)
        assert (await anext(answers)).name == "rpcq"
        await answers.aclose()
        assert not client._control._asked


async def test_asking_while_the_client_closes_ends(place: Place) -> None:
    client = place.client()
    async with place.worker(shop(place)):
        await client.connect()
        asking = asyncio.create_task(workers(client, "shop", wait=60))
        await asyncio.sleep(0.1)
        await client.close()
        async with asyncio.timeout(5):
            assert len(await asking) == 1
    with pytest.raises(ClosedError):
        await workers(client)


async def test_a_name_that_no_service_can_have_is_refused(place: Place) -> None:
    async with place.client() as client:
        with pytest.raises(ConfigurationError, match="the service is called"):
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
        async with asyncio.timeout(5):
            while True:
                (found,) = await stats(client, "things")
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
        assert [worker.name for worker in await workers(client, "shop", wait=0.5)] == ["rpcq"]
        await client.wait_for_service("shop", timeout=5)


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
        # The broker tells a tenth of the timeout before the client's own clock would: time enough on a busy machine.
        with pytest.raises(CallTimeout, match="expired in the queue"):
            await client.with_options(timeout=3).call("shop.price", article="a")


async def test_a_caller_that_does_not_name_the_reply_exchange_is_not_served(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async with place.worker(shop(place), reply_exchange=f"{place.namespace}.replies"), place.client() as client:
        with pytest.raises(CallTimeout):
            await client.with_options(timeout=0.5).call("shop.price", article="a")
    assert any("reply_exchange" in str(record.__dict__.get("cause")) for record in caplog.records)
