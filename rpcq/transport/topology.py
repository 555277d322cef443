"""Names and arguments of queues and exchanges. Pure.

A namespace prefixes every name, so that environments and tests can share a vhost. The arguments of a queue cannot be
changed once it is declared: those below are part of the wire contract.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from rpcq.errors import ConfigurationError

QueueType = Literal["classic", "quorum"]

MAX_LENGTH: Final = 100_000
"""Messages that a request queue holds; what is published beyond is refused (`Overloaded`)."""

EVERY_SERVICE: Final = "*"
"""The routing key of control messages for every worker of the namespace; no service can be called that."""

DIRECT_REPLY_TO: Final = b"amq.rabbitmq.reply-to"


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange to declare; durable."""

    name: str
    type: Literal["direct"] = "direct"


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue to declare, and how it is bound.

    Attributes:
        name: empty for one that the broker chooses for each session.
        prefix: begins a name that is made up for each session, where `name` is empty.
        bindings: pairs of exchange and routing key.
        bound_by_name: exchanges that it is bound to under its own name.

    """

    name: str
    durable: bool = False
    exclusive: bool = False
    auto_delete: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    bindings: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    bound_by_name: tuple[str, ...] = ()

    def for_session(self) -> Queue:
        """The queue with the name that it has in a new session: a fresh one, since the last one may still be locked."""
        return replace(self, name=self.prefix + secrets.token_urlsafe(16)) if self.prefix and not self.name else self


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

    def reply_queue(self, exchange: str | None = None) -> Queue:
        """A client's own, gone with its connection: named by the broker, or reached through a reply exchange."""
        if exchange is None:
            return Queue(name="", exclusive=True, auto_delete=True)
        return Queue(name="", prefix=self._reply, exclusive=True, auto_delete=True, bound_by_name=(exchange,))

    def control_queue(self, services: tuple[str, ...]) -> Queue:
        """A worker's own, bound under every service that it runs, and under `EVERY_SERVICE`."""
        return Queue(
            name="",
            exclusive=True,
            auto_delete=True,
            bindings=tuple((self.control.name, key) for key in (*services, EVERY_SERVICE)),
        )

    @property
    def _once(self) -> str:
        return f"{self.namespace}.once."

    def delivers_once(self, queue: str) -> bool:
        """Whether a queue is one whose expiry proves that the request never ran."""
        return queue.startswith(self._once)

    @property
    def _reply(self) -> str:
        return f"{self.namespace}.reply."

    def reply_prefixes(self, exchange: str | None = None) -> tuple[bytes, ...]:
        """How the queues begin that a worker replies to: server-named ones, reply queues, and direct reply-to.

        Through a reply exchange, only those are reached that are bound to it.
        """
        if exchange is not None:
            return (self._reply.encode(),)
        return b"amq.gen-", DIRECT_REPLY_TO + b".", self._reply.encode()

    def exchanges(self, reply_exchange: str | None = None) -> list[Exchange]:
        """Those that clients and workers use, besides the default one."""
        own = [self.requests, self.control]
        return own if reply_exchange is None else [*own, Exchange(reply_exchange)]
