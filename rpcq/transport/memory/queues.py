"""Queues of the in-process broker, their messages, and who consumes them. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count
from operator import attrgetter
from typing import Final

from rpcq.wire.properties import decode, encode
from rpcq.wire.topology import Queue

DEFAULT_EXCHANGE: Final = b""
HELD_BACK: Final = -(1 << 62)
"""The first position for messages that came back: it is before all messages that were never delivered."""

_position: Final = attrgetter("position")


class Entry:
    """A message in one queue.

    Attributes:
        position: its place among the messages of its queue.
        expires: the time from which it expires when it is at the head of its queue; None if it has no TTL.
        deliveries: how often it came back to its queue.

    """

    __slots__ = ("body", "deliveries", "exchange", "expires", "position", "properties", "routing_key")

    def __init__(
        self, exchange: bytes, routing_key: bytes, properties: bytes, body: bytes, expires: float | None
    ) -> None:
        self.exchange = exchange
        self.routing_key = routing_key
        self.properties = properties
        self.body = body
        self.expires = expires
        self.position = 0
        self.deliveries = 0


class Connection:
    """A connection that declares and consumes: its consumers, its exclusive queues, and what it has in hand."""

    __slots__ = ("consumers", "exclusive", "last_tag", "unacked")

    def __init__(self) -> None:
        self.consumers: list[Consumer] = []
        self.exclusive: list[LiveQueue] = []
        self.unacked: dict[int, Handed] = {}
        self.last_tag = 0


class Consumer:
    """A consumer of one queue. The owner of the `Vhost` calls `deliver`; the `Vhost` itself does not."""

    __slots__ = ("cancelled", "connection", "deliver", "held", "no_ack", "prefetch", "queue")

    def __init__(
        self,
        queue: LiveQueue,
        connection: Connection,
        deliver: Callable[[Handed], None],
        prefetch: int,
        no_ack: bool,
    ) -> None:
        self.queue = queue
        self.connection = connection
        self.deliver = deliver
        self.prefetch = 0 if no_ack else prefetch
        self.no_ack = no_ack
        self.held = 0
        self.cancelled = False

    def properties(self, entry: Entry) -> bytes:
        """The properties that this consumer gets: a quorum queue adds how often the message came back."""
        if not entry.deliveries or not self.queue.quorum:
            return entry.properties
        properties = decode(entry.properties)
        properties.headers = {**(properties.headers or {}), "x-delivery-count": entry.deliveries}
        return encode(properties)


Handed = tuple[Consumer, int, Entry]
"""A message on its way to a consumer, with its delivery tag."""


class LiveQueue:
    """A queue that was declared, and its messages. After each operation, `ready` or `available` is empty."""

    def __init__(self, name: str, declared: Queue, owner: Connection | None) -> None:
        arguments = declared.arguments
        exchange = arguments.get("x-dead-letter-exchange")
        self.name = name
        self.declared = declared
        self.owner = owner
        self.max_length: int | None = arguments.get("x-max-length")
        self.drops_head: bool = arguments.get("x-overflow") == "drop-head"
        self.ttl: int | None = arguments.get("x-message-ttl")
        self.dead_letter_exchange: bytes | None = None if exchange is None else exchange.encode()
        key = arguments.get("x-dead-letter-routing-key")
        self.dead_letter_key: bytes | None = None if key is None else key.encode()
        self.quorum = arguments.get("x-queue-type") == "quorum"
        self.delivery_limit: int | None = arguments.get("x-delivery-limit")
        self.is_single: bool = arguments.get("x-single-active-consumer", False)
        self.ready: deque[Entry] = deque()
        self.consumers: list[Consumer] = []
        # Consumers that may get a message: below their prefetch, and active if only one is. The first one is next.
        self.available: deque[Consumer] = deque()
        self.positions = count()
        self.returns = count(HELD_BACK)
        self.wake: float | None = None
        self.bound = [(DEFAULT_EXCHANGE, name.encode())]
        self.deleted = False

    def add_consumer(self, consumer: Consumer) -> None:
        """Add a consumer. With a single active consumer, that is the one that has been here longest."""
        self.consumers.append(consumer)
        if not self.is_single or len(self.consumers) == 1:
            self.available.append(consumer)

    def remove_consumer(self, consumer: Consumer) -> None:
        """Remove a consumer; if it was the single active one, the next one becomes active."""
        consumer.cancelled = True
        was_active = consumer is self.consumers[0]
        self.consumers.remove(consumer)
        if consumer in self.available:
            self.available.remove(consumer)
        if self.is_single and was_active and self.consumers:
            self.available.append(self.consumers[0])  # it never held anything

    def put_back(self, entries: list[Entry]) -> None:
        """Put back messages that were handed out, in the order of their delivery tags.

        In a classic queue they go back to their old places. In a quorum queue they go before all messages that were
        never delivered, in the order in which they came back.
        """
        if self.quorum:
            for entry in entries:
                entry.position = next(self.returns)
        entries.sort(key=_position)
        if self.ready and entries[-1].position > self.ready[0].position:
            self.ready = deque(sorted([*entries, *self.ready], key=_position))
        else:
            self.ready.extendleft(reversed(entries))

    def put_last(self, entry: Entry) -> None:
        """Put a message that a consumer gave back last; quorum queues without a delivery limit do so."""
        entry.deliveries += 1
        entry.position = next(self.positions)
        self.ready.append(entry)
