"""Dead letters and lost messages: how they are read, chosen, and written again."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcq.errors import ConfigurationError
from rpcq.jobs.letters import DeadLetter, Replay, Wanted, parse_since, read_letter, replay_of
from rpcq.wire.bodies import dumps
from rpcq.wire.events import EventTopology
from rpcq.wire.jobs import read_job
from rpcq.wire.properties import Properties, decode, encode

TOPOLOGY = EventTopology("rpcq")
DIED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DIED_MS = round(DIED.timestamp() * 1000)
NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
NOW_MS = round(NOW.timestamp() * 1000)
BY_WORKER = {
    "rpcq-dead-reason": "attempts",
    "rpcq-executed": "yes",
    "rpcq-error": "ValueError: no",
    "rpcq-incident": "abc",
    "rpcq-from": "emails",
    "rpcq-died-at": DIED_MS,
}


def letter(
    headers: dict[str, Any] | None = None, *, exchange: str = "rpcq.dead", key: str = "job.emails", **properties: Any
) -> DeadLetter:
    found = Properties(**{"message_id": b"j1", "type": b"welcome", "headers": headers, **properties})
    return read_letter(TOPOLOGY, exchange.encode(), key.encode(), encode(found), b'{"to":"ada"}')


def again(found: DeadLetter, to: str | None = None) -> Replay:
    replay = replay_of(TOPOLOGY, found, to, NOW_MS)
    assert isinstance(replay, Replay)
    return replay


# Reading.


def test_a_letter_of_a_worker_says_why() -> None:
    found = letter({**BY_WORKER, "rpcq-attempt": 8})
    assert (found.label, found.reason, found.executed, found.job.attempt) == ("emails.welcome", "attempts", "yes", 8)
    assert (found.error, found.incident, found.source, found.died_at) == ("ValueError: no", "abc", "emails", DIED)


@pytest.mark.parametrize(
    ("reason", "error"), [("delivery_limit", "workers were lost"), ("rejected", "larger"), ("new", "gave it up: new")]
)
def test_a_letter_of_the_broker_may_have_run(reason: str, error: str) -> None:
    found = letter({"x-death": [{"queue": "rpcq.job.emails", "reason": reason, "time": DIED, "count": 1}]})
    assert (found.reason, found.executed, found.source, found.died_at) == (reason, "maybe", "rpcq.job.emails", DIED)
    assert error in found.error
    assert found.label == "emails.welcome"


def test_of_several_deaths_the_last_one_counts() -> None:
    delayed = {"queue": "rpcq.delay.03", "reason": "expired", "time": DIED - timedelta(hours=1)}
    died = {"queue": "rpcq.job.emails", "reason": "delivery_limit", "time": DIED}
    assert letter({"x-death": [died, delayed]}).reason == "delivery_limit"
    named = {"x-last-death-queue": "rpcq.job.emails", "x-last-death-reason": "delivery_limit"}
    assert letter({"x-death": [delayed, died], **named}).died_at == DIED


@pytest.mark.parametrize(
    ("exchange", "key", "address", "service"),
    [
        ("rpcq.due", "0." * 24 + "job.emails", "job.emails", "emails"),
        ("rpcq.delay.00", "0." * 23 + "1.job.a.b", "job.a.b", "a.b"),
        ("rpcq.due", "0." * 24 + "job.a.b:high", "job.a.b:high", "a.b"),
        ("rpcq.due", "emails:suspects", "emails:suspects", "emails"),
        ("rpcq.due", "0." * 24 + "sub.emails:orders", "sub.emails:orders", "emails"),
        ("rpcq.due", "0.1.job.emails", "0.1.job.emails", ""),
        ("rpcq.due", "job.", "job.", ""),
    ],
)
def test_a_lost_message_says_where_it_was_to_go(exchange: str, key: str, address: str, service: str) -> None:
    deaths = [{"queue": "rpcq.delay.00", "reason": "expired", "time": DIED}]
    found = letter({"x-death": deaths}, exchange=exchange, key=key, timestamp=DIED_MS // 1000)
    assert (found.reason, found.executed, found.address, found.service) == ("lost", "maybe", address, service)
    assert found.died_at == DIED
    assert address in found.error
    assert letter({"rpcq-attempt": 2}, exchange=exchange, key=key).executed == "yes"


def test_a_dead_letter_that_was_lost_as_well_keeps_its_reason() -> None:
    assert letter(BY_WORKER, key="job.gone").reason == "attempts"


@pytest.mark.parametrize("deaths", [None, "x", [], [1], [{}], [{"reason": 1, "queue": 2, "time": "x"}]])
def test_headers_that_are_no_headers_of_a_broker_are_no_matter(deaths: Any) -> None:
    found = letter({"x-death": deaths, "rpcq-dead-reason": 1, "rpcq-executed": "perhaps", "rpcq-died-at": "x"})
    assert (found.reason, found.executed, found.source, found.died_at) == ("delivery_limit", "maybe", "", None)


@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=200), st.sampled_from([b"rpcq.dead", b"x"]))
def test_any_message_can_be_read_listed_and_shown(key: bytes, body: bytes, properties: bytes, exchange: bytes) -> None:
    found = read_letter(TOPOLOGY, exchange, key, properties, body)
    assert json.loads(dumps(found.details()))["executed"] in ("yes", "no", "maybe")
    replay_of(TOPOLOGY, found, None, NOW_MS)


def test_details_carry_any_header() -> None:
    odd = {"b": b"\xff", "f": float("nan"), "t": DIED, "d": Decimal("1.5"), "n": None, "in": [{"b": b"a"}]}
    details = letter({**BY_WORKER, **odd}).details()
    headers = json.loads(dumps(details))["headers"]
    assert {name: headers[name] for name in odd} == {
        "b": "\\xff",
        "f": "nan",
        "t": DIED.isoformat(),
        "d": "1.5",
        "n": None,
        "in": [{"b": "a"}],
    }
    assert details["body"] == '{"to":"ada"}'
    assert "headers" not in details["properties"]


# Choosing.


@pytest.mark.parametrize(
    ("wanted", "is_taken"),
    [
        ({}, True),
        ({"reasons": ["attempts", "expired"]}, True),
        ({"reasons": ["expired"]}, False),
        ({"jobs": ["welcome"]}, True),
        ({"jobs": ["emails.welcome"]}, True),
        ({"jobs": ["other.welcome"]}, False),
        ({"ids": ["j1"]}, True),
        ({"ids": ["j2"]}, False),
        ({"reasons": ["attempts"], "ids": ["j2"]}, False),
    ],
)
def test_every_filter_must_take_a_letter(wanted: dict[str, list[str]], is_taken: bool) -> None:
    chosen = Wanted(**{name: frozenset(values) for name, values in wanted.items()})
    assert chosen.takes(letter(BY_WORKER)) is is_taken
    assert chosen.is_all is (not wanted)


def test_since_is_the_earliest_time_and_an_unknown_time_is_not_after_it() -> None:
    assert Wanted(since=DIED).takes(letter(BY_WORKER))
    assert not Wanted(since=DIED + timedelta(seconds=1)).takes(letter(BY_WORKER))
    assert not Wanted(since=DIED).takes(letter({"rpcq-dead-reason": "attempts"}))
    assert not Wanted(since=DIED).is_all


@pytest.mark.parametrize(
    ("since", "before"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2d", 172_800), ("1w", 604_800)]
)
def test_a_duration_is_before_now(since: str, before: float) -> None:
    assert parse_since(since, NOW) == NOW - timedelta(seconds=before)


def test_a_time_may_have_an_offset_or_is_one_of_this_machine() -> None:
    assert parse_since("2026-01-02T05:04:05+02:00", NOW) == DIED
    assert parse_since("2026-01-02T03:04:05", NOW) == datetime(2026, 1, 2, 3, 4, 5).astimezone()


@pytest.mark.parametrize("since", ["", "2", "h", "-2h", "2y", "yesterday", "nan", "999999999w"])
def test_what_is_no_time_is_named(since: str) -> None:
    with pytest.raises(ConfigurationError, match="--since must be a duration such as 90s"):
        parse_since(since, NOW)


# Replaying.


def test_a_replay_keeps_the_job_and_begins_anew() -> None:
    headers = {
        **BY_WORKER,
        "rpcq-attempt": 8,
        "rpcq-unknown": 3,
        "rpcq-returns": 2,
        "rpcq-first-sent": 5,
        "rpcq-idempotency-key": "k",
        "rpcq-expires": NOW_MS + 1,
        "x-tenant": "t1",
        "traceparent": "00-1-2-01",
        "x-death": [{"reason": "expired"}],
        "x-first-death-queue": "q",
        "x-last-death-queue": "q",
        "x-delivery-count": 3,
        "x-acquired-count": 3,
        "x-opt-deaths": 1,
    }
    replay = again(letter(headers, user_id=b"ada", app_id=b"shop", expiration=b"5", reply_to=b"q"))
    found = decode(replay.properties)
    assert found.headers == {
        "rpcq-first-sent": 5,
        "rpcq-idempotency-key": "k",
        "rpcq-expires": NOW_MS + 1,
        "x-tenant": "t1",
        "traceparent": "00-1-2-01",
    }
    assert (found.message_id, found.type, found.app_id, found.delivery_mode) == (b"j1", b"welcome", b"shop", 2)
    assert (found.user_id, found.expiration, found.reply_to) == (None, None, None)
    assert (replay.exchange, replay.routing_key) == (b"rpcq.jobs", b"emails")
    assert (replay.job_id, replay.body) == ("j1", b'{"to":"ada"}')
    assert read_job(replay.properties, replay.body, redelivered=False).problem == ""


def test_a_replay_leaves_out_an_expiry_that_has_passed() -> None:
    found = decode(again(letter({**BY_WORKER, "rpcq-expires": NOW_MS})).properties)
    assert "rpcq-expires" not in (found.headers or {})


def test_a_replay_can_go_to_another_service() -> None:
    assert again(letter(BY_WORKER), "others").routing_key == b"others"
    assert again(letter(exchange="rpcq.due", key="else.emails:orders"), "others").routing_key == b"others"


def test_a_replay_keeps_its_lane_unless_it_goes_to_another_service() -> None:
    low = letter({**BY_WORKER, "rpcq-priority": "low"})
    kept, moved = again(low), again(low, "others")
    assert (kept.routing_key, moved.routing_key) == (b"emails:low", b"others")
    assert (decode(kept.properties).headers or {})["rpcq-priority"] == "low"
    assert "rpcq-priority" not in (decode(moved.properties).headers or {})
    in_order = letter({**BY_WORKER, "rpcq-order-key": "a"})
    kept, moved = again(in_order), again(in_order, "others")
    assert (kept.routing_key, moved.routing_key) == (b"emails:k03", b"others")
    assert (decode(kept.properties).headers or {})["rpcq-order-key"] == "a"
    assert "rpcq-order-key" not in (decode(moved.properties).headers or {})
    lost = letter({"rpcq-priority": "high"}, exchange="rpcq.due", key="0." * 24 + "job.emails:high")
    assert again(lost).routing_key == b"emails:high"
    assert again(letter({**BY_WORKER, "rpcq-priority": "urgent"})).routing_key == b"emails"


@pytest.mark.parametrize(
    ("exchange", "key"),
    [
        ("rpcq.dead", "sub.shop.eu:ship"),
        ("rpcq.due", "0." * 24 + "sub.shop.eu:ship"),
        ("rpcq.due", "sub.shop.eu:ship:suspects"),
    ],
)
def test_a_letter_of_a_subscription_names_it_and_its_event_and_goes_back_to_it_alone(exchange: str, key: str) -> None:
    found = letter({**BY_WORKER, "rpcq-event-version": 2}, exchange=exchange, key=key, type=b"order.created")
    assert (found.service, found.subscription, found.label) == ("shop.eu", "ship", "shop.eu.ship")
    assert (found.summary()["job"], found.summary()["event"]) == ("shop.eu.ship", "order.created")
    for job in ("ship", "shop.eu.ship", "order.created"):
        assert Wanted(jobs=frozenset([job])).takes(found)
    assert not Wanted(jobs=frozenset(["other"])).takes(found)
    replay, moved = again(found), again(found, "audit:look")
    assert (replay.exchange, replay.routing_key) == (b"rpcq.due", b"0." * 24 + b"sub.shop.eu:ship")
    assert (replay.queue, moved.queue) == ("rpcq.sub.shop.eu:ship", "rpcq.sub.audit:look")
    assert moved.routing_key == b"0." * 24 + b"sub.audit:look"
    assert (decode(replay.properties).headers or {})["rpcq-event-version"] == 2
    assert "name a subscription, --to audit:ship" in str(replay_of(TOPOLOGY, found, "audit", NOW_MS))


def test_a_job_cannot_go_to_a_subscription() -> None:
    assert "name a service alone, --to audit" in str(replay_of(TOPOLOGY, letter(BY_WORKER), "audit:look", NOW_MS))


def test_a_service_called_like_an_address_of_a_subscription_is_not_taken_for_one() -> None:
    found = letter(exchange="rpcq.due", key="sub.shop:suspects")
    assert (found.service, found.subscription) == ("sub.shop", "")


def test_what_cannot_be_replayed_says_why() -> None:
    assert "names no service: name one with --to" in str(
        replay_of(TOPOLOGY, letter(key="else.emails:orders"), None, NOW_MS)
    )
    assert "no ID" in str(replay_of(TOPOLOGY, letter(message_id=None), None, NOW_MS))
    unreadable = read_letter(TOPOLOGY, b"rpcq.dead", b"job.emails", b"\xff", b"")
    assert "the properties end early" in str(replay_of(TOPOLOGY, unreadable, None, NOW_MS))
