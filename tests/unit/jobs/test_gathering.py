"""Jobs that may be what kills their workers, while they arrive."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rpcq.jobs.gathering import GATHERING, Gathering
from rpcq.jobs.outcomes import turn_of
from rpcq.wire.jobs import JobMessage


class Clock:
    """The transport's clock; it stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0
        self._moved = asyncio.Event()

    def now_ms(self) -> int:
        return round(self.now * 1000)

    async def sleep_until(self, at_ms: int) -> None:
        while self.now_ms() < at_ms:
            await self._moved.wait()

    async def move(self, seconds: float) -> None:
        self.now += seconds
        self._moved.set()
        self._moved.clear()
        for _ in range(10):
            await asyncio.sleep(0)


class Lane:
    """Stands for the lanes: says who had a turn."""

    def __init__(self) -> None:
        self.turns: list[str] = []

    def turn(self, run: Any) -> None:
        self.turns.append(run.job.order_key)


class Run:
    """A job that came back seven times."""

    def __init__(self, lane: Lane, key: str) -> None:
        self.lane = lane
        self.job = job_of(key)


class Scene:
    """Lanes, a clock and a session."""

    def __init__(self) -> None:
        self.is_up = True
        self.clock = Clock()
        self.lane = Lane()
        transport: Any = self.clock
        self.gathering = Gathering(transport, lambda: self.is_up)

    def add(self, key: str) -> Any:
        run: Any = Run(self.lane, key)
        self.gathering.add(run)
        return run


@pytest.fixture
async def scene() -> Scene:
    return Scene()


def job_of(key: str) -> JobMessage:
    return JobMessage(id=key, name="work", body=b"", order_key=key, returns=7)


KEYS = sorted("abcdefgh", key=lambda key: turn_of(job_of(key)))


async def test_the_first_turn_is_not_that_of_the_first_to_arrive(scene: Scene) -> None:
    for key in reversed(KEYS):
        scene.add(key)
        await scene.clock.move(GATHERING / 10)
    assert scene.lane.turns == []
    await scene.clock.move(GATHERING)
    assert scene.lane.turns == KEYS


async def test_who_arrives_while_the_session_is_opened_waits_for_those_that_arrive_when_it_is_up(scene: Scene) -> None:
    scene.is_up = False
    scene.add(KEYS[-1])
    for _ in range(5):
        await scene.clock.move(GATHERING * 0.7)
    scene.is_up = True
    await scene.clock.move(GATHERING * 0.7)
    for key in KEYS[:-1]:
        scene.add(key)
    assert scene.lane.turns == []
    await scene.clock.move(GATHERING)
    await scene.clock.move(GATHERING)
    assert scene.lane.turns == KEYS


async def test_what_is_held_no_more_has_no_turn_and_what_comes_again_is_gathered_for_the_whole_time(
    scene: Scene,
) -> None:
    gone = scene.add(KEYS[0])
    await scene.clock.move(0)
    await scene.clock.move(GATHERING * 0.8)
    scene.gathering.discard(gone)
    scene.add(KEYS[3])
    await scene.clock.move(0)
    await scene.clock.move(GATHERING * 0.8)
    scene.add(KEYS[2])
    assert scene.lane.turns == []
    assert len(scene.gathering.asleep(scene.clock.now_ms())) == 2
    await scene.clock.move(GATHERING * 0.8)
    assert scene.lane.turns == [KEYS[2], KEYS[3]]
    assert scene.gathering.asleep(scene.clock.now_ms()) == []


async def test_nothing_has_a_turn_after_the_end(scene: Scene) -> None:
    scene.add(KEYS[0])
    await scene.clock.move(GATHERING / 2)
    scene.gathering.close()
    await scene.clock.move(GATHERING * 2)
    assert scene.lane.turns == []
