"""Asks RabbitMQ every few seconds how deep the queues of services are, and how many consumers they have.

It asks the management API, which also counts unacknowledged messages. If that does not respond, it declares the queues
passively, which needs no plugin and no further permission.

RabbitMQ does not say how long the oldest message of a quorum queue waits (3.10 to 4.3), and to take a message and look
at it counts as a delivery. So that is not measured here. Workers measure how long the jobs waited that they run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, Literal, Unpack

from rpcq import logs
from rpcq.environment import broker_url, options_from
from rpcq.errors import AccessRefused, BrokerError, ConfigurationError
from rpcq.jobs.ticking import schedules_of
from rpcq.observability.management import UNANSWERED, Management, management_of
from rpcq.options import ConnectionKwargs, ConnectionOptions
from rpcq.service import Service
from rpcq.transport.opening import open_admin
from rpcq.transport.rabbitmq.admin import Admin, QueueState
from rpcq.url import parse
from rpcq.wire.events import EventTopology
from rpcq.wire.job_queues import LANES, ORDERED_LANES, JobTopology
from rpcq.wire.topology import Topology

MANAGEMENT_AGAIN: Final = 20
"""Looks by passive declaration, over one connection, before the management API is tried again."""

_COLUMNS: Final = (
    *("name", "messages_ready", "messages_unacknowledged", "messages_dlx", "consumers"),
    *("message_stats.publish_details.rate", "message_stats.ack_details.rate"),
)

_DELAYED: Final = frozenset({"jobs", "events"})
"""Kinds of queues whose messages may be delayed."""

_NOTHING: Final = {"messages_ready": 0}

Kind = Literal["calls", "jobs", "events", "suspects", "tickets", "dead", "delayed", "lost"]

log = logs.get_logger("rpcq.queues")


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """The state of a queue at one look. All delay queues of the namespace count as one.

    What only the management API knows is None after a passive declaration.

    Attributes:
        service: name of the service; empty for the queues that all services share.
        queue: name of the queue; `NAMESPACE.delay.*` for the delay queues.
        messages: number of messages that wait.
        unacknowledged: number of messages that consumers hold.
        consumers: number of consumers.
        source: how the broker was asked: "management" (API) or "declare" (passively).
        kind: what is in it: requests of "calls"; "jobs"; "events" of a subscription; jobs or events that are
            "suspects"; "tickets" of schedules; "dead" letters; "delayed" jobs of all services; what is "lost", of all
            services.
        moving: messages that the queue gave up, and that their next queue did not take yet. They do not count as
            waiting. If their number does not fall, the next queue is full, has no leader, or does not exist.
        published: messages a second that came in, over the last few seconds; also None if nothing is known yet.
        acknowledged: the same for messages that consumers acknowledged.

    """

    service: str
    queue: str
    messages: int
    unacknowledged: int | None
    consumers: int
    source: Literal["management", "declare"]
    kind: Kind = "calls"
    moving: int | None = None
    published: float | None = None
    acknowledged: float | None = None

    @property
    def subscription(self) -> str:
        """The subscription whose events, or suspects, are in it; empty for another queue."""
        kind, _, address = self.queue.partition(".")[2].partition(".")  # the name of a namespace has no dot
        if self.kind not in ("events", "suspects") or kind != "sub":
            return ""
        return address.split(":")[1]

    @property
    def lane(self) -> str:
        """The lane of its service that it is, for "jobs": "high", "normal" or "low", or one of the ordered lanes.

        It is empty for another queue.
        """
        return self.queue.partition(":")[2] or "normal" if self.kind == "jobs" else ""


Found = Callable[[QueueDepth], None]
Crossed = Callable[[QueueDepth, bool], None]


class QueueWatch:
    """Looks at the queues of services: `look` once, `run` until it is cancelled.

    A queue that does not exist, or that the broker's user may not ask for, is left out.

    These are the request queue; for a service with jobs: those of its lanes, suspects and tickets of schedules; for a
    service with subscriptions: those of their events and suspects; for both, that of dead letters, and the shared ones
    for delayed and lost jobs.

    Args:
        services: `Service` objects; or names, for which it looks for the queues of all kinds. Only the management API
            knows the subscriptions of a name; without it, name each as `service:subscription`, too.
        url: URL of the broker, as for `Client`; `RPCQ_URL` if None.
        every: seconds between two looks.
        management: URL of the management API; its user, if any, is used instead of the broker's. None: the broker's
            first host and the default port of the API, but only if the broker has its default port too. An empty
            string: do not ask it.
        threshold: number of messages that may wait in a queue; None for no limit.
        on_threshold: called with a queue and True when more messages wait; with False when they no longer do.
        on_depth: called with each queue at each look; `Metrics.on_depth` fits.
        options: `name`, `namespace`, `heartbeat`, `connect_timeout`.

    Raises:
        ConfigurationError: an argument cannot be used, or the broker is `memory://`.

    """

    def __init__(
        self,
        services: Iterable[Service | str],
        url: str | None = None,
        *,
        every: float = 15.0,
        management: str | None = None,
        threshold: int | None = None,
        on_threshold: Crossed | None = None,
        on_depth: Found | None = None,
        **options: Unpack[ConnectionKwargs],
    ) -> None:
        self._options = options_from(ConnectionOptions, options)
        self._broker = parse(broker_url(url))
        if self._broker.scheme == "memory":
            raise ConfigurationError("the broker of a QueueWatch must be RabbitMQ; got the in-process broker")
        if not every > 0:
            raise ConfigurationError(f"every must be a number of seconds above 0; got {every!r}")
        services, namespace = [*services], self._options.namespace
        events = EventTopology(namespace)
        self._jobs = events.jobs
        self._queues = [each for service in services for each in _queues(Topology(namespace), events, service)]
        if not self._queues:
            raise ConfigurationError("services must be one or more; got none")
        self._prefixes = {it: events.queue(it, "", ()).name for it in services if isinstance(it, str) and ":" not in it}
        """Services that are only named -> how the names of their subscriptions' queues begin."""
        self._every = every
        self._management = management_of(self._broker, management)
        self._threshold = threshold
        self._on_threshold = on_threshold
        self._on_depth = on_depth
        self._above: set[str] = set()
        self._host = 0

    async def look(self) -> list[QueueDepth]:
        """Look at each queue that exists, once.

        Raises:
            BrokerError: the broker could not be asked.
            ConfigurationError: a file that the URL names for TLS cannot be used.

        """
        found = await self._from_management()
        if found is None:
            async with self._admin() as admin:
                found = await self._from(admin)
        return found

    async def run(self) -> None:
        """Look again and again, until it is cancelled. If the broker is down, log that and try again."""
        while True:
            try:
                found = await self._from_management()
                if found is not None:
                    await self._report(found)
                    continue
                async with self._admin() as admin:  # one connection for many looks
                    for _ in range(MANAGEMENT_AGAIN):
                        await self._report(await self._from(admin))
            except (BrokerError, ConfigurationError) as error:  # ConfigurationError: a file for TLS is gone
                log.warning("queues cannot be looked at", cause=str(error))
                self._host += 1  # the next node
                await asyncio.sleep(self._every)

    async def _from_management(self) -> list[QueueDepth] | None:
        """Ask the management API; None if there is none, or its response is not what it should be."""
        if self._management is None:
            return None
        try:
            return await asyncio.to_thread(_look, self._management, self._queues, self._jobs, self._prefixes)
        except UNANSWERED as error:
            log.info("the management API cannot be used; queues are declared passively", cause=str(error))
            return None

    def _admin(self) -> AbstractAsyncContextManager[Admin]:
        host, port = self._broker.hosts[self._host % len(self._broker.hosts)]
        return open_admin(self._broker, self._options, host, port)

    async def _from(self, admin: Admin) -> list[QueueDepth]:
        asked = [(service, kind, await _ask(admin, queue)) for service, kind, queue in self._queues]
        found = [(service, kind, it) for service, kind, it in asked if it is not None]
        if any(kind in _DELAYED for _, kind, _ in found):
            levels = [await _ask(admin, queue.name) for queue in self._jobs.ladder.queues()]
            seen = [it.messages for it in levels if it is not None]
            if len(seen) == len(levels):  # else the sum would be too low
                found.append(("", "delayed", QueueState(_all_levels(self._jobs), sum(seen), 0)))
            lost = await _ask(admin, self._jobs.lost.name)
            if lost is not None:
                found.append(("", "lost", lost))
        return [
            QueueDepth(service, it.name, it.messages, None, it.consumers, "declare", kind)
            for service, kind, it in found
        ]

    async def _report(self, found: list[QueueDepth]) -> None:
        """Call the hooks with what was found, and wait until the next look is due."""
        for depth in found:
            if self._on_depth is not None:
                _call(self._on_depth, depth)
            above = self._threshold is not None and depth.messages > self._threshold
            if above != (depth.queue in self._above):
                self._crossed(depth, above=above)
        # If no queue exists yet, a worker may be about to declare it: look again soon.
        await asyncio.sleep(self._every if found else min(self._every, 1.0))

    def _crossed(self, depth: QueueDepth, *, above: bool) -> None:
        (self._above.add if above else self._above.discard)(depth.queue)
        text = "queue is over its threshold" if above else "queue is no longer over its threshold"
        write = log.warning if above else log.info
        write(text, service=depth.service, queue=depth.queue, messages=depth.messages, threshold=self._threshold)
        if self._on_threshold is not None:
            _call(self._on_threshold, depth, above)


def _call(hook: Callable[..., None], *args: Any) -> None:
    """Call a user's function; an exception that it raises is logged and does not end the watch."""
    try:
        hook(*args)
    except Exception:
        log.exception("a hook of the queue watch failed", hook=repr(hook))


async def _ask(admin: Admin, queue: str) -> QueueState | None:
    """The state of a queue; None if it does not exist, or if this user may not ask for it (RabbitMQ 4.3)."""
    try:
        return await admin.queue(queue)
    except AccessRefused as error:
        log.info("a queue cannot be looked at", queue=queue, cause=str(error))
        return None


def _queues(topology: Topology, events: EventTopology, service: Service | str) -> list[tuple[str, Kind, str]]:
    """The queues of a service that there may be: its name, what is in it, and the queue's name."""
    jobs = events.jobs
    if isinstance(service, str) and ":" in service:
        name, _, subscription = service.partition(":")
        queue, suspects = events.queue(name, subscription, ()), events.suspects(name, subscription)
        return [(name, "events", queue.name), (name, "suspects", suspects.name)]
    if isinstance(service, Service):
        name = service.name
        found = [topology.request_queue(name, service.queue_type, service.queue)]
        if not service.is_called:
            found = []
    else:
        name = service
        found = [topology.request_queue(name, "classic"), topology.request_queue(name, "quorum")]
    queues: list[tuple[str, Kind, str]] = [(name, "calls", queue.name) for queue in found]
    if not isinstance(service, Service) or service.jobs:
        lanes: tuple[str, ...] = LANES if not isinstance(service, Service) or service.lanes else ()
        if not isinstance(service, Service) or service.ordered:
            lanes += ORDERED_LANES
        queues += [
            *((name, "jobs", jobs.queue(name, lane).name) for lane in ("normal", *lanes)),
            (name, "suspects", jobs.suspects(name).name),
        ]
    if isinstance(service, Service):
        for each in service.lasting:
            queues += [
                (name, "events", events.queue(name, each.name, ()).name),
                (name, "suspects", events.suspects(name, each.name).name),
            ]
    if not isinstance(service, Service) or service.takes_jobs:
        queues.append((name, "dead", jobs.dead_queue(name).name))
    if not isinstance(service, Service) or schedules_of(service):
        queues.append((name, "tickets", jobs.tickets(name).name))
    return queues


def _all_levels(jobs: JobTopology) -> str:
    """What stands for the names of all delay queues."""
    return f"{jobs.ladder.name(0).removesuffix('00')}*"


def _look(
    management: Management,
    queues: Sequence[tuple[str, Kind, str]],
    jobs: JobTopology,
    prefixes: Mapping[str, str],
) -> list[QueueDepth]:
    """Look at each queue that exists; blocks.

    Raises:
        One of `UNANSWERED`: the response of the management API is not what it should be.
        ConfigurationError: a file that the broker's URL names for TLS cannot be used.

    """
    asked = [(service, kind, management.queue(queue, _COLUMNS)) for service, kind, queue in queues]
    found = [(service, kind, it) for service, kind, it in asked if it is not None]
    for service, prefix in prefixes.items():
        states = management.states(prefix, _COLUMNS)
        found += [(service, "suspects" if it["name"].endswith(":suspects") else "events", it) for it in states]
    if not found:  # it may belong to another broker: a passive declaration will show
        raise ValueError("it has none of the queues")
    levels: list[dict[str, Any]] = []
    lost: dict[str, Any] | None = None
    if any(kind in _DELAYED for _, kind, _ in found):
        levels = management.states(jobs.ladder.name(0).removesuffix("00"), _COLUMNS)
        lost = management.queue(jobs.lost.name, _COLUMNS)
    if any("messages_ready" not in it for it in (*levels, lost or _NOTHING, *(it for _, _, it in found))):
        raise ValueError("it has no numbers yet: they come a few seconds after a queue is declared")
    depths = [_depth(service, kind, it) for service, kind, it in found]
    if levels:
        parts = [_depth("", "delayed", it) for it in levels]
        messages = sum(part.messages for part in parts)
        moving = [part.moving for part in parts if part.moving is not None]
        # No rates: a job passes through several levels, and no consumer acknowledges it.
        depths.append(
            QueueDepth(
                "",
                _all_levels(jobs),
                messages,
                0,
                0,
                "management",
                "delayed",
                moving=sum(moving) if moving else None,
            )
        )
    if lost is not None:
        depths.append(_depth("", "lost", lost))
    return depths


def _depth(service: str, kind: Kind, state: Mapping[str, Any]) -> QueueDepth:
    rates = state.get("message_stats")
    return QueueDepth(
        service,
        state["name"],
        int(state["messages_ready"]),
        int(state["messages_unacknowledged"]),
        int(state["consumers"]),
        "management",
        kind,
        None if (moving := state.get("messages_dlx")) is None else int(moving),
        _rate(rates, "publish_details"),
        _rate(rates, "ack_details"),
    )


def _rate(stats: Any, name: str) -> float | None:
    """A rate; None without statistics: nothing happened yet, or the broker keeps none."""
    if not isinstance(stats, dict):
        return None
    details = stats.get(name)
    return 0.0 if details is None else float(details["rate"])
