"""Workers that are told to stop under load: with all that they need to end well, and without."""

from __future__ import annotations

import asyncio
import signal

import pytest

from rpcq import Client, OutcomeUnknown
from support.load import Load, Scene, until

# Workers are started and stopped under load, one after the other; until one serves, calls wait in the queue.
pytestmark = pytest.mark.timeout(180)


def sent_again(client: Client) -> list[int]:
    """The list that grows with each call that the client sends again."""
    times: list[int] = []
    send_again = client._sender.again

    def counting(call) -> None:
        times.append(call.sent)
        send_again(call)

    client._sender.again = counting
    return times


def only_results(*loads: Load) -> None:
    for load in loads:
        assert set(load.ledger.counts) == {"result"}, load.ledger.counts


def only_unknown(load: Load) -> None:
    """Each of the 50 callers lost at most the call that it waited for, and its outcome is not known."""
    counts = load.ledger.counts
    assert set(counts) <= {"result", "OutcomeUnknown/maybe"}, counts
    assert counts["OutcomeUnknown/maybe"] <= 50, counts


async def stuck_calls(scene: Scene, client: Client, method: str, count: int, **params: float) -> list[asyncio.Task]:
    """Calls that do not end, and have begun."""
    load: Load = scene.load(client, method=method, timeout=60)
    calls = [asyncio.create_task(load.call(**params)) for _ in range(count)]
    await until(lambda: len(scene.ran(load.prefix)) == count, what="they did not begin")
    return calls


async def test_a_worker_stopped_under_load_costs_no_call(scene: Scene) -> None:
    first, _ = await scene.workers_of(2)
    async with scene.client() as client:
        async with (
            scene.load(client, timeout=60, params={"seconds": 0.05}) as plain,
            scene.load(client, timeout=60, method="again", idempotent=True, callers=30) as idempotent,
            scene.load(client, timeout=60, method="thread", callers=10, params={"seconds": 0.02}) as threads,
        ):
            await plain.through()
            first.signal(signal.SIGTERM)
            assert await first.exit_code() == 0
            await plain.through()
            await threads.through(50)
        only_results(plain, idempotent, threads)
    await scene.check()


async def test_calls_that_come_to_a_worker_while_it_stops_run_elsewhere(scene: Scene) -> None:
    first, _ = await asyncio.gather(
        scene.worker(service="support.targets_dying:target", RPCQ_TEST_LINGERS="3"), scene.worker()
    )
    async with scene.client() as client:
        again = sent_again(client)
        async with (
            scene.load(client, timeout=60) as plain,
            scene.load(client, timeout=60, method="again", idempotent=True) as idempotent,
        ):
            await plain.through()
            assert not again
            first.signal(signal.SIGTERM)
            assert await first.exit_code() == 0
            assert again
            await plain.through()
            await idempotent.through()
        only_results(plain, idempotent)
    await scene.check()


@pytest.mark.long
async def test_what_a_killed_worker_held_does_not_run_again_through_one_that_stops(scene: Scene) -> None:
    killed, stopping = await asyncio.gather(
        scene.worker(), scene.worker(service="support.targets_dying:target", RPCQ_TEST_LINGERS="5")
    )
    async with scene.client() as client:
        again = sent_again(client)
        async with scene.load(client, timeout=60, params={"seconds": 0.2}) as plain:
            await plain.through()
            stopping.signal(signal.SIGTERM)
            await until(lambda: again, what="it turns nothing away")
            killed.kill()
            await scene.worker()
            await plain.through()
            assert await stopping.exit_code() == 0
            await plain.through()
        only_unknown(plain)
    await scene.check()
    assert plain.ledger.failed


@pytest.mark.long
@pytest.mark.timeout(240)
async def test_a_rolling_restart_under_constant_load_costs_no_call(scene: Scene) -> None:
    workers = await scene.workers_of(4)
    async with scene.client() as client:
        async with (
            scene.load(client, timeout=60, params={"seconds": 0.02}) as plain,
            scene.load(client, timeout=60, method="again", idempotent=True) as idempotent,
            scene.load(client, timeout=60, method="thread", callers=10, params={"seconds": 0.02}) as threads,
        ):
            await plain.through()
            for old in workers:
                await scene.worker()
                old.signal(signal.SIGTERM)
                assert await old.exit_code() == 0
                await plain.through()
                await threads.through(50)
            await idempotent.through()
        only_results(plain, idempotent, threads)
    await scene.check()


@pytest.mark.long
async def test_a_stopped_worker_cuts_off_what_does_not_end_within_its_grace_time(scene: Scene) -> None:
    first = await scene.worker("--grace", "0.5")
    async with scene.client() as client:
        async with scene.load(client, timeout=60, params={"seconds": 0.02}) as plain:
            await plain.through()
            stuck = await stuck_calls(scene, client, "stick", 5)
            stuck += await stuck_calls(scene, client, "thread", 5, seconds=60.0)
            await scene.worker()
            first.signal(signal.SIGTERM)
            assert await first.exit_code() == 1
            for outcome in await asyncio.gather(*stuck):
                assert isinstance(outcome, OutcomeUnknown)
            await plain.through()
        only_unknown(plain)
    assert len(scene.ran("cancelled ")) == 5
    await scene.check()


async def test_a_second_signal_ends_a_worker_at_once(scene: Scene) -> None:
    first = await scene.worker("--grace", "60")
    async with scene.client() as client:
        async with scene.load(client, timeout=60, params={"seconds": 0.02}) as plain:
            await plain.through()
            stuck = await stuck_calls(scene, client, "stick", 5)
            stuck += await stuck_calls(scene, client, "thread", 5, seconds=60.0)
            await scene.worker()
            first.signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            assert first.is_alive
            first.signal(signal.SIGINT)  # of another number: two of one number may be taken for one
            assert await first.exit_code() == 1
            for outcome in await asyncio.gather(*stuck):
                assert isinstance(outcome, OutcomeUnknown)
            await plain.through()
        only_unknown(plain)
    await scene.check()


async def test_a_second_signal_that_comes_with_the_first_one_ends_a_worker_as_well(scene: Scene) -> None:
    first = await scene.worker("--grace", "60")
    async with scene.client() as client:
        stuck = await stuck_calls(scene, client, "stick", 10)
        await scene.worker()
        first.freeze()  # as by a handler that blocks the event loop: it hears of both at once
        first.signal(signal.SIGTERM)
        first.signal(signal.SIGINT)
        first.thaw()
        assert await first.exit_code() == 1
        for outcome in await asyncio.gather(*stuck):
            assert isinstance(outcome, OutcomeUnknown)
    await scene.check()
