"""The ladder of delay queues, as arithmetic, and played through the rules of the in-process broker."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcq.errors import ConfigurationError
from rpcq.options import MAX_DELAY
from rpcq.transport.base import Published
from rpcq.transport.memory.queues import Connection
from rpcq.transport.memory.vhost import Vhost
from rpcq.wire.delays import LEVELS, STEP, Ladder, coarse, steps_of
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.properties import Properties, decode, encode
from rpcq.wire.topology import Queue

TOPOLOGY = JobTopology("ns")
LADDER = TOPOLOGY.ladder


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [(0, 0), (0.001, 1), (0.25, 1), (0.2501, 2), (1, 4), (3600, 14400), (MAX_DELAY, 2**LEVELS - 1)],
)
def test_a_delay_is_rounded_up_to_whole_steps(seconds: float, steps: int) -> None:
    assert steps_of(seconds) == steps


@pytest.mark.parametrize("wrong", [-1, MAX_DELAY + 1, float("nan"), float("inf"), "5", None, True])
def test_a_delay_that_the_ladder_cannot_hold_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="a delay must be a number of seconds from 0 to 4194303"):
        steps_of(wrong)


@given(st.integers(1, 2**LEVELS - 1))
def test_a_coarse_delay_has_at_most_two_bits_and_loses_less_than_half(steps: int) -> None:
    found = coarse(steps)
    assert found.bit_count() <= 2
    assert steps / 2 < found <= steps


def vhost() -> tuple[Vhost, Connection]:
    found, connection = Vhost(lambda: datetime.now(UTC)), Connection()
    for exchange in TOPOLOGY.exchanges():
        found.declare_exchange(exchange)
    for queue in (*TOPOLOGY.shared_queues(), TOPOLOGY.queue("a.b"), TOPOLOGY.queue("b"), TOPOLOGY.suspects("b")):
        found.declare_queue(queue, connection)
    return found, connection


def depths(found: Vhost) -> dict[str, int]:
    return {name: len(queue.ready) for name, queue in found.queues.items() if queue.ready}


@given(st.integers(1, 2**LEVELS - 1), st.sampled_from(["a.b", "b"]))
def test_a_message_is_where_it_is_to_go_after_exactly_its_delay(steps: int, service: str) -> None:
    broker, _ = vhost()
    exchange, key = LADDER.route(steps, TOPOLOGY.address(service))
    assert len(key) <= 255
    assert broker.publish(exchange, key, encode(Properties()), b"", True, 0.0) is Published.CONFIRMED
    now, queues = 0.0, 0
    target = TOPOLOGY.queue(service).name
    while depths(broker) != {target: 1}:
        queues += 1
        assert [*depths(broker).values()] == [1]
        assert broker.next_expiry is not None
        now = broker.next_expiry
        broker.expire(now)
    assert now == pytest.approx(steps * STEP)
    assert queues == steps.bit_count()


@given(st.integers(1, LEVELS - 1))
def test_what_has_no_way_out_of_a_level_is_kept_with_the_lost(level: int) -> None:
    broker, _ = vhost()
    # Somebody puts it into the queue itself, by the default exchange.
    broker.publish(b"", LADDER.name(level).encode(), encode(Properties()), b"", True, 0.0)
    while broker.next_expiry is not None:
        broker.expire(broker.next_expiry)
    assert depths(broker) == {"ns.lost": 1}


@pytest.mark.parametrize("service", ["a.b", "b"])
def test_without_a_delay_a_message_is_where_it_is_to_go_at_once(service: str) -> None:
    broker, _ = vhost()
    exchange, key = LADDER.route(0, TOPOLOGY.address(service))
    assert exchange == b"ns.due"
    assert broker.publish(exchange, key, encode(Properties()), b"", True, 0.0) is Published.CONFIRMED
    assert depths(broker) == {TOPOLOGY.queue(service).name: 1}


def test_what_has_no_queue_any_more_is_kept_with_the_lost() -> None:
    broker, _ = vhost()
    exchange, key = LADDER.route(5, TOPOLOGY.address("gone"))
    broker.publish(exchange, key, encode(Properties(message_id=b"7")), b"body", True, 0.0)
    while broker.next_expiry is not None:
        broker.expire(broker.next_expiry)
    assert depths(broker) == {"ns.lost": 1}
    (entry,) = broker.queues["ns.lost"].ready
    assert (decode(entry.properties).message_id, entry.body) == (b"7", b"body")


def test_a_dead_letter_goes_to_its_own_service_only() -> None:
    broker, connection = vhost()
    for name in ("a.b", "b"):
        broker.declare_queue(TOPOLOGY.dead_queue(name), connection)
    key = TOPOLOGY.address("b").encode()
    broker.publish(TOPOLOGY.dead.name.encode(), key, encode(Properties()), b"", True, 0.0)
    assert depths(broker) == {"ns.dead.b": 1}


def test_names_and_arguments_do_not_depend_on_any_setting() -> None:
    ladder = Ladder("ns", "ns.due", "ns.lost")
    assert [queue.name for queue in ladder.queues()] == [f"ns.delay.{level:02}" for level in range(24)]
    assert ladder.queues()[3] == Queue(
        "ns.delay.03",
        durable=True,
        arguments={
            "x-queue-type": "quorum",
            "x-message-ttl": 2000,
            "x-dead-letter-exchange": "ns.delay.02",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
        bindings=(("ns.delay.03", "*." * 20 + "1.#"),),
    )
    assert ladder.queues()[0].arguments["x-dead-letter-exchange"] == "ns.due"
    assert ladder.queues()[23].arguments["x-message-ttl"] == 250 * 2**23
