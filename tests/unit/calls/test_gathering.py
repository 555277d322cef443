"""Which requests go in one message, and what they say there."""

from __future__ import annotations

import asyncio
import time
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcq.calls import gathering
from rpcq.calls.gathering import APART, BARRED, Gathering, by_deadline, split
from rpcq.calls.outcomes import CallEvent, State
from rpcq.calls.pending import PendingCalls
from rpcq.calls.sending import ClientCall, Sender
from rpcq.calls.targets import Target, make_target
from rpcq.options import CallOptions, ClientOptions
from rpcq.transport.base import Outgoing, Published
from rpcq.wire import batches, requests
from rpcq.wire.batches import MAX_BATCH, MAX_ENTRY, MAX_REQUESTS
from rpcq.wire.replies import RESULT, Reply
from rpcq.wire.topology import Topology

THINGS = make_target(Topology(), "things", "work", None)
SERVICE = THINGS.routing_key


class Transport:
    """Keeps what is published."""

    def __init__(self) -> None:
        self.sent: list[Outgoing] = []
        self.can_publish = True

    def publish(self, message: Outgoing) -> None:
        self.sent.append(message)


class Place:
    """A sender whose client has so many other calls under way that messages may have 50."""

    def __init__(self) -> None:
        self.transport = Transport()
        self.began = time.monotonic()
        self.counted: list[int] = []
        self.calls = PendingCalls(10_000)
        self.sessions: Any = SimpleNamespace(can_exchange=True, ready=None, down=[])
        self.sender = Sender(
            self.transport,  # type: ignore[arg-type]
            self.sessions,
            self.calls,
            ClientOptions(),
            user="",
            on_message=self.counted.append,
        )
        self.sender.open()
        self.sender.consuming("amq.gen-1")
        self.gathering = self.sender.gathering
        for _ in range(50 * gathering.SHARE):
            self.make()

    def make(self, target: Target = THINGS, timeout: float = 100.0, body: bytes = b"{}", **options: Any) -> ClientCall:
        key = options.pop("key", None)
        attempt = options.pop("attempt", 1)
        deadline = self.began + timeout
        call = ClientCall(
            self.sender, self.calls.next_id(), target, CallOptions(**options), body, deadline, key, attempt
        )
        self.calls.add(call)
        return call

    def send(self, *calls: ClientCall) -> tuple[ClientCall, ...]:
        for call in calls:
            self.sender.send(call)
        return calls

    @property
    def sent(self) -> list[list[str]]:
        """The correlation IDs in each message."""
        return [[it.correlation_id.decode() for it, _ in read(message)] for message in self.transport.sent]


def read(message: Outgoing) -> list[tuple[requests.Request, bytes]]:
    found = requests.read_request(message.properties)
    assert not found.problem
    return batches.read_requests(found, message.body) if found.is_batch else [(found, message.body)]


def ids(*calls: ClientCall) -> list[str]:
    return [call.correlation_id.decode() for call in calls]


@pytest.fixture
async def place() -> Place:
    return Place()


async def test_until_a_worker_says_that_it_takes_several_each_call_goes_alone_at_once(place: Place) -> None:
    calls = place.send(*(place.make() for _ in range(3)))
    assert place.sent == [[it] for it in ids(*calls)]
    place.gathering.told_by(calls[0], 12)
    more = place.send(*(place.make() for _ in range(3)))
    assert len(place.sent) == 3
    await asyncio.sleep(0)
    assert place.sent[3:] == [ids(*more)]
    assert place.counted == [1, 1, 1, 3]
    place.gathering.told_by(calls[0], 0)
    place.send(place.make())
    assert len(place.sent) == 5


async def test_with_few_calls_under_way_nothing_waits() -> None:
    place = Place()
    for call in list(place.calls)[gathering.FEWEST - 2 :]:
        place.calls._end(call)
    place.gathering.told[SERVICE] = 12
    calls = place.send(place.make())
    assert place.sent == [ids(*calls)]
    place.send(place.make(), place.make())
    assert len(place.sent) == 1
    await asyncio.sleep(0)
    assert len(place.sent[1]) == 2


async def test_a_message_has_what_the_worker_wants_and_a_share_of_what_is_under_way(place: Place) -> None:
    place.gathering.told[SERVICE] = 12
    place.send(*(place.make() for _ in range(30)))
    await asyncio.sleep(0)
    assert [len(it) for it in place.sent] == [10, 10, 10]
    place.gathering.told[SERVICE] = 1000
    place.send(*(place.make() for _ in range(200)))
    await asyncio.sleep(0)
    assert max(len(it) for it in place.sent) <= (50 * gathering.SHARE + 230) // gathering.SHARE


async def test_each_service_has_its_own_messages_and_calls_to_a_queue_go_alone(place: Place) -> None:
    other = make_target(Topology(), "other", "work", None)
    queue = make_target(Topology(), None, "work", "things")
    place.gathering.told |= {SERVICE: 12, b"other": 12}
    first, second, third, fourth = place.send(place.make(), place.make(other), place.make(), place.make(other))
    alone, unknown = place.send(place.make(queue), place.make(make_target(Topology(), "unknown", "work", None)))
    assert place.sent == [ids(alone), ids(unknown)]
    await asyncio.sleep(0)
    assert place.sent[2:] == [ids(first, third), ids(second, fourth)]
    assert [it.routing_key for it in place.transport.sent[2:]] == [b"rpcq.once.things", b"rpcq.once.other"]


async def test_what_a_single_request_says_is_said_of_each_in_a_message(place: Place) -> None:
    place.gathering.told[SERVICE] = 12
    metadata = {"x-a": '"1"'}
    first = place.make(metadata=metadata, key="k-1", timeout=100.0, body=b'{"x":1}')
    second = place.make(metadata=metadata, timeout=99.5, body=b"[2]")
    second.trace = {"traceparent": "00-1"}
    place.send(first, second)
    await asyncio.sleep(0)
    (message,) = place.transport.sent
    carrier = requests.read_request(message.properties)
    assert carrier.headers["x-a"] == '"1"'  # once, for both
    assert b"x-a" not in message.body
    (one, body), (other, other_body) = read(message)
    assert (one.method, one.idempotency_key, one.metadata, body) == ("work", "k-1", metadata, b'{"x":1}')
    assert (other.idempotency_key, other.metadata, other_body) == (None, metadata, b"[2]")
    assert other.headers["traceparent"] == "00-1"
    assert 60_000 < (one.timeout_ms or 0) <= 100_000
    assert 499 <= (one.timeout_ms or 0) - (other.timeout_ms or 0) <= 501
    assert carrier.timeout_ms == other.timeout_ms
    assert (one.deadline_ms or 0) - (other.deadline_ms or 0) == (one.timeout_ms or 0) - (other.timeout_ms or 0)
    assert (one.reply_to, one.app_id, one.has_copy, one.reads_batches) == (b"amq.gen-1", "rpcq", True, True)


async def test_metadata_that_differ_go_with_each(place: Place) -> None:
    place.gathering.told[SERVICE] = 12
    place.send(place.make(metadata={"x-a": "1"}), place.make(), place.make(metadata={"x-a": "2"}))
    await asyncio.sleep(0)
    (message,) = place.transport.sent
    assert [it.metadata for it, _ in read(message)] == [{"x-a": "1"}, {}, {"x-a": "2"}]


async def test_what_was_sent_before_and_what_is_large_goes_alone(place: Place) -> None:
    place.gathering.told[SERVICE] = 12
    (again,) = place.send(place.make())
    await asyncio.sleep(0)
    place.transport.sent[0].on_published(Published.UNSENT)
    await asyncio.sleep(0.005)
    assert place.sent[1:] == [[f"{ids(again)[0]}.2"]]
    attempt, large = place.send(place.make(attempt=2, key="k"), place.make(body=b"1" * (MAX_ENTRY + 1)))
    assert place.sent[2:] == [ids(attempt), ids(large)]
    headers, small, other = place.send(
        place.make(metadata={"x-a": "1" * MAX_ENTRY}), place.make(metadata={"x-b": "1"}), place.make()
    )
    await asyncio.sleep(0)
    assert place.sent[4:] == [ids(headers), ids(small, other)]


@pytest.mark.parametrize("few", [True, False])
async def test_a_call_whose_headers_cannot_be_written_gets_the_error_and_the_others_are_sent(
    place: Place, few: bool
) -> None:
    """As when it is sent alone, where the error comes to its caller."""
    place.gathering.told |= {SERVICE: 1 if few else 12, b"other": 12}
    other = make_target(Topology(), "other", "work", None)
    broken = place.make()
    broken.trace = {"traceparent": "\ud800"}
    before, _, after, *elsewhere = place.send(place.make(), broken, place.make(), place.make(other), place.make(other))
    await asyncio.sleep(0)
    assert sorted(it for each in place.sent for it in each) == sorted(ids(before, after, *elsewhere))
    assert isinstance(broken.future.exception(), ValueError)
    assert not any(it.future.done() for it in (before, after, *elsewhere))


async def test_a_call_that_waited_for_a_connection_and_cannot_be_written_gets_the_error_too(place: Place) -> None:
    place.transport.can_publish = False
    broken = place.make()
    broken.trace = {"traceparent": "\ud800"}
    place.sender.waiting._ready = partial(asyncio.sleep, 0)
    _, after = place.send(broken, place.make())
    place.transport.can_publish = True
    async with asyncio.timeout(10):
        await place.sender.waiting.emptied()
    assert place.sent == [ids(after)]
    assert isinstance(broken.future.exception(), ValueError)
    await place.sender.close()


async def test_a_message_has_at_most_256_requests_whatever_a_worker_wants(place: Place) -> None:
    for _ in range(300 * gathering.SHARE):
        place.make()
    (first,) = place.send(place.make())
    place.gathering.told_by(first, 1000)
    place.send(*(place.make() for _ in range(300)))
    await asyncio.sleep(0)
    assert [len(it) for it in place.sent] == [1, 150, 150]
    assert place.gathering.told[SERVICE] == MAX_REQUESTS


async def test_a_message_has_at_most_64_kib(place: Place) -> None:
    place.gathering.told[SERVICE] = 50
    calls = place.send(*(place.make(body=b"1" * MAX_ENTRY) for _ in range(50)))
    await asyncio.sleep(0)
    assert [it for each in place.sent for it in each] == ids(*calls)
    assert 60_000 < max(len(it.body) for it in place.transport.sent) <= MAX_BATCH


async def test_a_call_that_has_ended_meanwhile_is_not_sent_and_one_that_cannot_be_sent_waits(place: Place) -> None:
    place.gathering.told[SERVICE] = 12
    ended, first, second = place.send(*(place.make() for _ in range(3)))
    ended.future.cancel()
    place.transport.can_publish = False
    place.sessions.can_exchange = False
    place.sessions.ready = asyncio.Event().wait
    await asyncio.sleep(0)
    assert not place.sent
    assert list(place.sender.waiting.items) == [first, second]
    await place.sender.close()


async def test_what_becomes_of_the_message_is_for_each_call_that_has_no_other_news(place: Place) -> None:
    place.gathering.told[SERVICE] = 12
    calls = place.send(*(place.make() for _ in range(3)))
    await asyncio.sleep(0)
    place.calls._end(calls[1])
    place.transport.sent[0].on_published(Published.CONFIRMED)
    assert [it.state for it in calls] == [State.CONFIRMED, State.DONE, State.CONFIRMED]
    place.transport.sent[0].on_published(Published.UNKNOWN)
    assert [it.future.done() for it in calls] == [True, False, True]
    assert not place.calls._together or place.calls.together(place.transport.sent[0].correlation_id) == [calls[1]]


async def test_a_call_that_has_ended_is_not_kept_until_the_others_of_its_message_end(place: Place) -> None:
    place.gathering.told[SERVICE] = 12
    ended, first, second = place.send(*(place.make() for _ in range(3)))
    await asyncio.sleep(0)
    batch_id = place.transport.sent[0].correlation_id
    place.calls.happened(ended, CallEvent.REPLY, Reply(ended.request_id, RESULT, b"1" * 1000))
    gone = weakref.ref(ended.future)
    del ended
    assert gone() is None
    assert place.calls.together(batch_id) == [first, second]
    for call in (first, second):
        place.calls.happened(call, CallEvent.CANCEL)
    assert place.calls.together(batch_id) == ()


async def test_where_the_broker_takes_no_message_of_the_size_each_goes_alone_and_later_ones_are_smaller(
    place: Place,
) -> None:
    place.gathering.told[SERVICE] = 12
    calls = place.send(*(place.make(body=b"1" * 1000) for _ in range(12)))
    await asyncio.sleep(0)
    (message,) = place.transport.sent
    message.on_published(Published.TOO_LARGE)
    await asyncio.sleep(0.005)
    assert place.sent[1:] == [[f"{it}.2"] for it in ids(*calls)]
    already = len(place.sent)
    place.send(*(place.make(body=b"1" * 1000) for _ in range(12)))
    await asyncio.sleep(0)
    assert max(len(it.body) for it in place.transport.sent[already:]) <= len(message.body) // 2


async def test_a_service_that_does_not_read_them_gets_none_for_a_minute(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(gathering, "time", SimpleNamespace(monotonic=lambda: now))
    place.gathering.told[SERVICE] = 12
    place.gathering.bar(SERVICE)
    (call,) = place.send(place.make())
    assert place.sent == [ids(call)]
    place.gathering.told_by(call, 12)
    assert not place.gathering.told
    now += BARRED + 1
    place.gathering.told_by(call, 12)
    assert place.gathering.told == {SERVICE: 12}


class Timed:
    def __init__(self, deadline: float) -> None:
        self.deadline = deadline


@given(st.lists(st.floats(100.001, 1000), min_size=1, max_size=30))
def test_only_calls_with_near_deadlines_go_together_and_none_is_lost(deadlines: list[float]) -> None:
    calls: Any = [Timed(it) for it in deadlines]
    groups = by_deadline(calls, 100.0)
    assert sorted(it.deadline for group in groups for it in group) == sorted(deadlines)
    for group in groups:
        found = [it.deadline for it in group]
        assert max(found) - min(found) <= APART
        assert max(found) - min(found) <= (min(found) - 100.0) / 10 + 1e-9
        assert [it for it in calls if it in group] == group


@given(st.integers(1, 200), st.integers(1, 20))
def test_calls_are_split_into_as_few_parts_as_possible_of_about_the_same_size(count: int, most: int) -> None:
    calls: Any = list(range(count))
    parts = split(calls, most)
    assert [it for part in parts for it in part] == calls
    assert max(len(part) for part in parts) <= most
    assert len(parts) <= -(-count // most)


def test_a_gathering_knows_no_service_at_first() -> None:
    assert not Gathering(None).told  # type: ignore[arg-type]
