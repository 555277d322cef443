"""Workers that are killed, frozen or poisoned under load, and callers that go without a word."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from contextlib import aclosing
from typing import Any

import pytest

from rpcq import Client, OutcomeUnknown
from rpcq.calls.outcomes import MAX_ATTEMPTS
from rpcq.control import WorkerStats
from support.command import Process
from support.load import TESTS, Load, Scene, WorkerProcess, until

pytestmark = pytest.mark.timeout(180)  # each wait has its own end; where all is slow, several add up

CALLERS_OF_ANOTHER_PROCESS = """
import asyncio
import sys
from rpcq import Client

async def call(client, number):
    await client.call("target.once", nonce=f"gone-{number}", seconds=float(sys.argv[1]))

async def main():
    async with Client() as client:
        await asyncio.gather(*(call(client, number) for number in range(40)))

asyncio.run(main())
"""

STARTS = 60.0
"""Seconds within which a worker has started, or is back, and says so."""


async def stats(client: Client, count: int) -> dict[int, WorkerStats]:
    """By process ID, what the workers say, once so many have answered a question: one that starts does not hear all."""
    async with asyncio.timeout(STARTS):
        while True:
            found: dict[int, WorkerStats] = {}
            async with aclosing(client.stats("target", wait=2)) as answers:
                async for it in answers:
                    found[it.pid] = it
                    if len(found) == count:
                        return found


async def finished(client: Client, pid: int) -> int:
    """Requests that this worker has dealt with. It is asked again, since while it is away it hears nothing."""
    async with asyncio.timeout(STARTS):
        while True:
            async with aclosing(client.stats("target", wait=2)) as answers:
                async for it in answers:
                    if it.pid == pid:
                        return it.finished


async def in_the_middle(scene: Scene, load: Load) -> None:
    """Wait until most handlers have begun: callers go in waves, and what strikes between two of them costs none."""
    ran = len(scene.ran(load.prefix))
    await until(
        lambda: load.ledger.begun - load.ledger.ended >= 30 and len(scene.ran(load.prefix)) >= ran + 30,
        what="there is no wave of calls",
    )


async def until_it_serves(client: Client, worker: WorkerProcess) -> None:
    """Wait until requests come to this worker again."""
    before = await finished(client, worker.pid)
    async with asyncio.timeout(STARTS):
        while await finished(client, worker.pid) <= before:
            pass


async def until_idle(client: Client, count: int) -> None:
    """Wait until so many workers have nothing in hand: they may get to know last that their replies have arrived."""
    async with asyncio.timeout(STARTS):
        while any(it.in_flight for it in (await stats(client, count)).values()):
            pass


def logged(worker: WorkerProcess, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in list(worker.lines) if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


def only_unknown(load: Load, faults: int = 1) -> None:
    """A fault costs each of the 50 callers at most the call that it waits for, and its outcome is not known."""
    counts = load.ledger.counts
    assert set(counts) == {"result", "OutcomeUnknown/maybe"}, counts
    assert counts["OutcomeUnknown/maybe"] <= faults * 50, counts


def only_results(*loads: Load) -> None:
    for load in loads:
        assert set(load.ledger.counts) == {"result"}, load.ledger.counts


async def test_a_worker_killed_in_the_middle_of_calls_costs_only_those_and_none_runs_twice(scene: Scene) -> None:
    first, _ = await scene.workers_of(2)
    async with scene.client() as client:
        async with (
            scene.load(client, params={"seconds": 0.2}) as plain,
            scene.load(client, method="again", idempotent=True, params={"seconds": 0.2}) as idempotent,
        ):
            await in_the_middle(scene, plain)
            first.kill()
            await plain.through()
            await idempotent.through()
        only_unknown(plain)
        only_results(idempotent)
    await scene.check()


async def test_a_worker_killed_between_its_replies_and_their_acks_costs_no_call(scene: Scene) -> None:
    held = 20
    dying, other = await asyncio.gather(
        scene.worker(service="support.targets_dying:target", RPCQ_TEST_DIES_AFTER="50", RPCQ_PREFETCH=str(held)),
        scene.worker(),
    )
    async with scene.client() as client:
        async with (
            scene.load(client, callers=30) as plain,
            scene.load(client, callers=30, method="again", idempotent=True) as idempotent,
        ):
            assert await dying.exit_code() == -signal.SIGKILL
            await plain.through()
            await idempotent.through()
            # Each call that it answered is told of a second time, which is nobody's any more.
            await until(lambda: client._calls.unmatched >= held, what=f"{client._calls.unmatched} of {held}")
        only_results(plain, idempotent)
        if scene.queue_type == "quorum":
            assert client._calls.unmatched == held  # a notice of each message
        else:
            async with asyncio.timeout(STARTS):
                while (await stats(client, 1))[other.pid].refused_redeliveries != client._calls.unmatched:
                    pass
            assert held <= client._calls.unmatched <= 2 * held  # a reply to each call, of which a message may have two
    await scene.check()


@pytest.mark.long
async def test_callers_killed_in_the_middle_of_calls_leave_replies_for_nobody_and_workers_go_on(scene: Scene) -> None:
    await scene.workers_of(2)
    environment = {"RPCQ_URL": scene.url, "RPCQ_NAMESPACE": scene.namespace, "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-c", CALLERS_OF_ANOTHER_PROCESS, "4"]  # none is answered before they are killed
    async with scene.client() as client:
        async with scene.load(client) as plain:
            with Process(command, scene.folder, os.environ | environment) as gone:
                await until(lambda: len(scene.ran("gone-")) == 40, what="\n".join(gone.lines))
                gone.kill()
            await plain.through()
            replies_for_nobody = 0
            async with asyncio.timeout(STARTS):
                while not replies_for_nobody:
                    replies_for_nobody = sum(it.unroutable_replies for it in (await stats(client, 2)).values())
            assert 0 < replies_for_nobody <= 40
            await plain.through()
        only_results(plain)
        assert len(scene.ran("gone-")) == 40
        await until_idle(client, 2)
    await scene.check()


@pytest.mark.long
async def test_a_handler_that_blocks_past_the_heartbeat_costs_what_is_beside_it_and_its_worker_comes_back(
    scene: Scene,
) -> None:
    first = await scene.worker(RPCQ_HEARTBEAT="2")
    async with scene.client() as client:
        async with scene.load(client, timeout=60, params={"seconds": 0.02}) as plain:
            await plain.through()
            blocking = scene.load(client, method="block", timeout=60)
            # So long that another worker is there to get what this one is given up with.
            blocked = asyncio.create_task(blocking.call(seconds=15))
            await until(lambda: scene.ran(blocking.prefix))
            await scene.worker()
            assert isinstance(await blocked, OutcomeUnknown)
            await plain.through()
            await until(lambda: logged(first, "session up again"))
            await until_it_serves(client, first)
        only_unknown(plain)
    assert "target.block" in {line["method"] for line in logged(first, "event loop blocked")}
    await scene.check()


@pytest.mark.long
async def test_a_worker_frozen_past_the_heartbeat_costs_what_it_held_and_its_late_word_does_no_harm(
    scene: Scene,
) -> None:
    first, _ = await asyncio.gather(scene.worker(RPCQ_HEARTBEAT="2"), scene.worker())
    async with scene.client() as client:
        async with (
            scene.load(client, timeout=60, params={"seconds": 0.05}) as plain,
            scene.load(client, timeout=60, method="again", idempotent=True, params={"seconds": 0.05}) as idempotent,
            scene.load(client, timeout=60, callers=20, params={"seconds": 1.5}) as slow,
        ):
            await plain.through()
            await until(lambda: len(scene.ran(slow.prefix)) >= 20)  # all run, some of them there, and reply later
            first.freeze()
            await until(lambda: plain.ledger.failed, what="nobody was told")
            await plain.through()
            unmatched = client._calls.unmatched
            first.thaw()
            await until(lambda: logged(first, "session up again"))
            await until_it_serves(client, first)
            await until(lambda: client._calls.unmatched > unmatched, what="no late reply came")
            await idempotent.through()
        only_unknown(plain)
        only_unknown(slow)
        only_results(idempotent)
    await scene.check()


@pytest.mark.long
async def test_a_poison_request_kills_one_worker_and_costs_what_is_beside_it(scene: Scene) -> None:
    workers = await scene.worker("--processes", "2")
    async with scene.client() as client:
        await stats(client, 2)
        async with scene.load(client, params={"seconds": 0.2}, timeout=60) as plain:
            poison = scene.load(client, method="die", timeout=60)
            await in_the_middle(scene, plain)
            assert isinstance(await poison.call(), OutcomeUnknown)
            await stats(client, 2)  # it is replaced
            await plain.through()
        assert len(scene.ran(poison.prefix)) == 1
        only_unknown(plain)
    assert len(logged(workers, "worker process died")) == 1
    await scene.check()


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_a_poison_request_of_an_idempotent_caller_kills_as_many_workers_as_it_has_attempts(scene: Scene) -> None:
    workers = await scene.worker("--processes", "2")
    async with scene.client() as client:
        await stats(client, 2)
        async with scene.load(client, method="again", params={"seconds": 0.2}, timeout=120) as plain:
            poison = scene.load(client, method="die_again", idempotent=True, timeout=120)
            await in_the_middle(scene, plain)
            assert isinstance(await poison.call(), OutcomeUnknown)
            assert len(scene.ran(poison.prefix)) == MAX_ATTEMPTS
            await stats(client, 2)  # it is replaced
            await plain.through()
        only_unknown(plain, MAX_ATTEMPTS)
    assert len(logged(workers, "worker process died")) == MAX_ATTEMPTS
    await scene.check()


async def test_callers_that_are_cancelled_by_the_hundreds_free_the_slots_of_their_handlers(scene: Scene) -> None:
    await scene.workers_of(2)
    async with scene.client() as client:
        async with scene.load(client, params={"seconds": 0.02}, timeout=20) as plain:
            await plain.through()
            sleeping = scene.load(client, timeout=60, params={"seconds": 60})
            sleepers = [asyncio.create_task(sleeping.call()) for _ in range(300)]
            # Each worker runs 100 at once: all that they can, and others wait in the queue.
            await until(lambda: len(scene.ran(sleeping.prefix)) > 150, what="they did not begin")
            for sleeper in sleepers:
                sleeper.cancel()
            await asyncio.gather(*sleepers, return_exceptions=True)
            await plain.through()  # not before slots are free
            ran = set(scene.ran(sleeping.prefix))
            await until(lambda: len(scene.ran("cancelled ")) == len(ran), what="handlers go on")
            assert {line.split()[1] for line in scene.ran("cancelled ")} == ran
            await plain.through()
            assert set(scene.ran(sleeping.prefix)) == ran, "handlers began whose callers were gone"

            quick = scene.load(client, timeout=20, params={"seconds": 0.2})
            unmatched = client._calls.unmatched
            async with asyncio.timeout(20):
                while client._calls.unmatched == unmatched:
                    hasty = [asyncio.create_task(quick.call()) for _ in range(100)]
                    ran_before = len(scene.ran(quick.prefix))
                    await until(lambda ran=ran_before: len(scene.ran(quick.prefix)) > ran)
                    time.sleep(0.5)  # noqa: ASYNC251 - so that they are answered, and none of the answers is read
                    for caller in hasty:
                        caller.cancel()
                    await asyncio.gather(*hasty, return_exceptions=True)
                    await plain.through(50)
        assert sleeping.ledger.count("cancelled") == 300
        assert quick.ledger.count("cancelled") > 0
        only_results(plain)
        await until_idle(client, 2)
    await scene.check()
