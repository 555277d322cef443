"""RabbitMQ: a session that consumes and one that publishes, with the fast lane for their messages."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from rpcq import logs
from rpcq.errors import AccessRefused, BrokerError, BrokerUnreachable, ClosedError, TopologyMismatch
from rpcq.settings import ConnectionOptions
from rpcq.transport.base import Delivery, Listener, Outgoing, Settled, Subscription
from rpcq.transport.connection import (
    MessageTooLarge,
    closed_by_broker,
    is_foreign,
    translate,
)
from rpcq.transport.lane import Encoder, Lane
from rpcq.transport.session import CLOSE_TIMEOUT, Link, Session
from rpcq.transport.settling import Unconfirmed, Unsettled
from rpcq.transport.topology import Exchange, Queue
from rpcq.url import BrokerURL

CONSUMER_TAG: Final = "rpcq"
"""The only one on its channel. Each delivery carries it, so it is short."""

HIGH_WATER: Final = 256 * 1024
"""Bytes that may wait for the next write before publishers wait."""

ACK_DELAY: Final = 0.005
"""Seconds that an acknowledgement may wait for others, while the broker has no use for its slot."""

QUIET: Final = 0.5
"""Seconds without a delivery after which none is taken to be on its way."""

FILL_TIMEOUT: Final = 5.0
"""Seconds that a consumer waits for that at most, before it is cancelled."""

log = logs.get_logger("rpcq.rabbitmq")
for _name in logs.QUIET:
    logs.silence(_name)


def _ignore(*_: Any) -> None:
    """For what cannot happen on a channel of this kind, or means nothing there."""


async def _never(_: AbstractIncomingMessage) -> None:
    """Aiormq's consumer: the lane takes its messages."""


async def declare(channel: AbstractChannel, queue: Queue) -> str:
    """Declare and bind a queue; its name. Where it fails, the broker closes the channel.

    Raises:
        TopologyMismatch: it exists with other arguments.

    """
    try:
        declared = await channel.declare_queue(
            queue.name or None,
            durable=queue.durable,
            exclusive=queue.exclusive,
            auto_delete=queue.auto_delete,
            arguments=dict(queue.arguments),
        )
        for exchange, key in (*queue.bindings, *((exchange, declared.name) for exchange in queue.bound_by_name)):
            await declared.bind(exchange, key)
    except Exception as error:
        ours = translate(error, None)
        if isinstance(ours, TopologyMismatch):
            msg = f"the queue {queue.name!r} exists with other arguments than rpcq's; delete it or mend it: {ours}"
            raise TopologyMismatch(msg) from error
        raise
    return declared.name


class _Consumed:
    """One subscription on its own channel of one session; takes its settlements."""

    __slots__ = (
        "_busy",
        "_flushing",
        "_holds",
        "_lane",
        "_last",
        "_loop",
        "_no_ack",
        "_on_delivery",
        "_prefetch",
        "_protocol",
        "_timer",
        "_unsettled",
        "is_quorum",
    )

    def __init__(self, link: Link, channel: int, subscription: Subscription, options: ConnectionOptions) -> None:
        self._loop = asyncio.get_running_loop()
        self._protocol = link.protocol
        self._unsettled = Unsettled(Encoder(channel, link.frame_max))
        self._flushing = False
        self._timer: asyncio.TimerHandle | None = None
        self._holds = False
        self._last = 0.0  # delivery, where it holds
        self._prefetch = subscription.prefetch
        self._busy = subscription.prefetch // 2
        self.is_quorum = subscription.queue.arguments.get("x-queue-type") == "quorum"
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
        # Where few of the slots that prefetch gives are taken, nobody waits for this one: one write tells of many.
        if self._flushing or self._holds:
            return
        if len(self._unsettled) >= self._busy:
            self._flushing = True
            self._loop.call_soon(self.flush)
        elif self._timer is None:
            self._timer = self._loop.call_later(ACK_DELAY, self.flush)

    def flush(self) -> None:
        """Tell the broker now of all that is settled."""
        self._flushing = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if frames := self._unsettled.frames():
            self._protocol.write(frames)

    async def fill(self) -> None:
        """Acknowledge nothing, until all that prefetch allows has come or nothing comes: then nothing is on its way.

        A consumer of a quorum queue that is cancelled gives back what is on its way to it, and that counts as a
        delivery (rabbitmq-server #3729): where one is all that there may be, the broker would give it up.
        """
        self._holds = True
        self._last = self._loop.time()
        until = self._last + FILL_TIMEOUT
        # Rare and short: no event is worth setting for each delivery.
        while len(self._unsettled) < self._prefetch and self._loop.time() < min(until, self._last + QUIET):  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    def release(self) -> None:
        """Acknowledge again."""
        self._holds = False
        self.flush()

    def _deliver(self, tag: int, redelivered: bool, properties: bytes, body: bytes | None, size: int) -> None:
        if not self._no_ack:
            self._unsettled.delivered(tag)
            if self._holds:
                self._last = self._loop.time()
        self._on_delivery(Delivery(self, tag, redelivered, properties, body, size))

    def _end(self, code: int, text: str) -> None:
        cause = closed_by_broker(code, text) if code else BrokerUnreachable(text)
        self._protocol.fail(cause)


class _ConsumingSession(Session):
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
        self._consumed: list[_Consumed] = []
        self._admin: AbstractChannel
        self._stopped = False

    async def stop(self) -> None:
        """Cancel the consumers; later sessions have none."""
        self._stopped = True
        consumers, self._consumers = self._consumers, []
        once = [consumed for consumed in self._consumed if consumed.is_quorum]
        try:
            await asyncio.gather(*(consumed.fill() for consumed in once))
            async with asyncio.timeout(CLOSE_TIMEOUT):
                for channel, tag in consumers:
                    await (await channel.get_underlay_channel()).basic_cancel(tag)
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            # Gone or unwilling: what it still delivers would not be answered, so the session goes as well.
            if (link := self._link) is not None:
                link.protocol.fail(BrokerUnreachable(f"the consumers could not be cancelled: {error!r}"))
        finally:
            for consumed in once:
                consumed.release()

    async def close(self) -> None:
        for consumed in self._consumed:
            consumed.flush()
        await super().close()

    async def _set_up(self, link: Link) -> None:
        self._queues, self._consumers, self._consumed = [], [], []
        self._admin, _ = await link.channel(confirms=False)
        for subscription in self._subscriptions:
            name = await self._declare(link, subscription.queue.for_session())
            self._queues.append(name)
            if self._stopped:
                continue
            channel, number = await link.channel(confirms=False)
            if subscription.prefetch:
                await channel.set_qos(prefetch_count=subscription.prefetch)
            # Before it consumes: the first delivery may come with the answer.
            self._consumed.append(_Consumed(link, number, subscription, self._options))
            queue = await channel.get_queue(name, ensure=False)
            tag = await queue.consume(_never, no_ack=subscription.no_ack, consumer_tag=CONSUMER_TAG)
            self._consumers.append((channel, tag))
        if self._stopped and self._consumers:
            raise BrokerUnreachable("the consumers were stopped while they were being started")

    async def _declare(self, link: Link, queue: Queue) -> str:
        """Declare and bind a queue; one that this user may not declare is used as it is, if it is there."""
        try:
            return await declare(self._admin, queue)
        except Exception as error:
            refused = translate(error, link.protocol.lost)
            if not isinstance(refused, AccessRefused) or queue.exclusive:
                raise
            self._admin, _ = await link.channel(confirms=False)  # the refusal closed the other one
            try:
                await self._admin.declare_queue(queue.name, passive=True)
            except Exception as missing:
                if not isinstance(translate(missing, link.protocol.lost), TopologyMismatch):
                    raise
                msg = f"{refused}; nor is it there: have it declared once by a user who may, with 'rpcq setup'"
                raise AccessRefused(msg) from error
            log.info("queue is used as it is: this user may not declare it", queue=queue.name)
            return queue.name

    def _told_up(self) -> None:
        self._listener.consuming(self._queues)

    def _told_down(self, cause: BrokerError) -> None:
        self._listener.consuming_lost(cause)


class _PublishingSession(Session):
    role = "publishing"

    def __init__(
        self, url: BrokerURL, options: ConnectionOptions, exchanges: Sequence[Exchange], listener: Listener
    ) -> None:
        super().__init__(url, options, exchanges, listener)
        self._encoder = Encoder(1, 0)
        self._unconfirmed = Unconfirmed()
        self._queue: list[Outgoing] = []
        self._queued = 0
        self._flushing = False
        self._room = asyncio.Event()  # set to wake those who wait for `ready`
        self._is_blocked = False
        self._most: int | None = None  # bytes of a message, once the broker has said so

    @property
    def ready(self) -> bool:
        link = self._link
        return self._up and not self._is_blocked and self._queued < HIGH_WATER and link.protocol.writable  # type: ignore[union-attr]  # up has one

    def publish(self, message: Outgoing) -> None:
        if not self._up:
            message.on_settled(Settled.UNSENT)
            return
        if self._most is not None and len(message.body) > self._most:
            message.on_settled(Settled.TOO_LARGE)
            return
        if self._flushing:  # written with all else of this iteration of the loop
            self._queue.append(message)
            self._queued += len(message.body) + len(message.properties)
            return
        # The first one goes at once: with few calls under way, an iteration is a good part of their time.
        self._flushing = True
        self._loop.call_soon(self._flush)
        self._write([message])

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

    async def _set_up(self, link: Link) -> None:
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
                on_confirm=unconfirmed.confirmed,
                on_end=lambda code, text: link.protocol.fail(closed_by_broker(code, text)),
            ),
        )

    def _told_up(self) -> None:
        self._listener.publishing()
        self._wake()

    def _told_down(self, cause: BrokerError) -> None:
        # Lost otherwise, it may come back as one that takes more.
        self._most = cause.most if isinstance(cause, MessageTooLarge) else None
        self._settle_lost()
        self._is_blocked = False
        self._listener.publishing_lost(cause)

    def _settle_lost(self) -> None:
        unsent, self._queue, self._queued = self._queue, [], 0
        for message, settled in self._unconfirmed.lost(self._most):
            message.on_settled(settled)
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
        self._flushing = False
        messages, self._queue, self._queued = self._queue, [], 0
        if messages:
            self._write(messages)
            self._wake()

    def _write(self, messages: list[Outgoing]) -> None:
        if self._link is None:
            for message in messages:
                message.on_settled(Settled.UNSENT)
            return
        self._unconfirmed.add(messages)
        self._link.protocol.write(b"".join(self._encoder.publish(messages)))

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
