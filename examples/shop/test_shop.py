"""Tests of the shop without a broker: its services, killed and failing, in this process and on files of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import delete

from examples.shop import analytics, books, inventory, notification, orders, outside, payment, shipping
from examples.shop.app import create_app
from examples.shop.events import NotificationSent, OrderCancelled, PaymentProcessed, PaymentRefunded
from examples.shop.orders import NewOrder, Order, place
from examples.shop.setup import SERVICES, create_tables
from examples.shop.undoing import RETRY
from rpcq import Worker
from rpcq.observability.tracing import Tracing
from rpcq.outbox import Outbox, metadata
from rpcq.testing import Running, World, Worlds

MODULES = (orders, payment, inventory, shipping, notification)
TEA = NewOrder(customer="ada@example.org", article="tea", count=2)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(spans: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return Tracing(tracer_provider=provider)


@pytest.fixture(autouse=True)
async def shop(monkeypatch: pytest.MonkeyPatch, tracing: Tracing, _rpcq_place: Any) -> AsyncIterator[None]:
    """Empty tables, and outboxes that write for the namespace of this test."""
    for module in MODULES:
        monkeypatch.setattr(module, "outbox", Outbox(module.engine, observers=[tracing]))
    monkeypatch.setattr(outside, "TAKES", 0)
    every = (*MODULES, analytics, outside)
    await create_tables()
    yield
    for module in every:
        async with module.engine.begin() as connection:
            for table in (*module.Base.metadata.sorted_tables, *(metadata.sorted_tables if module != outside else ())):
                await connection.execute(delete(table))
        await module.engine.dispose()


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(50):
        while not await condition():  # noqa: ASYNC110 - a database
            await asyncio.sleep(0.05)


async def ended(order_id: str) -> Order:
    """The order, once it has ended and the customer knows."""

    async def is_told() -> bool:
        async with orders.sessions() as db:
            found = await db.get_one(Order, order_id)
        return found.told and found.state in ("done", "cancelled")

    await until(is_told)
    async with orders.sessions() as db:
        return await db.get_one(Order, order_id)


async def settled(world: World) -> None:
    """Nothing is in an outbox, or under way."""

    async def is_settled() -> bool:
        waiting = [(await module.outbox.depth()).waiting for module in MODULES]
        await world.settled()
        return not sum(waiting) and not sum([(await module.outbox.depth()).waiting for module in MODULES])

    await until(is_settled)


async def balanced() -> bool:
    return not (await books.read()).faults()


async def test_an_order_is_paid_reserved_shipped_and_told_by_services_that_do_not_know_each_other(
    rpcq_running: Running,
) -> None:
    async with rpcq_running(*SERVICES):
        order = await ended(await place(TEA))
        assert (order.state, order.why, order.cents) == ("done", "", 900)
        await until(balanced)
    found = await books.read()
    assert (found.charged, found.reserved, found.parcels, found.mails) == (1, 1, 1, 1)
    assert found.facts == {
        "order.placed": 1,
        "payment.processed": 1,
        "inventory.reserved": 1,
        "order.shipped": 1,
        "notification.sent": 1,
    }


@pytest.mark.parametrize(
    ("new", "why", "undone"),
    [
        ({"card": outside.BAD_CARD}, "the card company refuses the card", (0, 0, 0, 0)),
        ({"article": "truffles", "count": 10}, "there is not enough truffles left", (1, 1, 0, 0)),
        ({"country": "Atlantis"}, "no carrier goes to Atlantis", (1, 1, 1, 1)),
    ],
)
async def test_what_was_done_for_an_order_is_undone_if_a_later_step_fails_for_good(
    rpcq_running: Running, new: dict[str, Any], why: str, undone: tuple[int, int, int, int]
) -> None:
    async with rpcq_running(*SERVICES):
        order = await ended(await place(TEA.model_copy(update=new)))
        assert (order.state, order.why) == ("cancelled", why)
        await until(balanced)
    found = await books.read()
    assert (found.charged, found.refunded, found.reserved, found.released) == undone
    assert (found.parcels, found.mails) == (0, 1)


async def test_a_step_that_fails_at_each_attempt_is_undone_and_no_dead_letter(
    rpcq_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    async def book(order_id: str, country: str) -> None:
        tries.append(order_id)
        raise ConnectionError("the carrier does not answer")

    monkeypatch.setattr(outside, "book", book)
    async with rpcq_world(*SERVICES) as world:
        order_id = await place(TEA)
        await settled(world)
        await world.advance(hours=1)
        await settled(world)
        order = await ended(order_id)
        assert world.dead() == []
        assert len(world.published(OrderCancelled)) == 1
    assert (order.state, order.why) == ("cancelled", "ConnectionError at each of 6 attempts")
    assert len(tries) == RETRY.max_attempts


async def test_orders_are_taken_while_payment_is_down_and_each_is_charged_once_when_it_is_back(
    rpcq_world: Worlds,
) -> None:
    async with rpcq_world(*(it for it in SERVICES if it is not payment.payment)) as world:
        await (await world.start_worker(payment.payment)).stop()  # it was there, and has its queues
        taken = [await place(TEA) for _ in range(5)]
        await until(lambda: _empty(orders.outbox))
        assert (await books.read()).orders == {"placed": 5}
        assert len(world.waiting(payment.charge)) == 5
        await world.start_worker(payment.payment)
        assert {(await ended(it)).state for it in taken} == {"done"}
        await settled(world)
        assert len(world.published(PaymentProcessed)) == 5
    assert (await books.read()).faults() == []


async def _empty(outbox: Outbox) -> bool:
    return (await outbox.depth()).waiting == 0


async def test_a_payment_that_is_killed_after_it_has_charged_does_not_charge_again(
    rpcq_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    charge, asked = outside.charge, []

    async with rpcq_world(*SERVICES) as world:

        async def killed(order_id: str, card: str, cents: int) -> None:
            await charge(order_id, card, cents)
            asked.append(order_id)
            if len(asked) == 1:
                world.crash()

        monkeypatch.setattr(outside, "charge", killed)
        order_id = await place(TEA)
        assert (await ended(order_id)).state == "done"
        await settled(world)
    assert asked == [order_id, order_id]
    found = await books.read()
    assert (found.outside["charge"], found.charged, found.faults()) == (1, 1, [])


async def test_an_event_that_comes_twice_is_done_once(rpcq_world: Worlds) -> None:
    async with rpcq_world(*SERVICES) as world:
        order_id = await place(TEA.model_copy(update={"country": "Atlantis"}))
        await ended(order_id)
        await settled(world)
        for event in world.published():
            again = world.client.with_options(idempotency_key=event.key)
            for kind in (PaymentProcessed, PaymentRefunded, NotificationSent):
                if event.name == kind.event_name:
                    await again.publish(kind(**event.data))
        await settled(world)
    found = await books.read()
    assert (found.charged, found.refunded, found.reserved, found.released, found.mails) == (1, 1, 1, 1, 1)
    assert found.faults() == []


async def test_a_mail_that_the_provider_refuses_is_a_dead_letter_and_the_order_is_shipped(rpcq_world: Worlds) -> None:
    await outside.set_broken("mail", broken=True)
    async with rpcq_world(*SERVICES) as world:
        await place(TEA)
        await until(_has_parcel)
        await settled(world)
        (letter,) = world.dead(notification.tell)
        assert (letter.reason, letter.error) == ("gave_up", "the mail provider refuses our key")
    assert (await books.read()).orders == {"shipped": 1}


async def _has_parcel() -> bool:
    return (await books.read()).parcels == 1


async def test_events_that_come_late_do_not_take_an_order_back(rpcq_world: Worlds) -> None:
    async with rpcq_world(*SERVICES) as world:
        order_id = await place(TEA)
        await ended(order_id)
        late = PaymentProcessed(order_id=order_id, customer="ada", article="tea", count=2, country="Germany")
        await world.client.publish(late)
        await world.settled()
        assert (await ended(order_id)).state == "done"


async def test_links_of_spans_lead_from_the_web_request_to_the_last_service(
    rpcq_running: Running, tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    async with rpcq_running(), Worker(*SERVICES, observers=[tracing]):
        await ended(await place(TEA))
        await until(balanced)
    found = {span.context.span_id: span for span in spans.get_finished_spans() if span.context is not None}

    def before(span: ReadableSpan) -> ReadableSpan | None:
        """The span that this one came from: its parent, or what it has a link to."""
        came = [link.context.span_id for link in span.links] + ([span.parent.span_id] if span.parent else [])
        assert len(came) <= 1
        return found[came[0]] if came else None

    way: list[str] = []
    span: ReadableSpan | None = next(it for it in found.values() if it.name == "process orders.follow" and _last(it))
    while span is not None:
        way.insert(0, span.name)
        span = before(span)
    assert way == [
        "create order.placed",
        "process payment.charge",
        "create payment.processed",
        "process inventory.reserve",
        "create inventory.reserved",
        "process shipping.ship",
        "create order.shipped",
        "process notification.tell",
        "create notification.sent",
        "process orders.follow",
    ]


def _last(span: ReadableSpan) -> bool:
    return span.attributes is not None and span.attributes["rpcq.event"] == "notification.sent"


# On the web.


def user_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop")


async def test_an_order_is_taken_at_once_and_followed(rpcq_running: Running) -> None:
    app = create_app(watches=False)
    async with rpcq_running(*SERVICES), user_of(app) as user:
        taken = await user.post("/orders", json=TEA.model_dump())
        assert taken.status_code == 202
        await ended(taken.json()["id"])
        shown = (await user.get(f"/orders/{taken.json()['id']}")).json()
        assert (shown["state"], shown["what"], shown["told"]) == ("done", "2 tea", True)
        assert (await user.get("/orders/none")).status_code == 404
        state = (await user.get("/state")).json()
        assert (state["orders"], state["books"]["orders"], state["mail"]) == ([shown], {"done": 1}, True)


async def test_a_full_shop_asks_customers_to_come_again_and_takes_what_it_let_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("examples.shop.app.MOST", 1)
    go = asyncio.Event()

    async def slow(new: NewOrder) -> str:
        await go.wait()
        return await place(new)

    monkeypatch.setattr("examples.shop.app.place", slow)
    async with user_of(create_app(watches=False)) as user, asyncio.TaskGroup() as group:
        first = group.create_task(user.post("/orders", json=TEA.model_dump()))
        await asyncio.sleep(0.1)
        refused = await user.post("/orders", json=TEA.model_dump())
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        go.set()
        assert (await first).status_code == 202
        assert (await user.post("/orders", json=TEA.model_dump())).status_code == 202
    assert (await books.read()).orders == {"placed": 2}


async def test_an_order_needs_neither_broker_nor_services(rpcq_running: Running) -> None:
    async with user_of(create_app(watches=False)) as user:  # not even a relay runs
        assert (await user.post("/orders", json=TEA.model_dump())).status_code == 202
        for wrong in ({"article": "unicorn"}, {"count": 0}, {"card": "none"}, {"customer": ""}):
            assert (await user.post("/orders", json=TEA.model_dump() | wrong)).status_code == 422
    assert (await books.read()).orders == {"placed": 1}
    assert (await orders.outbox.depth()).waiting == 1


async def test_another_site_may_order_and_kill_nothing(rpcq_running: Running) -> None:
    async with user_of(create_app(watches=False)) as user:
        elsewhere = {"sec-fetch-site": "cross-site"}
        for path in ("/orders", *(f"/services/payment/{it}" for it in ("kill", "start", "replay")), "/mail/refuse"):
            assert (await user.post(path, json=TEA.model_dump(), headers=elsewhere)).status_code == 403
        assert (await user.post("/services/none/kill")).status_code == 404
        assert (await user.post("/mail/maybe")).status_code == 404
    assert (await books.read()).orders == {}
