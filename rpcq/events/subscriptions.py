"""The queue of a subscription, as what runs jobs sees it: which events it takes, what becomes of others. Pure."""

from __future__ import annotations

from typing import Any, Final

from rpcq.errors import InvalidParams
from rpcq.jobs.invocation import Arguments, Served
from rpcq.jobs.outcomes import Again, Dead, Filtered, before, of_refusal, of_stranger
from rpcq.service import Offered, Service, Subscriber
from rpcq.wire.events import EventTopology
from rpcq.wire.jobs import JobMessage

FIRST_VERSION: Final = 1
"""The version of an event whose message does not say."""


class ServedSubscription(Served):
    """A queue of a subscription whose events are done here.

    Args:
        service: the service.
        state: what its lifespan yielded.
        subscriber: the subscription.
        room: how many events of the queue may wait here for a turn by its own limits.
        topology: of the namespace.

    Attributes:
        label: the subscription in logs.
        subscriber: the subscription.

    """

    __slots__ = ("_address", "label", "subscriber", "subscription")

    def __init__(
        self, service: Service, state: Any, subscriber: Subscriber, *, room: int, topology: EventTopology
    ) -> None:
        super().__init__(service, state, room=room, topology=topology.jobs)
        self.subscription = subscriber.name
        self.exchange = topology.events.name.encode()
        self.suspect_key = topology.suspect_key(service.name, subscriber.name)
        self.dead_key = self._address = topology.address(service.name, subscriber.name)
        self.subscriber = subscriber
        self.label = subscriber.label

    def address(self, job: JobMessage) -> str:  # noqa: ARG002 - events have no lanes
        """See `Served`."""
        return self._address

    def find(self, job: JobMessage) -> Offered | None:
        """See `Served`: the subscription, if one of its patterns takes the event."""
        return self.subscriber if self.subscriber.topics.matches(job.name) else None

    def unknown(self, job: JobMessage) -> Again | Dead | Filtered:
        """See `Served`: an older deploy has bound the queue to more, or a newer one does so while it rolls."""
        patterns = ", ".join(self.subscriber.topics.patterns)
        said = f"{self.subscriber.label} takes {patterns}, and not {job.name!r}: its queue is still bound to it"
        return of_stranger(job, said, Filtered(said), "unwanted")

    def read(self, job: JobMessage) -> Arguments:
        """See `Served`."""
        event = self.subscriber.topics.read(job.name, version_of(job), job.id, job.body)
        return self.subscriber.arguments(event)

    def refused(self, job: JobMessage, error: InvalidParams) -> Again | Dead | Filtered:
        """See `Served`: while a deploy rolls, another worker may read what does not fit here."""
        topics, version = self.subscriber.topics, version_of(job)
        kind = topics.kind_of(job.name, version)
        if kind is None and not topics.takes_any:
            return of_stranger(job, error.message, Dead("unknown_event", before(job), error.message), "unknown_event")
        if kind is not None and kind.event_version != version:
            said = f"it has version {version}, which does not fit here: {error.message}"
            return of_stranger(job, said, Dead("unsupported_version", before(job), said), "unsupported_version")
        return of_refusal(job, error)

    def names(self, job: JobMessage) -> dict[str, Any]:
        """See `Served`."""
        return {"job": self.subscriber.label, "event_name": job.name, "job_id": job.id, "attempt": job.attempt}


def version_of(job: JobMessage) -> int:
    """The version of an event."""
    return FIRST_VERSION if job.version is None else job.version
