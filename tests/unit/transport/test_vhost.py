"""The rules of the in-process broker: what becomes of messages in its exchanges and queues."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from rpcq.errors import AccessRefused, NotFound, PreconditionFailed, ResourceLocked, TopologyMismatch
from rpcq.transport.base import Published
from rpcq.transport.memory.queues import Connection, Consumer, Entry
from rpcq.transport.memory.vhost import Vhost
from rpcq.wire.properties import MalformedProperties, Properties, decode, encode
from rpcq.wire.topology import Exchange, Queue, Topology

WALL = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
GARBAGE = b"\x20\x00\x00"


class World:
    """A vhost with short methods for the tests; `now` is the time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.vhost = Vhost(lambda: WALL)
        self.vhost.declare_exchange(Exchange("x"))
        self.mine = Connection()

    def queue(self, name: str, *, key: str | None = None, durable: bool = True, **arguments: Any) -> str:
        named = {f"x-{argument.replace('_', '-')}": value for argument, value in arguments.items()}
        bindings = (("x", key),) if key else ()
        declared = Queue(name, durable=durable, arguments=named, bindings=bindings)
        return self.vhost.declare_queue(declared, self.mine)

    def publish(
        self,
        key: str,
        body: bytes = b"",
        *,
        exchange: str = "",
        ttl: str | None = None,
        headers: dict[str, Any] | None = None,
        mandatory: bool = True,
    ) -> Published:
        properties = encode(Properties(headers=headers, expiration=ttl.encode() if ttl is not None else None))
        return self.vhost.publish(exchange.encode(), key.encode(), properties, body, mandatory, self.now)

    def consume(
        self, queue: str, connection: Connection | None = None, *, prefetch: int = 0, no_ack: bool = False
    ) -> Consumer:
        return self.vhost.consume(
            queue, connection or self.mine, lambda _: None, prefetch=prefetch, no_ack=no_ack, now=self.now
        )

    def settle(self, tag: int, *, accept: bool = False, requeue: bool = False, of: Connection | None = None) -> None:
        self.vhost.settle(of or self.mine, tag, accept, requeue, self.now)

    def disconnect(self, *connections: Connection) -> None:
        self.vhost.disconnect(connections, self.now)

    def take(self) -> list[tuple[Consumer, int, Entry]]:
        taken = list(self.vhost.outbox)
        self.vhost.outbox.clear()
        return taken

    def bodies(self) -> list[bytes]:
        return [entry.body for _, _, entry in self.take()]

    def ready(self, queue: str) -> list[bytes]:
        return [entry.body for entry in self.vhost.queues[queue].ready]

    def letter(self, queue: str = "dead") -> Properties:
        """The properties of the only message of a queue."""
        (entry,) = self.vhost.queues[queue].ready
        return decode(entry.properties)


@pytest.fixture
def world() -> World:
    return World()


# ----------------------------------------------------------------------------------------------------- routing


def test_the_default_exchange_routes_to_the_queue_of_that_name(world: World) -> None:
    world.queue("q")
    assert world.publish("q", b"a") is Published.CONFIRMED
    assert world.ready("q") == [b"a"]


def test_a_direct_exchange_routes_to_every_queue_bound_under_the_key(world: World) -> None:
    world.queue("q", key="k")
    world.queue("r", key="k")
    world.queue("s", key="other")
    world.publish("k", b"a", exchange="x")
    assert [world.ready(name) for name in "qrs"] == [[b"a"], [b"a"], []]


TOPICS = [
    ("order.created", "order.created"),
    ("order.*", "order.created order.paid"),
    ("*.created", "order.created user.created"),
    ("order.#", "order.created order.paid order.eu.paid order"),
    ("#.paid", "order.paid order.eu.paid paid"),
    ("#", "order.created order.paid order.eu.paid order paid user.created "),
    ("*", "order paid"),
    ("order.*.paid", "order.eu.paid"),
    ("order.#.paid", "order.paid order.eu.paid"),
    ("#.eu.#", "order.eu.paid"),
]


@pytest.mark.parametrize(("pattern", "keys"), TOPICS, ids=[pattern for pattern, _ in TOPICS])
def test_a_topic_exchange_matches_words(world: World, pattern: str, keys: str) -> None:
    world.vhost.declare_exchange(Exchange("t", "topic"))
    world.vhost.declare_queue(Queue("q", bindings=(("t", pattern), ("t", "order.created.twice"))), world.mine)
    every = ["order.created", "order.paid", "order.eu.paid", "order", "paid", "user.created", ""]
    for key in every:
        world.publish(key, key.encode(), exchange="t", mandatory=False)
    assert world.ready("q") == [key.encode() for key in every if key in keys.split(" ")]


def test_a_queue_with_several_bindings_to_a_topic_exchange_gets_one_copy_and_unbinds_all(world: World) -> None:
    world.vhost.declare_exchange(Exchange("t", "topic"))
    world.vhost.declare_queue(Queue("q", exclusive=True, bindings=(("t", "#"), ("t", "a.*"), ("t", "a.b"))), world.mine)
    world.publish("a.b", b"1", exchange="t", headers={"CC": ["a.c", "z"]})
    assert world.ready("q") == [b"1"]
    world.disconnect(world.mine)
    assert world.publish("a.b", b"2", exchange="t") is Published.RETURNED


def test_an_internal_exchange_takes_dead_letters_and_refuses_publishers(world: World) -> None:
    world.vhost.declare_exchange(Exchange("i", "topic", internal=True))
    world.vhost.declare_queue(Queue("dead", durable=True, bindings=(("i", "back"),)), world.mine)
    world.queue("q", dead_letter_exchange="i")
    with pytest.raises(AccessRefused, match="cannot publish to internal exchange 'i'"):
        world.publish("back", exchange="i")
    world.publish("q", b"a", headers={"CC": ["nobody", "back"]})
    world.vhost.queues["dead"].ready.clear()
    world.consume("q")
    ((_, tag, _),) = world.take()
    world.settle(tag)
    assert world.ready("dead") == [b"a"]


def test_an_exchange_keeps_its_type(world: World) -> None:
    world.vhost.declare_exchange(Exchange("t", "topic"))
    world.vhost.declare_exchange(Exchange("t", "topic"))
    for other in (Exchange("t"), Exchange("t", "topic", internal=True)):
        with pytest.raises(TopologyMismatch, match="the exchange 't' exists as"):
            world.vhost.declare_exchange(other)


def test_binding_twice_routes_once(world: World) -> None:
    world.queue("q", key="k")
    world.queue("q", key="k")
    world.publish("k", b"a", exchange="x")
    assert world.ready("q") == [b"a"]


@pytest.mark.parametrize(("mandatory", "published"), [(True, Published.RETURNED), (False, Published.CONFIRMED)])
def test_an_unroutable_message_is_returned_only_if_mandatory(
    world: World, mandatory: bool, published: Published
) -> None:
    assert world.publish("nobody", exchange="x", mandatory=mandatory) is published


def test_cc_adds_routing_keys_and_each_queue_gets_one_copy(world: World) -> None:
    world.queue("q", key="k")
    world.queue("r", key="l")
    world.publish("k", b"a", exchange="x", headers={"CC": ["k", "l", b"l", 7, "nobody"]})
    assert (world.ready("q"), world.ready("r")) == ([b"a"], [b"a"])


def test_cc_alone_makes_a_message_routable(world: World) -> None:
    world.queue("q")
    assert world.publish("nobody", headers={"CC": ["q"]}) is Published.CONFIRMED


def test_bytes_that_only_look_like_cc_change_nothing(world: World) -> None:
    world.queue("q")
    world.queue("r")
    assert world.publish("q", headers={"x-user": "\x02CC", "y": "r"}) is Published.CONFIRMED
    assert world.ready("r") == []


def test_a_cc_that_is_not_an_array_closes_the_channel(world: World) -> None:
    with pytest.raises(PreconditionFailed, match=r"PRECONDITION_FAILED.*CC"):
        world.publish("q", headers={"CC": "q"})


def test_publishing_to_an_absent_exchange_closes_the_channel(world: World) -> None:
    with pytest.raises(NotFound, match="NOT_FOUND - no exchange 'nope'"):
        world.publish("q", exchange="nope")


@pytest.mark.parametrize("properties", [b"", b"\x00", b"\x01\x00"])
def test_properties_that_end_early_are_refused(world: World, properties: bytes) -> None:
    with pytest.raises(MalformedProperties):
        world.vhost.publish(b"", b"q", properties, b"", True, 0.0)


def test_a_full_queue_may_drop_what_has_waited_longest(world: World) -> None:
    world.queue("q", max_length=2, overflow="drop-head")
    assert [world.publish("q", body) for body in (b"a", b"b", b"c")] == [Published.CONFIRMED] * 3
    assert world.ready("q") == [b"b", b"c"]


# -------------------------------------------------------------------------------------------------- declarations


@pytest.mark.parametrize(
    "other",
    [
        Queue("q", durable=False, arguments={"x-max-length": 1, "x-overflow": "reject-publish"}),
        Queue("q", durable=True, auto_delete=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"}),
        Queue("q", durable=True, exclusive=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"}),
        Queue("q", durable=True, arguments={"x-max-length": 2, "x-overflow": "reject-publish"}),
        Queue("q", durable=True),
    ],
)
def test_redeclaring_differently_is_refused(world: World, other: Queue) -> None:
    world.queue("q", max_length=1, overflow="reject-publish")
    with pytest.raises(TopologyMismatch, match="'q' exists with other arguments"):
        world.vhost.declare_queue(other, world.mine)


def test_a_mismatch_names_the_queue_and_what_differs(world: World) -> None:
    world.queue("some.queue", max_length=1, overflow="reject-publish")
    with pytest.raises(TopologyMismatch, match=r"'some\.queue'.*: x-max-length is 1, not 2$"):
        world.queue("some.queue", max_length=2, overflow="reject-publish")


def test_redeclaring_equally_finds_the_queue(world: World) -> None:
    world.queue("q")
    world.publish("q", b"a")
    world.queue("q", queue_type="classic")  # the default type
    assert world.ready("q") == [b"a"]


def test_redeclaring_an_exchange_keeps_its_bindings(world: World) -> None:
    world.queue("q", key="k")
    world.vhost.declare_exchange(Exchange("x"))
    assert world.publish("k", exchange="x") is Published.CONFIRMED


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"x-expires": 5}, "x-expires"),
        ({"x-message-ttl": -1}, "x-message-ttl"),
        ({"x-dead-letter-strategy": "at-least-once"}, "x-dead-letter-strategy"),
        ({"x-dead-letter-routing-key": "k"}, "x-dead-letter-routing-key: it needs x-dead-letter-exchange"),
        ({"x-queue-type": "stream"}, "x-queue-type"),
        ({"x-dead-letter-exchange": 5}, "x-dead-letter-exchange"),
        ({"x-max-length": -1, "x-overflow": "reject-publish"}, "x-max-length"),
        ({"x-max-length": True, "x-overflow": "reject-publish"}, "x-max-length"),
        ({"x-max-length": 5}, "x-overflow"),
        ({"x-overflow": "drop-head", "x-dead-letter-exchange": "d"}, "x-overflow"),
        ({"x-overflow": "reject-publish-dlx"}, "x-overflow"),
        ({"x-delivery-limit": 5}, "x-delivery-limit"),
        ({"x-single-active-consumer": 1}, "x-single-active-consumer"),
        ({"x-delivery-limit": "5", "x-queue-type": "quorum"}, "x-delivery-limit"),
    ],
)
def test_arguments_that_are_not_supported_are_refused_by_name(
    world: World, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(PreconditionFailed, match=f"'q' cannot be declared with {named}$"):
        world.vhost.declare_queue(Queue("q", durable=True, arguments=arguments), world.mine)
    assert "q" not in world.vhost.queues


@pytest.mark.parametrize(
    "queue",
    [
        Queue("q", arguments={"x-queue-type": "quorum"}),
        Queue("q", durable=True, exclusive=True, arguments={"x-queue-type": "quorum"}),
        Queue("q", durable=True, auto_delete=True, arguments={"x-queue-type": "quorum"}),
    ],
)
def test_a_quorum_queue_is_durable_and_shared(world: World, queue: Queue) -> None:
    with pytest.raises(PreconditionFailed, match="quorum queue must be durable"):
        world.vhost.declare_queue(queue, world.mine)


def test_the_request_queues_of_the_wire_contract_can_be_declared(world: World) -> None:
    topology = Topology()
    world.vhost.declare_exchange(topology.requests)
    assert world.vhost.declare_queue(topology.request_queue("s", "classic"), world.mine) == "rpcq.req.s"
    assert world.vhost.declare_queue(topology.request_queue("s", "quorum"), world.mine) == "rpcq.once.s"


def test_names_that_are_reserved_for_rabbitmq_are_refused(world: World) -> None:
    with pytest.raises(AccessRefused, match="reserved prefix"):
        world.queue("amq.gen-mine")
    with pytest.raises(AccessRefused, match="reserved prefix"):
        world.vhost.declare_exchange(Exchange("amq.mine"))


def test_binding_to_the_default_exchange_is_refused(world: World) -> None:
    with pytest.raises(AccessRefused, match="default exchange"):
        world.vhost.declare_queue(Queue("q", bindings=(("", "k"),)), world.mine)


def test_binding_to_an_absent_exchange_is_refused(world: World) -> None:
    with pytest.raises(NotFound, match="'nope' to bind the queue 'q'"):
        world.vhost.declare_queue(Queue("q", bindings=(("nope", "k"),)), world.mine)


def test_the_broker_names_queues_that_have_no_name(world: World) -> None:
    first, second = (world.vhost.declare_queue(Queue("", exclusive=True), world.mine) for _ in range(2))
    assert first.startswith("amq.gen-")
    assert first != second


def test_an_exclusive_queue_can_be_used_by_its_own_connection_only(world: World) -> None:
    queue = Queue("q", exclusive=True)
    world.vhost.declare_queue(queue, world.mine)
    world.consume("q")
    other = Connection()
    with pytest.raises(ResourceLocked, match="RESOURCE_LOCKED"):
        world.vhost.declare_queue(queue, other)
    with pytest.raises(ResourceLocked, match="RESOURCE_LOCKED"):
        world.consume("q", other)
    assert world.publish("q", b"a") is Published.CONFIRMED


def test_an_exclusive_queue_is_deleted_with_its_connection_and_other_bindings_stay(world: World) -> None:
    world.queue("q", key="k")
    world.vhost.declare_queue(Queue("own", exclusive=True, bindings=(("x", "k"), ("x", "l"))), world.mine)
    world.disconnect(world.mine)
    assert list(world.vhost.queues) == ["q"]
    assert world.publish("k", exchange="x") is Published.CONFIRMED
    assert world.publish("l", exchange="x") is Published.RETURNED
    assert world.publish("own") is Published.RETURNED


def test_an_auto_delete_queue_is_deleted_with_its_last_consumer(world: World) -> None:
    world.vhost.declare_queue(Queue("q", auto_delete=True), world.mine)
    first, second = world.consume("q"), world.consume("q")
    world.vhost.cancel(first, world.now)
    assert "q" in world.vhost.queues
    world.vhost.cancel(second, world.now)
    assert "q" not in world.vhost.queues


def test_an_auto_delete_queue_waits_for_its_first_consumer(world: World) -> None:
    world.vhost.declare_queue(Queue("q", auto_delete=True), world.mine)
    world.disconnect(world.mine)
    assert "q" in world.vhost.queues


def test_consuming_an_absent_queue_is_refused(world: World) -> None:
    with pytest.raises(NotFound, match="NOT_FOUND - no queue 'nope'"):
        world.consume("nope")


# ------------------------------------------------------------------------------------------- consumers, settlement


def test_messages_come_in_the_order_in_which_they_were_published(world: World) -> None:
    world.queue("q")
    world.publish("q", b"a")
    world.publish("q", b"b")
    world.consume("q")
    world.publish("q", b"c")
    assert world.bodies() == [b"a", b"b", b"c"]


def test_a_consumer_holds_no_more_than_its_prefetch(world: World) -> None:
    world.queue("q")
    world.consume("q", prefetch=2)
    for body in (b"a", b"b", b"c", b"d"):
        world.publish("q", body)
    assert world.bodies() == [b"a", b"b"]
    world.settle(1, accept=True)
    assert world.bodies() == [b"c"]
    assert world.ready("q") == [b"d"]


def test_prefetch_does_not_count_without_acks(world: World) -> None:
    world.queue("q")
    world.consume("q", prefetch=1, no_ack=True)
    for body in (b"a", b"b"):
        world.publish("q", body)
    assert world.bodies() == [b"a", b"b"]
    assert world.mine.unacked == {}


@pytest.mark.parametrize("no_ack", [True, False])
def test_consumers_take_turns(world: World, no_ack: bool) -> None:
    world.queue("q")
    first, second = world.consume("q", no_ack=no_ack), world.consume("q", no_ack=no_ack)
    for _ in range(4):
        world.publish("q")
    assert [consumer for consumer, _, _ in world.take()] == [first, second, first, second]


def test_a_consumer_at_its_prefetch_is_skipped_and_is_last_afterwards(world: World) -> None:
    world.queue("q")
    small, large = world.consume("q", prefetch=1), world.consume("q", prefetch=9)
    for _ in range(3):
        world.publish("q")
    assert [consumer for consumer, _, _ in world.take()] == [small, large, large]
    world.settle(1, accept=True)
    for _ in range(2):
        world.publish("q")
    assert [consumer for consumer, _, _ in world.take()] == [large, small]


def test_settling_an_unknown_tag_closes_the_channel(world: World) -> None:
    with pytest.raises(PreconditionFailed, match="unknown delivery tag 7"):
        world.settle(7, accept=True)


def test_settling_a_delivery_that_needs_no_ack_closes_the_channel(world: World) -> None:
    world.queue("q")
    world.consume("q", no_ack=True)
    world.publish("q")
    with pytest.raises(PreconditionFailed, match="unknown delivery tag 1"):
        world.settle(1, accept=True)


def test_a_cancelled_consumer_gets_nothing_more_and_can_settle_its_deliveries(world: World) -> None:
    world.queue("q")
    consumer = world.consume("q", prefetch=1)
    world.publish("q", b"a")
    world.publish("q", b"b")
    world.vhost.cancel(consumer, world.now)
    world.take()
    world.settle(1, accept=True)
    assert world.bodies() == []
    assert world.ready("q") == [b"b"]


@pytest.mark.parametrize("requeue", [True, False])
def test_deliveries_of_a_deleted_queue_can_still_be_settled(world: World, requeue: bool) -> None:
    world.queue("dead")
    declared = Queue("q", auto_delete=True, arguments={"x-dead-letter-exchange": ""})
    world.vhost.declare_queue(declared, world.mine)
    consumer = world.consume("q", prefetch=1)
    world.publish("q", headers={"CC": ["nobody"]})
    world.vhost.cancel(consumer, world.now)
    world.settle(1, requeue=requeue)
    assert world.mine.unacked == {}
    assert list(world.vhost.queues) == ["dead"]


def test_a_single_active_consumer_that_is_lost_with_the_next_one_is_followed_by_the_one_after(world: World) -> None:
    world.queue("q", single_active_consumer=True)
    first, second, third = Connection(), Connection(), Connection()
    for connection in (first, second, third):
        world.consume("q", connection, prefetch=1)
    world.publish("q", b"a")
    assert [consumer.connection for consumer, _, _ in world.take()] == [first]
    world.disconnect(second, first)
    assert [(consumer.connection, entry.body) for consumer, _, entry in world.take()] == [(third, b"a")]


def test_a_consumer_that_was_not_the_active_one_leaves_without_effect(world: World) -> None:
    world.queue("q", single_active_consumer=True)
    active = world.consume("q")
    waiting = world.consume("q")
    world.vhost.cancel(waiting, world.now)
    world.publish("q", b"a")
    assert [consumer for consumer, _, _ in world.take()] == [active]
    world.vhost.cancel(active, world.now)
    world.publish("q", b"b")
    assert world.ready("q") == [b"b"]


def test_a_requeued_message_returns_to_its_place_and_is_flagged(world: World) -> None:
    world.queue("q")
    holder = world.consume("q", prefetch=3)
    for body in (b"a", b"b", b"c", b"d"):
        world.publish("q", body)
    world.vhost.cancel(holder, world.now)
    world.take()
    world.settle(3, requeue=True)
    world.settle(1, requeue=True)
    world.settle(2, requeue=True)
    assert world.ready("q") == [b"a", b"b", b"c", b"d"]
    assert [entry.deliveries for entry in world.vhost.queues["q"].ready] == [1, 1, 1, 0]


def test_messages_of_lost_connections_return_to_their_places_in_a_classic_queue(world: World) -> None:
    world.queue("q")
    first, second = Connection(), Connection()
    world.consume("q", first, prefetch=2)
    world.consume("q", second, prefetch=2)
    for body in (b"a", b"b", b"c", b"d", b"e"):
        world.publish("q", body)
    world.take()
    world.disconnect(first, second)
    assert world.ready("q") == [b"a", b"b", b"c", b"d", b"e"]


def test_messages_of_a_lost_connection_go_to_the_other_consumers(world: World) -> None:
    world.queue("q")
    lost = Connection()
    world.consume("q", lost)
    world.publish("q", b"a")
    world.consume("q")
    world.take()
    world.disconnect(lost)
    ((consumer, _, entry),) = world.take()
    assert (consumer.connection, entry.body, entry.deliveries) == (world.mine, b"a", 1)


def test_connections_that_end_together_do_not_get_each_others_messages(world: World) -> None:
    world.queue("q")
    first, second = Connection(), Connection()
    world.consume("q", first)
    world.consume("q", second)
    world.publish("q", b"a")
    world.take()
    world.disconnect(first, second)
    assert world.bodies() == []
    assert [entry.deliveries for entry in world.vhost.queues["q"].ready] == [1]


def test_ending_a_connection_twice_changes_nothing(world: World) -> None:
    world.vhost.declare_queue(Queue("q", exclusive=True), world.mine)
    world.disconnect(world.mine)
    world.vhost.declare_queue(Queue("q", exclusive=True), Connection())
    world.disconnect(world.mine)
    assert list(world.vhost.queues) == ["q"]


def test_messages_of_an_exclusive_queue_are_gone_with_its_connection(world: World) -> None:
    world.vhost.declare_queue(Queue("q", exclusive=True), world.mine)
    world.consume("q")
    world.publish("q")
    world.disconnect(world.mine)
    assert world.mine.unacked == {}
    assert world.vhost.queues == {}


# ------------------------------------------------------------------------------------------------------ limits


def test_a_full_queue_refuses_and_messages_that_consumers_hold_do_not_count(world: World) -> None:
    world.queue("q", max_length=1, overflow="reject-publish")
    world.consume("q", prefetch=1)
    assert [world.publish("q") for _ in range(3)] == [
        Published.CONFIRMED,
        Published.CONFIRMED,
        Published.REFUSED,
    ]


def test_a_message_is_refused_when_one_of_its_queues_is_full_and_the_others_take_it(world: World) -> None:
    world.queue("full", key="k", max_length=0, overflow="reject-publish")
    world.queue("q", key="k")
    assert world.publish("k", b"a", exchange="x") is Published.REFUSED
    assert world.ready("q") == [b"a"]


def test_an_expired_message_makes_room_only_at_the_head(world: World) -> None:
    world.queue("q", max_length=2, overflow="reject-publish")
    world.publish("q", ttl="2000")
    world.publish("q", ttl="1000")
    world.now += 1.5
    world.vhost.expire(world.now)
    assert world.publish("q") is Published.REFUSED
    world.now += 1.5
    assert world.publish("q") is Published.CONFIRMED
    assert len(world.ready("q")) == 1


# ------------------------------------------------------------------------------------------------------- expiry


def test_a_message_expires_at_the_head_when_its_time_has_come(world: World) -> None:
    world.queue("q")
    world.publish("q", ttl="1500")
    assert world.vhost.next_expiry == 101.5
    world.vhost.expire(101.4)
    assert len(world.ready("q")) == 1
    world.vhost.expire(101.5)
    assert world.ready("q") == []
    assert world.vhost.next_expiry is None


def test_a_message_behind_a_longer_lived_one_expires_with_it(world: World) -> None:
    world.queue("q")
    world.publish("q", b"a", ttl="2000")
    world.publish("q", b"b", ttl="1000")
    world.publish("q", b"c")
    assert world.vhost.next_expiry == 102.0
    world.vhost.expire(101.5)
    assert world.ready("q") == [b"a", b"b", b"c"]
    world.vhost.expire(102.0)
    assert world.ready("q") == [b"c"]


def test_an_expired_message_that_becomes_the_head_expires_at_once(world: World) -> None:
    world.queue("q")
    for body, ttl in ((b"a", None), (b"b", "1000"), (b"c", None), (b"d", None)):
        world.publish("q", body, ttl=ttl)
    world.now += 2
    world.consume("q", prefetch=1)
    assert world.bodies() == [b"a"]
    assert world.ready("q") == [b"c", b"d"]


def test_the_next_expiry_is_the_earliest_of_all_heads(world: World) -> None:
    world.queue("q")
    world.queue("r")
    world.publish("q", ttl="3000")
    world.publish("r", ttl="2000")
    assert world.vhost.next_expiry == 102.0


def test_a_head_that_came_back_expires_at_its_own_time(world: World) -> None:
    world.queue("q")
    holder = world.consume("q", prefetch=1)
    world.publish("q", b"a", ttl="1000")
    world.publish("q", b"b", ttl="5000")
    assert world.vhost.next_expiry == 105.0
    world.vhost.cancel(holder, world.now)
    world.settle(1, requeue=True)
    assert world.vhost.next_expiry == 101.0
    world.vhost.expire(101.0)
    assert world.ready("q") == [b"b"]
    assert world.vhost.next_expiry == 105.0
    world.vhost.expire(105.0)
    assert world.ready("q") == []


def test_expiry_in_a_deleted_queue_does_nothing(world: World) -> None:
    world.vhost.declare_queue(Queue("q", exclusive=True), world.mine)
    world.publish("q", ttl="1000")
    world.disconnect(world.mine)
    world.vhost.expire(102.0)
    assert world.vhost.next_expiry is None


def test_a_message_with_a_ttl_of_0_is_delivered_only_if_a_consumer_is_free(world: World) -> None:
    world.queue("q")
    assert world.publish("q", b"a", ttl="0") is Published.CONFIRMED
    assert world.ready("q") == []
    world.consume("q", prefetch=1)
    world.publish("q", b"b", ttl="0")
    world.publish("q", b"c", ttl="0")
    assert world.bodies() == [b"b"]
    assert world.ready("q") == []


def test_a_requeued_message_whose_time_has_passed_expires(world: World) -> None:
    world.queue("q")
    world.consume("q")
    world.publish("q", ttl="1000")
    world.take()
    world.now += 2
    world.settle(1, requeue=True)
    assert world.bodies() == []
    assert world.ready("q") == []


@pytest.mark.parametrize("expiration", ["", "x", "-1", "5 ", "1.5"])
def test_an_invalid_expiration_closes_the_channel(world: World, expiration: str) -> None:
    world.queue("q")
    with pytest.raises(PreconditionFailed, match="PRECONDITION_FAILED - invalid expiration"):
        world.publish("q", ttl=expiration)


# -------------------------------------------------------------------------------------------------- dead letters


def test_an_expired_message_says_where_and_why_it_died(world: World) -> None:
    world.queue("dead")
    world.queue("q", key="k", dead_letter_exchange="")
    world.publish("k", b"a", exchange="x", ttl="1000", headers={"CC": ["dead"], "own": 1})
    world.vhost.expire(101.0)
    letter = world.letter()
    assert letter.expiration is None
    assert letter.headers == {
        "CC": ["dead"],
        "own": 1,
        "x-first-death-exchange": "x",
        "x-first-death-queue": "q",
        "x-first-death-reason": "expired",
        "x-death": [
            {
                "count": 1,
                "reason": "expired",
                "queue": "q",
                "time": WALL,
                "exchange": "x",
                "routing-keys": ["k", "dead"],
                "original-expiration": "1000",
            }
        ],
    }


def test_a_rejected_message_is_dead_lettered_and_no_longer_expires(world: World) -> None:
    world.queue("dead", key="k")
    world.vhost.declare_exchange(Exchange("y"))
    world.vhost.declare_queue(
        Queue("q", durable=True, arguments={"x-dead-letter-exchange": "x"}, bindings=(("y", "k"),)), world.mine
    )
    world.consume("q")
    world.publish("k", b"a", exchange="y", ttl="9000")
    world.settle(1)
    letter = world.letter()
    assert letter.expiration is None
    assert letter.headers is not None
    (death,) = letter.headers["x-death"]
    assert (death["reason"], death["original-expiration"]) == ("rejected", "9000")
    assert world.ready("dead") == [b"a"]


def test_the_dead_letter_of_a_rejection_arrives_before_those_of_expired_messages(world: World) -> None:
    world.queue("dead", key="q", max_length=1, overflow="reject-publish")
    world.queue("q", dead_letter_exchange="x")
    world.consume("q", prefetch=1)
    for body, ttl in ((b"rejected", None), (b"expired", "50")):
        world.publish("q", body, ttl=ttl)
    world.now += 1
    world.settle(1)
    assert world.ready("dead") == [b"rejected"]


def test_a_message_without_headers_or_ttl_gets_headers_but_no_original_expiration(world: World) -> None:
    world.queue("dead", key="q")
    world.queue("q", dead_letter_exchange="x")
    world.consume("q")
    world.vhost.publish(b"", b"q", b"\x00\x00", b"", True, world.now)
    world.settle(1)
    headers = world.letter().headers
    assert headers is not None
    assert "original-expiration" not in headers["x-death"][0]


def test_a_repeated_death_is_counted(world: World) -> None:
    world.queue("a", key="k", dead_letter_exchange="x")
    world.consume("a")
    world.publish("a", headers={"CC": ["k"]})  # rejected in a, comes back to it through x
    world.settle(1)
    world.settle(2)
    world.settle(3, requeue=True)
    headers = decode(world.take()[-1][2].properties).headers
    assert headers is not None
    assert [(death["queue"], death["reason"], death["count"]) for death in headers["x-death"]] == [("a", "rejected", 2)]
    assert headers["x-death"][0]["exchange"] == ""
    assert headers["x-first-death-exchange"] == ""


def test_deaths_in_several_queues_are_in_order_the_latest_first(world: World) -> None:
    world.queue("a", dead_letter_exchange="")
    world.queue("b", dead_letter_exchange="x")
    world.queue("c", key="b")
    world.publish("b", headers={"CC": ["nobody"], "x-death": [{"queue": "a", "reason": "rejected", "count": 3}, 7]})
    world.consume("b")
    world.settle(1)
    headers = world.letter("c").headers
    assert headers is not None
    assert [death if death == 7 else (death["queue"], death["count"]) for death in headers["x-death"]] == [
        ("b", 1),
        ("a", 3),
        7,
    ]
    assert "x-first-death-queue" not in headers  # the message had died before


def test_a_message_that_expires_into_its_own_queue_again_is_dropped(world: World) -> None:
    world.queue("q", dead_letter_exchange="")
    world.publish("q", ttl="0")
    assert world.ready("q") == []
    assert world.vhost.next_expiry is None


def test_a_longer_cycle_without_a_rejection_is_dropped(world: World) -> None:
    world.queue("q", dead_letter_exchange="")
    forged = [{"queue": "r", "reason": "delivery_limit", "count": 1}]
    world.queue("r")
    world.queue("s")
    world.publish("q", b"a", ttl="1000", headers={"CC": ["r", "s"], "x-death": forged})
    for name in ("r", "s"):
        world.vhost.queues[name].ready.clear()
    world.vhost.expire(101.0)
    assert (world.ready("q"), world.ready("r"), world.ready("s")) == ([], [], [b"a"])


@pytest.mark.parametrize("death", [{"queue": "q", "reason": "rejected", "count": 1}, "not a table"])
def test_a_cycle_with_a_rejection_or_an_unknown_entry_goes_on(world: World, death: Any) -> None:
    world.queue("r", dead_letter_exchange="")
    world.queue("q")
    forged = [death, {"queue": "q", "reason": "expired", "count": 1}]
    world.publish("r", b"a", ttl="1000", headers={"CC": ["nobody", "q"], "x-death": forged})
    world.vhost.queues["q"].ready.clear()
    world.vhost.expire(101.0)
    assert world.ready("q") == [b"a"]


@pytest.mark.parametrize("arguments", [{}, {"dead_letter_exchange": "nope"}, {"dead_letter_exchange": "x"}])
def test_a_dead_letter_without_a_target_is_dropped(world: World, arguments: dict[str, Any]) -> None:
    world.queue("q", **arguments)
    world.consume("q")
    world.publish("q")
    world.settle(1)
    assert world.mine.unacked == {}
    assert world.ready("q") == []


def test_a_dead_letter_whose_properties_cannot_be_read_is_dropped(world: World) -> None:
    world.queue("q", dead_letter_exchange="")
    world.consume("q")
    assert world.vhost.publish(b"", b"q", GARBAGE, b"", True, world.now) is Published.CONFIRMED
    world.settle(1)
    assert world.ready("q") == []


def test_a_rejected_message_that_comes_back_is_last(world: World) -> None:
    world.queue("q", dead_letter_exchange="")
    world.consume("q", prefetch=1)
    for body in (b"a", b"b"):
        world.publish("q", body)
    world.settle(1)
    assert world.bodies() == [b"a", b"b"]
    assert world.ready("q") == [b"a"]


# ------------------------------------------------------------------------------------------------- quorum queues


def quorum(world: World, limit: int | None) -> None:
    limits: dict[str, Any] = {} if limit is None else {"delivery_limit": limit}
    world.queue("q", queue_type="quorum", dead_letter_exchange="x", **limits)
    world.queue("dead", key="q")


def test_a_message_over_the_delivery_limit_is_dead_lettered_when_its_consumer_is_lost(world: World) -> None:
    quorum(world, 0)
    holder = Connection()
    world.consume("q", holder)
    world.consume("q")
    world.publish("q", b"a")
    world.take()
    world.disconnect(holder)
    assert world.bodies() == []
    headers = world.letter().headers
    assert headers is not None
    assert headers["x-first-death-reason"] == "delivery_limit"


@pytest.mark.parametrize("limit", [2, None])
def test_a_quorum_queue_counts_how_often_a_message_comes_back(world: World, limit: int | None) -> None:
    quorum(world, limit)
    world.consume("q")
    world.publish("q", headers={"own": 1})
    counts: list[Any] = []
    for _ in range(3):
        for consumer, tag, entry in world.take():
            counts.append((decode(consumer.properties(entry)).headers or {}).get("x-delivery-count"))
            world.settle(tag, requeue=True)
    assert counts == [None, 1, 2]
    assert len(world.ready("dead")) == (1 if limit == 2 else 0)


def test_the_count_is_added_to_a_message_without_headers(world: World) -> None:
    quorum(world, None)
    world.consume("q")
    world.publish("q")
    world.settle(1, requeue=True)
    consumer, _, entry = world.take()[-1]
    assert decode(consumer.properties(entry)).headers == {"x-delivery-count": 1}


def test_a_classic_queue_counts_nothing(world: World) -> None:
    world.queue("q")
    world.consume("q")
    world.publish("q")
    world.settle(1, requeue=True)
    consumer, _, entry = world.take()[-1]
    assert consumer.properties(entry) == entry.properties


def test_messages_that_come_back_to_a_quorum_queue_are_first_in_the_order_of_their_return(world: World) -> None:
    quorum(world, None)
    first, second = Connection(), Connection()
    world.consume("q", first, prefetch=2)
    for body in (b"a", b"b", b"c", b"d", b"e"):
        world.publish("q", body)
    world.consume("q", second, prefetch=2)
    world.disconnect(second)
    world.disconnect(first)
    assert world.ready("q") == [b"c", b"d", b"a", b"b", b"e"]


@pytest.mark.parametrize(("limit", "then"), [(2, [b"a", b"b", b"c"]), (None, [b"b", b"c", b"a"])])
def test_a_message_that_a_consumer_gives_back_is_last_in_a_quorum_queue_without_a_delivery_limit(
    world: World, limit: int | None, then: list[bytes]
) -> None:
    quorum(world, limit)
    world.consume("q", prefetch=1)
    for body in (b"a", b"b", b"c"):
        world.publish("q", body)
    world.settle(1, requeue=True)
    for tag in (2, 3):
        world.settle(tag, accept=True)
    assert world.bodies()[1:] == then


def test_a_rejected_message_has_room_in_its_own_full_queue_after_the_next_delivery(
    world: World,
) -> None:
    world.queue("q", max_length=2, overflow="reject-publish", dead_letter_exchange="")
    world.consume("q", prefetch=1)
    for body in (b"a", b"b", b"c"):
        assert world.publish("q", body) is Published.CONFIRMED
    world.settle(1)
    assert world.bodies() == [b"a", b"b"]
    assert world.ready("q") == [b"c", b"a"]
