"""Names and arguments: they are part of the wire contract; a declared queue cannot change its arguments."""

from __future__ import annotations

import pytest

from rpcq.errors import ConfigurationError
from rpcq.wire.topology import DIRECT_REPLY_TO, MAX_LENGTH, Exchange, Queue, Topology

ARGUMENTS = {"x-max-length": 100_000, "x-overflow": "reject-publish", "x-dead-letter-exchange": "rpcq.notices"}


def test_exchanges_have_the_names_and_types_of_the_wire_contract() -> None:
    assert Topology().requests == Exchange("rpcq.requests", "direct")
    assert Topology().control == Exchange("rpcq.control", "topic")
    assert Topology().notices == Exchange("rpcq.notices", "topic", internal=True)
    assert MAX_LENGTH == 100_000


def test_a_classic_request_queue_is_durable_bounded_and_dead_letters_what_it_gives_up() -> None:
    assert Topology().request_queue("orders.eu", "classic") == Queue(
        "rpcq.req.orders.eu", durable=True, arguments=ARGUMENTS, bindings=(("rpcq.requests", "orders.eu"),)
    )


def test_a_quorum_request_queue_delivers_once() -> None:
    assert Topology().request_queue("orders", "quorum") == Queue(
        "rpcq.once.orders",
        durable=True,
        arguments=ARGUMENTS | {"x-queue-type": "quorum", "x-delivery-limit": 0},
        bindings=(("rpcq.requests", "orders"), ("rpcq.requests", "rpcq.once.orders")),
    )


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_a_service_may_name_its_queue_and_has_the_same_binding(queue_type: str) -> None:
    queue = Topology().request_queue("orders", queue_type, "rpc_queue")  # type: ignore[arg-type]
    assert (queue.name, queue.bindings) == ("rpc_queue", (("rpcq.requests", "orders"),))


def test_a_classic_queue_may_not_be_named_like_one_that_delivers_once() -> None:
    with pytest.raises(ConfigurationError, match=r"must not begin with 'rpcq\.once\.', .*; got 'rpcq\.once\.mine'"):
        Topology().request_queue("orders", "classic", "rpcq.once.mine")
    with pytest.raises(ConfigurationError, match=r"used as it is must not begin with 'rpcq\.once\.'"):
        Topology().request_queue("orders", "quorum", "rpcq.once.mine", declare=False)
    assert Topology().request_queue("orders", "quorum", "rpcq.once.mine").name == "rpcq.once.mine"
    assert Topology("other").request_queue("orders", "classic", "rpcq.once.mine").name == "rpcq.once.mine"


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_a_service_may_not_be_called_like_a_queue_that_delivers_once(queue_type: str) -> None:
    with pytest.raises(ConfigurationError, match=r"must not begin with 'rpcq\.once\.'.*; got 'rpcq\.once\.orders'"):
        Topology().request_queue("rpcq.once.orders", queue_type)  # type: ignore[arg-type]


def test_queues_of_one_session_are_exclusive_and_named_by_the_broker() -> None:
    assert Topology().reply_queue() == Queue("", exclusive=True, auto_delete=True, bound_by_name=("rpcq.notices",))
    assert Topology().control_queue(("a", "b")) == Queue(
        "",
        exclusive=True,
        auto_delete=True,
        bindings=(("rpcq.control", "a"), ("rpcq.control", "b"), ("rpcq.control", "@all")),
    )


def test_a_queue_that_is_reached_through_a_reply_exchange_has_a_name_of_its_own_in_each_session() -> None:
    queue = Topology("staging").reply_queue("replies", "shop")
    assert (queue.name, queue.prefix, queue.bound_by_name) == (
        "",
        "staging.reply.shop.",
        ("staging.notices", "replies"),
    )
    names = {queue.for_session().name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith("staging.reply.shop.") and len(name) > 35 for name in names)
    once = queue.for_session()
    assert once.for_session() is once
    assert Topology().reply_queue().for_session() == Topology().reply_queue()


@pytest.mark.parametrize("user", ["#", "a.#.b", "*", "a b", "", "x" * 151, "é"])
def test_a_user_whose_name_would_be_a_pattern_of_keys_is_refused_with_a_reply_exchange(user: str) -> None:
    with pytest.raises(ConfigurationError, match="the user must be"):
        Topology().reply_queue("replies", user)
    assert Topology().reply_queue(None, user).prefix == ""


def test_with_a_reply_exchange_workers_reply_to_nothing_else() -> None:
    assert Topology("staging").reply_prefixes("replies") == (b"staging.reply.",)
    assert [it.name for it in Topology("staging").exchanges("replies")] == [
        "staging.requests",
        "staging.control",
        "staging.notices",
        "replies",
    ]
    assert [it.name for it in Topology("staging").exchanges()] == [
        "staging.requests",
        "staging.control",
        "staging.notices",
    ]


def test_a_namespace_prefixes_every_name() -> None:
    topology = Topology("staging")
    assert topology.requests.name == "staging.requests"
    assert topology.control.name == "staging.control"
    assert topology.request_queue("a", "classic").name == "staging.req.a"
    assert topology.request_queue("a", "classic").bindings == (("staging.requests", "a"),)
    assert topology.request_queue("a", "quorum").name == "staging.once.a"
    assert topology.control_queue(("a",)).bindings == (("staging.control", "a"), ("staging.control", "@all"))


@pytest.mark.parametrize(
    ("queue", "once"),
    [
        ("rpcq.once.orders", True),
        ("rpcq.req.orders", False),
        ("rpcq.once", False),
        ("rpc_queue", False),
        ("other.once.orders", False),
        ("x.rpcq.once.orders", False),
        ("", False),
    ],
)
def test_only_expiry_from_a_queue_that_delivers_once_proves_that_nothing_ran(queue: str, once: bool) -> None:
    assert Topology().delivers_once(queue) is once


@pytest.mark.parametrize(
    ("queue", "may"),
    [
        (b"amq.gen-AbC", True),
        (b"rpcq.reply.4f", True),
        (DIRECT_REPLY_TO + b".g2dkAA", True),
        (DIRECT_REPLY_TO, False),
        (b"rpcq.req.orders", False),
        (b"rpcq.once.orders", False),
        (b"other.reply.4f", False),
        (b"amq.direct", False),
        (b"orders", False),
        (b"\xff", False),
        (b"", False),
    ],
)
def test_a_worker_replies_to_reply_queues_alone(queue: bytes, may: bool) -> None:
    assert queue.startswith(Topology().reply_prefixes()) is may
