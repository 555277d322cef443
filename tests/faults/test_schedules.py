"""Schedules through the deaths of workers and of the broker, with real processes.

The oracle: from the first tick to the last one, there is a job for each second; and all jobs of a tick have one key.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import aio_pika
import pytest

from rpcq import Context, Cron, Service, Worker
from rpcq.jobs import ticking
from rpcq.transport.base import BrokerError
from rpcq.transport.rabbitmq import transport as rabbitmq
from support.broker import Setup
from support.broker import broker as a_broker
from support.places import lose

TARGET = Path(__file__).resolve().parents[1] / "support" / "targets_schedules.py"


class Workers:
    """Worker processes of one service with a schedule of one second."""

    def __init__(self, url: str, folder: Path) -> None:
        self.folder = folder
        self.service = f"s{secrets.token_hex(6)}"
        self.environment = {**os.environ, "RPCQ_URL": url, "RPCQ_NAMESPACE": f"t{secrets.token_hex(8)}"}
        self.running: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, TARGET, self.folder, self.service, env=self.environment
        )
        self.running.append(process)
        while not (self.folder / f"serves-{process.pid}").exists():
            assert process.returncode is None
            await asyncio.sleep(0.02)

    async def kill(self, process: asyncio.subprocess.Process) -> None:
        self.running.remove(process)
        if process.returncode is None:
            process.kill()
        await process.wait()

    def ticks(self) -> dict[int, set[str]]:
        """The ticks that were done, in seconds, with their keys."""
        found: dict[int, set[str]] = {}
        for line in self._lines():
            ms, _, key = line.partition(" ")
            found.setdefault(int(ms) // 1000, set()).add(key)
        return found

    def times_done(self) -> Counter[str]:
        """How often each tick was done."""
        return Counter(self._lines())

    def _lines(self) -> list[str]:
        path = self.folder / "ticks"
        return path.read_text().splitlines() if path.exists() else []

    async def until_all(self, first: int, last: int) -> None:
        """Wait, within the test's own timeout, until each tick in this range is done."""
        while not set(range(first, last + 1)) <= self.ticks().keys():  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.1)


async def first_of(workers: Workers) -> int:
    while not (ticks := workers.ticks()):  # noqa: ASYNC110 - other processes
        await asyncio.sleep(0.05)
    return min(ticks)


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_no_second_is_left_out_while_workers_are_killed_and_the_broker_is_restarted(
    tmp_path: Path,
) -> None:
    choose = random.Random(17)
    with a_broker(setup=Setup()) as own:
        workers = Workers(own.url, tmp_path)
        try:
            for _ in range(5):
                await workers.start()
            first = await first_of(workers)
            end, restart_at = time.time() + 120, time.time() + 60
            while time.time() < end:
                await asyncio.sleep(choose.uniform(0.5, 3))
                await workers.kill(choose.choice(workers.running))
                if restart_at and time.time() > restart_at:
                    restart_at = 0.0
                    await asyncio.to_thread(own.kill)
                    await asyncio.to_thread(own.start)
                await workers.start()
            last = int(time.time())
            await workers.until_all(first, last)
        finally:
            for process in [*workers.running]:
                await workers.kill(process)
    assert all(len(keys) == 1 for keys in workers.ticks().values())
    assert max(workers.times_done().values()) <= 2


# A day in two minutes.

DAY = 120.0
"""Seconds that a day of the workers' clock takes."""

BEGIN = datetime(2026, 10, 23, 12, tzinfo=UTC)
"""Clocks in Berlin are set back on 25 October."""

TICKS = [datetime(2026, 10, day, hour, tzinfo=UTC) for day, hour in ((24, 4), (25, 5))]


class QuickClock:
    """A clock whose days are short."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    def now_ms(self) -> int:
        return round((BEGIN.timestamp() + (time.monotonic() - self._begun) * 86_400 / DAY) * 1000)

    async def sleep_until(self, ms: int) -> None:
        while (left := ms - self.now_ms()) > 0:  # noqa: ASYNC110 - no event tells the time
            await asyncio.sleep(left / 1000 * DAY / 86_400)


@asynccontextmanager
async def delays(url: str) -> AsyncIterator[list[float]]:
    """How many seconds the broker and this process took, each time, for what takes them a moment."""
    found: list[float] = []

    async def ask() -> None:
        async with await aio_pika.connect(url) as connection:
            channel = await connection.channel()
            queue = await channel.declare_queue(exclusive=True)
            while True:
                began = time.monotonic()
                await channel.declare_queue(queue.name, passive=True)
                await asyncio.sleep(0.05)
                found.append(time.monotonic() - began)

    asking = asyncio.create_task(ask())
    try:
        yield found
        assert not asking.done()
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


@pytest.mark.long
@pytest.mark.timeout(800)
@pytest.mark.parametrize("in_time", [True, False], ids=["in time", "too late"])
async def test_a_daily_schedule_survives_days_of_a_broker_that_lets_nobody_hold_a_message_for_30_minutes(
    in_time: bool, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ticket waits for a day, and is handed on every ten minutes; one that is held too long costs a session."""
    if not in_time:
        monkeypatch.setattr(ticking, "HELD", 2 * 3600.0)
    done: list[tuple[datetime | None, str | None]] = []
    service = Service(f"s{secrets.token_hex(6)}")

    @service.job(schedule=Cron("0 6 * * *", tz="Europe/Berlin", missed="all"))
    async def report(context: Context) -> None:
        done.append((context.due, context.idempotency_key))

    lost: list[str] = []

    async def start(url: str) -> Worker:
        worker = Worker(service, url=url, namespace=namespace, grace=0.5)
        await worker.start()
        session = worker._transport._consuming  # type: ignore[attr-defined]  # RabbitMQ's
        down = session._on_down

        def note(cause: BrokerError) -> None:
            lost.append(str(cause))
            down(cause)

        monkeypatch.setattr(session, "_on_down", note)
        return worker

    minutes_30 = DAY / 48
    config = f"consumer_timeout = {minutes_30 * 1000:.0f}\nloopback_users.guest = false\n"
    with a_broker(setup=Setup(config)) as own:
        # How often it looks is no key of rabbitmq.conf.
        await asyncio.to_thread(own.ctl, "eval", "application:set_env(rabbit, channel_tick_interval, 200).")
        # From RabbitMQ 4.3 on, a timeout is the business of quorum queues, and the ticket's consumer has its own.
        strikes = own.release < (4, 3)
        clock = QuickClock()
        monkeypatch.setattr(rabbitmq, "clock", clock)
        workers = [await start(own.url) for _ in range(2)]
        half_day = passed = 0
        try:
            async with delays(own.url) as delayed:
                while passed < 3:
                    half_day += 1
                    await clock.sleep_until(round((BEGIN.timestamp() + half_day * 43_200) * 1000))
                    if in_time and lost:
                        # A ticket was held for too long; another half day if that is because all stood still meanwhile.
                        assert max(delayed) > 1.0, lost
                        lost.clear()
                    else:
                        passed += 1
                    delayed.clear()
                    oldest = workers.pop(0)
                    await lose(oldest)
                    workers.append(await start(own.url))
            while not set(TICKS) <= {tick for tick, _ in done}:  # noqa: ASYNC110 - the last one may be under way
                await asyncio.sleep(0.05)
        finally:
            for worker in workers:
                await worker.stop()
    if strikes and not in_time:
        assert any("delivery acknowledgement on channel" in cause for cause in lost), lost
    in_question = Counter(it for it in done if it[0] is not None and it[0] <= TICKS[-1])
    assert sorted(tick for tick, _ in in_question if tick) == TICKS  # one key for each
    assert max(in_question.values()) <= 2
