"""Order keys through kills, retries and rolling deploys, with real processes.

The oracle: of each key, no attempt of a job begins after one of a later job has begun, and none beside another one,
whatever is repeated; and each job is done, or is a dead letter that says why.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from rpcq import Client
from rpcq.jobs.replaying import Letters, Wanted
from rpcq.options import ConnectionOptions
from rpcq.transport.opening import open_admin
from rpcq.url import parse
from rpcq.wire.events import EventTopology
from rpcq.wire.job_queues import JobTopology
from support.ordered import keys_in

TARGET = Path(__file__).resolve().parents[1] / "support" / "targets_ordered.py"
NAMESPACE = f"t{secrets.token_hex(8)}"

Process = asyncio.subprocess.Process
log = logging.getLogger(__name__)


class Workers:
    """Worker processes of one service, and what they did."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.service = f"s{secrets.token_hex(6)}"
        self.environment = {**os.environ, "RPCQ_URL": url, "RPCQ_NAMESPACE": NAMESPACE}
        self.running: list[Process] = []
        self.killed: set[str] = set()

    def client(self) -> Client:
        return Client(self.url, namespace=NAMESPACE)

    async def start(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, TARGET, self.folder, self.service, env=self.environment
        )
        self.running.append(process)
        while not (self.folder / f"serves-{process.pid}").exists() and process.returncode is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return process

    async def kill(self, process: Process) -> None:
        self.running.remove(process)
        self.killed.add(str(process.pid))
        if process.returncode is None:
            process.kill()
        await process.wait()

    async def stop(self, process: Process) -> None:
        """Stop it in an orderly way."""
        self.running.remove(process)
        process.terminate()
        assert await process.wait() == 0

    async def deploy(self) -> None:
        """Replace each worker by a new one, one after the other."""
        for process in [*self.running]:
            await self.stop(process)
            await self.start()

    def attempts(self) -> list[list[str]]:
        path = self.folder / "attempts"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def busiest(self) -> Process | None:
        """The process that did something last, if it still runs: it has a lane, at least."""
        last = self.attempts()[-1:]
        return next((it for it in self.running if last and str(it.pid) == last[0][3]), None)

    def ended(self) -> set[tuple[str, int]]:
        """The jobs that are done, or given up."""
        return {(key, int(number)) for kind, key, number, _ in self.attempts() if kind in ("done", "hopeless")}

    async def dead(self) -> dict[tuple[str, int], str]:
        """The dead letters: order key and number -> reason."""
        url, found = parse(self.url), {}
        topology = JobTopology(NAMESPACE)
        async with open_admin(url, ConnectionOptions(), *url.hosts[0]) as admin:
            letters = Letters(admin, EventTopology(NAMESPACE), topology.dead_queue(self.service).name)
            bound = (await letters.state()).messages
            async for letter in letters.look(Wanted(), bound):
                assert letter.job.order_key is not None
                found[letter.job.order_key, int(letter.job.body.split(b":")[1].split(b",")[0])] = letter.reason
        return found

    def check_order(self) -> int:
        """Hold the oracle to what began; returns how many attempts were repeated."""
        began: dict[str, int] = defaultdict(int)
        runs: dict[str, str] = {}
        seen: set[tuple[str, int]] = set()
        repeated = 0
        for kind, key, number, pid in self.attempts():
            if kind != "begins":
                if runs.get(key) == pid:
                    del runs[key]
                continue
            assert int(number) >= began[key], f"{key}: {number} began after {began[key]}"
            assert runs.get(key, pid) == pid or runs[key] in self.killed, f"{key}: {number} began beside {began[key]}"
            repeated += (key, int(number)) in seen
            seen.add((key, int(number)))
            began[key], runs[key] = int(number), pid
        return repeated


async def send(workers: Workers, client: Client, key: str, jobs: int, kills: int) -> None:
    """Send the jobs of a key in their order, a part of them after each kill: so there is work at each kill."""
    maker = client.with_options(order_key=key, timeout=60)
    for number in range(jobs):
        while number >= (len(workers.killed) + 2) * jobs / (kills + 1):  # noqa: ASYNC110 - as long as processes take
            await asyncio.sleep(0.05)
        await maker.send(f"{workers.service}.work", number=number, poison=False)


async def strike(workers: Workers, jobs: int, kills: int, deploys: int) -> None:
    """Kill who has the lanes, and deploy, each time when another part of all jobs has ended: so up to the end."""
    strikes = [*range(1, kills + 1), *((number + 0.5) * kills / deploys for number in range(deploys))]
    starting: set[asyncio.Task[Process]] = set()
    try:
        for number in sorted(strikes):
            while len(workers.ended()) < jobs * number / (kills + 1):  # noqa: ASYNC110 - other processes
                await asyncio.sleep(0.05)
            if isinstance(number, int):
                # If it has no work left, it is the one that has waited longest.
                await workers.kill(workers.busiest() or workers.running[0])
                starting.add(asyncio.create_task(workers.start()))
            else:
                await asyncio.gather(*starting)
                await workers.deploy()
    finally:
        await asyncio.gather(*starting, return_exceptions=True)
    await asyncio.gather(*starting)


async def run(workers: Workers, keys: int, jobs: int, processes: int, kills: int, deploys: int) -> None:
    """Send, kill and deploy; then hold the oracle to all that happened."""
    names = [f"key-{number}" for number in range(keys)]
    wanted = {(key, number) for key in names for number in range(jobs)}
    try:
        for _ in range(processes):
            await workers.start()
        async with workers.client() as client, asyncio.TaskGroup() as group:
            for key in names:
                group.create_task(send(workers, client, key, jobs, kills))
            await strike(workers, len(wanted), kills, deploys)
        while not wanted <= workers.ended():  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.1)
        for process in [*workers.running]:
            await workers.stop(process)
        hopeless = {(key, 25): "gave_up" for key in names if key.endswith("0") and jobs > 25}
        assert await workers.dead() == hopeless, "nothing else is dead, and none of these is lost"
    finally:
        for process in [*workers.running]:
            await workers.kill(process)
    repeated = workers.check_order()
    assert len(workers.killed) == kills
    log.info("%d jobs, %d kills, %d attempts repeated", len(wanted), len(workers.killed), repeated)


@pytest.mark.timeout(120)
async def test_the_jobs_of_each_key_are_in_order_through_a_kill_and_a_deploy(rabbitmq_url: str, tmp_path: Path) -> None:
    await run(Workers(rabbitmq_url, tmp_path), keys=11, jobs=30, processes=2, kills=3, deploys=1)


@pytest.mark.long
@pytest.mark.timeout(480)
async def test_50_keys_of_200_jobs_are_in_order_over_4_processes_with_kills_retries_and_two_deploys(
    rabbitmq_url: str, tmp_path: Path
) -> None:
    await run(Workers(rabbitmq_url, tmp_path), keys=50, jobs=200, processes=4, kills=40, deploys=2)


@pytest.mark.long
@pytest.mark.timeout(480)
async def test_a_poison_job_dies_alone_and_its_key_goes_on(rabbitmq_url: str, tmp_path: Path) -> None:
    """Each attempt kills the worker, with all that it holds: jobs of the same key, of the same lane, of other lanes."""
    workers = Workers(rabbitmq_url, tmp_path)
    poisoned, *beside = keys_in("k04", 3)
    elsewhere = [key for lane in ("k00", "k05", "k11", "k15") for key in keys_in(lane, 2)]
    others = {(key, number) for key in (*beside, *elsewhere) for number in range(3)}
    try:
        await workers.stop(await workers.start())  # the queues are declared
        async with workers.client() as client:
            for key in (poisoned, *beside, *elsewhere):
                for number in range(3):
                    is_poison = key == poisoned and number == 1
                    maker = client.with_options(order_key=key)
                    await maker.send(f"{workers.service}.work", number=number, poison=is_poison)
        wanted = others | {(poisoned, number) for number in range(3) if number != 1}
        while not wanted <= workers.ended():
            process = await workers.start()
            while not wanted <= workers.ended() and process.returncode is None:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            if process.returncode is not None:
                assert process.returncode == -signal.SIGKILL
                await workers.kill(process)
        await workers.stop(process)
        assert await workers.dead() == {(poisoned, 1): "delivery_limit"}
    finally:
        for process in [*workers.running]:
            await workers.kill(process)
    workers.check_order()
    assert len(workers.killed) <= 20
