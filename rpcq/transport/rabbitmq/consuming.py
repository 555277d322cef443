"""The session that consumes: its queues, its consumers, and the settling of what they are sent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

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
"""The only one on its channel. Each delivery carries it, so it is short."""

ACK_DELAY: Final = 0.005
"""Seconds that an acknowledgement may wait for others, while the broker has no use for its slot."""

QUIET: Final = 0.5
"""Seconds without a delivery after which none is taken to be on its way."""

FILL_TIMEOUT: Final = 5.0
"""Seconds that a consumer waits for that at most, before it is cancelled."""

log = logs.get_logger("rpcq.rabbitmq")


async def _never(_: AbstractIncomingMessage) -> None:
    """Aiormq's consumer: the lane takes its messages."""


async def declare(channel: AbstractChannel, queue: Queue) -> str:
    """Declare and bind a queue; its name. Where it fails, the broker closes the channel.

    Raises:
        TopologyMismatch: it exists with other arguments.

    """
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
        self._lane = FastChannel(
            max_body=options.max_body,
            on_deliver=self._deliver,
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
        self._on_delivery(Delivery(self, tag, redelivered, properties, body, size, self._lane.exchange))

    def _end(self, code: int, text: str) -> None:
        cause = closed_by_broker(code, text) if code else BrokerUnreachable(text)
        self._protocol.fail(cause)


class ConsumingSession(Session):
    """The way in: queues are declared and consumed anew on each connection."""

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
        self._not_declared: dict[str, AccessRefused] = {}  # queues that are used as they are -> why
        self._stopped = False

    async def stop(self) -> None:
        """Cancel the consumers; later sessions have none."""
        self._stopped = True
        link = self._link
        consumers, self._consumers = self._consumers, []
        once = [consumed for consumed in self._consumed if consumed.is_quorum]
        try:
            await asyncio.gather(*(consumed.fill() for consumed in once))
            async with asyncio.timeout(CLOSE_TIMEOUT):
                with heeding_cancellation():
                    for channel, tag in consumers:
                        await (await channel.get_underlay_channel()).basic_cancel(tag)
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            # Gone or unwilling: what it still delivers would not be answered, so the session goes as well.
            if link is not None and link is self._link:
                link.protocol.fail(BrokerUnreachable(f"the consumers could not be cancelled: {error!r}"))
        finally:
            for consumed in once:
                consumed.release()

    async def close(self) -> None:
        """Tell the broker of what is settled, and close it for good."""
        for consumed in self._consumed:
            consumed.flush()
        await super().close()

    async def _set_up(self, link: Link) -> None:
        self._queues, self._consumers, self._consumed, self._not_declared = [], [], [], {}
        self._admin, _ = await link.channel(confirms=False)
        for subscription in self._subscriptions:
            self._queues.append(await self._declare(link, subscription.queue.for_session()))
        # Only when all are declared: a session that cannot open must not take messages.
        for subscription, name in zip(self._subscriptions, self._queues, strict=True):
            if self._stopped:
                break
            channel, number = await link.channel(confirms=False)
            if subscription.prefetch:
                await channel.set_qos(prefetch_count=subscription.prefetch)
            # Before it consumes: the first delivery may come with the answer.
            self._consumed.append(_Consumed(link, number, subscription, self._options))
            self._consumers.append((channel, await self._consume(link, channel, name, subscription)))
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
            self._not_declared[queue.name] = refused
            return queue.name

    async def _consume(self, link: Link, channel: AbstractChannel, name: str, subscription: Subscription) -> str:
        """Begin to consume a queue; the consumer's tag."""
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
            msg = (
                f"{refused}; nor can it be used as it is ({ours}): a user who may has to declare it, with 'rpcq setup'"
            )
            raise AccessRefused(msg) from error
        if refused is not None:
            log.info("queue is used as it is: this user may not declare it", queue=name)
        return tag

    def _told_up(self) -> None:
        self._listener.consuming(self._queues)

    def _told_down(self, cause: BrokerError) -> None:
        self._listener.consuming_lost(cause)
