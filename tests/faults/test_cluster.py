"""A cluster of which nodes die under load: the one that leads the request queue, and the one that a client is on."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rpcq import Client
from rpcq.calls.outcomes import State
from support.broker import vhost_of
from support.cluster import Cluster, Member, joined
from support.cluster import cluster as a_cluster
from support.load import Load, Scene, WorkerProcess, until

pytestmark = [pytest.mark.long, pytest.mark.timeout(480)]

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


async def until_all_follow(cluster: Cluster, scene: Scene) -> None:
    """Wait until each node has its part of the request queue, so that another one may die."""

    def members() -> int:
        vhost = vhost_of(scene.url)
        rows = json.loads(cluster.ctl("list_queues", "-p", vhost, "name", "online", "--formatter", "json"))
        return next(len(row["online"]) for row in rows if row["name"] == scene.queue)

    async with asyncio.timeout(30):
        while await asyncio.to_thread(members) < len(cluster.nodes):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.2)


async def confirmed_and_held(
    scene: Scene, client: Client, load: Load, count: int
) -> tuple[list[asyncio.Task[Any]], Path]:
    """Calls whose requests are confirmed, and whose handlers run until there is a file of that name."""
    gate = scene.folder / f"gate-{load.prefix}"
    calls = [asyncio.create_task(load.call(until=str(gate))) for _ in range(count)]
    await until(lambda: len(scene.ran(load.prefix)) == count, what="they did not begin")
    await until(lambda: all(call.state is State.CONFIRMED for call in client._calls))
    return calls, gate


async def node_of(cluster: Cluster, client: Client) -> Member:
    return await asyncio.to_thread(cluster.node_of_connection, f"{client.options.name} consuming")


async def test_a_client_whose_node_dies_goes_on_at_the_next_one_and_the_death_of_the_leader_costs_no_call(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    one, two, leader = cluster.nodes
    async with Scene(leader.url, namespace, "quorum", tmp_path) as scene:
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
                # The node that the client is on, and one of its workers.
                await plain.through(500)
                assert await node_of(cluster, client) is one
                await asyncio.to_thread(one.kill)
                await plain.through(500)
                await idempotent.through()
                assert await node_of(cluster, client) is two
                await asyncio.to_thread(one.start)
                await until_all_follow(cluster, scene)

                # The node that leads the request queue, and that nobody is connected to.
                await plain.through()
                running, gate = await confirmed_and_held(scene, client, slow, 40)
                # What a worker held that was on the dead node may be told only when that is back.
                lost = plain.ledger.failed
                await asyncio.to_thread(leader.kill)
                await plain.through(500)
                await idempotent.through()
                assert await asyncio.to_thread(cluster.leader_of, scene.queue) is not leader
                gate.touch()
                await asyncio.gather(*running)
                await asyncio.to_thread(leader.start)
                await plain.through()
        told = plain.ledger.counts
        assert set(told) == {"result", "OutcomeUnknown/maybe"}, told
        assert told["OutcomeUnknown/maybe"] == lost <= 100, "the death of the leader cost a call"
        for load in (idempotent, slow):
            assert set(load.ledger.counts) == {"result"}, load.ledger.counts
        assert {line["role"] for line in logged(near, "session up again")} == {"consuming", "publishing"}
        assert not logged(far, "session down")
        await scene.check()


async def test_the_death_of_the_node_that_leads_the_queue_and_that_all_are_on_is_told_honestly_and_passes(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    one, two, three = cluster.nodes
    async with Scene(two.url, namespace, "quorum", tmp_path) as scene:
        await led_by(scene, cluster, one)
        await scene.workers_of(2, url=hosts(one, two, three))
        async with scene.client(hosts(one, two, three), name=namespace) as client:
            plain, idempotent = (
                scene.load(client, timeout=TIMEOUT, params={"seconds": 0.02}),
                scene.load(client, timeout=TIMEOUT, method="again", idempotent=True, params={"seconds": 0.02}),
            )
            async with plain, idempotent:
                await plain.through(500)
                assert await node_of(cluster, client) is one
                await asyncio.to_thread(one.kill)
                assert await asyncio.to_thread(cluster.leader_of, scene.queue) is not one
                await until(lambda: plain.ledger.failed, what="nobody was told")
                # A channel of RabbitMQ 3.10 that is used before the others have voted looks for the leader on the node
                # that is gone, and refuses what is published on it, until another channel takes its place.
                await plain.through(500, 60)
                await idempotent.through(500, 60)
                await asyncio.to_thread(one.start)
                await plain.through(500, 60)
        told = Counter(plain.ledger.counts)
        assert told.keys() <= {"result", "OutcomeUnknown/maybe", "Overloaded/no"}, told
        assert 0 < told["OutcomeUnknown/maybe"] <= 100, told
        # With an earlier attempt that may have run, nobody can say no.
        assert idempotent.ledger.counts.keys() <= {"result", "Overloaded/no", "Overloaded/maybe"}
        await scene.check()
