"""Places to run a test of clients and workers in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from rpcq import Client, Service, Worker
from support.broker import Broker


@dataclass(frozen=True)
class Place:
    """A broker, the kind of request queue, and how to cut all its connections.

    Attributes:
        cut: ends every connection of the given clients and workers, from outside where that is possible.
    """

    url: str
    namespace: str
    queue_type: Literal["classic", "quorum"]
    cut: Callable[..., Awaitable[None]]

    def service(self, name: str = "things", **options: Any) -> Service:
        return Service(name, queue_type=self.queue_type, **options)

    def client(self, **options: Any) -> Client:
        return Client(self.url, namespace=self.namespace, **options)

    def worker(self, *services: Service, **options: Any) -> Worker:
        return Worker(*services, url=self.url, namespace=self.namespace, **options)


async def lose(worker: Worker) -> None:
    """Have the broker lose a worker that cannot tell anybody: its connections end first."""
    await worker._transport.close()
    await worker.stop()


async def cut_memory(*ends: Client | Worker) -> None:
    ends[0]._transport._broker.drop_connections()  # type: ignore[attr-defined]  # the memory transport's


def cut_rabbitmq(broker: Broker, url: str) -> Callable[..., Awaitable[None]]:
    async def cut(*ends: Client | Worker) -> None:
        if broker.can_ctl:
            await asyncio.to_thread(broker.close_connections, url)
            return
        for end in ends:  # a broker that only lends us a URL: reset our own sockets
            for session in (end._transport._consuming, end._transport._publishing):  # type: ignore[attr-defined]
                session._link.protocol.abort()

    return cut
