"""What a test with `rpcq.testing` sees, on both transports and both kinds of queue; and what it leaves behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import aio_pika
import pytest
from aio_pika.exceptions import ChannelNotFoundEntity

import rpcq.testing
from rpcq import (
    AnyEvent,
    CallError,
    CallTimeout,
    Client,
    Context,
    DomainError,
    Event,
    InvalidParams,
    InvalidReply,
    MethodNotFound,
    OutcomeUnknown,
    Overloaded,
    RemoteError,
    Service,
    ServiceUnavailable,
    Worker,
    contract,
)
from rpcq.errors import BrokerUnreachable
from rpcq.testing import FakeService, places, running
from rpcq.wire.events import EventTopology
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.topology import Topology
from support.late import let_others_speak_first
from support.load import until
from support.logged import event_of
from support.places import Place

QUEUE_TYPE_MATTERS = False


class OutOfStock(DomainError):
    pass


def a_stock(place: Place) -> FakeService:
    return FakeService("stock", queue_type=place.queue_type)


async def test_a_service_and_a_client_meet(place: Place) -> None:
    calculator = place.service("calculator")

    @calculator.method
    async def add(x: int, y: int) -> int:
        return x + y

    async with running(calculator, url=place.url) as client:
        assert await client.call("calculator.add", x=1, y=2) == 3


async def test_where_nobody_serves_callers_are_told_at_once(place: Place) -> None:
    async with running(url=place.url) as client:
        with pytest.raises(ServiceUnavailable) as caught:
            await client.call("stock.take")
        assert caught.value.executed == "no"


async def test_a_service_is_served_beside_the_fake_that_it_calls(place: Place) -> None:
    stock = a_stock(place).fails("take", OutOfStock("no bolts")).answers("take", 3)
    async with running(stock, url=place.url) as client:
        shop = place.service("shop")

        @shop.method
        async def order(sku: str, context: Context) -> str:
            try:
                left = await client.with_options(errors=(OutOfStock,)).call("stock.take", sku=sku)
            except OutOfStock as error:
                return error.message
            return f"{left} left"

        async with running(shop, url=place.url) as caller:
            assert await caller.call("shop.order", sku="bolts") == "no bolts"
            assert await caller.call("shop.order", sku="nuts") == "3 left"
    assert [it.params["sku"] for it in stock.calls] == ["bolts", "nuts"]


@pytest.mark.parametrize(
    ("told", "kind", "seen"),
    [
        (OutOfStock("none", details={"sku": 1}), OutOfStock, ("none", "yes", False, {"sku": 1})),
        (Overloaded("full"), Overloaded, ("full", "no", True, None)),
        (CallTimeout("late"), CallTimeout, ("late", "maybe", False, None)),
        (CallTimeout("late", executed="no"), CallTimeout, ("late", "no", True, None)),
        (MethodNotFound("none"), MethodNotFound, ("none", "no", False, None)),
        (InvalidParams("bad", details=[1]), InvalidParams, ("bad", "no", False, [1])),
        (InvalidReply("odd"), InvalidReply, ("odd", "yes", False, None)),
        (RemoteError("own", code="ODD"), RemoteError, ("own", "yes", False, None)),
        (ZeroDivisionError("secret"), RemoteError, ("stock.take failed", "yes", False, None)),
        (
            OutcomeUnknown("lost"),
            OutcomeUnknown,
            ("the worker that held the call was lost: lost", "maybe", False, None),
        ),
    ],
    ids=lambda it: it.__name__ if isinstance(it, type) else type(it).__name__,
)
async def test_what_a_fake_fails_with_its_caller_sees_as_in_production(
    place: Place, told: Exception | type[Exception], kind: type[CallError], seen: tuple[object, ...]
) -> None:
    stock = a_stock(place).fails("take", told)
    async with running(stock, url=place.url, timeout=5) as client:
        for _ in range(2):
            with pytest.raises(kind) as caught:
                await client.with_options(errors=(OutOfStock,)).call("stock.take")
            error = caught.value
            assert type(error) is kind
            assert (error.message, error.executed, error.retryable, error.details) == seen
            assert (error.incident is not None) == isinstance(told, ZeroDivisionError)
            if kind is RemoteError:
                assert error.code == getattr(told, "code", "UNKNOWN")
    if isinstance(told, CallError):  # the test's own, which may be told again
        assert (told.incident, told.__traceback__) == (None, None)
    assert len(stock.calls) == 2


class Filled(Event, name="testing.stock.filled"):
    sku: str


async def test_a_fake_hears_the_events_that_the_code_under_test_publishes(home: Place) -> None:
    first, second = FakeService("audit").hears("testing.#"), FakeService("shop").hears(Filled)
    async with running(first, second, url=home.url) as client:
        keyed = client.with_options(idempotency_key="bolts-1")
        published = [await keyed.publish(Filled(sku="bolts")) for _ in range(2)]
        published.append(await client.publish(Filled(sku="nuts")))
        assert [it.heard for it in published] == [True] * 3
        await until(lambda: len(first.heard()) >= 2 and len(second.heard()) >= 2)
    for fake in first, second:  # of the two with one key, one is done
        assert sorted(it.sku for it in fake.heard(Filled)) == ["bolts", "nuts"]
        assert {it.context.correlation_id for it in fake.heard()} < {it.id for it in published}
    assert [type(it.event) for it in (*first.heard(), *second.heard())] == [AnyEvent, AnyEvent, Filled, Filled]


async def test_a_fake_that_is_slow_runs_into_the_deadline_and_then_answers_who_waits(place: Place) -> None:
    stock = (
        a_stock(place).answers("take", 1, after=20).answers("take", 2, after=0.2).fails("take", OutOfStock, after=0.2)
    )
    async with running(stock, url=place.url) as client:
        let_others_speak_first(client)
        while not stock.calls:  # a call that comes too late is not taken
            with pytest.raises(CallTimeout) as caught:
                await client.with_options(timeout=0.5).call("stock.take")
        assert caught.value.executed == "yes"
        began = time.monotonic()
        assert await client.call("stock.take") == 2
        assert time.monotonic() - began >= 0.2
        with pytest.raises(RemoteError):
            await client.call("stock.take")
        assert time.monotonic() - began >= 0.4


async def test_a_fake_that_vanishes_leaves_its_caller_in_doubt_and_serves_on(place: Place) -> None:
    stock = a_stock(place).vanishes("take").answers("take", 1)
    async with running(stock, url=place.url) as client:
        with pytest.raises(OutcomeUnknown, match="worker that held the call was lost") as caught:
            await client.call("stock.take")
        assert (caught.value.executed, caught.value.retryable) == ("maybe", False)
        assert await client.call("stock.take") == 1
    assert len(stock.calls) == 2


async def test_an_idempotent_call_to_a_fake_that_vanishes_is_sent_again(place: Place) -> None:
    stock = a_stock(place).vanishes("take").vanishes("take").answers("take", 1)
    async with running(stock, url=place.url) as client:
        assert await client.with_options(idempotent=True).call("stock.take") == 1
    assert [it.context.attempt for it in stock.calls] == [1, 2, 3]
    assert len({it.context.idempotency_key for it in stock.calls}) == 1


async def test_a_further_attempt_at_what_the_contract_does_not_call_idempotent_is_refused(place: Place) -> None:
    @contract("stock", idempotent=["price"])
    class Stock(Protocol):
        async def price(self) -> int: ...
        async def take(self) -> int: ...

    stock = FakeService.of(Stock, queue_type=place.queue_type)
    stock.vanishes("price").answers("price", 1).vanishes("take").answers("take", 1)
    async with running(stock, url=place.url) as client:
        assert await client.bind(Stock).price() == 1
        with pytest.raises(OutcomeUnknown):
            await client.with_options(idempotent=True).bind(Stock).take()
    assert [it.method for it in stock.calls] == ["price", "price", "take"]


async def test_only_what_the_lost_worker_holds_is_lost_and_that_not_if_it_ends_soon(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "FAKES_GRACE", 1.0)
    stock = a_stock(place).vanishes("take", after=0.2).answers("take", 0)
    stock.answers("price", 1, after=0.21).answers("count", 2, after=60)
    calculator, started = place.service("calculator"), asyncio.Event()

    @calculator.method
    async def slow() -> str:
        started.set()
        await asyncio.sleep(0.5)
        return "done"

    async with running(stock, calculator, url=place.url) as client:
        methods = ["calculator.slow", "stock.take", "stock.price", "stock.count"]
        calls = [client.call(method) for method in methods]
        slow_answer, take, price, count = await asyncio.gather(*calls, return_exceptions=True)
        assert slow_answer == "done"
        assert isinstance(take, OutcomeUnknown)
        assert price == 1
        assert isinstance(count, OutcomeUnknown)


async def test_calls_that_vanish_together_are_lost_with_one_worker(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    stock = a_stock(place)
    for _ in range(5):
        stock.vanishes("take", after=0.1)
    stock.answers("take", 1)
    async with running(stock, url=place.url) as client:
        outcomes = await asyncio.gather(*(client.call("stock.take") for _ in range(5)), return_exceptions=True)
        assert all(isinstance(it, OutcomeUnknown) for it in outcomes)
        assert await client.call("stock.take") == 1
    assert [event_of(it) for it in caplog.records].count("calls cut off") == 1


async def test_a_test_may_end_at_any_time_and_waits_no_longer_than_the_grace(place: Place) -> None:
    service, started = place.service(), asyncio.Event()

    @service.method
    async def stick() -> None:
        started.set()
        await asyncio.Event().wait()

    stock = a_stock(place).vanishes("take").answers("price", after=3600)
    async with running(service, stock, url=place.url, grace=0.1) as client:
        calls = [asyncio.create_task(client.call(name)) for name in ("things.stick", "stock.price", "stock.take")]
        await started.wait()
        while len(stock.calls) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(it, OutcomeUnknown) for it in outcomes)


async def test_a_fake_whose_next_worker_cannot_start_says_why_in_the_end(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, tried = a_stock(place).vanishes("take"), asyncio.Event()

    async def start(_: Worker) -> None:
        tried.set()
        raise BrokerUnreachable("no more workers")

    async def test() -> None:
        async with running(stock, url=place.url) as client:
            monkeypatch.setattr(Worker, "start", start)
            while not tried.is_set():  # a call that comes too late is not taken
                with pytest.raises(CallTimeout):
                    await client.with_options(timeout=0.3).call("stock.take")

    with pytest.raises(BrokerUnreachable, match="no more workers"):
        await test()


# What is left behind.


async def test_no_task_is_left_behind(place: Place) -> None:
    before = asyncio.all_tasks()
    stock, real = a_stock(place).vanishes("take").answers("take"), place.service()
    real.method(lambda: 1, name="one")
    async with running(stock, real, url=place.url) as client:
        await client.with_options(idempotent=True).call("stock.take")
    async with asyncio.timeout(3):  # aio-pika's own end a little after the connection that they belong to
        while asyncio.all_tasks() != before:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@asynccontextmanager
async def looking(url: str) -> AsyncIterator[Any]:
    """Tells whether a queue or an exchange is there."""
    async with await aio_pika.connect(url) as connection:

        async def is_there(kind: str, name: str) -> bool:
            channel = await connection.channel()
            try:
                await getattr(channel, f"get_{kind}")(name, ensure=True)
            except ChannelNotFoundEntity:
                return False
            await channel.close()
            return True

        yield is_there


@pytest.fixture(params=["classic", "quorum"])
def stock(request: pytest.FixtureRequest) -> FakeService:
    return FakeService("stock", queue_type=request.param).vanishes("take").answers("take", 1)


def used(client: Client, stock: Service) -> list[tuple[str, str]]:
    topology = Topology(client.options.namespace)
    queue = topology.request_queue(stock.name, stock.queue_type)
    return [("queue", queue.name), *(("exchange", it.name) for it in (topology.requests, topology.control))]


async def test_on_rabbitmq_nothing_is_left_behind(rabbitmq_url: str, stock: FakeService) -> None:
    async with looking(rabbitmq_url) as is_there:
        async with running(stock, url=rabbitmq_url) as client:
            with pytest.raises(OutcomeUnknown):
                await client.call("stock.take")
            things = used(client, stock)
            assert [await is_there(*it) for it in things] == [True] * 3
        assert [await is_there(*it) for it in things] == [False] * 3


async def test_on_rabbitmq_nothing_is_left_behind_of_jobs(rabbitmq_url: str) -> None:
    real, done = Service("things"), asyncio.Event()

    @real.job
    async def work() -> None:
        done.set()

    fake = FakeService("stock").takes("count").hears(Filled)
    async with looking(rabbitmq_url) as is_there:
        async with running(real, fake, url=rabbitmq_url) as client:
            await client.send(work)
            await client.send("stock.count", sku="bolts")
            await done.wait()
            while not fake.received:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.005)
            assert fake.received[0].params == {"sku": "bolts"}
            topology = JobTopology(client.options.namespace)
            queues = [make(name).name for name in ("things", "stock") for make in (topology.queue, topology.dead_queue)]
            queues.append(EventTopology(client.options.namespace).queue("stock", "hears", []).name)
            queues += [topology.suspects("stock").name, *(queue.name for queue in topology.shared_queues())]
            things = [*(("queue", name) for name in queues), *(("exchange", it.name) for it in topology.exchanges())]
            assert {await is_there(*it) for it in things} == {True}
        assert {await is_there(*it) for it in things} == {False}


async def test_on_rabbitmq_nothing_is_left_behind_by_a_test_that_fails_or_is_cancelled(
    rabbitmq_url: str, stock: FakeService
) -> None:
    things: list[tuple[str, str]] = []
    inside = asyncio.Event()

    async def test(error: Exception | None) -> None:
        async with running(stock, url=rabbitmq_url) as client:
            things.extend(used(client, stock))
            if error is not None:
                raise error
            inside.set()
            await asyncio.sleep(30)

    with pytest.raises(ZeroDivisionError):
        await test(ZeroDivisionError())
    task = asyncio.create_task(test(None))
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with looking(rabbitmq_url) as is_there:
        assert [await is_there(*it) for it in things] == [False] * 6


async def test_of_those_that_overlap_in_one_place_the_last_one_clears_it(rabbitmq_url: str, stock: FakeService) -> None:
    place = rpcq.testing.Place(rabbitmq_url)
    async with looking(rabbitmq_url) as is_there:
        async with place.running() as outer:
            async with place.running(stock):
                things = used(outer, stock)
                assert await outer.with_options(idempotent=True).call("stock.take") == 1
            assert [await is_there(*it) for it in things] == [True] * 3
        assert [await is_there(*it) for it in things] == [False] * 3


async def test_a_queue_that_a_service_names_itself_is_not_deleted(rabbitmq_url: str, namespace: str) -> None:
    service = Service("things", queue=namespace)

    @service.method
    async def work() -> int:
        return 1

    async with looking(rabbitmq_url) as is_there:
        try:
            async with running(service, url=rabbitmq_url) as client:
                assert await client.call("things.work") == 1
            assert await is_there("queue", namespace)
        finally:
            async with await aio_pika.connect(rabbitmq_url) as connection:
                await (await connection.channel()).queue_delete(namespace)


async def test_what_could_not_be_deleted_is_told_and_does_not_hide_why_the_test_failed(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete, left = rpcq.testing.places._delete, []

    async def fail(*arguments: Any) -> None:
        left.append(arguments)
        raise BrokerUnreachable("gone")

    monkeypatch.setattr(rpcq.testing.places, "_delete", fail)
    with pytest.raises(BrokerUnreachable, match="gone"):
        async with running(url=rabbitmq_url):
            pass
    with pytest.raises(ZeroDivisionError) as caught:
        async with running(url=rabbitmq_url):
            raise ZeroDivisionError
    assert "could not delete" in caught.value.__notes__[0]
    for arguments in left:
        await delete(*arguments)


async def test_where_the_broker_cannot_be_reached_it_is_asked_once() -> None:
    with pytest.raises(BrokerUnreachable) as caught:
        async with running(url="amqp://localhost:1/"):
            pass
    assert not hasattr(caught.value, "__notes__")


async def test_the_environment_names_the_broker(rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPCQ_TEST_URL", rabbitmq_url)
    stock = FakeService("stock").answers("take", 1)
    async with running(stock) as client, Client(rabbitmq_url, namespace=client.options.namespace) as other:
        assert await other.call("stock.take") == 1
