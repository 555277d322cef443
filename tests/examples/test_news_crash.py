"""The news while each of their processes is killed in turn under load, and the broker once.

The oracle: each story that the editor saved is with each reader who asked for its topic, once, and with nobody else;
and it is on the web. A browser that stayed through all of it has all stories of its topics, in the order of the web,
without a gap and none twice. At the end, nothing is left in a queue or an outbox, and no letter is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx
import pytest

from examples.news.contracts import TOPICS, asked_for
from examples.news.readers import MAILBOXES, PHONES
from support.broker import Broker
from support.load import until
from support.ports import free_ports
from support.producers import SECONDS
from support.systems import WORKER, Processes, running

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

LATE = 180.0
"""Seconds after which what is waited for will not come."""

SERVICES = ("editor", "mobile", "emails")
WATCHED = ("mobile", "mobile:spread", "emails", "emails:collect", "web", "web:keep")

EVERY = 0.4
"""Seconds between two stories: fewer pushes a second than `rate` lets through, so none is delayed in the broker."""


class Browser:
    """A browser that stays: it reads events as EventSource does, and comes again whenever its stream ends."""

    def __init__(self, base: str, *choices: str) -> None:
        self.choices = choices
        self.shown: list[str] = []
        self.positions: list[int] = []
        self.lost = 0
        self._base = base

    async def stay(self) -> None:
        async with httpx.AsyncClient(base_url=self._base, timeout=SECONDS) as http:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    await self._read(http)
                self.lost += 1
                await asyncio.sleep(0.2)

    async def _read(self, http: httpx.AsyncClient) -> None:
        headers = {"last-event-id": str(self.positions[-1])} if self.positions else {}
        params = {"choices": self.choices, "after": "0"}
        async with http.stream("GET", "/live", params=params, headers=headers) as answer:
            assert answer.status_code == 200
            fields: dict[str, str] = {}
            async for line in answer.aiter_lines():
                name, _, value = line.partition(": ")
                if line:
                    fields[name] = value
                    continue
                if "id" in fields:  # complete: what is cut off counts as nothing
                    self.positions.append(int(fields["id"]))
                    self.shown.append(json.loads(fields["data"])["id"])
                fields = {}


class System(Processes):
    """The newsroom and its services as processes, somebody who publishes, and browsers."""

    def __init__(self, url: str, folder: Path) -> None:
        self.promised: dict[str, str] = {}
        port, *web = free_ports(3)
        self._folder = folder
        self._base = f"http://127.0.0.1:{port}"
        commands: dict[str, tuple[str, ...]] = {
            "newsroom": ("examples.news", "--port", str(port), "--web", *map(str, web)),
        }
        for name in SERVICES:
            commands[name] = *WORKER, f"examples.news.{name}:{name}", "--job-prefetch", "4"
        for number, each in enumerate(web, 1):
            name = f"web-{number}"
            commands[name] = "examples.news.web", "--name", name, "--port", str(each)
        workers = {**dict.fromkeys(SERVICES, 1), "web": 2}
        super().__init__(url, commands, {"NEWS_FOLDER": str(folder)}, workers, WATCHED)
        self.browsers = [Browser(self._base, "news"), Browser(self._base, "news.sport"), Browser(self._base, "news")]

    async def publish(self) -> None:
        """Publish one story after the other. Who gets no answer asks again, with the same ID."""
        chosen = random.Random(7)
        async with httpx.AsyncClient(base_url=self._base, timeout=SECONDS) as http:
            while True:
                story, topic = secrets.token_hex(8), chosen.choice(list(TOPICS))
                params = {"topic": topic, "headline": f"About {topic}", "story_id": story}
                while story not in self.promised:
                    with contextlib.suppress(httpx.TransportError):
                        answer = await http.post("/stories", params=params)
                        # Others than 201 are of a call that may be made again.
                        assert answer.status_code in (201, 502, 503, 504), answer.text
                        if answer.status_code == 201:
                            self.promised[story] = topic
                    await asyncio.sleep(EVERY)

    def rows(self, database: str, query: str) -> list[tuple[str, ...]]:
        """Rows of the database of a service."""
        with closing(sqlite3.connect(self._folder / f"news-{database}.sqlite", timeout=SECONDS)) as db:
            return db.execute(query).fetchall()

    def stories(self) -> dict[str, str]:
        """The topics of the stories that are saved, by ID."""
        return dict(self.rows("editor", "select story_id, topic from stories"))  # type: ignore[arg-type]

    def kept(self) -> list[str]:
        """The stories on the web, in their order."""
        return [story for (story,) in self.rows("web", "select story_id from pages order by position")]

    def got(self) -> dict[str, list[str]]:
        """What has come to each phone and each mailbox, as often as its reader sees it."""
        found: dict[str, list[str]] = {name: [] for name in (*PHONES, *MAILBOXES)}
        mails = "select reader, story_id from mails join lines on mail = number"
        for reader, story in self.rows("phones", "select reader, story_id from shown") + self.rows("emails", mails):
            found[reader].append(story)
        return {name: sorted(stories) for name, stories in found.items()}

    def wanted(self) -> dict[str, list[str]]:
        """What is to come to each."""
        stories = self.stories()
        everybody = {**PHONES, **MAILBOXES}
        return {
            name: sorted(story for story, topic in stories.items() if asked_for(choices, topic))
            for name, choices in everybody.items()
        }

    def unsent(self) -> int:
        """Rows in all outboxes."""
        counts = [self.rows(it, "select count(*) from rpcq_outbox") for it in ("editor", "mobile", "emails", "web")]
        dead = [self.rows(it, "select count(*) from rpcq_outbox_dead") for it in ("editor", "mobile", "emails", "web")]
        return sum(int(count) for ((count,),) in counts + dead)


@pytest.fixture
async def system(own: Broker, tmp_path: Path) -> AsyncIterator[System]:
    async with running(System(own.url, tmp_path)) as made:
        yield made


@asynccontextmanager
async def load(system: System) -> AsyncIterator[None]:
    """Somebody publishes; and until the oracle is content, browsers stay."""
    async with asyncio.TaskGroup() as group:
        browsers = [group.create_task(each.stay()) for each in system.browsers]
        publisher = group.create_task(system.publish())
        yield
        publisher.cancel()
        await check(system)
        for each in browsers:
            each.cancel()


async def more(system: System, stories: int) -> None:
    """Wait until so many more stories are published."""
    before = len(system.promised)
    await until(lambda: len(system.promised) >= before + stories, LATE)


async def check(system: System) -> None:
    """The oracle."""
    await until(lambda: system.got() == system.wanted(), LATE)
    stories = system.stories()
    await until(lambda: sorted(system.kept()) == sorted(stories), LATE)
    assert stories.keys() >= system.promised.keys()
    kept = system.kept()
    for browser in system.browsers:
        mine = [story for story in kept if asked_for(browser.choices, stories[story])]
        await until(lambda browser=browser, mine=mine: len(browser.shown) >= len(mine), LATE)
        assert browser.shown == mine
        assert browser.positions == sorted(set(browser.positions))
    await until(lambda: not system.unsent(), LATE)
    async with asyncio.timeout(LATE):
        depths = await system.drained()
    assert depths["dead"] == depths["lost"] == 0
    assert system.got() == system.wanted()  # nothing more came of what was left
    assert system.kept() == kept


async def test_each_story_comes_once_to_all_who_asked_when_every_process_is_killed_under_load(system: System) -> None:
    async with load(system):
        await more(system, 4)
        for name in ("mobile", "emails", "web-1", "web-2", "editor", "newsroom", "mobile", "emails"):
            await system.kill(name)
            if name not in ("editor", "newsroom"):  # nobody can publish without these
                await more(system, 3)
            await system.start(name)
            await more(system, 3)
    assert all(browser.lost for browser in system.browsers)


async def test_browsers_have_no_gap_when_all_of_the_web_is_away_under_load(system: System) -> None:
    async with load(system):
        await more(system, 4)
        for name in ("web-1", "web-2"):
            await system.kill(name)
        await more(system, 5)
        for name in ("web-1", "web-2"):
            await system.start(name)
        await more(system, 3)
    assert all(browser.lost for browser in system.browsers)


async def test_each_story_comes_once_to_all_who_asked_when_the_broker_is_killed_under_load(
    own: Broker, system: System
) -> None:
    async with load(system):
        await more(system, 8)
        assert not (await system.depths())["delayed"]
        await asyncio.to_thread(own.kill)
        await asyncio.sleep(3)
        await asyncio.to_thread(own.start)
        await more(system, 8)
