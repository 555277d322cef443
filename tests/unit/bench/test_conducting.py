"""A load test from its start to its end, in this process, on memory://."""

from __future__ import annotations

import asyncio

from rpcq.bench.conducting import Conductor, LoadTest
from rpcq.bench.plan import Phase, Plan
from rpcq.bench.recording import Tally
from rpcq.client import Client
from rpcq.transport.memory.broker import MemoryBroker

URL = "memory://conducting"


def a_test(**options: object) -> LoadTest:
    plan = {"url": URL, "warm_up": 0.0, "phases": (Phase(50, 50, 2),), "checks": True, "is_job": True, **options}
    return LoadTest(plan=Plan("", **plan), queue_type="quorum")  # type: ignore[arg-type]


def echo() -> str:
    """The name of the built-in echo that runs now."""
    broker = MemoryBroker.named("conducting")
    assert broker is not None
    (queue,) = (it for it in broker.queues if it.startswith("rpcq.job.bench-") and ":" not in it)
    return queue.removeprefix("rpcq.job.")


async def test_a_job_that_is_done_twice_is_counted() -> None:
    again: list[asyncio.Task[None]] = []

    async def send_again() -> None:
        """Send a second job with the number of the first one, as if the broker had delivered that twice."""
        async with Client(URL) as client:
            await client.send(f"{echo()}.echo", nonce=0, payload="")

    def on_second(second: int, tally: Tally, depth: int | None) -> None:
        del second, tally, depth
        if not again:
            again.append(asyncio.create_task(send_again()))

    run = await Conductor(a_test(), on_second).run()
    await asyncio.gather(*again)
    assert (run.sent, run.ok, run.handled, run.duplicated) == (100, 100, 101, 1)
    assert run.correct


async def test_jobs_under_way_at_an_early_end_are_not_done() -> None:
    """They do not count as failed, done or lost for sure: nobody has heard."""
    test = a_test(phases=(Phase(50, 50, 30),))
    test = LoadTest(plan=test.plan, queue_type="quorum", simulate=5.0)
    counts: list[int] = []

    def on_second(second: int, tally: Tally, depth: int | None) -> None:
        del second, depth
        counts.append(tally.sent)
        if sum(counts) >= 40:
            conductor.stop()

    conductor = Conductor(test, on_second)
    run = await conductor.run()
    assert conductor.interrupted
    assert run.sent >= 40
    assert run.errors == {"not done": run.not_done}
    assert run.not_done == run.sent
    assert (run.ok, run.lost, run.latency.count, run.achieved) == (0, 0, 0, 0.0)
    assert run.executed == {"maybe": run.sent}
    assert run.confirm is not None
    assert run.confirm.count == run.sent
