"""Names and arguments of queues and exchanges. Pure.

A namespace prefixes every name, so that environments and tests can share a vhost. The arguments of a queue cannot be
changed once it is declared: those below are part of the wire contract.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from rpcq.errors import ConfigurationError

QueueType = Literal["classic", "quorum"]

MAX_LENGTH: Final = 100_000
"""Messages that a request queue holds; what is published beyond is refused (`Overloaded`)."""

EVERY_SERVICE: Final = "@all"
"""The routing key of control messages for every worker of the namespace; no service can be called that."""

DIRECT_REPLY_TO: Final = b"amq.rabbitmq.reply-to"

_USER: Final = re.compile(r"[A-Za-z0-9_.@+-]{1,150}\Z")

CONSUMER_TIMEOUT: Final = 24 * 60 * 60 * 1000
"""Milliseconds that a consumer of requests may hold one, by the broker's clock: far longer than any handler runs.

RabbitMQ 4.3 puts a request back uncounted when this ends, and a request that expires after that has perhaps run. The
consumer's own argument beats a policy that is shorter (https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout);
versions before 4.3 do not read it.
"""


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange to declare; durable.

    Attributes:
        name: the exchange's.
        type: how it matches routing keys with bindings.
        internal: clients cannot publish to it; messages reach it as dead letters alone.

    """

    name: str
    type: Literal["direct", "topic"] = "direct"
    internal: bool = False


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
class Topology:
    """The names of one namespace."""

    namespace: str = "rpcq"

    @property
    def requests(self) -> Exchange:
        """Requests go here, under the service's name."""
        return Exchange(f"{self.namespace}.requests")

    @property
    def control(self) -> Exchange:
        """Rare messages to all workers of a service: cancel, ping.

        It is a topic exchange, because topic permissions can keep a worker from binding under the name of a service
        that it does not run. No key has a wildcard.
        """
        return Exchange(f"{self.namespace}.control", "topic")

    @property
    def notices(self) -> Exchange:
        """What request queues give up goes here. Reply queues alone are bound to it, each under its own name.

        It is internal, so that nobody can publish to it. It is a topic exchange, because topic permissions can keep a
        client from binding under any other name (https://www.rabbitmq.com/docs/access-control#topic-authorisation).
        """
        return Exchange(f"{self.namespace}.notices", "topic", internal=True)

    def request_queue(self, service: str, queue_type: QueueType, name: str | None = None) -> Queue:
        """The request queue of a service.

        A quorum queue has a delivery limit of 0: the broker delivers a request at most once, and gives it up with
        reason `delivery_limit` when the worker that holds it dies. It is bound under its own name as well: a request
        with that routing key is in this queue and in no other.

        Raises:
            ConfigurationError: a classic queue has the name of one that delivers once: clients would take its expiry
                for proof that the request never ran. Or the service is called like such a queue, and would get what is
                addressed to that.

        """
        if self.delivers_once(service):
            msg = f"the name of a service must not begin with {self._once!r}, as quorum queues do; got {service!r}"
            raise ConfigurationError(msg)
        if name and queue_type != "quorum" and self.delivers_once(name):
            msg = f"the queue of {service!r} is called {name!r}; names in {self._once}* are for quorum queues"
            raise ConfigurationError(msg)
        arguments: dict[str, Any] = {
            "x-max-length": MAX_LENGTH,
            "x-overflow": "reject-publish",
            "x-dead-letter-exchange": self.notices.name,
        }
        if queue_type == "quorum":
            arguments |= {"x-queue-type": "quorum", "x-delivery-limit": 0}
            name = name or self.once_queue(service)
        else:
            name = name or f"{self.namespace}.req.{service}"
        keys = (service, name) if self.delivers_once(name) else (service,)
        return Queue(
            name=name, durable=True, arguments=arguments, bindings=tuple((self.requests.name, key) for key in keys)
        )

    def reply_queue(self, exchange: str | None = None, user: str = "guest") -> Queue:
        """A client's own, gone with its connection: named by the broker, or reached through a reply exchange.

        In the latter case its name has the user's in it, so that permissions can keep a user from binding under, or
        reading, the reply queues of others.

        Raises:
            ConfigurationError: the user's name cannot be part of a routing key, or has a wildcard.

        """
        if exchange is not None and not _USER.match(user):
            msg = f"the user is called {user!r}; with a reply exchange, that is 1 to 150 of A-Z a-z 0-9 _ . @ + -"
            raise ConfigurationError(msg)
        prefix = "" if exchange is None else f"{self._reply}{user}."
        bound_by_name = (self.notices.name,) if exchange is None else (self.notices.name, exchange)
        return Queue(name="", prefix=prefix, exclusive=True, auto_delete=True, bound_by_name=bound_by_name)

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

    def once_queue(self, service: str) -> str:
        """The name of a service's quorum queue."""
        return f"{self._once}{service}"

    def delivers_once(self, queue: str) -> bool:
        """Whether a queue has a name that only quorum queues with a delivery limit of 0 may have."""
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
        own = [self.requests, self.control, self.notices]
        return own if reply_exchange is None else [*own, Exchange(reply_exchange, "topic")]
