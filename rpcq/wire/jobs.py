"""Jobs as messages: what a job is, and its properties. Pure; `docs/wire.md` is the contract."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn

from rpcq.errors import TooLarge, UsageError
from rpcq.options import MAX_HEADERS, OWNED_HEADERS, Priority
from rpcq.wire import properties as amqp
from rpcq.wire.bodies import JSON, is_json, text
from rpcq.wire.job_queues import LANES, lane_of
from rpcq.wire.properties import Properties, short

KEY: Final = "rpcq-idempotency-key"
ATTEMPT: Final = "rpcq-attempt"
FIRST_SENT: Final = "rpcq-first-sent"
EXPIRES: Final = "rpcq-expires"
DUE: Final = "rpcq-due"
PRIORITY: Final = "rpcq-priority"
ORDER_KEY: Final = "rpcq-order-key"
UNKNOWN: Final = "rpcq-unknown"
"""How often a worker got the job that has no such job."""
VERSION: Final = "rpcq-event-version"
RETURNS: Final = "rpcq-returns"
"""How often it came back to its queue before it was published again: the broker counts from 0 then."""

REASON: Final = "rpcq-dead-reason"
EXECUTED: Final = "rpcq-executed"
ERROR: Final = "rpcq-error"
INCIDENT: Final = "rpcq-incident"
FROM: Final = "rpcq-from"
DIED_AT: Final = "rpcq-died-at"

TRACE: Final = ("traceparent", "tracestate", "baggage")
"""The headers of W3C trace context and baggage."""

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_I64: Final = struct.Struct(">q")

# The properties of a job, as `encode_job` packs them by hand: U16 flags | content_type | headers | delivery_mode 2 |
# correlation_id | reply_to | message_id | timestamp | type | app_id. `reply_to` and the last two are only there with
# their flags.
_FLAGS: Final = (
    amqp.CONTENT_TYPE | amqp.HEADERS | amqp.DELIVERY_MODE | amqp.CORRELATION_ID | amqp.MESSAGE_ID | amqp.TIMESTAMP
)
_CONTENT_TYPE: Final = short(JSON)
# The table of headers where there is only this one: U32 bytes of the entry | short name | "l" | I64.
_FIRST_SENT_START: Final = _U32.pack(len(FIRST_SENT) + 1 + 1 + 8) + short(FIRST_SENT.encode()) + b"l"


@dataclass(frozen=True, slots=True)
class Job:
    """A job that the broker has.

    Attributes:
        id: its ID, the same in all attempts and in a dead letter.
        service: the service that does it.
        name: its name within the service.
        key: its idempotency key.
        due: when it is to be done, in UTC: at the end of its delay; None for at once.
        priority: the lane that it is in.
        order_key: its order key; None for none.

    """

    id: str
    service: str
    name: str
    key: str
    due: datetime | None = None
    priority: Priority = "normal"
    order_key: str | None = None

    if not TYPE_CHECKING:  # to a type checker, only a watched job has them

        def result(self, *_: Any, **__: Any) -> NoReturn:
            """Refuse: nobody listens for the result."""
            raise UsageError(self._unwatched)

        def progress(self, *_: Any, **__: Any) -> NoReturn:
            """Refuse: nobody listens."""
            raise UsageError(self._unwatched)

        @property
        def _unwatched(self) -> str:
            label = f"{self.service}.{self.name}"
            return f"this job of {label} is not watched: send it by client.with_options(watch=True).send(...)"


@dataclass(slots=True, kw_only=True)
class JobMessage:
    """A job as a message. An event is one too, because it is a job of each subscription that gets it.

    Attributes:
        id: the same in all attempts and replays; `message_id` and `correlation_id` of the message.
        name: the name of the job within its service, or of the event; empty if the message names none.
        body: the parameters, or the event, as JSON.
        key: the idempotency key; the ID if its sender gave none.
        attempt: 1 + the number of attempts that ended with an error, or that the handler put off.
        first_sent_ms: when it was sent first, in milliseconds since the epoch; None if the message does not say.
        published_s: when this message was published, in seconds since the epoch; None if it does not say.
        expires_ms: when it need not be done any more; None for never.
        due_ms: when it is to be done: a tick of its schedule, or the end of its delay; None for at once.
        priority: the lane that it goes to, also when it runs again, if it has no order key.
        order_key: the order key; None for none.
        version: the version of the event; None for a job, and if the message does not say.
        unknown: how often a worker got it that has no job of this name, or that the event does not fit.
        app_id: the name of the program that sent it.
        user: the broker's user that sent it, checked by the broker; empty if the message does not carry it.
        headers: the sender's own headers `x-...`, and its trace context.
        problem: why it cannot be read; empty if it can.
        returns: how often it came back to its queue; 0 if it was not delivered before.
        earlier: how often it came back to a queue, in the same attempt, before it was published again.
        reply_to: the queue of a sender that watches it; empty if nobody does.

    """

    id: str
    name: str
    body: bytes
    key: str = ""
    attempt: int = 1
    first_sent_ms: int | None = None
    published_s: int | None = None
    expires_ms: int | None = None
    due_ms: int | None = None
    priority: Priority = "normal"
    version: int | None = None
    order_key: str | None = None
    unknown: int = 0
    app_id: str = ""
    user: str = ""
    headers: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    returns: int = 0
    earlier: int = 0
    reply_to: bytes = b""

    @property
    def lane(self) -> str:
        """The lane that it goes to."""
        return self.priority if self.order_key is None else lane_of(self.order_key)

    @property
    def waits_since_ms(self) -> int | None:
        """Since when it was due and has only waited for this delivery, in milliseconds since the epoch.

        None if it was tried, replayed or given back meanwhile, or if the message does not say when it was sent.
        """
        first = self.first_sent_ms
        if first is None or self.published_s != first // 1000:
            return None
        if self.attempt > 1 or self.unknown or self.returns or self.earlier:
            return None
        return first if self.due_ms is None else max(first, self.due_ms)

    @property
    def metadata(self) -> dict[str, str]:
        """The sender's own headers."""
        return {name: value for name, value in self.headers.items() if name.startswith("x-") and isinstance(value, str)}


def check_headers(headers: Mapping[str, Any]) -> None:
    """Check the size of a sender's own headers.

    Raises:
        TooLarge: they are over 8 KiB.

    """
    size = len(amqp.encode_table(dict(headers))) - 4
    if size > MAX_HEADERS:
        raise TooLarge(f"the headers are {size} bytes; the limit is {MAX_HEADERS}")


def encode_dead(data: bytes, further: Mapping[str, Any]) -> bytes:
    """Encode the properties of a dead letter: those of the job, without the broker's headers and without `reply_to`.

    Args:
        data: the properties of the job, as `read_job` has read them.
        further: the headers that say why it is dead.

    """
    found = amqp.decode(data)
    kept = {name: value for name, value in (found.headers or {}).items() if not _is_brokers(name)}
    found.headers = {**kept, **further}
    found.delivery_mode = 2
    found.expiration = found.user_id = None  # it would expire again; RabbitMQ refuses another user than the publisher
    found.reply_to = None  # its watcher is told now, and of nothing that becomes of it later
    return amqp.encode(found)


def encode_job(job: JobMessage, now_ms: int) -> bytes:
    """Encode the properties of a job.

    Headers of the broker, such as `x-death`, are not among `job.headers`: a message that is published with them counts
    as one that died before, and may be dropped (RabbitMQ 3.10).

    Args:
        job: the job. Its `user` is left out: RabbitMQ refuses a message that names another user than its publisher.
        now_ms: the time, in milliseconds since the epoch.

    """
    headers = _headers_of(job)
    first_sent = headers[FIRST_SENT] = now_ms if job.first_sent_ms is None else job.first_sent_ms
    name = short(job.id.encode())
    flags, last = _FLAGS, b""
    if job.name:
        flags, last = flags | amqp.TYPE, short(job.name.encode())
    if job.app_id:
        flags, last = flags | amqp.APP_ID, last + short(job.app_id.encode())
    table = _FIRST_SENT_START + _I64.pack(first_sent) if len(headers) == 1 else amqp.encode_table(headers)
    sent = _U64.pack(now_ms // 1000)
    watcher = b""
    if job.reply_to:
        flags, watcher = flags | amqp.REPLY_TO, short(job.reply_to)
    return b"".join((_U16.pack(flags), _CONTENT_TYPE, table, b"\x02", name, watcher, name, sent, last))


def _headers_of(job: JobMessage) -> dict[str, Any]:
    headers: dict[str, Any] = dict(job.headers)
    if job.key != job.id:
        headers[KEY] = job.key
    if job.attempt > 1:
        headers[ATTEMPT] = job.attempt
    if job.expires_ms is not None:
        headers[EXPIRES] = job.expires_ms
    if job.due_ms is not None:
        headers[DUE] = job.due_ms
    if job.priority != "normal":
        headers[PRIORITY] = job.priority
    if job.version is not None:
        headers[VERSION] = job.version
    if job.order_key is not None:
        headers[ORDER_KEY] = job.order_key
    if job.unknown:
        headers[UNKNOWN] = job.unknown
    if job.earlier:
        headers[RETURNS] = job.earlier
    return headers


def read_job(data: bytes, body: bytes, *, redelivered: bool) -> JobMessage:
    """Read a job.

    Raises:
        MalformedProperties: `data` is not the properties of an AMQP message.

    """
    found = amqp.decode(data)
    headers = found.headers or {}
    name = text(found.message_id or found.correlation_id)
    key, order_key = headers.get(KEY, name), headers.get(ORDER_KEY)
    job = JobMessage(
        id=name,
        name=text(found.type),
        body=body,
        key=key if isinstance(key, str) else "",
        attempt=_count(headers.get(ATTEMPT, 1)),
        first_sent_ms=_whole(headers.get(FIRST_SENT)),
        published_s=found.timestamp,
        expires_ms=_whole(headers.get(EXPIRES)),
        due_ms=_whole(headers.get(DUE)),
        priority=_lane(headers.get(PRIORITY)) or "normal",
        version=_whole(headers.get(VERSION)),
        order_key=order_key if isinstance(order_key, str) else None,
        unknown=_count(headers.get(UNKNOWN, 0)),
        app_id=text(found.app_id),
        user=text(found.user_id),
        headers={each: value for each, value in headers.items() if _is_senders(each)},
        # A sender may write these headers itself: they are the broker's only where the message was delivered before.
        returns=_returns(headers) if redelivered else 0,
        earlier=_count(headers.get(RETURNS, 0)),
        reply_to=found.reply_to or b"",
    )
    job.problem = _problem(found, headers, job)
    return job


def misplaced(job: JobMessage, service: str, lane: str | None) -> str:
    """Why a job must not run, because it came through a queue where its order cannot be kept; empty if it may.

    Args:
        job: the job.
        service: the name of its service.
        lane: the ordered lane that it came through; None for another queue.

    """
    if job.order_key is None:
        return "" if lane is None else f"a job in the lane {lane} must have the header {ORDER_KEY}; got none"
    wanted = lane_of(job.order_key)
    if wanted == lane:
        return ""
    return f"a job with this {ORDER_KEY} must be sent with the routing key {service}:{wanted}, and without a delay"


def _returns(headers: Mapping[str, Any]) -> int:
    """How often it came back: RabbitMQ 4.3 counts some returns in the second header only."""
    return max(1, _count(headers.get("x-delivery-count", 0)), _count(headers.get("x-acquired-count", 0)))


def _is_senders(header: str) -> bool:
    return header in TRACE or (header.startswith("x-") and not OWNED_HEADERS.match(header))


def _is_brokers(header: str) -> bool:
    return header in ("CC", "BCC") or OWNED_HEADERS.match(header) is not None


def _lane(value: Any) -> Priority | None:
    return next((priority for priority in LANES if priority == value), None)


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


def _problem(found: Properties, headers: Mapping[str, Any], job: JobMessage) -> str:
    """Why a job cannot be read, or an empty string."""
    if not job.id:
        return "a job must have a message_id; got none"
    if found.content_type is not None and not is_json(found.content_type):
        return f"the content type must be application/json; got {text(found.content_type)!r}"
    if found.content_encoding:
        return f"the body must have no content encoding; got {text(found.content_encoding)!r}"
    if not 1 <= len(job.key.encode()) <= 255:
        return f"the header {KEY} must be a string of 1 to 255 bytes; got {headers.get(KEY)!r:.50}"
    if job.attempt < 1:
        return f"the header {ATTEMPT} must be a whole number of at least 1; got {headers.get(ATTEMPT)!r:.50}"
    for name in (FIRST_SENT, EXPIRES, DUE):
        if name in headers and _whole(headers[name]) is None:
            return f"the header {name} must be a whole number of milliseconds; got {headers[name]!r:.50}"
    if VERSION in headers and (job.version is None or job.version < 1):
        return f"the header {VERSION} must be a whole number of at least 1; got {headers[VERSION]!r:.50}"
    return _problem_of_lane(headers, job)


def _problem_of_lane(headers: Mapping[str, Any], job: JobMessage) -> str:
    """Why the lane of a job cannot be read, or an empty string."""
    if PRIORITY in headers and _lane(headers[PRIORITY]) is None:
        return f"the header {PRIORITY} must be 'high' or 'low'; got {headers[PRIORITY]!r:.50}"
    if ORDER_KEY in headers and not 1 <= len((job.order_key or "").encode()) <= 255:
        return f"the header {ORDER_KEY} must be a string of 1 to 255 bytes; got {headers[ORDER_KEY]!r:.50}"
    if ORDER_KEY in headers and PRIORITY in headers:
        return f"a job must not have both {ORDER_KEY} and {PRIORITY}: each says which lane it is in"
    return ""
