"""Dead letters and lost messages, for the people who look after them. Pure.

A dead letter was written by a worker, with headers that say why, or by the broker itself, which only leaves `x-death`:

    worker   rpcq-dead-reason, rpcq-executed, rpcq-error, rpcq-incident, rpcq-from, rpcq-died-at
    broker   x-death: a queue, a reason and a time; whether the job ran is not known

A lost message is one whose queue is gone: a retry that was due, or a dead letter. Its routing key says where it was to
go. A message may have any content, so everything here is read with care.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from math import isfinite
from typing import Any, Final

from rpcq.errors import ConfigurationError, Executed
from rpcq.options import Priority
from rpcq.wire import properties as amqp
from rpcq.wire.bodies import text
from rpcq.wire.delays import LEVELS
from rpcq.wire.events import NOT_A_SUBSCRIPTION, EventTopology
from rpcq.wire.job_queues import no_queue
from rpcq.wire.jobs import DIED_AT, ERROR, EXECUTED, FROM, INCIDENT, REASON, JobMessage, encode_job, read_job
from rpcq.wire.properties import MalformedProperties, Properties

LOST: Final = "lost"
"""The reason of a message whose queue is gone."""

_BY_BROKER: Final = {
    "delivery_limit": "its workers were lost, or gave it back, until its queue gave it up",
    "rejected": "a worker gave it up: it is larger than the broker takes",
    "expired": "a policy of the broker limits how long it may wait",
    "maxlen": "a policy of the broker limits how many may wait",
}
"""The broker's word in `x-death` -> what happened, for people."""

_BITS: Final = re.compile(rf"(?:[01]\.){{{LEVELS}}}")
_DURATION: Final = re.compile(r"(?P<number>\d{1,9}(?:\.\d{1,9})?)(?P<unit>[smhdw])\Z")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A dead letter or a lost message.

    Attributes:
        job: the job as a message, as a worker would read it; its `problem` says why it cannot be read, its `body` is
            the parameters.
        service: the service that was to do it; empty if that is not known.
        subscription: the subscription that was to do it, if it is an event; empty for a job.
        reason: why it is dead: a reason of docs/wire.md, the broker's own word, or "lost".
        executed: whether an attempt ran.
        error: what happened, for people.
        incident: what to look for in the worker's log; empty for none.
        source: where it died: the service whose worker wrote it, or else the queue that gave it up.
        died_at: when it died, or for a lost message when it was published last; None if that is not known.
        address: the routing key without the bits of a delay: where a lost message was to go.
        properties: all properties and headers.

    """

    job: JobMessage
    service: str
    reason: str
    executed: Executed
    error: str
    subscription: str = ""
    incident: str = ""
    source: str = ""
    died_at: datetime | None = None
    address: str = ""
    properties: Properties = field(default_factory=Properties)

    @property
    def id(self) -> str:
        """The job's ID; empty if it cannot be read."""
        return self.job.id

    @property
    def label(self) -> str:
        """The job as `service.job`, or as `service.subscription`, as far as it is known."""
        return f"{self.service or '?'}.{self.name or '?'}"

    @property
    def name(self) -> str:
        """The name of the job, or of the subscription."""
        return self.subscription or self.job.name

    def summary(self) -> dict[str, Any]:
        """What a list shows of it, as JSON can carry it."""
        return {
            "id": self.job.id,
            "job": self.label,
            "event": self.job.name if self.subscription else None,
            "reason": self.reason,
            "executed": self.executed,
            "attempt": self.job.attempt,
            "error": self.error,
            "incident": self.incident or None,
            "from": self.source or None,
            "died_at": None if self.died_at is None else self.died_at.isoformat(),
            "address": self.address,
        }

    def details(self) -> dict[str, Any]:
        """Everything, as JSON can carry it. `body` is text, with escapes for bytes that are not UTF-8."""
        known = {name: _carried(value) for name, value in _set(self.properties).items() if name != "headers"}
        return self.summary() | {
            "key": self.job.key,
            "problem": self.job.problem or None,
            "properties": known,
            "headers": _carried(self.properties.headers or {}),
            "body": _carried(self.job.body),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which letters a command is about: those that every filter takes.

    Attributes:
        reasons: reasons; empty for any.
        jobs: names of jobs and of subscriptions, with or without their service, and of events; empty for any.
        ids: IDs of jobs; empty for any.
        since: the earliest time of death; None for any. A letter without such a time is not taken.

    """

    reasons: frozenset[str] = frozenset()
    jobs: frozenset[str] = frozenset()
    ids: frozenset[str] = frozenset()
    since: datetime | None = None

    @property
    def is_all(self) -> bool:
        """Whether every letter is wanted."""
        return not self.reasons and not self.jobs and not self.ids and self.since is None

    def takes(self, letter: DeadLetter) -> bool:
        """Whether a letter is wanted."""
        return (
            (not self.reasons or letter.reason in self.reasons)
            and (not self.jobs or not self.jobs.isdisjoint((letter.name, letter.job.name, letter.label)))
            and (not self.ids or letter.job.id in self.ids)
            and (self.since is None or (letter.died_at is not None and letter.died_at >= self.since))
        )


@dataclass(frozen=True, slots=True)
class Replay:
    """A message that has a letter's job done again.

    Attributes:
        exchange: what it is published to.
        routing_key: its routing key.
        queue: the queue that has to be there: what no queue takes would be lost. Empty if the broker returns it then.
        nobody: what it means that no queue takes it.
        job_id: the job's ID.
        properties: encoded.
        body: the parameters.

    """

    exchange: bytes
    routing_key: bytes
    queue: str
    nobody: str
    job_id: str
    properties: bytes
    body: bytes


def read_letter(
    topology: EventTopology, exchange: bytes, routing_key: bytes, properties: bytes, body: bytes
) -> DeadLetter:
    """Read a message of a queue of dead letters, or of the queue of what was lost.

    Args:
        topology: of the namespace.
        exchange: what it was published, or dead-lettered, to.
        routing_key: its routing key.
        properties: encoded.
        body: the body.

    """
    address = _BITS.sub("", text(routing_key), count=1)
    try:
        job = read_job(properties, body, redelivered=False)
        found = amqp.decode(properties)
    except MalformedProperties as error:
        job, found = JobMessage(id="", name="", body=body, problem=str(error)), Properties()
    headers = found.headers or {}
    service, subscription = _addressee(address)
    published = _from_seconds(found.timestamp)
    if isinstance(headers.get(REASON), str):
        return DeadLetter(
            job=job,
            service=service,
            subscription=subscription,
            reason=headers[REASON],
            executed=_executed(headers.get(EXECUTED)),
            error=_str(headers.get(ERROR)),
            incident=_str(headers.get(INCIDENT)),
            source=_str(headers.get(FROM)),
            died_at=_from_ms(headers.get(DIED_AT)) or published,
            address=address,
            properties=found,
        )
    if text(exchange) != topology.jobs.dead.name:
        return DeadLetter(
            job=job,
            service=service,
            subscription=subscription,
            reason=LOST,
            # An attempt before this one may be one that a lost worker began: only the worker that wrote it knew.
            executed="yes" if job.attempt > 1 else "maybe",
            error=f"no queue takes what goes to {address!r}",
            died_at=published,
            address=address,
            properties=found,
        )
    death = _last_death(headers)
    reason = _str(death.get("reason")) or "delivery_limit"
    time = death.get("time")
    return DeadLetter(
        job=job,
        service=service,
        subscription=subscription,
        reason=reason,
        executed="maybe",
        error=_BY_BROKER.get(reason, f"the broker gave it up: {reason}"),
        source=_str(death.get("queue")),
        died_at=time if isinstance(time, datetime) else None,
        address=address,
        properties=found,
    )


def replay_of(topology: EventTopology, letter: DeadLetter, to: str | None, now_ms: int) -> Replay | str:
    """The message that has a letter's job done again from its first attempt, or why there is none.

    It keeps the ID, the key, the parameters, and the sender's own headers. Headers of the broker and those of a dead
    letter are left out; so is an expiry that has passed. An event goes to its own subscription alone.

    Args:
        topology: of the namespace.
        letter: the letter.
        to: the service that is to do it, in its lane for normal priority and without its order key, or for an event
            `service:subscription`; None for its own service and lane, or its own subscription.
        now_ms: the time, in milliseconds since the epoch.

    """
    job = letter.job
    service, _, subscription = (to or f"{letter.service}:{letter.subscription}").partition(":")
    priority: Priority = "normal" if to else job.priority
    order_key = None if to else job.order_key
    if not service:
        return f"the address {letter.address!r} names no service: name one with --to"
    if letter.subscription and not subscription:
        return f"it is an event: name a subscription, --to {service}:{letter.subscription}"
    if subscription and not letter.subscription:
        return f"it is a job: name a service alone, --to {service}"
    if not job.id:
        return f"it has no ID that a worker would take: {job.problem}"
    is_over = job.expires_ms is not None and job.expires_ms <= now_ms
    expires_ms = None if is_over else job.expires_ms
    again = replace(
        job,
        attempt=1,
        unknown=0,
        earlier=0,
        expires_ms=expires_ms,
        priority=priority,
        order_key=order_key,
        reply_to=b"",  # who watched it has been told that it is dead
    )
    try:
        properties = encode_job(again, now_ms)
    except (ValueError, TypeError) as error:
        return f"its properties cannot be written again: {error}"
    if subscription:
        route = topology.jobs.ladder.route(0, topology.address(service, subscription))
        queue = topology.queue(service, subscription, ()).name
        nobody = f"there is no queue {queue!r}: the subscription is gone; name another one with --to"
        return Replay(*route, queue, nobody, job.id, properties, job.body)
    route = topology.jobs.jobs.name.encode(), topology.jobs.key(service, again.lane).encode()
    return Replay(*route, "", no_queue(service, again.lane), job.id, properties, job.body)


def parse_since(since: str, now: datetime) -> datetime:
    """A time: so long before now, such as "90s", "2h" or "1.5d", or an ISO 8601 time.

    A time without an offset is one of this machine's time zone.

    Raises:
        ConfigurationError: it is neither.

    """
    found = _DURATION.match(since)
    try:
        if found:
            return now - timedelta(seconds=float(found["number"]) * _SECONDS[found["unit"]])
        time = datetime.fromisoformat(since)
        return time if time.tzinfo is not None else time.astimezone()
    except (ValueError, OverflowError, OSError) as error:
        msg = f"--since must be a duration such as 90s, 30m, 2h, 7d or 1w, or an ISO 8601 time; got {since!r}"
        raise ConfigurationError(msg) from error


def _addressee(address: str) -> tuple[str, str]:
    """The service and the subscription of an address; empty where it names none.

    It is `job.SERVICE`, `job.SERVICE:PRIORITY`, `SERVICE:suspects`, `sub.SERVICE:NAME` or `sub.SERVICE:NAME:suspects`.
    """
    kind, _, name = address.partition(".")
    if kind == "job" and name:
        return name.partition(":")[0], ""
    service, *rest = name.split(":")
    if kind == "sub" and rest and rest[0] != NOT_A_SUBSCRIPTION:
        return service, rest[0]
    return (address.removesuffix(":suspects") if address.endswith(":suspects") else ""), ""


def _last_death(headers: Mapping[str, Any]) -> Mapping[str, Any]:
    """The last entry of `x-death`: the first one, or that of `x-last-death-queue` and `-reason` (RabbitMQ 4)."""
    deaths = headers.get("x-death")
    entries = [it for it in deaths if isinstance(it, dict)] if isinstance(deaths, list) else []
    last = headers.get("x-last-death-queue"), headers.get("x-last-death-reason")
    named = [it for it in entries if (it.get("queue"), it.get("reason")) == last]
    return (*named, *entries, {})[0]


def _executed(value: Any) -> Executed:
    match value:
        case "yes" | "no":
            return value  # type: ignore[no-any-return]  # one of both
        case _:
            return "maybe"


def _str(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _from_ms(value: Any) -> datetime | None:
    return _from_seconds(value / 1000) if type(value) is int else None


def _from_seconds(value: float | None) -> datetime | None:
    try:
        return None if value is None else datetime.fromtimestamp(value, UTC)
    except (OverflowError, ValueError, OSError):
        return None


def _set(properties: Properties) -> dict[str, Any]:
    return {name: value for name, value in vars(properties).items() if value is not None}


def _carried(value: Any) -> Any:
    """A value of a property or a header as one that JSON can carry."""
    match value:
        case bytes():
            return value.decode("utf-8", "backslashreplace")
        case datetime():
            return value.isoformat()
        case Decimal():
            return str(value)
        case float() if not isfinite(value):
            return str(value)
        case dict():
            return {name: _carried(each) for name, each in value.items()}
        case list():
            return [_carried(each) for each in value]
    return value
