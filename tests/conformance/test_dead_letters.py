"""Dead letters for programs, on a real RabbitMQ; tests/unit/cli/test_dlq.py has the command."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from rpcq import ConfigurationError, GiveUp, Service
from rpcq.dead_letters import DeadLetters, FoundLetters
from rpcq.errors import NotFound
from support.places import Place


class Office:
    """A service whose jobs fail until they may not, and its dead letters."""

    def __init__(self, home: Place, service: Service) -> None:
        self.home = home
        self.service = service
        self.letters = DeadLetters(service, home.url, namespace=home.namespace)
        self.fails = True
        self.done: list[int] = []

        @service.job
        async def work(number: int) -> None:
            if self.fails:
                raise GiveUp("not now")
            self.done.append(number)

        self.work = work

    async def bury(self, count: int) -> list[str]:
        """Have so many jobs die, and one that is invalid; returns their IDs."""
        async with self.home.worker(self.service) as worker, self.home.client() as client:
            sent = [await client.send(self.work, number=number) for number in range(count)]
            sent.append(await client.send(f"{self.service.name}.work", wrong=1))
            await until(lambda: worker._jobs is not None and worker._jobs.dead == len(sent) and not worker.in_flight)
        return [job.id for job in sent]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0.01)


@pytest.fixture
def office(home: Place, service: Service) -> Office:
    return Office(home, service)


pytestmark = pytest.mark.parametrize("home", ["rabbitmq"], indirect=True)


def ids(found: FoundLetters) -> list[str]:
    return [letter.id for letter in found.letters]


async def test_letters_are_found_by_what_they_are_and_stay(office: Office) -> None:
    *tried, invalid = await office.bury(3)
    found = await office.letters.find()
    assert sorted(ids(found)) == sorted([*tried, invalid])
    assert (found.seen, found.waiting, found.consumers) == (4, 4, 0)
    letter = next(it for it in found.letters if it.id == tried[0])
    assert (letter.label, letter.reason, letter.executed) == (f"{office.service.name}.work", "gave_up", "yes")
    assert (letter.error, letter.job.body) == ("not now", b'{"number":0}')
    filters: list[tuple[dict[str, Any], list[str]]] = [
        ({"reasons": "invalid"}, [invalid]),
        ({"reasons": ["invalid", "lost"]}, [invalid]),
        ({"jobs": "work", "ids": tried[:2]}, tried[:2]),
        ({"jobs": "other"}, []),
        ({"since": timedelta(hours=1), "reasons": "gave_up"}, tried),
        ({"since": datetime.now(UTC) + timedelta(hours=1)}, []),
        ({"since": datetime.now() + timedelta(hours=1)}, []),  # noqa: DTZ005 - of this machine's time zone
    ]
    for asked, expected in filters:
        assert sorted(ids(await office.letters.find(**asked))) == sorted(expected), asked
    some = await office.letters.find(limit=2)
    assert (len(some.letters), some.waiting) == (2, 4)


async def test_letters_are_done_again_once_their_cause_is_gone(office: Office) -> None:
    *tried, invalid = await office.bury(3)
    office.fails = False
    again = await office.letters.replay(ids=tried[:2], rate=50)
    assert (sorted(it.id for it in again.letters), again.kept) == (sorted(tried[:2]), [])
    assert sorted(ids(await office.letters.find())) == sorted([tried[2], invalid])
    async with office.home.worker(office.service):
        await until(lambda: len(office.done) == 2)
    assert sorted(office.done) == [0, 1]


async def test_letters_that_nobody_would_do_are_kept_and_each_says_why(office: Office) -> None:
    await office.bury(1)
    again = await office.letters.replay(to="nobody")
    assert again.letters == []
    assert ["no queue takes jobs of service 'nobody'" in why for _, why in again.kept] == [True, True]
    assert len((await office.letters.find()).letters) == 2


async def test_letters_are_deleted_for_good(office: Office) -> None:
    *tried, invalid = await office.bury(2)
    assert [it.id for it in await office.letters.purge(reasons="invalid")] == [invalid]
    assert len(await office.letters.purge(limit=1)) == 1
    assert len(set(ids(await office.letters.find())) & set(tried)) == 1


async def test_what_cannot_be_asked_for_is_refused(office: Office) -> None:
    with pytest.raises(NotFound, match="there is no queue"):
        await office.letters.find()
    with pytest.raises(ConfigurationError, match="limit must be a number of letters above 0; got 0"):
        await office.letters.find(limit=0)
    with pytest.raises(ConfigurationError, match="rate must be a number of letters a second above 0"):
        await office.letters.replay(rate=-1)
    with pytest.raises(ConfigurationError, match="to must be 1 to 100 of the characters"):
        await office.letters.replay(to="a b")
    with pytest.raises(ConfigurationError, match="the name of a service must be"):
        DeadLetters("a b", office.home.url)
    with pytest.raises(ConfigurationError, match=r"world.dead\(\)"):
        DeadLetters("things", "memory://here")
