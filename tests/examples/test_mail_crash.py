"""The e-mails while each of their processes is killed in turn under load, and the broker once.

The oracle: whoever signed up ("201") has one confirmation e-mail, or a dead letter that says why not; whoever confirmed
has one welcome. Billing and analytics have each user once. What came twice has one Message-ID, and there is no more of
it than e-mails were being sent when a process was killed, and were delayed when the broker was killed. At the end, no
job is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from examples.mail.postbox import MOST, Postbox
from examples.mail.tables import Account, SignUp, User, open_database
from support.broker import Broker
from support.load import until
from support.ports import free_ports
from support.producers import SECONDS
from support.systems import WORKER, Processes, running

# After a kill of the broker, what is on its way between two delay queues may stand still for 180 s.
pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

LATE = 300.0
"""Seconds after which what is waited for will not come: a killed broker may hold delayed messages for 180 s."""

SERVICES = ("emails", "billing", "analytics")
WATCHED = ("emails", "emails:confirm", "billing", "billing:open_account", "analytics", "analytics:count")

AT_ONCE = 4
"""E-mails that are being sent at a time: two confirmations and two welcomes."""


class System(Processes):
    """The web app, the mail server and the services as processes, and users who sign up and confirm."""

    def __init__(self, url: str, folder: Path) -> None:
        self.engine: Engine = open_database(folder / "mail.sqlite")
        self.postbox = Postbox(folder / "postbox.sqlite")
        self.promised: dict[str, str] = {}
        self.confirmed: set[str] = set()
        self.excused = 0
        web, smtp = free_ports(2)
        self._base = f"http://127.0.0.1:{web}"
        commands = {
            "web": ("examples.mail", "--alone", "--folder", str(folder), "--port", str(web)),
            "postbox": ("examples.mail.postbox", "--port", str(smtp)),
        } | {name: (*WORKER, f"examples.mail.{name}:{name}") for name in SERVICES}
        settings = {
            "MAIL_DATABASE": str(folder / "mail.sqlite"),
            "MAIL_POSTBOX": str(self.postbox.path),
            "MAIL_SMTP": f"127.0.0.1:{smtp}",
        }
        super().__init__(url, commands, settings, dict.fromkeys(SERVICES, 1), WATCHED)

    async def kill(self, name: str) -> None:
        await super().kill(name)
        self.excused += AT_ONCE

    async def end(self) -> None:
        await super().end()
        self.engine.dispose()

    async def post(self, user: httpx.AsyncClient, path: str, **params: str) -> dict[str, Any] | None:
        """What the app answers; None if it is away."""
        try:
            response = await user.post(path, params=params)
        except httpx.TransportError:
            return None
        assert response.is_success, response.text
        return response.json()  # type: ignore[no-any-return]

    async def users(self) -> None:
        """Sign up, one after the other, and confirm once the e-mail is there, whatever becomes of the app."""
        number = 0
        async with httpx.AsyncClient(base_url=self._base, timeout=SECONDS) as user:
            while True:
                number += 1
                kind = "nobody" if number % 10 == 0 else "busy" if number % 10 == 5 else "ada"
                address = f"{kind}{number}@example.org"
                if made := await self.post(user, "/users", name="Ada", address=address):
                    self.promised[made["id"]] = address
                for user_id in sorted(self.arrived("confirm") & (self.promised.keys() - self.confirmed)):
                    if await self.post(user, f"/users/{user_id}/confirm"):
                        self.confirmed.add(user_id)
                await asyncio.sleep(0.2)

    def arrived(self, kind: str) -> set[str]:
        """The users whose e-mail of a kind has arrived."""
        ids = [mail.id.partition("@")[0].split(".") for mail in self.postbox.mails()]
        return {user_id for found, user_id in ids if found == kind}

    async def letters(self) -> list[dict[str, str]]:
        """The dead letters of the e-mails, as the page shows them."""
        async with httpx.AsyncClient(base_url=self._base, timeout=SECONDS) as user:
            response = await user.get("/letters")
        assert response.status_code == 200, response.text
        return response.json()  # type: ignore[no-any-return]


@pytest.fixture
async def system(own: Broker, tmp_path: Path) -> AsyncIterator[System]:
    async with running(System(own.url, tmp_path)) as made:
        yield made


@asynccontextmanager
async def load(system: System) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        users = group.create_task(system.users())
        yield
        users.cancel()


async def more(system: System, mails: int) -> None:
    """Wait until so many more e-mails have arrived."""
    before = len(system.postbox.mails())
    await until(lambda: len(system.postbox.mails()) >= before + mails, LATE)


async def check(system: System) -> None:
    """The oracle."""
    bounced = {user_id for user_id, address in system.promised.items() if address.startswith("nobody")}
    mailed = system.promised.keys() - bounced
    assert bounced
    assert system.confirmed
    await until(lambda: mailed <= system.arrived("confirm"), LATE)
    await until(lambda: system.confirmed <= system.arrived("welcome"), LATE)
    with Session(system.engine) as db:  # a user whose answer was lost with the web app counts too
        users = {user.id: user.address for user in db.scalars(select(User))}
        asked = set(db.scalars(select(User.id).where(User.confirmed)))
    assert users.keys() >= system.promised.keys()
    refused = {user_id for user_id, address in users.items() if address.startswith("nobody")}

    def rows(table: type[Account | SignUp]) -> set[str]:
        with Session(system.engine) as db:
            return set(db.scalars(select(table.user_id)))

    for table in (Account, SignUp):
        await until(lambda table=table: rows(table) == users.keys(), LATE)
    await until(lambda: system.arrived("confirm") == users.keys() - refused, LATE)
    await until(lambda: system.arrived("welcome") == asked, LATE)

    depths = await system.drained()
    assert depths["lost"] == 0
    # A letter may be there twice if the broker or the worker was killed between the letter and the acknowledgement.
    letters = await system.letters()
    assert len(refused) <= len({letter["id"] for letter in letters}) <= len(letters) == depths["dead"]
    assert len(letters) <= len(refused) + system.excused
    assert {(letter["reason"], letter["error"]) for letter in letters} == {
        ("gave_up", "the mail server refuses it: 550 no such user")
    }

    doubles = sum(mail.times - 1 for mail in system.postbox.mails())
    assert doubles <= system.excused
    assert system.postbox.most_in_a_second() <= MOST


async def test_each_mail_arrives_or_is_a_dead_letter_when_every_process_is_killed_under_load(system: System) -> None:
    async with load(system):
        await more(system, 5)
        for name in ("emails", "billing", "analytics", "postbox", "web", "emails"):
            await system.kill(name)
            await asyncio.sleep(1)
            await system.start(name)
            await more(system, 6)
    await check(system)


async def test_each_mail_arrives_or_is_a_dead_letter_when_the_broker_is_killed_under_load(
    own: Broker, system: System
) -> None:
    async with load(system):
        await more(system, 10)
        system.excused += AT_ONCE + (await system.depths())["delayed"]  # what is delayed may come twice after this
        await asyncio.to_thread(own.kill)
        signed_up = len(system.promised)
        await until(lambda: len(system.promised) >= signed_up + 5, LATE)  # nobody notices
        await asyncio.to_thread(own.start)
        await more(system, 15)
    await check(system)
