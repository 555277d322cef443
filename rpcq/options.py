"""Frozen option objects, checked when they are made. Reads no environment.

Beside each class is a `TypedDict` with the same names: callers give options as keyword arguments
(`Client(url, timeout=5)`, `with_options(timeout=2)`), type checkers know them, and inside rpcq they are one object.
Times are seconds, sizes are bytes.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Final, Literal, TypedDict, get_args

from rpcq.errors import DOMAIN_CODE, STATUS_CODES, ConfigurationError, DomainError
from rpcq.schedules import Schedule, check_schedule

NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,100}\Z")
"""Names that services and clients may have."""

NAMESPACE: Final = re.compile(r"(?!amq\Z)[A-Za-z0-9_-]{1,100}\Z")
"""Names that namespaces may have: without a dot, since two pairs of namespace and service must not share a queue."""

MAX_HEADERS: Final = 8 * 1024
"""Bytes of all headers of a message together; RabbitMQ closes a connection over far larger ones."""

MAX_PROPERTIES: Final = MAX_HEADERS + 4 * 1024
"""Bytes of all properties of a message: the headers, and the others, which have at most 256 bytes each."""

MAX_TIMEOUT: Final = 25 * 60.0
"""RabbitMQ closes a channel whose consumer holds a message for 30 minutes (`consumer_timeout`)."""

MAX_DELAY: Final = (2**24 - 1) * 0.25
"""Seconds of the longest delay of a job, 48 days and 13 hours: 24 bits of 250 ms; see `rpcq.wire.delays`."""

OWNED_HEADERS: Final = re.compile(r"x-(death\Z|first-death-|last-death-|delivery-count\Z|opt-|acquired-count\Z)")
"""Names of headers that RabbitMQ owns: refused from users, and never shown as metadata."""


def check_name(what: str, name: str | None) -> str:
    """Check a name, and return it; `what` is the subject of the error's message, such as "the name of a service".

    Raises:
        ConfigurationError: the name is not 1 to 100 of `A-Za-z0-9_.-`.

    """
    if not isinstance(name, str) or not NAME.match(name):
        msg = f"{what} must be 1 to 100 of the characters A-Z a-z 0-9 _ . -; got {name!r}"
        raise ConfigurationError(msg)
    return name


def check_seconds(name: str, value: float, most: float = math.inf) -> None:
    """Check a number of seconds.

    Raises:
        ConfigurationError: it is not a finite number above 0 and at most `most`; the message contains `name`.

    """
    largest = min(most, sys.float_info.max)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= largest:
        upper = "" if most == math.inf else f" and at most {most:g}"
        msg = f"{name} must be a number of seconds above 0{upper}; got {value!r}"
        raise ConfigurationError(msg)


def _check_several(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | type) or not isinstance(value, Iterable):
        raise ConfigurationError(f"{name} must be a tuple, even for one item; got {value!r}")
    return tuple(value)


def check_errors(errors: Any) -> tuple[type[DomainError], ...]:
    """Check domain errors in a tuple, list or other iterable, and return them as a tuple.

    Raises:
        ConfigurationError: `errors` is not iterable, or contains something else.

    """
    kinds = _check_several("errors", errors)
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, DomainError)):
            raise ConfigurationError(f"errors must be subclasses of DomainError; got {kind!r}")
    return kinds


def _check_count(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigurationError(f"{name} must be a whole number from {least} to {most}; got {value!r}")


def _size(value: Any) -> int:
    """Bytes of a string in UTF-8; -1 if the value is not a string, or cannot be encoded."""
    try:
        return len(value.encode()) if isinstance(value, str) else -1
    except UnicodeEncodeError:
        return -1


def _check_short(name: str, value: str | None) -> None:
    if value is not None and not 1 <= _size(value) <= 255:
        raise ConfigurationError(f"{name} must be a string of 1 to 255 bytes; got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Retry:
    """When a client retries a failed call, and how long it waits before each retry.

    The pause before the n-th retry is random between 0 and `initial_backoff * 2 ** (n - 1)`, at most `max_backoff`.
    This is full jitter: callers that failed together do not retry together. The call's deadline holds for all
    attempts: a retry that would begin after it is not made.

    A call that may have run is retried only if its caller declared it idempotent.

    Attributes:
        max_attempts: the most attempts, including the first one.
        initial_backoff: seconds that the pause before the first retry is at most.
        max_backoff: seconds that any pause is at most.
        codes: the errors to retry: gRPC's status names, or the codes of domain errors.

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
                msg = f"codes must be {', '.join(STATUS_CODES)}, or codes of domain errors; got {code!r}"
                raise ConfigurationError(msg)

    def longest_pause(self, retries: int) -> float:
        """The longest pause before the next retry, in seconds, after this many retries."""
        return min(self.max_backoff, self.initial_backoff * 2.0 ** min(retries, 64))


JOB_RETRY: Final = Retry(max_attempts=8, initial_backoff=1.0, max_backoff=3600.0)
"""How a job is retried by default."""


Priority = Literal["high", "normal", "low"]
"""Which lane of its service a job goes to; "normal" is the one that every service has."""

_RATE: Final = re.compile(r"([1-9][0-9]{0,8})/([smh])")
_PERIODS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """How a job is run, and what becomes of it when it fails.

    Attributes:
        retry: how often, and after which pauses, a job that failed runs again; None for never.
        timeout: the most seconds that one attempt may run, at most 25 minutes.
        retry_on: only these exceptions, and timeouts, are retried.
        give_up_on: these exceptions are not retried.
        at_most_once: it is never run again: a job that may have run becomes a dead letter.
        schedule: when workers send the job by themselves, without parameters; None for never.
        max_concurrency: the most jobs of this name that one worker runs at once; None for no limit of its own.
        rate: how many jobs of this name one worker begins at most in a second, a minute or an hour, such as "10/s",
            "100/m" or "1000/h", evenly spaced: 0.1 s apart for "10/s". None for no limit.

    """

    retry: Retry | None = JOB_RETRY
    timeout: float = 300.0
    retry_on: tuple[type[Exception], ...] = (Exception,)
    give_up_on: tuple[type[Exception], ...] = ()
    at_most_once: bool = False
    schedule: Schedule | None = None
    max_concurrency: int | None = None
    rate: str | None = None

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        if self.schedule is not None and self.at_most_once:
            raise ConfigurationError("at_most_once must be False with a schedule: after a crash, a tick is sent twice")
        if self.retry is not None and not isinstance(self.retry, Retry):
            raise ConfigurationError(f"retry must be a Retry(...) or None; got {self.retry!r}")
        if self.retry is not None and self.retry.codes != JOB_RETRY.codes:
            msg = f"retry must have no codes: jobs fail with exceptions, see retry_on; got {self.retry.codes!r}"
            raise ConfigurationError(msg)
        check_seconds("timeout", self.timeout, MAX_TIMEOUT)
        for name in ("retry_on", "give_up_on"):
            kinds = _check_several(name, getattr(self, name))
            for kind in kinds:
                if not (isinstance(kind, type) and issubclass(kind, Exception)):
                    raise ConfigurationError(f"{name} must be classes of exceptions; got {kind!r}")
            object.__setattr__(self, name, kinds)
        if self.max_concurrency is not None:
            _check_count("max_concurrency", self.max_concurrency, 1, 65_535)
        if self.rate is not None and not (isinstance(self.rate, str) and _RATE.fullmatch(self.rate)):
            msg = (
                "rate must be a whole number of jobs in a second, minute or hour, such as '10/s', '100/m' or '1000/h'; "
                f"got {self.rate!r}"
            )
            raise ConfigurationError(msg)

    @property
    def is_limited(self) -> bool:
        """Whether it has a limit of its own in each worker."""
        return self.max_concurrency is not None or self.rate is not None

    @property
    def spacing(self) -> float:
        """Seconds between the beginnings of two jobs, by `rate`; 0 without."""
        found = None if self.rate is None else _RATE.fullmatch(self.rate)
        return 0.0 if found is None else _PERIODS[found[2]] / int(found[1])

    @property
    def max_attempts(self) -> int:
        """The most attempts, including the first one."""
        return 1 if self.retry is None or self.at_most_once else self.retry.max_attempts


class UntypedCallKwargs(TypedDict, total=False):
    """The keyword arguments of `with_options` that do not say the type of results; see `CallOptions`."""

    timeout: float
    idempotent: bool
    idempotency_key: str | None
    retry: Retry | None
    queue: str | None
    errors: Sequence[type[DomainError]]
    metadata: Mapping[str, str]
    delay: float | None
    at: datetime | None
    expires: float | datetime | None
    priority: Priority | None


class CallKwargs(UntypedCallKwargs, total=False):
    """The keyword arguments of `with_options`; see `CallOptions`."""

    returns: Any


@dataclass(frozen=True)
class CallOptions:
    """How a call is made, or a job is sent.

    Attributes:
        timeout: seconds until the call has ended; calls that a handler makes also inherit the handler's deadline.
        idempotent: whether the call may run twice without harm. Such a call is sent again when it may have been lost.
        idempotency_key: 1 to 255 bytes that identify the call. A worker that has a stored result for the same key,
            method and parameters replays it, and does not run the handler. None means a new key for each call that is
            idempotent.
        retry: when to retry a failed call; None for never.
        queue: send to this queue through the default exchange, not through rpcq's own; for servers other than rpcq.
        errors: domain errors that the caller wants to catch by their class.
        returns: the type that results are validated as; None returns them as decoded from JSON.
        metadata: headers for the handler: names begin with `x-`, values are strings.
        delay: seconds that the broker holds a job, at most 48 days, rounded up to the next 0.25 s; only for `send`.
        at: when a job is to be done, with a time zone; instead of `delay`.
        expires: when a job need not be begun any more: seconds from now, or a time with a time zone. It is a dead
            letter then; only for `send`.
        priority: the lane of a job: "high", "low", or "normal", which None means too; only for `send`. The service must
            have lanes (`Service(lanes=True)`) for the first two.

    """

    timeout: float = 30.0
    idempotent: bool = False
    idempotency_key: str | None = None
    retry: Retry | None = None
    queue: str | None = None
    errors: Sequence[type[DomainError]] = ()
    returns: Any = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    delay: float | None = None
    at: datetime | None = None
    expires: float | datetime | None = None
    priority: Priority | None = None

    def __post_init__(self) -> None:
        check_seconds("timeout", self.timeout, MAX_TIMEOUT)
        if self.is_for_jobs:
            self._check_times()
            if self.priority is not None and self.priority not in get_args(Priority):
                raise ConfigurationError(f"priority must be 'high', 'normal', 'low' or None; got {self.priority!r}")
        object.__setattr__(self, "errors", check_errors(self.errors))
        _check_short("queue", self.queue)
        _check_short("idempotency_key", self.idempotency_key)
        if self.retry is not None and not isinstance(self.retry, Retry):
            msg = f"retry must be a Retry(...) or None; got {self.retry!r}"
            raise ConfigurationError(msg)
        if not isinstance(self.metadata, Mapping):
            msg = f"metadata must be a mapping of names to strings; got {self.metadata!r}"
            raise ConfigurationError(msg)
        object.__setattr__(self, "metadata", dict(self.metadata))  # a copy: send what was checked
        for name, value in self.metadata.items():
            if not 1 <= _size(name) <= 255 or not name.startswith("x-") or OWNED_HEADERS.match(name):
                msg = (
                    "names of metadata must begin with 'x-', have at most 255 bytes and not be RabbitMQ's own; "
                    f"got {name!r}"
                )
                raise ConfigurationError(msg)
            if _size(value) < 0:
                msg = f"metadata {name!r} must be a string; got {value!r}"
                raise ConfigurationError(msg)

    @cached_property
    def is_for_jobs(self) -> bool:
        """Whether they say when or before what something is to be done, which only a job can be told."""
        return (self.delay, self.at, self.expires, self.priority) != (None, None, None, None)

    def _check_times(self) -> None:
        if self.delay is not None and self.at is not None:
            raise ConfigurationError("delay and at must not be given both: each says when the job is to be done")
        if self.delay is not None:
            check_delay("delay", self.delay)
        for name, value in (("at", self.at), ("expires", self.expires)):
            if isinstance(value, datetime):
                if value.utcoffset() is None:
                    msg = f"{name} must have a time zone, as datetime.now(UTC) has; got {value!r}"
                    raise ConfigurationError(msg)
            elif name == "at" and value is not None:
                raise ConfigurationError(f"at must be a datetime with a time zone, and delay seconds; got {value!r}")
            elif value is not None:
                check_seconds(name, value)


def check_delay(name: str, seconds: float) -> None:
    """Check a delay, in seconds.

    Raises:
        ConfigurationError: it is not a number from 0 to `MAX_DELAY`.

    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_DELAY:
        raise ConfigurationError(f"{name} must be a number of seconds from 0 to {MAX_DELAY} (48 days); got {seconds!r}")


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
        _check_count("max_body", self.max_body, 1, 512 * 1024 * 1024)
        if self.reply_exchange is not None:
            check_name("reply_exchange", self.reply_exchange)


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
        timeout: seconds until a call has ended; `with_options` changes it for some calls.
        max_in_flight: the most calls under way at once; one more fails with `Overloaded`.
        identify: whether requests contain the user of the URL, which services get as `Context.user`. The broker checks
            that it is true. Not for tokens of OAuth 2, whose user has another name than the URL.
        disconnected_timeout: seconds that the broker waits, at least, for a consumer on a lost node, before it delivers
            that consumer's messages to another one: `consumer_disconnected_timeout` of RabbitMQ 4.3, 60 s by default. A
            request that expires in a quorum queue within this time after it was sent has certainly not run. The client
            subtracts two heartbeats, in which its own clock may have stood still.

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
            msg = f"identify must be True or False; got {self.identify!r}"
            raise ConfigurationError(msg)
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
            high priority, and a quarter as many, at least one, of low priority.

    """

    prefetch: int = 100
    grace: float = 30.0
    reply_to: tuple[str, ...] = ()
    remember: int = 64 * 1024 * 1024
    blocked_after: float = 1.0
    job_prefetch: int = 20

    def __post_init__(self) -> None:
        ConnectionOptions.__post_init__(self)
        _check_count("prefetch", self.prefetch, 1, 65_535)
        check_seconds("grace", self.grace)
        _check_count("remember", self.remember, 0, 1024**4)
        check_seconds("blocked_after", self.blocked_after)
        _check_count("job_prefetch", self.job_prefetch, 1, 65_535)
        object.__setattr__(self, "reply_to", _check_several("reply_to", self.reply_to))
        for pattern in self.reply_to:
            try:
                re.compile(pattern.encode() if isinstance(pattern, str) else None)  # it is matched with bytes
            except (re.error, TypeError, UnicodeEncodeError) as error:
                msg = f"reply_to must be regular expressions; got {pattern!r}: {error}"
                raise ConfigurationError(msg) from error


# For people at a prompt, who do not see what type checkers see.
