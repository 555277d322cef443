"""The shop while each of its services is killed in turn under load, and the web app and the broker once.

The oracle: each order that a customer was told is taken ("202") is done or cancelled, and the books add up: orders =
done + cancelled, done = charged - refunded = reserved - released = parcels, each customer was told once; the card
company, the carrier and the mail provider say the same. There are no dead letters, and nothing is left in a queue.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.engine import make_url

from examples.shop.books import Books
from examples.shop.outside import BAD_CARD
from examples.shop.setup import NAMES, SERVICES, target
from support.broker import Broker
from support.ports import free_ports
from support.producers import SECONDS
from support.systems import WORKER, Processes, running

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

PAUSE = 0.05
"""Seconds between two orders."""

KINDS: tuple[dict[str, Any], ...] = (
    *({"article": "tea", "count": 2}, {"article": "coffee"}, {"article": "honey", "country": "Poland"}),
    *({"card": BAD_CARD, "article": "tea"}, {"article": "truffles", "count": 2}),
    {"country": "Atlantis", "article": "tea"},
)
"""What customers order: half of it can be had."""


class System(Processes):
    """The web app and the services as processes, and customers."""

    def __init__(self, url: str, database: str) -> None:
        self.promised: list[str] = []
        self.refused: Counter[str] = Counter()
        self.is_open = True
        (self._port,) = free_ports(1)
        web = "examples.shop", "--no-workers", "--port", str(self._port)
        commands = {"web": web} | {name: (*WORKER, "--job-prefetch", "4", target(name)) for name in NAMES}
        super().__init__(url, commands, {"SHOP_DATABASE": database}, dict.fromkeys(NAMES, 1), SERVICES)

    def browser(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._port}", timeout=SECONDS)

    async def customers(self) -> None:
        """Order, again and again, whatever becomes of the app."""
        async with self.browser() as customer:
            for kind in itertools.cycle(KINDS):
                if not self.is_open:
                    break
                try:
                    response = await customer.post("/orders", json={"customer": "ada@example.org", **kind})
                except httpx.TransportError as error:
                    self.refused[type(error).__name__] += 1
                else:
                    assert response.status_code == 202, response.text
                    self.promised.append(response.json()["id"])
                await asyncio.sleep(PAUSE)

    async def books(self) -> Books:
        async with self.browser() as reader:
            response = await reader.get("/state")
        response.raise_for_status()
        return Books(**response.json()["books"])

    async def states(self) -> list[str]:
        """How far each order has come that was promised."""
        async with self.browser() as reader:
            found = [await reader.get(f"/orders/{it}") for it in self.promised]
        assert {it.status_code for it in found} == {200}
        return [it.json()["state"] for it in found]


@pytest.fixture
async def system(request: pytest.FixtureRequest, own: Broker, tmp_path: Path) -> AsyncIterator[System]:
    """On SQLite, with a file for each service; or on one database of PostgreSQL."""
    database = f"sqlite+aiosqlite:///{tmp_path}/{{service}}.sqlite"
    if getattr(request, "param", "sqlite") == "postgresql":
        url = make_url(request.getfixturevalue("database_url")).set(drivername="postgresql+asyncpg")
        database = url.render_as_string(hide_password=False)
    async with running(System(own.url, database)) as made:
        yield made


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    while not await condition():  # noqa: ASYNC110 - other processes
        await asyncio.sleep(0.2)


@asynccontextmanager
async def load(system: System) -> AsyncIterator[None]:
    """Customers, of whose orders some are done already."""
    async with asyncio.TaskGroup() as group:
        group.create_task(system.customers())
        await done(system, 1)
        yield
        system.is_open = False  # what is asked for is answered


async def done(system: System, more: int) -> None:
    """Wait until so many more customers were told."""
    before = (await system.books()).mails

    async def are_done() -> bool:
        return (await system.books()).mails >= before + more

    await until(are_done)


async def taken(system: System, more: int) -> None:
    """Wait until so many more orders are taken."""
    before = len(system.promised)
    while len(system.promised) < before + more:  # noqa: ASYNC110 - other processes
        await asyncio.sleep(PAUSE)


async def check(system: System) -> None:
    """The oracle."""

    async def is_settled() -> bool:
        return not (await system.books()).faults()

    try:
        async with asyncio.timeout(240):
            await until(is_settled)
    except TimeoutError:
        found = await system.books()
        pytest.fail(f"{found.faults()}; {await system.depths()}; {found}")
    assert set(await system.states()) == {"done", "cancelled"}
    found = await system.books()
    assert found.taken >= len(system.promised)
    assert found.taken <= len(system.promised) + system.refused.total()  # an answer may be lost, and its order not
    assert found.refunded
    assert found.released

    depths = await system.drained()
    assert depths["dead"] == depths["lost"] == 0
    assert (await system.books()).faults() == []


async def test_no_order_is_lost_and_no_card_charged_twice_when_each_service_is_killed_under_load(
    system: System,
) -> None:
    async with load(system):
        for name in NAMES:
            await done(system, 5)
            await system.kill(name)
            await taken(system, 10)  # nobody waits for it
            await system.start(name)
        await done(system, 5)
        await system.kill("web")
        await system.start("web")
        await done(system, 10)
    await check(system)
    assert system.refused.total(), "no customer met the web app while it was down"


@pytest.mark.parametrize("system", ["sqlite", "postgresql"], indirect=True)
async def test_orders_are_taken_while_payment_is_down_and_its_backlog_is_worked_off(system: System) -> None:
    async with load(system):
        await system.kill("payment")
        await taken(system, 40)
        assert (await system.books()).orders["placed"] >= 30
        await system.start("payment")
        await done(system, 40)
    await check(system)
    assert not system.refused


async def test_no_order_is_lost_and_no_card_charged_twice_when_the_broker_is_killed_under_load(
    own: Broker, system: System
) -> None:
    async with load(system):
        await done(system, 10)
        await asyncio.to_thread(own.kill)
        await taken(system, 20)  # nor the broker
        await asyncio.to_thread(own.start)
        await done(system, 20)
    await check(system)
    assert not system.refused
