"""What waits until there is a way: in which order it goes on, and what takes it out before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from rpcq.runtime.backlog import Backlog

SECONDS = 5.0


class Way:
    """A backlog, the way that its items wait for, and the items that were taken."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.taken: list[str] = []
        self.closes_after = ""
        self.added_again: list[str] = []
        self.backlog: Backlog[str] = Backlog(self.open.is_set, self.open.wait, self._take)

    def add(self, items: str) -> None:
        for item in items:
            self.backlog.add(item)

    def _take(self, item: str) -> None:
        self.taken.append(item)
        if item == self.closes_after:
            self.open.clear()
        if item in self.added_again:
            self.added_again.remove(item)
            self.backlog.add(item)

    async def emptied(self) -> str:
        async with asyncio.timeout(SECONDS):
            await self.backlog.emptied()
        return "".join(self.taken)


@pytest.fixture
async def way() -> AsyncIterator[Way]:
    way = Way()
    yield way
    await way.backlog.close()


async def turns() -> None:
    """Let every task go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_items_are_taken_in_the_order_in_which_they_came(way: Way) -> None:
    way.add("cab")
    assert len(way.backlog) == 3
    way.open.set()
    assert await way.emptied() == "cab"
    assert len(way.backlog) == 0


async def test_nothing_is_taken_before_there_is_a_way_and_not_by_who_adds_it(way: Way) -> None:
    way.add("ab")
    await turns()
    assert way.taken == []
    way.open.set()
    assert way.taken == []
    assert await way.emptied() == "ab"


async def test_when_the_way_closes_the_rest_waits_in_its_order_before_what_comes_later(way: Way) -> None:
    way.closes_after = "b"
    way.add("abc")
    way.open.set()
    await turns()
    assert (way.taken, list(way.backlog.items)) == (["a", "b"], ["c"])
    way.add("d")
    way.open.set()
    assert await way.emptied() == "abcd"


async def test_an_item_that_is_added_twice_waits_once(way: Way) -> None:
    way.add("aba")
    way.open.set()
    assert await way.emptied() == "ab"


async def test_an_item_that_is_added_again_while_it_is_taken_goes_behind_all_others(way: Way) -> None:
    way.added_again = ["a"]
    way.add("abc")
    way.open.set()
    assert await way.emptied() == "abca"


async def test_the_last_item_may_be_added_again_while_it_is_taken(way: Way) -> None:
    way.added_again = ["a", "a"]
    way.add("a")
    way.open.set()
    assert await way.emptied() == "aaa"


async def test_a_discarded_item_is_not_taken_and_the_order_of_the_others_stays(way: Way) -> None:
    way.add("abc")
    way.backlog.discard("b")
    way.backlog.discard("never added")
    way.open.set()
    assert await way.emptied() == "ac"


async def test_after_a_clear_nothing_waits_and_what_comes_later_is_taken(way: Way) -> None:
    way.add("ab")
    way.backlog.clear()
    assert len(way.backlog) == 0
    way.add("c")
    way.open.set()
    assert await way.emptied() == "c"


async def test_there_is_no_task_while_nothing_waits(way: Way) -> None:
    before = asyncio.all_tasks()
    assert await way.emptied() == ""
    way.add("a")
    assert len(asyncio.all_tasks() - before) == 1
    way.open.set()
    await way.emptied()
    await turns()
    assert asyncio.all_tasks() == before
    way.add("b")
    assert await way.emptied() == "ab"


async def test_who_waits_for_the_last_item_and_gives_up_stops_nothing(way: Way) -> None:
    way.add("a")
    waiting = asyncio.create_task(way.backlog.emptied())
    await turns()
    waiting.cancel()
    await asyncio.wait([waiting], timeout=SECONDS)
    assert waiting.cancelled()
    way.open.set()
    assert await way.emptied() == "a"


async def test_closing_forgets_what_waits_and_ends_the_task(way: Way) -> None:
    before = asyncio.all_tasks()
    way.add("ab")
    await turns()
    await way.backlog.close()
    assert len(way.backlog) == 0
    assert asyncio.all_tasks() == before
    way.open.set()
    await turns()
    assert way.taken == []


@pytest.mark.parametrize("how", ["clear", "discard", "close"])
async def test_who_waits_until_nothing_waits_goes_on_though_there_never_is_a_way(way: Way, how: str) -> None:
    way.add("a")
    waiter = asyncio.create_task(way.emptied())
    await turns()
    assert not waiter.done()
    match how:
        case "clear":
            way.backlog.clear()
        case "discard":
            way.backlog.discard("a")
        case _:
            await way.backlog.close()
    assert await waiter == ""
