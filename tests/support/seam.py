"""The seam under test: transports of one kind, opened with given queues, and everything that they report."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rpcq.errors import BrokerError, BrokerUnreachable
from rpcq.options import ConnectionOptions
from rpcq.transport.base import Delivery, Listener, Message, Published, Subscription, Transport
from rpcq.transport.opening import open_transport
from rpcq.wire.properties import Properties, encode
from rpcq.wire.topology import Exchange, Queue

SECONDS = 10.0
"""The longest time in seconds that anything expected may take."""


async def until(condition: Callable[[], Any]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - no event is set for it
            await asyncio.sleep(0.002)


class Inbox:
    """The deliveries of one queue: all of them, and one by one."""

    def __init__(self) -> None:
        self.all: list[Delivery] = []
        self._next: asyncio.Queue[Delivery] = asyncio.Queue()

    def put(self, delivery: Delivery) -> None:
        self.all.append(delivery)
        self._next.put_nowait(delivery)

    async def next(self) -> Delivery:
        async with asyncio.timeout(SECONDS):
            return await self._next.get()

    @property
    def bodies(self) -> list[bytes | None]:
        return [delivery.body for delivery in self.all]


class End:
    """One transport and everything that it reported.

    Attributes:
        events: the calls of the listener, in order, each with its session.
        names: the names of the queues of the latest consuming session.
        inboxes: one for each queue.
        published: what became of the published messages, in the order of the reports.
    """

    def __init__(self, transport: Transport, queues: Sequence[Queue | Subscription]) -> None:
        self.transport = transport
        self.events: list[tuple[str, str]] = []
        self.causes: list[BrokerError] = []
        self.names: list[str] = []
        self.inboxes: list[Inbox] = []
        self.published: list[Published] = []
        self._barriers = Inbox()
        self._subscriptions = [self._subscription(queue) for queue in queues]

    async def start(self, exchanges: Sequence[Exchange] = ()) -> None:
        barrier = Queue(name="", exclusive=True, auto_delete=True)
        own = Subscription(barrier, self._barriers.put, no_ack=True)
        async with asyncio.timeout(SECONDS):
            await self.transport.start(exchanges, [*self._subscriptions, own], self.listener())

    def listener(self) -> Listener:
        return Listener(
            consuming=self._consuming,
            consuming_lost=lambda cause: self._lost("consuming", cause),
            publishing=lambda: self.events.append(("publishing", "up")),
            publishing_lost=lambda cause: self._lost("publishing", cause),
            publishing_blocked=lambda _: self.events.append(("publishing", "blocked")),
        )

    @property
    def inbox(self) -> Inbox:
        """The inbox of the first queue."""
        return self.inboxes[0]

    def of(self, session: str) -> list[str]:
        """The events of one session."""
        return [what for which, what in self.events if which == session]

    def publish(
        self, key: str, body: bytes = b"", *, exchange: str = "", mandatory: bool = True, **properties: Any
    ) -> asyncio.Future[Published]:
        """Publish; the future gets what becomes of the message. A second report raises inside the transport."""
        outcome: asyncio.Future[Published] = asyncio.get_running_loop().create_future()

        def on_published(published: Published) -> None:
            self.published.append(published)
            outcome.set_result(published)

        correlation_id = properties.setdefault("correlation_id", secrets.token_hex(6).encode())
        raw = encode(Properties(**properties))
        self.transport.publish(
            Message(exchange.encode(), key.encode(), correlation_id, raw, body, on_published, mandatory)
        )
        return outcome

    async def sent(self, key: str, body: bytes = b"", **options: Any) -> Published:
        """Publish, and wait for what becomes of the message."""
        async with asyncio.timeout(SECONDS):
            return await self.publish(key, body, **options)

    async def barrier(self) -> None:
        """Wait until all messages that the broker has for this end now are delivered.

        A message goes to a separate queue of this end and comes back on the same connection as the others. Each queue
        has a channel of its own, and RabbitMQ writes each one's frames when it comes to it: so each is asked, too.
        """
        assert await self.sent(self.names[-1]) is Published.CONFIRMED
        await self._barriers.next()
        transport: Any = self.transport
        if hasattr(transport, "lose_consuming"):
            return
        session = transport._consuming
        channels = [channel for channel, _ in session._consumers]
        channels += [found.channel for found in session._in_order.values()]
        async with asyncio.timeout(SECONDS):
            for channel in channels:
                await channel.declare_queue(self.names[-1], passive=True)

    async def gone(self, queue: str) -> None:
        """Wait until the broker returns what is sent to a queue of somebody who has left.

        RabbitMQ 4.3 may refuse it for a moment: the process of the queue has ended, and its name is still there.
        """
        async with asyncio.timeout(SECONDS):
            while (published := await self.publish(queue)) is not Published.RETURNED:
                assert published is Published.REFUSED

    def cut(self) -> None:
        """Reset both connections, as a network can do."""
        self.cut_one("consuming")
        self.cut_one("publishing")

    def cut_one(self, session: str) -> None:
        transport: Any = self.transport
        if hasattr(transport, "lose_consuming"):  # the in-process broker has no socket
            cause = BrokerUnreachable("cut by a test")
            transport.lose_consuming(cause) if session == "consuming" else transport.lose_publishing(cause)
        else:
            getattr(transport, f"_{session}")._link.protocol.abort()

    async def back(self, times: int = 2) -> None:
        """Wait until both sessions have come up this many times."""
        await until(lambda: self.of("consuming").count("up") == self.of("publishing").count("up") == times)

    def _subscription(self, queue: Queue | Subscription) -> Subscription:
        inbox = Inbox()
        self.inboxes.append(inbox)
        if isinstance(queue, Queue):
            return Subscription(queue, inbox.put)
        return replace(queue, on_delivery=inbox.put)

    def _consuming(self, names: Sequence[str]) -> None:
        self.names = [*names]
        self.events.append(("consuming", "up"))

    def _lost(self, session: str, cause: BrokerError) -> None:
        self.causes.append(cause)
        self.events.append((session, "lost"))


def taken(queue: Queue, prefetch: int = 0, *, no_ack: bool = False, in_order: bool = False) -> Subscription:
    """A queue, and how to consume it."""
    return Subscription(queue, lambda _: None, prefetch, no_ack, in_order=in_order)


@dataclass
class Seam:
    """A place where transports of one kind are opened.

    Attributes:
        lasting: names of queues that stay after their consumers, and must be deleted.
    """

    url: str
    namespace: str
    lasting: list[str] = field(default_factory=list)

    @property
    def in_memory(self) -> bool:
        return self.url.startswith("memory:")

    @property
    def requests(self) -> Exchange:
        return Exchange(f"{self.namespace}.requests")

    def queue(self, name: str = "q", *, lasts: bool = False, key: str | None = None, **arguments: Any) -> Queue:
        """A queue for all transports, deleted with its last consumer, or after the test if it `lasts`.

        `key` binds it to `requests`. Arguments are those of `queue.declare`, with _ for -.
        """
        full = f"{self.namespace}.{name}"
        if lasts:
            self.lasting.append(full)
        return Queue(
            full,
            durable=True,
            auto_delete=not lasts,
            arguments={name.replace("_", "-"): value for name, value in arguments.items()},
            bindings=() if key is None else ((self.requests.name, key),),
        )

    def requests_queue(self, key: str, *, quorum: bool = False) -> Queue:
        """A queue that sends requests that it gives up back to their senders."""
        if quorum:
            more: dict[str, Any] = {"x_queue_type": "quorum", "x_delivery_limit": 0}
            return self.queue(lasts=True, key=key, x_dead_letter_exchange="", **more)
        return self.queue(key=key, x_dead_letter_exchange="")

    def own_queue(self) -> Queue:
        """A queue for one transport only, named by the broker."""
        return Queue(name="", exclusive=True, auto_delete=True)

    def transport(self, **options: Any) -> Transport:
        return open_transport(self.url, ConnectionOptions(namespace=self.namespace, **options))

    def end(self, *queues: Queue | Subscription, **options: Any) -> End:
        """An end that is not started yet."""
        return End(self.transport(**options), queues)

    @asynccontextmanager
    async def opened(self, *queues: Queue | Subscription, **options: Any) -> AsyncIterator[End]:
        end = self.end(*queues, **options)
        await end.start([self.requests])
        try:
            yield end
        finally:
            async with asyncio.timeout(SECONDS):
                await end.transport.close()
