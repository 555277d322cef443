"""What becomes of the broker, of the nodes of a cluster and of the links between them, and of queues."""

from __future__ import annotations

import asyncio
import contextlib
import random

from soak.faults import Fault
from soak.ground import TICK, Ground, OneNode, SeveralNodes
from soak.stage import SERVICES, Stage
from support.broker import CtlFailed

# One scene's part of it.


async def request_queue_deleted(stage: Stage, dice: random.Random) -> None:
    async with stage.ground.young:
        await stage.ground.try_ctl("delete_queue", dice.choice(stage.queues), "--vhost", stage.vhost)
        await asyncio.sleep(8)


async def reply_queue_deleted(stage: Stage, dice: random.Random) -> None:
    if (encoder := stage.client._sender.encoder) is not None:
        await stage.ground.try_ctl("delete_queue", encoder.reply_to.decode(), "--vhost", stage.vhost)


async def queue_full(stage: Stage, dice: random.Random) -> None:
    vhost = ("--vhost", stage.vhost)
    pattern = "^" + stage.scene.queue_of(dice.choice(SERVICES)).replace(".", "[.]") + "$"
    name = f"full-{stage.scene.namespace}"
    await stage.ground.try_ctl("set_policy", *vhost, name, pattern, '{"max-length":1}', "--apply-to", "queues")
    await asyncio.sleep(0.5)
    while await stage.ground.has_policy(stage.vhost, name):
        await stage.ground.try_ctl("clear_policy", *vhost, name)
        await asyncio.sleep(0.5)


SCENE_FAULTS: tuple[Fault, ...] = (request_queue_deleted, reply_queue_deleted, queue_full)

# All of it.


async def memory_alarm(ground: Ground, dice: random.Random) -> None:
    await ground.try_ctl("set_vm_memory_high_watermark", "absolute", "1MB")
    await asyncio.sleep(2)
    while not await ground.try_ctl("set_vm_memory_high_watermark", "0.6"):  # noqa: ASYNC110 - until it is there again
        await asyncio.sleep(1)


async def connections_closed(ground: Ground, dice: random.Random) -> None:
    await ground.try_ctl("close_all_connections", "closed by the soak")
    await asyncio.sleep(2)


async def broker_restarted(ground: OneNode, dice: random.Random) -> None:
    await asyncio.to_thread(ground.broker.restart)


async def broker_killed(ground: OneNode, dice: random.Random) -> None:
    async with ground.young:
        await asyncio.to_thread(ground.broker.kill)
        await asyncio.to_thread(ground.broker.start)


NODE_FAULTS: tuple[Fault, ...] = (memory_alarm, connections_closed, broker_restarted, broker_killed)

# A cluster.


async def node_restarted(ground: SeveralNodes, dice: random.Random) -> None:
    async with ground.young:
        node = dice.choice(ground.cluster.nodes)
        with contextlib.suppress(CtlFailed):
            await asyncio.to_thread(node.ctl, "stop_app")
        await asyncio.sleep(dice.uniform(0, 3))
        with contextlib.suppress(CtlFailed):  # then `whole` fails
            await asyncio.to_thread(node.ctl, "start_app")
        await ground.whole()


async def node_killed(ground: SeveralNodes, dice: random.Random) -> None:
    async with ground.young:
        node = dice.choice(ground.cluster.nodes)
        await asyncio.to_thread(node.kill)
        await asyncio.sleep(dice.uniform(0, 2 * TICK))
        await ground.started(node)


async def all_nodes_killed(ground: SeveralNodes, dice: random.Random) -> None:
    async with ground.young:
        nodes = ground.cluster.nodes
        await asyncio.gather(*(asyncio.to_thread(node.kill) for node in nodes))
        await ground.started(*nodes)


async def node_paused(ground: SeveralNodes, dice: random.Random) -> None:
    async with ground.young:
        node = dice.choice(ground.cluster.nodes)
        await asyncio.to_thread(node.pause)
        await asyncio.sleep(dice.uniform(1, 3 * TICK))
        await asyncio.to_thread(node.resume)
        await ground.whole()


async def link_cut_one_way(ground: SeveralNodes, dice: random.Random) -> None:
    async with ground.young:
        one, other = ground.two(dice)
        await asyncio.to_thread(ground.cluster.cut, one, other)
        await _healed(ground, dice)


async def link_cut(ground: SeveralNodes, dice: random.Random) -> None:
    async with ground.young:
        one, other = ground.two(dice)
        await asyncio.to_thread(ground.cluster.part, one, other)
        await _healed(ground, dice)


async def node_cut_off(ground: SeveralNodes, dice: random.Random) -> None:
    async with ground.young:
        one = dice.choice(ground.cluster.nodes)
        for other in ground.cluster.nodes:
            if other is not one:
                await asyncio.to_thread(ground.cluster.part, one, other)
        await _healed(ground, dice)


async def _healed(ground: SeveralNodes, dice: random.Random) -> None:
    await asyncio.sleep(dice.uniform(1, 3 * TICK))
    await asyncio.to_thread(ground.cluster.heal)
    await ground.whole()


CLUSTER_FAULTS: tuple[Fault, ...] = (
    memory_alarm,
    connections_closed,
    node_restarted,
    node_killed,
    all_nodes_killed,
    node_paused,
    link_cut_one_way,
    link_cut,
    node_cut_off,
)


def faults_of(ground: Ground) -> tuple[Fault, ...]:
    return NODE_FAULTS if isinstance(ground, OneNode) else CLUSTER_FAULTS
