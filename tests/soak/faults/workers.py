"""Workers that die, stop and stand still; those that come instead are of whichever generation."""

from __future__ import annotations

import asyncio
import random
import signal

from soak.faults import Fault
from soak.stage import HEARTBEAT, Stage


async def worker_killed(stage: Stage, dice: random.Random) -> None:
    number = dice.randrange(len(stage.victims))
    stage.victims[number].signal(signal.SIGKILL)
    await stage.replace(number)


async def worker_terminated(stage: Stage, dice: random.Random) -> None:
    number = dice.randrange(len(stage.victims))
    stage.victims[number].signal(signal.SIGTERM)
    await stage.victims[number].exit_code(30.0)
    await stage.replace(number)


async def worker_stopped(stage: Stage, dice: random.Random) -> None:
    victim = dice.choice(stage.victims)
    victim.freeze()
    await asyncio.sleep(dice.uniform(0.5, 3 * HEARTBEAT))
    victim.thaw()


async def event_loop_blocked(stage: Stage, dice: random.Random) -> None:
    await stage.one_call("block", seconds=dice.uniform(1.0, 3 * HEARTBEAT))


async def poison_request(stage: Stage, dice: random.Random) -> None:
    await stage.one_call("die")
    for number, victim in enumerate(stage.victims):
        if not victim.is_alive:
            await stage.replace(number)


FAULTS: tuple[Fault, ...] = (worker_killed, worker_terminated, worker_stopped, event_loop_blocked, poison_request)
