"""What becomes of the store of answers that the workers share; it forgets nothing."""

from __future__ import annotations

import asyncio
import random

from soak.faults import Fault
from soak.stage import Stage
from soak.store import ERRORS, Trouble


async def store_refuses(stage: Stage, dice: random.Random) -> None:
    await _troubled(stage, dice, Trouble(refuses=dice.choice([0.2, 1.0]), error=dice.choice(list(ERRORS))))


async def store_forgets_to_say(stage: Stage, dice: random.Random) -> None:
    """What it was asked for is done; who asked does not know."""
    await _troubled(stage, dice, Trouble(forgets_to_say=dice.choice([0.2, 1.0])))


async def store_hangs_up(stage: Stage, dice: random.Random) -> None:
    await _troubled(stage, dice, Trouble(hangs_up=dice.choice([0.2, 1.0])))


async def store_dawdles(stage: Stage, dice: random.Random) -> None:
    """For some calls longer than they have."""
    await _troubled(stage, dice, Trouble(dawdles=dice.choice([0.2, 1.0]), seconds=dice.choice([0.2, 2.0, 7.0])))


async def store_does_it_all(stage: Stage, dice: random.Random) -> None:
    trouble = Trouble(refuses=0.1, forgets_to_say=0.1, hangs_up=0.1, dawdles=0.3, seconds=1.0, error="TimeoutError")
    await _troubled(stage, dice, trouble)


async def _troubled(stage: Stage, dice: random.Random, trouble: Trouble) -> None:
    stage.store.has(trouble)
    await asyncio.sleep(dice.uniform(0.5, 3))
    stage.store.has(Trouble())


async def store_stands_still(stage: Stage, dice: random.Random) -> None:
    stage.store.freeze()
    await asyncio.sleep(dice.uniform(0.5, 6))
    stage.store.thaw()


FAULTS: tuple[Fault, ...] = (
    store_refuses,
    store_forgets_to_say,
    store_hangs_up,
    store_dawdles,
    store_does_it_all,
    store_stands_still,
)
