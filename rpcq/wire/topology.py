"""Names and arguments of queues and exchanges. Pure.

A namespace prefixes every name, so that environments and tests can share a vhost. The arguments of a queue cannot
change after it is declared, so the arguments below are part of the wire contract.
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
"""The most messages that a request queue holds; the broker refuses further ones (`Overloaded`)."""

EVERY_SERVICE: Final = "@all"
"""The routing key of control messages for every worker of the namespace; no service can have this name."""

DIRECT_REPLY_TO: Final = b"amq.rabbitmq.reply-to"

_USER: Final = re.compile(r"[A-Za-z0-9_.@+-]{1,150}\Z")

CONSUMER_TIMEOUT: Final = 24 * 60 * 60 * 1000
"""Milliseconds that a consumer may hold a request without acknowledging it: far longer than any handler runs.

After this time, RabbitMQ 4.3 puts the request back and does not count that as a delivery: if it then expires, it may
have run. This argument of the consumer overrides a shorter policy
(https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout). Versions before 4.3 ignore it.
"""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A durable exchange to declare.

    Attributes:
        name: the exchange's name.
        type: how it matches routing keys with bindings.
        internal: clients cannot publish to it; it gets only dead letters.
        alternate: the exchange that gets what this one has no queue for; empty for none.
        bindings: pairs of another exchange and a routing key: it gets that exchange's messages with this key.

    """

    name: str
    type: Literal["direct", "topic", "fanout"] = "direct"
    internal: bool = False
    alternate: str = ""
    bindings: tuple[tuple[str, str], ...] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of its declaration."""
        return {"alternate-exchange": self.alternate} if self.alternate else {}


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue to declare, and how it is bound.

    Attributes:
        name: the queue's name; empty for a new name in each session.
        prefix: the start of the name that rpcq makes for each session; if it is empty, the broker makes the name.
        bindings: pairs of exchange and routing key.
        bound_by_name: exchanges to which it is bound under its own name.
        as_it_is: somebody else declared it: it must exist, and is neither declared nor bound.

    """

    name: str
    durable: bool = False
    exclusive: bool = False
    auto_delete: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    bindings: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    bound_by_name: tuple[str, ...] = ()
    as_it_is: bool = False

    def for_session(self) -> Queue:
        """The queue with a name for a new session. It is new, because the last session's queue may still be locked."""
        return replace(self, name=self.prefix + secrets.token_urlsafe(16)) if self.prefix and not self.name else self


@dataclass(frozen=True, slots=True)
class Topology:
    """The names of one namespace."""

    namespace: str = "rpcq"

    @property
    def requests(self) -> Exchange:
        """The exchange for requests; the routing key is the service's name."""
        return Exchange(f"{self.namespace}.requests")

    @property
    def control(self) -> Exchange:
        """The exchange for control messages to all workers of a service, such as cancel and ping.

        It is a topic exchange, because topic permissions can keep a worker from binding under the name of a service
        that it does not run. No binding key has a wildcard.
        """
        return Exchange(f"{self.namespace}.control", "topic")

    @property
    def notices(self) -> Exchange:
        """The exchange for requests that request queues give up. Only reply queues are bound to it, by their names.

        It is internal: clients cannot publish to it. It is a topic exchange, because topic permissions can keep a
        client from binding under any other name (https://www.rabbitmq.com/docs/access-control#topic-authorisation).
        """
        return Exchange(f"{self.namespace}.notices", "topic", internal=True)

    def request_queue(
        self, service: str, queue_type: QueueType, name: str | None = None, *, declare: bool = True
    ) -> Queue:
        """The request queue of a service. Without `declare`, it is an existing one of this name, used as it is.

        A quorum queue has a delivery limit of 0: the broker delivers a request at most once, and gives it up with
        reason `delivery_limit` when the worker that holds it dies. It is also bound under its own name: a request with
        that routing key goes to this queue only.

        Raises:
            ConfigurationError: a classic queue, or one that is used as it is, has a name for quorum queues: clients
                would conclude from the expiry of a request that it never ran. Or the service has such a name, and would
                get requests for that queue.

        """
        if self.delivers_once(service):
            msg = f"the name of a service must not begin with {self._once!r}, as quorum queues do; got {service!r}"
            raise ConfigurationError(msg)
        if name and queue_type != "quorum" and self.delivers_once(name):
            msg = f"the name of a classic queue must not begin with {self._once!r}, as quorum queues do; got {name!r}"
            raise ConfigurationError(msg)
        if name and not declare:
            if self.delivers_once(name):
                msg = f"a queue that is used as it is must not begin with {self._once!r}; got {name!r}"
                raise ConfigurationError(msg)
            return Queue(name, durable=True, arguments={"x-queue-type": queue_type}, as_it_is=True)
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
        """A client's own queue for replies, which is deleted with its connection.

        The broker names it. With a reply exchange, its name contains the user's name: permissions can then keep a user
        from reading the reply queues of others, and from binding under their names.

        Raises:
            ConfigurationError: the user's name cannot be part of a routing key, or has a wildcard.

        """
        if exchange is not None and not _USER.match(user):
            msg = f"the user must be 1 to 150 of A-Z a-z 0-9 _ . @ + - with a reply exchange; got {user!r}"
            raise ConfigurationError(msg)
        prefix = "" if exchange is None else f"{self._reply}{user}."
        bound_by_name = (self.notices.name,) if exchange is None else (self.notices.name, exchange)
        return Queue(name="", prefix=prefix, exclusive=True, auto_delete=True, bound_by_name=bound_by_name)

    def control_queue(self, services: tuple[str, ...]) -> Queue:
        """A worker's own queue for control messages, bound under its services' names and `EVERY_SERVICE`."""
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
        """Whether only a quorum queue with a delivery limit of 0 may have this name."""
        return queue.startswith(self._once)

    @property
    def _reply(self) -> str:
        return f"{self.namespace}.reply."

    def reply_prefixes(self, exchange: str | None = None) -> tuple[bytes, ...]:
        """Prefixes of the queues that a worker replies to: named by the broker, direct reply-to, and reply queues.

        With a reply exchange, only reply queues: no other queues are bound to it.
        """
        if exchange is not None:
            return (self._reply.encode(),)
        return b"amq.gen-", DIRECT_REPLY_TO + b".", self._reply.encode()

    def exchanges(self, reply_exchange: str | None = None) -> list[Exchange]:
        """The exchanges that clients and workers use, besides the default one."""
        own = [self.requests, self.control, self.notices]
        return own if reply_exchange is None else [*own, Exchange(reply_exchange, "topic")]
