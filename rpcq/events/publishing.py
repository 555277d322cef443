"""Publishes events: each ends when the broker has the event for all who listen, or with an error."""

from __future__ import annotations

from collections.abc import Callable

from rpcq.event_types import Event
from rpcq.events.encoding import message_of
from rpcq.jobs.confirming import Confirms, Declared, Sending
from rpcq.options import CallOptions, ClientOptions
from rpcq.transport.base import Transport
from rpcq.wire.events import EncodedEvent, EventTopology, Publication, encode_event
from rpcq.wire.jobs import JobMessage


class _Publishing(Sending):
    """An event on its way to the broker.

    Attributes:
        is_returned: whether no queue took it when it was published last.

    """

    __slots__ = ("is_returned",)

    def __init__(self, confirms: Confirms, message: JobMessage, encoded: EncodedEvent) -> None:
        route = encoded.exchange, encoded.routing_key
        super().__init__(confirms, message.id, message.key, route, encoded.properties, encoded.body, is_once=False)
        self.is_returned = False

    def returned(self) -> None:
        """See `Sending`: that nobody listens is no error."""
        self.is_returned = True
        self.done.set_result(None)


class EventPublisher:
    """Publishes the events of a client.

    Args:
        transport: the client's.
        confirms: the client's.
        topology: of the namespace.
        next_id: makes an ID that nobody can guess.
        options: the client's.

    """

    def __init__(
        self,
        transport: Transport,
        confirms: Confirms,
        topology: EventTopology,
        next_id: Callable[[], bytes],
        options: ClientOptions,
    ) -> None:
        self._transport = transport
        self._confirms = confirms
        self._topology = topology
        self._next_id = next_id
        self._options = options
        self._declared = Declared(topology.exchanges())

    async def publish(self, event: Event, options: CallOptions) -> Publication:
        """Publish an event, and wait until the broker has it in the queue of everybody who listens.

        Raises:
            SendError: it is not published, or may not be.
            Exception: what `message_of` raises.

        """
        message = message_of(
            event,
            options,
            event_id=self._next_id().decode(),
            app_id=self._options.name,
            max_body=self._options.max_body,
        )
        encoded = encode_event(self._topology, message, self._transport.now_ms())
        publishing = _Publishing(self._confirms, message, encoded)
        await self._confirms.send([publishing], options.timeout, self._declared)
        return Publication(message.id, message.name, message.version or 1, message.key, self._heard(publishing))

    def _heard(self, publishing: _Publishing) -> bool | None:
        """Whether a queue took it; None if that is not known."""
        if publishing.is_returned:
            return None if publishing.may_be_queued else False  # an earlier time may have been heard
        return None if self._options.unheard_kept else True
