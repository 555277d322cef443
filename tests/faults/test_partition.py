"""A cluster whose nodes lose sight of each other under load: links that lose packets, nodes that die or stand still.

The node that a client publishes on then takes the queue's node for lost, and refuses what that has not confirmed. The
request may have been run there all the same, so that nothing but the queue's kind says whether that is a `no`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from rpcq import Client, Retry
from rpcq.calls.outcomes import State
from support.cluster import Cluster, Member, joined
from support.cluster import cluster as a_cluster
from support.load import Load, Scene, WorkerProcess, until

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

TICK = 10
"""Seconds without a word after which a node takes another one for lost, give or take a quarter."""
HEARTBEAT = 5
"""That of the workers of a `Scene`: they notice after two of them and a second."""
NOTICED = 30.0
"""Seconds within which it has, also on a busy machine."""
TIMEOUT = 60.0
HELD_TIMEOUT = 105.0
HELD_SECONDS = 70.0
"""Longer than a quorum queue of RabbitMQ 4.3 waits for a lost node (60 s) before what that held goes back."""
HELD = 20
BURST = 50
HEALS = 90.0
"""Seconds within which calls come through again once all is well."""
PATIENT = Retry(max_attempts=100, initial_backoff=0.2, max_backoff=1.0)
"""So that what was refused is sent again as long as it may be: after a wrong `no` it would run twice."""

HONEST = frozenset({"OutcomeUnknown/maybe", "CallTimeout/maybe", "CallTimeout/yes"})
"""How a call may end without a result whose handler began, and whose worker lost its node."""


AUTOHEAL = "cluster_partition_handling = autoheal\n"
"""Before 4.3, nodes that took each other for lost stay so when they meet again, but for those that restart."""


@pytest.fixture
def pair() -> Iterator[Cluster]:
    with a_cluster(2, links=True, tick=TICK, config=AUTOHEAL) as made:
        yield made


@pytest.fixture
def trio() -> Iterator[Cluster]:
    with a_cluster(3, tick=TICK, config=AUTOHEAL) as made:
        yield made


def hosts(*nodes: Member) -> str:
    """A URL with all these, in this order."""
    return joined([node.url for node in nodes])


async def declared_at(scene: Scene, node: Member) -> None:
    """Have the request queue on this node: it is declared there."""
    first = await scene.worker(url=node.url)
    first.signal(15)
    assert await first.exit_code() == 0
    await asyncio.sleep(2)  # a queue that is younger may be lost with its node: see `Member.kill`


async def until_lost(node: Member, other: Member) -> None:
    """Wait until a node takes another one for lost."""

    def is_lost() -> bool:
        return other.name not in node.ctl("eval", "nodes().")

    async with asyncio.timeout(NOTICED):
        while not await asyncio.to_thread(is_lost):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.5)


def told_of(load: Load, nonces: set[str]) -> dict[str, str]:
    """What the callers of these were told, so far."""
    return {nonce: told for nonce, _, told, *_ in load.ledger.lines() if nonce in nonces}


def failed_though_run(scene: Scene, load: Load) -> dict[str, str]:
    """The calls of a load that ended with an error although their handlers had begun."""
    told = told_of(load, set(scene.ran(load.prefix)))
    return {nonce: how for nonce, how in told.items() if how not in {"result", "cancelled"}}


async def held(scene: Scene, client: Client, load: Load) -> list[asyncio.Task[Any]]:
    """Calls whose requests are confirmed, and whose handlers run until there is a file `gate`."""
    calls = [asyncio.create_task(load.call(until=str(scene.folder / "gate"))) for _ in range(HELD)]
    await until(lambda: len(scene.ran(load.prefix)) == HELD, what="they did not begin")
    await until(lambda: all(call.state is State.CONFIRMED for call in client._calls if call.target == "hold"))
    return calls


@pytest.mark.parametrize("way", ["one way", "both ways"])
async def test_what_was_refused_because_the_queues_node_was_taken_for_lost_is_a_no_only_if_it_never_ran(
    pair: Cluster, queue_type: Literal["classic", "quorum"], way: str, namespace: str, tmp_path: Path
) -> None:
    near, far = pair.nodes
    async with Scene(far.url, namespace, queue_type, tmp_path) as scene:
        await declared_at(scene, near)
        await scene.workers_of(2, url=near.url)
        async with scene.client(far.url) as client:
            common: dict[str, Any] = {"callers": 100, "think": 0.3, "timeout": TIMEOUT, "params": {"seconds": 0.1}}
            plain, patient, idempotent = (
                scene.load(client, **common),
                scene.load(client, retry=PATIENT, **common),
                scene.load(client, method="again", idempotent=True, retry=PATIENT, **common),
            )
            loads = (plain, patient, idempotent)
            async with plain, patient, idempotent:
                await plain.through(500)
                if way == "one way":
                    await asyncio.to_thread(pair.cut, near, far)
                else:
                    await asyncio.to_thread(pair.part, near, far)
                # What is sent now still comes through where one way is open, as far as no answer is waited for.
                burst = [asyncio.create_task(load.call()) for _ in range(BURST) for load in loads]
                await until_lost(far, near)
                await asyncio.sleep(3)
                await asyncio.to_thread(pair.heal)
                for load in loads:
                    await load.through(200, HEALS)
                await asyncio.gather(*burst)
        told = [dict(load.ledger.counts) for load in loads]
        assert any(failed_though_run(scene, load) for load in loads), (
            f"it struck nobody whose handler had begun: {told}"
        )
        await scene.check()


Fault = Callable[[Cluster, Member, WorkerProcess], Awaitable[None]]


async def killed(cluster: Cluster, node: Member, worker: WorkerProcess) -> None:
    """The node and a worker die together, as with the machine that they are on: neither learns of the other."""
    worker.freeze()
    await asyncio.to_thread(node.kill)
    worker.kill()


async def paused(cluster: Cluster, node: Member, worker: WorkerProcess) -> None:
    """The node stands still for longer than others wait for it: the other nodes, and who is connected to it.

    Meanwhile a worker dies, of which the node learns when it goes on.
    """
    await asyncio.to_thread(node.pause)
    worker.kill()
    await until_lost(cluster.nodes[-1], node)
    await asyncio.sleep(2 * HEARTBEAT)
    await asyncio.to_thread(node.resume)


@pytest.mark.parametrize(
    ("fault", "place"), [(killed, "elsewhere"), (paused, "elsewhere"), (paused, "beside the workers")]
)
async def test_workers_whose_node_is_lost_cost_what_they_held_and_nobody_is_told_no_of_what_ran(
    trio: Cluster, fault: Fault, place: str, queue_type: Literal["classic", "quorum"], namespace: str, tmp_path: Path
) -> None:
    one, two, three = trio.nodes
    async with Scene(three.url, namespace, queue_type, tmp_path) as scene:
        await declared_at(scene, one if place == "beside the workers" else two)
        survivor, victim = await scene.workers_of(2, "--prefetch", "100", url=hosts(one, two, three))
        async with scene.client(hosts(three, two)) as client:
            common: dict[str, Any] = {"callers": 50, "think": 0.1, "timeout": TIMEOUT, "params": {"seconds": 0.02}}
            plain, patient, idempotent, slow = (
                scene.load(client, **common),
                scene.load(client, retry=PATIENT, **common),
                scene.load(client, method="again", idempotent=True, retry=PATIENT, **common),
                scene.load(client, method="hold", timeout=HELD_TIMEOUT),
            )
            async with plain, patient, idempotent:
                await plain.through(500)
                calls = await held(scene, client, slow)
                await fault(trio, one, victim)
                for load in (plain, patient, idempotent):
                    await load.through(200, HEALS)
                await asyncio.wait(calls, timeout=HELD_SECONDS)
                (scene.folder / "gate").touch()
                await asyncio.gather(*calls)
                if not one.up:
                    await asyncio.to_thread(one.start)
                for load in (plain, patient, idempotent):
                    await load.through(200, HEALS)
        assert survivor.says("session down"), "it did not strike"
        assert failed_though_run(scene, slow), "nothing was held by the worker that died"
        assert slow.ledger.counts.keys() <= HONEST | {"result"}, slow.ledger.counts
        await scene.check()
