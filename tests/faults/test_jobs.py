"""Jobs through every crash of a sender and of a worker, with real processes; `crashing.py` has the oracle."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import threading
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import aio_pika
import pytest

import rpcq.worker
from rpcq import BrokerError, Client, SendError, Service, Worker
from rpcq.jobs import outcomes
from rpcq.wire.job_queues import JobTopology
from support.broker import Setup
from support.broker import broker as a_broker
from support.crashing import Home, until
from support.letters import letters
from support.proxy import proxy

pytestmark = pytest.mark.timeout(180)

FLOOD = """
import asyncio, os, sys
from rpcq import Client

async def main():
    async with Client(namespace=os.environ["RPCQ_NAMESPACE"]) as client:
        for number in range(100_000):
            await client.send(f"{sys.argv[1]}.work", name=f"n-{number}")
            print(f"n-{number}", flush=True)

asyncio.run(main())
"""


@pytest.fixture
async def home(rabbitmq_url: str, tmp_path: Path) -> Home:
    made = Home(rabbitmq_url, tmp_path)
    await made.declare()
    return made


# A worker that is killed.


@pytest.mark.parametrize(
    ("job", "point", "runs", "reason"),
    [
        pytest.param("work", "before the effect", {1}, "", marks=pytest.mark.long),
        ("work", "after the effect", {2}, ""),
        pytest.param("work", "after the move is confirmed, done", {2}, "", marks=pytest.mark.long),
        pytest.param("fail_once", "before the move", {2}, "", marks=pytest.mark.long),
        # It is there twice, as the retry and as what comes back: a worker that does one remembers its key.
        ("fail_once", "after the move is confirmed", {2, 3}, ""),
        pytest.param("give_up", "before the move", {2}, "gave_up", marks=pytest.mark.long),
        ("give_up", "after the move is confirmed", {2}, "gave_up"),
        pytest.param("once", "before the effect", {0}, "interrupted", marks=pytest.mark.long),
        pytest.param("once", "after the effect", {1}, "interrupted", marks=pytest.mark.long),
    ],
)
async def test_a_worker_that_is_killed_at_any_point_loses_no_job(
    home: Home, job: str, point: str, runs: set[int], reason: str
) -> None:
    async with home.worker(point) as dying:
        confirmed = await home.send("a", job=job)
        await home.killed(dying)
    dead = await home.check(confirmed)
    assert home.effects()["a"] in runs
    assert {letter.reason for letter in dead.values()} == ({reason} if reason else set())
    assert dead.keys() == (set(confirmed.values()) if reason else set())
    assert {letter.executed for letter in dead.values()} <= {"yes" if job == "give_up" else "maybe"}


@pytest.mark.long
@pytest.mark.parametrize(("point", "runs"), [("before the move", {1}), ("after the move is confirmed", {1, 2})])
async def test_a_worker_that_is_killed_while_it_moves_a_suspect_loses_no_job(
    home: Home, point: str, runs: set[int]
) -> None:
    confirmed = await home.send("a")
    async with await aio_pika.connect(home.url) as connection:
        for _ in range(2):  # its workers were lost twice
            channel = await connection.channel()
            queue = await channel.get_queue(home.queues[0].name, ensure=False)
            while await queue.get(fail=False) is None:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.02)
            await channel.close()
    async with home.worker(point) as dying:
        await home.killed(dying)
    assert not await home.check(confirmed)
    assert home.effects()["a"] in runs


@pytest.mark.long
@pytest.mark.timeout(240)
async def test_jobs_that_kill_their_workers_are_dead_and_their_neighbours_are_done(home: Home) -> None:
    innocent, poison = [f"n{number}" for number in range(38)], ["p0", "p1"]
    confirmed = await home.send(*innocent[:5]) | await home.send("p0", job="poison")
    confirmed |= await home.send(*innocent[5:20]) | await home.send("p1", job="poison")
    confirmed |= await home.send(*innocent[20:])
    kills = 0
    while True:
        async with home.worker() as worker:
            ended = asyncio.create_task(worker.wait())
            while not ended.done() and await home.depths():  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
            # What it holds now is done, or kills it; an orderly stop waits for either.
            if not ended.done():
                worker.terminate()
            if await ended == 0 and not await home.depths():
                break
            kills += 1
    dead = await home.check(confirmed)
    assert dead.keys() == {confirmed[name] for name in poison}
    assert {(letter.reason, letter.executed) for letter in dead.values()} == {("delivery_limit", "maybe")}
    assert set(innocent) == home.effects().keys()
    doubled = home.effects().total() - len(innocent)
    sys.stderr.write(f"{kills} workers killed; doubled effects: {doubled}\n")


# Workers that are replaced.


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_a_rolling_restart_loses_no_job_and_does_none_twice(home: Home) -> None:
    confirmed: dict[str, str] = {}
    is_over = False

    async def send(prefix: str) -> None:
        number = 0
        async with home.client() as client:
            while not is_over:
                name = f"{prefix}{number}"
                confirmed[name] = (await client.send(f"{home.service}.work", name=name)).id
                number += 1

    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(home.worker()) for _ in range(3)]
        senders = [asyncio.create_task(send(prefix)) for prefix in "abcd"]
        for old in [*workers]:
            before = len(confirmed)
            await until(lambda before=before: len(confirmed) > before + 100)
            workers.append(await stack.enter_async_context(home.worker()))
            await home.stop(old)
        is_over = True
        await asyncio.gather(*senders)
        for each in workers[3:]:
            await home.stop(each)
    assert not await home.check(confirmed)
    assert set(home.effects().values()) == {1}


@pytest.mark.long
async def test_a_job_that_only_the_new_workers_of_a_rolling_deploy_know_waits_for_one_of_them(home: Home) -> None:
    async with home.worker(old=True) as old, home.worker() as new:
        confirmed = await home.send(*(f"n{number}" for number in range(20)), job="newest")
        confirmed |= await home.send(*(f"o{number}" for number in range(20)))
        await home.delayed(1)  # the broker gives to each in turn
        await home.stop(old)
        await home.until_done(set(confirmed))
        await home.stop(new)
    async with home.worker(old=True) as older:  # rolled back
        confirmed |= await home.send("again", job="newest")
        await home.delayed(1)
        await home.stop(older)
    assert not await home.check(confirmed)
    assert set(home.effects().values()) == {1}


# A sender that is killed, and a confirm that is lost.


@pytest.mark.parametrize(
    ("point", "runs"),
    [
        ("before it is written", {0}),
        ("after it is written", {0, 1}),
        ("after it is confirmed", {1}),
    ],
)
@pytest.mark.long
async def test_a_sender_that_is_killed_before_it_knows_leaves_its_job_done_once_or_not_sent(
    home: Home, point: str, runs: set[int]
) -> None:
    async with home.sender(20, point) as sender:
        said, _ = await sender.communicate()
        assert sender.returncode == -signal.SIGKILL
    confirmed = said.decode().split()
    assert confirmed == [f"n-{number}" for number in range(20)]
    assert not await home.check(dict.fromkeys(confirmed, "?"))
    assert home.effects().pop("n-20", 0) in runs
    assert {home.effects()[name] for name in confirmed} == {1}


async def test_a_sender_that_is_killed_at_any_time_loses_no_job_that_it_was_told_of(home: Home) -> None:
    async with home.worker() as worker:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", FLOOD, home.service), env=home.environment, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        confirmed = {(await process.stdout.readline()).decode().strip() for _ in range(200)}
        os.kill(process.pid, signal.SIGKILL)
        rest, _ = await process.communicate()
        confirmed |= set(rest.decode().split("\n")[:-1])
        await home.stop(worker)
    assert not await home.check(dict.fromkeys(confirmed, "?"))
    assert set(home.effects().values()) == {1}


@pytest.mark.long
@pytest.mark.parametrize("at_most_once", [False, True])
async def test_a_confirm_that_is_lost_makes_a_job_twice_or_its_sender_unsure(home: Home, at_most_once: bool) -> None:
    service = Service(home.service)

    @service.job(at_most_once=at_most_once)
    async def work(name: str) -> None: ...

    async with proxy(home.url) as way, home.worker() as worker, home.client(way.url) as client:
        before = await client.send(work, name="before")
        way.down.frozen = True
        sending = asyncio.create_task(client.send(work, name="a"))
        await home.until_done({"a"})  # the broker has it, and its sender does not know
        await home.stop(worker)  # it would remember the key
        way.reset()
        way.heal()
        if at_most_once:
            with pytest.raises(SendError) as caught:
                await sending
            assert caught.value.queued == "maybe"
            sent = caught.value.message_id
        else:
            sent = (await sending).id
    assert not await home.check({"before": before.id, "a": sent})
    assert home.effects() == {"before": 1, "a": 1 if at_most_once else 2}


# A consumer that holds a message too long.

CONSUMER_TIMEOUT = 2.0
"""Seconds that the impatient broker lets a consumer hold a message."""


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_a_thread_that_hangs_for_ever_is_dead_after_a_bounded_number_of_consumer_timeouts(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to RabbitMQ 4.2, a consumer timeout closes the channel, and the broker counts it.

    From 4.3 on, it cancels the consumer, and counts it in `x-acquired-count` alone: no delivery limit ends it.
    """
    limit = 4
    held: dict[str, int] = rpcq.worker._HELD  # type: ignore[assignment]  # a consumer's own arguments, for 4.3
    monkeypatch.setitem(held, "x-consumer-timeout", round(CONSUMER_TIMEOUT * 1000))
    monkeypatch.setattr(outcomes, "DELIVERY_LIMIT", limit)
    service = Service(f"s{secrets.token_hex(6)}")
    began: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    end = threading.Event()

    @service.job(timeout=0.5)
    def hangs() -> None:
        began["hangs"] += 1
        end.wait(170)

    @service.job
    async def slow() -> None:
        began["slow"] += 1
        await asyncio.sleep(2 * CONSUMER_TIMEOUT)
        ended["slow"] += 1

    @service.job
    async def quick(number: int) -> None:
        ended[f"quick-{number}"] += 1

    config = f"consumer_timeout = {CONSUMER_TIMEOUT * 1000:.0f}\nloopback_users.guest = false\n"
    topology = JobTopology(namespace)
    with a_broker(setup=Setup(config)) as own:
        # How often it looks is no key of rabbitmq.conf.
        await asyncio.to_thread(own.ctl, "eval", "application:set_env(rabbit, channel_tick_interval, 500).")
        worker = Worker(service, url=own.url, namespace=namespace, grace=0.5)
        async with Client(own.url, namespace=namespace) as client, worker:
            sessions: list[str] = []
            lost = worker._transport._consuming._on_down  # type: ignore[attr-defined]

            def note(cause: BrokerError) -> None:
                sessions.append(str(cause))
                lost(cause)

            monkeypatch.setattr(worker._transport._consuming, "_on_down", note)  # type: ignore[attr-defined]
            await client.send(hangs)
            await client.send(slow)
            number = 0
            async with letters(own.url, topology.dead_queue(service.name)) as dead:
                while not dead.found:
                    await client.send(quick, number=number)
                    number += 1
                    await asyncio.sleep(0.2)
                (letter,) = dead.found
            await client.send(quick, number=number)  # it still consumes
            neighbours = {"slow", *(f"quick-{each}" for each in range(number + 1))}
            while not neighbours <= ended.keys() or worker.in_flight:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.02)
            end.set()
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("delivery_limit", "maybe")
    assert letter.properties.type == b"hangs"
    assert len(sessions) >= limit
    assert began == {"hangs": 1, "slow": 1}
    assert ended == dict.fromkeys(neighbours, 1)
