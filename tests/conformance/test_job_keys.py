"""Jobs with idempotency keys, on both transports: what is done does not run again, what failed does."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import psycopg
import pytest

from rpcq import Context, Retry, RetryLater, Service
from rpcq.jobs import keys, outcomes
from rpcq.results import Claim, MemoryResults, StoredResult
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.jobs import JobMessage, encode_job
from support.jobs import Done, dead_queue, settled
from support.letters import letters
from support.load import until
from support.places import Place, lose
from support.sharing import asked, module

pytestmark = pytest.mark.usefixtures("postgres")

QUICKLY = pytest.mark.parametrize("home", ["memory", pytest.param("rabbitmq", marks=pytest.mark.long)], indirect=True)
"""On RabbitMQ too with `make test-faults`; `make test` has its time."""

SOON = Retry(max_attempts=3, initial_backoff=0.01, max_backoff=0.01)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "HELD_PAUSE", 0.25)
    monkeypatch.setattr(keys, "FIRST_PAUSE", 0.01)


def shared(service: Service, store: Any) -> Service:
    """Another process's view of a service that has a store."""
    return Service(service.name, result_store=store)


class Store(MemoryResults):
    """A store that fails when it shall."""

    def __init__(self) -> None:
        super().__init__(1_000_000)
        self.failing: set[str] = set()
        self.calls: list[str] = []

    def _note(self, what: str) -> None:
        self.calls.append(what)
        if what in self.failing:
            raise OSError("the store is down")

    async def claim(self, key: str, owner: str, seconds: float) -> StoredResult | Claim:
        self._note("claim")
        return await super().claim(key, owner, seconds)

    async def put(self, key: str, result: StoredResult) -> None:
        self._note("put")
        await super().put(key, result)

    async def release(self, key: str, owner: str) -> None:
        self._note("release")
        await super().release(key, owner)


def with_store(service: Service, request: pytest.FixtureRequest) -> Service:
    return Service(service.name, result_store=MemoryResults(1_000_000)) if request.param == "store" else service


@pytest.fixture(params=["own memory", "store"])
def served(request: pytest.FixtureRequest, service: Service) -> Service:
    return with_store(service, request)


async def test_a_job_whose_key_is_done_is_acknowledged_and_does_not_run(
    home: Place, served: Service, done: Done
) -> None:
    @served.job
    async def work(number: int) -> None:
        done.note(number)

    async with home.client() as client, home.worker(served) as worker:
        first = await client.with_options(idempotency_key="k").send(work, number=1)
        await done.until(lambda counts: counts[1] == 1)
        await settled(worker)
        again = await client.with_options(idempotency_key="k").send(work, number=1)
        by_id = await client.send(work, number=2)
        await done.until(lambda counts: counts[2] == 1)
        await client.with_options(idempotency_key=by_id.id).send(work, number=2)  # what a `SendError` says to do
        assert worker._jobs is not None
        await until(lambda: worker._jobs.suppressed == 2)
        await settled(worker)
    assert first.id != again.id
    assert done.counts == {1: 1, 2: 1}


@QUICKLY
async def test_a_message_that_the_broker_doubled_runs_once(home: Place, served: Service, done: Done) -> None:
    @served.job
    async def work() -> None:
        done.note("run")
        await asyncio.sleep(0.05)

    async with home.client() as client, home.worker(served) as worker:
        for _ in range(2):
            await double(client, home, served, JobMessage(id="one", name="work", body=b"{}", key="one"))
        await until(lambda: worker._jobs.suppressed == 1)
        await settled(worker)
    assert done.counts == {"run": 1}


async def double(client: Any, home: Place, service: Service, job: JobMessage) -> None:
    """Publish a job as it is."""
    from rpcq.transport.base import Message, Published

    exchange = JobTopology(home.namespace).jobs
    confirmed = asyncio.get_running_loop().create_future()
    await client._transport.declare([exchange])
    message = Message(
        exchange.name.encode(), service.name.encode(), b"c", encode_job(job, 0), job.body, confirmed.set_result
    )
    client._transport.publish(message)
    assert await confirmed is Published.CONFIRMED


@QUICKLY
async def test_a_key_of_one_job_one_service_or_a_call_suppresses_no_other(
    home: Place, served: Service, done: Done
) -> None:
    other = Service(f"{served.name}2", result_store=served.result_store)

    @served.job
    async def one() -> None:
        done.note("one")

    @served.job
    async def two() -> None:
        done.note("two")

    @other.job(name="one")
    async def other_one() -> None:
        done.note("other")

    @served.method
    async def called() -> str:
        return "called"

    async with home.client() as client, home.worker(served, other):
        keyed = client.with_options(idempotency_key="k")
        for job in (one, two, other_one):
            await keyed.send(job)
        assert await keyed.call(f"{served.name}.called") == "called"
        await done.until(lambda counts: counts.total() == 3)
        for _ in range(2):
            assert await keyed.call(f"{served.name}.called") == "called"
    assert done.counts == {"one": 1, "two": 1, "other": 1}


@QUICKLY
async def test_a_key_that_is_done_with_other_parameters_makes_a_dead_letter(
    home: Place, served: Service, done: Done
) -> None:
    @served.job
    async def work(number: int) -> None:
        done.note(number)

    async with home.client() as client, home.worker(served) as worker:
        keyed = client.with_options(idempotency_key="k")
        await keyed.send(work, number=1)
        await done.until(lambda counts: counts[1] == 1)
        await settled(worker)
        await keyed.send(work, number=2)
        async with letters(home.url, dead_queue(home, served)) as dead:
            (letter,) = await dead.wait_for(1)
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("invalid", "no")
    assert letter.headers["rpcq-error"] == "its idempotency key is that of a job that is done, with other parameters"
    assert done.counts == {1: 1}


async def test_a_job_that_failed_runs_again_and_so_does_a_replay_of_its_dead_letter(
    home: Place, served: Service, done: Done
) -> None:
    @served.job(retry=SOON)
    async def work(context: Context) -> None:
        if done.note("run") < 4:
            raise RetryLater(0.01)

    async with home.client() as client, home.worker(served) as worker:
        sent = await client.with_options(idempotency_key="k").send(work)
        async with letters(home.url, dead_queue(home, served)) as dead:
            await dead.wait_for(1)
        assert done.counts["run"] == 3
        # What `rpcq dlq replay` publishes: the ID and the key of the letter.
        await double(client, home, served, JobMessage(id=sent.id, name="work", body=b"{}", key="k"))
        await done.until(lambda counts: counts["run"] == 4)
        await settled(worker)
        await double(client, home, served, JobMessage(id=sent.id, name="work", body=b"{}", key="k"))
        await until(lambda: worker._jobs.suppressed == 1)
    assert done.counts == {"run": 4}


@QUICKLY
async def test_a_worker_that_remembers_nothing_runs_it_again(home: Place, service: Service, done: Done) -> None:
    @service.job
    async def work() -> None:
        done.note("run")

    async with home.client() as client, home.worker(service, remember=0):
        for _ in range(2):
            await client.with_options(idempotency_key="k").send(work)
        await done.until(lambda counts: counts["run"] == 2)


# With a store that workers share.


@QUICKLY
async def test_of_two_copies_on_two_workers_one_runs_and_the_other_waits_for_it(
    home: Place, service: Service, done: Done
) -> None:
    go_on = asyncio.Event()
    store = MemoryResults(1_000_000)
    workers = []
    for _ in range(2):
        each = shared(service, store)

        @each.job
        async def work() -> None:
            done.note("run")
            await go_on.wait()

        workers.append(home.worker(each, job_prefetch=1))
    async with home.client() as client, workers[0], workers[1]:
        for _ in range(2):
            await client.with_options(idempotency_key="k").send(f"{service.name}.work")
        await until(lambda: sum(worker._jobs.put_off for worker in workers) >= 2)  # it came back, and waits again
        assert done.counts == {"run": 1}
        go_on.set()
        await until(lambda: sum(worker._jobs.suppressed for worker in workers) == 1)
        await settled(*workers)
    assert done.counts == {"run": 1}


async def test_the_key_of_a_lost_worker_is_free_after_the_timeout_of_its_job(
    home: Place, service: Service, done: Done
) -> None:
    now = 0.0
    store = MemoryResults(1_000_000, now=lambda: now)
    release = store.release

    async def lost(key: str, owner: str) -> None:
        """A worker that is killed releases nothing."""

    store.release = lost  # type: ignore[method-assign]
    lost_service, next_service = shared(service, store), shared(service, store)

    @lost_service.job(timeout=60)
    async def work() -> None:
        done.note("lost")
        await asyncio.Event().wait()

    @next_service.job(name="work")
    async def next_work() -> None:
        # Else a job that kills its workers, and waits for its key each time, would never be a suspect.
        assert worker._jobs is not None
        done.note(("returns", next(run.job.earlier for run in worker._jobs)))
        done.note("next")

    async with home.client() as client:
        first = home.worker(lost_service, grace=0.01)
        await first.start()
        await client.send(work)
        await done.until(lambda counts: counts["lost"] == 1)
        await lose(first)
        store.release = release  # type: ignore[method-assign]
        async with home.worker(next_service) as worker:
            await until(lambda: worker._jobs.put_off)
            assert not done.counts["next"]
            now = 60 + keys.CLAIM_SLACK
            await done.until(lambda counts: counts["next"] == 1)
            await settled(worker)
    assert done.counts == {"lost": 1, "next": 1, ("returns", 1): 1}


@QUICKLY
@pytest.mark.parametrize("how", ["raises", "does not answer"])
async def test_a_store_that_fails_before_a_job_delays_it_and_costs_no_attempt(
    home: Place, service: Service, done: Done, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    store = Store()
    if how == "raises":
        store.failing = {"claim", "release"}
    else:
        monkeypatch.setattr(keys, "STORE_TIMEOUT", 0.05)
        up = asyncio.Event()
        claim = store.claim

        async def hang(*arguments: Any) -> Any:
            await up.wait()
            return await claim(*arguments)

        store.claim = hang  # type: ignore[method-assign]
    own = shared(service, store)

    @own.job(retry=None)
    async def work(context: Context) -> None:
        done.note(context.attempt)

    async with home.client() as client, home.worker(own) as worker:
        await client.send(work)
        await until(lambda: worker._jobs.put_off >= 2)
        assert not done.counts
        store.failing = set()
        if how != "raises":
            up.set()
        await done.until(lambda counts: counts[1] == 1)
        await settled(worker)
        assert (worker._jobs.dead, worker._jobs.retried) == (0, 0)
    assert done.counts == {1: 1}


@QUICKLY
async def test_a_job_is_done_although_the_store_cannot_take_that(home: Place, service: Service, done: Done) -> None:
    store = Store()
    store.failing = {"put"}
    own = shared(service, store)

    @own.job
    async def work() -> None:
        done.note("run")

    async with home.client() as client, home.worker(own) as worker:
        await client.send(work)
        await done.until(lambda counts: counts["run"] == 1)
        await settled(worker)
        assert (worker._jobs.finished, worker._jobs.put_off) == (1, 0)
    assert store.calls == ["claim", "put"]


@QUICKLY
async def test_a_thread_that_outlasts_its_timeout_keeps_its_key_and_then_is_done(
    home: Place, service: Service, done: Done
) -> None:
    store = Store()
    own = shared(service, store)
    go_on = threading.Event()

    @own.job(retry=SOON, timeout=0.05)
    def work() -> None:
        assert go_on.wait(30)

    async with home.client() as client, home.worker(own) as worker:
        await client.with_options(idempotency_key="k").send(work)
        await until(lambda: any(run.timed_out for run in worker._jobs))
        assert store.calls == ["claim"]
        go_on.set()
        await settled(worker)
        await until(lambda: len(store))
        await client.with_options(idempotency_key="k").send(work)
        await until(lambda: worker._jobs.suppressed == 1)
    assert store.calls == ["claim", "put", "claim"]


async def test_two_workers_share_the_keys_of_jobs_in_postgresql(
    home: Place, service: Service, done: Done, database_url: str
) -> None:
    page = module()
    asked(database_url, page.TABLE)
    workers = []
    for _ in range(2):
        store = page.PostgresResults(database_url)
        each = Service(service.name, lifespan=store.opened, result_store=store)

        @each.job(retry=SOON)
        async def work(context: Context, number: int) -> None:
            await asyncio.sleep(0.02)
            if done.note(number) == 1 and number % 10 == 0:
                raise ValueError("the first time")

        workers.append(home.worker(each, job_prefetch=5))
    async with home.client() as client, workers[0], workers[1]:
        for number in range(20):
            for _ in range(2):
                await client.with_options(idempotency_key=f"k{number}").send(f"{service.name}.work", number=number)
        await until(lambda: sum(worker._jobs.suppressed for worker in workers) == 20)
        await settled(*workers)
    assert done.counts == {number: 2 if number % 10 == 0 else 1 for number in range(20)}
    with psycopg.connect(database_url) as connection:
        rows = connection.execute("SELECT key, body FROM rpcq_results WHERE body IS NOT NULL").fetchall()
    assert {row[0] for row in rows} == {f"{service.name}/job:work/k{number}" for number in range(20)}
