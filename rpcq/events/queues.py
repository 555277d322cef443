"""The exchanges and queues that services need for their jobs and subscriptions. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from rpcq.service import Service
from rpcq.wire.events import EventTopology
from rpcq.wire.topology import Exchange, Queue


def exchanges(topology: EventTopology, services: Iterable[Service]) -> list[Exchange]:
    """The exchanges for the jobs and subscriptions of services, in the order in which they are declared."""
    services = [*services]
    events = topology.exchanges() if any(service.subscriptions for service in services) else []
    return [*events, *(topology.jobs.exchanges() if any(service.takes_jobs for service in services) else [])]


def shared(topology: EventTopology, services: Iterable[Service]) -> list[Queue]:
    """The queues that the services share, and those of their dead letters: nobody consumes them."""
    with_jobs = [service for service in services if service.takes_jobs]
    return [*(topology.jobs.shared_queues() if with_jobs else []), *(dead(topology, it) for it in with_jobs)]


def dead(topology: EventTopology, service: Service) -> Queue:
    """The queue of a service's dead letters, for its jobs and for each of its subscriptions."""
    addresses = [topology.address(service.name, each.name) for each in service.lasting]
    return topology.jobs.dead_queue(service.name, addresses)


def waiting(topology: EventTopology, service: Service) -> list[Queue]:
    """The queues in which the jobs and the events of a service wait for a worker."""
    found = topology.jobs.waiting(service.name, lanes=service.lanes, ordered=service.ordered) if service.jobs else []
    for each in service.lasting:
        found += [
            topology.queue(service.name, each.name, each.topics.patterns),
            topology.suspects(service.name, each.name),
        ]
    return found
