"""Which sessions of a client or a worker are up. Clients and workers ask this, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum, auto

from rpcq.errors import BrokerError
from rpcq.observer import Observers
from rpcq.transport.base import Listener, Transport


class SessionState(Enum):
    """Where a session is."""

    DOWN = auto()
    """There is no connection, or it is not set up yet."""
    UP = auto()
    BLOCKED = auto()
    """It is up, but the broker takes no messages (a memory or disk alarm). Only the publishing session can be this."""


class Sessions:
    """The state of both sessions; reports each change to the observers.

    Args:
        transport: the transport that has the sessions.
        observers: called with each change.

    Attributes:
        consuming: the state of the session that consumes.
        publishing: the state of the session that publishes.

    """

    def __init__(self, transport: Transport, observers: Observers) -> None:
        self._transport = transport
        self._observers = observers
        self.consuming = SessionState.DOWN
        self.publishing = SessionState.DOWN
        self._consuming_up = asyncio.Event()

    def listener(
        self,
        *,
        consuming: Callable[[Sequence[str]], None],
        consuming_lost: Callable[[BrokerError], None],
        blocked: Callable[[str], None],
    ) -> Listener:
        """The listener to give to the transport.

        Args:
            consuming: called when the consuming session is up, with the names of its queues.
            consuming_lost: called when the consuming session is down, with the cause.
            blocked: called when the broker takes no messages, with its reason.

        """

        def on_consuming(queues: Sequence[str]) -> None:
            self.consuming = SessionState.UP
            consuming(queues)
            self._consuming_up.set()
            self._observers.session("consuming")

        def on_consuming_lost(cause: BrokerError) -> None:
            self.consuming = SessionState.DOWN
            self._consuming_up.clear()
            consuming_lost(cause)  # before the observers: a call that one of them makes must not use the lost queue
            self._observers.session("consuming", cause)

        def on_publishing() -> None:
            was_down = self.publishing is SessionState.DOWN  # otherwise it was blocked
            self.publishing = SessionState.UP
            if was_down:
                self._observers.session("publishing")

        def on_publishing_lost(cause: BrokerError) -> None:
            self.publishing = SessionState.DOWN
            self._observers.session("publishing", cause)

        def on_blocked(reason: str) -> None:
            self.publishing = SessionState.BLOCKED
            blocked(reason)

        return Listener(on_consuming, on_consuming_lost, on_publishing, on_publishing_lost, on_blocked)

    @property
    def down(self) -> list[str]:
        """The names of the sessions that are down."""
        states = (("consuming", self.consuming), ("publishing", self.publishing))
        return [name for name, state in states if state is SessionState.DOWN]

    @property
    def can_exchange(self) -> bool:
        """Whether a message that is sent now is written at once, and its reply can arrive."""
        return self.consuming is SessionState.UP and self._transport.can_publish

    async def ready(self) -> None:
        """Wait until `can_exchange`."""
        while not self.can_exchange:
            await self._consuming_up.wait()
            await self._transport.writable()

    def closed(self) -> None:
        """Record that both sessions are closed for good."""
        self.consuming = self.publishing = SessionState.DOWN
        self._consuming_up.clear()
