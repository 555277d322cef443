"""Events in a world whose time a test moves."""

import pytest

from rpcq import AnyEvent, ConfigurationError, Context, Event, GiveUp, Retry, RetryLater, Service
from rpcq.testing import PublishedEvent, world


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
