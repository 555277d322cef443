"""How a job is sent through an outbox. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from math import inf
from typing import Final, TypedDict

from rpcq.errors import ConfigurationError
from rpcq.options import CallOptions, Priority

FURTHEST_MS: Final = round(datetime(9999, 1, 1, tzinfo=UTC).timestamp() * 1000)


class OutboxKwargs(TypedDict, total=False):
    """The keyword arguments of `Outbox.with_options`; see `OutboxOptions`."""

    idempotency_key: str | None
    metadata: Mapping[str, str]
    delay: float | None
    at: datetime | None
    expires: float | datetime | None
    priority: Priority | None
    order_key: str | None


@dataclass(frozen=True)
class OutboxOptions:
    """How a job is sent through an outbox.

    Attributes:
        idempotency_key: 1 to 255 bytes that identify the job; its ID if None.
        metadata: headers for the handler: names begin with `x-`, values are strings.
        delay: seconds after which the job is sent, from now on; without an upper limit.
        at: when the job is sent, with a time zone, however far away; instead of `delay`.
        expires: when a job need not be begun any more: seconds from now, or a time with a time zone.
        priority: the lane of a job: "high", "low", or "normal", which None means too.
        order_key: 1 to 255 bytes: jobs and events with the same key are sent in the order in which their transactions
            wrote them. Jobs of an ordered service are also done in that order, as with `Client.with_options`; so it
            must be `Service(..., ordered=True)` if the job is given by its name or by a contract. Not together with
            `delay`, `at` or `priority`.

    """

    idempotency_key: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    delay: float | None = None
    at: datetime | None = None
    expires: float | datetime | None = None
    priority: Priority | None = None
    order_key: str | None = None

    def __post_init__(self) -> None:
        if self.delay is not None and self.at is not None:
            raise ConfigurationError("delay and at must not be given both: each says when the job is to be sent")
        delay = self.delay
        if delay is not None and (
            isinstance(delay, bool) or not isinstance(delay, int | float) or not 0 <= delay < inf
        ):
            raise ConfigurationError(f"delay must be a number of seconds from 0 on; got {delay!r}")
        self._check_order_key()
        _ = self.call

    def _check_order_key(self) -> None:
        key = self.order_key
        if key is None:
            return
        if not isinstance(key, str) or not 1 <= len(key.encode("utf-8", "surrogatepass")) <= 255 or "\0" in key:
            raise ConfigurationError(f"order_key must be a string of 1 to 255 bytes; got {key!r}")
        if (self.delay, self.at, self.priority) != (None, None, None):
            msg = "order_key must not be given with delay, at or priority: jobs of a key are sent in order, at once"
            raise ConfigurationError(msg)

    @cached_property
    def call(self) -> CallOptions:
        """The options that a client has, too."""
        return CallOptions(
            idempotency_key=self.idempotency_key,
            metadata=self.metadata,
            at=self.at,
            expires=self.expires,
            priority=self.priority,
            order_key=self.order_key,
        )

    def times(self, now_ms: int) -> tuple[int | None, int | None]:
        """When the job is due, and when it expires, in milliseconds since the epoch; None for at once, and never.

        Raises:
            ConfigurationError: it is due in the past or after the year 9998, or expires before it is due.

        """
        due = None if self.delay is None else now_ms + round(min(self.delay, 1e15) * 1000)
        if self.at is not None:
            due = round(self.at.timestamp() * 1000)
            if due < now_ms:
                raise ConfigurationError(f"at must be in the future; got {self.at}, {(now_ms - due) / 1000:.3f} s ago")
        if due is not None and due > FURTHEST_MS:
            raise ConfigurationError(f"delay must end before the year 9999; got {self.delay!r} s")
        expires: int | None = None
        if isinstance(self.expires, datetime):
            expires = round(self.expires.timestamp() * 1000)
        elif self.expires is not None:
            expires = now_ms + round(self.expires * 1000)
        if expires is not None and expires <= (due or now_ms):
            raise ConfigurationError(f"expires must be after the job is due, and in the future; got {self.expires}")
        return (due if due is not None and due > now_ms else None), expires
