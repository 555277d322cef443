"""A worker that gets several calls in each message keeps finished messages back, so that the broker delivers fewer."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rpcq import Client, OutcomeUnknown, Service, Worker
from rpcq.calls import slots
from rpcq.calls.slots import Slots
from support.places import Place, lose
from support.seam import until

IN_FLIGHT = 100
PREFETCH = 24
"""A message has 3 calls at most: of 24 messages, 8 are kept back."""


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handlers are quick, however long this machine takes for them."""
    monkeypatch.setattr(slots, "MOST_MS", 10_000.0)


def things(place: Place) -> tuple[Service, Counter[int]]:
    service = place.service()
    runs: Counter[int] = Counter()

    @service.method
    async def work(nonce: int) -> int:
        runs[nonce] += 1
        return nonce

    return service, runs


class Calling:
    """Calls that go on, many at once, each with another nonce."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.made = self.ended = 0
        self.goes_on = True

    async def caller(self) -> None:
        while self.goes_on:
            nonce, self.made = self.made, self.made + 1
            assert await self.client.call("things.work", nonce=nonce) == nonce
            self.ended += 1


@asynccontextmanager
async def busy(client: Client, worker: Worker) -> AsyncIterator[Slots]:
    """The worker has much to do, and has kept back as many messages as it will."""
    calling = Calling(client)
    here = worker._intake.slots["things"]
    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(calling.caller())
        await until(lambda: len(here._kept) == here._most_kept > 0)
        before = calling.ended
        await until(lambda: calling.ended > before + 2 * IN_FLIGHT)
        await until(lambda: here.takes == client._sender.gathering.told[b"things"] == 3)
        yield here
        calling.goes_on = False
    assert calling.ended == calling.made


async def expect_nothing_left(place: Place, client: Client) -> None:
    """A second worker gets nothing that the first one had."""
    service, runs = things(place)
    async with place.worker(service) as worker:
        assert await client.call("things.work", nonce=-1) == -1
        assert worker.counts()["refused_redeliveries"] == 0
    assert client.unmatched_replies == 0
    assert runs == {-1: 1}


async def test_a_busy_worker_keeps_messages_back_and_acknowledges_them_when_there_is_nothing_more_to_do(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "LOOK_EVERY", 0.2)
    service, runs = things(place)
    async with place.client() as client:
        worker = place.worker(service, prefetch=PREFETCH)
        await worker.start()
        async with busy(client, worker) as here:
            pass
        await until(lambda: not here._kept)
        await lose(worker)  # it writes its acknowledgements before
        await expect_nothing_left(place, client)
        assert set(runs.values()) == {1}


async def test_a_worker_that_stops_leaves_nothing_that_it_kept_back(place: Place) -> None:
    service, runs = things(place)
    async with place.client() as client:
        async with place.worker(service, prefetch=PREFETCH) as worker, busy(client, worker) as here:
            pass
        assert not here._kept
        await expect_nothing_left(place, client)
        assert set(runs.values()) == {1}


async def test_what_a_worker_kept_back_when_it_was_lost_runs_nowhere_and_its_callers_notice_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "LOOK_EVERY", 60.0)
    service, runs = things(place)
    async with place.client() as client:
        worker = place.worker(service, prefetch=PREFETCH)
        await worker.start()
        async with busy(client, worker) as here:
            pass
        kept = len(here._kept)
        assert kept > 0
        await lose(worker)
        second, again = things(place)
        async with place.worker(second) as other:
            assert await client.call("things.work", nonce=-1) == -1
            await until(lambda: client.unmatched_replies >= kept)
            assert await client.call("things.work", nonce=-2) == -2
            refused = other.counts()["refused_redeliveries"]
        if place.queue_type == "quorum":  # the queue gave each up, and sent one notice of it
            assert (refused, client.unmatched_replies) == (0, kept)
        else:  # each call got a second reply, which is nobody's
            assert kept <= refused == client.unmatched_replies <= 3 * kept
        assert set(again) == {-1, -2}
        assert set(runs.values()) == {1}


async def test_a_worker_that_loses_its_session_goes_on_with_all_its_slots(place: Place) -> None:
    service, runs = things(place)
    async with place.client() as client, place.worker(service, prefetch=PREFETCH) as worker:
        async with busy(client, worker) as here:
            kept = len(here._kept)
        source = here._source
        await place.cut(worker, client)
        while here._source is source:
            with contextlib.suppress(OutcomeUnknown):
                await client.call("things.work", nonce=-1)
        async with busy(client, worker) as here:
            assert len(here._kept) == kept
        del runs[-1]
        assert max(runs.values()) == 2  # the second round has the same nonces
