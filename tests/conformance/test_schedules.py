"""Jobs with a schedule, on both transports."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from rpcq import Context, Every, Service
from rpcq.jobs import ticking
from rpcq.transport.base import Message
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.tickets import Ticket, encode_ticket, read_ticket
from support.letters import letters
from support.places import Place, lose

PERIOD = timedelta(seconds=0.25)


class Seen:
    """The ticks that handlers saw."""

    def __init__(self) -> None:
        self.contexts: list[Context] = []
        self._changed = asyncio.Event()

    def note(self, context: Context) -> None:
        self.contexts.append(context)
        self._changed.set()

    @property
    def ticks(self) -> Counter[datetime]:
        return Counter(context.due for context in self.contexts if context.due is not None)

    async def each(self, count: int, period: timedelta = PERIOD, after: datetime | None = None) -> list[datetime]:
        """Wait for so many ticks that follow each other, from the first one on, or the first one after a moment."""
        while True:
            ticks = sorted(tick for tick in self.ticks if after is None or tick > after)
            wanted = [ticks[0] + number * period for number in range(count)] if ticks else []
            if wanted and set(wanted) <= set(ticks):
                return wanted
            self._changed.clear()
            await self._changed.wait()


def a_service(seen: Seen, name: str | None = None, **options: Any) -> Service:
    service = Service(name or f"s{secrets.token_hex(6)}")

    @service.job(**{"schedule": Every(PERIOD.total_seconds(), missed="all"), **options})
    async def beat(context: Context) -> None:
        seen.note(context)

    return service


@pytest.fixture
async def seen() -> Seen:
    return Seen()


async def test_a_job_is_sent_at_each_tick_under_a_key_of_its_own(home: Place, seen: Seen) -> None:
    before = datetime.now(UTC)
    async with home.worker(a_service(seen)):
        ticks = await seen.each(4)
    assert {context.idempotency_key for context in seen.contexts} >= {
        f"cron:beat:{tick.isoformat(timespec='milliseconds')}" for tick in ticks
    }
    assert set(seen.ticks.values()) == {1}
    assert before < ticks[0] < before + timedelta(seconds=30)
    assert all(tick.microsecond % 250_000 == 0 for tick in ticks)


async def test_many_workers_send_each_tick_once(home: Place, seen: Seen) -> None:
    name = f"s{secrets.token_hex(6)}"
    async with home.worker(a_service(seen, name)), home.worker(a_service(seen, name)):
        await seen.each(6)
    assert set(seen.ticks.values()) == {1}


async def test_ticks_that_come_while_nobody_is_there_are_made_up_for(home: Place, seen: Seen) -> None:
    service = a_service(seen)
    async with home.client():  # keeps the in-process broker
        async with home.worker(service):
            await seen.each(2)
        await asyncio.sleep(4 * PERIOD.total_seconds())
        async with home.worker(service):
            await seen.each(8)


async def test_a_worker_that_is_lost_leaves_its_schedule_to_another_one(home: Place, seen: Seen) -> None:
    service = a_service(seen)
    first = home.worker(service)
    await first.start()
    await seen.each(2)
    async with home.worker(service):
        await lose(first)
        await seen.each(8)


async def test_a_cut_costs_no_tick(home: Place, seen: Seen) -> None:
    async with home.worker(a_service(seen)) as worker:
        await seen.each(2)
        await home.cut(worker)
        await seen.each(8)


async def test_a_ticket_is_published_again_before_the_broker_takes_it_back(
    home: Place, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticking, "HELD", 0.05)
    async with home.worker(a_service(seen)):
        await seen.each(4)


async def publish(home: Place, service: str, body: bytes, properties: bytes) -> None:
    topology = JobTopology(home.namespace)
    async with home.client() as client:
        confirmed = asyncio.get_running_loop().create_future()
        await client._transport.declare([topology.due])
        key = topology.ticket_key(service).encode()
        client._transport.publish(
            Message(topology.due.name.encode(), key, b"t", properties, body, confirmed.set_result)
        )
        await confirmed


async def test_a_changed_schedule_begins_anew_and_makes_up_for_nothing(home: Place, seen: Seen) -> None:
    service = a_service(seen)
    slower = timedelta(seconds=0.5)
    changed = Seen()
    async with home.client():  # keeps the in-process broker
        async with home.worker(service):
            await seen.each(1)
        await asyncio.sleep(0.6)
        begun = datetime.now(UTC)
        async with home.worker(a_service(changed, service.name, schedule=Every(0.5, missed="all"))):
            await changed.each(2, slower, after=begun)
    # Jobs of the old schedule may have waited in the queue; nothing was sent for the time without a worker.
    late = {tick for tick in changed.ticks if begun - slower < tick < begun}
    assert not late, "the new schedule made up for a tick before its first worker"


async def test_a_ticket_of_a_schedule_that_a_worker_does_not_have_is_kept_for_a_day(
    home: Place, seen: Seen, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(ticking, "HELD", 0.05)
    service = a_service(seen)
    async with home.client():  # keeps the in-process broker
        async with home.worker(service):
            await seen.each(1)
            now = round(datetime.now(UTC).timestamp() * 1000)
            for job, at in (("newer", now), ("gone", now - ticking.FORGOTTEN_AFTER_MS - 1)):
                properties, body = encode_ticket(Ticket(job, "every 1 s", since=at, last=at, seen=at), "t", "worker")
                await publish(home, service.name, body, properties)
            while not any("schedule is gone" in it.getMessage() for it in caplog.records):  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.02)
            await seen.each(4)
        async with letters(home.url, JobTopology(home.namespace).tickets(service.name)) as left:
            found = {read_ticket(each.body).job for each in await left.wait_for(2)}
    assert found == {"newer", "beat"}


async def test_what_is_no_ticket_becomes_a_dead_letter_and_the_schedule_goes_on(home: Place, seen: Seen) -> None:
    service = a_service(seen)
    async with home.worker(service):
        await seen.each(1)
        properties, _ = encode_ticket(Ticket("beat", "", 0, 0, 0), "t", "somebody")
        await publish(home, service.name, b"nonsense", properties)
        async with letters(home.url, JobTopology(home.namespace).dead_queue(service.name)) as dead:
            (letter,) = await dead.wait_for(1)
        await seen.each(3)
    assert letter.body == b"nonsense"
