"""The session that publishes: confirms, returns, and what waits to be written."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import Final

from aio_pika.abc import AbstractChannel

from rpcq import logs
from rpcq.errors import BrokerError
from rpcq.options import ConnectionOptions
from rpcq.transport.base import Listener, Outgoing, Published
from rpcq.transport.rabbitmq.faults import (
    MessageTooLarge,
    closed_by_broker,
    heeding_cancellation,
    is_foreign,
    translate,
)
from rpcq.transport.rabbitmq.frames import Encoder, FastChannel
from rpcq.transport.rabbitmq.pending import Unconfirmed
from rpcq.transport.rabbitmq.session import CLOSE_TIMEOUT, Link, Session
from rpcq.url import BrokerURL
from rpcq.wire.topology import Exchange

HIGH_WATER: Final = 256 * 1024
"""Bytes that may be published in one iteration of the loop; above it, publishers wait."""

WRITE_SIZE: Final = 64 * 1024
"""Bytes that are written at once, although more messages may come in this iteration of the loop.

uvloop sends less than that only at the end of the iteration.
"""

REFUSING: Final = 2.0
"""Seconds for which a channel may refuse messages before it is replaced; doubled with each replacement."""

LONGEST_REFUSING: Final = 60.0
"""The limit of that time in seconds. After so long without a refusal, it is `REFUSING` again."""

MOST_CHANNELS: Final = 3
"""How many channels may be open: the one in use, and replaced ones with unconfirmed messages."""

REPLACED_POLL: Final = 0.05
"""Seconds between two checks whether all messages of a replaced channel are confirmed."""

log = logs.get_logger("rpcq.rabbitmq")


class _PublishingChannel:
    """One channel of one session that messages are sent on; takes their confirms."""

    __slots__ = ("_channel", "_number", "_protocol", "encoder", "is_being_replaced", "refused_at", "unconfirmed")

    def __init__(
        self, link: Link, channel: AbstractChannel, number: int, on_refused: Callable[[_PublishingChannel], None]
    ) -> None:
        self._channel = channel
        self._number = number
        self._protocol = link.protocol
        self.encoder = Encoder(number, link.frame_max)
        self.unconfirmed = Unconfirmed(lambda: on_refused(self))
        self.refused_at: float | None = None  # time of the first refusal
        self.is_being_replaced = False
        link.protocol.register(
            number,
            FastChannel(
                max_body=0,  # the body of a returned message is not needed
                on_return=self.unconfirmed.returned,
                on_confirm=self.unconfirmed.confirmed,
                on_end=lambda code, text: link.protocol.fail(closed_by_broker(code, text)),
            ),
        )

    async def close(self) -> None:
        """Close this channel only, once nothing on it is unconfirmed. It ends with the connection at the latest.

        There is no timeout: after one, aiormq would send a second `channel.close`, which may end the connection.
        """
        await self._channel.close()
        self._protocol.unregister(self._number)


class PublishingSession(Session):
    """A session that publishes: messages are written together; the broker's confirms say what became of them."""

    role = "publishing"

    def __init__(
        self, url: BrokerURL, options: ConnectionOptions, exchanges: Sequence[Exchange], listener: Listener
    ) -> None:
        super().__init__(url, options, exchanges, listener)
        self._channels: list[_PublishingChannel] = []  # the last is in use; earlier ones have unconfirmed messages
        self._replacing: set[asyncio.Task[None]] = set()
        self._patience = REFUSING
        self._refused_at = 0.0  # time of the last refusal
        self._queue: list[Outgoing] = []
        self._queued = 0  # bytes, with those of this iteration that are written
        self._write_at = WRITE_SIZE
        self._flushing = False
        self._room = asyncio.Event()  # set to wake those who wait for `ready`
        self._is_blocked = False
        self._most: int = sys.maxsize  # the limit in bytes for a body, once the broker has reported one
        self._most_properties = 0  # the limit in bytes for the properties, while the session is up
        self._lost_over_size = False

    @property
    def ready(self) -> bool:
        """Whether a message may be published now; see `Transport.can_publish`."""
        link = self._link
        return self._up and not self._is_blocked and self._queued < HIGH_WATER and link.protocol.writable  # type: ignore[union-attr]  # up has one

    def publish(self, message: Outgoing) -> None:
        """Send a message; see `Transport.publish`."""
        if not self._up:
            message.on_published(Published.UNSENT)
            return
        if len(message.body) > self._most or len(message.properties) > self._most_properties:
            message.on_published(Published.TOO_LARGE)
            return
        if self._flushing:  # written with the other messages of this iteration of the loop
            self._queue.append(message)
            self._queued += len(message.body) + len(message.properties)
            if self._queued >= self._write_at:  # the broker begins with these while the loop goes on
                self._write_at = self._queued + WRITE_SIZE
                self._write_queued()
            return
        # The first one is written at once: with few calls under way, an iteration is a large part of their time.
        self._flushing = True
        self._loop.call_soon(self._flush)
        self._write([message])

    async def declare(self, exchanges: Sequence[Exchange]) -> None:
        """Declare further exchanges; see `Transport.declare`."""
        self._exchanges = [*self._exchanges, *(each for each in exchanges if each not in self._exchanges)]
        await self.writable()
        link = self._link
        if link is None:  # lost as soon as it was up: the next session declares them
            return
        try:
            with heeding_cancellation():
                await link.ensure_exchanges(exchanges)
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            raise translate(error, link.protocol.lost) from error

    async def writable(self) -> None:
        """Wait until a message may be published."""
        while not self.ready:
            self._room.clear()
            await self._room.wait()

    async def drain(self) -> None:
        """Write what waits, and wait for its confirms, for at most `CLOSE_TIMEOUT` and while the session is up."""
        until = self._loop.time() + CLOSE_TIMEOUT
        while self._up and (waiting := len(self._queue) + sum(len(each.unconfirmed) for each in self._channels)):
            if self._loop.time() > until:
                log.warning("closed with unconfirmed messages", count=waiting)
                return
            await asyncio.sleep(0.001)  # polled, because it is rare and short: an event would be set for each confirm

    async def close(self) -> None:
        """Close the session for good; unconfirmed messages are reported as lost."""
        try:
            await super().close()
        finally:
            self._report_lost()
            for replacing in self._replacing:
                replacing.cancel()
            await asyncio.gather(*self._replacing, return_exceptions=True)

    async def _set_up(self, link: Link) -> None:
        self._channels = [await self._open_channel(link)]
        self._most_properties = self._channels[0].encoder.most_properties
        self._is_blocked = False
        link.protocol.on_writable = self._wake

    async def _open_channel(self, link: Link) -> _PublishingChannel:
        return _PublishingChannel(link, *await link.channel(confirms=True), self._on_refused)

    def _on_refused(self, channel: _PublishingChannel) -> None:
        """Replace the channel if it has refused messages for some time.

        In RabbitMQ 3.10, a channel that first sends to a quorum queue before a new leader is elected knows only the
        node of the old leader, and refuses messages while that is down. A channel that is opened later knows the new
        leader. If the queue is full, a new channel does not help: that is why the time grows.
        """
        link = self._link
        if link is None or channel is not self._channels[-1] or channel.is_being_replaced:
            return
        now = self._loop.time()
        if now - self._refused_at > LONGEST_REFUSING:
            self._patience = REFUSING
        self._refused_at = now
        if channel.refused_at is None:
            channel.refused_at = now
        if now - channel.refused_at < self._patience or len(self._channels) == MOST_CHANNELS:
            return
        self._patience = min(2 * self._patience, LONGEST_REFUSING)
        channel.is_being_replaced = True
        replacing = self._loop.create_task(self._replace(link, channel))
        self._replacing.add(replacing)
        replacing.add_done_callback(self._replacing.discard)

    async def _replace(self, link: Link, old: _PublishingChannel) -> None:
        """Send on a new channel from now on; close the old one when nothing on it is unconfirmed."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                new = await self._open_channel(link)
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            old.is_being_replaced, old.refused_at = False, None
            log.warning("a channel refuses messages, but could not be replaced", cause=repr(error))
            return
        if link is not self._link:
            return
        self._channels.append(new)
        log.info("a channel refused messages, and was replaced")
        # Polled, because it is rare: an event would have to be set for each confirm.
        while old.unconfirmed and link is self._link:  # noqa: ASYNC110
            await asyncio.sleep(REPLACED_POLL)
        if link is not self._link:
            return
        self._channels.remove(old)
        try:
            with heeding_cancellation():
                await old.close()
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            log.debug("a replaced channel did not close", cause=repr(error))

    def _on_up(self) -> None:
        # If the last session was lost because a message was too large, the broker's limit still holds. Otherwise the
        # broker may be another one, or configured differently.
        if not self._lost_over_size:
            self._most = sys.maxsize
        self._lost_over_size = False
        self._listener.publishing()
        self._wake()

    def _on_down(self, cause: BrokerError) -> None:
        most = None
        if isinstance(cause, MessageTooLarge):
            most = self._most = cause.most
            self._lost_over_size = True
        self._report_lost(most)
        self._is_blocked = False
        self._listener.publishing_lost(cause)

    def _report_lost(self, most: int | None = None) -> None:
        unsent, self._queue, self._queued = self._queue, [], 0
        channels, self._channels = self._channels, []
        for channel in channels:
            for message, published in channel.unconfirmed.lost(most):
                message.on_published(published)
        for message in unsent:
            message.on_published(Published.UNSENT)

    def _on_blocked(self, reason: str | None) -> None:
        self._is_blocked = reason is not None
        if reason is not None:
            self._listener.publishing_blocked(reason)
        else:
            self._listener.publishing()
            self._wake()

    def _flush(self) -> None:
        self._flushing = False
        self._queued, self._write_at = 0, WRITE_SIZE
        self._write_queued()
        self._wake()

    def _write_queued(self) -> None:
        messages, self._queue = self._queue, []
        if messages:
            self._write(messages)

    def _write(self, messages: list[Outgoing]) -> None:
        if self._link is None:
            for message in messages:
                message.on_published(Published.UNSENT)
            return
        channel = self._channels[-1]
        frames = b"".join(channel.encoder.publish(messages))
        channel.unconfirmed.add(messages)
        self._link.protocol.write(frames)

    def _wake(self) -> None:
        if not self._room.is_set() and self.ready:
            self._room.set()
