"""The transport of `memory://`: it needs no RabbitMQ, and keeps RabbitMQ's rules.

Each session has an inbox for what it published or settled; see `broker`.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from rpcq import logs
from rpcq.errors import BrokerError, ClosedError, ProtocolError, UsageError
from rpcq.options import ConnectionOptions
from rpcq.transport.base import Delivery, Listener, Outgoing, Published, Subscription
from rpcq.transport.memory.broker import MemoryBroker, forget, shared
from rpcq.transport.memory.queues import Connection, Handed
from rpcq.wire.properties import MalformedProperties
from rpcq.wire.topology import Exchange, Queue

log = logs.get_logger("rpcq.transport")

HIGH_WATER: Final = 1024
"""Messages in a transport's inbox; above it, `can_publish` is false until the next iteration of the loop."""

PAUSE: Final = (0.010, 0.050)
"""The shortest and longest pause in seconds before a lost session is opened again."""


class _Consuming:
    """One consuming session; it settles its deliveries, and ignores those that are settled after its end."""

    __slots__ = ("_broker", "_gone_back", "_inbox", "_lose", "_max_body", "_posted", "connection", "up")

    def __init__(self, broker: MemoryBroker, max_body: int, lose: Callable[[BrokerError], None]) -> None:
        self.connection = Connection()
        self.up = True
        self._broker = broker
        self._max_body = max_body
        self._lose = lose
        self._inbox: deque[tuple[int, bool, bool]] = deque()
        self._gone_back: set[int] = set()
        self._posted = False

    def subscribe(self, subscription: Subscription, queue: str) -> None:
        on_delivery, max_body = subscription.on_delivery, self._max_body

        def deliver(handed: Handed) -> None:
            if not self.up:
                return
            consumer, tag, entry = handed
            if consumer.cancelled and tag not in self.connection.unacked:
                return  # it has gone back
            properties = consumer.properties(entry) if entry.deliveries else entry.properties
            size = len(entry.body)
            body = entry.body if size <= max_body else None
            on_delivery(Delivery(self, tag, entry.deliveries > 0, properties, body, size, entry.exchange))

        self._broker.vhost.consume(
            queue,
            self.connection,
            deliver,
            prefetch=subscription.prefetch,
            no_ack=subscription.no_ack,
            now=self._broker.now(),
        )

    def settle(self, tag: int, accept: bool, requeue: bool) -> None:
        if not self.up or tag in self._gone_back:
            return
        self._inbox.append((tag, accept, requeue))
        if not self._posted:
            self._posted = True
            self._broker.post(self)

    async def settled(self) -> bool:
        """Wait until what is settled now is worked off; returns whether the session is still up."""
        while self.up and self._inbox:  # noqa: ASYNC110 - it ends with the next iteration of the loop
            await asyncio.sleep(0)
        return self.up

    def hand_over(self, queue: str, now: float) -> None:
        """End the consumer of a queue."""
        self.work_off(now)
        for consumer in [each for each in self.connection.consumers if each.queue.name == queue]:
            self._gone_back.update(self._broker.vhost.hand_over(consumer, now))

    def work_off(self, now: float) -> None:
        self._posted = False
        inbox, settle, connection = self._inbox, self._broker.vhost.settle, self.connection
        while inbox and self.up:
            tag, accept, requeue = inbox.popleft()
            try:
                settle(connection, tag, accept, requeue, now)
            except BrokerError as error:
                self._lose(error)


class _Publishing:
    """One publishing session."""

    __slots__ = ("_broker", "_inbox", "_lose", "_posted", "_room", "up")

    def __init__(self, broker: MemoryBroker, room: asyncio.Event, lose: Callable[[BrokerError], None]) -> None:
        self.up = True
        self._broker = broker
        self._room = room
        self._lose = lose
        self._inbox: deque[Outgoing] = deque()
        self._posted = False

    @property
    def ready(self) -> bool:
        return self.up and self._broker.reason is None and len(self._inbox) < HIGH_WATER

    def publish(self, message: Outgoing) -> None:
        if not self.up:
            message.on_published(Published.UNSENT)
            return
        self._inbox.append(message)
        self.post()

    def post(self) -> None:
        if not self._posted and self._inbox:
            self._posted = True
            self._broker.post(self)

    def work_off(self, now: float) -> None:
        """Publish what is in the inbox now; messages that callbacks add wait for the next iteration of the loop."""
        inbox, publish = self._inbox, self._broker.vhost.publish
        count = 0 if self._broker.reason is not None else len(inbox)
        try:
            while count and inbox:
                count -= 1
                message = inbox.popleft()
                try:
                    published = publish(
                        message.exchange, message.routing_key, message.properties, message.body, message.mandatory, now
                    )
                except (BrokerError, MalformedProperties) as error:
                    cause = error if isinstance(error, BrokerError) else ProtocolError(f"SYNTAX_ERROR - {error}")
                    cause.__cause__ = None if cause is error else error
                    self.up = False
                    message.on_published(Published.UNKNOWN)
                    self._lose(cause)
                else:
                    message.on_published(published)
        finally:
            self._posted = False
            self._room.set()
            if self._broker.reason is None:
                self.post()

    def end(self) -> None:
        self.up = False
        while self._inbox:
            self._inbox.popleft().on_published(Published.UNSENT)


class MemoryTransport:
    """A transport to a broker in this process; see `rpcq.transport.base.Transport`.

    Args:
        broker: the broker to use; or a name: transports with the same name in the same event loop share a broker, which
            exists from the start of the first one to the close of the last one.
        options: only `max_body` is used; the others are about sockets.

    """

    def __init__(self, broker: MemoryBroker | str, options: ConnectionOptions) -> None:
        self.consuming: _Consuming | None = None
        self._publishing: _Publishing | None = None
        self._room = asyncio.Event()
        self._given = broker
        self._options = options
        self._broker: MemoryBroker  # this and the next four are set by `start`
        self._listener: Listener
        self._exchanges: tuple[Exchange, ...]
        self._subscriptions: tuple[Subscription, ...]
        self._further: tuple[Queue, ...]  # declared, and not consumed
        self._started = False
        self._stopped = False
        self._closed = False
        self._returns: dict[Callable[[], None], asyncio.TimerHandle] = {}

    @property
    def can_publish(self) -> bool:
        """Whether the publishing session is up, not blocked, and its inbox below the high-water mark."""
        return self._publishing is not None and self._publishing.ready

    async def start(
        self,
        exchanges: Sequence[Exchange],
        subscriptions: Sequence[Subscription],
        listener: Listener,
        queues: Sequence[Queue] = (),
    ) -> None:
        """Declare and consume; see `Transport.start`.

        Raises:
            ClosedError: it was closed before.
            UsageError: it was started before, or its broker is in use in another event loop.
            AccessRefused: a name is one of RabbitMQ's own.
            TopologyMismatch: a queue exists with other arguments.

        """
        if self._closed:
            raise ClosedError("the transport is closed")
        if self._started:
            raise UsageError("the transport was started before")
        broker = self._given if isinstance(self._given, MemoryBroker) else shared(self._given)
        broker.attach(self)
        self._broker, self._listener = broker, listener
        self._exchanges, self._subscriptions, self._further = tuple(exchanges), tuple(subscriptions), tuple(queues)
        try:
            names = self._declare()
        except BrokerError:
            self._leave()
            raise
        self._started = True
        # The first request may need a reply at once: the publishing session opens first.
        self._open_publishing()
        listener.consuming(names)

    async def declare(self, exchanges: Sequence[Exchange]) -> None:
        """Declare further exchanges; see `Transport.declare`."""
        await self.writable()
        for exchange in exchanges:
            self._broker.vhost.declare_exchange(exchange)
        self._exchanges = (*self._exchanges, *(each for each in exchanges if each not in self._exchanges))

    def publish(self, message: Outgoing) -> None:
        """Send a message; see `Transport.publish`."""
        if self._publishing is None:
            message.on_published(Published.UNSENT)
        else:
            self._publishing.publish(message)

    async def writable(self) -> None:
        """Wait until `can_publish`; see `Transport.writable`. After `close` it waits forever: cancel its task."""
        while not self.can_publish:
            self._room.clear()
            await self._room.wait()

    async def stop_consuming(self) -> None:
        """Cancel the consumers; see `Transport.stop_consuming`. A session that is lost later is not opened again."""
        self._stopped = True
        self._forget(self._open_consuming)
        if self.consuming is None:
            return
        in_order = {each.queue.name for each in self._subscriptions if each.in_order}
        for consumer in [*self.consuming.connection.consumers]:
            if consumer.queue.name not in in_order:
                self._broker.vhost.cancel(consumer, self._broker.now())
        self._broker.deliver()  # what was handed to the consumers before
        self._broker.schedule()  # another consumer may have become the single active one

    async def settled(self, queue: str) -> bool:  # noqa: ARG002 - a session has one inbox for all its queues
        """Wait until the broker has the acknowledgements; see `Transport.settled`."""
        return self.consuming is not None and await self.consuming.settled()

    async def hand_over(self, queue: str, *, again: bool = False) -> None:
        """End a consumer whose queue is in order; see `Transport.hand_over`."""
        session = self.consuming
        if session is None or self._closed:
            return
        session.hand_over(queue, self._broker.now())
        if again and not self._stopped and session.up:
            for subscription in self._subscriptions:
                if subscription.queue.name == queue:
                    session.subscribe(subscription, queue)
        self._broker.schedule()  # another consumer may have become the single active one

    async def close(self) -> None:
        """Work off what is pending, then close; see `Transport.close`. The listener is not called."""
        if self._closed:
            return
        self._closed = True
        self._forget(self._open_consuming)
        self._forget(self._open_publishing)
        if not self._started:
            return
        await self.stop_consuming()
        publishing, now = self._publishing, self._broker.now()
        if publishing is not None:
            publishing.up = False
            publishing.work_off(now)
        if self.consuming is not None:
            self.consuming.work_off(now)  # includes acknowledgements of requests whose replies were just confirmed
        if publishing is not None:
            publishing.end()
        self._publishing = None
        self._leave()

    def vanish(self) -> None:
        """End as if the process was killed: what the broker has not worked off yet never reaches it.

        The listener is not called; `on_published` of every message has been called at the end. `close` does nothing
        then.
        """
        if self._closed:
            return
        self._closed = self._stopped = True
        self._forget(self._open_consuming)
        self._forget(self._open_publishing)
        publishing, self._publishing = self._publishing, None
        if publishing is not None:
            publishing.end()
        if self._started:
            self._leave()

    def now_ms(self) -> int:
        """The time of the broker; see `Transport.now_ms`."""
        return round(self._broker.wall().timestamp() * 1000)

    async def sleep_until(self, ms: int) -> None:
        """Wait until the broker's time is at least this; see `Transport.sleep_until`."""
        await self._broker.sleep_until(ms)

    def lose_consuming(self, cause: BrokerError) -> None:
        """End the consuming session; it is opened again."""
        if self.consuming is None:
            return
        self._broker.disconnect((self.consuming,))
        self.consuming = None
        self._listener.consuming_lost(cause)
        if not self._stopped:
            self._come_back(self._open_consuming)

    def lose_publishing(self, cause: BrokerError) -> None:
        """End the publishing session; it is opened again."""
        publishing, self._publishing = self._publishing, None
        if publishing is None:
            return
        publishing.end()
        self._listener.publishing_lost(cause)
        if not self._closed:
            self._come_back(self._open_publishing)

    def on_blocked(self) -> None:
        """Report to the listener that the broker takes no messages, if it takes none."""
        if self._publishing is not None and self._broker.reason is not None:
            self._listener.publishing_blocked(self._broker.reason)

    def on_unblocked(self) -> None:
        """Report to the listener that the broker takes messages again."""
        if self._publishing is not None:
            self._publishing.post()
            self._room.set()
            self._listener.publishing()

    def _open_publishing(self) -> None:
        self._publishing = _Publishing(self._broker, self._room, self.lose_publishing)
        self._room.set()
        self._listener.publishing()
        self.on_blocked()

    def _open_consuming(self) -> None:
        try:
            queues = self._declare()
        except BrokerError as error:
            log.error("cannot come back yet", role="consuming", cause=str(error), error=type(error).__name__)  # noqa: TRY400 - the cause says all; no traceback
            self._come_back(self._open_consuming)
        else:
            self._listener.consuming(queues)

    def _declare(self) -> list[str]:
        """Open a consuming session; returns the names of its queues."""
        broker = self._broker
        session = self.consuming = _Consuming(broker, self._options.max_body, self.lose_consuming)
        try:
            for exchange in self._exchanges:
                broker.vhost.declare_exchange(exchange)
            for further in self._further:
                broker.vhost.declare_queue(further, session.connection)
            queues = [
                broker.vhost.declare_queue(each.queue.for_session(), session.connection) for each in self._subscriptions
            ]
            for subscription, queue in zip(self._subscriptions, queues, strict=True):
                session.subscribe(subscription, queue)
        except BrokerError:
            broker.disconnect((session,))
            self.consuming = None
            raise
        broker.schedule()
        return queues

    def _come_back(self, reopen: Callable[[], None]) -> None:
        pause = random.uniform(*PAUSE)  # noqa: S311 - jitter, so that transports do not open at the same time
        self._returns[reopen] = self._broker.loop.call_later(pause, reopen)

    def _forget(self, reopen: Callable[[], None]) -> None:
        if handle := self._returns.pop(reopen, None):
            handle.cancel()

    def _leave(self) -> None:
        loop = self._broker.loop
        was_last = self._broker.detach(self)
        self.consuming = None
        if was_last and isinstance(self._given, str):
            forget(loop, self._given)
