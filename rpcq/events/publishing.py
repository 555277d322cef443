"""Publishes events: each ends when the broker has the event for all who listen, or with an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rpcq.event_types import Event
from rpcq.events.encoding import message_of
from rpcq.jobs.confirming import Confirms, Declared, Sending
from rpcq.jobs.observing import SendObservation
from rpcq.observer import ObservedPublish
from rpcq.options import CallOptions, ClientOptions
from rpcq.transport.base import Transport
from rpcq.wire.events import EncodedEvent, EventTopology, Publication, encode_event
from rpcq.wire.jobs import JobMessage

PublishObservers = Sequence[Callable[[ObservedPublish], Callable[[ObservedPublish], None] | None]]


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
        observers: of publishes, as `Observers.publishes` has them.

    """

    def __init__(
        self,
        transport: Transport,
        confirms: Confirms,
        topology: EventTopology,
        next_id: Callable[[], bytes],
        options: ClientOptions,
        observers: PublishObservers = (),
    ) -> None:
        self._transport = transport
        self._confirms = confirms
        self._topology = topology
        self._next_id = next_id
        self._options = options
        self._observers = observers
        self._exchange = topology.events.name.encode()
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
        if self._observers:
            return await self._observed(message, options.timeout)
        publishing = self._prepare(message)
        await self._confirms.send([publishing], options.timeout, self._declared)
        return self._publication(publishing, message)

    async def _observed(self, message: JobMessage, seconds: float) -> Publication:
        """Publish an event and call the observers with it."""
        observed = ObservedPublish(self._exchange, message.name)
        observation = SendObservation(self._observers, observed, message)
        publishing = self._prepare(message)
        failed: BaseException | None = None
        try:
            await self._confirms.send([publishing], seconds, self._declared)
            observed.heard = self._heard(publishing)
            return self._publication(publishing, message)
        except BaseException as error:
            failed = error
            raise
        finally:
            observation.end(*publishing.known(failed))
            del failed  # an error's traceback holds this frame

    def _prepare(self, message: JobMessage) -> _Publishing:
        encoded = encode_event(self._topology, message, self._transport.now_ms())
        return _Publishing(self._confirms, message, encoded)

    def _publication(self, publishing: _Publishing, message: JobMessage) -> Publication:
        return Publication(message.id, message.name, message.version or 1, message.key, self._heard(publishing))

    def _heard(self, publishing: _Publishing) -> bool | None:
        """Whether a queue took it; None if that is not known."""
        if publishing.is_returned:
            return None if publishing.may_be_queued else False  # an earlier time may have been heard
        return None if self._options.unheard_kept else True
