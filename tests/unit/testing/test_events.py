"""Events in a world whose time a test moves."""

from typing import Any

import pytest

from rpcq import AnyEvent, ConfigurationError, Context, Event, GiveUp, InvalidParams, Retry, RetryLater, Service
from rpcq.testing import FakeService, PublishedEvent, world


class OrderCreated(Event, name="world.order.created"):
    order_id: str


class OrderPaid(Event, name="world.order.paid", version=2):
    order_id: str


class Renamed(Event, name="world.order.created", version=2):
    id: str


@pytest.fixture
def shipping() -> Service:
    service = Service("shipping")

    @service.on(OrderCreated, retry=Retry(max_attempts=3, initial_backoff=600, max_backoff=600))
    async def ship(event: OrderCreated, context: Context) -> None:
        if event.order_id == "bad":
            raise ValueError("no such order")
        if context.attempt == 1:
            raise RetryLater(3600)

    @service.on("world.order.*")
    async def audit(event: AnyEvent) -> None: ...

    return service


async def test_what_was_published_can_be_asked_for_by_class_and_at_all(shipping: Service) -> None:
    async with world(shipping) as w:
        first = await w.client.with_options(metadata={"x-tenant": "t1"}).publish(OrderCreated(order_id="7"))
        await w.client.publish(OrderPaid(order_id="7"))
        await w.settled()
        assert w.published(OrderCreated) == [OrderCreated(order_id="7")]
        assert w.published(OrderPaid) == [OrderPaid(order_id="7")]
        assert w.published(Renamed) == []
        assert w.published()[0] == PublishedEvent(
            id=first.id,
            name="world.order.created",
            version=1,
            key=first.key,
            data={"order_id": "7"},
            metadata={"x-tenant": "t1"},
            heard=True,
        )


async def test_an_event_that_a_job_publishes_is_seen_although_nobody_listens() -> None:
    orders = Service("orders")

    @orders.job
    async def create(order_id: str) -> None:
        await w.client.publish(OrderCreated(order_id=order_id))

    async with world(orders) as w:
        await w.client.send(create, order_id="7")
        await w.settled()
        assert [(it.name, it.heard) for it in w.published()] == [("world.order.created", False)]


async def test_a_subscription_waits_and_dies_by_itself_and_time_moves_it(shipping: Service) -> None:
    async with world(shipping) as w:
        ship = shipping.subscriptions["ship"].handler
        good = await w.client.publish(OrderCreated(order_id="7"))
        await w.settled()
        (waiting,) = w.waiting()
        assert (waiting.id, waiting.job, waiting.event) == (good.id, "shipping.ship", "world.order.created")
        assert waiting.params == {"order_id": "7"}
        assert w.waiting(ship) == w.waiting("shipping.ship") == w.waiting(shipping) == [waiting]
        assert w.waiting("shipping.audit") == []
        await w.advance(hours=2)
        assert w.waiting() == []
        bad = await w.client.publish(OrderCreated(order_id="bad"))
        await w.advance(hours=2)
        (dead,) = w.dead("shipping.ship")
        assert (dead.id, dead.job, dead.event, dead.reason) == (
            bad.id,
            "shipping.ship",
            "world.order.created",
            "attempts",
        )
        assert (dead.attempt, dead.params) == (3, {"order_id": "bad"})
        with pytest.raises(ConfigurationError, match="service 'shipping' must have the job; it has audit, ship"):
            w.dead("shipping.nobody")


async def test_a_version_that_nobody_reads_waits_for_a_deploy_and_is_dead_after_a_quarter_of_an_hour(
    shipping: Service,
) -> None:
    newer = Service("shipping")
    shipped = []

    @newer.on(OrderCreated, Renamed)
    async def ship(event: OrderCreated | Renamed) -> None:
        shipped.append(event)

    async with world(shipping) as w:
        await w.client.publish(Renamed(id="7"))
        await w.advance(minutes=3)
        assert [it.job for it in w.waiting()] == ["shipping.ship"]
        await w.kill_worker()
        await w.start_worker(newer)
        await w.advance(minutes=10)
        assert shipped == [Renamed(id="7")]
        assert w.dead() == []
    async with world(shipping) as w:
        await w.client.publish(Renamed(id="8"))
        await w.advance(minutes=15)
        assert [(it.job, it.reason, it.executed) for it in w.dead()] == [("shipping.ship", "unsupported_version", "no")]


async def test_a_subscription_that_a_deploy_dropped_keeps_its_events_until_somebody_takes_them(
    shipping: Service,
) -> None:
    newer = Service("shipping")
    seen = []

    @newer.on("world.#")
    async def audit(event: AnyEvent) -> None:
        seen.append(event.name)
        if event.name == "world.order.paid":
            raise GiveUp("no")

    async with world(shipping) as w:
        await w.kill_worker()
        await w.start_worker(newer)
        await w.client.publish(OrderCreated(order_id="7"))
        await w.client.publish(OrderPaid(order_id="7"))
        await w.advance(seconds=1)
        assert seen == ["world.order.created", "world.order.paid"]
        assert [(it.job, it.due) for it in w.waiting()] == [("shipping.ship", None)]
        assert [it.job for it in w.dead()] == ["shipping.audit"]
        await w.start_worker(shipping)
        await w.advance(hours=2)
        assert w.waiting() == []


# Fakes that subscribe.


async def test_a_fake_hears_each_event_once_however_many_of_its_topics_take_it() -> None:
    fake = FakeService("shipping").hears(OrderCreated).hears("world.order.*", OrderCreated)
    assert repr(fake) == "<FakeService 'shipping': hears>"
    async with world(fake) as w:
        keyed = w.client.with_options(idempotency_key="k7", metadata={"x-tenant": "t1"})
        published = await keyed.publish(OrderCreated(order_id="7"))
        paid = await w.client.publish(OrderPaid(order_id="7"))
        await w.settled()
        assert fake.heard(OrderCreated) == [OrderCreated(order_id="7")]
        assert fake.heard(OrderPaid) == [OrderPaid(order_id="7")]
        assert fake.heard(Renamed) == []
        first, second = fake.heard()
        assert first.event == OrderCreated(order_id="7")
        assert (first.context.correlation_id, first.context.idempotency_key) == (published.id, "k7")
        assert (first.context.metadata, first.context.attempt, first.context.state) == ({"x-tenant": "t1"}, 1, None)
        assert second.event == AnyEvent(paid.id, "world.order.paid", 2, {"order_id": "7"})
        assert w.published(OrderCreated) == fake.heard(OrderCreated)


async def test_a_fake_reads_other_versions_and_buries_what_does_not_fit_as_the_real_service_does() -> None:
    fake = FakeService("shipping").hears(OrderCreated)
    async with world(fake) as w:
        await w.client.publish(Renamed(id="8"))
        await w.advance(minutes=15)
        assert fake.heard() == []
        assert [(it.job, it.reason) for it in w.dead(fake)] == [("shipping.hears", "unsupported_version")]


async def test_what_a_pattern_took_is_read_by_a_class_only_if_it_fits() -> None:
    class Odd(Event, name="world.odd"):
        number: int

    fake = FakeService("shipping").hears("#")
    async with world(fake) as w:
        await w.client.publish(Odd(number=1))
        await w.settled()

    class NowOtherwise(Event, name="world.odd"):
        number: int
        unit: str

    assert fake.heard(Odd) == [Odd(number=1)]
    with pytest.raises(InvalidParams, match="unit"):
        fake.heard(NowOtherwise)


async def test_a_fake_hears_beside_jobs_and_calls_and_goes_on_from_one_place_to_the_next() -> None:
    fake = FakeService("shipping").answers("count", 3).takes("ship").hears("world.#")
    for number in range(2):
        async with world(fake) as w:
            assert await w.client.call("shipping.count") == 3
            await w.client.send("shipping.ship", order_id=str(number))
            await w.client.publish(OrderCreated(order_id=str(number)))
            await w.settled()
    assert [it.params["order_id"] for it in fake.received] == ["0", "1"]
    assert [it.order_id for it in fake.heard(OrderCreated)] == ["0", "1"]


class NoName(Event):
    """A base of others."""


@pytest.mark.parametrize(
    ("topics", "message"),
    [
        ((), r"hears must be given events, as in hears\(OrderCreated\)"),
        (("order..created",), "a pattern must be words with dots"),
        ((NoName,), "hears must be given classes of events with a name; got NoName"),
        ((int,), "hears must be given classes of events; got int"),
        ((3,), r"hears must be given classes of events, or patterns, as in hears\(OrderCreated\)"),
    ],
)
def test_what_is_no_topic_is_refused_and_a_fake_keeps_what_it_had(topics: tuple[Any, ...], message: str) -> None:
    fake = FakeService("shipping").hears(OrderCreated)
    before = fake.subscriptions["hears"]
    with pytest.raises(ConfigurationError, match=message):
        fake.hears(*topics)
    assert fake.subscriptions == {"hears": before}


def test_a_fake_with_a_method_or_a_job_that_is_called_hears_cannot_hear() -> None:
    with pytest.raises(ConfigurationError, match="got 'hears' twice"):
        FakeService("shipping").takes("hears").hears(OrderCreated)
