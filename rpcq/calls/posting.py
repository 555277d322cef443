"""Publishes the replies of a worker: each alone, or those to one client together, in a message batch.

    post -> the client reads one reply in a message, or the reply is large          -> published alone, at once
         -> nothing for the client waits, and this is the first in this iteration   -> published alone, at once
         -> else                                                                    -> published with the others,
            of the event loop for this client                                          when the iteration ends

So a client with one call under way waits for nothing, and many replies cost the broker one message. A message that was
not confirmed because a session was lost is published again. What became of a reply is reported for each: a message
batch is a carrier, and has no outcome.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

from rpcq.runtime.backlog import Backlog
from rpcq.transport.base import Outgoing, Published, Transport
from rpcq.wire import batches, replies
from rpcq.wire.batches import MAX_BATCH, Entry
from rpcq.wire.topology import DIRECT_REPLY_TO

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rpcq.calls.in_hand import CallRun
    from rpcq.calls.slots import Slots

_CONFIRMED: Final = Published.CONFIRMED  # a name of its own: getting at an enum's member is slow in CPython 3.11


Destination = tuple[bytes, "Slots"]
"""A reply queue, and the service whose replies go there: a message batch says what one service takes."""


class Reported(Protocol):
    """What hears what became of replies."""

    def acknowledge(self, run: CallRun) -> None:
        """The broker has the reply."""

    def not_taken(self, run: CallRun, published: Published, size: int) -> None:
        """The broker does not have the reply, whose body is `size` bytes, and never will."""


class _Reply(Outgoing):
    """The reply to a request in hand."""

    __slots__ = ("post", "run")

    def __init__(self, post: Post, run: CallRun, exchange: bytes, properties: bytes, body: bytes) -> None:
        # Not by super(): one is made for each call.
        self.exchange = exchange
        self.routing_key, self.correlation_id = run.key
        # RabbitMQ may return a message for direct reply-to even if it delivers it.
        self.mandatory = not self.routing_key.startswith(DIRECT_REPLY_TO)
        self.properties = properties
        self.body = body
        self.post = post
        self.run = run

    def on_published(self, published: Published) -> None:
        """See `Outgoing`."""
        if published is _CONFIRMED:
            self.post.reported.acknowledge(self.run)
        elif not self.post.publish_again(self, published):
            self.post.reported.not_taken(self.run, published, len(self.body))


class _Batch(Outgoing):
    """The replies to several requests in hand of one client."""

    __slots__ = ("held", "post")

    def __init__(self, post: Post, held: Sequence[tuple[CallRun, Entry]], exchange: bytes, batch_id: bytes) -> None:
        run = held[0][0]
        reply_to = run.key[0]
        super().__init__(
            exchange,
            reply_to,
            batch_id,
            batches.write_properties(batch_id, run.slots.takes),
            batches.write_replies([entry for _, entry in held]),
            not reply_to.startswith(DIRECT_REPLY_TO),
        )
        self.post = post
        self.held = held

    def on_published(self, published: Published) -> None:
        """See `Outgoing`."""
        reported = self.post.reported
        if published is _CONFIRMED:
            for run, _ in self.held:
                reported.acknowledge(run)
        elif published is Published.TOO_LARGE:
            self.post.post_singly(self.held, len(self.body))
        elif not self.post.publish_again(self, published):
            for run, entry in self.held:
                reported.not_taken(run, published, len(entry.body))


class Post:
    """Publishes replies until the broker has them, or cannot take them.

    Args:
        transport: where they go.
        reported: what hears what became of each.
        exchange: the exchange that they go through; empty for the default one.
        max_body: the most bytes of a message.
        on_message: called with the number of replies in each message; None for no callback.

    Attributes:
        messages: how many messages the replies took.

    """

    def __init__(
        self,
        transport: Transport,
        reported: Reported,
        exchange: bytes,
        max_body: int,
        on_message: Callable[[int], None] | None = None,
    ) -> None:
        self._transport = transport
        self.reported = reported
        self._on_message = on_message
        self._exchange = exchange
        self._most = min(MAX_BATCH, max_body)
        self._encoder = replies.ReplyEncoder()
        self._unsent: Backlog[Outgoing] = Backlog(lambda: transport.can_publish, transport.writable, transport.publish)
        self._abandoned = False
        self._loop: asyncio.AbstractEventLoop
        # The clients that got a reply in this iteration of the event loop, by service -> what waits for its end.
        self._held: dict[Destination, list[tuple[CallRun, Entry]]] = {}
        self._sizes: dict[Destination, int] = {}
        self._batches = 0
        self.messages = 0

    def open(self) -> None:
        """From now on, in this event loop."""
        self._loop = asyncio.get_running_loop()

    def abandon(self) -> None:
        """Publish nothing again from now on."""
        self._abandoned = True

    async def close(self) -> None:
        """Forget what waits to be published again."""
        await self._unsent.close()

    def post(self, run: CallRun, kind: bytes, body: bytes) -> None:
        """Publish the reply to a request that wants one."""
        if run.reads_batches and batches.fits(run.key[1], body):
            destination = run.key[0], run.slots
            held = self._held.get(destination)
            if held is not None:
                self._hold(held, run, Entry(run.key[1], kind, run.queue_ms, run.handler_ms, body))
                return
            if not self._held:
                self._loop.call_soon(self._flush)
            self._held[destination] = []
        self._post_alone(run, kind, run.queue_ms, run.handler_ms, body)

    def post_singly(self, held: Sequence[tuple[CallRun, Entry]], size: int) -> None:
        """The broker takes no message of this size: publish each of the replies alone, and smaller batches later."""
        self._most = min(self._most, size // 2)
        for run, it in held:
            self._post_alone(run, it.kind, it.queue_ms, it.handler_ms, it.body)

    def publish_again(self, message: Outgoing, published: Published) -> bool:
        """Publish a message again as soon as that is possible, if a session was lost. Returns False if none was."""
        if published not in (Published.UNSENT, Published.UNKNOWN):
            return False
        if not self._abandoned:
            self._unsent.add(message)
        return True

    def _post_alone(self, run: CallRun, kind: bytes, queue_ms: float | None, handler_ms: float, body: bytes) -> None:
        self._count(1)
        takes = run.slots.takes if run.reads_batches else 0
        properties = self._encoder.encode(kind, run.key[1], queue_ms, handler_ms, takes)
        self._transport.publish(_Reply(self, run, self._exchange, properties, body))

    def _count(self, replies: int) -> None:
        self.messages += 1
        if self._on_message is not None:
            self._on_message(replies)

    def _hold(self, held: list[tuple[CallRun, Entry]], run: CallRun, entry: Entry) -> None:
        destination = run.key[0], run.slots
        size = self._sizes.get(destination, 0) + entry.size
        if size > self._most and held:
            self._held[destination] = []
            self._publish(held)
            held, size = self._held[destination], entry.size
        held.append((run, entry))
        self._sizes[destination] = size

    def _flush(self) -> None:
        """The iteration has ended: publish what waited for that."""
        waiting, self._held = self._held, {}
        self._sizes.clear()
        for held in waiting.values():
            if held:
                self._publish(held)

    def _publish(self, held: list[tuple[CallRun, Entry]]) -> None:
        if len(held) == 1:
            ((run, it),) = held
            self._post_alone(run, it.kind, it.queue_ms, it.handler_ms, it.body)
            return
        self._count(len(held))
        self._batches += 1
        self._transport.publish(_Batch(self, held, self._exchange, b"replies-%x" % self._batches))
