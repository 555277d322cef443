"""The events that were published in an in-process broker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from rpcq.event_types import Event, read_event
from rpcq.transport.memory.vhost import Vhost
from rpcq.wire import bodies
from rpcq.wire.events import EventTopology
from rpcq.wire.jobs import JobMessage, read_job
from rpcq.wire.properties import MalformedProperties

E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedEvent:
    """An event that the broker has got.

    Attributes:
        id: its ID.
        name: its name.
        version: the version of its class.
        key: its idempotency key.
        data: its fields, as JSON values; None if they cannot be read.
        metadata: the publisher's own headers.
        heard: whether a queue took it.

    """

    id: str
    name: str
    version: int
    key: str
    data: Any
    metadata: dict[str, str]
    heard: bool


class Published:
    """Notes the events that are published from now on.

    Args:
        vhost: where they are published.
        topology: of the namespace.

    """

    def __init__(self, vhost: Vhost, topology: EventTopology) -> None:
        self._exchange = topology.events.name.encode()
        self._found: list[tuple[JobMessage, bool]] = []
        vhost.on_publish = self._note

    def _note(self, exchange: bytes, routing_key: bytes, properties: bytes, body: bytes, heard: bool) -> None:
        if exchange != self._exchange:
            return
        try:
            message = read_job(properties, body, redelivered=False)
        except MalformedProperties as error:
            name = routing_key.decode("utf-8", "replace")
            message = JobMessage(id="", name=name, body=body, problem=str(error))
        self._found.append((message, heard))

    def all(self) -> list[PublishedEvent]:
        """All events, in order."""
        return [
            PublishedEvent(
                id=message.id,
                name=message.name,
                version=message.version or 1,
                key=message.key,
                data=_data(message.body),
                metadata=message.metadata,
                heard=heard,
            )
            for message, heard in self._found
        ]

    def of(self, kind: type[E]) -> list[E]:
        """The events of one name and version, in order.

        Raises:
            InvalidParams: one of them does not fit the class.

        """
        wanted = kind.event_name, kind.event_version
        return [read_event(kind, it.body) for it, _ in self._found if (it.name, it.version or 1) == wanted]


def _data(body: bytes) -> Any:
    try:
        return bodies.loads(body)
    except ValueError:
        return None
