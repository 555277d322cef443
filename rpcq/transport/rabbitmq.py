"""RabbitMQ: sessions over aio-pika, with the fast lane for messages.

A session is: connect, declare, set QoS, consume, tell that it is up. Any close of its connection or one of its
channels, and any cancel of a consumer by the broker, ends it as a whole; the next one starts after a pause. Nothing
of an old session survives into a new one.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from rpcq import logs
from rpcq.errors import BrokerError, BrokerUnreachable, ClosedError, TopologyMismatch
from rpcq.settings import ConnectionOptions
from rpcq.transport.base import Delivery, Listener, Outgoing, Settled, Subscription
from rpcq.transport.connection import (
    LaneConnection,
    LaneProtocol,
    closed_by_broker,
    connect,
    is_foreign,
    translate,
)
from rpcq.transport.lane import Encoder, Lane, Unconfirmed, Unsettled
from rpcq.transport.topology import Exchange, Queue
from rpcq.url import BrokerURL

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0
PERMANENT_PAUSE: Final = 15.0
"""Seconds: the upper bounds of the pause before the first and the n-th try, and for what somebody has to mend."""

CLOSE_TIMEOUT: Final = 2.0
"""Seconds that a polite close may take; aiormq waits three heartbeats under back-pressure."""

HIGH_WATER: Final = 256 * 1024
"""Bytes that may wait for the next write before publishers wait."""

log = logs.get_logger("rpcq.rabbitmq")
for _name in logs.QUIET:
    logs.silence(_name)


def _ignore(*_: Any) -> None:
    """For what cannot happen on a channel of this kind, or means nothing there."""


async def _never(_: AbstractIncomingMessage) -> None:
    """Aiormq's consumer: the lane takes its messages."""


class _Link:
    """One session's connection and what hangs on it; gone with it."""

    def __init__(self, connection: LaneConnection, protocol: LaneProtocol) -> None:
        self.connection = connection
        self.protocol = protocol
        self.frame_max: int = connection.transport.connection.connection_tune.frame_max  # type: ignore[union-attr]
        protocol.tuned(self.frame_max)

    async def channel(self, *, confirms: bool) -> tuple[AbstractChannel, int]:
        channel = self.connection.channel(publisher_confirms=confirms)
        await channel.initialize()
        return channel, (await channel.get_underlay_channel()).number

    async def ensure_exchange(self, exchange: Exchange) -> None:
        """Declare it, unless it is there: a user may be allowed to use an exchange and not to declare it."""
        channel, _ = await self.channel(confirms=False)
        try:
            await channel.declare_exchange(exchange.name, exchange.type, durable=True, passive=True)
        except Exception as error:
            if not isinstance(translate(error, self.protocol.lost), TopologyMismatch):
                raise
            channel, _ = await self.channel(confirms=False)
            await channel.declare_exchange(exchange.name, exchange.type, durable=True)
        await channel.close()

    async def close(self) -> None:
        """Politely where possible, but at once where not."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self.connection.close()
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            log.debug("a connection did not close politely", cause=repr(error))
        finally:
            self.protocol.fail(BrokerUnreachable("the connection was closed"))
            self.protocol.abort()


class _Session:
    """A connection that is opened again whenever it is lost. Subclasses say what is set up on it."""

    role = ""

    def __init__(
        self, url: BrokerURL, options: ConnectionOptions, exchanges: Sequence[Exchange], listener: Listener
    ) -> None:
        self._url = url
        self._options = options
        self._exchanges = exchanges
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._link: _Link | None = None
        self._up = False
        self._hosts = deque(url.hosts)
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False
        self._up_since = 0.0
        self._pause = FIRST_PAUSE
        self._closers: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Open the first session, and keep one open from then on."""
        await self._establish()

    async def close(self) -> None:
        self._closed = True
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        self._up = False
        link, self._link = self._link, None
        if link is not None:
            await link.close()
        if self._closers:
            await asyncio.wait(self._closers)

    async def _set_up(self, link: _Link) -> None:
        raise NotImplementedError

    def _told_up(self) -> None:
        raise NotImplementedError

    def _told_down(self, cause: BrokerError) -> None:
        raise NotImplementedError

    def _blocked(self, reason: str | None) -> None:
        """The broker blocks only connections that publish."""

    async def _establish(self) -> None:
        """Try each host once."""
        for attempt in range(len(self._hosts)):
            host, port = self._hosts[0]
            try:
                async with asyncio.timeout(self._options.connect_timeout):
                    await self._establish_at(host, port)
            except BrokerError as error:
                failure = error
            except TimeoutError:
                failure = BrokerUnreachable(
                    f"cannot reach {self._url.scheme}://{host}:{port}: "
                    f"it did not answer within {self._options.connect_timeout:g} s"
                )
            else:
                return
            self._hosts.rotate(-1)
            if attempt + 1 == len(self._hosts):
                raise failure

    async def _establish_at(self, host: str, port: int) -> None:
        link: _Link | None = None

        def on_lost(cause: BrokerError) -> None:
            if link is not None and link is self._link:
                self._lost(link, cause)

        def on_blocked(reason: str | None) -> None:
            if link is not None and link is self._link:
                self._blocked(reason)

        connection, protocol = await connect(self._url, host, port, self._options, self.role, on_lost, on_blocked)
        link = _Link(connection, protocol)
        try:
            for exchange in self._exchanges:
                await link.ensure_exchange(exchange)
            await self._set_up(link)
            self._check_wanted(protocol)
        except BaseException as error:
            told = protocol.lost
            self._close_later(link)
            if isinstance(error, ClosedError) or not is_foreign(error):
                raise
            cause = translate(error, told)
            self._told_down(cause)  # of what it may have delivered already
            raise cause from error
        self._link = link
        self._up = True
        self._up_since = self._loop.time()
        self._told_up()

    def _check_wanted(self, protocol: LaneProtocol) -> None:
        if protocol.lost is not None:
            raise protocol.lost
        if self._closed:
            raise ClosedError("closed while it was being opened")

    def _lost(self, link: _Link, cause: BrokerError) -> None:
        self._link = None
        self._up = False
        log.warning("session down", role=self.role, cause=str(cause))
        self._told_down(cause)
        self._close_later(link)
        self._keeper = self._loop.create_task(self._come_back())

    def _close_later(self, link: _Link) -> None:
        closer = self._loop.create_task(link.close())
        self._closers.add(closer)
        closer.add_done_callback(self._closers.discard)

    async def _come_back(self) -> None:
        if self._loop.time() - self._up_since > LONGEST_PAUSE:  # else it comes and goes: be slower each time
            self._pause = FIRST_PAUSE
        most = self._pause
        while True:
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
            await asyncio.sleep(random.uniform(0, most))  # noqa: S311 - full jitter, so that clients do not come in step
            try:
                await self._establish()
            except BrokerError as error:
                most = PERMANENT_PAUSE if error.permanent else self._pause
                say = log.error if error.permanent else log.warning
                say("cannot come back yet", role=self.role, cause=str(error), error=type(error).__name__)
            except Exception:
                most = PERMANENT_PAUSE  # a fault of rpcq's own; giving up would be one more
                log.exception("cannot come back yet", role=self.role)
            else:
                log.info("session up again", role=self.role)
                return


class _Consumed:
    """One subscription on its own channel of one session; takes its settlements."""

    __slots__ = ("_lane", "_loop", "_no_ack", "_on_delivery", "_protocol", "_scheduled", "_unsettled")

    def __init__(self, link: _Link, channel: int, subscription: Subscription, options: ConnectionOptions) -> None:
        self._loop = asyncio.get_running_loop()
        self._protocol = link.protocol
        self._unsettled = Unsettled(Encoder(channel, link.frame_max))
        self._scheduled = False
        self._on_delivery = subscription.on_delivery
        self._no_ack = subscription.no_ack
        self._lane = Lane(
            max_body=options.max_body,
            on_deliver=self._deliver,
            on_return=_ignore,
            on_confirm=_ignore,
            on_end=self._end,
        )
        link.protocol.register(channel, self._lane)

    def settle(self, tag: int, accept: bool, requeue: bool) -> None:
        if self._protocol.lost is not None or self._no_ack:
            return
        self._unsettled.settle(tag, accept=accept, requeue=requeue)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        self._protocol.write(self._unsettled.frames())

    def _deliver(self, tag: int, redelivered: bool, properties: bytes, body: bytes | None, size: int) -> None:
        if not self._no_ack:
            self._unsettled.delivered(tag)
        self._on_delivery(Delivery(self, tag, redelivered, properties, body, size))

    def _end(self, code: int, text: str) -> None:
        cause = closed_by_broker(code, text) if code else BrokerUnreachable(text)
        self._protocol.fail(cause)


class _ConsumingSession(_Session):
    role = "consuming"

    def __init__(
        self,
        url: BrokerURL,
        options: ConnectionOptions,
        exchanges: Sequence[Exchange],
        listener: Listener,
        subscriptions: Sequence[Subscription],
    ) -> None:
        super().__init__(url, options, exchanges, listener)
        self._subscriptions = subscriptions
        self._queues: list[str] = []
        self._consumers: list[tuple[AbstractChannel, str]] = []
        self._stopped = False

    async def stop(self) -> None:
        """Cancel the consumers; later sessions have none."""
        self._stopped = True
        consumers, self._consumers = self._consumers, []
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                for channel, tag in consumers:
                    await (await channel.get_underlay_channel()).basic_cancel(tag)
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            # Gone or unwilling: what it still delivers would not be answered, so the session goes as well.
            if (link := self._link) is not None:
                link.protocol.fail(BrokerUnreachable(f"the consumers could not be cancelled: {error!r}"))

    async def _set_up(self, link: _Link) -> None:
        self._queues, self._consumers = [], []
        admin, _ = await link.channel(confirms=False)
        for subscription in self._subscriptions:
            name = await self._declare(admin, subscription.queue)
            self._queues.append(name)
            if self._stopped:
                continue
            channel, number = await link.channel(confirms=False)
            if subscription.prefetch:
                await channel.set_qos(prefetch_count=subscription.prefetch)
            # Before it consumes: the first delivery may come with the answer.
            _Consumed(link, number, subscription, self._options)
            queue = await channel.get_queue(name, ensure=False)
            tag = await queue.consume(_never, no_ack=subscription.no_ack)
            self._consumers.append((channel, tag))
        if self._stopped and self._consumers:
            raise BrokerUnreachable("the consumers were stopped while they were being started")

    async def _declare(self, admin: AbstractChannel, queue: Queue) -> str:
        try:
            declared = await admin.declare_queue(
                queue.name or None,
                durable=queue.durable,
                exclusive=queue.exclusive,
                auto_delete=queue.auto_delete,
                arguments=dict(queue.arguments),
            )
            for exchange, key in queue.bindings:
                await declared.bind(exchange, key)
        except Exception as error:
            ours = translate(error, None)
            if isinstance(ours, TopologyMismatch):
                msg = f"the queue {queue.name!r} exists with other arguments than rpcq's; delete it or mend it: {ours}"
                raise TopologyMismatch(msg) from error
            raise
        return declared.name

    def _told_up(self) -> None:
        self._listener.consuming(self._queues)

    def _told_down(self, cause: BrokerError) -> None:
        self._listener.consuming_lost(cause)


class _PublishingSession(_Session):
    role = "publishing"

    def __init__(
        self, url: BrokerURL, options: ConnectionOptions, exchanges: Sequence[Exchange], listener: Listener
    ) -> None:
        super().__init__(url, options, exchanges, listener)
        self._encoder = Encoder(1, 0)
        self._unconfirmed = Unconfirmed()
        self._queue: list[Outgoing] = []
        self._queued = 0
        self._room = asyncio.Event()  # set to wake those who wait for `ready`
        self._is_blocked = False

    @property
    def ready(self) -> bool:
        link = self._link
        return self._up and not self._is_blocked and self._queued < HIGH_WATER and link.protocol.writable  # type: ignore[union-attr]  # up has one

    def publish(self, message: Outgoing) -> None:
        if not self._up:
            message.on_settled(Settled.UNSENT)
            return
        if not self._queue:
            self._loop.call_soon(self._flush)
        self._queue.append(message)
        self._queued += len(message.body) + len(message.properties)

    async def writable(self) -> None:
        while not self.ready:
            self._room.clear()
            await self._room.wait()

    async def drain(self) -> None:
        """Write what waits, and wait for what is unconfirmed, as long as the session lives and time allows."""
        until = self._loop.time() + CLOSE_TIMEOUT
        while self._up and (self._queue or self._unconfirmed):
            if self._loop.time() > until:
                log.warning("closed with unconfirmed messages", count=len(self._unconfirmed) + len(self._queue))
                return
            await asyncio.sleep(0.001)  # rare and short: no event is worth setting for each confirm

    async def close(self) -> None:
        await super().close()
        self._settle_lost()

    async def _set_up(self, link: _Link) -> None:
        _, number = await link.channel(confirms=True)
        unconfirmed = Unconfirmed()
        self._encoder = Encoder(number, link.frame_max)
        self._unconfirmed = unconfirmed
        self._is_blocked = False
        link.protocol.on_writable = self._wake
        link.protocol.register(
            number,
            Lane(
                max_body=0,  # the body of a returned message is of no use
                on_deliver=_ignore,
                on_return=unconfirmed.returned,
                on_confirm=lambda tag, multiple, accepted: unconfirmed.confirmed(
                    tag, multiple=multiple, accepted=accepted
                ),
                on_end=lambda code, text: link.protocol.fail(closed_by_broker(code, text)),
            ),
        )

    def _told_up(self) -> None:
        self._listener.publishing()
        self._wake()

    def _told_down(self, cause: BrokerError) -> None:
        self._settle_lost()
        self._is_blocked = False
        self._listener.publishing_lost(cause)

    def _settle_lost(self) -> None:
        unsent, self._queue, self._queued = self._queue, [], 0
        for message in self._unconfirmed.lost():
            message.on_settled(Settled.UNKNOWN)
        for message in unsent:
            message.on_settled(Settled.UNSENT)

    def _blocked(self, reason: str | None) -> None:
        self._is_blocked = reason is not None
        if reason is not None:
            self._listener.publishing_blocked(reason)
        else:
            self._listener.publishing()
            self._wake()

    def _flush(self) -> None:
        messages, self._queue, self._queued = self._queue, [], 0
        if not messages:
            return
        if self._link is None:
            for message in messages:
                message.on_settled(Settled.UNSENT)
            return
        add = self._unconfirmed.add
        for message in messages:
            add(message)
        self._link.protocol.write(b"".join(self._encoder.publish(messages)))
        self._wake()

    def _wake(self) -> None:
        if not self._room.is_set() and self.ready:
            self._room.set()


class RabbitMQTransport:
    """A transport over RabbitMQ; see `rpcq.transport.base.Transport`."""

    def __init__(self, url: BrokerURL, options: ConnectionOptions) -> None:
        self._url = url
        self._options = options
        self._consuming: _ConsumingSession | None = None
        self._publishing: _PublishingSession | None = None
        self._closed = False

    @property
    def can_publish(self) -> bool:
        """Whether a message may be published now; see `Transport.can_publish`."""
        return self._publishing is not None and self._publishing.ready

    async def start(
        self, exchanges: Sequence[Exchange], subscriptions: Sequence[Subscription], listener: Listener
    ) -> None:
        """Open both sessions; see `Transport.start`."""
        if self._closed:
            raise ClosedError("the transport is closed")
        # Replies are sent as soon as requests come: the way out is there before the way in.
        self._publishing = _PublishingSession(self._url, self._options, exchanges, listener)
        self._consuming = _ConsumingSession(self._url, self._options, exchanges, listener, subscriptions)
        try:
            for session in (self._publishing, self._consuming):
                await session.open()
        except BaseException:
            await self.close()
            raise

    def publish(self, message: Outgoing) -> None:
        """Send a message; see `Transport.publish`."""
        if self._publishing is None:
            message.on_settled(Settled.UNSENT)
        else:
            self._publishing.publish(message)

    async def writable(self) -> None:
        """Wait until a message may be published; see `Transport.writable`."""
        if self._publishing is not None:
            await self._publishing.writable()

    async def stop_consuming(self) -> None:
        """Cancel the consumers; see `Transport.stop_consuming`."""
        if self._consuming is not None:
            await self._consuming.stop()

    async def close(self) -> None:
        """Close both sessions; see `Transport.close`."""
        self._closed = True
        if self._publishing is not None:
            await self._publishing.drain()  # what is confirmed now is acknowledged now
        sessions = [session for session in (self._consuming, self._publishing) if session is not None]
        await asyncio.gather(*(session.close() for session in sessions))
