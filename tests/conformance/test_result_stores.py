"""What is promised of a store of results: the one in memory, and the one of docs/howto/shared-results.md."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from rpcq.results import Claim, MemoryResults, ResultStore, StoredResult
from support.load import until
from support.postgres import postgres as a_postgres
from support.sharing import asked, module

# Here so that the database is there before the clock of the first test is started.
pytestmark = pytest.mark.usefixtures("postgres")

PAGE: Any = module()
LONG = 60.0
SHORT = 0.1
A, B = StoredResult(b"a" * 16, b'"a"'), StoredResult(b"b" * 16, b'"b"')


@pytest.fixture
def table(database_url: str) -> str:
    """The URL of a database that has the table."""
    asked(database_url, PAGE.TABLE)
    return database_url


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[tuple[ResultStore, ResultStore]]:
    one, other = PAGE.PostgresResults(url), PAGE.PostgresResults(url)
    async with one.opened(), other.opened():
        yield one, other


@pytest.fixture(params=["memory", "postgres"])
async def stores(request: pytest.FixtureRequest, table: str) -> AsyncIterator[tuple[ResultStore, ResultStore]]:
    """One store, as two workers have it."""
    if request.param == "memory":
        store = MemoryResults(1_000_000)
        yield store, store
        return
    async with opened(table) as both:
        yield both


Stores = tuple[ResultStore, ResultStore]


# What is promised of any store.


async def test_a_key_that_nobody_has_is_taken_and_held_for_all_others(stores: Stores) -> None:
    one, other = stores
    assert await one.claim("k", "first", LONG) is Claim.TAKEN
    assert await other.claim("k", "second", LONG) is Claim.HELD
    assert await one.claim("k", "third", LONG) is Claim.HELD
    assert await other.claim("l", "second", LONG) is Claim.TAKEN
    assert await other.get("k") is None


async def test_a_key_whose_time_has_passed_lapses_to_the_next_owner_and_is_held_for_others(stores: Stores) -> None:
    one, other = stores
    assert await one.claim("k", "lost", SHORT) is Claim.TAKEN
    await asyncio.sleep(2 * SHORT)
    assert await other.claim("k", "next", LONG) is Claim.LAPSED
    assert await one.claim("k", "third", LONG) is Claim.HELD
    assert await one.claim("k", "lost", LONG) is Claim.HELD


async def test_a_key_that_has_lapsed_once_lapses_again(stores: Stores) -> None:
    one, other = stores
    await one.claim("k", "lost", 0.0)
    for number in range(3):
        assert await other.claim("k", f"next-{number}", 0.0) is Claim.LAPSED


async def test_what_was_put_is_the_result_of_every_claim(stores: Stores) -> None:
    one, other = stores
    await one.claim("k", "first", LONG)
    await one.put("k", A)
    assert await other.claim("k", "second", LONG) == A
    assert await one.claim("k", "first", LONG) == A
    assert (await one.get("k"), await other.get("k"), await other.get("l")) == (A, A, None)


async def test_a_result_is_there_after_the_time_of_its_owner(stores: Stores) -> None:
    one, other = stores
    await one.claim("k", "first", SHORT)
    await one.put("k", A)
    await asyncio.sleep(2 * SHORT)
    assert await other.claim("k", "second", LONG) == A


async def test_put_overwrites_and_needs_no_claim(stores: Stores) -> None:
    one, other = stores
    await one.put("k", A)
    await other.put("k", B)
    assert await one.get("k") == B
    await one.claim("l", "first", LONG)
    await other.put("l", B)  # of one whose time had passed, say
    assert await one.claim("l", "first", LONG) == B


@pytest.mark.parametrize("body", [b"", b"\0\xff", b"x" * 1_000_000], ids=["none", "no text", "large"])
async def test_a_body_is_any_bytes(body: bytes, table: str) -> None:
    async with opened(table) as (one, other):
        await one.put("k", StoredResult(b"\0" * 16, body))
        assert await other.claim("k", "first", LONG) == StoredResult(b"\0" * 16, body)
        assert await other.get("k") == StoredResult(b"\0" * 16, body)


async def test_an_owner_that_claims_its_key_again_gets_the_same_and_has_it_anew(stores: Stores) -> None:
    one, other = stores
    seconds = 2.0  # each claim has to come within that of the one before
    for _ in range(2):
        assert await one.claim("k", "first", seconds) is Claim.TAKEN
    assert await one.claim("k", "first", LONG) is Claim.TAKEN
    await asyncio.sleep(seconds + SHORT)
    assert await other.claim("k", "second", LONG) is Claim.HELD
    await one.claim("l", "lost", 0.0)
    for _ in range(2):
        assert await other.claim("l", "second", LONG) is Claim.LAPSED


async def test_an_owner_that_claims_its_key_for_no_time_lets_it_lapse(stores: Stores) -> None:
    one, other = stores
    await one.claim("k", "lost", 0.0)
    await one.claim("k", "first", LONG)
    assert await one.claim("k", "first", 0.0) is Claim.LAPSED
    assert await other.claim("k", "second", LONG) is Claim.LAPSED


async def test_a_key_that_is_released_is_free(stores: Stores) -> None:
    one, other = stores
    await one.claim("k", "first", LONG)
    await one.release("k", "first")
    assert await other.claim("k", "second", LONG) is Claim.TAKEN


async def test_a_release_by_another_owner_does_nothing(stores: Stores) -> None:
    one, other = stores
    await one.claim("k", "first", LONG)
    await other.release("k", "second")
    await other.release("unknown", "second")
    assert await other.claim("k", "second", LONG) is Claim.HELD


async def test_a_release_by_an_owner_that_has_lost_the_key_does_nothing(stores: Stores) -> None:
    one, other = stores
    await one.claim("k", "slow", 0.0)
    await other.claim("k", "next", LONG)
    await one.release("k", "slow")
    assert await one.claim("k", "third", LONG) is Claim.HELD


async def test_a_result_is_not_released(stores: Stores) -> None:
    one, other = stores
    await one.claim("k", "first", LONG)
    await one.put("k", A)
    await one.release("k", "first")
    assert await other.get("k") == A


async def test_of_fifty_claims_of_one_key_at_once_one_takes_it(stores: Stores) -> None:
    for key in range(10):
        claims = (stores[number % 2].claim(f"{key}", f"owner-{number}", LONG) for number in range(50))
        assert Counter(await asyncio.gather(*claims)) == {Claim.TAKEN: 1, Claim.HELD: 49}


async def test_of_fifty_claims_of_one_key_that_has_lapsed_one_takes_it(stores: Stores) -> None:
    for key in range(10):
        await stores[0].claim(f"{key}", "lost", 0.0)
        claims = (stores[number % 2].claim(f"{key}", f"owner-{number}", LONG) for number in range(50))
        assert Counter(await asyncio.gather(*claims)) == {Claim.LAPSED: 1, Claim.HELD: 49}


async def test_whatever_others_do_at_the_time_a_key_has_one_owner(stores: Stores) -> None:
    """Keys are claimed, released and given a result in any order; a claim never finds a key free that another has."""
    chance = random.Random(7)
    owners: dict[str, str] = {}
    results: dict[str, StoredResult] = {}
    found = Counter[str]()

    async def work(number: int) -> None:
        store = stores[number % 2]
        for turn in range(60):
            key, owner = str(chance.randrange(6) + turn // 10 * 6), f"{number}-{turn}"
            claimed = await store.claim(key, owner, LONG)
            found["result" if isinstance(claimed, StoredResult) else claimed.value] += 1
            if claimed is Claim.HELD:
                continue
            if isinstance(claimed, StoredResult):
                assert claimed == results[key]
                continue
            assert claimed is Claim.TAKEN
            assert key not in owners
            assert key not in results
            owners[key] = owner
            await asyncio.sleep(chance.random() * 0.005)
            del owners[key]
            if chance.random() < 0.2:
                results[key] = StoredResult(owner.encode(), owner.encode())
                await store.put(key, results[key])
            else:
                await store.release(key, owner)

    await asyncio.gather(*(work(number) for number in range(16)))
    assert all(found[kind] > 10 for kind in ("taken", "held", "result")), found


# The page's.


async def test_the_time_of_a_claim_is_the_databases_whatever_the_clocks_of_workers(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, ahead = time.time, 3600
    monkeypatch.setattr(time, "time", lambda: clock() + ahead)
    async with opened(table) as (one, other):
        began = asked(table, "SELECT now()")[0][0]
        assert await one.claim("k", "first", 5.0) is Claim.TAKEN
        ended = asked(table, "SELECT now()")[0][0]
        ((until_,),) = asked(table, "SELECT until FROM rpcq_results")
        assert 5.0 <= (until_ - began).total_seconds() <= (ended - began).total_seconds() + 5.0
        ahead = 7200
        assert await other.claim("k", "second", LONG) is Claim.HELD
        ahead = -3600
        asked(table, "UPDATE rpcq_results SET until = now()")
        assert await other.claim("k", "second", LONG) is Claim.LAPSED


async def test_old_rows_are_forgotten_and_those_that_an_owner_has_are_not(table: str) -> None:
    async with opened(table) as (one, _):
        for key in ("old result", "result"):
            await one.put(key, A)
        for key, seconds in (("old, lost", 0.0), ("lost", 0.0), ("old, held", LONG)):
            await one.claim(key, "first", seconds)
        asked(table, "UPDATE rpcq_results SET created = now() - interval '8 days' WHERE key LIKE 'old%'")
    async with opened(table):
        await until(lambda: len(asked(table, "SELECT key FROM rpcq_results")) < 5)
    assert asked(table, "SELECT key FROM rpcq_results ORDER BY key") == [("lost",), ("old, held",), ("result",)]


async def test_a_store_opens_without_its_database_says_soon_that_it_is_away_and_comes_back_by_itself() -> None:
    with a_postgres(own=True) as database:
        asked(database.url, PAGE.TABLE)
        await asyncio.to_thread(database.down)
        async with opened(database.url) as (one, other):
            with pytest.raises(psycopg.Error):
                await asyncio.wait_for(one.claim("k", "first", LONG), 5)
            await asyncio.to_thread(database.up)
            while True:
                try:
                    assert await one.claim("k", "first", LONG) is Claim.TAKEN
                except psycopg.Error:
                    continue  # until the time of the test is over
                break
            assert await other.claim("k", "second", LONG) is Claim.HELD
            # Connections that broke while nobody used them cost one error each.
            await asyncio.to_thread(database.down, kill=True)
            await asyncio.to_thread(database.up)
            with pytest.raises(psycopg.Error):
                await one.get("k")
            assert await asyncio.wait_for(one.claim("k", "first", LONG), 10) is Claim.TAKEN
