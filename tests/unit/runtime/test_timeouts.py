"""Timeouts in buckets: they come when they should, and never once they are cancelled."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest

from rpcq.runtime.timeouts import SPAN, Bucket, Timeouts


class Thing:
    def __init__(self) -> None:
        self.timeout: Bucket | asyncio.TimerHandle | None = None
        self.came_at = 0.0


@pytest.fixture
def came() -> list[Thing]:
    return []


@pytest.fixture
async def timeouts(came: list[Thing]) -> Timeouts[Thing]:
    def on_timeout(thing: Thing) -> None:
        thing.came_at = time.monotonic()
        came.append(thing)

    return Timeouts(asyncio.get_running_loop(), on_timeout)


async def until_came(came: list[Thing], count: int) -> None:
    while len(came) < count:  # noqa: ASYNC110 - what is waited for sets no event
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("seconds", [0.0, 0.01, SPAN, 2.5 * SPAN])
async def test_a_timeout_comes_and_not_before_its_time(
    timeouts: Timeouts[Thing], came: list[Thing], seconds: float
) -> None:
    thing, now = Thing(), time.monotonic()
    timeouts.set(thing, now + seconds, now)
    await until_came(came, 1)
    assert came == [thing]
    assert thing.came_at >= now + seconds - 0.002  # timers may fire early by the resolution of the clock
    assert thing.timeout is None


async def test_timeouts_come_in_the_order_of_their_times_whatever_bucket_they_are_in(
    timeouts: Timeouts[Thing], came: list[Thing]
) -> None:
    now = time.monotonic()
    things = {seconds: Thing() for seconds in (0.55, 0.05, 0.45, 0.3, 0.15)}
    for seconds, thing in things.items():
        timeouts.set(thing, now + seconds, now)
    await until_came(came, len(things))
    assert came == [things[seconds] for seconds in sorted(things)]


@pytest.mark.parametrize("seconds", [0.05, SPAN + 0.05])
async def test_a_cancelled_timeout_never_comes(timeouts: Timeouts[Thing], came: list[Thing], seconds: float) -> None:
    now = time.monotonic()
    cancelled, other = Thing(), Thing()
    timeouts.set(cancelled, now + seconds, now)
    timeouts.set(other, now + seconds, now)
    timeouts.cancel(cancelled)
    timeouts.cancel(cancelled)  # nothing more to cancel
    await until_came(came, 1)
    await asyncio.sleep(0.01)
    assert came == [other]


async def test_a_timeout_can_be_cancelled_after_its_bucket_has_begun(
    timeouts: Timeouts[Thing], came: list[Thing]
) -> None:
    now = time.monotonic()
    thing, soon = Thing(), Thing()
    begins = (int(now / SPAN) + 2) * SPAN
    timeouts.set(thing, begins + SPAN * 0.9, now)
    timeouts.set(soon, begins + 0.001, now)
    await until_came(came, 1)
    assert isinstance(thing.timeout, asyncio.TimerHandle)
    timeouts.cancel(thing)
    await asyncio.sleep(SPAN)
    assert came == [soon]


async def test_many_far_timeouts_cost_the_loop_one_timer_and_leave_nothing_behind(
    came: list[Thing], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []
    call_later = loop.call_later

    def counted(*given: object, **named: object) -> asyncio.TimerHandle:
        timers.append(call_later(*given, **named))  # type: ignore[arg-type]
        return timers[-1]

    monkeypatch.setattr(loop, "call_later", counted)
    timeouts: Timeouts[Thing] = Timeouts(loop, came.append)
    now = time.monotonic()
    at = (int(now / SPAN) + 100.5) * SPAN
    things = [Thing() for _ in range(1000)]
    for thing in things:
        timeouts.set(thing, at, now)
    assert len(timers) == 1
    for thing in things:
        timeouts.cancel(thing)
    timeouts.close()
    assert timers[0].cancelled()
    assert not came


async def test_a_bucket_gives_its_room_back_once_nothing_waits_in_it(timeouts: Timeouts[Thing]) -> None:
    now = time.monotonic()
    at = (int(now / SPAN) + 100.5) * SPAN
    things = [Thing() for _ in range(1000)]
    for thing in things:
        timeouts.set(thing, at, now)
    (bucket,) = timeouts._buckets.values()
    full = sys.getsizeof(bucket)
    for thing in things:
        timeouts.cancel(thing)
    assert sys.getsizeof(bucket) < full / 100
    timeouts.set(things[0], at, now)
    assert things[0].timeout is bucket
    timeouts.close()
