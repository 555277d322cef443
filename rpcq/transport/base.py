"""The seam: what a client or a worker may ask of a transport.

It is push-based, and synchronous where messages are hot, so that no task, queue or lock is paid for each message.
Everything else is asynchronous and bounded in time.

A transport has two sessions, each with a connection of its own: one only consumes, one only publishes. Either may go
down and come back by itself; what that means for a call is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from rpcq.errors import BrokerError
from rpcq.wire.topology import Exchange, Queue


class Published(Enum):
    """What became of a published message."""

    CONFIRMED = "confirmed"
    """The broker has it."""
    RETURNED = "returned"
    """No queue is bound for it (`mandatory`)."""
    REFUSED = "refused"
    """The broker would not take it: the queue is full."""
    TOO_LARGE = "too large"
    """The broker takes no message of that size."""
    UNSENT = "unsent"
    """The session went down before it was handed to the socket, or before the broker came to read it."""
    UNKNOWN = "unknown"
    """The session went down after it was handed to the socket, and before the broker said what became of it."""


class Outgoing:
    """One message to publish. Subclasses say who is told what became of it: a closure for each would cost more.

    Attributes:
        exchange: its name, or empty for the default exchange.
        routing_key: at most 255 bytes.
        correlation_id: as in the properties; it tells returned messages apart.
        properties: as `rpcq.properties.encode` gives them.
        body: the message itself.
        mandatory: whether the broker returns it where no queue is bound.

    """

    __slots__ = ("body", "correlation_id", "exchange", "mandatory", "properties", "routing_key")

    def __init__(
        self,
        exchange: bytes,
        routing_key: bytes,
        correlation_id: bytes,
        properties: bytes,
        body: bytes,
        mandatory: bool = True,  # noqa: FBT002 - positional on the hot path
    ) -> None:
        self.exchange = exchange
        self.routing_key = routing_key
        self.correlation_id = correlation_id
        self.properties = properties
        self.body = body
        self.mandatory = mandatory

    def on_published(self, settled: Published) -> None:
        """What became of it; called once, from inside the event loop. It must not raise."""
        raise NotImplementedError


class Message(Outgoing):
    """An outgoing message that calls `tell` with what became of it."""

    __slots__ = ("_tell",)

    def __init__(
        self,
        exchange: bytes,
        routing_key: bytes,
        correlation_id: bytes,
        properties: bytes,
        body: bytes,
        tell: Callable[[Published], None],
        mandatory: bool = True,  # noqa: FBT002 - as in the base class
    ) -> None:
        super().__init__(exchange, routing_key, correlation_id, properties, body, mandatory)
        self._tell = tell

    def on_published(self, settled: Published) -> None:
        """Tell."""
        self._tell(settled)


class Acknowledger(Protocol):
    """Where a delivery came from, and where its settlement goes."""

    def settle(self, tag: int, accept: bool, requeue: bool) -> None:
        """Acknowledge (`accept`) or reject a delivery. Dropped where its session has gone: the broker knows."""


class Delivery:
    """One message that arrived.

    Attributes:
        source: the subscription of one session that it came through: two deliveries of one session have the same.
        exchange: that it was published to, or dead-lettered to.
        redelivered: whether the broker delivered it before.
        properties: as `rpcq.properties.decode` takes them.
        body: the message itself; None where it is over the limit, and was not kept.
        body_size: its size in bytes, as the sender announced it.

    """

    __slots__ = ("_settled", "body", "body_size", "exchange", "properties", "redelivered", "source", "tag")

    def __init__(
        self,
        source: Acknowledger,
        tag: int,
        redelivered: bool,
        properties: bytes,
        body: bytes | None,
        body_size: int,
        exchange: bytes = b"",
    ) -> None:
        self.source = source
        self._settled = False
        self.exchange = exchange
        self.tag = tag
        self.redelivered = redelivered
        self.properties = properties
        self.body = body
        self.body_size = body_size

    def ack(self) -> None:
        """Tell the broker that the message is dealt with.

        Raises:
            RuntimeError: the delivery was settled before. A broker closes the channel over that.

        """
        self._settle_once()
        self.source.settle(self.tag, True, False)

    def reject(self, *, requeue: bool = False) -> None:
        """Give the message back to its queue, or give it up (it is dead-lettered).

        Raises:
            RuntimeError: the delivery was settled before.

        """
        self._settle_once()
        self.source.settle(self.tag, False, requeue)

    def _settle_once(self) -> None:
        if self._settled:
            msg = f"delivery {self.tag} was settled before"
            raise RuntimeError(msg)
        self._settled = True


@dataclass(frozen=True, slots=True)
class Subscription:
    """A queue to declare and consume, again in each session.

    Attributes:
        queue: what to declare and bind.
        on_delivery: called with each message, from inside the event loop; it must not raise.
        prefetch: unacknowledged deliveries that it may hold; 0 for no limit.
        no_ack: the broker forgets what it sends.
        arguments: of the consumer, as in `basic.consume`.

    """

    queue: Queue
    on_delivery: Callable[[Delivery], None]
    prefetch: int = 0
    no_ack: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told of the sessions. Called from inside the event loop; none may raise or block.

    Attributes:
        consuming: the consuming session is up; with the names of the subscribed queues, in order.
        consuming_lost: it is down: deliveries of it can no longer be settled.
        publishing: the publishing session is up, or no longer blocked.
        publishing_lost: it is down, after all unconfirmed messages were settled.
        publishing_blocked: the broker takes nothing for now: a memory or disk alarm; with its reason.

    """

    consuming: Callable[[Sequence[str]], None]
    consuming_lost: Callable[[BrokerError], None]
    publishing: Callable[[], None]
    publishing_lost: Callable[[BrokerError], None]
    publishing_blocked: Callable[[str], None]


class Transport(Protocol):
    """What carries messages. One client or one worker has one of its own."""

    @property
    def can_publish(self) -> bool:
        """Whether the publishing session is up, not blocked, and its socket's buffer below the high-water mark."""

    async def start(
        self, exchanges: Sequence[Exchange], subscriptions: Sequence[Subscription], listener: Listener
    ) -> None:
        """Open both sessions, and keep them open until `close`.

        Raises:
            BrokerError: a session could not be opened at the first try; nothing is left open.

        """

    def publish(self, message: Outgoing) -> None:
        """Send a message. Written with everything else that this iteration of the loop has to write.

        Where the publishing session is down, the message settles at once as unsent. Messages arrive in the order in
        which they were published, unless the broker refuses messages at that time: another channel may then be taken.
        """

    async def writable(self) -> None:
        """Wait until `can_publish`."""

    async def stop_consuming(self) -> None:
        """Tell the broker to deliver nothing more. What arrived before can still be settled."""

    async def close(self) -> None:
        """Write what is pending, then close both sessions. What is unconfirmed is settled."""
