"""The seam: what a client or a worker may ask of a transport.

It is push-based. What happens for each message is synchronous, so that no message costs a task, a queue or a lock.
Everything else is asynchronous and bounded in time.

A transport has two sessions, each with its own connection: one only consumes, one only publishes. Each may go down and
come back independently of the other. What that means for a call is not decided here.
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
    """The broker has the message."""
    RETURNED = "returned"
    """The message is `mandatory`, and no queue is bound for it."""
    REFUSED = "refused"
    """The broker did not take the message, because the queue is full."""
    TOO_LARGE = "too large"
    """The message is larger than the broker takes."""
    UNSENT = "unsent"
    """The session went down before the message was handed to the socket, or before the broker read it."""
    UNKNOWN = "unknown"
    """The session went down after the message was handed to the socket, and before the broker confirmed it."""


class Outgoing:
    """One message to publish. Subclasses define `on_published`: a closure for each message would cost more.

    Attributes:
        exchange: the exchange's name; empty for the default exchange.
        routing_key: at most 255 bytes.
        correlation_id: the same as in the properties; a returned message is found by it.
        properties: encoded by `rpcq.wire.properties.encode`.
        body: the body's bytes.
        mandatory: whether the broker returns the message if no queue is bound for it.

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

    def on_published(self, published: Published) -> None:
        """Take what became of the message; called once, from inside the event loop. It must not raise."""
        raise NotImplementedError


class Message(Outgoing):
    """An outgoing message that calls a function with what became of it."""

    __slots__ = ("_callback",)

    def __init__(
        self,
        exchange: bytes,
        routing_key: bytes,
        correlation_id: bytes,
        properties: bytes,
        body: bytes,
        on_published: Callable[[Published], None],
        mandatory: bool = True,  # noqa: FBT002 - as in the base class
    ) -> None:
        super().__init__(exchange, routing_key, correlation_id, properties, body, mandatory)
        self._callback = on_published

    def on_published(self, published: Published) -> None:
        """Call the function."""
        self._callback(published)


class Acknowledger(Protocol):
    """The source of a delivery, which also settles it."""

    def settle(self, tag: int, accept: bool, requeue: bool) -> None:
        """Acknowledge (`accept`) or reject a delivery.

        Does nothing if the session of the delivery has ended: the broker has taken the message back.
        """


class Delivery:
    """One message that arrived.

    Attributes:
        source: the subscription, in one session, that the message came through; all its deliveries have the same.
        tag: the delivery tag.
        exchange: the exchange that the message was published or dead-lettered to.
        redelivered: whether the broker delivered the message before.
        properties: still encoded; `rpcq.wire.properties.decode` reads them.
        body: the body's bytes; None if it was larger than `max_body` and was not kept.
        body_size: the body's size in bytes, as the sender announced it.

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
        """Acknowledge the message: the broker removes it from its queue.

        Raises:
            RuntimeError: the delivery was settled before. A broker would close the channel because of that.

        """
        self._settle_once()
        self.source.settle(self.tag, True, False)

    def reject(self, *, requeue: bool = False) -> None:
        """Give the message back to its queue (`requeue`), or give it up: the broker then dead-letters it.

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
    """A queue to declare and consume; each new session does it again.

    Attributes:
        queue: the queue to declare and bind.
        on_delivery: called with each message, from inside the event loop; it must not raise.
        prefetch: how many unacknowledged deliveries the consumer may hold; 0 for no limit.
        no_ack: whether the broker takes each message as acknowledged once it has sent it.
        arguments: the arguments of the consumer, as in `basic.consume`.
        in_order: the queue has a single active consumer, and who comes next must get its messages in their order.
            `Transport.hand_over` ends this consumer, not `stop_consuming`.

    """

    queue: Queue
    on_delivery: Callable[[Delivery], None]
    prefetch: int = 0
    no_ack: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    in_order: bool = False


@dataclass(frozen=True, slots=True)
class Listener:
    """Callbacks for changes of the sessions. They are called from inside the event loop, and must not raise or block.

    Attributes:
        consuming: called when the consuming session is up, with the names of the subscribed queues, in order.
        consuming_lost: called when the consuming session is down: its deliveries can no longer be settled.
        publishing: called when the publishing session is up, or no longer blocked.
        publishing_lost: called when the publishing session is down, after `on_published` of all its messages.
        publishing_blocked: called with the reason when the broker takes no messages (a memory or disk alarm).

    """

    consuming: Callable[[Sequence[str]], None]
    consuming_lost: Callable[[BrokerError], None]
    publishing: Callable[[], None]
    publishing_lost: Callable[[BrokerError], None]
    publishing_blocked: Callable[[str], None]


class Transport(Protocol):
    """What carries messages. Each client and each worker has its own."""

    @property
    def can_publish(self) -> bool:
        """Whether the publishing session is up, is not blocked, and has less than the high-water mark to write."""

    async def start(
        self,
        exchanges: Sequence[Exchange],
        subscriptions: Sequence[Subscription],
        listener: Listener,
        queues: Sequence[Queue] = (),
    ) -> None:
        """Open both sessions, and keep them open until `close`.

        Each new session declares the exchanges; one that consumes declares its queues too, and `queues`, which it does
        not consume.

        Raises:
            BrokerError: a session could not be opened at the first attempt; nothing is left open.

        """

    async def declare(self, exchanges: Sequence[Exchange]) -> None:
        """Declare further exchanges to publish to, now and in each new session. It waits until a session is up.

        Raises:
            BrokerError: the broker refused.

        """

    def publish(self, message: Outgoing) -> None:
        """Send a message. It is written together with the other messages of this iteration of the event loop.

        If the publishing session is down, `on_published` is called with `UNSENT` at once. Messages arrive in the order
        in which they were published, except while the broker refuses messages: the transport may then change channels.
        """

    async def writable(self) -> None:
        """Wait until `can_publish`."""

    def now_ms(self) -> int:
        """The time for what messages say of times, in milliseconds since the epoch. Only while it is open.

        It is the machine's time, except on an in-process broker whose clock a test moves.
        """

    async def sleep_until(self, ms: int) -> None:
        """Wait until `now_ms` is at least this.

        The machine's clock may be set meanwhile, or the machine may sleep: it is looked at every 30 seconds.
        """

    async def stop_consuming(self) -> None:
        """Make the broker deliver nothing more. Earlier deliveries can still be settled.

        Subscriptions that are `in_order` go on until `hand_over`; a session that is lost later does not consume again.
        """

    async def settled(self, queue: str) -> bool:
        """Wait until the broker has all acknowledgements of the deliveries of a subscription that is `in_order`.

        Returns:
            False if the session of these deliveries is lost: the broker may deliver them again.

        """

    async def hand_over(self, queue: str, *, again: bool = False) -> None:
        """End the consumer of a subscription that is `in_order`.

        What it was given and did not settle goes back to the queue at once, in its order, before the next consumer
        gets anything, and counts as delivered once more. To cancel a consumer leaves these messages with it, while the
        next one already gets later ones.

        Args:
            queue: the queue's name.
            again: whether to consume again, behind the consumers that wait. Not after `stop_consuming`.

        """

    async def close(self) -> None:
        """Write what is pending, then close both sessions. `on_published` of every message has been called then."""
