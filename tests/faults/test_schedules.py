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
from pathlib import Path

import pytest

from support.broker import Setup
from support.broker import broker as a_broker

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
