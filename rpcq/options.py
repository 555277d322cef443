"""Frozen option objects, checked when they are made. Reads no environment.

Each class stands beside a `TypedDict` with the same names, so that the options can be given as keyword arguments
(`Client(url, timeout=5)`, `with_options(timeout=2)`) and are known to type checkers; they travel as one object.
Times are seconds, sizes are bytes.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypedDict

from rpcq.errors import DOMAIN_CODE, STATUS_CODES, ConfigurationError, DomainError

NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,100}\Z")
"""What services and clients may be called."""

NAMESPACE: Final = re.compile(r"(?!amq\Z)[A-Za-z0-9_-]{1,100}\Z")
"""What namespaces may be called: without a dot, so that no two pairs of namespace and service share a queue."""

MAX_HEADERS: Final = 8 * 1024
"""All headers of a message together; RabbitMQ ends a connection over far larger ones."""

MAX_PROPERTIES: Final = MAX_HEADERS + 4 * 1024
"""The same with the rest of a message's properties: none of the others is over 256 bytes."""

MAX_TIMEOUT: Final = 25 * 60.0
"""RabbitMQ ends a channel whose consumer holds a message for 30 minutes (`consumer_timeout`)."""

OWNED_HEADERS: Final = re.compile(r"x-(death\Z|first-death-|last-death-|delivery-count\Z|opt-|acquired-count\Z)")
"""Names that RabbitMQ owns: refused from users, never shown as metadata."""


def check_name(what: str, name: str) -> str:
    """The name, if it is one; `what` says what it names.

    Raises:
        ConfigurationError: it is not 1 to 100 of `A-Za-z0-9_.-`.

    """
    if not isinstance(name, str) or not NAME.match(name):
        msg = f"{what} is called {name!r}; a name is 1 to 100 of the characters A-Z a-z 0-9 _ . -"
        raise ConfigurationError(msg)
    return name


def check_seconds(name: str, value: float, most: float = math.inf) -> None:
    """Check a number of seconds.

    Raises:
        ConfigurationError: it is not a finite number above 0 and at most `most`; the message has its name.

    """
    largest = min(most, sys.float_info.max)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= largest:
        upper = "" if most == math.inf else f" and at most {most:g}"
        msg = f"{name} is {value!r}; it is a number of seconds above 0{upper}"
        raise ConfigurationError(msg)


def _check_several(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | type) or not isinstance(value, Iterable):
        msg = f"{name} is {value!r}; it is a tuple, also of one"
        raise ConfigurationError(msg)
    return tuple(value)


def check_errors(errors: Any) -> tuple[type[DomainError], ...]:
    """The domain errors in a tuple, list or other iterable.

    Raises:
        ConfigurationError: it is none, or holds something else.

    """
    kinds = _check_several("errors", errors)
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, DomainError)):
            msg = f"errors holds {kind!r}; it holds subclasses of DomainError"
            raise ConfigurationError(msg)
    return kinds


def _check_count(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        msg = f"{name} is {value!r}; it is a whole number from {least} to {most}"
        raise ConfigurationError(msg)


def _size(value: Any) -> int:
    """Bytes of a string in UTF-8; -1 if it is none, or has none."""
    try:
        return len(value.encode()) if isinstance(value, str) else -1
    except UnicodeEncodeError:
        return -1


@dataclass(frozen=True, kw_only=True)
class Retry:
    """When a client makes a call again that has failed, and how long it waits before it does.

    The pause before the n-th retry is drawn between 0 and `initial_backoff * 2 ** (n - 1)`, at most `max_backoff`: full
    jitter, so that callers which failed together do not come back together. All is inside the one deadline: a retry
    that would begin after it is not made.

    A call that may have run is made again only if its caller declared it idempotent.

    Attributes:
        max_attempts: how often the call is made at most, the first time included.
        initial_backoff: seconds.
        max_backoff: seconds.
        codes: which errors: gRPC's status names, or the codes of domain errors.

    """

    max_attempts: int = 3
    initial_backoff: float = 0.1
    max_backoff: float = 5.0
    codes: tuple[str, ...] = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")

    def __post_init__(self) -> None:
        _check_count("max_attempts", self.max_attempts, 2, 1000)
        check_seconds("initial_backoff", self.initial_backoff)
        check_seconds("max_backoff", self.max_backoff)
        object.__setattr__(self, "codes", _check_several("codes", self.codes))
        for code in self.codes:
            if not isinstance(code, str) or not (code in STATUS_CODES or DOMAIN_CODE.match(code)):
                msg = f"codes holds {code!r}; it holds {', '.join(STATUS_CODES)}, or codes of domain errors"
                raise ConfigurationError(msg)

    def longest_pause(self, retries: int) -> float:
        """Seconds that the pause before the next one is at most, after this many retries."""
        return min(self.max_backoff, self.initial_backoff * 2.0 ** min(retries, 64))


class CallKwargs(TypedDict, total=False):
    """The keyword arguments of `with_options`; see `CallOptions`."""

    timeout: float
    idempotent: bool
    idempotency_key: str | None
    retry: Retry | None
    queue: str | None
    errors: tuple[type[DomainError], ...]
    returns: Any
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class CallOptions:
    """How a call is made.

    Attributes:
        timeout: seconds until the call has ended; a handler's own calls also inherit its deadline.
        idempotent: running it twice does no harm: it is sent again where it may have been lost.
        idempotency_key: makes this call and an earlier one of the same key, method and parameters one: a worker that
            remembers the result gives it again, and does not run it; 1 to 255 bytes. None for a new one for each
            call, if it is idempotent.
        retry: make it again where it failed; None for not.
        queue: send to this queue through the default exchange, past rpcq's own: for servers that are not rpcq's.
        errors: domain errors that the caller wants to catch by their class.
        returns: the type that results are validated as; None leaves them as JSON has them.
        metadata: headers for the handler: names that begin with `x-`, values that are strings.

    """

    timeout: float = 30.0
    idempotent: bool = False
    idempotency_key: str | None = None
    retry: Retry | None = None
    queue: str | None = None
    errors: tuple[type[DomainError], ...] = ()
    returns: Any = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_seconds("timeout", self.timeout, MAX_TIMEOUT)
        object.__setattr__(self, "errors", check_errors(self.errors))
        if self.queue is not None and not 1 <= _size(self.queue) <= 255:
            msg = f"queue is {self.queue!r}; the name of a queue has 1 to 255 bytes"
            raise ConfigurationError(msg)
        if self.idempotency_key is not None and not 1 <= _size(self.idempotency_key) <= 255:
            msg = f"idempotency_key is {self.idempotency_key!r}; it is a string of 1 to 255 bytes"
            raise ConfigurationError(msg)
        if self.retry is not None and not isinstance(self.retry, Retry):
            msg = f"retry is {self.retry!r}; it is a Retry(...) or None"
            raise ConfigurationError(msg)
        if not isinstance(self.metadata, Mapping):
            msg = f"metadata is {self.metadata!r}; it is a mapping of names to strings"
            raise ConfigurationError(msg)
        object.__setattr__(self, "metadata", dict(self.metadata))  # what is checked is what is sent
        for name, value in self.metadata.items():
            if not 1 <= _size(name) <= 255 or not name.startswith("x-") or OWNED_HEADERS.match(name):
                msg = f"metadata has {name!r}; names begin with 'x-', have at most 255 bytes and are not RabbitMQ's own"
                raise ConfigurationError(msg)
            if _size(value) < 0:
                msg = f"metadata {name!r} is {value!r}; metadata are strings"
                raise ConfigurationError(msg)


class ConnectionKwargs(TypedDict, total=False):
    """What `ClientKwargs` and `WorkerKwargs` share; see `ConnectionOptions`."""

    name: str
    namespace: str
    heartbeat: float
    connect_timeout: float
    max_body: int
    reply_exchange: str | None


@dataclass(frozen=True, kw_only=True)
class ConnectionOptions:
    """How the broker is reached.

    Attributes:
        name: what this program is called: in RabbitMQ's list of connections, and as `app_id` of its requests.
        namespace: prefix of all queues and exchanges, so that environments can share a vhost; it has no dot.
        heartbeat: seconds; a connection on which nothing arrives for two of them is given up. 5 to 20 is sensible.
        connect_timeout: seconds until an attempt to connect and declare is given up.
        max_body: bytes of a message; larger ones are refused before they are sent, and again where they arrive. More
            than the broker takes is of no use: its `max_message_size`, by default 16 MiB from RabbitMQ 4.0 on.
        reply_exchange: the topic exchange that replies go through, for brokers whose users may not write to every
            queue, the same for clients and workers; None for the default exchange.

    """

    name: str = "rpcq"
    namespace: str = "rpcq"
    heartbeat: float = 10.0
    connect_timeout: float = 10.0
    max_body: int = 1024 * 1024
    reply_exchange: str | None = None

    def __post_init__(self) -> None:
        check_name("the program", self.name)
        if not isinstance(self.namespace, str) or not NAMESPACE.match(self.namespace):
            msg = (
                f"the namespace is called {self.namespace!r}; a name is 1 to 100 of A-Z a-z 0-9 _ -, and not "
                "'amq', which begins the broker's own names"
            )
            raise ConfigurationError(msg)
        check_seconds("heartbeat", self.heartbeat, 3600)
        if self.heartbeat != int(self.heartbeat):
            msg = f"heartbeat is {self.heartbeat!r}; it is a whole number of seconds from 1 to 3600"
            raise ConfigurationError(msg)
        check_seconds("connect_timeout", self.connect_timeout)
        _check_count("max_body", self.max_body, 1, 512 * 1024 * 1024)
        if self.reply_exchange is not None:
            check_name("the reply exchange", self.reply_exchange)


class ClientKwargs(ConnectionKwargs, total=False):
    """The keyword arguments of `Client`; see `ClientOptions`."""

    timeout: float
    max_in_flight: int
    identify: bool
    disconnected_timeout: float


@dataclass(frozen=True, kw_only=True)
class ClientOptions(ConnectionOptions):
    """How a client behaves.

    Attributes:
        timeout: seconds that a call has unless `with_options` says otherwise.
        max_in_flight: calls that may be under way at once; one more gets `Overloaded`.
        identify: tell services the user of the URL, as `Context.user`; the broker checks that it is true. Not for
            tokens of OAuth 2, whose user has another name than the URL.
        disconnected_timeout: seconds that the broker at least waits for a consumer whose node was lost, before it gives
            what that held to another one: `consumer_disconnected_timeout` of RabbitMQ 4.3, 60 s by default. A request
            that expires in a quorum queue sooner than that after it was sent has certainly not run; the client allows
            for two of its heartbeats, in which its own clock may have stood still.

    """

    timeout: float = 30.0
    max_in_flight: int = 100_000
    identify: bool = False
    disconnected_timeout: float = 60.0

    def __post_init__(self) -> None:
        ConnectionOptions.__post_init__(self)
        check_seconds("timeout", self.timeout, MAX_TIMEOUT)
        _check_count("max_in_flight", self.max_in_flight, 1, 10_000_000)
        if not isinstance(self.identify, bool):
            msg = f"identify is {self.identify!r}; it is True or False"
            raise ConfigurationError(msg)
        check_seconds("disconnected_timeout", self.disconnected_timeout)

    @property
    def unrun_within(self) -> float:
        """Seconds after it was sent within which the expiry of a request proves that it was never delivered.

        A client whose clock stands still, because its machine does, loses its connection and its reply queue with it
        after two heartbeats.
        """
        return self.disconnected_timeout - 2 * self.heartbeat


class WorkerKwargs(ConnectionKwargs, total=False):
    """The keyword arguments of `Worker`; see `WorkerOptions`."""

    prefetch: int
    grace: float
    reply_to: tuple[str, ...]
    remember: int
    blocked_after: float


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(ConnectionOptions):
    """How a worker behaves.

    Attributes:
        prefetch: calls of each service that it runs at once; `def` handlers have as many threads.
        grace: seconds that running handlers have to end when the worker stops.
        reply_to: regular expressions of further queues that it may reply to, whole names; server-named queues
            and direct reply-to are always allowed.
        remember: bytes that remembered results of calls with an idempotency key may take, about; 0 remembers none.
        blocked_after: seconds that a handler may block the event loop before the log names it.

    """

    prefetch: int = 100
    grace: float = 30.0
    reply_to: tuple[str, ...] = ()
    remember: int = 64 * 1024 * 1024
    blocked_after: float = 1.0

    def __post_init__(self) -> None:
        ConnectionOptions.__post_init__(self)
        _check_count("prefetch", self.prefetch, 1, 65_535)
        check_seconds("grace", self.grace)
        _check_count("remember", self.remember, 0, 1024**4)
        check_seconds("blocked_after", self.blocked_after)
        object.__setattr__(self, "reply_to", _check_several("reply_to", self.reply_to))
        for pattern in self.reply_to:
            try:
                re.compile(pattern.encode() if isinstance(pattern, str) else None)  # it matches names as they come
            except (re.error, TypeError, UnicodeEncodeError) as error:
                msg = f"reply_to holds {pattern!r}, which is not a regular expression: {error}"
                raise ConfigurationError(msg) from error
