"""What became of jobs in an in-process broker: those that wait, those that are held, and dead letters."""

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
from rpcq.service import Service
from rpcq.transport.memory.broker import MemoryBroker
from rpcq.transport.memory.clock import StoppedClock
from rpcq.transport.memory.queues import Entry
from rpcq.wire import bodies
from rpcq.wire.bodies import text
from rpcq.wire.delays import LEVELS, STEP
from rpcq.wire.events import EventTopology
from rpcq.wire.jobs import JobMessage, read_job
from rpcq.wire.properties import MalformedProperties

Target = Service | Callable[..., Any] | str | None
"""Which jobs: of a service, of a function with `@service.job`, of `"service"` or of `"service.job"`; None for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadJob:
    """A dead letter: a job that is not done, and does not run again.

    Attributes:
        id: the job's ID.
        key: its idempotency key.
        job: `service.job`.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingJob:
    """A job that waits: for the end of its delay, or for a worker.

    Attributes:
        id: the job's ID.
        key: its idempotency key.
        job: `service.job`.
        params: the parameters as they were sent; see `DeadJob`.
        attempt: the number of its next attempt, from 1.
        due: when its delay ends; None if it is in a queue of its service, and no worker has taken it.
        priority: its lane.

    """

    id: str
    key: str
    job: str
    params: Any
    attempt: int
    due: datetime | None
    priority: Priority = "normal"


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
            if service := self._service_of(consumer.queue.name):
                yield _label(service, _job(entry))

    def dead(self, target: Target) -> list[DeadJob]:
        """See `World.dead`."""
        matches = self._matcher(target)
        queues = [self._topology.dead_queue(service).name for service in self._known()]
        found = []
        for name in (*queues, self._topology.lost.name):
            for entry in self._entries(name):
                letter = read_letter(self._events, entry.exchange, entry.routing_key, entry.properties, entry.body)
                if matches(letter.service, letter.job.name):
                    found.append(_dead_job(letter))
        return found

    def waiting(self, target: Target) -> list[WaitingJob]:
        """See `World.waiting`."""
        matches, now = self._matcher(target), self._clock.wall()
        found: list[tuple[str, Entry, datetime | None]] = []
        for service in self._known():
            lanes = [self._topology.queue(service, priority) for priority in get_args(Priority)]
            for queue in (*lanes, self._topology.suspects(service)):
                found += [(service, entry, None) for entry in self._entries(queue.name)]
        delayed = [(self._due(level, entry), entry) for level in range(LEVELS) for entry in self._delayed(level)]
        for due, entry in sorted(delayed, key=itemgetter(0)):
            found.append((_address(entry), entry, now + timedelta(seconds=due - self._clock.now)))
        jobs = [(service, _job(entry), due) for service, entry, due in found]
        return [_waiting_job(service, job, due) for service, job, due in jobs if matches(service, job.name)]

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
        """The services that have a queue of jobs."""
        return [service for queue in self._broker.queues if (service := self._service_of(queue)) and ":" not in queue]

    def _service_of(self, queue: str) -> str:
        """The service of a queue of jobs; empty for another queue."""
        prefix = self._topology.queue("").name
        return queue.removeprefix(prefix).partition(":")[0] if queue.startswith(prefix) else ""

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
        else:
            service, wanted, _ = find_job(target)
        if service not in self._known():
            has = ", ".join(self._known()) or "none"
            raise ConfigurationError(f"this world must have the service, with jobs; it has {has}; got {target!r}")
        jobs = {name for each in self._services if each.name == service for name in each.jobs}
        if wanted is not None and wanted not in jobs:
            has = ", ".join(sorted(jobs)) or "none"
            raise ConfigurationError(f"service {service!r} must have the job; it has {has}; got {target!r}")
        return lambda of, name: of == service and wanted in (None, name)


def _label(service: str, job: JobMessage) -> str:
    return f"{service}.{job.name or '?'}"


def _address(entry: Entry) -> str:
    """The service that a delayed job goes to."""
    return ".".join(text(entry.routing_key).split(".")[LEVELS + 1 :]).partition(":")[0]


def _job(entry: Entry) -> JobMessage:
    try:
        return read_job(entry.properties, entry.body, redelivered=False)
    except MalformedProperties as error:
        return JobMessage(id="", name="", body=entry.body, problem=str(error))


def _waiting_job(service: str, job: JobMessage, due: datetime | None) -> WaitingJob:
    return WaitingJob(
        id=job.id,
        key=job.key,
        job=_label(service, job),
        params=_params(job.body),
        attempt=job.attempt,
        due=due,
        priority=job.priority,
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
        params=_params(job.body),
        reason=letter.reason,
        executed=letter.executed,
        attempt=job.attempt,
        error=letter.error,
        incident=letter.incident,
        died_at=letter.died_at,
    )
