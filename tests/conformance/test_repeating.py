"""Calls that are made again: by key, so that they run once; and by the caller's wish, where they failed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rpcq import (
    CallError,
    CallTimeout,
    Client,
    Context,
    DomainError,
    InvalidParams,
    InvalidReply,
    OutcomeUnknown,
    Overloaded,
    RemoteError,
    Retry,
    Service,
)
from rpcq.errors import BrokerUnreachable
from rpcq.results import Claim, MemoryResults, StoredResult
from rpcq.transport.base import Message, Published
from rpcq.wire import replies, requests
from support.load import Overdue
from support.places import Place

QUEUE_TYPE_MATTERS = False


class Busy(DomainError):
    pass


QUICK = Retry(max_attempts=5, initial_backoff=0.01, codes=("UNAVAILABLE", "RESOURCE_EXHAUSTED", "UNKNOWN", "busy"))


# The same key.


async def test_calls_of_one_key_run_once_and_have_one_answer(place: Place) -> None:
    service, runs = place.service(), 0

    @service.method
    async def book(amount: int) -> int:
        nonlocal runs
        runs += 1
        await asyncio.sleep(0.05)
        return runs * 1000 + amount

    async with place.worker(service) as worker, place.client() as client:
        caller = client.with_options(idempotency_key="order-17")
        # At the same time, too: the second waits for the answer of the first.
        assert await asyncio.gather(*(caller.call("things.book", amount=5) for _ in range(3))) == [1005] * 3
        assert await caller.call("things.book", amount=5) == 1005
        assert await client.with_options(idempotency_key="order-18").call("things.book", amount=5) == 2005
        assert (runs, worker._replier.replayed) == (2, 3)
        assert not worker._replier._replays._turns


async def test_a_key_with_other_parameters_or_another_method_is_an_error(place: Place) -> None:
    service = place.service()

    @service.method
    async def book(amount: int) -> int:
        return amount

    @service.method
    async def cancel(amount: int) -> int:
        raise AssertionError("it ran")

    async with place.worker(service), place.client() as client:
        caller = client.with_options(idempotency_key="order-17")
        assert await caller.call("things.book", amount=5) == 5
        for method, amount in (("book", 6), ("cancel", 5)):
            with pytest.raises(InvalidParams, match="key was used for another method, or other parameters") as caught:
                await caller.call(f"things.{method}", amount=amount)
            assert caught.value.executed == "no"


async def test_only_results_are_remembered(place: Place) -> None:
    service, runs = place.service(errors=[Busy]), 0

    @service.method
    async def work() -> str:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise ValueError("at first")
        if runs == 2:
            raise Busy("then")
        if runs == 3:
            return "x" * 2000
        return "done"

    async with place.worker(service, max_body=1000), place.client() as client:
        caller = client.with_options(idempotency_key="k", errors=(Busy,))
        for kind in (RemoteError, Busy, InvalidReply):
            with pytest.raises(kind):
                await caller.call("things.work")
        assert [await caller.call("things.work") for _ in range(2)] == ["done", "done"]
    assert runs == 4


async def test_a_worker_that_remembers_nothing_runs_again(place: Place) -> None:
    service, runs = place.service(), 0

    @service.method
    async def work() -> int:
        nonlocal runs
        runs += 1
        return runs

    async with place.worker(service, remember=0), place.client() as client:
        caller = client.with_options(idempotency_key="k")
        assert [await caller.call("things.work") for _ in range(2)] == [1, 2]


async def test_a_def_handler_is_remembered_and_one_who_waits_for_it_has_a_deadline(place: Place) -> None:
    service, runs, goes_on = place.service(), [], threading.Event()

    @service.method
    def work() -> int:
        runs.append(1)
        goes_on.wait(20)
        return len(runs)

    async with place.worker(service), place.client() as client:
        caller = client.with_options(idempotency_key="k")
        first = asyncio.create_task(caller.call("things.work"))
        while not runs:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)
        with pytest.raises(CallTimeout) as caught:
            await caller.with_options(timeout=3.0).call("things.work")
        assert caught.value.executed == "maybe"  # the other request of its key runs
        goes_on.set()
        assert [await first, await caller.call("things.work")] == [1, 1]


async def test_who_is_cancelled_while_an_earlier_attempt_runs_leaves_that_alone(place: Place) -> None:
    service, started, release = place.service(), asyncio.Event(), asyncio.Event()

    @service.method
    async def work() -> str:
        started.set()
        await release.wait()
        return "done"

    async with place.worker(service) as worker, place.client() as client:
        caller = client.with_options(idempotency_key="k")
        first = asyncio.create_task(caller.call("things.work"))
        await started.wait()
        second = asyncio.create_task(caller.call("things.work"))
        while worker.in_flight < 2:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)
        second.cancel()
        while worker.in_flight > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        release.set()
        assert await first == "done"


async def test_an_attempt_after_a_lost_one_is_answered_with_what_that_gave(place: Place) -> None:
    """Its caller's session was lost, and not the worker: the handler ran to its end, and its answer found nobody."""
    service, started, runs = place.service(), asyncio.Event(), []

    @service.method(idempotent=True)
    async def work(context: Context) -> int:
        runs.append(context.attempt)
        started.set()
        await asyncio.sleep(0.2)
        return len(runs)

    async with place.worker(service) as worker, place.client() as client:
        call = asyncio.create_task(client.with_options(idempotent=True).call("things.work"))
        await started.wait()
        if place.url.startswith("memory:"):
            client._transport.lose_consuming(BrokerUnreachable("cut by a test"))  # type: ignore[attr-defined]
        else:
            client._transport._consuming._link.protocol.abort()  # type: ignore[attr-defined]
        assert await call == 1
        assert (runs, worker._replier.replayed) == ([1], 1)


async def test_what_may_have_run_before_is_answered_from_memory_even_where_it_may_not_run_again(place: Place) -> None:
    service, runs = place.service(), 0

    @service.method
    async def work() -> int:
        nonlocal runs
        runs += 1
        return runs

    async with place.worker(service), place.client() as client:
        assert await client.with_options(idempotency_key="k").call("things.work") == 1
        assert client._sender.encoder is not None
        for key, kind in (("k", replies.RESULT), ("another", replies.ERROR)):
            reply_to: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            client._control._questions[b"by hand"] = _Once(reply_to)  # type: ignore[assignment]  # it takes what comes
            headers = requests.encode_headers(key=key, attempt=2, metadata={})
            now_ms = int(time.time() * 1000)
            properties = client._sender.encoder.encode(b"by hand", b"work", 9000, now_ms + 9000, headers, notify=True)
            exchange = client.topology.requests.name.encode()
            client._transport.publish(Message(exchange, b"things", b"by hand", properties, b"{}", _nothing))
            answer = await asyncio.wait_for(reply_to, 5)
            del client._control._questions[b"by hand"]
            assert answer == b"1" if kind is replies.RESULT else b'"ABORTED"' in answer
        assert runs == 1


class _Once:
    def __init__(self, future: asyncio.Future[bytes]) -> None:
        self.put_nowait = future.set_result


def _nothing(_: Published) -> None: ...


# A store that workers share.


class Shared(MemoryResults):
    """A store that may be away, and whose clock may be `ahead` by some seconds."""

    def __init__(self) -> None:
        super().__init__(10_000, now=lambda: time.monotonic() + self.ahead)
        self.ahead = 0.0
        self.broken = False

    async def get(self, key: str) -> StoredResult | None:
        if self.broken:
            raise OSError("the store is away")
        return await super().get(key)

    async def claim(self, key: str, owner: str, seconds: float) -> StoredResult | Claim:
        if self.broken:
            raise OSError("the store is away")
        return await super().claim(key, owner, seconds)

    async def put(self, key: str, result: StoredResult) -> None:
        if self.broken:
            raise OSError("the store is away")
        await super().put(key, result)


async def test_workers_that_share_a_store_answer_for_each_other(place: Place) -> None:
    store, runs = Shared(), []

    def made(name: str) -> Service:
        service = place.service(result_store=store)

        @service.method
        async def work() -> str:
            runs.append(name)
            return name

        return service

    async with place.client() as client:
        caller = client.with_options(idempotency_key="k")
        async with place.worker(made("first")):
            assert await caller.call("things.work") == "first"
        async with place.worker(made("second")):
            assert await caller.call("things.work") == "first"
    assert runs == ["first"]


@pytest.mark.parametrize("idempotent", [False, True])
async def test_a_store_that_is_away_costs_no_wrong_answer(
    place: Place, idempotent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store, runs = Shared(), 0
    service = place.service(result_store=store)

    @service.method(idempotent=idempotent)
    async def work() -> int:
        nonlocal runs
        runs += 1
        store.broken = runs == 1
        return runs

    async with place.worker(service), place.client() as client:
        caller = client.with_options(idempotency_key="k", timeout=30)
        # It could not be remembered, which is no fault of its caller's. The key is taken until its time has passed.
        assert await caller.call("things.work") == 1
        assert "a result cannot be stored" in caplog.text
        call = asyncio.create_task(caller.call("things.work"))
        while "a stored result cannot be read" not in caplog.text:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)
        store.broken, store.ahead = False, 60.0
        if idempotent:
            assert await call == 2  # it was sent again until the store was there
            assert await caller.call("things.work") == 2
        else:
            with pytest.raises(OutcomeUnknown, match="a worker that ran a request with its idempotency key was lost"):
                await call
    assert runs == (2 if idempotent else 1)


async def test_of_two_workers_that_share_a_store_one_runs_a_call_of_a_key_and_the_other_waits_for_it(
    place: Place,
) -> None:
    store, runs, started, release = Shared(), [], asyncio.Event(), asyncio.Event()

    def made(name: str) -> Service:
        service = place.service(result_store=store)

        @service.method
        async def work() -> str:
            runs.append(name)
            started.set()
            await release.wait()
            return name

        return service

    a, b = (place.worker(made(name), prefetch=1) for name in "ab")
    async with a, b, place.client() as client:
        caller = client.with_options(idempotency_key="k")
        calls = [asyncio.create_task(caller.call("things.work")) for _ in range(2)]
        await started.wait()
        while (a.in_flight, b.in_flight) != (1, 1):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        release.set()
        assert await asyncio.gather(*calls) == runs * 2
    assert len(runs) == 1


async def test_after_the_time_of_a_lost_owner_each_caller_of_its_key_hears_of_it_at_once(place: Place) -> None:
    store, runs = Shared(), []
    service = place.service(result_store=store)

    @service.method
    async def work() -> None:
        runs.append(1)

    await store.claim("things//k", "lost", 0.1)
    async with place.worker(service), place.client() as client:
        caller = client.with_options(idempotency_key="k", timeout=30)
        for _ in range(3):
            with pytest.raises(OutcomeUnknown, match="a worker that ran a request with its idempotency key was lost"):
                await asyncio.wait_for(caller.call("things.work"), 5)
    assert runs == []


async def test_a_call_that_failed_releases_its_key(place: Place) -> None:
    store, runs = Shared(), []
    service = place.service(result_store=store, errors=[Busy])

    @service.method
    async def work() -> int:
        runs.append(1)
        if len(runs) == 1:
            raise Busy("once")
        return len(runs)

    async with place.worker(service), place.client() as client:
        caller = client.with_options(idempotency_key="k", errors=(Busy,))
        with pytest.raises(Busy):
            await caller.call("things.work")
        assert await asyncio.wait_for(caller.call("things.work"), 5) == 2


class Cancelling(MemoryResults):
    """A store that ends in a cancellation of its own, as one over a connection pool may."""

    async def claim(self, key: str, owner: str, seconds: float) -> StoredResult | Claim:
        raise asyncio.CancelledError

    async def get(self, key: str) -> StoredResult | None:
        raise asyncio.CancelledError


async def test_a_def_handler_that_ends_as_the_time_of_its_call_does_keeps_its_key(place: Place) -> None:
    """The worker's loop learns of both at once: the handler has run to its end, and must not run again."""
    service, runs = place.service(result_store=MemoryResults(10_000)), 0
    goes_on = threading.Event()

    @service.method
    def book() -> int:
        nonlocal runs
        runs += 1
        goes_on.wait(20)
        return runs

    async with place.worker(service), place.client() as client:
        caller = client.with_options(idempotency_key="order-17", timeout=0.4)
        first = asyncio.create_task(caller.call("things.book"))
        while not runs:
            if first.done():  # it came too late to begin
                first = asyncio.create_task(caller.call("things.book"))
            await asyncio.sleep(0.005)
        time.sleep(0.5)  # noqa: ASYNC251 - as a handler does that blocks the loop
        goes_on.set()
        time.sleep(0.1)  # noqa: ASYNC251 - until the thread has ended
        with pytest.raises(CallTimeout):
            await first
        with pytest.raises(OutcomeUnknown, match="was lost"):
            await client.with_options(idempotency_key="order-17", timeout=20.0).call("things.book")
    assert runs == 1


async def test_a_store_that_is_cancelled_by_itself_ends_no_call_as_one_that_ran(place: Place) -> None:
    service, runs = place.service(result_store=Cancelling(0)), []

    @service.method
    async def work() -> None:
        runs.append(1)

    async with place.worker(service), place.client() as client:
        with pytest.raises(CallError) as caught:
            await client.with_options(idempotency_key="k", timeout=0.5).call("things.work")
    assert runs == []
    assert caught.value.executed != "yes"


# Retries.


@asynccontextmanager
async def failing(place: Place, times: int) -> AsyncIterator[tuple[Client, list[Context]]]:
    """A service that fails so often, and then gives the number of the run."""
    service, seen = place.service(errors=[Busy]), []

    def work(context: Context, error: str) -> int:
        seen.append(context)
        if len(seen) <= times:
            raise Busy("busy") if error == "busy" else ValueError(error)
        return len(seen)

    service.method(name="work")(work)
    service.method(name="again", idempotent=True)(work)
    async with place.worker(service), place.client(timeout=10) as client:
        yield client, seen


async def test_nothing_is_retried_unless_it_is_asked_for(place: Place) -> None:
    async with failing(place, 1) as (client, seen):
        with pytest.raises(RemoteError):
            await client.with_options(idempotent=True).call("things.again", error="unknown")
        assert len(seen) == 1


@pytest.mark.parametrize("error", ["busy", "unknown"])
async def test_an_idempotent_call_that_ran_and_failed_is_made_again_as_the_next_attempt(
    place: Place, error: str
) -> None:
    async with failing(place, 3) as (client, seen):
        caller = client.with_options(idempotent=True, retry=QUICK)
        assert await caller.call("things.again", error=error) == 4
        assert [it.attempt for it in seen] == [1, 2, 3, 4]
        assert len({it.idempotency_key for it in seen}) == 1
        assert len({it.correlation_id for it in seen}) == 4


async def test_a_call_that_may_have_run_is_never_made_again_unless_it_is_idempotent(place: Place) -> None:
    async with failing(place, 1) as (client, seen):
        with pytest.raises(RemoteError) as caught:
            await client.with_options(retry=QUICK, idempotency_key="k").call("things.work", error="unknown")
        assert (len(seen), caught.value.executed) == (1, "yes")


async def test_a_code_that_is_not_asked_for_is_not_retried(place: Place) -> None:
    async with failing(place, 1) as (client, seen):
        retry = Retry(initial_backoff=0.01)
        with pytest.raises(RemoteError):
            await client.with_options(retry=retry, idempotent=True).call("things.again", error="unknown")
        with pytest.raises(InvalidParams):
            await client.with_options(retry=QUICK).call("things.work", no=1)
        assert len(seen) == 1


async def test_the_last_error_is_told_when_the_attempts_are_used_up(place: Place) -> None:
    async with failing(place, 100) as (client, seen):
        with pytest.raises(RemoteError) as caught:
            await client.with_options(retry=QUICK, idempotent=True).call("things.again", error="unknown")
        assert (len(seen), caught.value.executed) == (QUICK.max_attempts, "yes")


async def test_retries_are_inside_the_one_deadline(place: Place) -> None:
    async with failing(place, 10_000) as (client, seen):
        retry = Retry(max_attempts=1000, initial_backoff=0.05, max_backoff=0.05, codes=("UNKNOWN",))
        caller = client.with_options(retry=retry, idempotent=True, timeout=0.5)
        while not seen:  # a call that comes too late does not begin
            overdue = Overdue(0.5)
            with pytest.raises(CallError) as caught:  # the last failure, or what the deadline made of the last attempt
                await caller.call("things.again", error="unknown")
            overdue.stop()
        assert caught.value.executed != "no"
        assert not overdue.is_so
        assert len(seen) < 1000
        assert all(it.deadline.at <= seen[0].deadline.at + 0.1 for it in seen)


async def test_a_service_that_is_not_there_yet_is_called_again_until_it_is(place: Place) -> None:
    service = place.service()

    @service.method
    async def work(context: Context) -> int:
        return context.attempt

    async with place.client() as client:
        retry = Retry(max_attempts=1000, initial_backoff=0.02, max_backoff=0.1)
        call = asyncio.create_task(client.with_options(retry=retry).call("things.work"))
        await asyncio.sleep(0.2)
        assert not call.done()
        async with place.worker(service):
            assert await call == 1  # it had never run


async def test_a_client_that_is_full_counts_as_overloaded_and_a_later_attempt_does_not_claim_that_nothing_ran(
    place: Place,
) -> None:
    service, release = place.service(), asyncio.Event()
    runs = 0

    @service.method
    async def hold() -> None:
        await release.wait()

    @service.method(idempotent=True)
    async def fail() -> None:
        nonlocal runs
        runs += 1
        raise ValueError

    async with place.worker(service), place.client(max_in_flight=1) as client:
        holding = asyncio.create_task(client.call("things.hold"))
        await asyncio.sleep(0)
        retry = Retry(max_attempts=1000, initial_backoff=0.01, max_backoff=0.02)
        waiting = asyncio.create_task(client.with_options(retry=retry).call("things.hold"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        release.set()
        await asyncio.gather(holding, waiting)
        release.clear()

        retry = Retry(max_attempts=2, initial_backoff=0.2, max_backoff=0.2, codes=("UNKNOWN",))
        failing = asyncio.create_task(client.with_options(retry=retry, idempotent=True).call("things.fail"))
        while not runs or client.in_flight:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)
        holding = asyncio.create_task(client.call("things.hold"))
        (error,) = await asyncio.gather(failing, return_exceptions=True)
        assert isinstance(error, Overloaded | RemoteError)
        assert error.executed == ("maybe" if isinstance(error, Overloaded) else "yes")
        release.set()
        await holding


async def test_a_cancelled_caller_is_not_called_for_again(place: Place) -> None:
    async with place.client() as client:
        retry = Retry(max_attempts=1000, initial_backoff=5.0, max_backoff=5.0)
        call = asyncio.create_task(client.with_options(retry=retry).call("things.work"))
        await asyncio.sleep(0.1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert client.in_flight == 0


async def test_closing_the_client_ends_retries(place: Place) -> None:
    async with place.client() as client:
        retry = Retry(max_attempts=1000, initial_backoff=0.05, max_backoff=0.05)
        call = asyncio.create_task(client.with_options(retry=retry).call("things.work"))
        await asyncio.sleep(0.1)
    (error,) = await asyncio.gather(call, return_exceptions=True)
    assert isinstance(error, RuntimeError | CallError)  # between two attempts, or within one
