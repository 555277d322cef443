"""The scores while each of their processes is killed in turn under load, and the broker once.

The oracle: each product that somebody was told he would get ("202") has the score of the edition that counts, as the
simulation gives it in this process; each was computed at least once; there are no dead letters, and no job is left.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from examples.scores.products import PRODUCTS
from examples.scores.simulation import simulate
from examples.scores.store import Store
from rpcq import Client
from support.broker import Broker
from support.load import until
from support.ports import free_ports
from support.producers import SECONDS
from support.systems import WORKER, Processes, running

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

LATE = 240.0
"""Seconds after which what is waited for will not come: a killed broker may hold delayed messages for 180 s."""


class System(Processes):
    """The web app and the workers as processes, on one store and one broker, and users who look at products."""

    def __init__(self, url: str, folder: Path) -> None:
        database = folder / "scores.sqlite"
        self.store = Store(database)
        self.promised: Counter[str] = Counter()
        self.refused: Counter[int] = Counter()
        (port,) = free_ports(1)
        self._base = f"http://127.0.0.1:{port}"
        web = "examples.scores", "--workers", "0", "--database", str(database), "--port", str(port)
        worker = *WORKER, "examples.scores.service:scores", "--job-prefetch", "1"
        commands = {"web": web, "worker-1": worker, "worker-2": worker}
        super().__init__(url, commands, {"SCORES_DATABASE": str(database)}, {"scores": 2}, ["scores"])

    async def users(self) -> None:
        """Look at products, one after the other, again and again, whatever becomes of the app."""
        async with httpx.AsyncClient(base_url=self._base, timeout=SECONDS) as user:
            while True:
                for product in list(PRODUCTS)[::3]:
                    try:
                        response = await user.post(f"/products/{product}/look")
                    except httpx.TransportError:
                        self.refused[0] += 1
                    else:
                        self.note(product, response.status_code)
                    await asyncio.sleep(0.02)

    def note(self, product: str, status: int) -> None:
        assert status in (200, 202, 503), status
        if status == 503:
            self.refused[status] += 1
        else:
            self.promised[product] += 1

    def began(self) -> int:
        return len(self.store.runs())


@pytest.fixture
async def system(own: Broker, tmp_path: Path) -> AsyncIterator[System]:
    async with running(System(own.url, tmp_path)) as made:
        yield made


@asynccontextmanager
async def load(system: System) -> AsyncIterator[None]:
    """Users who look at products, and a flood in the lane `low`."""
    async with Client(system.url, namespace=system.namespace) as client, asyncio.TaskGroup() as group:
        await client.send("scores.renew")
        users = group.create_task(system.users())
        await until(lambda: system.store.edition == 2, LATE)
        yield
        users.cancel()


async def more(system: System, runs: int) -> None:
    """Wait until so many more computations have begun."""
    before = system.began()
    await until(lambda: system.began() >= before + runs, LATE)


async def check(system: System) -> None:
    """The oracle."""
    store = system.store
    await until(lambda: set(store.states().values()) == {"fresh"}, LATE)
    assert system.promised
    assert store.scores().keys() == PRODUCTS.keys() >= system.promised.keys()
    ended = {run.product for run in store.runs() if run.edition == store.edition and run.ended is not None}
    assert ended == PRODUCTS.keys()
    for product in [*system.promised, *list(PRODUCTS)[1::10]]:
        found = store.score(product)
        assert found is not None
        assert (found.edition, found.footprint) == (store.edition, simulate(PRODUCTS[product], store.edition))

    depths = await system.drained()
    assert depths["dead"] == depths["lost"] == 0


async def test_no_score_is_lost_when_workers_and_the_web_are_killed_under_load(system: System) -> None:
    async with load(system):
        for name in ("worker-1", "worker-2", "worker-1", "worker-2", "web"):
            await more(system, 4 if name == "web" else 8)
            await system.kill(name)
            await system.start(name)
        await more(system, 8)
    await check(system)
    assert any(run.ended is None for run in system.store.runs()), "no worker was killed while it computed"


async def test_no_score_is_lost_when_the_broker_is_killed_under_load(own: Broker, system: System) -> None:
    async with load(system):
        await more(system, 20)
        await asyncio.to_thread(own.kill)
        await asyncio.sleep(1)
        await asyncio.to_thread(own.start)
        await more(system, 20)
    await check(system)
