"""Events: their exchanges, queues and messages. Pure; `docs/wire.md` is the contract.

In the queue of a subscription, an event is a job of that subscription: it has the properties of a job, and a version.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from rpcq.wire.delays import ANY_DELAY
from rpcq.wire.job_queues import DELIVERY_LIMIT, SUSPECT_LIMIT, JobTopology
from rpcq.wire.jobs import JobMessage, encode_job
from rpcq.wire.topology import MAX_LENGTH, Exchange, Queue

NOT_A_SUBSCRIPTION: Final = "suspects"
"""The name that no subscription can have: `sub.<service>:suspects` would be its address, and is a key of suspects."""


class EventTopology:
    """The exchanges and queues for events of one namespace.

    Args:
        namespace: the namespace.

    Attributes:
        jobs: the exchanges and queues that events share with jobs: delays, suspects and dead letters.

    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self.jobs = JobTopology(namespace)
        self.unheard = Exchange(f"{namespace}.unheard", "fanout")
        self.events = Exchange(f"{namespace}.events", "topic", alternate=self.unheard.name)

    def exchanges(self) -> list[Exchange]:
        """The exchanges that publishers and subscribers declare; the alternate exchange comes first."""
        return [self.unheard, self.events]

    def queue(self, service: str, subscription: str, patterns: Iterable[str]) -> Queue:
        """The queue of a subscription."""
        address = self.address(service, subscription)
        return Queue(
            f"{self._namespace}.{address}",
            durable=True,
            arguments=self.jobs.arguments(address, DELIVERY_LIMIT),
            bindings=(
                *((self.events.name, pattern) for pattern in patterns),
                (self.jobs.due.name, f"{ANY_DELAY}{address}"),
            ),
        )

    def suspects(self, service: str, subscription: str) -> Queue:
        """The queue of a subscription's events that came back too often."""
        key = self.suspect_key(service, subscription)
        return Queue(
            f"{self._namespace}.{key}",
            durable=True,
            arguments=self.jobs.arguments(self.address(service, subscription), SUSPECT_LIMIT),
            bindings=((self.jobs.due.name, key),),
        )

    def instance_queue(self, patterns: Iterable[str]) -> Queue:
        """The queue of one process for a subscription of each instance."""
        return Queue(
            "",
            exclusive=True,
            auto_delete=True,
            arguments={"x-max-length": MAX_LENGTH, "x-overflow": "drop-head"},
            bindings=tuple((self.events.name, pattern) for pattern in patterns),
        )

    def address(self, service: str, subscription: str) -> str:
        """Where the events of a subscription go after a delay, and the key of its dead letters."""
        return f"sub.{service}:{subscription}"

    def suspect_key(self, service: str, subscription: str) -> str:
        """The routing key of a subscription's queue for suspects, at the exchange for what is due."""
        return f"{self.address(service, subscription)}:suspects"


@dataclass(frozen=True, slots=True)
class Publication:
    """An event that the broker has.

    Attributes:
        id: its ID, the same in all copies, attempts and replays.
        name: its name.
        version: the version of its class.
        key: its idempotency key.
        heard: whether a queue took it: that of a subscription, or one that somebody else bound. False if nobody
            listens; None if that is not known, because a queue keeps what nobody hears
            (`ClientOptions.unheard_kept`), or because it was published again after a lost connection.

    """

    id: str
    name: str
    version: int
    key: str
    heard: bool | None


@dataclass(frozen=True, slots=True)
class EncodedEvent:
    """An event as a message that can be published.

    Attributes:
        exchange: what it is published to.
        routing_key: its name.
        properties: encoded.
        body: its fields, as JSON.

    """

    exchange: bytes
    routing_key: bytes
    properties: bytes
    body: bytes


def encode_event(topology: EventTopology, message: JobMessage, now_ms: int) -> EncodedEvent:
    """Encode an event: `name`, `version` and `body` of the message are the event's.

    Args:
        topology: of the namespace.
        message: the event.
        now_ms: the time, in milliseconds since the epoch.

    """
    exchange, key = topology.events.name.encode(), message.name.encode()
    return EncodedEvent(exchange, key, encode_job(message, now_ms), message.body)
