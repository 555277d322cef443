"""Workers in several processes that share the store of docs/howto/shared-results.md, lose each other, and lose it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from rpcq import CallError, CallTimeout, Client, OutcomeUnknown
from support.load import READY, Ledger, Scene, WorkerProcess, first, until
from support.postgres import postgres as a_postgres
from support.sharing import asked, module, source

# Here so that the database is there before the clock of the first test is started.
pytestmark = pytest.mark.usefixtures("postgres")

TABLE: str = module().TABLE


@pytest.fixture
def table(database_url: str) -> str:
    """The URL of a database that has the table."""
    asked(database_url, TABLE)
    return database_url


@asynccontextmanager
async def sharing(scene: Scene, url: str) -> AsyncIterator[tuple[Client, Ledger]]:
    """A client, and workers to be started that share the store in the database of that URL."""
    (scene.folder / "shared_results.py").write_text(source())
    async with scene.client() as client:
        yield client, scene.ledger()


async def worker(scene: Scene, url: str, *arguments: str, **environment: str) -> WorkerProcess:
    environment["DATABASE_URL"] = url
    return await scene.start(*arguments, service="support.targets_sharing:target", **environment).started()


async def call(client: Client, ledger: Ledger, nonce: str, method: str = "once", **params: Any) -> Any:
    """A call with its nonce as its key, entered into the ledger: its result, or the error that it ended with."""
    ledger.begun += 1
    began = time.time()
    told: Any = None
    kind = "result"
    try:
        told = await client.with_options(idempotency_key=nonce).call(f"target.{method}", nonce=nonce, **params)
        assert told == nonce
    except CallError as error:
        told, kind = error, f"{type(error).__name__}/{error.executed}"
    ledger.wrote(nonce, idempotent=method == "again", told=kind, began=began)
    return told


async def test_of_each_call_that_is_made_twice_at_once_one_runs(scene: Scene, table: str) -> None:
    async with sharing(scene, table) as (client, ledger):
        workers = [await worker(scene, table, "--prefetch", "20") for _ in range(2)]
        patient = client.with_options(timeout=30)
        nonces = [f"n{number}" for number in range(200)]
        calls = [call(patient, ledger, nonce, seconds=0.01) for nonce in nonces for _ in range(2)]
        assert await asyncio.gather(*calls) == [nonce for nonce in nonces for _ in range(2)]
        assert Counter(scene.ran()) == dict.fromkeys(nonces, 1)
        assert ledger.counts == {"result": 400}
        told = await first(client.stats("target", wait=READY), len(workers))
        assert sum(stats.replayed for stats in told) == 200
        assert all(stats.finished > 50 for stats in told)
        await scene.check()


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_what_a_lost_worker_ran_does_not_run_again_under_its_key_and_its_callers_hear_maybe(
    scene: Scene, table: str
) -> None:
    async with sharing(scene, table) as (client, ledger):
        # The other one is there before, so that its start takes nothing of the time that the lost one has the key.
        times = scene.folder / "times"
        workers = [await worker(scene, table, RPCQ_TEST_TIMES=str(times)) for _ in range(2)]
        lost_call = asyncio.create_task(call(client.with_options(timeout=20), ledger, "n", seconds=60))
        await until(lambda: times.exists() and times.read_text("ascii"))
        _, _, ran_in = times.read_text("ascii").split()
        next(it for it in workers if it.pid == int(ran_in)).kill()
        assert (await lost_call).executed == "maybe"
        hasty = await call(client.with_options(timeout=5), ledger, "n", seconds=60)
        assert isinstance(hasty, CallTimeout)  # the time of the lost one has not passed
        assert hasty.executed == "maybe"
        for _ in range(3):
            error = await asyncio.wait_for(call(client.with_options(timeout=60), ledger, "n", seconds=60), 50)
            assert isinstance(error, OutcomeUnknown)
            assert "a worker that ran a request with its idempotency key was lost" in error.message
        assert scene.ran() == ["n"]
        await scene.check()


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_what_a_lost_worker_ran_runs_again_if_it_is_idempotent(scene: Scene, table: str) -> None:
    async with sharing(scene, table) as (client, ledger):
        lost = await worker(scene, table)
        caller = client.with_options(timeout=60, idempotent=True)
        calls = [asyncio.create_task(call(caller, ledger, nonce, "again", seconds=1)) for nonce in ("n", "o")]
        await until(lambda: len(scene.ran()) == 2)
        lost.kill()
        await worker(scene, table)
        assert await asyncio.gather(*calls) == ["n", "o"]
        assert Counter(scene.ran()) == {"n": 2, "o": 2}
        assert await call(caller, ledger, "n", "again", seconds=1) == "n"
        assert len(scene.ran()) == 4
        await scene.check()


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_another_call_with_the_key_of_a_lost_one_runs_if_it_is_idempotent(scene: Scene, table: str) -> None:
    async with sharing(scene, table) as (client, ledger):
        lost = await worker(scene, table)
        # This caller does not have it sent again.
        lost_call = asyncio.create_task(call(client.with_options(timeout=10), ledger, "n", "again", seconds=5))
        await until(scene.ran)
        lost.kill()
        await worker(scene, table)
        assert (await lost_call).executed == "maybe"
        assert await call(client.with_options(timeout=60), ledger, "n", "again", seconds=5) == "n"
        assert Counter(scene.ran()) == {"n": 2}
        await scene.check()


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.long)], ids=["stopped", "killed"])
@pytest.mark.long
@pytest.mark.timeout(240)
async def test_a_database_that_is_away_for_a_moment_costs_no_wrong_outcome_and_calls_come_through_when_it_is_back(
    scene: Scene, kill: bool
) -> None:
    with a_postgres(own=True) as database:
        asked(database.url, TABLE)
        async with sharing(scene, database.url) as (client, ledger):
            for _ in range(2):
                await worker(scene, database.url)
            told: dict[str, Any] = {}
            stopping = False

            async def call_on(caller: int) -> None:
                number = 0
                while not stopping:
                    number += 1
                    nonce = f"{caller}-{number}"
                    told[nonce] = await call(client.with_options(timeout=10), ledger, nonce, seconds=0.005)

            async def through(count: int) -> None:
                counts = ledger.counts
                wanted = counts["result"] + count
                await until(lambda: counts["result"] >= wanted, 60, f"they do not come through: {counts}")

            calling = [asyncio.create_task(call_on(caller)) for caller in range(20)]
            await through(300)
            await asyncio.to_thread(database.down, kill=kill)
            waiting = asyncio.create_task(call(client.with_options(timeout=60), ledger, "waits"))
            await asyncio.sleep(11)  # the callers' deadlines come before it is back
            assert not waiting.done()
            await asyncio.to_thread(database.up)
            assert await waiting == "waits"
            await through(300)
            stopping = True
            await asyncio.gather(*calling)
            # A handler that is cut off at its deadline may end later than its caller knows it.
            while any(it.in_flight for it in await first(client.stats("target", wait=READY), 2)):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            ledger.check(scene.runs)
            ran = Counter(scene.ran())
            failed = [error for error in told.values() if isinstance(error, CallError)]
            assert failed, "the database was not missed"
            # What was cut off has failed, and its key is free. What else ran, or may have, does not run again.
            cut_off = {nonce for nonce in told if ran[f"cancelled {nonce}"]}
            assert all(isinstance(told[nonce], CallTimeout) for nonce in cut_off)
            again = [nonce for nonce in told.keys() - cut_off if getattr(told[nonce], "executed", "yes") != "no"]
            calls = (call(client.with_options(timeout=60), ledger, nonce, seconds=0.005) for nonce in again)
            repeated = await asyncio.gather(*calls)
            times_run = Counter(scene.ran())
            assert set(times_run.values()) == {1}
            assert {nonce for nonce, error in told.items() if isinstance(error, str)} <= ran.keys()
            lost = [error for error in repeated if isinstance(error, CallError)]
            assert {error.executed for error in lost} <= {"maybe"}
            assert len(lost) <= 2 * len(calling), "more than were under way when it went and when it came back"
            await scene.check()
