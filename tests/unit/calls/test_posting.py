"""How replies are published: alone, or several to one client in one message; and that each hears what became of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rpcq.calls.posting import Post
from rpcq.transport.base import Outgoing, Published
from rpcq.wire import batches, replies
from rpcq.wire.batches import MAX_BATCH, MAX_ENTRY
from rpcq.wire.replies import ERROR, REPLIES, RESULT, Reply


class Slots:
    """The part of a service's slots that a post uses."""

    takes = 0


SLOTS = Slots()


class Run:
    """The part of a run that a post uses."""

    def __init__(self, correlation_id: str, reply_to: str = "amq.gen-1", *, reads: bool = True) -> None:
        self.key = reply_to.encode(), correlation_id.encode()
        self.reads_batches = reads
        self.queue_ms: float | None = 1.5
        self.handler_ms = 0.25
        self.slots = SLOTS


class Transport:
    """Keeps what is published."""

    def __init__(self) -> None:
        self.sent: list[Outgoing] = []
        self.can_publish = True
        self.room = asyncio.Event()

    def publish(self, message: Outgoing) -> None:
        self.sent.append(message)

    async def writable(self) -> None:
        while not self.can_publish:
            await self.room.wait()


class Heard:
    """What became of the replies."""

    def __init__(self) -> None:
        self.acknowledged: list[str] = []
        self.others: list[tuple[str, Published, int]] = []

    def acknowledge(self, run: Any) -> None:
        self.acknowledged.append(run.key[1].decode())

    def not_taken(self, run: Any, published: Published, size: int) -> None:
        self.others.append((run.key[1].decode(), published, size))


class Place:
    def __init__(self, max_body: int = 1024 * 1024) -> None:
        self.transport, self.heard = Transport(), Heard()
        self.post = Post(self.transport, self.heard, b"", max_body)  # type: ignore[arg-type]
        self.post.open()

    def reply(self, *ids: str, body: bytes = b"1", **options: Any) -> None:
        for each in ids:
            self.post.post(Run(each, **options), RESULT, body)  # type: ignore[arg-type]

    @property
    def sent(self) -> list[list[str]]:
        """The correlation IDs in each message."""
        return [[it.correlation_id.decode() for it in read(message)] for message in self.transport.sent]


def read(message: Outgoing) -> list[Reply]:
    found = replies.read_reply(message.properties, message.body, b"")
    assert isinstance(found, Reply)
    assert found.correlation_id == message.correlation_id
    return batches.read_replies(found) if found.kind == REPLIES else [found]


@pytest.fixture
async def place() -> Place:
    return Place()


async def test_the_first_reply_of_an_iteration_goes_at_once_and_all_further_ones_together(place: Place) -> None:
    place.reply("a")
    assert place.sent == [["a"]]
    place.reply("b", "c", "d")
    assert place.sent == [["a"]]
    await asyncio.sleep(0)
    assert place.sent == [["a"], ["b", "c", "d"]]
    assert place.post.messages == 2
    (message,) = place.transport.sent[1:]
    assert (message.exchange, message.routing_key, message.mandatory) == (b"", b"amq.gen-1", True)
    assert [replies.read_times(it) for it in read(message)] == [(1.5, 0.25)] * 3
    await asyncio.sleep(0)
    place.reply("e")
    assert place.sent[2:] == [["e"]]


async def test_one_that_waits_alone_goes_as_a_message_of_its_own(place: Place) -> None:
    place.reply("a", "b")
    await asyncio.sleep(0)
    assert place.sent == [["a"], ["b"]]
    assert [replies.read_reply(it.properties, b"1", b"").kind for it in place.transport.sent] == [RESULT] * 2  # type: ignore[union-attr]


async def test_each_client_gets_its_own_and_those_that_do_not_read_batches_get_none(place: Place) -> None:
    place.reply("a", "b", "c")
    place.reply("x", "y", "z", reply_to="amq.gen-2")
    place.reply("p", "q", reads=False)
    assert place.sent == [["a"], ["x"], ["p"], ["q"]]
    await asyncio.sleep(0)
    assert place.sent[4:] == [["b", "c"], ["y", "z"]]
    assert [it.routing_key for it in place.transport.sent[4:]] == [b"amq.gen-1", b"amq.gen-2"]


async def test_large_replies_and_those_of_strange_ids_go_alone(place: Place) -> None:
    place.reply("a", "b")
    place.reply("large", body=b"1" * (MAX_ENTRY + 1))
    place.reply('"', "é", "lines", body=b"[\n1]")
    assert place.sent == [["a"], ["large"], ['"'], ["é"], ["lines"]]


@pytest.mark.parametrize("max_body", [MAX_BATCH, 20_000])
async def test_a_message_has_at_most_64_kib_and_no_more_than_the_worker_may_send(max_body: int) -> None:
    place = Place(max_body)
    ids = [str(number) for number in range(50)]
    place.reply(*ids, body=b"1" * 4000)
    await asyncio.sleep(0)
    assert [it for each in place.sent for it in each] == ids
    assert max(len(it.body) for it in place.transport.sent) <= max_body
    assert len(place.sent) <= 2 + 50 * 4100 // max_body + 2


async def test_when_a_message_is_confirmed_each_of_its_replies_is(place: Place) -> None:
    place.reply("a", "b", "c")
    await asyncio.sleep(0)
    place.transport.sent[1].on_published(Published.CONFIRMED)
    assert place.heard.acknowledged == ["b", "c"]
    place.transport.sent[0].on_published(Published.CONFIRMED)
    assert place.heard.acknowledged == ["b", "c", "a"]


@pytest.mark.parametrize("published", [Published.RETURNED, Published.REFUSED])
async def test_when_the_caller_is_gone_it_is_for_each_reply(place: Place, published: Published) -> None:
    place.reply("a", "b", "c")
    await asyncio.sleep(0)
    for message in place.transport.sent:
        message.on_published(published)
    assert place.heard.others == [(it, published, 1) for it in "abc"]


@pytest.mark.parametrize("published", [Published.UNSENT, Published.UNKNOWN])
async def test_a_message_whose_session_was_lost_is_published_again_and_not_once_all_is_abandoned(
    place: Place, published: Published
) -> None:
    place.reply("a", "b", "c")
    await asyncio.sleep(0)
    place.transport.can_publish = False
    for message in list(place.transport.sent):
        message.on_published(published)
    await asyncio.sleep(0)
    assert len(place.sent) == 2
    place.transport.can_publish = True
    place.transport.room.set()
    await asyncio.sleep(0.01)
    assert place.sent[2:] == [["a"], ["b", "c"]]
    place.post.abandon()
    place.transport.sent[3].on_published(published)
    await asyncio.sleep(0.01)
    assert len(place.sent) == 4
    assert not place.heard.others
    assert not place.heard.acknowledged
    await place.post.close()


async def test_where_the_broker_takes_no_message_of_the_size_each_goes_alone_and_later_ones_are_smaller(
    place: Place,
) -> None:
    ids = [str(number) for number in range(10)]
    place.reply(*ids, body=b"1" * 1000)
    await asyncio.sleep(0)
    size = len(place.transport.sent[1].body)
    place.transport.sent[1].on_published(Published.TOO_LARGE)
    assert place.sent[2:] == [[it] for it in ids[1:]]
    place.transport.sent[2].on_published(Published.TOO_LARGE)
    assert place.heard.others == [("1", Published.TOO_LARGE, 1000)]
    already = len(place.sent)
    place.reply(*ids, body=b"1" * 1000)
    await asyncio.sleep(0)
    assert max(len(it.body) for it in place.transport.sent[already:]) <= size // 2


async def test_direct_reply_to_is_never_mandatory(place: Place) -> None:
    place.reply("a", "b", "c", reply_to="amq.rabbitmq.reply-to.x")
    await asyncio.sleep(0)
    assert [it.mandatory for it in place.transport.sent] == [False, False]


async def test_errors_go_with_results(place: Place) -> None:
    place.reply("a")
    place.post.post(Run("b"), ERROR, b'{"code":"X"}')  # type: ignore[arg-type]
    place.reply("c")
    await asyncio.sleep(0)
    assert [(it.kind, it.body) for it in read(place.transport.sent[1])] == [(ERROR, b'{"code":"X"}'), (RESULT, b"1")]
