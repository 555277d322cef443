"""The transport over RabbitMQ: one session that consumes, and one that publishes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rpcq.errors import ClosedError
from rpcq.options import ConnectionOptions
from rpcq.runtime import clock
from rpcq.transport.base import Listener, Outgoing, Published, Subscription
from rpcq.transport.rabbitmq.consuming import ConsumingSession
from rpcq.transport.rabbitmq.publishing import PublishingSession
from rpcq.url import BrokerURL
from rpcq.wire.topology import Exchange, Queue


class RabbitMQTransport:
    """A transport over RabbitMQ; see `rpcq.transport.base.Transport`."""

    def __init__(self, url: BrokerURL, options: ConnectionOptions) -> None:
        self._url = url
        self._options = options
        self._consuming: ConsumingSession | None = None
        self._publishing: PublishingSession | None = None
        self._closed = False

    @property
    def can_publish(self) -> bool:
        """Whether a message may be published now; see `Transport.can_publish`."""
        return self._publishing is not None and self._publishing.ready

    async def start(
        self,
        exchanges: Sequence[Exchange],
        subscriptions: Sequence[Subscription],
        listener: Listener,
        queues: Sequence[Queue] = (),
    ) -> None:
        """Open both sessions; see `Transport.start`."""
        if self._closed:
            raise ClosedError("the transport is closed")
        # The first request may need a reply at once: the publishing session opens first.
        self._publishing = PublishingSession(self._url, self._options, exchanges, listener)
        self._consuming = ConsumingSession(self._url, self._options, exchanges, listener, subscriptions, queues)
        try:
            for session in (self._publishing, self._consuming):
                await session.open()
        except BaseException:
            await self.close()
            raise

    async def declare(self, exchanges: Sequence[Exchange]) -> None:
        """Declare further exchanges; see `Transport.declare`."""
        if self._publishing is None:
            raise ClosedError("the transport is not open")
        await self._publishing.declare(exchanges)

    def publish(self, message: Outgoing) -> None:
        """Send a message; see `Transport.publish`."""
        if self._publishing is None:
            message.on_published(Published.UNSENT)
        else:
            self._publishing.publish(message)

    async def writable(self) -> None:
        """Wait until a message may be published; see `Transport.writable`."""
        if self._publishing is not None:
            await self._publishing.writable()

    def now_ms(self) -> int:
        """The machine's time; see `Transport.now_ms`."""
        return clock.now_ms()

    async def sleep_until(self, ms: int) -> None:
        """Wait until the machine's time is at least this; see `Transport.sleep_until`."""
        await clock.sleep_until(ms)

    async def stop_consuming(self) -> None:
        """Cancel the consumers; see `Transport.stop_consuming`."""
        if self._consuming is not None:
            await self._consuming.stop()

    async def settled(self, queue: str) -> bool:
        """Wait until the broker has the acknowledgements; see `Transport.settled`."""
        return self._consuming is not None and await self._consuming.settled(queue)

    async def hand_over(self, queue: str, *, again: bool = False) -> None:
        """End a consumer whose queue is in order; see `Transport.hand_over`."""
        if self._consuming is not None:
            await self._consuming.hand_over(queue, again=again)

    async def close(self) -> None:
        """Close both sessions; see `Transport.close`."""
        self._closed = True
        if self._publishing is not None:
            await self._publishing.drain()  # each reply that is confirmed here acknowledges its request
        sessions = [session for session in (self._consuming, self._publishing) if session is not None]
        await asyncio.gather(*(session.close() for session in sessions))
