"""Watched jobs while workers are killed, and while the broker is: what their senders hear."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpcq import JobFailed
from support.broker import Broker
from support.broker import broker as a_broker
from support.crashing import Home

pytestmark = pytest.mark.timeout(180)

SECONDS = 60.0


@pytest.fixture
async def home(rabbitmq_url: str, tmp_path: Path) -> Home:
    made = Home(rabbitmq_url, tmp_path)
    await made.declare()
    return made


@pytest.fixture
def own() -> Iterator[Broker]:
    """A broker that is killed."""
    with a_broker() as made:
        yield made


async def test_the_watcher_of_a_job_whose_worker_is_killed_hears_of_the_next_run_and_gets_its_result(
    home: Home,
) -> None:
    async with home.client() as client:
        async with home.worker() as worker:
            job = await client.with_options(watch=True).send(f"{home.service}.hold", name="a")
            reading = job.progress(timeout=SECONDS)
            first = await anext(reading)
            worker.send_signal(signal.SIGKILL)
            await worker.wait()
        async with home.worker() as worker:
            second = await anext(reading)
            assert (first.state, first.attempt) == (second.state, second.attempt) == ("running", 1)
            (home.folder / "go").touch()
            assert await job.result(timeout=SECONDS) is None
            await home.stop(worker)
    assert home.effects()["a"] == 2
    assert not await home.check({"a": job.id})


@pytest.mark.long
async def test_when_the_broker_is_killed_the_end_of_a_watched_job_is_not_known_and_it_is_done(
    own: Broker, tmp_path: Path
) -> None:
    home = Home(own.url, tmp_path)
    await home.declare()
    await asyncio.sleep(2)  # the queues are new: see `Broker.kill`
    async with home.worker(), home.client() as client:
        watching = client.with_options(watch=True, timeout=SECONDS)
        job = await watching.send(f"{home.service}.hold", name="a")
        await home.until_done({"a"})
        await asyncio.to_thread(own.kill)
        with pytest.raises(JobFailed) as caught:
            await job.result(timeout=SECONDS)
        assert (caught.value.reason, caught.value.executed) == ("session_lost", "maybe")
        await asyncio.to_thread(own.start)
        (home.folder / "go").touch()
        again = await watching.send(f"{home.service}.work", name="b")
        assert await again.result(timeout=SECONDS) is None
    assert not await home.check({"a": job.id, "b": again.id})
    assert {"a", "b"} <= home.effects().keys()
