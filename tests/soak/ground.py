"""What the soak runs on: one node, or a cluster whose links can be cut; with the faults that strike it as a whole."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack

from support import broker as brokers
from support.cluster import Cluster, Member, cluster, joined
from support.proxy import Connection, Proxy, proxy

TICK = 5
"""Seconds without a word after which a node of a cluster takes another one for lost, give or take a quarter."""
AUTOHEAL = "cluster_partition_handling = autoheal\n"
"""Before 4.3, nodes that took each other for lost stay so when they meet again, but for those that restart."""
WHOLE_SECONDS = 120.0


class Ground(ABC):
    """Where the soak runs.

    Attributes:
        urls: one for each node.
        version: for people.
        calm: seconds within which everything has to have come back.
        young: held while a request queue may be new: see `Broker.kill`.

    """

    def __init__(self, urls: Sequence[str], version: str, calm: float) -> None:
        self.urls = urls
        self.version = version
        self.calm = calm
        self.young = asyncio.Lock()

    @abstractmethod
    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl, on a node that is up; blocks."""

    async def try_ctl(self, *arguments: str) -> bool:
        """Whether that succeeded: the broker may be away just now, or the queue be gone already."""
        try:
            await asyncio.to_thread(self.ctl, *arguments)
        except brokers.CtlFailed:
            return False
        return True

    async def has_policy(self, vhost: str, name: str) -> bool:
        """Whether there is such a policy, as far as can be known: a command that fails may have done its work."""
        try:
            return name in await asyncio.to_thread(self.ctl, "list_policies", "--vhost", vhost)
        except brokers.CtlFailed:
            return True

    def order(self, first: int) -> list[str]:
        """The URLs of all nodes, beginning with that one."""
        first %= len(self.urls)
        return [*self.urls[first:], *self.urls[:first]]


class OneNode(Ground):
    """A broker of the soak's own."""

    def __init__(self, broker: brokers.Broker) -> None:
        super().__init__([broker.url], f"RabbitMQ {broker.version}", 15.0)
        self.broker = broker

    def ctl(self, *arguments: str) -> str:
        return self.broker.ctl(*arguments)


class SeveralNodes(Ground):
    """A cluster of the soak's own."""

    def __init__(self, made: Cluster) -> None:
        super().__init__([node.url for node in made.nodes], f"RabbitMQ, {made.origin}", 90.0)
        self.cluster = made

    def ctl(self, *arguments: str) -> str:
        return self.cluster.ctl(*arguments)

    def two(self, dice: random.Random) -> tuple[Member, Member]:
        one, other = dice.sample(self.cluster.nodes, 2)
        return one, other

    async def started(self, *nodes: Member) -> None:
        """Start nodes that were killed, and wait until the cluster is whole."""
        with contextlib.suppress(brokers.CtlFailed):  # they do not see each other yet
            await asyncio.to_thread(self.cluster.start, *nodes)
        await self.whole()

    async def whole(self) -> None:
        """Wait until each node sees all others again."""
        deadline = time.monotonic() + WHOLE_SECONDS
        while True:
            try:
                await asyncio.to_thread(self.cluster.wait, *self.cluster.nodes)
            except brokers.CtlFailed:  # one restarts, as it was of the smaller part
                assert time.monotonic() < deadline, "the cluster does not come together again"
                await asyncio.sleep(1)
            else:
                return


@contextlib.contextmanager
def ground(nodes: int) -> Iterator[Ground]:
    """Start it, and take it away."""
    if nodes == 1:
        with brokers.broker(setup=brokers.Setup()) as broker:
            yield OneNode(broker)
    else:
        with cluster(nodes, links=True, tick=TICK, config=AUTOHEAL) as made:
            yield SeveralNodes(made)


class Road:
    """A way to all nodes, in an order of its own: a proxy to each, struck as one."""

    def __init__(self, proxies: Sequence[Proxy]) -> None:
        self.proxies = proxies

    @property
    def url(self) -> str:
        return joined([one.url for one in self.proxies])

    @property
    def connections(self) -> list[Connection]:
        return [connection for one in self.proxies for connection in one.connections]

    def with_role(self, role: str) -> list[Connection]:
        return [connection for one in self.proxies for connection in one.with_role(role)]

    def both(self, **faults: object) -> None:
        for one in self.proxies:
            one.both(**faults)

    def freeze(self) -> None:
        self.both(frozen=True)

    def thaw(self) -> None:
        for one in self.proxies:
            one.thaw()

    def reset(self) -> None:
        for one in self.proxies:
            one.reset()

    def refuse(self) -> None:
        for one in self.proxies:
            one.refuse()

    def allow(self) -> None:
        for one in self.proxies:
            one.allow()


async def road(stack: AsyncExitStack, urls: Sequence[str]) -> Road:
    return Road([await stack.enter_async_context(proxy(url)) for url in urls])
