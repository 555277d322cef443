"""One scene on the ground, with all that faults strike at: workers, their store, a client, the ways between them."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rpcq import Client
from soak.callers import other_loads, plain_load
from soak.ground import Ground, Road, road
from soak.store import StoreProcess
from support import broker as brokers
from support.load import TESTS, Ledger, Load, Scene, WorkerProcess

HEARTBEAT = 2
VICTIMS = 2
SERVICES = ("target", "other")


@dataclass
class Stage:
    """One scene, with all that faults strike at."""

    scene: Scene
    ground: Ground
    client: Client
    client_road: Road
    worker_roads: list[Road]
    store: StoreProcess
    dice: random.Random
    steady: WorkerProcess
    """No fault strikes it."""
    plain: Load
    """Calls of which none fails where nothing strikes."""
    faulty: Ledger
    """Calls that are faults themselves."""
    victims: list[WorkerProcess] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    taken: int = 0
    """Requests that a consumer which is not rpcq's has taken, or copies of them."""

    @property
    def queues(self) -> list[str]:
        return [self.scene.queue_of(service) for service in SERVICES]

    @property
    def roads(self) -> list[Road]:
        return [self.client_road, *self.worker_roads]

    @property
    def vhost(self) -> str:
        return brokers.vhost_of(self.scene.url)

    async def start_victim(self, number: int, generation: str) -> WorkerProcess:
        return await start_worker(
            self.scene,
            self.store,
            generation,
            "--grace",
            "8",
            url=self.worker_roads[number].url,
            RPCQ_HEARTBEAT=str(HEARTBEAT),
        )

    async def replace(self, number: int) -> None:
        """Another worker for one that has ended, of whichever generation."""
        await self.bury(self.victims[number])
        generation = self.dice.choice(["former", "latter"])
        while True:
            try:
                self.victims[number] = await self.start_victim(number, generation)
            except AssertionError:  # the broker was away
                await self.bury(self.scene.workers[-1])
                await asyncio.sleep(0.5)
            else:
                return

    async def bury(self, gone: WorkerProcess) -> None:
        await asyncio.to_thread(gone.kill)  # closes its pipes
        self.scene.workers.remove(gone)

    async def one_call(self, method: str, **params: Any) -> None:
        load = Load(self.client, self.faulty, method=method, service=self.dice.choice(SERVICES), timeout=10.0)
        await load.call(**params)


async def start_worker(
    scene: Scene, store: StoreProcess, generation: str, *arguments: str, url: str, **environment: str
) -> WorkerProcess:
    return await scene.worker(
        "soak.services:other",
        *arguments,
        url=url,
        service="soak.services:target",
        RPCQ_TEST_GENERATION=generation,
        RPCQ_TEST_STORE=str(store.path),
        RPCQ_TEST_TIMES=str(scene.folder / "times"),
        **environment,
    )


def environment() -> dict[str, str]:
    """For programs that import the soak."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}


async def set_stage(
    stack: AsyncExitStack,
    ground: Ground,
    queue_type: Literal["classic", "quorum"],
    folder: Path,
    dice: random.Random,
) -> Stage:
    namespace = f"soak-{queue_type}-{dice.getrandbits(32):08x}"
    scene = Scene(ground.urls[0], namespace, queue_type, folder / queue_type, services=SERVICES)
    scene.folder.mkdir()
    await stack.enter_async_context(scene)
    store = StoreProcess(scene.folder / "store", environment())
    stack.callback(store.stop)
    await asyncio.to_thread(store.wait)
    # Where there are several nodes, the client, the workers and the request queue are on different ones.
    first = dice.randrange(len(ground.urls))
    roads = [await road(stack, ground.order(first + number)) for number in range(1 + VICTIMS)]
    client = await stack.enter_async_context(Client(roads[0].url, namespace=namespace, heartbeat=HEARTBEAT))
    # With little room for remembered results, which else would be most of what it comes to hold.
    steady = await start_worker(
        scene,
        store,
        "former",
        url=ground.order(first + 1)[0],
        RPCQ_TEST_LIVES="yes",
        RPCQ_REMEMBER="1000000",
    )
    plain = plain_load(scene, client)
    stage = Stage(scene, ground, client, roads[0], roads[1:], store, dice, steady, plain, scene.ledger())
    stage.victims = await asyncio.gather(*(stage.start_victim(number, "latter") for number in range(VICTIMS)))
    stage.loads = [plain, *other_loads(scene, client, dice), Load(client, stage.faulty, callers=0)]
    return stage


CALL = (sys.executable, "-m", "soak", "--call")
"""The command of a client that is killed in the middle of its calls; its arguments are the URL and the namespace."""
