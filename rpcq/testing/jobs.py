"""What became of jobs and events in an in-process broker: those that wait, those that are held, and dead letters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Any, get_args

from rpcq.errors import ConfigurationError, Executed
from rpcq.jobs.letters import DeadLetter, read_letter
from rpcq.jobs.preparing import find_job
from rpcq.options import Priority
from rpcq.service import Service, Subscriber
from rpcq.transport.memory.broker import MemoryBroker
from rpcq.transport.memory.clock import StoppedClock
from rpcq.transport.memory.queues import Entry
from rpcq.wire import bodies
from rpcq.wire.bodies import text
from rpcq.wire.delays import LEVELS, STEP
from rpcq.wire.events import EventTopology
from rpcq.wire.job_queues import ORDERED_LANES
from rpcq.wire.jobs import JobMessage, read_job
from rpcq.wire.properties import MalformedProperties

Target = Service | Callable[..., Any] | str | None
"""Which jobs: of a service, of a function with `@service.job` or `@service.on`, of `"service"` or of `"service.job"`,
where the job may be a subscription; None for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadJob:
    """A dead letter: a job, or an event of a subscription, that is not done, and does not run again.

    Attributes:
        id: the ID of the job or of the event.
        key: its idempotency key.
        job: `service.job`, or `service.subscription`.
        event: the name of the event; empty for a job.
        params: the parameters as they were sent, as JSON values: a dict; a list if they were sent by position, or the
            value itself if there was only one; None if they cannot be read.
        reason: why it is dead, as in docs/wire.md: "attempts", "gave_up", "delivery_limit", ...; "lost" if no queue
            took it.
        executed: whether an attempt ran: "no", "maybe" or "yes".
        attempt: the number of its last attempt, from 1.
        error: what happened, for people.
        incident: what to look for in the worker's log; empty for none.
        died_at: when it died; None if that is not known.

    """

    id: str
    key: str
    job: str
    params: Any
    reason: str
    executed: Executed
    attempt: int
    error: str
    incident: str
    died_at: datetime | None
    event: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingJob:
    """A job, or an event of a subscription, that waits: for the end of its delay, or for a worker.

    Attributes:
        id: the ID of the job or of the event.
        key: its idempotency key.
        job: `service.job`, or `service.subscription`.
        event: the name of the event; empty for a job.
        params: the parameters as they were sent; see `DeadJob`.
        attempt: the number of its next attempt, from 1.
        due: when its delay ends; None if it is in a queue of its service, and no worker has taken it.
        priority: its lane.
        order_key: its order key; None for none.

    """

    id: str
    key: str
    job: str
    params: Any
    attempt: int
    due: datetime | None
    priority: Priority = "normal"
    event: str = ""
    order_key: str | None = None


@dataclass(frozen=True, slots=True)
class _Addressee:
    """Who is to do a job: a service, or a subscription of it."""

    service: str
    subscription: str = ""


class Jobs:
    """The jobs of one namespace in an in-process broker.

    Args:
        broker: the broker.
        clock: its clock.
        events: the names of the namespace.
        services: all services that have been served, which may become more.

    """

    def __init__(
        self, broker: MemoryBroker, clock: StoppedClock, events: EventTopology, services: Sequence[Service]
    ) -> None:
        self._broker = broker
        self._clock = clock
        self._events = events
        self._topology = events.jobs
        self._services = services

    def in_hand(self) -> Iterator[str]:
        """The jobs that workers hold, each as `service.job`."""
        for consumer, _, entry in self._broker.in_hand():
            if to := self._addressee_of(consumer.queue.name):
                yield _label(to, _job(entry))

    def dead(self, target: Target) -> list[DeadJob]:
        """See `World.dead`."""
        matches = self._matcher(target)
        queues = [self._topology.dead_queue(service).name for service in self._known()]
        found = []
        for name in (*queues, self._topology.lost.name):
            for entry in self._entries(name):
                letter = read_letter(self._events, entry.exchange, entry.routing_key, entry.properties, entry.body)
                if matches(letter.service, letter.name):
                    found.append(_dead_job(letter))
        return found

    def waiting(self, target: Target) -> list[WaitingJob]:
        """See `World.waiting`."""
        matches, now = self._matcher(target), self._clock.wall()
        found: list[tuple[_Addressee, Entry, datetime | None]] = []
        for queue in self._waiting_queues():
            to = self._addressee_of(queue)
            found += [(to, entry, None) for entry in self._entries(queue) if to is not None]
        delayed = [(self._due(level, entry), entry) for level in range(LEVELS) for entry in self._delayed(level)]
        for due, entry in sorted(delayed, key=itemgetter(0)):
            found.append((_address(entry), entry, now + timedelta(seconds=due - self._clock.now)))
        jobs = [(to, _job(entry), due) for to, entry, due in found]
        return [_waiting_job(to, job, due) for to, job, due in jobs if matches(to.service, to.subscription or job.name)]

    def _waiting_queues(self) -> list[str]:
        """The queues in which jobs wait: for each service its lanes, its suspects, and its subscriptions."""
        found = []
        for service in self._known():
            lanes = [self._topology.queue(service, lane).name for lane in (*get_args(Priority), *ORDERED_LANES)]
            found += [*lanes, self._topology.suspects(service).name]
        subscriptions = self._events.queue("", "", ()).name.removesuffix(":")
        return [*found, *(queue for queue in self._broker.queues if queue.startswith(subscriptions))]

    def _entries(self, queue: str) -> list[Entry]:
        live = self._broker.vhost.queues.get(queue)
        return [] if live is None else [*live.ready]

    def _delayed(self, level: int) -> list[Entry]:
        return self._entries(self._topology.ladder.name(level))

    def _due(self, level: int, entry: Entry) -> float:
        """When the delay of a job ends, in seconds of the clock: at this level of the ladder, and those below."""
        assert entry.expires is not None  # noqa: S101 - queues of the ladder have a TTL
        below = text(entry.routing_key).split(".")[LEVELS - level : LEVELS]
        return entry.expires + int("".join(below) or "0", 2) * STEP

    def _known(self) -> list[str]:
        """The services that have a queue of jobs, or of a subscription."""
        found = (self._addressee_of(queue) for queue in self._broker.queues)
        return [*dict.fromkeys(to.service for to in found if to is not None)]

    def _addressee_of(self, queue: str) -> _Addressee | None:
        """Who is to do what is in a queue; None for a queue of something else."""
        jobs, events = self._topology.queue("").name, self._events.queue("", "", ()).name.removesuffix(":")
        if queue.startswith(jobs):
            return _Addressee(queue.removeprefix(jobs).partition(":")[0])
        if queue.startswith(events):
            return _Addressee(*queue.removeprefix(events).split(":")[:2])
        return None

    def _matcher(self, target: Target) -> Callable[[str, str], bool]:
        """Whether jobs of a service and a name are meant.

        Raises:
            ConfigurationError: no service of this world is meant, or no job that it has.

        """
        if target is None:
            return lambda *_: True
        wanted: str | None = None
        if isinstance(target, Service):
            service = target.name
        elif isinstance(target, str) and target in self._known():
            service = target
        elif (subscriber := self._subscriber(target)) is not None:
            service, wanted = subscriber.service, subscriber.name
        else:
            service, wanted, _ = find_job(target)
        if service not in self._known():
            has = ", ".join(self._known()) or "none"
            raise ConfigurationError(f"this world must have the service, with jobs; it has {has}; got {target!r}")
        own = [each for each in self._services if each.name == service]
        jobs = {name for each in own for name in (*each.jobs, *each.subscriptions)}
        if wanted is not None and wanted not in jobs:
            has = ", ".join(sorted(jobs)) or "none"
            raise ConfigurationError(f"service {service!r} must have the job; it has {has}; got {target!r}")
        return lambda of, name: of == service and wanted in (None, name)

    def _subscriber(self, target: Target) -> Subscriber | None:
        """The subscription that a function is the handler of."""
        each = (it for service in self._services for it in service.subscriptions.values())
        return next((it for it in each if it.handler is target), None)


def _label(to: _Addressee, job: JobMessage) -> str:
    return f"{to.service}.{to.subscription or job.name or '?'}"


def _address(entry: Entry) -> _Addressee:
    """Who a delayed job goes to."""
    _, _, address = ".".join(text(entry.routing_key).split(".")[LEVELS:]).partition(".")
    service, _, rest = address.partition(":")
    is_event = text(entry.routing_key).split(".")[LEVELS] == "sub"
    return _Addressee(service, rest if is_event else "")


def _job(entry: Entry) -> JobMessage:
    try:
        return read_job(entry.properties, entry.body, redelivered=False)
    except MalformedProperties as error:
        return JobMessage(id="", name="", body=entry.body, problem=str(error))


def _waiting_job(to: _Addressee, job: JobMessage, due: datetime | None) -> WaitingJob:
    return WaitingJob(
        id=job.id,
        key=job.key,
        job=_label(to, job),
        event=job.name if to.subscription else "",
        params=_params(job.body),
        attempt=job.attempt,
        due=due,
        priority=job.priority,
        order_key=job.order_key,
    )


def _params(body: bytes) -> Any:
    try:
        return bodies.loads(body) if body else {}
    except ValueError:
        return None


def _dead_job(letter: DeadLetter) -> DeadJob:
    job = letter.job
    return DeadJob(
        id=job.id,
        key=job.key,
        job=letter.label,
        event=job.name if letter.subscription else "",
        params=_params(job.body),
        reason=letter.reason,
        executed=letter.executed,
        attempt=job.attempt,
        error=letter.error,
        incident=letter.incident,
        died_at=letter.died_at,
    )
