"""Several replies in one message: nobody notices it but by the number of messages."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rpcq import CallError, Client, DomainError, InvalidParams, OutcomeUnknown, RemoteError
from support.places import Place

QUEUE_TYPE_MATTERS = False

CALLS = 60


class Odd(DomainError):
    code = "odd"


class Gate:
    """A service whose handlers end together, so that their replies are there in one iteration."""

    def __init__(self, place: Place, **options: Any) -> None:
        self.opened = asyncio.Event()
        self.inside = 0
        self.service = place.service(errors=[Odd], **options)

        @self.service.method(idempotent=True)
        async def work(x: int, size: int = 0) -> Any:
            self.inside += 1
            await self.opened.wait()
            if x % 7 == 3:
                raise Odd(str(x))
            if x % 7 == 4:
                raise ValueError(x)
            return x, "." * size

    async def gather(self, client: Client, *sizes: int, **options: Any) -> list[Any]:
        """What many calls end with, whose handlers end together."""
        self.inside = 0
        self.opened.clear()
        maker = client.with_options(errors=[Odd], **options)
        sizes = sizes or (0,) * CALLS
        calls = [asyncio.create_task(maker.call("things.work", x=x, size=size)) for x, size in enumerate(sizes)]
        await until(lambda: self.inside == len(sizes))
        self.opened.set()
        return await asyncio.gather(*calls, return_exceptions=True)


def check(found: list[Any], *sizes: int) -> None:
    """Each call ended as it had to."""
    for x, (it, size) in enumerate(zip(found, sizes or (0,) * CALLS, strict=True)):
        if x % 7 == 3:
            assert isinstance(it, Odd)
            assert it.message == str(x)
        elif x % 7 == 4:
            assert isinstance(it, RemoteError)
            assert it.incident
        else:
            assert it == [x, "." * size]


async def test_many_replies_take_few_messages_and_each_caller_gets_its_own(place: Place) -> None:
    gate = Gate(place)
    async with place.worker(gate.service) as worker, place.client() as client:
        check(await gate.gather(client))
        assert worker.counts()["reply_messages"] <= 10
        await until(lambda: worker.in_flight == 0)
        assert worker.counts()["finished"] == CALLS
        assert client.unmatched_replies == 0


@pytest.mark.parametrize("off", ["client", "service", "small client"])
async def test_without_batching_each_reply_is_a_message_and_callers_get_the_same(place: Place, off: str) -> None:
    gate = Gate(place, batching=off != "service")
    options: dict[str, Any] = {"client": {"batching": False}, "small client": {"max_body": 60_000}}.get(off, {})
    async with place.worker(gate.service) as worker, place.client(**options) as client:
        check(await gate.gather(client))
        assert worker.counts()["reply_messages"] == CALLS


async def test_large_replies_go_alone_and_the_others_together(place: Place) -> None:
    gate = Gate(place)
    sizes = [5000 if x % 2 else 3000 for x in range(CALLS)]
    async with place.worker(gate.service) as worker, place.client() as client:
        check(await gate.gather(client, *sizes), *sizes)
        large = sum(size == 5000 for x, size in enumerate(sizes) if x % 7 not in (3, 4))
        assert large < worker.counts()["reply_messages"] <= large + 10


async def test_two_clients_get_their_own_replies(place: Place) -> None:
    gate = Gate(place)
    async with place.worker(gate.service), place.client() as one, place.client() as other:
        gate.opened.set()
        first, second = await asyncio.gather(
            asyncio.gather(*(one.call("things.work", x=7 * x) for x in range(40))),
            asyncio.gather(*(other.call("things.work", x=7 * x) for x in range(40, 80))),
        )
        assert [x for x, _ in first] == [7 * x for x in range(40)]
        assert [x for x, _ in second] == [7 * x for x in range(40, 80)]
        assert one.unmatched_replies == other.unmatched_replies == 0


async def test_replies_that_call_for_another_attempt_are_heeded_in_a_batch(place: Place) -> None:
    gate = Gate(place)
    async with place.client() as client:
        worker = place.worker(gate.service, grace=0.05)
        await worker.start()
        calls = [asyncio.create_task(client.call("things.work", x=7 * x)) for x in range(10)]
        keyed = client.with_options(idempotent=True)
        again = [asyncio.create_task(keyed.call("things.work", x=7 * x)) for x in range(10)]
        await until(lambda: gate.inside == 20)
        assert not await worker.stop()  # cut off: ABORTED, maybe
        gate.opened.set()
        async with place.worker(gate.service):
            for call in calls:
                with pytest.raises(OutcomeUnknown):
                    await call
            assert [x for x, _ in await asyncio.gather(*again)] == [7 * x for x in range(10)]


async def test_refusals_go_together_too(place: Place) -> None:
    service = place.service()

    @service.method
    async def take(x: int) -> int:
        return x

    async with place.worker(service) as worker, place.client() as client:
        found = await asyncio.gather(*(client.call("things.take", x="no") for _ in range(50)), return_exceptions=True)
        assert {type(it) for it in found} == {InvalidParams}
        assert worker.counts()["reply_messages"] < 50


async def test_a_client_that_left_counts_for_each_reply(place: Place) -> None:
    gate = Gate(place)
    async with place.worker(gate.service) as worker:
        async with place.client() as client:
            calls = [asyncio.create_task(client.call("things.work", x=7)) for _ in range(20)]
            await until(lambda: gate.inside == 20)
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(it) for it in found} == {OutcomeUnknown}
        gate.opened.set()
        await until(lambda: worker.in_flight == 0)
        assert worker.counts()["unroutable_replies"] == 20


async def test_a_lost_session_in_between_costs_no_reply(place: Place) -> None:
    gate = Gate(place)
    async with place.worker(gate.service) as worker, place.client() as client:
        calls = [asyncio.create_task(client.call("things.work", x=7 * x)) for x in range(30)]
        await until(lambda: gate.inside == 30)
        gate.opened.set()
        await asyncio.sleep(0)
        await place.cut(worker)
        found = await asyncio.gather(*calls, return_exceptions=True)
        for x, it in enumerate(found):
            # Where all connections are cut, the client's own are, too.
            assert it == [7 * x, ""] or (isinstance(it, CallError) and it.executed == "maybe")


async def until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for sets no event
        await asyncio.sleep(0.005)
