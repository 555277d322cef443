"""The limits of jobs in one worker, on both transports: `max_concurrency`, `rate`, and how long a job is held."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from rpcq import Retry, Service
from rpcq.jobs import limits, overdue
from support.jobs import Done, dead_queue, settled
from support.letters import letters
from support.load import until
from support.places import Place

QUICKLY = pytest.mark.parametrize("home", ["memory", pytest.param("rabbitmq", marks=pytest.mark.long)], indirect=True)
"""On RabbitMQ too with `make test-faults`; `make test` has its time."""


async def declared(home: Place, service: Service) -> None:
    async with home.worker(service):
        pass


@QUICKLY
async def test_no_more_jobs_of_a_name_run_at_once_than_its_limit(home: Place, service: Service, done: Done) -> None:
    now: set[int] = set()
    most = 0

    @service.job(max_concurrency=2)
    async def slow(number: int) -> None:
        nonlocal most
        now.add(number)
        most = max(most, len(now))
        await asyncio.sleep(0.01)
        now.remove(number)
        done.note(number)

    async with home.client() as client:
        await declared(home, service)
        await client.send_many(slow, [{"number": number} for number in range(30)])
        async with home.worker(service) as worker:
            await done.until(lambda counts: len(counts) == 30)
            await settled(worker)
    assert most == 2
    assert set(done.counts.values()) == {1}


@pytest.mark.parametrize("is_slow_by", ["max_concurrency", "rate"])
async def test_a_backlog_of_a_slow_job_does_not_hold_up_the_other_jobs_of_its_service(
    home: Place, service: Service, done: Done, is_slow_by: str
) -> None:
    go_on = asyncio.Event()
    options: dict[str, Any] = {"max_concurrency": 1} if is_slow_by == "max_concurrency" else {"rate": "1/h"}

    @service.job(**options)
    async def slow() -> None:
        done.note("slow")
        if is_slow_by == "max_concurrency":
            await go_on.wait()

    @service.job
    async def quick(number: int) -> None:
        done.note(number)

    async with home.client() as client:
        await declared(home, service)
        await client.send_many(slow, [{} for _ in range(40)])
        await client.send_many(quick, [{"number": number} for number in range(10)])
        async with home.worker(service, job_prefetch=4) as worker:
            await done.until(lambda counts: len(counts) == 11)
            assert done.counts["slow"] == 1
            assert worker._jobs is not None
            assert (worker._jobs.retried, worker._jobs.dead) == (0, 0)
            go_on.set()
    assert {done.counts[number] for number in range(10)} == {1}


@QUICKLY
async def test_jobs_with_a_rate_take_their_time(home: Place, service: Service, done: Done) -> None:
    @service.job(rate="20/s")
    async def rated() -> None:
        done.note("run")

    async with home.client() as client:
        await declared(home, service)
        await client.send_many(rated, [{} for _ in range(8)])
        start = time.monotonic()
        async with home.worker(service) as worker:
            await done.until(lambda counts: counts["run"] == 8)
            await settled(worker)
    assert time.monotonic() - start >= 7 / 20  # a loaded machine only makes it longer


@QUICKLY
async def test_the_time_that_a_job_waits_for_its_turn_is_not_part_of_its_timeout(
    home: Place, service: Service, done: Done
) -> None:
    go_on = asyncio.Event()

    @service.job(max_concurrency=1, timeout=0.3, retry=None)
    async def slow(number: int) -> None:
        if number == 0:
            await go_on.wait()
        done.note(number)

    async with home.client() as client:
        await declared(home, service)
        await client.send_many(slow, [{"number": 0}, {"number": 1}])
        async with home.worker(service) as worker:
            async with letters(home.url, dead_queue(home, service)) as dead:
                await dead.wait_for(1)  # the first one has timed out
            await done.until(lambda counts: counts[1] == 1)
            await settled(worker)
    assert [letter.body for letter in dead.found] == [b'{"number":0}']


async def test_a_worker_that_stops_gives_back_what_waits_for_its_turn(
    home: Place, service: Service, done: Done
) -> None:
    go_on = asyncio.Event()

    @service.job(max_concurrency=1)
    async def slow(number: int) -> None:
        done.note(number)
        await go_on.wait()

    @service.job(max_concurrency=1, at_most_once=True)
    async def once(number: int) -> None:
        done.note(f"once {number}")
        await go_on.wait()

    async with home.client() as client:
        worker = home.worker(service, job_prefetch=8)
        await worker.start()
        await client.send_many(slow, [{"number": 0}, {"number": 1}])
        await client.send_many(once, [{"number": 0}, {"number": 1}])
        await done.until(lambda counts: counts.total() == 2)
        await until(lambda: worker.in_flight == 4)
        stopping = asyncio.create_task(worker.stop())
        await until(lambda: worker.in_flight == 2)
        go_on.set()
        assert await stopping
        assert done.counts.total() == 2
        async with home.worker(service) as next_worker:
            await done.until(lambda counts: counts.total() == 4)
            await settled(next_worker)
            assert next_worker._jobs is not None
            assert next_worker._jobs.dead == 0
    assert set(done.counts.values()) == {1}


@QUICKLY
async def test_a_job_that_has_waited_too_long_is_put_off(
    home: Place, service: Service, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overdue, "LOOK_PAUSE", 0.05)
    monkeypatch.setattr(overdue, "LONGEST_WAIT", 0.05)
    go_on = asyncio.Event()

    @service.job(max_concurrency=1)
    async def slow(number: int) -> None:
        done.note(number)
        await go_on.wait()

    async with home.client() as client:
        await declared(home, service)
        async with home.worker(service) as worker:
            assert worker._jobs is not None
            await client.send(slow, number=0)
            await done.until(lambda counts: counts[0] == 1)
            await client.send(slow, number=1)
            await until(lambda: worker._jobs.put_off)
            go_on.set()
            await done.until(lambda counts: counts[1] == 1)
            await settled(worker)
            assert worker._jobs.retried == 0


@QUICKLY
@pytest.mark.parametrize("kind", ["thread", "task"])
async def test_a_handler_that_never_ends_has_a_bound_and_harms_no_other_job(
    home: Place, service: Service, done: Done, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(overdue, "LOOK_PAUSE", 0.05)
    monkeypatch.setattr(overdue, "LONGEST_RUN", 0.2)
    end = threading.Event()
    ended = asyncio.Event()

    def hang_in_thread() -> None:
        end.wait(30)

    async def hang() -> None:
        while not ended.is_set():
            try:
                await ended.wait()
            except asyncio.CancelledError:
                done.note("cancelled")

    retry = Retry(max_attempts=2, initial_backoff=0.01, max_backoff=0.01)
    handler = hang_in_thread if kind == "thread" else hang
    service.job(name="hangs", timeout=0.1, max_concurrency=4, retry=retry)(handler)

    @service.job
    def quick(number: int) -> None:
        pass

    async with home.client() as client, home.worker(service, job_prefetch=1, grace=0.2) as worker:
        await client.send(f"{service.name}.hangs")
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
        await client.send_many(quick, [{"number": number} for number in range(5)])
        await until(lambda: worker._jobs.finished == 7)
        end.set()
        ended.set()
        await settled(worker)
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("attempts", "yes")
    assert letter.headers["rpcq-attempt"] == 2
    assert "timed out" in letter.headers["rpcq-error"]


def test_a_job_is_not_held_as_long_as_rabbitmq_allows() -> None:
    longest = overdue.LONGEST_RUN + overdue.LONGEST_WAIT + 2 * overdue.LOOK_PAUSE
    assert limits.NEAR < overdue.LONGEST_WAIT
    assert 25 * 60 < longest < 30 * 60
