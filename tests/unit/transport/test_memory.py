"""The transport of `memory://` and its broker in the event loop."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import uvloop

from rpcq.errors import (
    BrokerError,
    BrokerUnreachable,
    ClosedError,
    NotFound,
    PreconditionFailed,
    ProtocolError,
    TopologyMismatch,
    UsageError,
)
from rpcq.options import ConnectionOptions
from rpcq.transport.base import Delivery, Listener, Message, Published, Subscription, Transport
from rpcq.transport.memory import broker as brokers
from rpcq.transport.memory import transport as memory
from rpcq.transport.memory.broker import MemoryBroker
from rpcq.transport.memory.transport import HIGH_WATER, PAUSE, MemoryTransport
from rpcq.wire.properties import Properties, decode, encode
from rpcq.wire.topology import Exchange, Queue, Topology

LIMIT = 5.0
PLAIN = encode(Properties())
NOTHING = Exchange("nothing-is-bound")


class Log:
    """A listener that keeps the events it is called with, and can be awaited."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.queues: list[str] = []
        self.causes: list[BrokerError] = []
        self.changed = asyncio.Event()
        self.listener = Listener(
            consuming=self._consuming,
            consuming_lost=lambda cause: self._lost("consuming_lost", cause),
            publishing=lambda: self._add("publishing"),
            publishing_lost=lambda cause: self._lost("publishing_lost", cause),
            publishing_blocked=lambda reason: self._add(f"blocked: {reason}"),
        )

    def _consuming(self, queues: Sequence[str]) -> None:
        self.queues = list(queues)
        self._add("consuming")

    def _lost(self, event: str, cause: BrokerError) -> None:
        self.causes.append(cause)
        self._add(event)

    def _add(self, event: str) -> None:
        self.events.append(event)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


class Peer:
    """A transport with its listener, its deliveries, and what became of its messages."""

    def __init__(self, broker: MemoryBroker | str, options: ConnectionOptions | None = None) -> None:
        self.transport: MemoryTransport = MemoryTransport(broker, options or ConnectionOptions())
        self.log = Log()
        self.got: list[Delivery] = []
        self.published: list[Published] = []

    def subscription(self, queue: Queue | str, prefetch: int = 0, *, no_ack: bool = False) -> Subscription:
        declared = Queue(queue, durable=True) if isinstance(queue, str) else queue
        return Subscription(declared, self._take, prefetch, no_ack)

    async def start(
        self, *queues: Queue | str, prefetch: int = 0, no_ack: bool = False, exchanges: Sequence[Exchange] = ()
    ) -> None:
        subscriptions = [self.subscription(queue, prefetch, no_ack=no_ack) for queue in queues]
        await self.transport.start([NOTHING, *exchanges], subscriptions, self.log.listener)

    def publish(
        self, key: str, body: bytes = b"", properties: bytes = PLAIN, *, exchange: str = "", mandatory: bool = True
    ) -> None:
        message = Message(exchange.encode(), key.encode(), b"", properties, body, self.published.append, mandatory)
        self.transport.publish(message)

    @property
    def bodies(self) -> list[bytes | None]:
        return [delivery.body for delivery in self.got]

    def _take(self, delivery: Delivery) -> None:
        self.got.append(delivery)
        self.log.changed.set()

    async def until(self, count: int) -> None:
        await self.log.until(lambda: len(self.got) >= count)


async def turn(times: int = 1) -> None:
    """Let the loop run: pending work is done in one iteration, and the work that results from it in the next."""
    for _ in range(times):
        await asyncio.sleep(0)


@pytest.fixture
async def broker() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
async def peer(broker: MemoryBroker) -> AsyncIterator[Peer]:
    peer = Peer(broker)
    yield peer
    await peer.transport.close()


@pytest.fixture
async def other(broker: MemoryBroker) -> AsyncIterator[Peer]:
    peer = Peer(broker)
    yield peer
    await peer.transport.close()


# ------------------------------------------------------------------------------------------- publish and deliver


async def test_a_message_is_confirmed_and_delivered_in_the_next_iteration(peer: Peer) -> None:
    await peer.start("q")
    peer.publish("q", b"a", encode(Properties(type=b"t")))
    assert (peer.published, peer.got) == ([], [])
    await turn()
    assert peer.published == [Published.CONFIRMED]
    (delivery,) = peer.got
    assert (delivery.body, delivery.body_size, delivery.redelivered) == (b"a", 1, False)
    assert decode(delivery.properties).type == b"t"


async def test_messages_are_reported_in_the_order_in_which_they_were_published(peer: Peer) -> None:
    full = Queue("full", durable=True, arguments={"x-max-length": 0, "x-overflow": "reject-publish"})
    await peer.start(full, "q")
    for key in ("nobody", "full", "q"):
        peer.publish(key)
    peer.publish("nobody", mandatory=False)
    await turn()
    assert peer.published == [
        Published.RETURNED,
        Published.REFUSED,
        Published.CONFIRMED,
        Published.CONFIRMED,
    ]


async def test_messages_wait_in_a_queue_without_consumers(broker: MemoryBroker, peer: Peer, other: Peer) -> None:
    await other.start("q")
    await other.transport.close()
    await peer.start()
    for body in (b"a", b"b"):
        peer.publish("q", body)
    await turn()
    assert (broker.depth("q"), broker.consumers("q"), broker.queues) == (2, 0, ("q",))
    late = Peer(broker)
    await late.start("q")
    await turn()
    assert late.bodies == [b"a", b"b"]
    await late.transport.close()


async def test_a_body_over_the_limit_is_not_kept(broker: MemoryBroker) -> None:
    small = Peer(broker, ConnectionOptions(max_body=2))
    await small.start("q")
    small.publish("q", b"ab")
    small.publish("q", b"abc")
    await turn()
    assert [(delivery.body, delivery.body_size) for delivery in small.got] == [(b"ab", 2), (None, 3)]
    await small.transport.close()


async def test_a_message_that_a_callback_publishes_waits_for_the_next_iteration(peer: Peer) -> None:
    await peer.start("q")
    left = 3

    def again(_: Published) -> None:
        nonlocal left
        left -= 1
        if left:
            peer.transport.publish(Message(b"", b"q", b"", PLAIN, b"", again))

    again(Published.CONFIRMED)
    assert left == 2
    await turn()
    assert left == 1
    await turn()
    assert left == 0


async def test_a_callback_that_raises_costs_no_other_messages(peer: Peer) -> None:
    await peer.start("q")
    raised: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context.get("exception")))

    def fail(_: Published) -> None:
        raise ZeroDivisionError

    peer.transport.publish(Message(b"", b"q", b"", PLAIN, b"a", fail))
    peer.publish("q", b"b")
    await turn(3)
    asyncio.get_running_loop().set_exception_handler(None)
    assert [type(error) for error in raised] == [ZeroDivisionError]
    assert peer.published == [Published.CONFIRMED]
    assert peer.bodies == [b"a", b"b"]


async def test_a_transport_that_is_not_open_sends_nothing(peer: Peer) -> None:
    peer.publish("q")
    assert peer.published == [Published.UNSENT]
    assert not peer.transport.can_publish
    await peer.transport.stop_consuming()


# --------------------------------------------------------------------------------------------------- settlement


async def test_an_ack_makes_room_for_the_next_message(peer: Peer) -> None:
    await peer.start("q", prefetch=1)
    for body in (b"a", b"b"):
        peer.publish("q", body)
    await turn()
    assert peer.bodies == [b"a"]
    peer.got[0].ack()
    assert peer.bodies == [b"a"]  # never from inside ack
    await turn()
    assert peer.bodies == [b"a", b"b"]


async def test_acks_of_one_iteration_are_worked_off_together(peer: Peer) -> None:
    await peer.start("q", prefetch=2)
    for body in (b"a", b"b", b"c", b"d"):
        peer.publish("q", body)
    await turn()
    for delivery in peer.got[:]:
        delivery.ack()
    await turn()
    assert peer.bodies == [b"a", b"b", b"c", b"d"]


async def test_a_requeued_message_comes_again_and_is_flagged(peer: Peer) -> None:
    await peer.start("q")
    peer.publish("q", b"a")
    await turn()
    peer.got[0].reject(requeue=True)
    await turn()
    assert [(delivery.body, delivery.redelivered) for delivery in peer.got] == [(b"a", False), (b"a", True)]


async def test_a_quorum_queue_adds_how_often_a_message_came_back(peer: Peer) -> None:
    await peer.start(Queue("q", durable=True, arguments={"x-queue-type": "quorum", "x-delivery-limit": 1}))
    peer.publish("q")
    await turn()
    peer.got[0].reject(requeue=True)
    await turn()
    assert decode(peer.got[1].properties).headers == {"x-delivery-count": 1}
    assert peer.got[1].redelivered


async def test_acknowledging_a_delivery_that_needs_no_ack_ends_the_session(peer: Peer) -> None:
    await peer.start("q", no_ack=True)
    peer.publish("q")
    await turn()
    peer.got[0].ack()
    await turn()
    assert peer.log.events == ["publishing", "consuming", "consuming_lost"]
    assert isinstance(peer.log.causes[0], PreconditionFailed)
    await peer.log.until(lambda: peer.log.events[-1] == "consuming")


# -------------------------------------------------------------------------------------------------------- expiry


async def test_an_expired_request_comes_back_to_the_caller(broker: MemoryBroker, peer: Peer, other: Peer) -> None:
    topology = Topology()
    await other.transport.start(
        topology.exchanges(), [other.subscription(topology.request_queue("s", "classic"), 1)], Log().listener
    )
    await peer.start(topology.reply_queue(), no_ack=True, exchanges=[topology.notices])
    (reply_to,) = peer.log.queues
    properties = encode(Properties(correlation_id=b"c", expiration=b"5", headers={"CC": [reply_to]}))
    for _ in range(2):  # the worker holds the first
        peer.publish("s", b"b", properties, exchange=topology.requests.name)
    await peer.until(1)
    (notice,) = peer.got
    found = decode(notice.properties)
    assert found.correlation_id == b"c"
    assert found.headers is not None
    assert found.headers["x-death"][0]["reason"] == "expired"
    assert broker.depth("rpcq.req.s") == 0


async def test_a_later_expiry_does_not_delay_an_earlier_one(broker: MemoryBroker, peer: Peer) -> None:
    dead = {"x-dead-letter-exchange": ""}
    await peer.start("dead", Queue("slow", durable=True, arguments=dead), Queue("fast", durable=True, arguments=dead))
    await peer.transport.stop_consuming()
    watcher = Peer(broker)
    await watcher.start(Queue("watch", durable=True))
    for key, expiration in (("slow", b"60000"), ("fast", b"5"), ("slow", b"50000")):
        peer.publish(key, key.encode(), encode(Properties(expiration=expiration, headers={"CC": ["nobody", "watch"]})))
        await turn()
    await watcher.until(4)  # three copies by CC, then the dead letter
    assert watcher.bodies == [b"slow", b"fast", b"slow", b"fast"]
    assert (broker.depth("slow"), broker.depth("fast")) == (2, 0)
    await watcher.transport.close()


# ------------------------------------------------------------------------------------------- channel errors


@pytest.mark.parametrize(
    ("exchange", "properties", "kind"),
    [
        ("nope", PLAIN, NotFound),
        ("", encode(Properties(expiration=b"x")), PreconditionFailed),
        ("", b"\x01", ProtocolError),
    ],
)
async def test_an_error_that_closes_a_channel_ends_the_publishing_session_only(
    peer: Peer, exchange: str, properties: bytes, kind: type[BrokerError]
) -> None:
    await peer.start("q")
    peer.publish("q", b"a")
    peer.publish("q", b"b", properties, exchange=exchange)
    peer.publish("q", b"c")
    await turn()
    assert peer.published == [Published.CONFIRMED, Published.UNKNOWN, Published.UNSENT]
    assert peer.log.events == ["publishing", "consuming", "publishing_lost"]
    assert type(peer.log.causes[0]) is kind
    assert not peer.transport.can_publish
    await peer.log.until(lambda: peer.log.events[-1] == "publishing")
    peer.publish("q", b"d")
    await turn()
    assert peer.bodies == [b"a", b"d"]


# ----------------------------------------------------------------------------------------------- start and close


async def test_a_start_that_fails_leaves_nothing_open(broker: MemoryBroker, peer: Peer, other: Peer) -> None:
    await other.start("q")
    different = Queue("q", durable=True, auto_delete=True)
    with pytest.raises(TopologyMismatch, match=r"'q'.*auto_delete"):
        await peer.start(Queue("own", exclusive=True), different)
    assert broker.queues == ("q",)
    assert peer.log.events == []
    assert not peer.transport.can_publish
    await peer.start("q")  # another attempt is allowed
    assert broker.consumers("q") == 2


async def test_a_transport_starts_once(peer: Peer) -> None:
    await peer.start()
    with pytest.raises(UsageError, match="started before"):
        await peer.start()


async def test_a_closed_transport_does_not_start(peer: Peer) -> None:
    await peer.transport.close()
    with pytest.raises(ClosedError):
        await peer.start()


async def test_closing_works_off_what_is_pending(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start("q", prefetch=1)
    peer.publish("q", b"a")
    await turn()
    peer.got[0].ack()
    peer.publish("q", b"b")
    await peer.transport.close()
    assert peer.published == [Published.CONFIRMED, Published.CONFIRMED]
    assert broker.depth("q") == 1  # b, and a is not back
    await turn(2)
    assert peer.bodies == [b"a"]


async def test_who_vanishes_takes_along_what_was_not_worked_off(broker: MemoryBroker, peer: Peer, other: Peer) -> None:
    await peer.start("q", prefetch=1)
    await other.start()
    peer.publish("q", b"a")
    await turn()
    peer.got[0].ack()
    peer.publish("q", b"b")
    peer.transport.vanish()
    assert peer.published == [Published.CONFIRMED, Published.UNSENT]
    await turn(2)
    assert broker.depth("q") == 1  # a, and b never came
    peer.transport.vanish()
    await peer.transport.close()
    peer.publish("q", b"c")
    assert peer.published[-1] is Published.UNSENT
    assert peer.log.events == ["publishing", "consuming"]


async def test_who_vanishes_between_two_sessions_does_not_come_back(
    broker: MemoryBroker, peer: Peer, other: Peer
) -> None:
    await peer.start("q")
    await other.start()
    broker.drop_connections()
    peer.transport.vanish()
    await other.log.until(lambda: other.log.events.count("consuming") == 2)
    await asyncio.sleep(PAUSE[1])
    assert broker.consumers("q") == 0


# ------------------------------------------------------------------------------------------- a clock that is moved


async def test_time_stands_still_until_it_is_moved(broker: MemoryBroker, peer: Peer) -> None:
    clock = broker.stop_clock()
    began = clock.wall()
    await peer.start(Queue("q", arguments={"x-message-ttl": 1, "x-dead-letter-exchange": ""}), exchanges=[])
    await peer.transport.stop_consuming()
    peer.publish("q", properties=encode(Properties(headers={"CC": ["nobody"]})))
    await turn()
    await asyncio.sleep(0.01)
    assert broker.depth("q") == 1
    assert broker.next_stop == 0.001
    broker.move_clock(3600.0)
    assert broker.is_at_work
    await broker.worked()
    assert (broker.depth("q"), broker.is_at_work) == (0, False)
    assert (clock.wall() - began).total_seconds() == 3600
    assert peer.transport.now_ms() == round(clock.wall().timestamp() * 1000)
    with pytest.raises(UsageError, match="only before a client or worker opens it"):
        broker.stop_clock()


async def test_an_acknowledgement_when_the_reply_is_confirmed_while_closing_counts(
    broker: MemoryBroker, peer: Peer
) -> None:
    await peer.start("q", Queue("replies", durable=True))
    peer.publish("q")
    await turn()
    (delivery,) = peer.got
    peer.transport.publish(Message(b"", b"replies", b"", PLAIN, b"", lambda _: delivery.ack()))
    await peer.transport.close()
    assert (broker.depth("q"), broker.depth("replies")) == (0, 1)


async def test_a_message_that_is_published_while_closing_is_unsent(peer: Peer) -> None:
    await peer.start("q")
    peer.transport.publish(Message(b"", b"q", b"", PLAIN, b"", lambda _: peer.publish("q")))
    await peer.transport.close()
    assert peer.published == [Published.UNSENT]


async def test_messages_are_unsent_after_closing_while_blocked(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start("q")
    broker.block("memory")
    peer.publish("q")
    await turn()
    await peer.transport.close()
    assert peer.published == [Published.UNSENT]


async def test_closing_twice_does_no_harm_and_later_messages_are_unsent(peer: Peer) -> None:
    await peer.start("q")
    await peer.transport.close()
    await peer.transport.close()
    peer.publish("q")
    assert peer.published == [Published.UNSENT]
    assert peer.log.events == ["publishing", "consuming"]


async def test_messages_that_a_closed_transport_held_go_to_the_others(peer: Peer, other: Peer) -> None:
    await peer.start("q")
    peer.publish("q", b"a")
    await turn()
    await other.start("q")
    (held,) = peer.got
    await peer.transport.close()
    held.ack()  # its session has ended: ignored
    await turn()
    assert [(delivery.body, delivery.redelivered) for delivery in other.got] == [(b"a", True)]


async def test_a_session_that_waits_to_be_opened_again_stays_closed_after_close(
    broker: MemoryBroker, peer: Peer
) -> None:
    await peer.start("q")
    broker.drop_connections()
    await peer.transport.close()
    await asyncio.sleep(memory.PAUSE[1] * 2)
    assert peer.log.events[-1] == "publishing_lost"
    assert broker.consumers("q") == 0


async def test_a_session_that_ends_by_an_error_while_closing_is_not_opened_again(peer: Peer) -> None:
    await peer.start()
    peer.publish("q", exchange="nope")
    await peer.transport.close()
    await asyncio.sleep(memory.PAUSE[1] * 2)
    assert peer.published == [Published.UNKNOWN]
    assert peer.log.events == ["publishing", "consuming", "publishing_lost"]


async def test_after_stop_consuming_nothing_comes_and_earlier_deliveries_can_be_settled(
    broker: MemoryBroker, peer: Peer
) -> None:
    await peer.start("q")
    peer.publish("q", b"a")
    await turn()
    await peer.transport.stop_consuming()
    peer.publish("q", b"b")
    peer.got[0].reject(requeue=True)
    await turn(2)
    assert peer.bodies == [b"a"]
    assert (broker.depth("q"), broker.consumers("q")) == (2, 0)


async def test_messages_on_their_way_arrive_before_stop_consuming_returns(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start(Queue("q", durable=True))
    await peer.transport.close()
    first, second = Peer(broker), Peer(broker)
    await first.start()
    first.publish("q", b"a")
    await turn()
    await second.start("q")
    await second.transport.stop_consuming()
    assert second.bodies == [b"a"]
    await first.transport.close()
    await second.transport.close()


# -------------------------------------------------------------------------------------------------------- faults


async def test_dropped_connections_are_reported_and_opened_again_with_new_queue_names(
    broker: MemoryBroker, peer: Peer
) -> None:
    await peer.start(Queue("", exclusive=True, auto_delete=True), "q")
    before = peer.log.queues
    peer.publish("q")
    broker.drop_connections()
    assert peer.published == [Published.UNSENT]
    assert peer.log.events[2:] == ["consuming_lost", "publishing_lost"]
    assert all(isinstance(cause, BrokerUnreachable) for cause in peer.log.causes)
    assert broker.queues == ("q",)
    assert not peer.transport.can_publish
    peer.publish("q")
    assert peer.published == [Published.UNSENT, Published.UNSENT]
    await peer.log.until(lambda: sorted(peer.log.events[4:]) == ["consuming", "publishing"])
    assert peer.log.queues[1] == "q"
    assert peer.log.queues[0] != before[0]
    peer.publish(peer.log.queues[0], b"a")
    await turn()
    assert peer.bodies == [b"a"]


async def test_settlements_after_a_drop_are_ignored(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start("q")
    for body in (b"a", b"b"):
        peer.publish("q", body)
    await turn()
    peer.got[0].ack()  # not read by the broker yet
    broker.drop_connections()
    peer.got[1].ack()
    await peer.until(4)
    assert [(delivery.body, delivery.redelivered) for delivery in peer.got[2:]] == [(b"a", True), (b"b", True)]


async def test_a_request_in_hand_at_a_drop_is_given_up_once_by_a_queue_that_delivers_once(
    broker: MemoryBroker, peer: Peer, other: Peer
) -> None:
    topology = Topology()
    queue = topology.request_queue("s", "quorum")
    await other.transport.start(topology.exchanges(), [other.subscription(queue, 1)], other.log.listener)
    await peer.start(Queue("notices", durable=True, bindings=((topology.notices.name, "notices"),)))
    await peer.transport.stop_consuming()
    properties = encode(Properties(headers={"CC": ["notices"]}))
    peer.publish("s", b"b", properties, exchange=topology.requests.name)
    await other.until(1)
    broker.drop_connections()
    assert broker.depth("notices") == 1
    await other.log.until(lambda: other.log.events[-2:].count("consuming") == 1 and len(other.log.events) == 6)
    assert len(other.got) == 1


async def test_a_session_whose_queue_now_has_other_arguments_keeps_trying(
    broker: MemoryBroker, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PAUSE", (0.001, 0.002))
    await peer.start(Queue("q", auto_delete=True))
    broker.drop_connections()
    owner = Peer(broker)
    await owner.start(Queue("q", auto_delete=True, durable=True))
    await asyncio.sleep(0.02)
    assert "consuming" not in peer.log.events[3:]
    await owner.transport.close()
    await peer.log.until(lambda: "consuming" in peer.log.events[3:])


async def test_a_session_that_is_lost_after_stop_consuming_is_not_opened_again(
    broker: MemoryBroker, peer: Peer
) -> None:
    await peer.start("q")
    await peer.transport.stop_consuming()
    broker.drop_connections()
    await peer.log.until(lambda: peer.log.events[-1] == "publishing")
    await asyncio.sleep(memory.PAUSE[1] * 2)
    assert peer.log.events[2:] == ["consuming_lost", "publishing_lost", "publishing"]


async def test_a_second_drop_before_the_sessions_are_up_is_not_reported(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start("q")
    broker.drop_connections()
    broker.drop_connections()
    assert peer.log.events[2:] == ["consuming_lost", "publishing_lost"]
    await peer.log.until(lambda: len(peer.log.events) == 6)
    assert broker.consumers("q") == 1


async def test_a_message_that_is_handed_out_when_the_connection_drops_is_not_lost(
    broker: MemoryBroker, peer: Peer
) -> None:
    await peer.start("q")
    dropped = False

    def drop(_: Published) -> None:
        nonlocal dropped
        dropped = True
        broker.drop_connections()

    peer.transport.publish(Message(b"", b"q", b"", PLAIN, b"a", drop))
    await peer.until(1)
    assert dropped
    assert [(delivery.body, delivery.redelivered) for delivery in peer.got] == [(b"a", True)]


async def test_a_blocked_broker_takes_no_messages_but_takes_acks(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start("q", prefetch=1)
    for body in (b"a", b"b"):
        peer.publish("q", body)
    await turn()
    broker.block("memory alarm")
    assert peer.log.events[-1] == "blocked: memory alarm"
    assert not peer.transport.can_publish
    peer.publish("q", b"c")
    peer.got[0].ack()
    await turn(2)
    assert peer.bodies == [b"a", b"b"]
    assert len(peer.published) == 2
    broker.unblock()
    assert peer.log.events[-1] == "publishing"
    assert peer.transport.can_publish
    await turn()
    assert len(peer.published) == 3


async def test_a_transport_that_starts_at_a_blocked_broker_reports_it(broker: MemoryBroker, peer: Peer) -> None:
    broker.block("disk")
    await peer.start()
    assert peer.log.events == ["publishing", "blocked: disk", "consuming"]
    assert not peer.transport.can_publish


async def test_block_and_unblock_are_not_reported_to_sessions_that_are_down(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start()
    broker.drop_connections()
    before = list(peer.log.events)
    broker.block("disk")
    broker.unblock()
    assert peer.log.events == before


# ------------------------------------------------------------------------------------------------- back-pressure


async def test_writable_waits_while_the_inbox_is_full(peer: Peer) -> None:
    await peer.start("q")
    for sent in range(HIGH_WATER):
        assert peer.transport.can_publish, sent
        peer.publish("q")
    assert not peer.transport.can_publish
    async with asyncio.timeout(LIMIT):
        await peer.transport.writable()
    assert peer.transport.can_publish
    assert len(peer.published) == HIGH_WATER


async def test_writable_waits_for_the_session(broker: MemoryBroker, peer: Peer) -> None:
    waiting = asyncio.create_task(peer.transport.writable())
    await turn(2)
    assert not waiting.done()
    await peer.start()
    async with asyncio.timeout(LIMIT):
        await waiting
        broker.drop_connections()
        await peer.transport.writable()
    assert peer.log.events[-1] == "publishing" or peer.log.events[-2] == "publishing"


async def test_writable_waits_for_the_end_of_an_alarm(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start("q")
    broker.block("memory")
    peer.publish("q")
    waiting = asyncio.create_task(peer.transport.writable())
    await turn(5)
    assert not waiting.done()
    broker.unblock()
    async with asyncio.timeout(LIMIT):
        await waiting


async def test_writable_can_be_cancelled_once_it_is_closed(peer: Peer) -> None:
    await peer.start("q")
    await peer.transport.close()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await peer.transport.writable()


# ---------------------------------------------------------------------------------------------- who shares a broker


async def test_transports_of_one_name_share_a_broker_and_others_do_not() -> None:
    one, same, different = Peer("name"), Peer("name"), Peer("other")
    await one.start("q")
    await same.start()
    await different.start()
    same.publish("q", b"a")
    different.publish("q", b"b")
    await turn()
    assert one.bodies == [b"a"]
    assert different.published == [Published.RETURNED]
    for peer in (one, same, different):
        await peer.transport.close()


async def test_a_named_broker_ends_with_its_last_transport() -> None:
    first, second = Peer("name"), Peer("name")
    await first.start("q")
    await second.start()
    await first.transport.close()
    second.publish("q", encode(Properties(expiration=b"60000")))
    await second.transport.close()
    assert second.published == [Published.CONFIRMED]
    third = Peer("name")
    await third.start()
    third.publish("q")
    await turn()
    assert third.published == [Published.RETURNED]
    await third.transport.close()


async def test_a_broker_that_is_held_elsewhere_keeps_its_queues(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start("q")
    await peer.transport.stop_consuming()
    peer.publish("q", b"a", encode(Properties(expiration=b"20")))
    peer.publish("q", b"b", encode(Properties(expiration=b"60000")))
    await turn()
    await peer.transport.close()
    await asyncio.sleep(0.03)
    again = Peer(broker)
    await again.start("q")
    await again.until(1)
    assert again.bodies == [b"b"]  # a has expired although no transport was open
    await again.transport.close()


def test_a_closed_loop_leaves_nothing_behind() -> None:
    async def use(name: str) -> weakref.ref[MemoryTransport]:
        peer = Peer(name)
        await peer.start("q")
        return weakref.ref(peer.transport)

    gc.collect()
    earlier = len(brokers._shared)  # what other tests of this process have left
    for run in (asyncio.run, uvloop.run):
        left = run(use("abandoned"))
        gc.collect()
        assert left() is None
        assert len(brokers._shared) == earlier


def test_two_loops_do_not_share_a_name_or_a_broker() -> None:
    mine = MemoryBroker()

    async def meet(loop_of_other: asyncio.AbstractEventLoop) -> None:
        await asyncio.sleep(0)
        first = Peer("name")
        await first.start("q")

        async def elsewhere() -> list[Published]:
            second = Peer("name")
            await second.start()
            second.publish("q")
            await turn()
            await second.transport.close()
            with pytest.raises(UsageError, match="another event loop"):
                await Peer(mine).start()
            return second.published

        held = Peer(mine)
        await held.start()
        published = await asyncio.to_thread(lambda: loop_of_other.run_until_complete(elsewhere()))
        assert published == [Published.RETURNED]
        await first.transport.close()
        await held.transport.close()

    other = asyncio.new_event_loop()
    try:
        asyncio.run(meet(other))
    finally:
        other.close()


async def test_a_broker_without_transports_has_no_loop(broker: MemoryBroker) -> None:
    with pytest.raises(UsageError, match="no transport"):
        _ = broker.loop


def test_it_has_the_methods_of_a_transport() -> None:
    transport: Transport = MemoryTransport("name", ConnectionOptions())
    assert not transport.can_publish


def test_it_runs_on_uvloop() -> None:
    async def use() -> list[bytes | None]:
        peer = Peer("name")
        dead = {"x-dead-letter-exchange": "", "x-queue-type": "quorum"}
        await peer.start("dead")
        await Peer("name").start(Queue("q", durable=True, arguments=dead), prefetch=1)
        for body in (b"a", b"b"):
            peer.publish("q", body, encode(Properties(expiration=b"5", headers={"CC": ["dead"]})))
        await peer.until(3)
        return peer.bodies

    assert uvloop.run(use()) == [b"a", b"b", b"b"]
