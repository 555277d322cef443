"""How calls are made, and jobs are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, TypedDict, get_args

from rpcq.errors import ConfigurationError, DomainError
from rpcq.options.checks import (
    MAX_TIMEOUT,
    OWNED_HEADERS,
    check_delay,
    check_errors,
    check_seconds,
    check_short,
    size_of,
)
from rpcq.options.jobs import Priority
from rpcq.options.retries import Retry


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
    order_key: str | None


class UnwatchedCallKwargs(UntypedCallKwargs, total=False):
    """The keyword arguments of `with_options` besides `watch`, which decides what `send` returns; see `CallOptions`."""

    returns: Any


class CallKwargs(UnwatchedCallKwargs, total=False):
    """The keyword arguments of `with_options`; see `CallOptions`."""

    watch: bool


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
        order_key: 1 to 255 bytes, such as "customer-7": the jobs of a service that have the same one are done one by
            one, in the order in which they were sent; only for `send`. It must be a `Service(ordered=True)`.
        watch: whether `send` returns a `WatchedJob`, which tells how far the job is and what it returned, as long as
            the client is connected.

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
    order_key: str | None = None
    watch: bool = False

    def __post_init__(self) -> None:
        check_seconds("timeout", self.timeout, MAX_TIMEOUT)
        if self.is_for_jobs:
            self._check_times()
            if self.priority is not None and self.priority not in get_args(Priority):
                raise ConfigurationError(f"priority must be 'high', 'normal', 'low' or None; got {self.priority!r}")
            self._check_order()
        if not isinstance(self.watch, bool):
            raise ConfigurationError(f"watch must be True or False; got {self.watch!r}")
        object.__setattr__(self, "errors", check_errors(self.errors))
        check_short("queue", self.queue)
        check_short("idempotency_key", self.idempotency_key)
        if self.retry is not None and not isinstance(self.retry, Retry):
            msg = f"retry must be a Retry(...) or None; got {self.retry!r}"
            raise ConfigurationError(msg)
        if not isinstance(self.metadata, Mapping):
            msg = f"metadata must be a mapping of names to strings; got {self.metadata!r}"
            raise ConfigurationError(msg)
        object.__setattr__(self, "metadata", dict(self.metadata))  # a copy: send what was checked
        for name, value in self.metadata.items():
            if not 1 <= size_of(name) <= 255 or not name.startswith("x-") or OWNED_HEADERS.match(name):
                msg = (
                    "names of metadata must begin with 'x-', have at most 255 bytes and not be RabbitMQ's own; "
                    f"got {name!r}"
                )
                raise ConfigurationError(msg)
            if size_of(value) < 0:
                msg = f"metadata {name!r} must be a string; got {value!r}"
                raise ConfigurationError(msg)

    @cached_property
    def is_for_jobs(self) -> bool:
        """Whether they say when, before what or in what order something is to be done, or watch it: only for jobs."""
        return self.watch or (self.delay, self.at, self.expires, self.priority, self.order_key) != (None,) * 5

    def _check_order(self) -> None:
        check_short("order_key", self.order_key)
        if self.order_key is None:
            return
        for name in ("delay", "at", "priority"):
            if getattr(self, name) is not None:
                msg = f"{name} must not be given with order_key: it would let a job overtake others of its order key"
                fix = f"send it without {name}, or with_options(order_key=None)"
                raise ConfigurationError(f"{msg}; {fix}")

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
