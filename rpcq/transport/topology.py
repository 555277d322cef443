"""Names and arguments of queues and exchanges. Pure.

A namespace prefixes every name, so that environments and tests can share a vhost. The arguments of a queue cannot be
changed once it is declared: those below are part of the wire contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from rpcq.errors import ConfigurationError

QueueType = Literal["classic", "quorum"]

MAX_LENGTH: Final = 100_000
"""Messages that a request queue holds; what is published beyond is refused (`Overloaded`)."""

DIRECT_REPLY_TO: Final = b"amq.rabbitmq.reply-to"


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange to declare; durable."""

    name: str
    type: Literal["direct"] = "direct"


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue to declare, and how it is bound. An empty name lets the broker choose one for each session."""

    name: str
    durable: bool = False
    exclusive: bool = False
    auto_delete: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    bindings: tuple[tuple[str, str], ...] = ()
    """Pairs of exchange and routing key."""


@dataclass(frozen=True, slots=True)
class Names:
    """The names of one namespace."""

    namespace: str = "rpcq"

    @property
    def requests(self) -> Exchange:
        """Requests go here, under the service's name."""
        return Exchange(f"{self.namespace}.requests")

    @property
    def control(self) -> Exchange:
        """Rare messages to all workers of a service: cancel, ping."""
        return Exchange(f"{self.namespace}.control")

    def request_queue(self, service: str, queue_type: QueueType, name: str | None = None) -> Queue:
        """The request queue of a service.

        A quorum queue has a delivery limit of 0: the broker delivers a request at most once, and gives it up with
        reason `delivery_limit` when the worker that holds it dies.

        Raises:
            ConfigurationError: a classic queue has the name of one that delivers once: clients would take its expiry
                for proof that the request never ran.

        """
        if name and queue_type != "quorum" and self.delivers_once(name):
            msg = f"the queue of {service!r} is called {name!r}; names in {self._once}* are for quorum queues"
            raise ConfigurationError(msg)
        arguments: dict[str, Any] = {
            "x-max-length": MAX_LENGTH,
            "x-overflow": "reject-publish",
            "x-dead-letter-exchange": "",
        }
        if queue_type == "quorum":
            arguments |= {"x-queue-type": "quorum", "x-delivery-limit": 0}
        own = f"{self._once}{service}" if queue_type == "quorum" else f"{self.namespace}.req.{service}"
        return Queue(
            name=name or own,
            durable=True,
            arguments=arguments,
            bindings=((self.requests.name, service),),
        )

    def reply_queue(self) -> Queue:
        """A client's own: named by the broker, gone with its connection."""
        return Queue(name="", exclusive=True, auto_delete=True)

    def control_queue(self, services: tuple[str, ...]) -> Queue:
        """A worker's own, bound under every service that it runs."""
        return Queue(
            name="",
            exclusive=True,
            auto_delete=True,
            bindings=tuple((self.control.name, service) for service in services),
        )

    @property
    def _once(self) -> str:
        return f"{self.namespace}.once."

    def delivers_once(self, queue: str) -> bool:
        """Whether a queue is one whose expiry proves that the request never ran."""
        return queue.startswith(self._once)

    def reply_prefixes(self) -> tuple[bytes, ...]:
        """How the queues begin that a worker replies to: server-named ones, reply queues, and direct reply-to."""
        return b"amq.gen-", DIRECT_REPLY_TO + b".", f"{self.namespace}.reply.".encode()
