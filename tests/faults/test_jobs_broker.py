"""Jobs while their broker dies, refuses, or lacks a queue, with real processes; `crashing.py` has the oracle."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aio_pika
import pytest

from rpcq import SendError
from support.broker import Broker, Setup, vhost_of
from support.broker import broker as a_broker
from support.cluster import Cluster
from support.cluster import cluster as a_cluster
from support.crashing import SHARED, Home, until

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]

BURIAL = "-rabbit dead_letter_worker_publisher_confirm_timeout 3000"
"""How often RabbitMQ tries again to dead-letter what had no queue: each 3 s instead of 180 s."""


@pytest.fixture(scope="module")
def own() -> Iterator[Broker]:
    """A broker that is killed."""
    with a_broker(setup=Setup("loopback_users.guest = false\n", erl_args=BURIAL)) as made:
        yield made


@pytest.fixture
async def home(own: Broker, tmp_path: Path) -> Home:
    made = Home(own.url, tmp_path)
    await made.declare()
    await asyncio.sleep(2)  # the queues are new: see `Broker.kill`
    return made


# A node that dies.


async def test_a_node_that_is_killed_right_after_it_confirmed_has_each_job(own: Broker, home: Home) -> None:
    async with home.client() as client:
        names = [f"n{number}" for number in range(100)]
        jobs = await client.send_many(f"{home.service}.work", [{"name": name} for name in names])
        await asyncio.to_thread(own.kill)
    await asyncio.to_thread(own.start)
    assert not await home.check({name: job.id for name, job in zip(names, jobs, strict=True)})


@pytest.mark.timeout(500)
async def test_a_node_that_is_killed_under_load_loses_no_job_that_it_confirmed(own: Broker, home: Home) -> None:
    """A killed node may hold a retry that was due meanwhile for 180 s: see `test_delays.py`."""
    confirmed: dict[str, str] = {}
    failed: list[SendError] = []
    async with home.worker() as worker, home.client(timeout=120) as client:

        async def send(first: int) -> None:
            for number in range(first, first + 250):
                try:
                    name = ("work", "fail_once")[number % 2]
                    job = await client.send(f"{home.service}.{name}", name=f"n{number}")
                    confirmed[f"n{number}"] = job.id
                except SendError as error:
                    failed.append(error)

        async def strike() -> None:
            for _ in range(2):
                before = len(confirmed)
                await until(lambda before=before: len(confirmed) > before + 150)
                await asyncio.to_thread(own.kill)
                await asyncio.to_thread(own.start)

        await asyncio.gather(strike(), *(send(first * 250) for first in range(4)))
        await home.until_done(set(confirmed))
        await home.stop(worker)
    assert not await home.check(confirmed)
    assert {error.queued for error in failed} <= {"maybe"}
    assert len(confirmed) + len(failed) == 1000


@pytest.mark.timeout(500)
@pytest.mark.parametrize("how", ["restarted", "killed"])
async def test_delayed_jobs_outlast_a_broker_that_is(own: Broker, home: Home, how: str) -> None:
    """A killed node may hold what was due meanwhile for 180 s: see `test_delays.py`."""
    confirmed: dict[str, str] = {}
    async with home.worker() as worker, home.client() as client:
        for number in range(40):
            job = await client.send(f"{home.service}.later", name=f"n{number}", seconds=32 + number / 20)
            confirmed[f"n{number}"] = job.id
        await home.delayed(40)  # before the first one is due
        if how == "killed":
            await asyncio.to_thread(own.kill)
            await asyncio.to_thread(own.start)
        else:
            await asyncio.to_thread(own.restart)
        await home.until_done(set(confirmed), 2)
        await home.stop(worker)
    assert not await home.check(confirmed)


# A broker that takes no retry.


@asynccontextmanager
async def alarm(own: Broker) -> AsyncIterator[None]:
    await asyncio.to_thread(own.ctl, "set_vm_memory_high_watermark", "absolute", "1MB")
    try:
        yield
    finally:
        await asyncio.to_thread(own.ctl, "set_vm_memory_high_watermark", "0.6")


@asynccontextmanager
async def full(own: Broker, home: Home, queue: str) -> AsyncIterator[None]:
    """Let a queue of the ladder take nothing more, until what is in it is due."""
    where = "-p", vhost_of(home.url)
    policy = json.dumps({"max-length": 1})
    await asyncio.to_thread(
        own.ctl, *("set_policy", *where, SHARED, f"^{re.escape(queue)}$", policy, "--apply-to", "queues")
    )
    try:
        async with await aio_pika.connect(home.url) as connection:
            exchange = (await connection.channel()).default_exchange
            is_full = False
            while not is_full:
                try:
                    await exchange.publish(aio_pika.Message(b""), queue)
                except aio_pika.exceptions.DeliveryError:
                    is_full = True
        yield
    finally:
        await asyncio.to_thread(own.ctl, "clear_policy", *where, SHARED)


@pytest.mark.parametrize("is_killed", [False, True])
async def test_a_retry_that_is_blocked_stays_with_its_worker_or_comes_back(
    own: Broker, home: Home, is_killed: bool
) -> None:
    async with home.worker() as worker:
        confirmed = await home.send("a", job="hold")
        await home.until_done({"a"})
        async with alarm(own):
            (home.folder / "go").touch()
            await until((home.folder / "moving").exists)
            await asyncio.sleep(1)
            assert not (home.folder / "move-confirmed").exists()
            if is_killed:
                worker.kill()
                await worker.wait()
        if not is_killed:
            await home.until_done({"a"}, 2)
            await home.stop(worker)
    assert not await home.check(confirmed)
    # The broker may read the retry of the killed worker after the alarm: then the job is there twice.
    assert home.effects()["a"] in ({2, 3} if is_killed else {2})


@pytest.mark.parametrize("is_killed", [False, True])
async def test_a_retry_that_is_refused_stays_with_its_worker_or_comes_back(
    own: Broker, home: Home, is_killed: bool
) -> None:
    level = home.topology.ladder.name(7)  # 32 s, in which what fills it stays there
    async with home.worker() as worker:
        async with full(own, home, level):
            confirmed = await home.send("a", job="later", seconds=32)
            await until((home.folder / "move-refused").exists)
            if is_killed:
                worker.kill()
                await worker.wait()
        if not is_killed:
            await home.until_done({"a"}, 2)
            await home.stop(worker)
    assert not await home.check(confirmed)
    assert home.effects()["a"] == 2


# A queue that is gone.


async def test_a_dead_letter_whose_queue_was_deleted_is_with_the_lost_and_new_ones_are_in_their_queue(
    home: Home,
) -> None:
    async with home.worker() as worker:
        async with home.admin() as admin:
            await admin.delete([home.dead_queue.name])
        confirmed = await home.send("a", job="give_up")
        await until((home.folder / "move-confirmed").exists)
        await home.stop(worker)
    assert {letter.job.id for letter in await home.lost()} == set(confirmed.values())
    async with home.worker() as worker:  # it declares the queue
        later = await home.send("b", job="give_up")
        assert {letter.job.id for letter in await home.until_dead(1)} == set(later.values())
        await home.dlq("replay", "--lost", "--yes", "--job", f"{home.service}.give_up")
        assert {letter.job.id for letter in await home.until_dead(2)} == set((confirmed | later).values())
        await home.stop(worker)
    dead = await home.check(confirmed | later)
    assert dead.keys() == set((confirmed | later).values())


async def test_a_dead_letter_that_no_queue_takes_stays_in_the_queue_of_jobs(home: Home) -> None:
    """One that a worker wrote stays with it, and comes back when it dies; one of the broker's stays in its queue."""
    lost = home.topology.lost.name
    async with home.admin() as admin:
        await admin.delete([home.dead_queue.name, lost])
    brokers = await home.send("b", job="give_up")
    async with await aio_pika.connect(home.url) as connection:
        queue = await (await connection.channel()).get_queue(home.queues[0].name, ensure=False)
        while (message := await queue.get(fail=False)) is None:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.02)
        await message.reject()  # as a worker does with what it cannot read
    async with home.worker() as worker:  # it declares both
        async with home.admin() as admin:
            await admin.delete([home.dead_queue.name, lost])
        workers = await home.send("a", job="give_up")
        await until((home.folder / "move-returned").exists)
        worker.kill()
        await worker.wait()
    async with home.admin() as admin:
        assert await admin.queue(home.dead_queue.name) is None
    async with home.worker() as worker:  # and again
        dead = {letter.job.id: letter.reason for letter in await home.until_dead(2)}
        await home.stop(worker)
    assert dead == {brokers["b"]: "rejected", workers["a"]: "gave_up"}
    assert (await home.check(brokers | workers)).keys() == dead.keys()
    assert home.effects() == {"a": 2}


async def test_an_exchange_that_was_deleted_is_declared_again_and_loses_no_job(home: Home) -> None:
    """The queues are bound again by the worker's next consuming session: until then, what is due is with the lost."""
    async with home.worker() as worker:
        async with home.admin() as admin:
            await admin.delete([], [home.topology.due.name, home.topology.dead.name])
        confirmed = await home.send("a", job="fail_once") | await home.send("b", job="give_up")
        while len(await home.lost()) < 2:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.1)
        await home.stop(worker)
    async with home.worker() as worker:
        await home.dlq("replay", "--lost", "--yes", "--job", f"{home.service}.fail_once")
        await home.dlq("replay", "--lost", "--yes", "--job", f"{home.service}.give_up")
        await home.until_dead(1)
        await home.stop(worker)
    dead = await home.check(confirmed)
    assert dead.keys() == {confirmed["b"]}
    assert home.effects()["a"] >= 2


# A majority that is lost.


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with a_cluster() as made:
        yield made


@pytest.mark.timeout(400)
async def test_while_a_majority_is_lost_nothing_is_confirmed_and_afterwards_nothing_is_lost(
    cluster: Cluster, tmp_path: Path
) -> None:
    stays, *others = cluster.nodes
    home = Home(stays.url, tmp_path)
    await home.declare()
    await asyncio.sleep(2)
    confirmed: dict[str, str] = {}
    async with home.worker(url=cluster.url) as worker, home.client(cluster.url) as client:
        for number in range(50):
            name = ("work", "fail_once", "later")[number % 3]
            params = {"seconds": 5} if name == "later" else {}
            job = await client.send(f"{home.service}.{name}", name=f"n{number}", **params)
            confirmed[f"n{number}"] = job.id
        held = [await client.send(f"{home.service}.hold", name=f"h{number}") for number in range(5)]
        confirmed |= {f"h{number}": job.id for number, job in enumerate(held)}
        await home.until_done({f"h{number}" for number in range(5)})
        for node in others:
            await asyncio.to_thread(node.kill)
        (home.folder / "go").touch()
        unsure: list[SendError] = []
        for number in range(5):
            with pytest.raises(SendError) as caught:
                await client.with_options(timeout=2).send(f"{home.service}.work", name=f"u{number}")
            unsure.append(caught.value)
        await asyncio.to_thread(cluster.start, *others)
        job = await client.with_options(timeout=120).send(f"{home.service}.work", name="after")
        confirmed["after"] = job.id
        await home.until_done(set(confirmed))
        await home.stop(worker)
    assert not await home.check(confirmed)
    assert {error.queued for error in unsure} <= {"maybe", "no"}
    assert {name for name in home.effects() if name.startswith("u")} <= {
        f"u{number}" for number, error in enumerate(unsure) if error.queued == "maybe"
    }
