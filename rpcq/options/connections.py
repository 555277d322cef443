"""How clients and workers reach the broker, and how they behave."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypedDict

from rpcq.errors import ConfigurationError
from rpcq.options.checks import MAX_TIMEOUT, NAMESPACE, check_count, check_name, check_seconds, check_several


class ConnectionKwargs(TypedDict, total=False):
    """The keyword arguments that `Client` and `Worker` share; see `ConnectionOptions`."""

    name: str
    namespace: str
    heartbeat: float
    connect_timeout: float
    max_body: int
    reply_exchange: str | None


@dataclass(frozen=True, kw_only=True)
class ConnectionOptions:
    """How to reach the broker.

    Attributes:
        name: the name of this program in RabbitMQ's list of connections, and the `app_id` of its requests.
        namespace: the prefix of all queues and exchanges, which lets environments share a vhost; it has no dot.
        heartbeat: seconds between two heartbeats, a whole number; 5 to 20 is sensible. A connection that receives
            nothing for two heartbeats is closed as lost.
        connect_timeout: seconds that an attempt to connect and declare may take.
        max_body: the largest body of a message, in bytes. A larger one is refused before it is sent, and where it
            arrives. A value above the broker's own limit is of no use: `max_message_size`, by default 16 MiB since
            RabbitMQ 4.0.
        reply_exchange: the topic exchange for replies, for brokers whose users may not write to every queue. It must be
            the same for clients and workers. None for the default exchange.

    """

    name: str = "rpcq"
    namespace: str = "rpcq"
    heartbeat: float = 10.0
    connect_timeout: float = 10.0
    max_body: int = 1024 * 1024
    reply_exchange: str | None = None

    def __post_init__(self) -> None:
        check_name("name", self.name)
        if not isinstance(self.namespace, str) or not NAMESPACE.match(self.namespace):
            msg = (
                "namespace must be 1 to 100 of the characters A-Z a-z 0-9 _ -, and not 'amq', which begins the "
                f"broker's own names; got {self.namespace!r}"
            )
            raise ConfigurationError(msg)
        check_seconds("heartbeat", self.heartbeat, 3600)
        if self.heartbeat != int(self.heartbeat):
            msg = f"heartbeat must be a whole number of seconds from 1 to 3600; got {self.heartbeat!r}"
            raise ConfigurationError(msg)
        check_seconds("connect_timeout", self.connect_timeout)
        check_count("max_body", self.max_body, 1, 512 * 1024 * 1024)
        if self.reply_exchange is not None:
            check_name("reply_exchange", self.reply_exchange)


class ClientKwargs(ConnectionKwargs, total=False):
    """The keyword arguments of `Client`; see `ClientOptions`."""

    timeout: float
    max_in_flight: int
    identify: bool
    disconnected_timeout: float
    unheard_kept: bool
    batching: bool


@dataclass(frozen=True, kw_only=True)
class ClientOptions(ConnectionOptions):
    """How a client behaves.

    Attributes:
        timeout: seconds until a call has ended; `with_options` changes it for some calls.
        max_in_flight: the most calls under way at once; one more fails with `Overloaded`.
        identify: whether requests contain the user of the URL, which services get as `Context.user`. The broker checks
            that it is true. Not for tokens of OAuth 2, whose user has another name than the URL.
        disconnected_timeout: seconds that the broker waits, at least, for a consumer on a lost node, before it delivers
            that consumer's messages to another one: `consumer_disconnected_timeout` of RabbitMQ 4.3, 60 s by default. A
            request that expires in a quorum queue within this time after it was sent has certainly not run. The client
            subtracts two heartbeats, in which its own clock may have stood still.
        unheard_kept: whether a queue is bound to the exchange for events that nobody hears, to keep them. The broker
            then returns none, so `Publication.heard` is None instead of True.
        batching: whether workers may send it several replies in one message, which costs the broker less. What a call
            returns or raises does not depend on it.

    """

    timeout: float = 30.0
    max_in_flight: int = 100_000
    identify: bool = False
    disconnected_timeout: float = 60.0
    unheard_kept: bool = False
    batching: bool = True

    def __post_init__(self) -> None:
        ConnectionOptions.__post_init__(self)
        check_seconds("timeout", self.timeout, MAX_TIMEOUT)
        check_count("max_in_flight", self.max_in_flight, 1, 10_000_000)
        for name in ("identify", "unheard_kept", "batching"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} must be True or False; got {getattr(self, name)!r}")
        check_seconds("disconnected_timeout", self.disconnected_timeout)

    @property
    def unrun_within(self) -> float:
        """The expiry of a request proves that it was never delivered, if it comes within these seconds after sending.

        Two heartbeats are subtracted: a client whose machine, and so its clock, stands still for longer loses its
        connection, and the reply queue with it.
        """
        return self.disconnected_timeout - 2 * self.heartbeat


class WorkerKwargs(ConnectionKwargs, total=False):
    """The keyword arguments of `Worker`; see `WorkerOptions`."""

    prefetch: int
    grace: float
    reply_to: tuple[str, ...]
    remember: int
    blocked_after: float
    job_prefetch: int


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(ConnectionOptions):
    """How a worker behaves.

    Attributes:
        prefetch: calls of each service that run at once; `def` handlers have as many threads.
        grace: seconds that running handlers have to end when the worker stops.
        reply_to: regular expressions of further queues that the worker may reply to; each matches a whole name.
            Server-named queues and direct reply-to are always allowed.
        remember: the approximate limit, in bytes, for stored results of calls with an idempotency key; 0 stores none.
            Up to an eighth of it is used besides, for the keys of jobs that are done.
        blocked_after: seconds that a handler may block the event loop before a warning names it.
        job_prefetch: jobs of each service that run at once, besides its calls. Of a service with lanes, as many more of
            high priority, and a quarter as many, at least one, of low priority. Each subscription runs as many events
            at once. Of a service that is ordered, as many more jobs with an order key.

    """

    prefetch: int = 100
    grace: float = 30.0
    reply_to: tuple[str, ...] = ()
    remember: int = 64 * 1024 * 1024
    blocked_after: float = 1.0
    job_prefetch: int = 20

    def __post_init__(self) -> None:
        ConnectionOptions.__post_init__(self)
        check_count("prefetch", self.prefetch, 1, 65_535)
        check_seconds("grace", self.grace)
        check_count("remember", self.remember, 0, 1024**4)
        check_seconds("blocked_after", self.blocked_after)
        check_count("job_prefetch", self.job_prefetch, 1, 65_535)
        object.__setattr__(self, "reply_to", check_several("reply_to", self.reply_to))
        for pattern in self.reply_to:
            try:
                re.compile(pattern.encode() if isinstance(pattern, str) else None)  # it is matched with bytes
            except (re.error, TypeError, UnicodeEncodeError) as error:
                msg = f"reply_to must be regular expressions; got {pattern!r}: {error}"
                raise ConfigurationError(msg) from error


# For people at a prompt, who do not see what type checkers see.
