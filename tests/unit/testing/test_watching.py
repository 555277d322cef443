"""Watched jobs in a world whose time the test moves."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from rpcq import Context, JobFailed, Retry, Service
from rpcq.testing import world


async def test_a_watcher_hears_of_a_retry_at_the_time_of_the_world_and_gets_the_result() -> None:
    service = Service("pictures")

    @service.job(retry=Retry(max_attempts=3, initial_backoff=600, max_backoff=600))
    async def resize(path: str, context: Context) -> str:
        context.progress(context.attempt, 3, note="resizing")
        if context.attempt < 3:
            raise ConnectionError("the disk is away")
        return f"https://example.org/{path}"

    async with world(service) as w:
        began = w.now
        job = await w.client.with_options(watch=True).send(resize, path="cat.png")
        await w.settled()
        waits = await anext(job.progress())
        assert (waits.state, waits.attempt, waits.reason) == ("waiting", 2, "failed")
        assert waits.due is not None
        assert began < waits.due <= began + timedelta(seconds=600)
        with pytest.raises(TimeoutError):
            await job.result(timeout=0.05)  # of real time
        await w.advance(hours=1)
        assert await job.result(timeout=5) == "https://example.org/cat.png"
        steps = [step async for step in job.progress()]
    assert [(it.state, it.attempt, it.done, it.total, it.note) for it in steps] == [("running", 3, 3, 3, "resizing")]


async def test_a_watcher_hears_when_hours_of_retries_end_in_a_dead_letter() -> None:
    service = Service("pictures")

    @service.job(retry=Retry(max_attempts=8, initial_backoff=600, max_backoff=3600))
    async def resize(path: str) -> str:
        raise ConnectionError("the disk is away")

    async with world(service) as w:
        job = await w.client.with_options(watch=True).send(resize, path="cat.png")
        await w.advance(hours=6)
        with pytest.raises(JobFailed) as caught:
            await job.result(timeout=5)
        (dead,) = w.dead(resize)
    assert (caught.value.reason, caught.value.executed, caught.value.attempts) == ("attempts", "yes", 8)
    assert (caught.value.job_id, caught.value.incident) == (dead.id, dead.incident)


async def test_a_watcher_gets_the_result_of_the_worker_that_follows_a_killed_one() -> None:
    service, started = Service("pictures"), asyncio.Event()
    is_slow = True

    @service.job
    async def resize(path: str) -> str:
        started.set()
        if is_slow:
            await asyncio.Event().wait()
        return path

    async with world(service) as w:
        job = await w.client.with_options(watch=True).send(resize, path="cat.png")
        async with asyncio.timeout(5):
            await started.wait()
        await w.kill_worker()
        is_slow = False
        with pytest.raises(TimeoutError):
            await job.result(timeout=0.05)
        await w.start_worker()
        assert await job.result(timeout=5) == "cat.png"
        assert (w.waiting(), w.dead()) == ([], [])
