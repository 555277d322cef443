"""Tests of the news without a broker: services that are away, killed, or asked twice, and browsers that come again."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, cast

import httpx
import pytest
import uvicorn
from sqlalchemy import Table, delete, func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from examples.news import archive, desk, editor, emails, mobile, phones, web
from examples.news.app import create_app
from examples.news.contracts import (
    TOPICS,
    Breaking,
    EditorApi,
    Football,
    Health,
    Space,
    Story,
    Tennis,
    Topic,
    asked_for,
)
from examples.news.gateway import AWAY, Gateway
from examples.news.setup import create_tables
from examples.stage import pages
from rpcq import Client
from rpcq.outbox import Outbox, metadata
from rpcq.testing import Running, Worlds

OUTBOXES = {editor: editor.engine, mobile: mobile.engine, emails: emails.engine, web: archive.engine}
SERVICES = (editor.editor, mobile.mobile, emails.emails, web.web)
STORIES = (
    Breaking(story_id="1", headline="A bridge is closed"),
    Tennis(story_id="2", headline="Five sets"),
    Space(story_id="3", headline="A comet"),
    Football(story_id="4", headline="One to nil"),
    Health(story_id="5", headline="Walk more"),
)

GOT = {
    "Ada": ["1", "2", "4"],
    "Ben": ["2"],
    "Cem": ["1"],
    "Dana": ["1", "2", "3", "4", "5"],
    "Eli": ["3", "5"],
    "Fay": ["1", "4"],
}
"""Which stories are for whom."""


@pytest.fixture(autouse=True)
async def newsroom(monkeypatch: pytest.MonkeyPatch, _rpcq_place: Any) -> AsyncIterator[None]:
    """Empty tables, and outboxes that write for the namespace of this test."""
    for module, engine in OUTBOXES.items():
        monkeypatch.setattr(module, "outbox", Outbox(engine))
    monkeypatch.setattr(emails, "GATHERING", 0.2)
    monkeypatch.setattr(web, "LOOK_EVERY", 0.05)
    await create_tables()
    yield
    own = {editor.engine: editor.Base, emails.engine: emails.Base, archive.engine: archive.Base}
    for engine in OUTBOXES.values():
        tables = own[engine].metadata.sorted_tables if engine in own else []
        await empty(engine, *tables, *metadata.sorted_tables)
    await empty(phones.engine, *phones.Base.metadata.sorted_tables)


async def empty(engine: AsyncEngine, *tables: Table) -> None:
    async with engine.begin() as connection:
        for table in tables:
            await connection.execute(delete(table))
    await engine.dispose()


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(50):
        while not await condition():  # noqa: ASYNC110 - a database
            await asyncio.sleep(0.05)


async def everybody_has_all() -> bool:
    """Each story has come to each reader who asked for its topic, once, and is on the web."""
    readers = await desk.all_readers()
    return all(it.is_right for it in readers) and (await desk.kept()).keys() == (await desk.stories()).keys()


async def publish(client: Client, *stories: Story) -> None:
    """Publish stories as the editor does, by a call."""
    for story in stories:
        await client.bind(EditorApi).publish(
            story_id=story.story_id,
            topic=cast("Topic", story.event_name),
            headline=story.headline,
        )


class Browser:
    """A browser: it reads a stream as JavaScript's EventSource does, and says what it has when it comes again."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices
        self.shown: list[str] = []
        self.last: int | None = None

    async def read(self, stories: int, told: AsyncIterator[str] | None = None) -> None:
        """Read until so many stories are shown, and leave."""
        stream = told or web.stream("test", self.choices, self.last)
        async with asyncio.timeout(20), aclosing(cast("AsyncGenerator[str, None]", stream)):
            async for event in stream:
                if event.startswith("id: "):
                    number, data = event.removeprefix("id: ").split("\ndata: ")
                    self.last = int(number)
                    self.shown.append(json.loads(data)["id"])
                if len(self.shown) >= stories:
                    return


def test_a_reader_gets_the_topics_that_begin_with_what_was_asked_for() -> None:
    found = {topic for topic in TOPICS if asked_for(("news.sport", "news.science.space"), topic)}
    assert found == {"news.sport.football", "news.sport.tennis", "news.science.space"}
    assert not asked_for(("news.sport",), "news.sports")


async def test_each_story_comes_to_those_who_asked_for_its_topic_and_to_nobody_else(rpcq_running: Running) -> None:
    async with rpcq_running(*SERVICES) as client:
        await publish(client, *STORIES, *STORIES)  # whoever got no answer asks again
        await until(everybody_has_all)
    assert {it.name: sorted(it.got) for it in await desk.all_readers()} == GOT
    assert sorted(await desk.kept()) == ["1", "2", "3", "4", "5"]
    async with mobile.engine.connect() as db:  # the broker did not even ask mobile about science
        assert await db.scalar(select(func.count()).select_from(metadata.tables["rpcq_inbox"])) == 3


async def test_a_story_that_comes_again_after_its_worker_was_lost_has_its_effect_once(rpcq_world: Worlds) -> None:
    async with rpcq_world(*SERVICES) as world:
        for _ in range(2):
            for story in STORIES:
                await world.client.with_options(idempotency_key=f"story-{story.story_id}").publish(story)
            await until(lambda: everybody_got(GOT))
            await world.settled()
            await world.kill_worker()  # it knows no keys any more: the databases do
            await world.start_worker()
        await world.settled()
        assert not world.dead()
    assert {it.name: sorted(it.got) for it in await desk.all_readers()} == GOT
    assert sorted(await desk.kept()) == ["1", "2", "3", "4", "5"]
    assert await desk.pushed_again() == 0


async def test_a_push_whose_worker_is_lost_before_it_has_the_answer_is_shown_once(
    rpcq_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = phones.push
    async with rpcq_world(mobile.mobile) as world:
        once = [world.crash]

        async def dies_after_it(reader: str, story_id: str, headline: str) -> None:
            await push(reader, story_id, headline)
            await until(lambda: is_empty(mobile.outbox))  # the relay is in this worker, too
            if once:
                once.pop()()

        monkeypatch.setattr(phones, "push", dies_after_it)
        await world.client.publish(STORIES[3])
        await until(desk.pushed_again)
        assert not world.dead()
    assert await desk.pushed_again() == 1
    assert {it.name: it.got for it in await desk.all_readers() if it.got} == {"Ada": ("4",)}


async def test_stories_wait_for_services_that_are_away_and_come_in_few_emails(
    rpcq_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emails, "GATHERING", 0.5)
    async with rpcq_world(mobile.mobile, emails.emails, web.web) as world, editor.outbox:
        await world.settled()
        await world.kill_worker()
        for story in STORIES:
            await editor.publish(story.story_id, cast("Topic", story.event_name), story.headline)
        await until(lambda: is_empty(editor.outbox))
        assert not any(it.got for it in await desk.all_readers())
        await world.start_worker()
        await until(everybody_has_all)
    dana = next(it for it in await desk.all_readers() if it.name == "Dana")
    assert len(dana.got) == 5
    assert dana.mails < 5


async def test_a_story_is_saved_while_nobody_can_be_reached_and_published_later(rpcq_running: Running) -> None:
    await editor.publish("1", "news.breaking", "A bridge is closed")
    assert (await editor.outbox.depth()).waiting == 1
    async with rpcq_running(editor.editor, mobile.mobile):
        await until(lambda: everybody_got({"Ada": ["1"], "Cem": ["1"]}))
    assert (await editor.outbox.depth()).waiting == 0


async def test_a_browser_that_was_away_gets_what_it_missed_and_no_story_twice(rpcq_running: Running) -> None:
    browser, sport = Browser("news"), Browser("news.sport")
    async with rpcq_running(editor.editor, web.web) as client:
        await publish(client, *STORIES[:2])
        await browser.read(2)
        await sport.read(1)
        await publish(client, *STORIES[2:])  # both are away
        await browser.read(5)
        await sport.read(2)
        again = asyncio.create_task(browser.read(6))
        await publish(client, Breaking(story_id="6", headline="The bridge is open"))  # while it watches
        await again
    assert browser.shown == list(await desk.kept())
    assert sport.shown == ["2", "4"]


async def test_a_browser_with_a_position_of_another_archive_begins_anew(rpcq_running: Running) -> None:
    browser = Browser("news.science")
    browser.last = 99
    async with rpcq_running(editor.editor, web.web) as client:
        await publish(client, *STORIES)
        await until(lambda: desk_has(5))
        await browser.read(2)
    assert sorted(browser.shown) == ["3", "5"]


async def test_stories_come_through_the_gateway_from_the_process_that_is_up(
    rpcq_running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web.bell, "is_closing", False)
    (listening,) = sockets = [socket.create_server(("127.0.0.1", 0))]
    nobody, base = "http://127.0.0.1:1", f"http://127.0.0.1:{listening.getsockname()[1]}"
    gateway = Gateway([nobody, base])
    app = create_app(gateway, watches=False)
    server = pages.Server(uvicorn.Config(web.create_app("web-2"), log_level="error"), web.bell.close, announces=False)
    user = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://news")
    async with rpcq_running(editor.editor), app.router.lifespan_context(app), user, asyncio.TaskGroup() as group:
        group.create_task(server.serve(sockets))
        for topic in ("news.breaking", "news.sport.tennis"):
            made = await user.post("/stories", params={"topic": topic, "headline": topic})
            assert made.status_code == 201
        await until(lambda: desk_has(2))
        browser = Browser("news.sport")
        await browser.read(1, (event.decode() async for event in gateway.stream(browser.choices, None)))
        assert browser.shown == [made.json()["id"]]
        for params in ({"topic": "news.gossip", "headline": "No"}, {"topic": "news.breaking", "headline": ""}):
            assert (await user.post("/stories", params=params)).status_code == 422
        foreign = await user.post("/stories/many", headers={"sec-fetch-site": "cross-site"})
        assert foreign.status_code == 403
        server.should_exit = True
    assert [event async for event in gateway.stream(["news"], None)] == [AWAY]


async def everybody_got(wanted: dict[str, list[str]]) -> bool:
    return {it.name: sorted(it.got) for it in await desk.all_readers() if it.got} == wanted


async def is_empty(outbox: Outbox) -> bool:
    return not (await outbox.depth()).waiting


async def desk_has(count: int) -> bool:
    return len(await desk.kept()) == count
