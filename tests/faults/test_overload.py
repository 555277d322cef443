"""More than workers, queues or the broker can take: every caller is told, in time, and told the truth."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aio_pika
import psutil
import pytest

from rpcq import CallError, CallTimeout, Client, Overloaded
from support.broker import Broker, vhost_of
from support.load import Load, Scene, until

SERVED = 100
"""Calls that the worker of the test of overload can serve in a second: ten at once, of 0.1 s each."""

OFFERED = 10 * SERVED
MEGABYTE = 1024 * 1024


def needs_ctl(broker: Broker, what: str) -> None:
    if not broker.can_ctl:
        pytest.skip(f"RPCQ_TEST_URL gives no rabbitmqctl, without which {what}")


@pytest.mark.timeout(120)
async def test_what_slow_workers_do_not_get_to_expires_before_its_deadline(scene: Scene) -> None:
    await scene.workers_of(2, "--prefetch", "2")
    async with scene.client() as client:
        # Five a second are served, of 40 a second. Those that expire are told 0.25 s before their deadline, and not all
        # at the same time: where this machine is too busy to hear of some, or the workers to begin, more are called.
        load = scene.load(client, timeout=2.5, params={"seconds": 0.8})

        async def call(after: float) -> object:
            await asyncio.sleep(after)
            return await load.call()

        counts = load.ledger.counts
        expired: list[CallTimeout] = []
        until_then = time.monotonic() + 60
        while (counts["result"] < 4 or len(expired) <= 5) and time.monotonic() < until_then:
            told = await asyncio.gather(*(call(number / 40) for number in range(80)))
            expired += [it for it in told if isinstance(it, CallTimeout) and "expired in the queue" in str(it)]
        # What began too late is cancelled by its worker, whose word may come too late on a busy machine.
        assert set(counts) <= {"result", "CallTimeout/no", "CallTimeout/maybe", "CallTimeout/yes"}, counts
        assert counts["result"] >= 4
        assert len(expired) > 5, "it is the broker's word that tells, before the deadline"
        assert {error.executed for error in expired} == {"no" if scene.queue_type == "quorum" else "maybe"}
        async with scene.load(client) as afterwards:
            await afterwards.through()
        assert afterwards.ledger.failed == 0
    await scene.check()


@asynccontextmanager
async def at_most(broker: Broker, scene: Scene, length: int) -> AsyncIterator[None]:
    """Let the request queue hold no more than so many: of rpcq's own limit and a policy's, the smaller counts."""
    where = "-p", vhost_of(scene.url)
    policy = json.dumps({"max-length": length})
    pattern = f"^{re.escape(scene.queue)}$"
    await asyncio.to_thread(
        broker.ctl, "set_policy", *where, scene.namespace, pattern, policy, "--apply-to", "queues", "--priority", "9"
    )
    try:
        yield
    finally:
        await asyncio.to_thread(broker.ctl, "clear_policy", *where, scene.namespace)


def told_when_full(scene: Scene) -> str:
    """Of a classic queue, the broker may also refuse what that has delivered."""
    return "Overloaded/no" if scene.queue_type == "quorum" else "Overloaded/maybe"


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_a_full_request_queue_is_told_at_once_and_what_is_in_it_is_served(broker: Broker, scene: Scene) -> None:
    needs_ctl(broker, "no queue can be made smaller")
    worker = await scene.worker()
    worker.signal(signal.SIGTERM)
    assert await worker.exit_code() == 0
    async with (
        scene.client() as client,
        at_most(broker, scene, 100),
        await aio_pika.connect(scene.url) as connection,
    ):
        channel = await connection.channel()
        load, full = scene.load(client, timeout=90), told_when_full(scene)
        calls: list[asyncio.Task[object]] = []

        async def in_queue() -> int:
            state = (await channel.declare_queue(scene.queue, passive=True)).declaration_result
            return state.message_count or 0

        # A quorum queue says so a moment after it is full, and a burst may be in by then.
        for _ in range(6):
            calls += [asyncio.create_task(load.call()) for _ in range(100)]
            async with asyncio.timeout(20):
                while await in_queue() + load.ledger.counts[full] < len(calls):  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(0.05)
        waiting = client.in_flight
        assert 100 <= waiting <= 400
        await asyncio.gather(*(load.call() for _ in range(200)))  # no worker runs, and nothing has reached its deadline
        assert load.ledger.counts == {full: 800 - waiting}

        await scene.worker("--prefetch", "10")
        await asyncio.gather(*calls)
        assert load.ledger.counts == {full: 800 - waiting, "result": waiting}
        # With a worker there, what finds room is served.
        async with scene.load(client, callers=200, timeout=60, params={"seconds": 0.05}) as through:
            await through.through()
        assert set(through.ledger.counts) <= {"result", full}
        assert through.ledger.count(Overloaded)
    await scene.check()


@pytest.mark.long
@pytest.mark.timeout(420)  # each of the rabbitmqctl takes up to 20 s on a busy machine
async def test_while_the_broker_takes_nothing_callers_are_told_and_workers_begin_nothing(
    broker: Broker, scene: Scene
) -> None:
    needs_ctl(broker, "no alarm can be raised")
    worker = await scene.worker("--prefetch", "10")
    let_go = scene.folder / "let-go"
    async with scene.client() as client, scene.client() as blocked:
        # One slot is left. What gets no reply is done with without the broker's leave: so slots become free later,
        # while the broker takes no replies.
        await ask_for_no_reply(scene, [f"held-{number}" for number in range(9)], str(let_go))
        await until(lambda: len(scene.ran("held-")) == 9)
        patient = scene.load(client, timeout=300, params={"seconds": 0.2})
        waiting = [asyncio.create_task(patient.call()) for _ in range(200)]
        await patient_begun(patient)
        await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            await until(lambda: worker.says("the broker takes no replies"), 60)
            async with scene.load(blocked, timeout=1) as load:
                await until(lambda: load.ledger.count("Overloaded/no") >= 50, 60)
            # Those that were written before the broker said so may yet run.
            assert set(load.ledger.counts) <= {"Overloaded/no", "CallTimeout/maybe"}, load.ledger.counts
            assert load.ledger.count("CallTimeout/maybe") <= 100

            began, answered = len(scene.ran()), patient.ledger.ended
            assert answered < 190, "the backlog was gone before the alarm"
            let_go.touch()
            async with asyncio.timeout(120):  # until something new is delivered to the worker
                while await unacknowledged(broker, scene) != 10:  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(0.1)
            await asyncio.sleep(1)
            assert await unacknowledged(broker, scene) == 10
            assert (len(scene.ran()), patient.ledger.ended) == (began, answered)
        finally:
            await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0.6")
        await asyncio.gather(*waiting)
        assert patient.ledger.counts == {"result": 200}
        async with scene.load(blocked) as afterwards:
            await afterwards.through()
        assert afterwards.ledger.failed == 0
    await scene.check()


async def ask_for_no_reply(scene: Scene, nonces: list[str], let_go: str) -> None:
    async with await aio_pika.connect(scene.url) as connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange(f"{scene.namespace}.requests", ensure=False)
        for nonce in nonces:
            body = json.dumps({"nonce": nonce, "until": let_go}).encode()
            headers = {"rpcq-timeout": 300_000}
            await exchange.publish(aio_pika.Message(body, type="hold", headers=headers), "target")


async def patient_begun(load: Load) -> None:
    await until(lambda: load.ledger.count("result"))


async def unacknowledged(broker: Broker, scene: Scene) -> int:
    """Requests that workers hold."""
    asked = "list_queues", "-p", vhost_of(scene.url), "name", "messages_unacknowledged"
    told = await asyncio.to_thread(broker.ctl, *asked)
    return int(next(line.split()[1] for line in told.splitlines() if line.startswith(scene.queue)))


@pytest.mark.long
@pytest.mark.timeout(240)
async def test_ten_times_what_workers_can_serve_ends_in_time_and_in_bounded_memory(scene: Scene) -> None:
    asyncio.get_running_loop().set_debug(False)  # the memory of the debug mode is not what is measured
    worker = await scene.worker("--prefetch", "10")
    processes = [psutil.Process(), psutil.Process(worker.pid)]
    limit = 1250
    async with scene.client(max_in_flight=limit) as client:
        load = scene.load(client, timeout=2, params={"seconds": 0.1})
        before = sizes(processes)
        await offer(load, 4 * OFFERED)
        first = sizes(processes)
        await offer(load, 4 * OFFERED)
        second = sizes(processes)
        counts = load.ledger.counts
        # Where this machine is too busy to offer or to serve so much in that time, more are called.
        if counts["Overloaded/no"] <= 100:
            await asyncio.gather(*(load.call() for _ in range(2 * limit)))
        until_then = time.monotonic() + 60
        while counts["result"] <= SERVED * 2 and time.monotonic() < until_then:
            await offer(load, 2 * OFFERED)
        assert load.ledger.ended > 5 * SERVED * 8, counts
        assert set(counts) <= {"result", "Overloaded/no", "CallTimeout/no", "CallTimeout/maybe", "CallTimeout/yes"}
        assert counts["result"] > SERVED * 2, counts  # goodput: they do not only work on what is given up
        assert counts["Overloaded/no"] > 100, counts
        assert load.ledger.count("CallTimeout") > 100, counts
        # Room for all calls at once, and then no more, however many come and go.
        assert all(it - at < 64 * MEGABYTE for it, at in zip(first, before, strict=True)), (before, first)
        assert all(it - at < 16 * MEGABYTE for it, at in zip(second, first, strict=True)), (first, second)
        async with scene.load(client, callers=20) as afterwards:
            await afterwards.through()
        assert afterwards.ledger.failed == 0
    await scene.check()


def sizes(processes: list[psutil.Process]) -> list[int]:
    return [it.memory_info().rss for it in processes]


async def offer(load: Load, count: int) -> None:
    """Calls at a rate that takes no notice of how they end; ends when all have."""
    client: Client = load.client
    began, offered = time.monotonic(), 0
    calls: set[asyncio.Task[CallError | str]] = set()
    while offered < count:
        due = min(int((time.monotonic() - began) * OFFERED), count)
        for _ in range(min(due - offered, 100)):  # after a delay, not all at once
            calls.add(task := asyncio.create_task(load.call()))
            task.add_done_callback(calls.discard)
            offered += 1
        assert client.in_flight <= client.options.max_in_flight
        await asyncio.sleep(0.01)
    await asyncio.gather(*calls)
