"""The scores while each of their processes is killed in turn under load, and the broker once.

The oracle: each product that somebody was told he would get ("202") has the score of the edition that counts, as the
simulation gives it in this process; each was computed at least once; there are no dead letters, and no job is left.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from examples.scores.products import PRODUCTS
from examples.scores.simulation import simulate
from examples.scores.store import Store
from rpcq import Client
from rpcq.observability.queues import QueueWatch
from support.broker import Broker, Setup
from support.broker import broker as a_broker
from support.load import until
from support.ports import free_ports
from support.producers import ROOT, SECONDS, environment

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

LATE = 240.0
"""Seconds after which what is waited for will not come: a killed broker may hold delayed messages for 180 s."""

WORKER = ("-m", "rpcq", "worker", "examples.scores.service:scores", "--job-prefetch", "1", "--log-level", "error")


@pytest.fixture(scope="module")
def own() -> Iterator[Broker]:
    """A broker that is killed."""
    with a_broker(setup=Setup("loopback_users.guest = false\n")) as made:
        yield made


class System:
    """The web app and the workers as processes, on one store and one broker, and users who look at products."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.namespace = f"t{secrets.token_hex(8)}"
        self.database = folder / "scores.sqlite"
        self.store = Store(self.database)
        self.promised: Counter[str] = Counter()
        self.refused: Counter[int] = Counter()
        (self._port,) = free_ports(1)
        self._environment = environment(url) | {
            "RPCQ_NAMESPACE": self.namespace,
            "SCORES_DATABASE": str(self.database),
        }
        self.web: asyncio.subprocess.Process | None = None
        self.workers: list[asyncio.subprocess.Process] = []

    async def start_worker(self) -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, *WORKER, cwd=ROOT, env=self._environment)
        self.workers.append(process)

    async def start_web(self) -> None:
        command = "-m", "examples.scores", "--workers", "0", "--database", self.database, "--port", str(self._port)
        self.web = web = await asyncio.create_subprocess_exec(
            sys.executable, *command, cwd=ROOT, env=self._environment, stdout=asyncio.subprocess.PIPE
        )
        assert web.stdout is not None
        assert (await web.stdout.readline()).startswith(b"serving ")

    async def until_served(self) -> None:
        """Wait until both workers serve."""
        async with Client(self.url, namespace=self.namespace) as client:
            while len([found async for found in client.workers("scores")]) < 2:
                pass

    async def kill_worker(self) -> None:
        process = self.workers.pop(0)
        process.kill()
        await process.wait()

    async def kill_web(self) -> None:
        assert self.web is not None
        self.web.kill()
        await self.web.wait()

    async def end(self) -> None:
        for process in (self.web, *self.workers):
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()

    async def users(self) -> None:
        """Look at products, one after the other, again and again, whatever becomes of the app."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._port}", timeout=SECONDS) as user:
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

    async def depths(self) -> dict[str, int]:
        """The messages that wait, by the kind of their queue."""
        watch = QueueWatch(["scores"], self.url, management="", namespace=self.namespace)
        found: Counter[str] = Counter()
        for depth in await watch.look():
            found[depth.kind] += depth.messages
        return dict(found)


@pytest.fixture
async def system(own: Broker, tmp_path: Path) -> AsyncIterator[System]:
    made = System(own.url, tmp_path)
    try:
        await made.start_web()
        for _ in range(2):
            await made.start_worker()
        await made.until_served()
        await asyncio.sleep(2)  # the queues are new: see `Broker.kill`
        yield made
    finally:
        await made.end()


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

    depths = await system.depths()
    while depths["jobs"] or depths["suspects"] or depths["delayed"]:
        await asyncio.sleep(0.1)
        depths = await system.depths()
    assert depths["dead"] == depths["lost"] == 0


async def test_no_score_is_lost_when_workers_and_the_web_are_killed_under_load(system: System) -> None:
    async with load(system):
        for _ in range(4):
            await more(system, 8)
            await system.kill_worker()
            await system.start_worker()
        await more(system, 4)
        await system.kill_web()
        await system.start_web()
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
