"""The in-process broker in an event loop: what several transports share.

`vhost` decides what becomes of messages; this module calls it. What transports publish and settle waits in the inboxes
of their sessions until the next iteration of the event loop; one callback then works off all inboxes. So no message
costs a task, and no callback is called from inside `publish`, `ack` or `reject`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

from rpcq.errors import BrokerError, BrokerUnreachable, UsageError
from rpcq.runtime.clock import sleep_until
from rpcq.transport.memory.clock import StoppedClock
from rpcq.transport.memory.queues import Connection, Handed
from rpcq.transport.memory.vhost import Vhost

_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[str, MemoryBroker]] = WeakKeyDictionary()


class Inbox(Protocol):
    """What a session published or settled, until the broker works it off."""

    def work_off(self, now: float) -> None:
        """Pass it on to the vhost."""


class ConsumingSession(Protocol):
    """What the broker needs of a session that consumes."""

    up: bool
    connection: Connection


class Attached(Protocol):
    """What the broker needs of a transport."""

    @property
    def consuming(self) -> ConsumingSession | None:
        """Its session that consumes, while there is one."""

    def lose_consuming(self, cause: BrokerError) -> None:
        """End the consuming session."""

    def lose_publishing(self, cause: BrokerError) -> None:
        """End the publishing session."""

    def on_blocked(self) -> None:
        """The broker takes no messages from now on."""

    def on_unblocked(self) -> None:
        """The broker takes messages again."""


class MemoryBroker:
    """Exchanges and queues that live in this process, in one event loop, while a transport or other code holds them.

    Besides the methods that transports use, it has hooks for tests: to look at queues, to fail as a broker fails, and
    to move its clock.
    """

    def __init__(self) -> None:
        self._vhost = Vhost(self.wall)
        self._clock: StoppedClock | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._transports: dict[Attached, None] = {}
        self._inboxes: deque[Inbox] = deque()
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._reason: str | None = None
        self._worked = asyncio.Event()
        self._sleeping: list[tuple[float, asyncio.Future[None]]] = []  # who waits for a time of the stopped clock

    @property
    def queues(self) -> tuple[str, ...]:
        """The names of all queues."""
        return tuple(self._vhost.queues)

    def depth(self, queue: str) -> int:
        """How many messages of a queue are ready: no consumer holds them, and the first one has not expired."""
        return len(self._vhost.queues[queue].ready)

    @classmethod
    def named(cls, name: str) -> MemoryBroker | None:
        """The broker that transports with this name share in the running event loop; None if none is open."""
        named = _shared.get(asyncio.get_running_loop())
        return None if named is None else named.get(name)

    def consumers(self, queue: str) -> int:
        """How many consumers a queue has."""
        return len(self._vhost.queues[queue].consumers)

    def drop_connections(self) -> None:
        """Reset every connection. Transports open new sessions by themselves, each after a pause of up to 50 ms."""
        cause = BrokerUnreachable("the in-process broker dropped the connection")
        transports = [*self._transports]
        # All at once: otherwise one transport would get what another one lost in the same moment.
        self.disconnect(transport.consuming for transport in transports)
        for transport in transports:
            transport.lose_consuming(cause)
            transport.lose_publishing(cause)

    def block(self, reason: str) -> None:
        """Take no messages until `unblock`, as RabbitMQ does under a memory or disk alarm."""
        self._reason = reason
        for transport in [*self._transports]:
            transport.on_blocked()

    def unblock(self) -> None:
        """Take messages again after `block`."""
        self._reason = None
        for transport in [*self._transports]:
            transport.on_unblocked()

    # ------------------------------------------------------------------------------------ a clock that is moved

    def stop_clock(self) -> StoppedClock:
        """From now on, time passes for this broker only when `move_clock` says so.

        Raises:
            UsageError: a transport uses this broker already.

        """
        if self._transports:
            raise UsageError("the clock of an in-process broker can be stopped only before a client or worker opens it")
        self._clock = StoppedClock(self.wall())
        return self._clock

    @property
    def next_stop(self) -> float | None:
        """When the next message may expire, or somebody wakes, in seconds of the broker's clock; None for never."""
        stops = [when for when, _ in self._sleeping]
        if self._vhost.next_expiry is not None:
            stops.append(self._vhost.next_expiry)
        return min(stops, default=None)

    def move_clock(self, now: float) -> None:
        """Move a stopped clock to `now`, give up the messages that have expired by then, and wake who waited for it."""
        assert self._clock is not None  # noqa: S101 - the caller stopped it
        self._clock.now = now
        self._vhost.expire(now)
        for when, sleeper in self._sleeping:
            if when <= now and not sleeper.done():
                sleeper.set_result(None)
        self.schedule()

    @property
    def is_at_work(self) -> bool:
        """Whether it has something to work off: published, settled or handed to consumers."""
        return self._scheduled

    async def worked(self) -> None:
        """Wait until it has worked off something."""
        self._worked.clear()
        await self._worked.wait()

    def in_hand(self) -> Iterator[Handed]:
        """What consumers hold: handed to them, and not settled."""
        for transport in self._transports:
            if transport.consuming is not None:
                yield from transport.consuming.connection.unacked.values()

    # ------------------------------------------------------------------------------------------- for transports

    async def sleep_until(self, ms: int) -> None:
        """Wait until the time of day is at least this, in milliseconds since the epoch."""
        if self._clock is None:
            await sleep_until(ms)
            return
        sleeping = self._clock.at(ms), self.loop.create_future()
        if sleeping[0] > self._clock.now:
            self._sleeping.append(sleeping)
            try:
                await sleeping[1]
            finally:
                self._sleeping.remove(sleeping)

    def now(self) -> float:
        """The monotonic time for expiry, in seconds."""
        return self.loop.time() if self._clock is None else self._clock.now

    def wall(self) -> datetime:
        """The time of day, with a time zone."""
        return datetime.now(UTC) if self._clock is None else self._clock.wall()

    @property
    def reason(self) -> str | None:
        """Why the broker takes no messages; None if it takes them."""
        return self._reason

    @property
    def vhost(self) -> Vhost:
        """The exchanges and queues. After a change of them, `schedule` must be called."""
        return self._vhost

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of all its transports."""
        if self._loop is None:
            raise UsageError("no transport of this broker is open")
        return self._loop

    def attach(self, transport: Attached) -> None:
        """Add a transport.

        Raises:
            UsageError: transports in another event loop use this broker.

        """
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise UsageError("transports in another event loop use this broker; each loop needs one of its own")
        self._loop = loop
        self._transports[transport] = None
        self.schedule()

    def detach(self, transport: Attached) -> bool:
        """Remove a transport; returns whether it was the last one."""
        self.disconnect((transport.consuming,))
        self._transports.pop(transport, None)
        if self._transports:
            return False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop = None
        self._scheduled = False
        return True

    def post(self, inbox: Inbox) -> None:
        """Work off an inbox in the next iteration of the loop."""
        self._inboxes.append(inbox)
        self.schedule()

    def schedule(self) -> None:
        """Deliver what consumers were handed, in the next iteration of the loop."""
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._process)

    def deliver(self) -> None:
        """Deliver what consumers were handed."""
        outbox = self._vhost.outbox
        while outbox:
            handed = outbox.popleft()
            handed[0].deliver(handed)

    def disconnect(self, sessions: Iterable[ConsumingSession | None]) -> None:
        """End sessions, all at once; those that have ended already stay ended."""
        open_sessions = [session for session in sessions if session is not None]
        for session in open_sessions:
            session.up = False
        self._vhost.disconnect([session.connection for session in open_sessions], self.now())
        self.schedule()

    def _process(self) -> None:
        self._scheduled = False
        if self._loop is None:
            return
        now = self.now()
        inboxes, count = self._inboxes, len(self._inboxes)
        try:
            while count and inboxes:
                count -= 1
                inboxes.popleft().work_off(now)
            self.deliver()
        finally:
            # If a callback raises, the event loop reports it, and the other transports lose no messages.
            if inboxes or self._vhost.outbox:
                self.schedule()
            self._set_timer()
            self._worked.set()

    def _set_timer(self) -> None:
        due = self._vhost.next_expiry
        if due is None or self._loop is None or self._clock is not None:
            return
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._expire, due)

    def _expire(self, due: float) -> None:
        self._timer = None
        self._vhost.expire(max(due, self.loop.time()))  # timers may fire early by the resolution of the clock
        self.schedule()


def shared(name: str) -> MemoryBroker:
    """The broker that transports with this name share in the running event loop; made if there is none."""
    named = _shared.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
    broker = named.get(name)
    if broker is None:
        broker = named[name] = MemoryBroker()
    return broker


def loops(name: str) -> list[asyncio.AbstractEventLoop]:
    """The event loops that run, in any thread, and have a broker of this name."""
    known = [reference() for reference in _shared.keyrefs()]  # a copy: other threads may add to it
    return [loop for loop in known if loop is not None and loop.is_running() and name in _shared.get(loop, ())]


def forget(loop: asyncio.AbstractEventLoop, name: str) -> None:
    """Share this broker no longer: its last transport has closed."""
    del _shared[loop][name]
