"""Jobs with a priority, on both transports: each lane of a service has a queue and a prefetch of its own."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, Protocol, get_args

import pytest

from rpcq import Client, ConfigurationError, GiveUp, RetryLater, SendError, Service, UsageError, contract
from rpcq.observability.queues import QueueWatch
from rpcq.options import Priority, WorkerOptions
from rpcq.transport.base import Message, Published
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.jobs import JobMessage, encode_job
from rpcq.worker import prefetches
from support.jobs import Done, dead_queue, settled
from support.letters import letters
from support.load import until
from support.places import Place, cut_memory

QUICKLY = pytest.mark.parametrize("home", ["memory", pytest.param("rabbitmq", marks=pytest.mark.long)], indirect=True)
"""On RabbitMQ too with `make test-faults`; `make test` has its time."""

PREFETCH = 32
LANES: tuple[Priority, ...] = get_args(Priority)


@pytest.fixture
def service() -> Service:
    return Service(f"s{secrets.token_hex(6)}", lanes=True)


@pytest.fixture
def memory(namespace: str) -> Place:
    return Place(f"memory://{namespace}", namespace, "quorum", cut_memory)


def lane(home: Place, service: Service, priority: Priority) -> Any:
    return JobTopology(home.namespace).queue(service.name, priority)


@pytest.mark.parametrize(
    ("flood", "places"),
    [
        ("low", PREFETCH // 4),
        pytest.param("normal", PREFETCH, marks=pytest.mark.long),
        pytest.param("high", PREFETCH, marks=pytest.mark.long),
    ],
)
async def test_a_flood_in_one_lane_delays_no_job_in_another(
    home: Place, service: Service, done: Done, flood: Priority, places: int
) -> None:
    others = {priority for priority in LANES if priority != flood}
    go_on = asyncio.Event()

    @service.job
    async def work(priority: Priority) -> None:
        done.note(priority)
        if priority == flood:
            await go_on.wait()
            await asyncio.sleep(0.01)

    async with home.client() as client, home.worker(service, job_prefetch=PREFETCH) as worker:
        await client.with_options(priority=flood).send_many(work, [{"priority": flood}] * 300)
        await done.until(lambda counts: counts[flood] == places)
        for priority in others:
            await client.with_options(priority=priority).send(work, priority=priority)
        await done.until(lambda counts: others <= counts.keys())
        assert done.counts[flood] == places, "all places of the flood's lane were taken meanwhile"
        go_on.set()
        await done.until(lambda counts: counts[flood] == 300)
        await settled(worker)
    assert done.counts.total() == 302


async def test_retries_and_delays_are_in_the_lane_of_their_job(home: Place, service: Service, done: Done) -> None:
    @service.job
    async def work() -> None:
        done.note("run")
        raise RetryLater(0.5)

    async with home.client() as client:
        high, low = client.with_options(priority="high"), client.with_options(priority="low", delay=0.25)
        async with home.worker(service) as worker:
            retried = await high.send(work)
            await done.until(lambda counts: counts["run"] == 1)
            await settled(worker)
        delayed = await low.send(work)
        async with (
            letters(home.url, lane(home, service, "high")) as in_high,
            letters(home.url, lane(home, service, "low")) as in_low,
        ):
            (first,), (second,) = await in_high.wait_for(1), await in_low.wait_for(1)
    assert (first.id, first.headers["rpcq-attempt"], first.headers["rpcq-priority"]) == (retried.id, 2, "high")
    assert (second.id, second.headers["rpcq-priority"]) == (delayed.id, "low")
    assert (retried.priority, delayed.priority, delayed.due is None) == ("high", "low", False)


@QUICKLY
async def test_what_a_stopping_worker_sends_on_stays_in_its_lane(home: Place, service: Service, done: Done) -> None:
    @service.job(at_most_once=True, max_concurrency=1)
    async def work() -> None:
        done.note("run")
        await asyncio.sleep(0.05)

    async with home.client() as client:
        async with home.worker(service) as worker:
            await client.with_options(priority="high").send_many(work, [{}, {}])
            await done.until(lambda counts: counts["run"] == 1)
            await until(lambda: worker.in_flight == 2)
        async with letters(home.url, lane(home, service, "high")) as in_high:
            await in_high.wait_for(1)
    assert done.counts == {"run": 1}


@QUICKLY
async def test_a_suspect_goes_back_to_its_lane(home: Place, service: Service, done: Done) -> None:
    @service.job
    async def work() -> None:
        done.note("run")
        raise RetryLater(0.25)

    async with home.client() as client:
        async with home.worker(service) as worker:
            await publish(client, home, f"{service.name}:low", encode_job(low_job(service, earlier=2), 0))
            await done.until(lambda counts: counts["run"] == 1)
            await settled(worker)
        async with letters(home.url, lane(home, service, "low")) as in_low:
            (letter,) = await in_low.wait_for(1)
    assert (letter.id, letter.headers["rpcq-attempt"], letter.headers["rpcq-priority"]) == ("one", 2, "low")


async def test_dead_letters_of_all_lanes_are_in_one_queue_whoever_wrote_them(home: Place, service: Service) -> None:
    @service.job
    async def work(text: str = "") -> None:
        raise GiveUp("no")

    async with home.client() as client, home.worker(service, max_body=1000):
        sent = [await client.with_options(priority=priority).send(work) for priority in LANES]
        # The broker itself makes dead letters of these: the worker cannot read them.
        sent += [await client.with_options(priority=priority).send(work, "x" * 2000) for priority in LANES]
        async with letters(home.url, dead_queue(home, service)) as dead:
            found = await dead.wait_for(6)
    assert {letter.id for letter in found} == {job.id for job in sent}
    assert sorted(letter.headers.get("rpcq-priority", "normal") for letter in found) == sorted(LANES * 2)
    assert sum("x-death" in letter.headers for letter in found) == 3


async def test_a_priority_for_a_service_without_lanes_is_an_error_that_names_the_fix(home: Place) -> None:
    plain = Service(f"s{secrets.token_hex(6)}")

    @contract(plain.name, jobs=["work"])
    class Api(Protocol):
        async def work(self) -> None: ...

    @plain.job
    async def work() -> None: ...

    async with home.client() as client, home.worker(plain):
        high = client.with_options(priority="high")
        for target in (f"{plain.name}.work", client.bind(Api).work):
            with pytest.raises(SendError, match=r"with priority 'high': .*Service\(\.\.\., lanes=True\)") as caught:
                await high.send(target)
            assert caught.value.queued == "no"
        for maker in (high, client.with_options(priority="low", delay=1)):
            with pytest.raises(UsageError, match=r"has no lanes: define it with Service\(\.\.\., lanes=True\)"):
                await maker.send(work)
        assert (await client.with_options(priority="normal").send(work)).priority == "normal"


@pytest.mark.parametrize("wrong", ["urgent", "", 0, 5, True, ["high"]])
async def test_a_priority_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="priority must be 'high', 'normal', 'low' or None; got"):
        Client("memory://").with_options(priority=wrong)


async def test_a_priority_is_for_jobs_alone(memory: Place, service: Service) -> None:
    @service.method
    async def count() -> int:
        return 0

    async with memory.client() as client, memory.worker(service):
        for priority in LANES:
            with pytest.raises(UsageError, match="priority, order_key and watch are for send; got one for a call of"):
                await client.with_options(priority=priority).call(f"{service.name}.count")
        assert await client.with_options(priority="low").with_options(priority=None).call(f"{service.name}.count") == 0


async def test_a_backlog_of_a_slow_job_in_one_lane_takes_no_room_of_another(
    memory: Place, service: Service, done: Done
) -> None:
    go_on = asyncio.Event()

    @service.job(max_concurrency=1)
    async def slow(priority: Priority) -> None:
        done.note(priority)
        if done.counts.total() == 1:
            await go_on.wait()

    async with memory.client() as client, memory.worker(service, job_prefetch=16) as worker:
        assert worker._jobs is not None
        await client.with_options(priority="low").send_many(slow, [{"priority": "low"}] * 50)
        # One runs, two wait here, which is half of the low prefetch, and the broker holds the others.
        await until(lambda: worker._jobs.put_off == 47)
        await client.with_options(priority="high").send_many(slow, [{"priority": "high"}] * 8)
        await until(lambda: worker.in_flight == 11)
        assert worker._jobs.put_off == 47
        go_on.set()
        await done.until(lambda counts: counts["high"] == 8)
        assert done.counts["low"] == 1, "the first in line are those of high priority"


async def test_a_worker_without_lanes_sends_a_job_back_to_its_lane(memory: Place, service: Service, done: Done) -> None:
    older = Service(service.name)  # while a deploy rolls, a worker may be older than the lanes

    @older.job
    async def work() -> None:
        done.note("run")
        raise RetryLater(0.25)

    service.job(work)
    async with memory.client() as client:
        async with memory.worker(service):
            pass
        async with memory.worker(older) as worker:
            key = JobTopology(memory.namespace).suspect_key(service.name)
            exchange = JobTopology(memory.namespace).due.name
            await publish(client, memory, key, encode_job(low_job(service, earlier=2), 0), exchange)
            await done.until(lambda counts: counts["run"] == 1)
            await settled(worker)
        async with letters(memory.url, lane(memory, service, "low")) as in_low:
            await in_low.wait_for(1)


@pytest.mark.parametrize(("value", "shown"), [("urgent", "'urgent'"), (3, "3")])
async def test_a_lane_that_is_none_makes_a_dead_letter(memory: Place, service: Service, value: Any, shown: str) -> None:
    @service.job
    async def work() -> None: ...

    job = low_job(service)
    job.priority = value
    async with memory.client() as client, memory.worker(service):
        await publish(client, memory, service.name, encode_job(job, 0))
        async with letters(memory.url, dead_queue(memory, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert letter.headers["rpcq-error"] == f"the header rpcq-priority must be 'high' or 'low'; got {shown}"


@pytest.mark.parametrize("home", ["rabbitmq"], indirect=True)
async def test_a_queue_watch_looks_at_each_lane(home: Place, service: Service) -> None:
    @service.job
    async def work() -> None: ...

    plain = Service(f"s{secrets.token_hex(6)}")
    plain.job(work)
    async with home.client() as client:
        async with home.worker(service, plain):
            pass
        await client.with_options(priority="low").send(f"{service.name}.work")
        watch = QueueWatch([service, plain], home.url, management="", namespace=home.namespace)
        names = QueueWatch([service.name, plain.name], home.url, management="", namespace=home.namespace)
        for found in (await watch.look(), await names.look()):
            waiting = {(it.service, it.queue): it.messages for it in found if it.kind == "jobs"}
            assert waiting == {
                (service.name, lane(home, service, "normal").name): 0,
                (service.name, lane(home, service, "high").name): 0,
                (service.name, lane(home, service, "low").name): 1,
                (plain.name, lane(home, plain, "normal").name): 0,
            }


@pytest.mark.parametrize(("prefetch", "low"), [(1, 1), (3, 1), (4, 1), (8, 2), (20, 5)])
def test_high_and_normal_have_all_of_the_prefetch_and_low_a_quarter(prefetch: int, low: int) -> None:
    options = WorkerOptions(job_prefetch=prefetch)
    assert prefetches(Service("s", lanes=True), options) == {"high": prefetch, "normal": prefetch, "low": low}
    assert prefetches(Service("s"), options) == {"normal": prefetch}


@pytest.mark.parametrize("wrong", [1, None, "high", ["high"]])
def test_lanes_are_there_or_not(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="lanes of service 's' must be True or False; got"):
        Service("s", lanes=wrong)


def low_job(service: Service, **further: Any) -> JobMessage:
    return JobMessage(id="one", name=next(iter(service.jobs)), body=b"{}", key="one", priority="low", **further)


async def publish(client: Client, home: Place, key: str, properties: bytes, exchange: str | None = None) -> None:
    """Publish a message, as any program may."""
    jobs = JobTopology(home.namespace).jobs
    confirmed = asyncio.get_running_loop().create_future()
    await client._transport.declare([jobs])
    target = (exchange or jobs.name).encode()
    client._transport.publish(Message(target, key.encode(), b"c", properties, b"{}", confirmed.set_result))
    assert await confirmed is Published.CONFIRMED
