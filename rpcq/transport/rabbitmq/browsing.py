"""Takes messages of a queue one after the other, for somebody who looks at them; what is not acknowledged goes back.

The messages that were looked at are held until the end: if one went back before, it would come again.

    next()   a message that has come            -> that one
             the consumers hold all they may    -> one more consumer
             no message for QUIET seconds       -> is one ready? wait for it; otherwise there are no more

A consumer is used, and not basic.get: messages come many at a time, and a consumer shows in the queue's state, so that
another operator sees that somebody holds messages of the queue.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Final

from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from rpcq import logs
from rpcq.errors import BrokerUnreachable
from rpcq.transport.rabbitmq.faults import closed_by_broker, heeding_cancellation, is_foreign, translate
from rpcq.transport.rabbitmq.frames import MAX_FRAME, Encoder, FastChannel
from rpcq.transport.rabbitmq.pending import Unsettled
from rpcq.transport.rabbitmq.session import CLOSE_TIMEOUT, Link
from rpcq.wire.topology import CONSUMER_TIMEOUT

AT_ONCE: Final = 500
"""Messages that one consumer may hold."""

IN_ORDER: Final = 32
"""Messages that are given back together: RabbitMQ 3.10 puts more than that back in any order."""

QUIET: Final = 1.0
"""Seconds without a message after which the queue is asked whether it has more."""

PATIENCE: Final = 15.0
"""Seconds for which a queue may have messages without delivering one: it may elect a leader."""

log = logs.get_logger("rpcq.rabbitmq")


@dataclass(frozen=True, slots=True)
class Taken:
    """A message of a queue.

    Attributes:
        tag: its delivery tag.
        exchange: what it was published, or dead-lettered, to.
        routing_key: its routing key.
        properties: encoded.
        body: the body.

    """

    tag: int
    exchange: bytes
    routing_key: bytes
    properties: bytes
    body: bytes


async def _never(_: AbstractIncomingMessage) -> None:
    """Aiormq's consumer, which gets nothing: the fast channel takes its messages."""


class Browser:
    """The messages of one queue; see `Admin.browse`.

    Args:
        link: the connection.
        queue: the queue's name.

    """

    def __init__(self, link: Link, queue: str) -> None:
        self._link = link
        self._queue = queue
        self._channel: AbstractChannel | None = None
        self._number = 0
        self._fast = FastChannel(max_body=MAX_FRAME, on_deliver=self._on_deliver, on_end=self._on_end)
        self._encoder: Encoder
        self._held: Unsettled
        self._arrived: deque[Taken] = deque()
        self._allowed = 0  # messages that the consumers may hold
        self._flushing = False
        self._consumers: list[str] = []
        self._changed = asyncio.Event()

    async def next(self, most: int) -> Taken | None:
        """The next message; None if there are no more.

        Args:
            most: how many messages are wanted yet, at least 1: not many more are taken from the queue.

        Raises:
            BrokerError: the broker refused, the connection was lost, or the queue delivers nothing.

        """
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE
        while not self._arrived:
            if (lost := self._link.protocol.lost) is not None:
                raise lost
            if not self._allowed or len(self._held) >= self._allowed:
                await self._consume(min(AT_ONCE, most))
            self._changed.clear()
            if self._arrived:
                break
            try:
                async with asyncio.timeout(QUIET):
                    await self._changed.wait()
            except TimeoutError:
                ready = await self._ready()
                if not ready and not self._arrived:
                    return None
                if loop.time() > until:
                    msg = f"the queue {self._queue!r} has {ready} messages, and delivered none for {PATIENCE:g} s"
                    raise BrokerUnreachable(msg) from None
        return self._arrived.popleft()

    def ack(self, tag: int) -> None:
        """Acknowledge a message: the broker deletes it. If the connection is lost, the message is still there."""
        self._held.settle(tag, accept=True, requeue=False)
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        if self._flushing:
            self._flushing = False
            self._link.protocol.write(self._held.frames())

    def wake(self) -> None:
        """Make `next` look again: the connection was lost."""
        self._changed.set()

    async def close(self) -> None:
        """Give back what is not acknowledged. If the connection is lost, the broker has done so."""
        if self._channel is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT + 0.01 * len(self._consumers)):
                with heeding_cancellation():
                    underlay = await self._channel.get_underlay_channel()
                    for tag in self._consumers:  # first, or else what goes back would come again
                        await underlay.basic_cancel(tag)
                    self._flush()
                    self._link.protocol.write(self._given_back())
                    await self._channel.close()
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            log.debug("a channel did not close: the broker puts its messages back", cause=repr(error))
            self._link.protocol.fail(BrokerUnreachable(f"messages could not be given back in time: {error!r}"))
        self._link.protocol.unregister(self._number)

    def _given_back(self) -> bytes:
        tags = [*self._held]
        ends = sorted({*tags[IN_ORDER - 1 :: IN_ORDER], *tags[-1:]})
        return b"".join(self._encoder.nack(tag, multiple=True) for tag in ends)

    async def _consume(self, prefetch: int) -> None:
        try:
            with heeding_cancellation():
                if self._channel is None:
                    self._channel, self._number = await self._link.channel(confirms=False)
                    self._encoder = Encoder(self._number, self._link.frame_max)
                    self._held = Unsettled(self._encoder)
                    self._link.protocol.register(self._number, self._fast)
                await self._channel.set_qos(prefetch_count=prefetch)  # of the consumers that start after it
                queue = await self._channel.get_queue(self._queue, ensure=False)
                tag = f"look-{len(self._consumers)}"
                self._consumers.append(tag)
                self._allowed += prefetch
                await queue.consume(_never, consumer_tag=tag, arguments={"x-consumer-timeout": CONSUMER_TIMEOUT})
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            raise translate(error, self._link.protocol.lost) from error

    async def _ready(self) -> int:
        """How many messages nobody holds."""
        assert self._channel is not None  # noqa: S101 - it consumes
        try:
            with heeding_cancellation():
                found = await self._channel.declare_queue(self._queue, passive=True)
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            raise translate(error, self._link.protocol.lost) from error
        return found.declaration_result.message_count or 0

    def _on_deliver(self, tag: int, redelivered: bool, properties: bytes, body: bytes | None, size: int) -> None:  # noqa: ARG002
        self._held.delivered(tag)
        # No body is over the limit: it is that of RabbitMQ.
        self._arrived.append(Taken(tag, self._fast.exchange, self._fast.routing_key, properties, body or b""))
        self._changed.set()

    def _on_end(self, code: int, text: str) -> None:
        self._link.protocol.fail(closed_by_broker(code, text) if code else BrokerUnreachable(text))
