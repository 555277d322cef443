"""What is left of earlier deploys: queues and bindings that no running worker declares. Pure.

Only services of which a worker runs, or that are named, are looked at: a service whose workers are all stopped for a
while has queues that nobody declares either, and they keep its events.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from rpcq.control import ServiceInfo
from rpcq.wire.events import EventTopology


@dataclass(frozen=True, slots=True)
class Found:
    """A queue, or a binding of a queue to the exchange for events.

    Attributes:
        service: the service whose it is.
        queue: the queue's name.
        pattern: what a binding takes; empty for the queue itself.
        is_stale: whether a worker of the service runs, or it is named, and none declares it.

    """

    service: str
    queue: str
    pattern: str
    is_stale: bool


def service_of(topology: EventTopology, queue: str) -> str:
    """The service of a queue of jobs, tickets or events; empty for any other queue."""
    jobs = topology.jobs
    for prefix in (jobs.queue("").name, jobs.tickets("").name, topology.queue("", "", ()).name.removesuffix(":")):
        if queue.startswith(prefix):
            return queue.removeprefix(prefix).partition(":")[0]
    return ""


def declared(topology: EventTopology, services: Iterable[ServiceInfo]) -> tuple[set[str], set[tuple[str, str]]]:
    """The queues, and the bindings to the exchange for events, that workers declare who describe themselves so."""
    queues, bindings, jobs = set(), set(), topology.jobs
    for service in services:
        if service.jobs:
            queues |= {queue.name for queue in jobs.waiting(service.name, lanes=service.lanes, ordered=service.ordered)}
        if any(job.schedule for job in service.jobs):
            queues.add(jobs.tickets(service.name).name)
        for each in service.subscriptions:
            if each.queue:
                queues |= {each.queue, topology.suspects(service.name, each.name).name}
                bindings |= {(each.queue, pattern) for pattern in each.patterns}
    return queues, bindings


def look(
    topology: EventTopology,
    services: Collection[ServiceInfo],
    queues: Iterable[str],
    bindings: Iterable[tuple[str, str]],
    named: Collection[str] = (),
) -> list[Found]:
    """Say of each queue, and of each binding, whether it is stale.

    Args:
        topology: of the namespace.
        services: what the running workers say of themselves; several may be of one service, while a deploy rolls.
        queues: the queues that there are.
        bindings: pairs of queue and pattern, of the exchange for events.
        named: services that are looked at although no worker of them runs; if there are any, no others are.

    """
    live_queues, live_bindings = declared(topology, services)
    looked_at = {*named} or {service.name for service in services}
    found = [
        Found(service, queue, "", service in looked_at and queue not in live_queues)
        for queue in sorted(queues)
        if (service := service_of(topology, queue))
    ]
    gone = {it.queue for it in found if it.is_stale}
    for queue, pattern in sorted(bindings):
        service = service_of(topology, queue)
        is_stale = service in looked_at and queue not in gone and (queue, pattern) not in live_bindings
        if service:
            found.append(Found(service, queue, pattern, is_stale))
    return found
