"""Which sessions are up, as the in-process broker opens, loses and blocks them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from rpcq.errors import BrokerError
from rpcq.observer import Counted, Observer, Observers, Role
from rpcq.options import ConnectionOptions
from rpcq.transport.base import Subscription
from rpcq.transport.memory.broker import MemoryBroker
from rpcq.transport.memory.transport import MemoryTransport
from rpcq.transport.sessions import Sessions, SessionState
from rpcq.wire.topology import Queue

SECONDS = 5.0


class Owner:
    def counts(self) -> Mapping[str, int]:
        return {}


class Changes(Observer):
    """Keeps what observers are called with."""

    def __init__(self) -> None:
        self.changes: list[tuple[Role, str]] = []

    def on_session(self, owner: Counted, role: Role, cause: BaseException | None) -> None:
        self.changes.append((role, "up" if cause is None else str(cause)))


class Place:
    """The sessions of one transport on a broker of its own, and what its owner and its observers are called with."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.transport = MemoryTransport(self.broker, ConnectionOptions())
        self.observer = Changes()
        self.sessions = Sessions(self.transport, Observers([self.observer], Owner()))
        self.called: list[tuple[object, SessionState]] = []

    async def start(self) -> None:
        def consuming(queues: Sequence[str]) -> None:
            self.called.append((list(queues), self.sessions.consuming))

        def consuming_lost(cause: BrokerError) -> None:
            self.called.append((str(cause), self.sessions.consuming))

        def blocked(reason: str) -> None:
            self.called.append((reason, self.sessions.publishing))

        listener = self.sessions.listener(consuming=consuming, consuming_lost=consuming_lost, blocked=blocked)
        await self.transport.start([], [Subscription(Queue("q", durable=True), lambda _: None)], listener)

    @property
    def states(self) -> tuple[SessionState, SessionState]:
        return self.sessions.consuming, self.sessions.publishing

    async def ready(self) -> None:
        async with asyncio.timeout(SECONDS):
            await self.sessions.ready()


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place()
    yield place
    await place.transport.close()


async def turns() -> None:
    """Let every task go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_before_the_transport_starts_both_sessions_are_down(place: Place) -> None:
    assert place.states == (SessionState.DOWN, SessionState.DOWN)
    assert place.sessions.down == ["consuming", "publishing"]
    assert not place.sessions.can_exchange


async def test_once_it_has_started_both_are_up_and_a_reply_to_a_message_can_arrive(place: Place) -> None:
    await place.start()
    assert place.states == (SessionState.UP, SessionState.UP)
    assert place.sessions.down == []
    assert place.sessions.can_exchange
    assert place.called == [(["q"], SessionState.UP)]
    assert place.observer.changes == [("publishing", "up"), ("consuming", "up")]
    await place.ready()


async def test_a_lost_consuming_session_is_down_until_it_is_back(place: Place) -> None:
    await place.start()
    place.transport.lose_consuming(BrokerError("gone"))
    assert place.states == (SessionState.DOWN, SessionState.UP)
    assert place.sessions.down == ["consuming"]
    assert not place.sessions.can_exchange
    await place.ready()
    assert place.states == (SessionState.UP, SessionState.UP)
    assert place.called == [(["q"], SessionState.UP), ("gone", SessionState.DOWN), (["q"], SessionState.UP)]
    assert place.observer.changes[2:] == [("consuming", "gone"), ("consuming", "up")]


async def test_a_lost_publishing_session_is_down_until_it_is_back(place: Place) -> None:
    await place.start()
    place.transport.lose_publishing(BrokerError("gone"))
    assert place.states == (SessionState.UP, SessionState.DOWN)
    assert place.sessions.down == ["publishing"]
    assert not place.sessions.can_exchange
    await place.ready()
    assert place.states == (SessionState.UP, SessionState.UP)
    assert place.observer.changes[2:] == [("publishing", "gone"), ("publishing", "up")]


async def test_a_blocked_session_is_not_down_and_no_observer_is_called_when_it_goes_on(place: Place) -> None:
    await place.start()
    place.broker.block("low on memory")
    assert place.states == (SessionState.UP, SessionState.BLOCKED)
    assert place.sessions.down == []
    assert not place.sessions.can_exchange
    assert place.called[1:] == [("low on memory", SessionState.BLOCKED)]
    place.broker.unblock()
    assert place.states == (SessionState.UP, SessionState.UP)
    assert place.sessions.can_exchange
    assert place.observer.changes == [("publishing", "up"), ("consuming", "up")]


async def test_a_session_that_opens_while_the_broker_is_blocked_is_up_and_then_blocked(place: Place) -> None:
    place.broker.block("low on memory")
    await place.start()
    assert place.states == (SessionState.UP, SessionState.BLOCKED)
    assert place.observer.changes == [("publishing", "up"), ("consuming", "up")]


async def test_who_waits_until_both_are_ready_goes_on_when_the_broker_takes_messages_again(place: Place) -> None:
    await place.start()
    place.broker.block("low on memory")
    waiting = asyncio.create_task(place.ready())
    await turns()
    assert not waiting.done()
    place.broker.unblock()
    await waiting
    assert place.sessions.can_exchange


async def test_who_waits_until_both_are_ready_waits_for_each_that_was_lost(place: Place) -> None:
    await place.start()
    place.broker.drop_connections()
    assert place.sessions.down == ["consuming", "publishing"]
    waiting = [asyncio.create_task(place.ready()) for _ in range(2)]
    await turns()
    assert not any(task.done() for task in waiting)
    await asyncio.gather(*waiting)
    assert place.sessions.down == []
    assert place.sessions.can_exchange


async def test_who_waits_before_the_start_goes_on_after_it(place: Place) -> None:
    waiting = asyncio.create_task(place.ready())
    await turns()
    assert not waiting.done()
    await place.start()
    await waiting


async def test_what_is_closed_for_good_is_down_and_is_never_ready(place: Place) -> None:
    await place.start()
    await place.transport.close()
    place.sessions.closed()
    assert place.sessions.down == ["consuming", "publishing"]
    waiting = asyncio.create_task(place.sessions.ready())
    await turns()
    assert not waiting.done()
    waiting.cancel()
