"""What a worker says of itself: what it serves, and in what state it is."""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, FiniteFloat

from rpcq.options import JobOptions, WorkerOptions
from rpcq.runtime.process import own_version
from rpcq.service import Method, Service, Subscriber
from rpcq.wire.events import EventTopology
from rpcq.wire.topology import Topology

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A count in an answer. Larger ones are refused, because a sum of them could have more digits than Python writes."""


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method, as its worker describes it.

    Attributes:
        name: the name under which callers call it.
        signature: its parameters and its result, with their types: "(x: int, y: int) -> int".
        doc: its handler's docstring, or an empty string.
        idempotent: whether running it twice does no harm.
        timeout: the most seconds that it may run; None for the caller's deadline alone.
        errors: the codes of the domain errors that it declares.

    """

    name: str
    signature: str
    doc: str = ""
    idempotent: bool = False
    timeout: FiniteFloat | None = None
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JobInfo:
    """A job, as its worker describes it.

    Attributes:
        name: the name under which it is sent.
        signature: its parameters and its result, with their types: "(to: str) -> None".
        timeout: the most seconds that one attempt may run.
        max_attempts: the most attempts, including the first one.
        doc: its handler's docstring, or an empty string.
        at_most_once: whether it is never run again after it may have run.
        schedule: when workers send it by themselves: "cron 0 6 * * mon-fri Europe/Berlin", "every 60 s", or empty.
        missed: what becomes of the ticks of its schedule that nobody was there for; empty without a schedule.

    """

    name: str
    signature: str
    timeout: FiniteFloat
    max_attempts: Count
    doc: str = ""
    at_most_once: bool = False
    schedule: str = ""
    missed: str = ""


@dataclass(frozen=True, slots=True)
class SubscriptionInfo:
    """A subscription, as its worker describes it.

    Attributes:
        name: its name within the service.
        signature: the parameter for the event, with its type, and the result: "(event: shop.OrderCreated) -> None".
        patterns: the names and patterns of events that its queue is bound to.
        timeout: the most seconds that one attempt may run.
        max_attempts: the most attempts, including the first one.
        queue: the name of its queue; empty if every process has its own.
        events: the events that it has classes for, "name version".
        doc: its handler's docstring, or an empty string.
        at_most_once: whether an event is never run again after it may have run.
        each_instance: whether every process gets each event.

    """

    name: str
    signature: str
    patterns: tuple[str, ...]
    timeout: FiniteFloat
    max_attempts: Count
    queue: str = ""
    events: tuple[str, ...] = ()
    doc: str = ""
    at_most_once: bool = False
    each_instance: bool = False


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """A service, as one of its workers describes it.

    Attributes:
        name: the service's name.
        queue: the name of its request queue.
        queue_type: "classic" or "quorum".
        methods: its methods.
        jobs: its jobs; none from a worker of a version that does not describe them.
        job_queue: the name of the queue of its jobs; empty if it has none.
        lanes: whether its jobs of high and of low priority have queues of their own.
        subscriptions: its subscriptions; none from a worker of a version that does not describe them.
        ordered: whether its jobs may have an order key.
        takes: calls that it wants in one message at most, now; 0 if each is to go alone.

    """

    name: str
    queue: str
    queue_type: str
    methods: tuple[MethodInfo, ...] = ()
    jobs: tuple[JobInfo, ...] = ()
    job_queue: str = ""
    lanes: bool = False
    subscriptions: tuple[SubscriptionInfo, ...] = ()
    ordered: bool = False
    takes: Count = 0


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker, as it describes itself.

    Attributes:
        name: the worker's name (its option `name`).
        host: its machine's name.
        pid: its process ID.
        version: its version of rpcq.
        prefetch: calls of each service that it runs at once.
        services: the services that it runs.
        job_prefetch: jobs of each service that it runs at once; 0 from a version that does not say so.

    """

    name: str
    host: str
    pid: Count
    version: str
    prefetch: Count
    services: tuple[ServiceInfo, ...]
    job_prefetch: Count = 0


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """The state of a worker, and what it has done since it was started.

    Attributes:
        name: the worker's name.
        host: its machine's name.
        pid: its process ID.
        time_ms: its wall clock when it answered, in milliseconds since the epoch.
        uptime: seconds since it was started.
        in_flight: requests that it has in hand.
        finished: requests that it has replied to or dropped.
        refused_redeliveries: requests refused because a worker that held them was lost.
        expired_on_arrival: requests refused because their deadline had passed.
        unroutable_replies: replies whose caller was gone.
        replayed: requests for which it replayed a stored result.
        ticks: of the jobs whose schedules it carries on, "service.job", the last tick that was sent, in milliseconds
            since the epoch.

    """

    name: str
    host: str
    pid: Count
    time_ms: FiniteFloat
    uptime: FiniteFloat
    in_flight: Count
    finished: Count
    refused_redeliveries: Count
    expired_on_arrival: Count
    unroutable_replies: Count
    replayed: Count = 0
    ticks: Mapping[str, Count] = field(default_factory=dict)


def describe(options: WorkerOptions, services: Sequence[Service]) -> WorkerInfo:
    """Describe this process as a worker of `services`."""
    topology, events = Topology(options.namespace), EventTopology(options.namespace)
    return WorkerInfo(
        name=options.name,
        host=socket.gethostname(),
        pid=os.getpid(),
        version=own_version(),
        prefetch=options.prefetch,
        job_prefetch=options.job_prefetch,
        services=tuple(
            ServiceInfo(
                name=service.name,
                queue=topology.request_queue(service.name, service.queue_type, service.queue).name,
                queue_type=service.queue_type,
                methods=tuple(_describe_method(method) for method in service.methods.values()),
                jobs=tuple(_describe_job(job, job.job) for job in service.jobs.values() if job.job is not None),
                job_queue=events.jobs.queue(service.name).name if service.jobs else "",
                lanes=service.lanes and bool(service.jobs),
                subscriptions=tuple(_describe_subscription(events, it) for it in service.subscriptions.values()),
                ordered=service.ordered and bool(service.jobs),
            )
            for service in services
        ),
    )


def _describe_method(method: Method) -> MethodInfo:
    return MethodInfo(
        name=method.name,
        signature=_written(method.signature),
        doc=inspect.getdoc(method.handler) or "",
        idempotent=method.idempotent,
        timeout=method.timeout,
        errors=tuple(sorted({error.code for error in method.errors})),
    )


def _written(signature: inspect.Signature) -> str:
    """Write a signature as people write it: its annotations are resolved, and `None` is `NoneType` then."""
    is_none = signature.return_annotation is type(None)
    return str(signature.replace(return_annotation=None) if is_none else signature)


def _describe_job(job: Method, options: JobOptions) -> JobInfo:
    return JobInfo(
        name=job.name,
        signature=_written(job.signature),
        doc=inspect.getdoc(job.handler) or "",
        timeout=options.timeout,
        max_attempts=options.max_attempts,
        at_most_once=options.at_most_once,
        schedule="" if options.schedule is None else str(options.schedule),
        missed="" if options.schedule is None else options.schedule.missed,
    )


def _describe_subscription(topology: EventTopology, subscriber: Subscriber) -> SubscriptionInfo:
    topics, queue = subscriber.topics, topology.queue(subscriber.service, subscriber.name, ())
    assert subscriber.job is not None  # noqa: S101 - a subscription has options
    return SubscriptionInfo(
        name=subscriber.name,
        signature=_written(subscriber.signature),
        patterns=topics.patterns,
        timeout=subscriber.job.timeout,
        max_attempts=1 if topics.each_instance else subscriber.job.max_attempts,
        queue="" if topics.each_instance else queue.name,
        events=tuple(f"{kind.event_name} {kind.event_version}" for kind in topics.kinds),
        doc=inspect.getdoc(subscriber.handler) or "",
        at_most_once=subscriber.job.at_most_once or topics.each_instance,
        each_instance=topics.each_instance,
    )
