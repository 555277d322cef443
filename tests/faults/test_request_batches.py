"""Messages with several calls, whose workers are killed and whose connections are cut in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rpcq import Client, Observer, OutcomeUnknown
from rpcq.calls import gathering
from support.load import Load, Scene, until
from support.proxy import proxy

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

SERVICE = "support.targets_batched:target"
WAVE = 40
TIMEOUT = 60.0
"""Seconds of a call: it may have to wait for a worker to start in place of one that was killed."""


class Sizes(Observer):
    """How many requests the messages had."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_message(self, carried: str, calls: int) -> None:
        self.sizes.append(calls)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many calls in one message as its worker wants."""
    monkeypatch.setattr(gathering, "SHARE", 1)
    monkeypatch.setattr(gathering, "FEWEST", 0)


@asynccontextmanager
async def client_of(scene: Scene, url: str | None = None) -> AsyncIterator[tuple[Client, Sizes]]:
    """A client that knows that the service takes several calls in a message, and sends them so."""
    sizes = Sizes()
    async with scene.client(url, observers=[sizes]) as client:
        warm = scene.load(client, timeout=TIMEOUT)
        while client._sender.gathering.told.get(b"target") != 12:
            await warm.call()
        yield client, sizes
        assert not client._calls._together
    assert sum(it > 4 for it in sizes.sizes) >= 10, sizes.sizes


async def waves(load: Load, count: int, **params: float) -> None:
    """Calls that are made together, several times one after the other."""
    for _ in range(count):
        await asyncio.gather(*(load.call(**params) for _ in range(WAVE)))


async def test_kills_and_cuts_in_the_middle_of_message_batches_leave_each_call_with_one_honest_outcome(
    scene: Scene,
) -> None:
    await scene.workers_of(2, service=SERVICE)
    async with proxy(scene.url) as between, client_of(scene, between.url) as (client, _):
        plain = scene.load(client, timeout=TIMEOUT)
        idempotent = scene.load(client, method="again", idempotent=True, timeout=TIMEOUT)
        calling = asyncio.gather(waves(plain, 12, seconds=0.05), waves(idempotent, 12, seconds=0.05))
        for worker in list(scene.workers):
            await until(lambda: plain.ledger.begun - plain.ledger.ended >= WAVE // 2)
            ended = plain.ledger.ended
            worker.kill()
            scene.start(service=SERVICE)
            await until(lambda ended=ended: plain.ledger.ended > ended + WAVE, TIMEOUT)
        between.reset()
        await calling
        assert set(plain.ledger.counts) <= {"result", "OutcomeUnknown/maybe"}, plain.ledger.counts
        assert plain.ledger.counts["result"] >= 5 * WAVE
        assert set(idempotent.ledger.counts) == {"result"}, idempotent.ledger.counts
    for worker in scene.workers:
        if worker.is_alive:
            await worker.started()
    await scene.check()


async def test_a_poison_call_in_a_message_batch_kills_one_worker_and_costs_what_is_beside_it(scene: Scene) -> None:
    workers = await scene.worker("--processes", "2", service=SERVICE)
    async with client_of(scene) as (client, _):
        plain = scene.load(client, timeout=TIMEOUT)
        poison = scene.load(client, method="die", timeout=TIMEOUT)
        again = scene.load(client, method="again", idempotent=True, timeout=TIMEOUT)
        for _ in range(12):
            await waves(plain, 1)
        told, *_ = await asyncio.gather(
            poison.call(),
            *(plain.call(seconds=0.05) for _ in range(5)),
            *(again.call(seconds=0.05) for _ in range(5)),
        )
        assert isinstance(told, OutcomeUnknown)
        assert len(scene.ran(poison.prefix)) == 1
        assert set(again.ledger.counts) == {"result"}
        assert set(plain.ledger.counts) <= {"result", "OutcomeUnknown/maybe"}, plain.ledger.counts
        await until(lambda: sum("worker started" in line for line in workers.lines) == 3, TIMEOUT)  # it is replaced
        await waves(plain, 1)
    await scene.check()
