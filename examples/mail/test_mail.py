"""Tests of the e-mails without a broker, with a real mail server in this process."""

from __future__ import annotations

import asyncio
import smtplib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from examples.mail import smtp
from examples.mail.analytics import analytics
from examples.mail.app import create_app
from examples.mail.billing import billing
from examples.mail.contracts import UserCreated
from examples.mail.emails import confirm, emails, welcome
from examples.mail.postbox import Postbox, serve
from examples.mail.tables import Account, SignUp, open_database
from rpcq.testing import Running, Worlds

ADA = UserCreated(user_id="7", name="Ada", address="ada@example.org")


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The database of this test, which the services open too."""
    monkeypatch.setenv("MAIL_DATABASE", str(tmp_path / "mail.sqlite"))
    engine = open_database()
    yield engine
    engine.dispose()


@pytest.fixture
async def postbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Postbox]:
    """The postbox of a mail server that runs."""
    made = Postbox(tmp_path / "postbox.sqlite")
    async with await serve(made, "127.0.0.1", 0) as server:
        monkeypatch.setenv("MAIL_SMTP", f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        yield made


def arrived(postbox: Postbox) -> dict[str, int]:
    return {mail.id: mail.times for mail in postbox.mails()}


async def test_each_service_hears_of_a_user_by_itself(rpcq_world: Worlds, postbox: Postbox, database: Engine) -> None:
    async with rpcq_world(emails, billing, analytics) as world:
        assert (await world.client.publish(ADA)).heard
        await world.settled()
        await world.client.publish(ADA)  # it came twice
        await world.settled()
        assert not world.dead()
    assert [(mail.id, mail.address) for mail in postbox.mails()] == [("confirm.7@shop.example", "ada@example.org")]
    with Session(database) as db:
        assert [(it.user_id, it.cents) for it in db.scalars(select(Account))] == [("7", 0)]
        assert [(it.user_id, it.domain) for it in db.scalars(select(SignUp))] == [("7", "example.org")]


async def test_the_others_do_not_notice_that_the_mail_server_is_away(
    rpcq_world: Worlds, database: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    postbox = Postbox(tmp_path / "postbox.sqlite")
    async with await serve(postbox, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("MAIL_SMTP", f"127.0.0.1:{port}")
    async with rpcq_world(emails, billing, analytics) as world:
        await world.client.publish(ADA)
        await world.advance(minutes=1)
        with Session(database) as db:
            assert db.scalar(select(func.count()).select_from(Account)) == 1
        assert not postbox.mails()
        (waiting,) = world.waiting(confirm)
        assert waiting.attempt > 2
        async with await serve(postbox, "127.0.0.1", port):
            await world.advance(minutes=10)
        assert not world.dead()
    assert arrived(postbox) == {"confirm.7@shop.example": 1}


async def test_an_address_that_bounces_is_a_dead_letter_that_says_so(rpcq_world: Worlds, postbox: Postbox) -> None:
    async with rpcq_world(emails) as world:
        await world.client.send(welcome, user_id="8", name="Bob", address="nobody@example.org")
        await world.settled()
        (letter,) = world.dead(welcome)
    assert (letter.reason, letter.attempt, letter.error) == (
        "gave_up",
        1,
        "the mail server refuses it: 550 no such user",
    )
    assert not postbox.mails()


async def test_who_asks_to_come_again_gets_the_mail_later(rpcq_world: Worlds, postbox: Postbox) -> None:
    async with rpcq_world(emails) as world:
        await world.client.send(welcome, user_id="9", name="Eve", address="busy@example.org")
        await world.settled()
        assert not postbox.mails()
        await world.advance(seconds=smtp.LATER)
        assert [job.attempt for job in world.waiting(welcome)] == [3]
        await world.advance(seconds=smtp.LATER)
        assert not world.waiting(welcome)
    assert arrived(postbox) == {"welcome.9@shop.example": 1}


async def test_a_worker_that_is_lost_after_the_server_took_the_mail_sends_the_same_mail_again(
    rpcq_world: Worlds, postbox: Postbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rpcq_world(emails) as world:
        once = [world.crash]
        send = smtp.send

        def dies_after_it(message: Any) -> None:
            send(message)
            if once:
                once.pop()()

        monkeypatch.setattr(smtp, "send", dies_after_it)
        await world.client.send(welcome, user_id="7", name="Ada", address="ada@example.org")
        await world.settled()
        assert not world.dead()
    (mail,) = postbox.mails()  # two messages, one Message-ID
    assert (mail.id, mail.times) == ("welcome.7@shop.example", 2)


async def test_a_mail_is_sent_although_the_server_ends_without_a_farewell(
    postbox: Postbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_self: smtplib.SMTP) -> None:
        raise smtplib.SMTPServerDisconnected("gone")

    monkeypatch.setattr(smtplib.SMTP, "quit", fails)
    await asyncio.to_thread(smtp.send, smtp.write("welcome", "7", "ada@example.org", "Welcome", "Hello."))
    assert arrived(postbox) == {"welcome.7@shop.example": 1}


async def test_the_mails_are_throttled_to_what_the_server_takes(rpcq_running: Running, postbox: Postbox) -> None:
    people = [{"user_id": str(number), "name": "N", "address": "n@example.org"} for number in range(8)]
    async with rpcq_running(emails) as client:
        await client.send_many(welcome, people)
        while len(postbox.mails()) < len(people):  # noqa: ASYNC110 - another task
            await asyncio.sleep(0.05)
    assert postbox.most_in_a_second() <= 6


# On the web.


async def test_a_user_signs_up_confirms_and_is_welcomed_once(
    rpcq_running: Running, postbox: Postbox, database: Engine
) -> None:
    app = create_app(database, postbox, watches=False)
    user = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mail")
    async with rpcq_running(emails, billing, analytics), app.router.lifespan_context(app), user:
        made = await user.post("/users", params={"name": "Ada", "address": "ada@example.org"})
        user_id = made.json()["id"]
        while not (await user.get("/state")).json()["users"][0]["confirm"]:  # noqa: ASYNC110 - other tasks
            await asyncio.sleep(0.02)
        for _ in range(2):  # a double click
            assert (await user.post(f"/users/{user_id}/confirm")).status_code == 200
        assert (await user.post("/users/unknown/confirm")).status_code == 404
        while not (await user.get("/state")).json()["users"][0]["welcome"]:  # noqa: ASYNC110 - the same
            await asyncio.sleep(0.02)
        refused = await user.post(
            "/users", params={"name": "Ada", "address": "ada@example.org\r\nBcc: eve@example.org"}
        )
        assert refused.status_code == 422
    assert arrived(postbox) == {f"confirm.{user_id}@shop.example": 1, f"welcome.{user_id}@shop.example": 1}


async def test_users_sign_up_while_nothing_else_runs(rpcq_running: Running, postbox: Postbox, database: Engine) -> None:
    app = create_app(database, postbox, watches=False)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mail") as user:
        made = await user.post("/users", params={"name": "Ada", "address": "ada@example.org"})
        assert made.status_code == 201
        for path in ("/users/many", "/letters/replay", f"/users/{made.json()['id']}/confirm"):
            refused = await user.post(path, headers={"sec-fetch-site": "cross-site"})
            assert refused.status_code == 403
    async with rpcq_running(emails, billing, analytics), app.router.lifespan_context(app):
        while not postbox.mails():  # noqa: ASYNC110 - another task
            await asyncio.sleep(0.05)
