"""Handlers that take lists: what callers get is what they would get from a handler of their call alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import pytest
from prometheus_client import CollectorRegistry

from rpcq import (
    Batch,
    CallTimeout,
    Client,
    Context,
    DomainError,
    InvalidParams,
    InvalidReply,
    ObservedBatch,
    Observer,
    OutcomeUnknown,
    PermissionDenied,
    RemoteError,
    Service,
    contract,
)
from rpcq.observability.metrics import Metrics
from support.late import let_others_speak_first
from support.places import Place, lose

QUEUE_TYPE_MATTERS = False

LATE = 30.0
"""Seconds that no test waits for."""


class Empty(DomainError):
    code = "empty"


class Sizes(Observer):
    """The sizes of the batches that ran."""

    def __init__(self) -> None:
        self.seen: list[ObservedBatch] = []

    def on_batch(self, batch: ObservedBatch) -> None:
        self.seen.append(batch)


@contract("things", errors=[Empty], idempotent=["embed"])
class Things(Protocol):
    async def embed(self, text: str, *, times: int = 1) -> list[float]: ...


def embedding(place: Place) -> Service:
    service = Service(api=Things, queue_type=place.queue_type)

    @service.method(batch=Batch(max_size=4, max_wait=0.02))
    async def embed(text: list[str], *, times: Sequence[int] = (1,)) -> list[list[float] | Empty]:
        await asyncio.sleep(0)
        return [[float(len(t))] * n if t else Empty("no text") for t, n in zip(text, times, strict=True)]

    return service


async def test_callers_of_a_contract_call_as_if_the_handler_took_one_call(place: Place) -> None:
    sizes = Sizes()
    async with place.worker(embedding(place), observers=[sizes]), place.client() as client:
        things = client.bind(Things)
        assert await things.embed("abc", times=2) == [3.0, 3.0]
        found = await asyncio.gather(*(things.embed("x" * n) for n in range(1, 9)))
        assert found == [[float(n)] for n in range(1, 9)]
    assert sum(it.size for it in sizes.seen) == 9
    assert all(it.size <= 4 and it.label == "things.embed" and it.seconds > 0 for it in sizes.seen)
    assert max(it.size for it in sizes.seen) > 1


async def test_a_bad_call_fails_alone_whatever_is_wrong_with_it(place: Place) -> None:
    async with place.worker(embedding(place)), place.client() as client:
        things = client.bind(Things)
        good, empty, wrong, unknown, more = await asyncio.gather(
            things.embed("ab"),
            things.embed(""),
            client.call("things.embed", text=5),
            client.call("things.embed", txt="ab"),
            things.embed("abc"),
            return_exceptions=True,
        )
        assert (good, more) == ([2.0], [3.0])
        assert isinstance(empty, Empty)
        assert (empty.message, empty.executed) == ("no text", "yes")
        assert isinstance(wrong, InvalidParams)
        assert isinstance(unknown, InvalidParams)
        assert (wrong.executed, unknown.executed) == ("no", "no")


async def test_what_the_handler_raises_and_what_is_no_list_of_results_each_caller_gets(place: Place) -> None:
    service = place.service(errors=[Empty])

    @service.method(batch=Batch(max_size=3, max_wait=LATE))
    async def mixed(x: list[str]) -> list[int]:
        match x[0]:
            case "declared":
                raise Empty("all")
            case "undeclared":
                raise ValueError("secret")
            case "short":
                return [1]
        return ["what is no int"] * 3  # type: ignore[list-item]

    async with place.worker(service), place.client() as client:

        async def three(x: str) -> list[BaseException]:
            calls = (client.with_options(errors=[Empty]).call("things.mixed", x=x) for _ in range(3))
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert len({it.correlation_id for it in found}) == 3
            assert {it.executed for it in found} == {"yes"}
            return found

        assert [type(it) for it in await three("declared")] == [Empty] * 3
        undeclared = await three("undeclared")
        assert [type(it) for it in undeclared] == [RemoteError] * 3
        assert "secret" not in str(undeclared)
        for it in await three("short"):
            assert isinstance(it, InvalidReply)
            assert "must return a list of 3 results, one for each call; got 1" in str(it)
        for it in await three("wrong"):
            assert isinstance(it, InvalidReply)
            assert "does not fit its annotation" in str(it)


async def test_a_def_handler_takes_its_list_in_a_thread_and_each_context_is_its_calls_own(place: Place) -> None:
    service = place.service()

    @service.method(batch=Batch(max_size=2, max_wait=LATE))
    def who(contexts: list[Context], x: list[int]) -> list[str]:
        assert threading.current_thread() is not threading.main_thread()
        return [f"{it.metadata['x-who']} {n}" for it, n in zip(contexts, x, strict=True)]

    async with place.worker(service), place.client() as client:
        calls = (client.with_options(metadata={"x-who": f"user{n}"}).call("things.who", x=n) for n in range(2))
        assert await asyncio.gather(*calls) == ["user0 0", "user1 1"]


async def test_each_call_ends_at_its_own_deadline_and_says_whether_the_handler_got_it(place: Place) -> None:
    service = place.service()
    entered, goes_on = asyncio.Event(), asyncio.Event()
    got: list[int] = []

    @service.method(batch=Batch(max_size=2, max_wait=LATE))
    async def hold(x: list[int]) -> list[int]:
        got.extend(x)
        entered.set()
        await goes_on.wait()
        return x

    async with place.worker(service) as worker, place.client() as client:
        stays = asyncio.create_task(client.call("things.hold", x=1))
        await until(lambda: worker.in_flight == 1)
        let_others_speak_first(client)
        while not entered.is_set():  # a call that comes too late makes no batch
            with pytest.raises(CallTimeout) as ran:
                await client.with_options(timeout=1.0).call("things.hold", x=2)
        with pytest.raises(CallTimeout) as waited:
            await client.with_options(timeout=0.3).call("things.hold", x=3)
        goes_on.set()
        assert await stays == 1
    assert (ran.value.executed, waited.value.executed) == ("yes", "no")
    assert got == [1, 2]


async def test_a_cancelled_call_leaves_and_the_handler_goes_on_for_the_others(place: Place) -> None:
    service = place.service()
    goes_on = asyncio.Event()
    got: list[list[int]] = []
    cancelled = 0

    @service.method(batch=Batch(max_size=2, max_wait=LATE))
    async def hold(x: list[int]) -> list[int]:
        nonlocal cancelled
        got.append(x)
        try:
            await goes_on.wait()
        except asyncio.CancelledError:
            cancelled += 1
            raise
        return x

    async with place.worker(service) as worker, place.client() as client:
        calls = [asyncio.create_task(client.call("things.hold", x=x)) for x in range(2)]
        await until(lambda: bool(got))
        calls[0].cancel()
        await asyncio.wait([calls[0]])
        await asyncio.sleep(0.05)
        assert not cancelled
        goes_on.set()
        assert await calls[1] == 1
        goes_on.clear()
        both = [asyncio.create_task(client.call("things.hold", x=x)) for x in range(2, 4)]
        await until(lambda: len(got) == 2)
        for call in both:
            call.cancel()
        await until(lambda: cancelled == 1)
        await until(lambda: worker.in_flight == 0)


async def test_a_key_is_run_once_also_within_one_batch(place: Place) -> None:
    service = place.service()
    got: list[list[int]] = []

    @service.method(batch=Batch(max_size=4, max_wait=0.05), idempotent=True)
    async def count(x: list[int]) -> list[int]:
        got.append(x)
        return [len(got) * 100 + it for it in x]

    async with place.worker(service), place.client() as client:
        keyed = client.with_options(idempotency_key="a", idempotent=True)
        first = await asyncio.gather(*(keyed.call("things.count", x=1) for _ in range(3)))
        assert first == [101] * 3
        assert await asyncio.gather(keyed.call("things.count", x=1), client.call("things.count", x=2)) == [101, 202]
    assert got == [[1], [2]]


async def test_authorize_is_asked_for_each_call_before_the_handler_gets_it(place: Place) -> None:
    async def authorize(context: Context) -> None:
        if "x-no" in context.metadata:
            raise PermissionDenied("not you")

    service = place.service(authorize=authorize)
    got: list[int] = []

    @service.method(batch=Batch(max_size=8, max_wait=0.05))
    async def take(x: list[int]) -> list[int]:
        got.extend(x)
        return x

    async with place.worker(service), place.client() as client:
        denied = client.with_options(metadata={"x-no": "1"})
        one, no, two = await asyncio.gather(
            client.call("things.take", x=1),
            denied.call("things.take", x=3),
            client.call("things.take", x=2),
            return_exceptions=True,
        )
    assert (one, two) == (1, 2)
    assert isinstance(no, PermissionDenied)
    assert sorted(got) == [1, 2]


async def test_calls_that_wait_for_others_run_at_once_when_the_worker_stops(place: Place) -> None:
    service = place.service()

    @service.method(batch=Batch(max_size=32, max_wait=LATE))
    async def take(x: list[int]) -> list[int]:
        return [len(x)] * len(x)

    async with place.client() as client:
        worker = place.worker(service)
        await worker.start()
        calls = [asyncio.create_task(client.call("things.take", x=x)) for x in range(3)]
        await until(lambda: worker.in_flight == 3)
        assert await worker.stop()
        assert await asyncio.gather(*calls) == [3, 3, 3]


async def test_calls_of_a_batch_whose_worker_is_cut_off_or_lost_may_have_run(place: Place) -> None:
    service = place.service()
    entered = asyncio.Event()

    @service.method(batch=Batch(max_size=2, max_wait=LATE))
    async def hang(x: list[int]) -> list[int]:
        entered.set()
        await asyncio.Event().wait()
        return x

    async def two(client: Client) -> list[asyncio.Task[int]]:
        entered.clear()
        calls = [asyncio.create_task(client.call("things.hang", x=x)) for x in range(2)]
        await entered.wait()
        return calls

    async with place.client() as client:
        worker = place.worker(service, grace=0.05)
        await worker.start()
        cut_off = await two(client)
        assert not await worker.stop()
        worker = place.worker(service, grace=0.05)
        await worker.start()
        lost = await two(client)
        await lose(worker)
        async with place.worker(service):  # gets the redeliveries of a classic queue
            for call in (*cut_off, *lost):
                with pytest.raises(OutcomeUnknown) as error:
                    await call
                assert error.value.executed == "maybe"


async def test_metrics_have_single_calls_and_besides_how_large_batches_are(place: Place) -> None:
    registry = CollectorRegistry()
    async with place.worker(embedding(place), observers=[Metrics(registry)]), place.client() as client:
        await asyncio.gather(*(client.bind(Things).embed("x") for _ in range(8)))
    labels = {"service": "things", "method": "embed"}
    ended = registry.get_sample_value("rpcq_worker_requests_finished_total", {**labels, "code": "OK"})
    assert ended == 8
    assert registry.get_sample_value("rpcq_worker_batch_size_sum", labels) == 8
    count = registry.get_sample_value("rpcq_worker_batch_size_count", labels)
    assert count is not None
    assert 2 <= count < 8
    assert registry.get_sample_value("rpcq_worker_batch_size_bucket", {**labels, "le": "4.0"}) == count
    assert registry.get_sample_value("rpcq_worker_batch_duration_seconds_count", labels) == count


async def test_a_worker_whose_prefetch_is_below_the_size_of_a_batch_warns(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    service = place.service()

    @service.method(batch=Batch(max_size=20, max_wait=0.02))
    async def take(x: list[int]) -> list[int]:
        return [len(x)] * len(x)

    async with place.worker(service, prefetch=8), place.client() as client:
        assert max(await asyncio.gather(*(client.call("things.take", x=x) for x in range(30)))) <= 8
    warnings = [it.message for it in caplog.records if "batches cannot be full" in it.message]
    assert warnings == [
        "batches cannot be full: raise prefetch, or lower max_size method='things.take' max_size=20 prefetch=8"
    ]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for sets no event
        await asyncio.sleep(0.005)
