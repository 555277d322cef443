"""What callers get, on both transports and both kinds of request queue."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Protocol
from uuid import UUID

import pytest
from pydantic import BaseModel

from rpcq import (
    CallTimeout,
    Client,
    ClosedError,
    Context,
    DomainError,
    InvalidParams,
    InvalidReply,
    MethodNotFound,
    OutcomeUnknown,
    Overloaded,
    RemoteError,
    Service,
    ServiceUnavailable,
    TooLarge,
    contract,
    with_options,
)
from support.late import let_others_speak_first
from support.logged import event_of
from support.places import Place, lose

QUEUE_TYPE_MATTERS = False


class OutOfStock(DomainError):
    pass


class Order(BaseModel):
    id: UUID
    at: datetime
    price: Decimal
    tags: set[str] = set()


def assert_nothing_is_left(*clients: Client) -> None:
    for client in clients:
        assert client.in_flight == 0
        assert not client._sender.waiting


async def until(condition: Callable[[], bool]) -> None:
    """Wait, within the test's own timeout, for what no event tells."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_each_of_many_concurrent_calls_gets_its_own_answer(place: Place) -> None:
    service = place.service()

    @service.method
    async def double(x: int) -> int:
        await asyncio.sleep(0.001 * (x % 7))
        return 2 * x

    async with place.worker(service, prefetch=50), place.client() as client:
        things = client.service("things")
        answers = await asyncio.gather(*(things.double(x=x) for x in range(500)))
        assert answers == [2 * x for x in range(500)]
        assert_nothing_is_left(client)


async def test_parameters_go_by_name_by_position_and_as_a_single_scalar(place: Place) -> None:
    service = place.service()

    @service.method
    async def join(a: str, b: str = "-", *, c: str = "!") -> str:
        return a + b + c

    async with place.worker(service), place.client() as client:
        assert await client.call("things.join", a="x", b="y") == "xy!"
        assert await client.call("things.join", "x", "y") == "xy!"
        assert await client.call("things.join", "x") == "x-!"
        assert await client.service("things")["join"](a="x", c="?") == "x-?"


async def test_what_pydantic_serialises_goes_there_and_back(place: Place) -> None:
    service = place.service()

    @service.method
    async def reprice(order: Order, by: Decimal) -> Order:
        assert isinstance(order.at, datetime)
        return order.model_copy(update={"price": order.price + by})

    order = Order(id=UUID(int=5), at=datetime(2026, 1, 2, tzinfo=UTC), price=Decimal("1.10"), tags={"a"})
    async with place.worker(service), place.client() as client:
        typed = client.with_options(returns=Order)
        answer = await typed.call("things.reprice", order=order, by=Decimal("0.05"))
    assert answer == order.model_copy(update={"price": Decimal("1.15")})


async def test_a_bound_protocol_takes_positions_and_gives_types(place: Place) -> None:
    service = place.service(errors=[OutOfStock])

    @service.method
    async def price(sku: str, count: int = 1) -> Decimal:
        if sku == "none":
            raise OutOfStock("no more", details={"sku": sku})
        return Decimal("2.5") * count

    @contract("things", errors=[OutOfStock])
    class Shop(Protocol):
        async def price(self, sku: str, count: int = 1) -> Decimal: ...

    async with place.worker(service), place.client() as client:
        shop = client.bind(Shop)
        assert await shop.price("x", 2) == Decimal("5.0")
        with pytest.raises(OutOfStock) as caught:
            await shop.price("none")
        assert (caught.value.message, caught.value.details, caught.value.executed) == (
            "no more",
            {"sku": "none"},
            "yes",
        )
        with pytest.raises(TypeError, match="2 parameters"):
            await shop.price("x", 1, 2)  # type: ignore[call-arg]


class NotEnough(DomainError):
    """With attributes of its own."""

    sku: str
    price: Decimal

    def __init__(self, sku: str, price: Decimal) -> None:
        super().__init__(f"{sku} costs {price}")
        self.sku = sku
        self.price = price


async def test_the_attributes_of_a_domain_error_reach_its_caller_also_over_two_services(place: Place) -> None:
    service = place.service(errors=[NotEnough])

    @service.method
    async def buy(sku: str) -> None:
        raise NotEnough(sku, Decimal("1.50"))

    async with place.worker(service), place.client() as client:
        knowing = client.with_options(errors=[NotEnough])
        other = place.service("agency", errors=[NotEnough])

        @other.method
        async def order(sku: str) -> None:
            await knowing.call("things.buy", sku=sku)

        async with place.worker(other):
            for target in ("things.buy", "agency.order"):
                with pytest.raises(NotEnough, match=r"^tea costs 1\.50$") as caught:
                    await knowing.call(target, sku="tea")
                assert (caught.value.sku, caught.value.price) == ("tea", Decimal("1.50"))
                assert caught.value.details == {"sku": "tea", "price": "1.50"}


async def test_an_attribute_that_cannot_be_sent_costs_the_details_and_not_the_error(place: Place) -> None:
    service = place.service(errors=[NotEnough])

    @service.method
    async def buy(sku: str) -> None:
        raise NotEnough(sku, "much")  # type: ignore[arg-type]

    async with place.worker(service), place.client() as client:
        with pytest.raises(NotEnough, match="tea costs much") as caught:
            await client.with_options(errors=[NotEnough]).call("things.buy", sku="tea")
        assert caught.value.details is None


async def test_a_domain_error_that_its_service_does_not_declare_says_in_the_log_where_to_declare_it(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    service = place.service()

    @service.method
    async def buy(sku: str) -> None:
        raise NotEnough(sku, Decimal(1))

    async with place.worker(service), place.client() as client:
        with pytest.raises(RemoteError) as caught:
            await client.call("things.buy", sku="tea")
    assert caught.value.code == "UNKNOWN"
    assert "costs" not in str(caught.value)
    hints = [vars(it).get("hint") for it in caplog.records if it.name == "rpcq.worker"]
    assert "declare it in errors=[NotEnough], and its callers get it" in hints


async def test_one_call_of_a_bound_contract_may_have_another_timeout(place: Place) -> None:
    service = place.service()

    @service.method
    async def wait(context: Context[None]) -> float:
        return context.deadline.remaining()

    class Waits(Protocol):
        async def wait(self) -> float: ...

    async with place.worker(service), place.client() as client:
        things = client.bind(Waits, "things")
        assert await with_options(things, timeout=5).wait() <= 5
        assert await with_options(things.wait, timeout=5)() <= 5
        assert await things.wait() > 5


async def test_a_domain_error_that_the_caller_does_not_declare_keeps_its_code(place: Place) -> None:
    service = place.service()

    @service.method(errors=[OutOfStock])
    def take(sku: str) -> None:
        raise OutOfStock(f"no {sku}")

    async with place.worker(service), place.client() as client:
        with pytest.raises(RemoteError, match="no bolts") as caught:
            await client.call("things.take", sku="bolts")
        assert (caught.value.code, caught.value.executed) == ("out_of_stock", "yes")


async def test_an_undeclared_exception_keeps_its_text_and_gives_an_incident(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    service = place.service()

    @service.method
    async def fail() -> None:
        raise ValueError("the password is 1234")

    async with place.worker(service), place.client() as client:
        with pytest.raises(RemoteError) as caught:
            await client.call("things.fail")
    assert "1234" not in str(caught.value)
    assert (caught.value.code, caught.value.executed, caught.value.retryable) == ("UNKNOWN", "yes", False)
    logged = next(record for record in caplog.records if event_of(record) == "handler failed")
    assert logged.incident == caught.value.incident  # type: ignore[attr-defined]
    assert logged.correlation_id == caught.value.correlation_id  # type: ignore[attr-defined]
    assert "1234" in caplog.text


async def test_an_error_of_a_nested_call_is_not_passed_off_as_the_callers_own(place: Place) -> None:
    service = place.service()

    @service.method
    async def outer(context: Context) -> None:
        raise ServiceUnavailable("as a nested call may say, and executed=no with it")

    async with place.worker(service), place.client() as client:
        with pytest.raises(RemoteError) as caught:
            await client.call("things.outer")
        assert (caught.value.executed, caught.value.retryable) == ("yes", False)


async def test_what_does_not_fit_the_method_never_runs(place: Place) -> None:
    service, runs = place.service(), []

    @service.method
    async def add(x: int, y: int) -> int:
        runs.append((x, y))
        return x + y

    async with place.worker(service), place.client() as client:
        for params, named in (({"x": 1}, "y"), ({"x": "one", "y": 2}, "x"), ({"x": 1, "y": 2, "z": 3}, "z")):
            with pytest.raises(InvalidParams, match=named) as caught:
                await client.call("things.add", **params)
            assert (caught.value.executed, caught.value.retryable) == ("no", False)
            assert caught.value.details[0]["loc"] == [named]
        with pytest.raises(MethodNotFound, match="it has add") as unknown:
            await client.call("things.subtract", x=1, y=2)
        assert unknown.value.executed == "no"
    assert runs == []


async def test_a_service_that_nobody_serves_is_told_at_once(place: Place) -> None:
    async with place.client() as client:
        began = time.monotonic()
        with pytest.raises(ServiceUnavailable) as caught:
            await client.with_options(timeout=20).call("nobody.answers")
        assert time.monotonic() - began < 10
        assert (caught.value.executed, caught.value.retryable) == ("no", True)
        assert_nothing_is_left(client)


async def test_a_handler_that_runs_into_the_deadline_is_cancelled_and_the_caller_knows_that_it_ran(
    place: Place,
) -> None:
    service, began, cancelled = place.service(), asyncio.Event(), asyncio.Event()

    @service.method
    async def sleep() -> None:
        began.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with place.worker(service), place.client() as client:
        let_others_speak_first(client)
        while not began.is_set():  # a call that comes too late does not begin
            with pytest.raises(CallTimeout) as caught:
                await client.with_options(timeout=1).call("things.sleep")
        assert (caught.value.executed, caught.value.retryable) == ("yes", False)
        assert isinstance(caught.value, TimeoutError)
        await cancelled.wait()


async def test_a_method_may_have_less_time_than_its_callers(place: Place) -> None:
    service = place.service()

    @service.method(timeout=0.05)
    async def sleep() -> None:
        await asyncio.sleep(30)

    async with place.worker(service), place.client() as client:
        with pytest.raises(CallTimeout) as caught:
            await client.call("things.sleep")
        assert caught.value.executed == "yes"


async def test_a_request_that_expires_in_the_queue_is_told_by_the_broker(place: Place) -> None:
    """On a quorum queue that proves that it did not run; on a classic one it does not."""
    service = place.service()

    @service.method
    async def nothing() -> None: ...

    async with place.client() as client:
        async with place.worker(service):
            pass  # its queue is there now, and nobody consumes
        let_others_speak_first(client)
        with pytest.raises(CallTimeout, match="expired in the queue") as caught:
            await client.with_options(timeout=1).call("things.nothing")
        once = place.queue_type == "quorum"
        assert (caught.value.executed, caught.value.retryable) == ("no" if once else "maybe", once)


async def test_prefetch_is_the_concurrency(place: Place) -> None:
    service = place.service()
    running = most = 0

    @service.method
    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    async with place.worker(service, prefetch=7), place.client() as client:
        await asyncio.gather(*(client.call("things.work") for _ in range(60)))
    assert most == 7


async def test_def_handlers_run_in_threads_and_do_not_block_the_loop(place: Place) -> None:
    service = place.service()
    together = threading.Barrier(3, timeout=20)

    @service.method
    def meet(context: Context) -> str:
        together.wait()  # only if three run at once
        return f"{threading.current_thread().name[:4]} {context.method}"

    async with place.worker(service, prefetch=3), place.client() as client:
        assert await asyncio.gather(*(client.call("things.meet") for _ in range(3))) == ["rpcq meet"] * 3


async def test_a_thread_holds_its_slot_until_it_ends_whatever_the_deadline_says(place: Place) -> None:
    service, gate, started = place.service(), threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    @service.method
    def block() -> None:
        loop.call_soon_threadsafe(started.set)
        gate.wait(20)

    @service.method
    async def quick() -> str:
        return "done"

    async with place.worker(service, prefetch=1) as worker, place.client() as client:
        while not started.is_set():  # a call that comes too late does not begin
            with pytest.raises(CallTimeout):
                await client.with_options(timeout=0.3).call("things.block")
        waiting = asyncio.create_task(client.call("things.quick"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert worker.in_flight == 1
        gate.set()
        assert await waiting == "done"


async def test_nested_calls_inherit_the_deadline(place: Place) -> None:
    inner, outer = place.service("inner"), place.service("outer")
    seen: list[float] = []

    @inner.method
    async def left(context: Context) -> float:
        return context.deadline.remaining()

    async with place.client(name="nested") as own:

        @outer.method
        async def ask(context: Context) -> float:
            seen.append(context.deadline.remaining())
            return float(await own.call("inner.left"))

        async with place.worker(inner, outer), place.client() as client:
            left_inside = await client.with_options(timeout=3).call("outer.ask")
            assert 0 < left_inside < seen[0] < 3
            assert await client.call("inner.left") > 20  # and outside of a handler nothing is inherited


async def test_a_handler_may_know_of_its_request(place: Place) -> None:
    service = place.service()

    @service.method
    async def who(x: int, context: Context, y: int = 0) -> list[object]:
        return [x, y, context.service, context.method, context.caller, dict(context.metadata), context.attempt]

    async with place.worker(service), place.client(name="me") as client:
        told = client.with_options(metadata={"x-user": "ada"})
        expected = [1, 2, "things", "who", "me", {"x-user": "ada"}, 1]
        assert await told.call("things.who", x=1, y=2) == expected
        assert await told.call("things.who", 1, 2) == expected


async def test_a_lifespan_is_entered_before_the_first_call_and_left_after_the_last(place: Place) -> None:
    events = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[dict[str, int]]:
        events.append("open")
        yield {"answer": 42}
        events.append("close")

    service = place.service(lifespan=lifespan)

    @service.method
    async def ask(context: Context) -> int:
        events.append("call")
        return int(context.state["answer"])

    async with place.worker(service), place.client() as client:
        assert await client.call("things.ask") == 42
    assert events == ["open", "call", "close"]


async def test_cancelling_the_caller_cancels_the_handler_and_frees_its_slot(place: Place) -> None:
    service, started, cancelled = place.service(), asyncio.Event(), asyncio.Event()

    @service.method
    async def sleep() -> None:
        started.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    @service.method
    async def quick() -> str:
        return "done"

    async with place.worker(service, prefetch=1), place.client() as client:
        call = asyncio.create_task(client.call("things.sleep"))
        await started.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert_nothing_is_left(client)
        await asyncio.wait_for(cancelled.wait(), 5)
        assert await client.with_options(timeout=5).call("things.quick") == "done"


async def test_a_producer_may_start_before_its_service(place: Place) -> None:
    service = place.service()

    @service.method
    async def quick() -> str:
        return "done"

    async with place.client() as client:
        with pytest.raises(ServiceUnavailable, match=r"no worker of 'things' answered within 0\.2 s"):
            await client.wait_for_service("things", timeout=0.2)
        waiting = asyncio.create_task(client.wait_for_service("things", timeout=20))
        async with place.worker(service):
            await waiting
            assert await client.call("things.quick") == "done"


async def test_bodies_over_the_limit_are_refused_on_both_sides(place: Place) -> None:
    service, runs = place.service(), []

    @service.method
    async def size(text: str) -> int:
        runs.append(len(text))
        return len(text)

    @service.method
    async def blow(count: int) -> str:
        return "x" * count

    async with (
        place.worker(service, max_body=10_000) as _,
        place.client(max_body=20_000) as client,
        place.client(max_body=5_000) as small,
    ):
        with pytest.raises(TooLarge, match="limit is 5000"):
            await small.call("things.size", text="x" * 5_000)
        assert await client.call("things.size", text="x" * 9_900) == 9_900
        with pytest.raises(InvalidParams, match="limit is 10000") as refused:
            await client.call("things.size", text="x" * 15_000)
        assert refused.value.executed == "no"
        with pytest.raises(InvalidReply, match="limit is 10000") as unsent:
            await client.call("things.blow", count=15_000)
        with pytest.raises(InvalidReply, match="over the limit") as unread:
            await small.call("things.blow", count=9_000)
        assert unsent.value.executed == unread.value.executed == "yes"
    assert runs == [9_900]


async def test_large_bodies_arrive_whole(place: Place) -> None:
    service = place.service()

    @service.method
    async def echo(text: str) -> str:
        return text

    async with place.worker(service), place.client() as client:
        texts = [character * size for character, size in zip("abcde", (0, 1, 131_000, 300_000, 1_000_000), strict=True)]
        assert await asyncio.gather(*(client.call("things.echo", text=text) for text in texts)) == texts


async def test_the_limit_of_calls_in_flight_is_an_error_at_once(place: Place) -> None:
    service, gate = place.service(), asyncio.Event()

    @service.method
    async def wait() -> None:
        await gate.wait()

    async with place.worker(service), place.client(max_in_flight=3) as client:
        calls = [asyncio.create_task(client.call("things.wait")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="3 calls are under way already") as caught:
            await client.call("things.wait")
        assert (caught.value.executed, caught.value.retryable) == ("no", True)
        gate.set()
        await asyncio.gather(*calls)
        await client.call("things.wait")


async def test_a_result_that_cannot_be_sent_is_an_error_of_that_call_alone(place: Place) -> None:
    service = place.service()

    @service.method
    async def nan() -> float:
        return float("nan")

    @service.method
    async def thing():
        return object()

    @service.method
    async def wrong() -> int:
        return "five"  # type: ignore[return-value]

    async with place.worker(service), place.client() as client:
        for name in ("nan", "thing", "wrong"):
            with pytest.raises(InvalidReply, match=name) as caught:
                await client.call(f"things.{name}")
            assert caught.value.executed == "yes"


async def test_a_result_that_is_not_what_the_caller_expects_is_an_invalid_reply(place: Place) -> None:
    service = place.service()

    @service.method
    async def text() -> str:
        return "five"

    async with place.worker(service), place.client() as client:
        with pytest.raises(InvalidReply, match="does not fit"):
            await client.with_options(returns=int).call("things.text")


async def test_closing_a_client_settles_its_calls_at_once(place: Place) -> None:
    service, started = place.service(), asyncio.Event()

    @service.method
    async def wait() -> None:
        started.set()
        await asyncio.sleep(5)

    async with place.worker(service, grace=0.1), place.client() as client:
        calls = [asyncio.create_task(client.call("things.wait")) for _ in range(10)]
        await started.wait()
        await client.close()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, OutcomeUnknown)
            assert (outcome.executed, outcome.retryable) == ("maybe", False)
        assert_nothing_is_left(client)
        with pytest.raises(ClosedError, match="closed"):
            await client.call("things.wait")


async def test_stopping_a_worker_lets_what_runs_end(place: Place) -> None:
    service, started = place.service(), asyncio.Semaphore(0)

    @service.method
    async def work() -> str:
        started.release()
        await asyncio.sleep(0.5)
        return "done"

    async with place.client() as client:
        worker = place.worker(service)
        await worker.start()
        calls = [asyncio.create_task(client.call("things.work")) for _ in range(20)]
        for _ in calls:
            await started.acquire()
        assert await worker.stop() is True
        assert await asyncio.gather(*calls) == ["done"] * 20


async def test_a_call_that_is_cut_off_by_the_end_of_the_grace_time_is_told_at_once(place: Place) -> None:
    service, started, runs = place.service(), asyncio.Event(), []

    @service.method
    async def stick() -> None:
        runs.append(1)
        started.set()
        await asyncio.sleep(30)

    async with place.client() as client:
        worker = place.worker(service, grace=0.05)
        await worker.start()
        call = asyncio.create_task(client.call("things.stick"))
        await started.wait()
        assert await worker.stop() is False
        with pytest.raises(OutcomeUnknown, match=r"was lost: it was stopped, and cut things\.stick off") as caught:
            await asyncio.wait_for(call, 5)
        assert (caught.value.executed, caught.value.retryable) == ("maybe", False)
        async with place.worker(service) as second:
            await client.wait_for_service("things")
            assert (second.in_flight, second.refused_redeliveries) == (0, 0), "it was left in the queue"
    assert runs == [1]


async def test_a_call_whose_worker_is_lost_ran_at_most_once_and_its_caller_is_told(place: Place) -> None:
    service, other, runs, started = place.service(), place.service(), [], asyncio.Event()

    @service.method
    async def stick() -> None:
        runs.append("first")
        started.set()
        await asyncio.sleep(30)

    @other.method(name="stick")
    async def again() -> None:
        runs.append("second")

    async with place.client() as client:
        worker = place.worker(service, grace=0.05)
        await worker.start()
        call = asyncio.create_task(client.call("things.stick"))
        await started.wait()
        await lose(worker)
        async with place.worker(other) as second:
            with pytest.raises(OutcomeUnknown, match="worker that held the call was lost") as caught:
                await call
            assert (caught.value.executed, caught.value.retryable) == ("maybe", False)
            assert second.refused_redeliveries == (1 if place.queue_type == "classic" else 0)
    assert runs == ["first"]


async def test_an_idempotent_call_whose_worker_is_lost_is_sent_again_in_the_same_deadline(place: Place) -> None:
    service, other, started, seen = place.service(), place.service(), asyncio.Event(), []

    @service.method(idempotent=True)
    async def stick(context: Context) -> None:
        seen.append((context.attempt, context.idempotency_key))
        started.set()
        await asyncio.sleep(30)

    @other.method(name="stick", idempotent=True)
    async def again(context: Context) -> str:
        seen.append((context.attempt, context.idempotency_key))
        return "done"

    async with place.client() as client:
        worker = place.worker(service, grace=0.05)
        await worker.start()
        call = asyncio.create_task(client.with_options(idempotent=True).call("things.stick"))
        await started.wait()
        async with place.worker(other):
            await lose(worker)
            assert await call == "done"
    (first, key), (second, same_key) = seen
    assert (first, second, same_key) == (1, 2, key)


async def test_a_worker_does_not_run_a_further_attempt_at_what_it_does_not_declare_idempotent(place: Place) -> None:
    service, other, started = place.service(), place.service(), asyncio.Event()

    @service.method
    async def stick() -> None:
        started.set()
        await asyncio.sleep(30)

    @other.method(name="stick")
    async def again() -> str:
        raise AssertionError("it ran twice")

    async with place.client() as client:
        worker = place.worker(service, grace=0.05)
        await worker.start()
        call = asyncio.create_task(client.with_options(idempotent=True, timeout=10).call("things.stick"))
        await started.wait()
        async with place.worker(other):
            await lose(worker)
            with pytest.raises(OutcomeUnknown):
                await call


async def test_closing_all_connections_under_load_settles_every_call_and_both_sides_come_back(place: Place) -> None:
    service = place.service()
    runs: list[int] = []

    @service.method
    async def work(x: int) -> int:
        runs.append(x)
        await asyncio.sleep(0.02)
        return x

    async with place.worker(service, prefetch=20) as worker, place.client() as client:
        stop = asyncio.Event()
        outcomes: dict[int, object] = {}
        numbers = iter(range(1_000_000))

        async def caller() -> None:
            while not stop.is_set():
                x = next(numbers)
                try:
                    outcomes[x] = await client.call("things.work", x=x)
                except (OutcomeUnknown, ServiceUnavailable) as error:
                    outcomes[x] = error

        callers = [asyncio.create_task(caller()) for _ in range(60)]
        await until(lambda: len(runs) >= 100)
        assert client.in_flight > 30  # there is a load to cut
        await place.cut(client, worker)
        cut_at = len(outcomes)
        await until(lambda: any(isinstance(it, OutcomeUnknown) for it in outcomes.values()))
        # The callers went on at once: what they sent meanwhile waits for the new session, and succeeds.
        await until(lambda: any(isinstance(it, int) for x, it in outcomes.items() if x > cut_at + 200))
        stop.set()
        await asyncio.gather(*callers)
        assert await client.call("things.work", x=-1) == -1
        assert_nothing_is_left(client)
    for x, outcome in outcomes.items():
        if isinstance(outcome, OutcomeUnknown):
            assert outcome.executed == "maybe"
        elif isinstance(outcome, ServiceUnavailable):
            assert outcome.executed == "no"
            assert x not in runs
        else:
            assert outcome == x
    assert len(runs) == len(set(runs)), "a call that is not idempotent ran twice"


async def test_idempotent_calls_survive_the_loss_of_all_connections(place: Place) -> None:
    service, started = place.service(), asyncio.Event()

    @service.method(idempotent=True)
    async def work(x: int) -> int:
        started.set()
        await asyncio.sleep(0.3)
        return x

    async with place.worker(service) as worker, place.client() as client:
        safe = client.with_options(idempotent=True)
        calls = [asyncio.create_task(safe.call("things.work", x=x)) for x in range(20)]
        await started.wait()
        await place.cut(client, worker)
        assert await asyncio.gather(*calls) == list(range(20))
        assert_nothing_is_left(client)


async def test_one_worker_serves_several_services(place: Place) -> None:
    first, second = place.service("first"), place.service("a.b")

    @first.method
    async def name() -> str:
        return "first"

    @second.method(name="name")
    async def other() -> str:
        return "second"

    async with place.worker(first, second), place.client() as client:
        assert await asyncio.gather(client.call("first.name"), client.call("a.b.name")) == ["first", "second"]


async def test_namespaces_do_not_see_each_other(place: Place) -> None:
    service = place.service()

    @service.method
    async def quick() -> str:
        return "done"

    async with place.worker(service), Client(place.url, namespace=f"{place.namespace}-other") as stranger:
        with pytest.raises(ServiceUnavailable):
            await stranger.call("things.quick")
    assert isinstance(service, Service)
