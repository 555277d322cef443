"""The exchanges and queues of jobs: what each service has, and how often a job may come back to them. Pure.

`docs/wire.md` is the contract.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final
from zlib import crc32

from rpcq.options import Priority
from rpcq.wire.delays import ANY_DELAY, Ladder
from rpcq.wire.topology import Exchange, Queue

LANES: Final[tuple[Priority, ...]] = ("high", "low")
"""The priorities whose jobs have a queue of their own, in services with lanes."""

ORDERED_LANES: Final = tuple(f"k{number:02}" for number in range(16))
"""The lanes of services that are ordered. Their number never changes: a key would change its lane with it."""

DELIVERY_LIMIT: Final = 20
SUSPECT_LIMIT: Final = 5
"""How often a job may come back to its queue, and to the queue for suspects, because a worker was lost."""

SUSPECT_FROM: Final = 2
"""Returns from which on a job is a suspect: it may be what kills its workers."""

ORDERED_LIMIT: Final = 100
"""How often a job may come back to an ordered lane. Those that wait for a job of their key come back as often as it."""

ALONE_FROM: Final = 5
"""Returns from which on a job of an ordered lane runs with no other job beside it.

It is higher than `SUSPECT_FROM`: each worker that hands a lane over gives back what has not begun, too.
"""

UNLIMITED: Final = 1_000_000_000
"""As a delivery limit: -1 means no limit for RabbitMQ 4, and 0 for RabbitMQ 3.10."""

DECLARE: Final = "run `rpcq setup`, or start one of its workers, first"
"""What to do when no queue takes a job."""

_KEPT: Final[Mapping[str, Any]] = {"x-queue-type": "quorum", "x-delivery-limit": UNLIMITED}


class JobTopology:
    """The exchanges and queues for jobs of one namespace.

    Args:
        namespace: the namespace.

    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self.jobs = Exchange(f"{namespace}.jobs")
        self.lost = Exchange(f"{namespace}.lost", "fanout")
        self.ladder = Ladder(namespace, f"{namespace}.due", self.lost.name)
        self.dead = Exchange(f"{namespace}.dead", "topic", alternate=self.lost.name)
        self.due = Exchange(f"{namespace}.due", "topic", alternate=self.lost.name, bindings=self.ladder.bindings(-1))

    def exchanges(self) -> list[Exchange]:
        """The exchanges that workers with jobs declare; each comes after those that it is bound to."""
        return [self.jobs, self.lost, self.dead, *self.ladder.exchanges(), self.due]

    def shared_queues(self) -> list[Queue]:
        """The queues that all services share: the ladder, and what lost its queue."""
        lost = Queue(self.lost.name, durable=True, arguments=_KEPT, bindings=((self.lost.name, ""),))
        return [*self.ladder.queues(), lost]

    def queue(self, service: str, lane: str = "normal") -> Queue:
        """The queue of a lane: a priority, or one of `ORDERED_LANES`."""
        key = self.key(service, lane)
        if lane in ORDERED_LANES:
            # Nothing comes here after a delay: it would have been overtaken.
            return Queue(
                f"{self._namespace}.job.{key}",
                durable=True,
                arguments={**self.arguments(self.address(service), ORDERED_LIMIT), "x-single-active-consumer": True},
                bindings=((self.jobs.name, key),),
            )
        bindings = ((self.jobs.name, key), (self.due.name, f"{ANY_DELAY}{self.address(service, lane)}"))
        return Queue(
            f"{self._namespace}.job.{key}",
            durable=True,
            arguments=self.arguments(self.address(service), DELIVERY_LIMIT),
            bindings=bindings,
        )

    def queues(self, service: str, *, lanes: bool, ordered: bool) -> list[Queue]:
        """The queues of a service's jobs and of its dead letters; see `waiting`."""
        return [*self.waiting(service, lanes=lanes, ordered=ordered), self.dead_queue(service)]

    def waiting(self, service: str, *, lanes: bool, ordered: bool) -> list[Queue]:
        """The queues in which a service's jobs wait for a worker.

        Args:
            service: the service's name.
            lanes: whether it has lanes for priorities.
            ordered: whether it has lanes for order keys.

        """
        own = (*(LANES if lanes else ()), *(ORDERED_LANES if ordered else ()))
        return [self.queue(service), *(self.queue(service, lane) for lane in own), self.suspects(service)]

    def suspects(self, service: str) -> Queue:
        """The queue of jobs that came back too often: each runs with no other job beside it."""
        return Queue(
            f"{self._namespace}.job.{service}:suspects",
            durable=True,
            arguments=self.arguments(self.address(service), SUSPECT_LIMIT),
            bindings=((self.due.name, self.suspect_key(service)),),
        )

    def dead_queue(self, service: str, addresses: Iterable[str] = ()) -> Queue:
        """The queue of a service's dead letters: those of its jobs, and those with one of these addresses."""
        return Queue(
            f"{self._namespace}.dead.{service}",
            durable=True,
            arguments=_KEPT,
            bindings=tuple((self.dead.name, address) for address in (self.address(service), *addresses)),
        )

    def tickets(self, service: str) -> Queue:
        """The queue of the tickets of a service's schedules: one worker at a time consumes it."""
        return Queue(
            f"{self._namespace}.cron.{service}",
            durable=True,
            arguments={**self.arguments(self.address(service), UNLIMITED), "x-single-active-consumer": True},
            bindings=((self.due.name, self.ticket_key(service)),),
        )

    def ticket_key(self, service: str) -> str:
        """The routing key of the queue of tickets, at the exchange for what is due."""
        return f"{service}:cron"

    def suspect_key(self, service: str) -> str:
        """The routing key of the queue for suspects, at the exchange for what is due."""
        return f"{service}:suspects"

    def key(self, service: str, lane: str = "normal") -> str:
        """The routing key of the queue of a lane, at the exchange for jobs."""
        return service if lane == "normal" else f"{service}:{lane}"

    def address(self, service: str, lane: str = "normal") -> str:
        """Where a service's jobs go after a delay. Dead letters of every lane go to the address for normal jobs."""
        return f"job.{self.key(service, lane)}"

    def arguments(self, address: str, limit: int) -> dict[str, Any]:
        """The arguments of a queue whose dead letters have this address; `limit` bounds its deliveries."""
        return {
            "x-queue-type": "quorum",
            "x-delivery-limit": limit,
            "x-dead-letter-exchange": self.dead.name,
            "x-dead-letter-routing-key": address,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }


def lane_of(order_key: str) -> str:
    """The lane of the jobs with an order key."""
    return ORDERED_LANES[crc32(order_key.encode()) % len(ORDERED_LANES)]


def no_queue(service: str, lane: str) -> str:
    """Why the broker returned a job of a service."""
    if lane == "normal":
        return f"no queue takes jobs of service {service!r}: {DECLARE}"
    if lane in ORDERED_LANES:
        return (
            f"no queue takes jobs of service {service!r} with an order key: "
            f"define the service as ordered, Service(..., ordered=True), and {DECLARE}"
        )
    return (
        f"no queue takes jobs of service {service!r} with priority {lane!r}: "
        f"define the service with lanes, Service(..., lanes=True), and {DECLARE}"
    )
