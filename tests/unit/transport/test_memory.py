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
from rpcq.transport.memory import transport as memory
from rpcq.transport.memory.transport import HIGH_WATER, MemoryBroker, MemoryTransport
from rpcq.wire.properties import Properties, decode, encode
from rpcq.wire.topology import Exchange, Queue, Topology

LIMIT = 5.0
PLAIN = encode(Properties())
NOTHING = Exchange("nothing-is-bound")


class Log:
    """A listener that keeps what it is told, and can be awaited."""

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
    """A transport with its listener, and all that came and settled."""

    def __init__(self, broker: MemoryBroker | str, options: ConnectionOptions | None = None) -> None:
        self.transport: MemoryTransport = MemoryTransport(broker, options or ConnectionOptions())
        self.log = Log()
        self.got: list[Delivery] = []
        self.settled: list[Published] = []

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
        message = Message(exchange.encode(), key.encode(), b"", properties, body, self.settled.append, mandatory)
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
    """Let the loop run: what is pending is worked off in one iteration, and what that brings in the next."""
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
    assert (peer.settled, peer.got) == ([], [])
    await turn()
    assert peer.settled == [Published.CONFIRMED]
    (delivery,) = peer.got
    assert (delivery.body, delivery.body_size, delivery.redelivered) == (b"a", 1, False)
    assert decode(delivery.properties).type == b"t"


async def test_settlements_come_in_the_order_of_publishing(peer: Peer) -> None:
    full = Queue("full", durable=True, arguments={"x-max-length": 0, "x-overflow": "reject-publish"})
    await peer.start(full, "q")
    for key in ("nobody", "full", "q"):
        peer.publish(key)
    peer.publish("nobody", mandatory=False)
    await turn()
    assert peer.settled == [
        Published.RETURNED,
        Published.REFUSED,
        Published.CONFIRMED,
        Published.CONFIRMED,
    ]


async def test_messages_wait_in_a_queue_that_nobody_consumes(broker: MemoryBroker, peer: Peer, other: Peer) -> None:
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


async def test_what_a_callback_publishes_has_its_turn_in_the_next_iteration(peer: Peer) -> None:
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


async def test_a_callback_that_raises_costs_nobody_elses_messages(peer: Peer) -> None:
    await peer.start("q")
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context.get("exception")))

    def fail(_: Published) -> None:
        raise ZeroDivisionError

    peer.transport.publish(Message(b"", b"q", b"", PLAIN, b"a", fail))
    peer.publish("q", b"b")
    await turn(3)
    asyncio.get_running_loop().set_exception_handler(None)
    assert [type(error) for error in told] == [ZeroDivisionError]
    assert peer.settled == [Published.CONFIRMED]
    assert peer.bodies == [b"a", b"b"]


async def test_a_transport_that_is_not_open_sends_nothing(peer: Peer) -> None:
    peer.publish("q")
    assert peer.settled == [Published.UNSENT]
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


async def test_a_requeued_message_comes_again_flagged(peer: Peer) -> None:
    await peer.start("q")
    peer.publish("q", b"a")
    await turn()
    peer.got[0].reject(requeue=True)
    await turn()
    assert [(delivery.body, delivery.redelivered) for delivery in peer.got] == [(b"a", False), (b"a", True)]


async def test_a_quorum_queue_tells_how_often_a_message_came_back(peer: Peer) -> None:
    await peer.start(Queue("q", durable=True, arguments={"x-queue-type": "quorum", "x-delivery-limit": 1}))
    peer.publish("q")
    await turn()
    peer.got[0].reject(requeue=True)
    await turn()
    assert decode(peer.got[1].properties).headers == {"x-delivery-count": 1}
    assert peer.got[1].redelivered


async def test_acknowledging_what_needs_no_ack_ends_the_session_as_on_a_broker(peer: Peer) -> None:
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


async def test_an_earlier_expiry_is_not_kept_waiting_by_a_later_one(broker: MemoryBroker, peer: Peer) -> None:
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
async def test_what_closes_a_channel_ends_the_publishing_session_alone(
    peer: Peer, exchange: str, properties: bytes, kind: type[BrokerError]
) -> None:
    await peer.start("q")
    peer.publish("q", b"a")
    peer.publish("q", b"b", properties, exchange=exchange)
    peer.publish("q", b"c")
    await turn()
    assert peer.settled == [Published.CONFIRMED, Published.UNKNOWN, Published.UNSENT]
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
    await peer.start("q")  # it may be tried again
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
    assert peer.settled == [Published.CONFIRMED, Published.CONFIRMED]
    assert broker.depth("q") == 1  # b, and a is not back
    await turn(2)
    assert peer.bodies == [b"a"]


async def test_a_delivery_acknowledged_when_its_reply_is_confirmed_at_closing_is_acknowledged(
    broker: MemoryBroker, peer: Peer
) -> None:
    await peer.start("q", Queue("replies", durable=True))
    peer.publish("q")
    await turn()
    (delivery,) = peer.got
    peer.transport.publish(Message(b"", b"replies", b"", PLAIN, b"", lambda _: delivery.ack()))
    await peer.transport.close()
    assert (broker.depth("q"), broker.depth("replies")) == (0, 1)


async def test_what_is_published_while_it_closes_is_unsent(peer: Peer) -> None:
    await peer.start("q")
    peer.transport.publish(Message(b"", b"q", b"", PLAIN, b"", lambda _: peer.publish("q")))
    await peer.transport.close()
    assert peer.settled == [Published.UNSENT]


async def test_closing_while_blocked_settles_as_unsent(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start("q")
    broker.block("memory")
    peer.publish("q")
    await turn()
    await peer.transport.close()
    assert peer.settled == [Published.UNSENT]


async def test_closing_twice_is_closing_once_and_later_messages_are_unsent(peer: Peer) -> None:
    await peer.start("q")
    await peer.transport.close()
    await peer.transport.close()
    peer.publish("q")
    assert peer.settled == [Published.UNSENT]
    assert peer.log.events == ["publishing", "consuming"]


async def test_what_a_closed_transport_held_goes_to_the_others(peer: Peer, other: Peer) -> None:
    await peer.start("q")
    peer.publish("q", b"a")
    await turn()
    await other.start("q")
    (held,) = peer.got
    await peer.transport.close()
    held.ack()  # of a session that is gone: dropped
    await turn()
    assert [(delivery.body, delivery.redelivered) for delivery in other.got] == [(b"a", True)]


async def test_closing_while_a_session_is_on_its_way_back_leaves_it_closed(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start("q")
    broker.drop_connections()
    await peer.transport.close()
    await asyncio.sleep(memory.PAUSE[1] * 2)
    assert peer.log.events[-1] == "publishing_lost"
    assert broker.consumers("q") == 0


async def test_a_channel_error_at_closing_does_not_bring_the_session_back(peer: Peer) -> None:
    await peer.start()
    peer.publish("q", exchange="nope")
    await peer.transport.close()
    await asyncio.sleep(memory.PAUSE[1] * 2)
    assert peer.settled == [Published.UNKNOWN]
    assert peer.log.events == ["publishing", "consuming", "publishing_lost"]


async def test_after_stop_consuming_nothing_comes_and_the_rest_can_be_settled(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start("q")
    peer.publish("q", b"a")
    await turn()
    await peer.transport.stop_consuming()
    peer.publish("q", b"b")
    peer.got[0].reject(requeue=True)
    await turn(2)
    assert peer.bodies == [b"a"]
    assert (broker.depth("q"), broker.consumers("q")) == (2, 0)


async def test_what_was_on_its_way_arrives_before_stop_consuming_returns(broker: MemoryBroker, peer: Peer) -> None:
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


async def test_dropped_connections_settle_tell_and_come_back_with_new_names(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start(Queue("", exclusive=True, auto_delete=True), "q")
    before = peer.log.queues
    peer.publish("q")
    broker.drop_connections()
    assert peer.settled == [Published.UNSENT]
    assert peer.log.events[2:] == ["consuming_lost", "publishing_lost"]
    assert all(isinstance(cause, BrokerUnreachable) for cause in peer.log.causes)
    assert broker.queues == ("q",)
    assert not peer.transport.can_publish
    peer.publish("q")
    assert peer.settled == [Published.UNSENT, Published.UNSENT]
    await peer.log.until(lambda: sorted(peer.log.events[4:]) == ["consuming", "publishing"])
    assert peer.log.queues[1] == "q"
    assert peer.log.queues[0] != before[0]
    peer.publish(peer.log.queues[0], b"a")
    await turn()
    assert peer.bodies == [b"a"]


async def test_what_is_settled_after_a_drop_is_dropped(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start("q")
    for body in (b"a", b"b"):
        peer.publish("q", body)
    await turn()
    peer.got[0].ack()  # not read by the broker yet
    broker.drop_connections()
    peer.got[1].ack()
    await peer.until(4)
    assert [(delivery.body, delivery.redelivered) for delivery in peer.got[2:]] == [(b"a", True), (b"b", True)]


async def test_a_request_held_at_a_drop_is_given_up_once_by_a_queue_that_delivers_once(
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


async def test_a_session_whose_queue_is_declared_differently_meanwhile_keeps_trying(
    broker: MemoryBroker, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PAUSE", (0.001, 0.002))
    await peer.start(Queue("q", auto_delete=True))
    broker.drop_connections()
    usurper = Peer(broker)
    await usurper.start(Queue("q", auto_delete=True, durable=True))
    await asyncio.sleep(0.02)
    assert "consuming" not in peer.log.events[3:]
    await usurper.transport.close()
    await peer.log.until(lambda: "consuming" in peer.log.events[3:])


async def test_a_session_lost_after_stop_consuming_stays_away(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start("q")
    await peer.transport.stop_consuming()
    broker.drop_connections()
    await peer.log.until(lambda: peer.log.events[-1] == "publishing")
    await asyncio.sleep(memory.PAUSE[1] * 2)
    assert peer.log.events[2:] == ["consuming_lost", "publishing_lost", "publishing"]


async def test_dropping_again_before_they_are_back_tells_nobody_twice(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start("q")
    broker.drop_connections()
    broker.drop_connections()
    assert peer.log.events[2:] == ["consuming_lost", "publishing_lost"]
    await peer.log.until(lambda: len(peer.log.events) == 6)
    assert broker.consumers("q") == 1


async def test_what_is_handed_out_when_the_connection_drops_is_not_lost(broker: MemoryBroker, peer: Peer) -> None:
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


async def test_a_blocked_broker_takes_nothing_and_acks_go_on(broker: MemoryBroker, peer: Peer) -> None:
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
    assert len(peer.settled) == 2
    broker.unblock()
    assert peer.log.events[-1] == "publishing"
    assert peer.transport.can_publish
    await turn()
    assert len(peer.settled) == 3


async def test_who_starts_at_a_blocked_broker_is_told(broker: MemoryBroker, peer: Peer) -> None:
    broker.block("disk")
    await peer.start()
    assert peer.log.events == ["publishing", "blocked: disk", "consuming"]
    assert not peer.transport.can_publish


async def test_block_and_unblock_pass_over_sessions_that_are_down(broker: MemoryBroker, peer: Peer) -> None:
    await peer.start()
    broker.drop_connections()
    told = list(peer.log.events)
    broker.block("disk")
    broker.unblock()
    assert peer.log.events == told


# ------------------------------------------------------------------------------------------------- back-pressure


async def test_a_full_inbox_takes_nothing_for_now_and_writable_waits_for_its_turn(peer: Peer) -> None:
    await peer.start("q")
    for sent in range(HIGH_WATER):
        assert peer.transport.can_publish, sent
        peer.publish("q")
    assert not peer.transport.can_publish
    async with asyncio.timeout(LIMIT):
        await peer.transport.writable()
    assert peer.transport.can_publish
    assert len(peer.settled) == HIGH_WATER


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
    assert different.settled == [Published.RETURNED]
    for peer in (one, same, different):
        await peer.transport.close()


async def test_a_named_broker_goes_with_its_last_transport() -> None:
    first, second = Peer("name"), Peer("name")
    await first.start("q")
    await second.start()
    await first.transport.close()
    second.publish("q", encode(Properties(expiration=b"60000")))
    await second.transport.close()
    assert second.settled == [Published.CONFIRMED]
    third = Peer("name")
    await third.start()
    third.publish("q")
    await turn()
    assert third.settled == [Published.RETURNED]
    await third.transport.close()


async def test_a_broker_that_somebody_holds_keeps_its_queues(broker: MemoryBroker, peer: Peer) -> None:
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
    assert again.bodies == [b"b"]  # nobody was there when a expired, and yet it has
    await again.transport.close()


def test_a_loop_that_is_gone_leaves_nothing_behind() -> None:
    async def use(name: str) -> weakref.ref[MemoryTransport]:
        peer = Peer(name)
        await peer.start("q")
        return weakref.ref(peer.transport)

    for run in (asyncio.run, uvloop.run):
        left = run(use("abandoned"))
        gc.collect()
        assert left() is None
        assert len(memory._shared) == 0


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
            return second.settled

        held = Peer(mine)
        await held.start()
        settled = await asyncio.to_thread(lambda: loop_of_other.run_until_complete(elsewhere()))
        assert settled == [Published.RETURNED]
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


def test_the_transport_is_one() -> None:
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
