"""The in-process broker: a `Transport` that needs no RabbitMQ and keeps its rules.

`physics` knows what becomes of messages; this is the asyncio around it. Whatever transports publish and settle waits in
their inboxes until the loop's next iteration, and is then worked off in one callback for all of them: no message costs
a task, and no callback is ever called from inside `publish`, `ack` or `reject`.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Final
from weakref import WeakKeyDictionary, WeakValueDictionary

import structlog

from rpcq.errors import BrokerError, BrokerUnreachable, ClosedError, ProtocolError, UsageError
from rpcq.options import ConnectionOptions
from rpcq.transport.base import Delivery, Listener, Outgoing, Published, Subscription
from rpcq.transport.memory.vhost import Connection, Handed, Vhost
from rpcq.wire.properties import MalformedProperties
from rpcq.wire.topology import Exchange

log = structlog.get_logger("rpcq.transport")

HIGH_WATER: Final = 1024
"""Messages in a transport's inbox from which on it `can_publish` no more, until the loop's next iteration."""

PAUSE: Final = (0.010, 0.050)
"""Seconds, at least and at most, until a session that was lost comes back."""

_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[str, MemoryBroker]] = WeakKeyDictionary()


class MemoryBroker:
    """Exchanges and queues that live in this process, in one event loop, as long as a transport or somebody holds them.

    Besides what transports use, it has hooks for tests: to look at queues, and to fail as a broker fails.
    """

    def __init__(self) -> None:
        self._vhost = Vhost(lambda: datetime.now(UTC))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._transports: dict[MemoryTransport, None] = {}
        self._inboxes: deque[_Publishing | _Consuming] = deque()
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._reason: str | None = None

    @property
    def queues(self) -> tuple[str, ...]:
        """The names of all queues."""
        return tuple(self._vhost.queues)

    def depth(self, queue: str) -> int:
        """How many messages of a queue are ready: neither handed out nor, as far as the head is concerned, expired."""
        return len(self._vhost.queues[queue].ready)

    @classmethod
    def named(cls, name: str) -> MemoryBroker | None:
        """The one that transports of this name share in the running event loop, if any is open."""
        named = _shared.get(asyncio.get_running_loop())
        return None if named is None else named.get(name)

    def consumers(self, queue: str) -> int:
        """How many consumers a queue has."""
        return len(self._vhost.queues[queue].consumers)

    def drop_connections(self) -> None:
        """Reset every connection. Transports come back by themselves, each session within `PAUSE`."""
        cause = BrokerUnreachable("the in-process broker dropped the connection")
        transports = [*self._transports]
        # All at once, or else one transport would be handed what another one lost in the same moment.
        self.disconnect(transport.consuming for transport in transports)
        for transport in transports:
            transport.lose_consuming(cause)
            transport.lose_publishing(cause)

    def block(self, reason: str) -> None:
        """Take nothing that is published until `unblock`, as RabbitMQ does under a memory or disk alarm."""
        self._reason = reason
        for transport in [*self._transports]:
            transport.tell_blocked()

    def unblock(self) -> None:
        """End what `block` began."""
        self._reason = None
        for transport in [*self._transports]:
            transport.tell_unblocked()

    # ------------------------------------------------------------------------------------------- for transports

    @property
    def reason(self) -> str | None:
        """Why nothing that is published is taken, or None."""
        return self._reason

    @property
    def vhost(self) -> Vhost:
        """The exchanges and queues. Who changes them calls `schedule` afterwards."""
        return self._vhost

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of all its transports."""
        if self._loop is None:
            raise UsageError("no transport of this broker is open")
        return self._loop

    def attach(self, transport: MemoryTransport) -> None:
        """Let a transport in.

        Raises:
            UsageError: transports in another event loop use this broker.

        """
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise UsageError("transports in another event loop use this broker; each loop needs one of its own")
        self._loop = loop
        self._transports[transport] = None
        self.schedule()

    def detach(self, transport: MemoryTransport) -> bool:
        """Let a transport go; whether it was the last one."""
        self.disconnect((transport.consuming,))
        self._transports.pop(transport, None)
        if self._transports:
            return False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop = None
        self._scheduled = False
        return True

    def post(self, inbox: _Publishing | _Consuming) -> None:
        """Work off an inbox in the loop's next iteration."""
        self._inboxes.append(inbox)
        self.schedule()

    def schedule(self) -> None:
        """Deliver what is to be delivered, in the loop's next iteration."""
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._process)

    def deliver(self) -> None:
        """Deliver what was handed out."""
        outbox = self._vhost.outbox
        while outbox:
            handed = outbox.popleft()
            handed[0].deliver(handed)

    def disconnect(self, sessions: Iterable[_Consuming | None]) -> None:
        """End sessions, all at once; those that have ended stay so."""
        open_sessions = [session for session in sessions if session is not None]
        for session in open_sessions:
            session.up = False
        self._vhost.disconnect([session.connection for session in open_sessions], self.loop.time())
        self.schedule()

    def _process(self) -> None:
        self._scheduled = False
        if self._loop is None:
            return
        now = self._loop.time()
        inboxes, count = self._inboxes, len(self._inboxes)
        try:
            while count and inboxes:
                count -= 1
                inboxes.popleft().work_off(now)
            self.deliver()
        finally:
            # If a callback raised all the same, the loop is told, and nobody else's messages are lost.
            if inboxes or self._vhost.outbox:
                self.schedule()
            self._set_timer()

    def _set_timer(self) -> None:
        due = self._vhost.next_expiry
        if due is None or self._loop is None:
            return
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._expire, due)

    def _expire(self, due: float) -> None:
        self._timer = None
        self._vhost.expire(max(due, self.loop.time()))  # timers may fire early by the resolution of the clock
        self.schedule()


class _Consuming:
    """One consuming session; takes the settlements of its deliveries, and drops those that come after its end."""

    __slots__ = ("_broker", "_inbox", "_lose", "_max_body", "_posted", "connection", "up")

    def __init__(self, broker: MemoryBroker, max_body: int, lose: Callable[[BrokerError], None]) -> None:
        self.connection = Connection()
        self.up = True
        self._broker = broker
        self._max_body = max_body
        self._lose = lose
        self._inbox: deque[tuple[int, bool, bool]] = deque()
        self._posted = False

    def subscribe(self, subscription: Subscription, queue: str) -> None:
        on_delivery, max_body = subscription.on_delivery, self._max_body

        def deliver(handed: Handed) -> None:
            if not self.up:
                return
            consumer, tag, entry = handed
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
            now=self._broker.loop.time(),
        )

    def settle(self, tag: int, accept: bool, requeue: bool) -> None:
        if not self.up:
            return
        self._inbox.append((tag, accept, requeue))
        if not self._posted:
            self._posted = True
            self._broker.post(self)

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
        """Publish what was in the inbox when this began; what comes meanwhile has its turn in the next iteration."""
        inbox, publish = self._inbox, self._broker.vhost.publish
        count = 0 if self._broker.reason is not None else len(inbox)
        try:
            while count and inbox:
                count -= 1
                message = inbox.popleft()
                try:
                    settled = publish(
                        message.exchange, message.routing_key, message.properties, message.body, message.mandatory, now
                    )
                except (BrokerError, MalformedProperties) as error:
                    cause = error if isinstance(error, BrokerError) else ProtocolError(f"SYNTAX_ERROR - {error}")
                    cause.__cause__ = None if cause is error else error
                    self.up = False
                    message.on_published(Published.UNKNOWN)
                    self._lose(cause)
                else:
                    message.on_published(settled)
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
        broker: whose it is; or a name: transports with the same name in the same event loop share a broker, which is
            there from the start of the first one to the end of the last one.
        options: `max_body` counts; the rest is about sockets.

    """

    def __init__(self, broker: MemoryBroker | str, options: ConnectionOptions) -> None:
        self.consuming: _Consuming | None = None
        self._publishing: _Publishing | None = None
        self._room = asyncio.Event()
        self._given = broker
        self._options = options
        self._broker: MemoryBroker  # this and the next three are there once it has started
        self._listener: Listener
        self._exchanges: tuple[Exchange, ...]
        self._subscriptions: tuple[Subscription, ...]
        self._started = False
        self._stopped = False
        self._closed = False
        self._returns: dict[Callable[[], None], asyncio.TimerHandle] = {}

    @property
    def can_publish(self) -> bool:
        """Whether the publishing session is up, not blocked, and its inbox below the high-water mark."""
        return self._publishing is not None and self._publishing.ready

    async def start(
        self, exchanges: Sequence[Exchange], subscriptions: Sequence[Subscription], listener: Listener
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
        broker = self._find()
        broker.attach(self)
        self._broker, self._listener = broker, listener
        self._exchanges, self._subscriptions = tuple(exchanges), tuple(subscriptions)
        try:
            queues = self._declare()
        except BrokerError:
            self._leave()
            raise
        self._started = True
        # Replies are sent as soon as requests come: the way out is there before the way in.
        self._open_publishing()
        listener.consuming(queues)

    def publish(self, message: Outgoing) -> None:
        """Send a message; see `Transport.publish`."""
        if self._publishing is None:
            message.on_published(Published.UNSENT)
        else:
            self._publishing.publish(message)

    async def writable(self) -> None:
        """Wait until `can_publish`; see `Transport.writable`. It never can once closed: cancel who waits."""
        while not self.can_publish:
            self._room.clear()
            await self._room.wait()

    async def stop_consuming(self) -> None:
        """Cancel the consumers; see `Transport.stop_consuming`. A session lost after that does not come back."""
        self._stopped = True
        self._forget(self._open_consuming)
        if self.consuming is None:
            return
        for consumer in [*self.consuming.connection.consumers]:
            self._broker.vhost.cancel(consumer)
        self._broker.deliver()  # what was on its way before

    async def close(self) -> None:
        """Work off what is pending, then close; see `Transport.close`. The listener is told nothing of it."""
        if self._closed:
            return
        self._closed = True
        self._forget(self._open_consuming)
        self._forget(self._open_publishing)
        if not self._started:
            return
        await self.stop_consuming()
        publishing, now = self._publishing, self._broker.loop.time()
        if publishing is not None:
            publishing.up = False
            publishing.work_off(now)
        if self.consuming is not None:
            self.consuming.work_off(now)  # among it, what was acknowledged because its reply is confirmed
        if publishing is not None:
            publishing.end()
        self._publishing = None
        self._leave()

    def lose_consuming(self, cause: BrokerError) -> None:
        """End the consuming session; it comes back."""
        if self.consuming is None:
            return
        self._broker.disconnect((self.consuming,))
        self.consuming = None
        self._listener.consuming_lost(cause)
        if not self._stopped:
            self._come_back(self._open_consuming)

    def lose_publishing(self, cause: BrokerError) -> None:
        """End the publishing session; it comes back."""
        publishing, self._publishing = self._publishing, None
        if publishing is None:
            return
        publishing.end()
        self._listener.publishing_lost(cause)
        if not self._closed:
            self._come_back(self._open_publishing)

    def tell_blocked(self) -> None:
        """Tell the listener that the broker takes nothing."""
        if self._publishing is not None and self._broker.reason is not None:
            self._listener.publishing_blocked(self._broker.reason)

    def tell_unblocked(self) -> None:
        """Tell the listener that the broker takes messages again."""
        if self._publishing is not None:
            self._publishing.post()
            self._room.set()
            self._listener.publishing()

    def _open_publishing(self) -> None:
        self._publishing = _Publishing(self._broker, self._room, self.lose_publishing)
        self._room.set()
        self._listener.publishing()
        self.tell_blocked()

    def _open_consuming(self) -> None:
        try:
            queues = self._declare()
        except BrokerError as error:
            log.error("cannot come back yet", role="consuming", cause=str(error), error=type(error).__name__)  # noqa: TRY400 - its cause is all there is to it
            self._come_back(self._open_consuming)
        else:
            self._listener.consuming(queues)

    def _declare(self) -> list[str]:
        """Open a consuming session; the names of its queues."""
        broker = self._broker
        session = self.consuming = _Consuming(broker, self._options.max_body, self.lose_consuming)
        try:
            for exchange in self._exchanges:
                broker.vhost.declare_exchange(exchange)
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
        pause = random.uniform(*PAUSE)  # noqa: S311 - jitter, so that transports do not come in step
        self._returns[reopen] = self._broker.loop.call_later(pause, reopen)

    def _forget(self, reopen: Callable[[], None]) -> None:
        if handle := self._returns.pop(reopen, None):
            handle.cancel()

    def _find(self) -> MemoryBroker:
        if isinstance(self._given, MemoryBroker):
            return self._given
        named = _shared.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
        broker = named.get(self._given)
        if broker is None:
            broker = named[self._given] = MemoryBroker()
        return broker

    def _leave(self) -> None:
        loop = self._broker.loop
        was_last = self._broker.detach(self)
        self.consuming = None
        if was_last and isinstance(self._given, str):
            del _shared[loop][self._given]
