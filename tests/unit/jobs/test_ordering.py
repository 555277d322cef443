"""Order keys in a world whose time the test moves, and whose workers die."""

from __future__ import annotations

import asyncio

from rpcq import Context, Retry, RetryLater, Service
from rpcq.testing import world
from support.ordered import keys_in


async def test_the_time_of_the_world_moves_the_retries_of_a_job_with_an_order_key() -> None:
    service, ran = Service("accounts", ordered=True), []

    @service.job
    async def moved(to: str, context: Context) -> None:
        ran.append((context.order_key, to, context.attempt))
        if to == "Rome" and context.attempt < 3:
            raise RetryLater(40)

    async with world(service) as w:
        for key in ("seven", "eight"):
            for place in ("Rome", "Oslo"):
                await w.client.with_options(order_key=key).send(moved, to=place)
        await w.settled()
        assert sorted(ran) == [("eight", "Rome", 1), ("seven", "Rome", 1)]
        await w.advance(seconds=39)
        assert len(ran) == 2
        await w.advance(seconds=2)
        assert len(ran) == 4
        await w.advance(seconds=40)
        assert [(to, attempt) for key, to, attempt in ran if key == "seven"] == [
            ("Rome", 1),
            ("Rome", 2),
            ("Rome", 3),
            ("Oslo", 1),
        ]
        await w.kill_worker()
        sent = await w.client.with_options(order_key="seven").send(moved, to="Lima")
        (waits,) = w.waiting(moved)
        assert (waits.id, waits.order_key) == (sent.id, "seven")


async def test_a_job_holds_up_its_order_key_for_20_minutes_of_the_world() -> None:
    service, ran = Service("accounts", ordered=True), []

    @service.job(retry=Retry(max_attempts=1000))
    async def moved(to: str) -> None:
        ran.append(to)
        if to == "Rome":
            raise RetryLater(3600)

    async with world(service) as w:
        for place in ("Rome", "Oslo"):
            await w.client.with_options(order_key="seven").send(moved, to=place)
        await w.advance(minutes=19)
        assert (set(ran), w.dead()) == ({"Rome"}, [])
        await w.advance(minutes=2)
        (dead,) = w.dead()
    assert (dead.reason, dead.executed, ran.count("Rome"), ran[-1]) == ("attempts", "yes", 21, "Oslo")


async def test_a_poison_job_with_an_order_key_takes_nobody_along() -> None:
    """Each run of it kills the worker, with all that it holds: of its key, its lane, other lanes, and no key."""
    service, crashes, done = Service("images", ordered=True), [], []

    @service.job
    async def shrink(number: int, context: Context) -> None:
        if context.order_key == poisoned and number == 1:
            crashes.append(number)
            w.crash()
        await asyncio.sleep(0)
        done.append((context.order_key, number))

    poisoned, *beside = keys_in("k04", 2, "own")
    keys = [poisoned, *beside, *(f"key-{number}" for number in range(20, 40)), None]
    async with world(service) as w:
        await w.kill_worker()
        for number in range(3):
            for key in keys:
                maker = w.client if key is None else w.client.with_options(order_key=key)
                await maker.send(shrink, number=number)
        await w.start_worker()
        for _ in range(25):
            await w.settled()
            await w.advance(seconds=3)
        (dead,) = w.dead()
        assert (w.waiting(), dead.reason, dead.executed, dead.params) == ([], "delivery_limit", "maybe", {"number": 1})
    assert len(crashes) == 20
    for key in keys[:-1]:
        numbers = [number for each, number in done if each == key]
        assert numbers == sorted(numbers), (
            "what its worker had not acknowledged may be done again, and nothing later before"
        )
        assert set(numbers) == ({0, 2} if key == poisoned else {0, 1, 2}), key
    assert {number for key, number in done if key is None} == {0, 1, 2}
