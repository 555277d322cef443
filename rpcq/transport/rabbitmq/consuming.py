"""The session that consumes: its queues, its consumers, and how their deliveries are settled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Final, NamedTuple

from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from rpcq import logs
from rpcq.errors import AccessRefused, BrokerError, BrokerUnreachable, NotFound, PreconditionFailed
from rpcq.options import ConnectionOptions
from rpcq.transport.base import Delivery, Listener, Subscription
from rpcq.transport.rabbitmq.faults import closed_by_broker, heeding_cancellation, is_foreign, translate
from rpcq.transport.rabbitmq.frames import Encoder, FastChannel
from rpcq.transport.rabbitmq.pending import Unsettled
from rpcq.transport.rabbitmq.session import CLOSE_TIMEOUT, Link, Session, naming_mismatch
from rpcq.url import BrokerURL
from rpcq.wire.topology import Exchange, Queue

CONSUMER_TAG: Final = "rpcq"
"""The consumer tag; each channel has one consumer. Each delivery carries the tag, so it is short."""

ACK_DELAY: Final = 0.005
"""Seconds that an acknowledgement may wait for others, while prefetch allows the broker to send more anyway."""

QUIET: Final = 0.5
"""Seconds without a delivery after which no more deliveries are expected to be on their way."""

FILL_TIMEOUT: Final = 5.0
"""The longest time in seconds that a consumer waits for this before it is cancelled."""

log = logs.get_logger("rpcq.rabbitmq")


async def _never(_: AbstractIncomingMessage) -> None:
    """Aiormq's consumer, which gets nothing: the fast channel takes its messages."""


async def declare(channel: AbstractChannel, queue: Queue) -> str:
    """Declare and bind a queue, or check that it exists; returns its name. If it fails, the broker closes the channel.

    Raises:
        NotFound: it is to be used as it is, and does not exist.
        TopologyMismatch: it exists with other arguments.

    """
    if queue.as_it_is:
        try:
            await channel.declare_queue(queue.name, passive=True)
        except Exception as error:
            if not isinstance(ours := translate(error, None), NotFound):
                raise
            msg = f"the queue {queue.name!r} must exist, because its service has declare_queue=False: {ours}"
            raise NotFound(msg) from error
        return queue.name
    with naming_mismatch(f"the queue {queue.name!r}"):
        declared = await channel.declare_queue(
            queue.name or None,
            durable=queue.durable,
            exclusive=queue.exclusive,
            auto_delete=queue.auto_delete,
            arguments=dict(queue.arguments),
        )
        for exchange, key in (*queue.bindings, *((exchange, declared.name) for exchange in queue.bound_by_name)):
            await declared.bind(exchange, key)
    return declared.name


class _ConsumingChannel:
    """One subscription, on its own channel of one session; settles its deliveries."""

    __slots__ = (
        "_busy",
        "_ended",
        "_fast",
        "_flushing",
        "_holds",
        "_last",
        "_loop",
        "_no_ack",
        "_on_delivery",
        "_prefetch",
        "_protocol",
        "_timer",
        "_unsettled",
        "delivers_once",
    )

    def __init__(self, link: Link, number: int, subscription: Subscription, options: ConnectionOptions) -> None:
        self._loop = asyncio.get_running_loop()
        self._protocol = link.protocol
        self._unsettled = Unsettled(Encoder(number, link.frame_max))
        self._flushing = False
        self._ended = False
        self._timer: asyncio.TimerHandle | None = None
        self._holds = False  # whether acknowledgements are held back; see `fill`
        self._last = 0.0  # time of the last delivery, while acknowledgements are held back
        self._prefetch = subscription.prefetch
        self._busy = subscription.prefetch // 2
        self.delivers_once = subscription.queue.arguments.get("x-delivery-limit") == 0
        self._on_delivery = subscription.on_delivery
        self._no_ack = subscription.no_ack
        self._fast = FastChannel(max_body=options.max_body, on_deliver=self._on_deliver, on_end=self._on_end)
        link.protocol.register(number, self._fast)

    def settle(self, tag: int, accept: bool, requeue: bool) -> None:
        if self._protocol.lost is not None or self._no_ack or self._ended:
            return
        self._unsettled.settle(tag, accept=accept, requeue=requeue)
        # While few deliveries of those that prefetch allows are in hand, the broker can send more without this
        # acknowledgement: it may wait, so that one write acknowledges many.
        if self._flushing or self._holds:
            return
        if len(self._unsettled) >= self._busy:
            self._flushing = True
            self._loop.call_soon(self._flush_unless_held)
        elif self._timer is None:
            self._timer = self._loop.call_later(ACK_DELAY, self.flush)

    def flush(self) -> None:
        """Write the frames for all that is settled now."""
        self._flushing = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if frames := self._unsettled.frames():
            self._protocol.write(frames)

    def _flush_unless_held(self) -> None:
        if not self._holds:
            self.flush()

    async def fill(self) -> None:
        """Hold acknowledgements back until prefetch is used up or no delivery comes: then none is on its way.

        When a consumer of a quorum queue is cancelled, messages on their way to it go back to the queue, and that
        counts as a delivery (rabbitmq-server #3729). If the queue allows one delivery only, the broker would give them
        up.
        """
        self.flush()  # else a timer would write them after this, and the broker would send more
        self._holds = True
        self._last = self._loop.time()
        until = self._last + FILL_TIMEOUT
        # Polled, because it is rare and short: an event would have to be set for each delivery.
        while len(self._unsettled) < self._prefetch and self._loop.time() < min(until, self._last + QUIET):  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    def release(self) -> None:
        """Stop holding acknowledgements back."""
        self._holds = False
        self.flush()

    def end(self) -> None:
        """Write the frames for what is settled, and then nothing more: the channel is to be closed."""
        self.flush()
        self._ended = True

    def _on_deliver(self, tag: int, redelivered: bool, properties: bytes, body: bytes | None, size: int) -> None:
        if self._ended:
            return  # it goes back when the channel is closed
        if not self._no_ack:
            self._unsettled.delivered(tag)
            if self._holds:
                self._last = self._loop.time()
        self._on_delivery(Delivery(self, tag, redelivered, properties, body, size, self._fast.exchange))

    def _on_end(self, code: int, text: str) -> None:
        cause = closed_by_broker(code, text) if code else BrokerUnreachable(text)
        self._protocol.fail(cause)


class _InOrder(NamedTuple):
    """A consumer whose queue is in order, in one session."""

    link: Link
    channel: AbstractChannel
    consuming: _ConsumingChannel
    subscription: Subscription


class ConsumingSession(Session):
    """A session that consumes; its queues are declared and consumed again on each connection."""

    role = "consuming"

    def __init__(
        self,
        url: BrokerURL,
        options: ConnectionOptions,
        exchanges: Sequence[Exchange],
        listener: Listener,
        subscriptions: Sequence[Subscription],
        queues: Sequence[Queue] = (),
    ) -> None:
        super().__init__(url, options, exchanges, listener)
        self._subscriptions = subscriptions
        self._further = queues  # declared, and not consumed
        self._queues: list[str] = []
        self._consumers: list[tuple[AbstractChannel, str]] = []
        self._channels: list[_ConsumingChannel] = []
        self._in_order: dict[str, _InOrder] = {}  # by the names of queues
        self._admin: AbstractChannel
        self._not_declared: dict[str, AccessRefused] = {}  # queue that this user may not declare -> the refusal
        self._stopped = False

    async def stop(self) -> None:
        """Cancel the consumers; later sessions have none."""
        self._stopped = True
        link = self._link
        consumers, self._consumers = self._consumers, []
        once = [channel for channel in self._channels if channel.delivers_once]
        try:
            await asyncio.gather(*(channel.fill() for channel in once))
            async with asyncio.timeout(CLOSE_TIMEOUT):
                with heeding_cancellation():
                    for channel, tag in consumers:
                        await (await channel.get_underlay_channel()).basic_cancel(tag)
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            # The broker may go on delivering, and nobody would reply to that: end the whole session.
            if link is not None and link is self._link:
                link.protocol.fail(BrokerUnreachable(f"the consumers could not be cancelled: {error!r}"))
        finally:
            for each in once:
                each.release()

    async def settled(self, queue: str) -> bool:
        """Wait until the broker has all acknowledgements so far; see `Transport.settled`."""
        found = self._in_order.get(queue)
        if found is None:
            return False
        found.consuming.flush()
        # The broker works a channel off in order, and to set the prefetch of later consumers has no other effect.
        return await self._on_channel(
            found, "the acknowledgements were not taken", found.channel.set_qos(found.subscription.prefetch)
        )

    async def hand_over(self, queue: str, *, again: bool) -> None:
        """Close the channel of a consumer whose queue is in order; see `Transport.hand_over`."""
        found = self._in_order.pop(queue, None)
        if found is None:
            return
        found.consuming.end()
        self._channels.remove(found.consuming)
        if not await self._on_channel(found, "a channel could not be closed", self._close_channel(found)):
            return
        if again and not self._stopped:
            consuming = self._consume_in(found.link, queue, found.subscription)
            await self._on_channel(found, "a queue could not be consumed again", consuming)

    async def _close_channel(self, found: _InOrder) -> None:
        number = (await found.channel.get_underlay_channel()).number
        await found.channel.close()
        found.link.protocol.unregister(number)

    async def _on_channel(self, found: _InOrder, failed: str, waits: Awaitable[object]) -> bool:
        """Wait for the broker; if it does not do it, end the whole session. Returns whether the session is still up."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                with heeding_cancellation():
                    await waits
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            found.link.protocol.fail(BrokerUnreachable(f"{failed}: {error!r}"))
        return found.link.protocol.lost is None

    async def close(self) -> None:
        """Write the frames for all that is settled, and close the session for good."""
        for channel in self._channels:
            channel.flush()
        await super().close()

    async def _set_up(self, link: Link) -> None:
        self._queues, self._consumers, self._channels, self._not_declared = [], [], [], {}
        self._in_order = {}
        self._admin, _ = await link.channel(confirms=False)
        for queue in self._further:
            await self._ensure(link, queue)
        for subscription in self._subscriptions:
            self._queues.append(await self._declare(link, subscription.queue.for_session()))
        # Consume only when all queues are declared: a session that cannot open must not take messages.
        for subscription, name in zip(self._subscriptions, self._queues, strict=True):
            if self._stopped:
                break
            await self._consume_in(link, name, subscription)
        if self._stopped and (self._consumers or self._in_order):
            raise BrokerUnreachable("the consumers were stopped while they were being started")

    async def _consume_in(self, link: Link, name: str, subscription: Subscription) -> None:
        """Consume a queue in a new channel."""
        channel, number = await link.channel(confirms=False)
        if subscription.prefetch:
            await channel.set_qos(prefetch_count=subscription.prefetch)
        # Before the consumer starts: the first delivery may come together with the broker's consume-ok.
        consuming = _ConsumingChannel(link, number, subscription, self._options)
        self._channels.append(consuming)
        if subscription.in_order:
            self._in_order[name] = _InOrder(link, channel, consuming, subscription)
            await self._consume(link, channel, name, subscription)
        else:
            self._consumers.append((channel, await self._consume(link, channel, name, subscription)))

    async def _declare(self, link: Link, queue: Queue) -> str:
        """Declare and bind a queue; returns its name. A queue that this user may not declare is used as it is."""
        try:
            return await declare(self._admin, queue)
        except Exception as error:
            refused = translate(error, link.protocol.lost)
            if not isinstance(refused, AccessRefused) or queue.exclusive:
                raise
            self._admin, _ = await link.channel(confirms=False)  # the broker closed the other one when it refused
            self._not_declared[queue.name] = refused
            return queue.name

    async def _ensure(self, link: Link, queue: Queue) -> None:
        """Declare a queue that is not consumed; if this user may not, log whether it is missing.

        After a first refusal, the others are only asked for: they are many, each refusal costs a channel, and a session
        has `connect_timeout` to open. RabbitMQ 4.3 does not even let a user without permissions on a queue ask for it.
        """
        if not self._not_declared:
            await self._declare(link, queue)
            if not self._not_declared:
                return
        refused: BrokerError | None = None
        try:
            await self._admin.declare_queue(queue.name, passive=True)
        except Exception as error:
            refused = translate(error, link.protocol.lost)
            if not isinstance(refused, AccessRefused | NotFound):
                raise
            self._admin, _ = await link.channel(confirms=False)  # the broker closed the other one when it refused
        if isinstance(refused, NotFound):
            self._not_declared.pop(queue.name, None)
            await self._declare(link, queue)
            if queue.name in self._not_declared:
                log.error("queue does not exist: a user who may declare it must run 'rpcq setup'", queue=queue.name)

    async def _consume(self, link: Link, channel: AbstractChannel, name: str, subscription: Subscription) -> str:
        """Start to consume a queue; returns the consumer's tag."""
        queue = await channel.get_queue(name, ensure=False)
        refused = self._not_declared.get(name)
        try:
            tag = await queue.consume(
                _never,
                no_ack=subscription.no_ack,
                arguments=dict(subscription.arguments),
                consumer_tag=CONSUMER_TAG,
            )
        except Exception as error:
            ours = translate(error, link.protocol.lost)
            if refused is None or not isinstance(ours, AccessRefused | NotFound | PreconditionFailed):
                raise
            msg = f"{refused}; nor can it be used as it is ({ours}): a user who may declare it must run 'rpcq setup'"
            raise AccessRefused(msg) from error
        if refused is not None:
            log.info("queue is used as it is: this user may not declare it", queue=name)
        return tag

    def _on_up(self) -> None:
        self._listener.consuming(self._queues)

    def _on_down(self, cause: BrokerError) -> None:
        self._listener.consuming_lost(cause)
