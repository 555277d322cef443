"""A cluster of which nodes die under load: the one that leads the request queue, and the one that a client is on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster, Member, joined
from cluster import cluster as a_cluster
from load import Load, Scene, WorkerProcess, until
from rpcq.calls import State

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]

TIMEOUT = 30.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with a_cluster() as made:
        yield made


def logged(worker: WorkerProcess, event: str) -> list[dict[str, Any]]:
    """Its log's lines about an event."""
    lines = [json.loads(line) for line in list(worker.lines) if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


def hosts(*nodes: Member) -> str:
    """A URL with all these, in this order."""
    return joined([node.url for node in nodes])


async def led_by(scene: Scene, cluster: Cluster, node: Member) -> None:
    """Have the request queue led by this node: it is declared there."""
    first = await scene.worker(url=node.url)
    first.signal(15)
    assert await first.exit_code() == 0
    assert await asyncio.to_thread(cluster.leader_of, scene.queue) is node
    await asyncio.sleep(2)  # a queue that is younger may be lost with its node: see `Member.kill`


async def confirmed_and_held(scene: Scene, client: Any, load: Load, count: int) -> tuple[list[asyncio.Task[Any]], Path]:
    """Calls whose requests are confirmed, and whose handlers run until there is a file of that name."""
    gate = scene.folder / f"gate-{load.prefix}"
    calls = [asyncio.create_task(load.call(until=str(gate))) for _ in range(count)]
    await until(lambda: len(scene.ran(load.prefix)) == count, what="they did not begin")
    await until(lambda: all(call.state is State.CONFIRMED for call in client._calls))
    return calls, gate


async def test_the_death_of_a_node_is_a_pause_and_costs_only_calls_of_those_that_were_connected_to_it(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    one, two, leader = cluster.nodes
    async with Scene(one.url, namespace, "quorum", tmp_path) as scene:
        await led_by(scene, cluster, leader)
        near, far = await asyncio.gather(
            scene.worker(url=hosts(one, two, leader)), scene.worker(url=hosts(two, one, leader))
        )
        async with scene.client(hosts(one, two, leader), name=namespace) as client:
            plain, idempotent, slow = (
                scene.load(client, timeout=TIMEOUT, params={"seconds": 0.02}),
                scene.load(client, timeout=TIMEOUT, method="again", idempotent=True, params={"seconds": 0.02}),
                scene.load(client, timeout=60, method="hold"),
            )
            async with plain, idempotent:
                # The node that leads the request queue, and that nobody is connected to.
                await plain.through(500)
                running, gate = await confirmed_and_held(scene, client, slow, 40)
                await asyncio.to_thread(leader.kill)
                await plain.through(500)
                await idempotent.through()
                new = await asyncio.to_thread(cluster.leader_of, scene.queue)
                assert new is not leader
                gate.touch()
                await asyncio.gather(*running)
                for load in (plain, idempotent, slow):
                    assert set(load.ledger.counts) == {"result"}, load.ledger.counts
                await asyncio.to_thread(leader.start)
                await plain.through()

                # The node that the client is on, and one of its workers; it may lead the queue by now.
                on = await asyncio.to_thread(cluster.node_of_connection, f"{namespace} consuming")
                assert on is one
                await asyncio.to_thread(on.kill)
                await plain.through(500)
                await idempotent.through()
                assert await asyncio.to_thread(cluster.node_of_connection, f"{namespace} consuming") is two
                await asyncio.to_thread(on.start)
                await plain.through()
                await idempotent.through()
            told = plain.ledger.counts
            assert set(told) == {"result", "OutcomeUnknown/maybe"}, told
            assert told["OutcomeUnknown/maybe"] <= 100, told
            assert set(idempotent.ledger.counts) == {"result"}, idempotent.ledger.counts
        assert {line["role"] for line in logged(near, "session up again")} == {"consuming", "publishing"}
        assert not logged(far, "session down")
        await scene.check()
