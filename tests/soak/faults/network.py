"""What a network does to the connections of clients and workers."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from soak.faults import Fault
from soak.ground import Road
from soak.stage import HEARTBEAT, Stage


async def client_reset(stage: Stage, dice: random.Random) -> None:
    stage.client_road.reset()
    await asyncio.sleep(1)


async def client_consuming_reset(stage: Stage, dice: random.Random) -> None:
    await _reset_role(stage.client_road, "consuming")


async def client_publishing_reset(stage: Stage, dice: random.Random) -> None:
    await _reset_role(stage.client_road, "publishing")


async def worker_consuming_reset(stage: Stage, dice: random.Random) -> None:
    await _reset_role(dice.choice(stage.worker_roads), "consuming")


async def worker_publishing_reset(stage: Stage, dice: random.Random) -> None:
    await _reset_role(dice.choice(stage.worker_roads), "publishing")


async def _reset_role(road: Road, role: str) -> None:
    for connection in road.with_role(role):
        connection.reset()
    await asyncio.sleep(1)


async def client_half_open(stage: Stage, dice: random.Random) -> None:
    await _frozen(stage.client_road, dice)


async def worker_half_open(stage: Stage, dice: random.Random) -> None:
    await _frozen(dice.choice(stage.worker_roads), dice)


async def _frozen(road: Road, dice: random.Random) -> None:
    road.freeze()
    await asyncio.sleep(dice.uniform(0.5, 3 * HEARTBEAT))
    road.thaw()


async def worker_cut_off(stage: Stage, dice: random.Random) -> None:
    road = dice.choice(stage.worker_roads)
    road.refuse()
    road.reset()
    await asyncio.sleep(dice.uniform(0.5, 2))
    road.allow()


async def slow_network(stage: Stage, dice: random.Random) -> None:
    await _disturbed(stage, dice, delay=dice.uniform(0.02, 0.1))


async def narrow_network(stage: Stage, dice: random.Random) -> None:
    await _disturbed(stage, dice, rate=dice.uniform(100_000, 400_000))


async def split_frames(stage: Stage, dice: random.Random) -> None:
    await _disturbed(stage, dice, split=dice.randrange(1, 64))


async def _disturbed(stage: Stage, dice: random.Random, **faults: Any) -> None:
    road = dice.choice(stage.roads)
    road.both(**faults)
    await asyncio.sleep(dice.uniform(1, 2))
    road.both(delay=0, rate=0, split=0)


async def cut_at_byte(stage: Stage, dice: random.Random) -> None:
    road = dice.choice(stage.roads)
    way = dice.choice(["up", "down"])
    for connection in road.connections:
        connection.cut(**{way: dice.randrange(20_000)})
    await asyncio.sleep(1.5)
    for connection in road.connections:
        connection.cut()


async def garbage_frames(stage: Stage, dice: random.Random) -> None:
    """The end of a frame has to be 0xCE: a flipped byte of a body would be nobody's to notice."""
    road = dice.choice(stage.roads)
    way = dice.choice(["up", "down"])
    faults = [getattr(one, way) for one in road.proxies]
    for one in faults:
        one.filter = lambda data: data[:-1] + bytes([data[-1] ^ 0xFF])
    await asyncio.sleep(0.3)
    for one in faults:
        one.filter = lambda data: data
    await asyncio.sleep(1)


FAULTS: tuple[Fault, ...] = (
    client_reset,
    client_consuming_reset,
    client_publishing_reset,
    worker_consuming_reset,
    worker_publishing_reset,
    client_half_open,
    worker_half_open,
    worker_cut_off,
    slow_network,
    narrow_network,
    split_frames,
    cut_at_byte,
    garbage_frames,
)
