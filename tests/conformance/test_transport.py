"""The seam: what a client or a worker may ask of a transport, on both transports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import replace
from typing import Any

import aio_pika
import pytest
from aio_pika.exceptions import ChannelClosed

from rpcq.errors import BrokerError, ResourceLocked, TopologyMismatch
from rpcq.transport.base import Delivery, Message, Published
from rpcq.wire.properties import Properties, decode, encode
from rpcq.wire.replies import Notice, read_reply
from rpcq.wire.requests import RequestEncoder
from rpcq.wire.topology import Queue
from support.broker import Setup
from support.broker import broker as a_broker
from support.seam import SECONDS, End, Seam, taken, until

TTL_MS = 200


def deaths(letter: Delivery) -> list[dict[str, Any]]:
    headers = decode(letter.properties).headers or {}
    found = headers.get("x-death", [])
    assert isinstance(found, list)
    return found


def is_4_3(seam: Seam, request: pytest.FixtureRequest) -> bool:
    """Whether the broker behaves as RabbitMQ does from 4.3 on."""
    return not seam.in_memory and request.getfixturevalue("broker").release >= (4, 3)


# Publishing.


async def test_a_message_that_has_a_queue_is_confirmed_and_arrives_with_its_properties(seam: Seam) -> None:
    async with seam.opened(seam.queue()) as end:
        properties = {
            "content_type": b"text/plain",
            "headers": {"x-one": "1", "x-two": 2, "x-bytes": b"\xce\x00"},
            "delivery_mode": 1,
            "priority": 3,
            "correlation_id": b"\x00\xffid",
            "reply_to": b"nowhere",
            "message_id": b"m",
            "timestamp": 1_700_000_000,
            "type": b"t",
            "app_id": b"a",
        }
        assert await end.sent(end.names[0], b"body", **properties) is Published.CONFIRMED
        delivery = await end.inbox.next()
        assert (delivery.body, delivery.body_size, delivery.redelivered) == (b"body", 4, False)
        assert decode(delivery.properties) == Properties(**properties)
        delivery.ack()


async def test_a_message_that_no_queue_is_bound_for_is_returned_if_it_is_mandatory(seam: Seam) -> None:
    async with seam.opened(seam.queue(key="bound")) as end:
        nowhere = f"{seam.namespace}.nowhere"
        assert await end.sent(nowhere, b"x") is Published.RETURNED
        assert await end.sent(nowhere, b"") is Published.RETURNED
        assert await end.sent("unbound", exchange=seam.requests.name) is Published.RETURNED
        assert await end.sent("bound", b"y", exchange=seam.requests.name) is Published.CONFIRMED
        assert (await end.inbox.next()).body == b"y"


async def test_a_message_that_no_queue_is_bound_for_is_confirmed_if_it_is_not_mandatory(seam: Seam) -> None:
    async with seam.opened() as end:
        assert await end.sent(f"{seam.namespace}.nowhere", b"x", mandatory=False) is Published.CONFIRMED
        assert await end.sent("unbound", exchange=seam.requests.name, mandatory=False) is Published.CONFIRMED


async def test_each_of_many_messages_gets_its_own_outcome(seam: Seam) -> None:
    async with seam.opened(seam.queue()) as end:
        nowhere, somewhere = f"{seam.namespace}.nowhere", end.names[0]
        same_id = b"the same"  # the transport must still distinguish them
        outcomes = [
            (at % 3 == 0, end.publish(nowhere if at % 3 == 0 else somewhere, b"%d" % at, correlation_id=same_id))
            for at in range(600)
        ]
        for lost, outcome in outcomes:
            async with asyncio.timeout(SECONDS):
                assert await outcome is (Published.RETURNED if lost else Published.CONFIRMED)
        await end.barrier()
        assert end.inbox.bodies == [b"%d" % at for at in range(600) if at % 3]


async def test_of_messages_with_the_same_key_and_id_only_the_mandatory_ones_are_returned(seam: Seam) -> None:
    async with seam.opened() as end:
        nowhere = f"{seam.namespace}.nowhere"
        same: dict[str, Any] = {"correlation_id": b"same"}
        outcomes = [end.publish(nowhere, b"x", mandatory=bool(at % 2), **same) for at in range(20)]
        async with asyncio.timeout(SECONDS):
            published = await asyncio.gather(*outcomes)
        assert published == [Published.CONFIRMED, Published.RETURNED] * 10


async def test_a_full_queue_refuses_messages_until_there_is_room(seam: Seam) -> None:
    full = seam.queue(x_max_length=3, x_overflow="reject-publish")
    async with seam.opened(taken(full, prefetch=1)) as end:
        name = end.names[0]
        assert await end.sent(name, b"held") is Published.CONFIRMED
        held = await end.inbox.next()
        assert [await end.sent(name, b"%d" % at) for at in range(5)] == [Published.CONFIRMED] * 3 + [
            Published.REFUSED
        ] * 2
        held.ack()
        first = await end.inbox.next()
        assert first.body == b"0"
        assert await end.sent(name, b"late") is Published.CONFIRMED
        assert await end.sent(name, b"later") is Published.REFUSED
        while first.body != b"late":
            first.ack()
            first = await end.inbox.next()
        assert end.inbox.bodies == [b"held", b"0", b"1", b"2", b"late"]


@pytest.mark.parametrize("when", ["before the start", "after the end"])
async def test_a_message_that_is_published_before_start_or_after_close_is_unsent_at_once(seam: Seam, when: str) -> None:
    end = seam.end()
    if when == "after the end":
        await end.start()
        await end.transport.close()
    outcome = end.publish("nowhere", b"x")
    assert outcome.done()
    assert outcome.result() is Published.UNSENT
    assert not end.transport.can_publish
    await end.transport.close()
    assert end.published == [Published.UNSENT]


async def test_publishers_wait_above_the_high_water_mark_and_go_on(seam: Seam) -> None:
    async with seam.opened(taken(seam.queue(), no_ack=True)) as end:
        await end.transport.writable()
        body, outcomes = b"x" * 1024, []
        while end.transport.can_publish:
            outcomes.append(end.publish(end.names[0], body))
            assert len(outcomes) < 100_000
        async with asyncio.timeout(SECONDS):
            await end.transport.writable()
            assert end.transport.can_publish
            assert set(await asyncio.gather(*outcomes)) == {Published.CONFIRMED}
        await until(lambda: len(end.inbox.all) == len(outcomes))


# Bodies.


@pytest.mark.parametrize("size", [0, 1, 131_064, 131_065, 262_128, 1024 * 1024])
async def test_a_body_of_any_size_arrives_intact_and_so_does_the_next(seam: Seam, size: int) -> None:
    body = (os.urandom(4096) * (size // 4096 + 1))[:size]
    async with seam.opened(seam.queue()) as end:
        for sent in (body, b"next"):
            assert await end.sent(end.names[0], sent) is Published.CONFIRMED
        whole, after = await end.inbox.next(), await end.inbox.next()
        assert whole.body == body
        assert (whole.body_size, after.body) == (size, b"next")


async def test_a_large_body_that_is_returned_does_not_disturb_later_messages(seam: Seam) -> None:
    async with seam.opened(seam.queue()) as end:
        returned = end.publish(f"{seam.namespace}.nowhere", b"\xce" * 400_000)
        assert await end.sent(end.names[0], b"next") is Published.CONFIRMED
        assert returned.result() is Published.RETURNED
        assert (await end.inbox.next()).body == b"next"


@pytest.mark.parametrize("size", [1001, 131_064, 400_000])
async def test_a_body_over_the_limit_is_delivered_as_its_size_only_and_can_be_settled(seam: Seam, size: int) -> None:
    async with seam.opened(taken(seam.queue(), prefetch=1), max_body=1000) as end:
        for sent in (b"x" * size, b"y" * 1000):
            assert await end.sent(end.names[0], sent, type=b"t") is Published.CONFIRMED
        over = await end.inbox.next()
        assert (over.body, over.body_size, decode(over.properties).type) == (None, size, b"t")
        over.ack()
        assert (await end.inbox.next()).body == b"y" * 1000


# Consuming and settling.


async def test_messages_come_in_the_order_in_which_they_were_published(seam: Seam) -> None:
    async with seam.opened(seam.queue()) as end, seam.opened() as other:
        bodies = [b"%d" % at for at in range(1000)]
        for at, body in enumerate(bodies):
            other.publish(end.names[0], body)
            if at % 100 == 0:
                await asyncio.sleep(0)  # several writes
        for body in bodies:
            delivery = await end.inbox.next()
            assert delivery.body == body
            delivery.ack()


async def test_prefetch_limits_what_a_consumer_holds_and_an_ack_makes_room_for_one_more(seam: Seam) -> None:
    async with seam.opened(taken(seam.queue(), prefetch=3)) as end:
        for at in range(8):
            assert await end.sent(end.names[0], b"%d" % at) is Published.CONFIRMED
        await end.barrier()
        assert end.inbox.bodies == [b"0", b"1", b"2"]
        end.inbox.all[1].ack()
        await until(lambda: len(end.inbox.all) == 4)
        await end.barrier()
        assert end.inbox.bodies == [b"0", b"1", b"2", b"3"]
        end.inbox.all[0].reject()
        end.inbox.all[3].ack()
        await until(lambda: len(end.inbox.all) == 6)
        await end.barrier()
        assert end.inbox.bodies == [b"%d" % at for at in range(6)]


async def test_each_consumer_of_a_transport_has_its_own_prefetch(seam: Seam) -> None:
    async with seam.opened(taken(seam.queue("a"), prefetch=1), taken(seam.queue("b"), prefetch=2)) as end:
        for name in end.names[:2]:
            for _ in range(3):
                assert await end.sent(name, name.encode()) is Published.CONFIRMED
        await end.barrier()
        assert [len(inbox.all) for inbox in end.inboxes] == [1, 2]
        assert all(body == end.names[at].encode() for at in (0, 1) for body in end.inboxes[at].bodies)


async def test_without_acks_all_messages_come_at_once_and_none_comes_twice(seam: Seam) -> None:
    queue = seam.queue(lasts=True)
    async with seam.opened() as other:
        async with seam.opened(taken(queue, no_ack=True)) as end:
            for at in range(20):
                assert await other.sent(queue.name, b"%d" % at) is Published.CONFIRMED
            await until(lambda: len(end.inbox.all) == 20)
        async with seam.opened(queue) as later:
            assert await other.sent(queue.name, b"last") is Published.CONFIRMED
            last = await later.inbox.next()
            assert (last.body, last.redelivered) == (b"last", False)


async def test_a_message_that_is_rejected_with_requeue_comes_again_flagged_as_redelivered(seam: Seam) -> None:
    async with seam.opened(seam.queue()) as end:
        assert await end.sent(end.names[0], b"x", type=b"t") is Published.CONFIRMED
        first = await end.inbox.next()
        assert not first.redelivered
        first.reject(requeue=True)
        second = await end.inbox.next()
        assert (second.body, second.redelivered, decode(second.properties).type) == (b"x", True, b"t")
        assert second.tag != first.tag
        second.ack()


async def test_what_is_given_back_counts_as_a_return_up_to_rabbitmq_4_2(
    seam: Seam, request: pytest.FixtureRequest
) -> None:
    """From 4.3 on, it counts as acquired only. The in-process broker counts as earlier versions do."""
    counts_less = is_4_3(seam, request)
    queue = seam.queue(lasts=True, x_queue_type="quorum", x_delivery_limit=20)
    async with seam.opened(queue) as end:
        assert await end.sent(queue.name, b"x") is Published.CONFIRMED
        (await end.inbox.next()).reject(requeue=True)
        copy = await end.inbox.next()
        headers = decode(copy.properties).headers or {}
        counts = tuple(headers.get(name, 0) for name in ("x-delivery-count", "x-acquired-count"))
        assert counts == ((0, 1) if counts_less else (1, 0))
        assert copy.redelivered
        copy.ack()


async def test_a_quorum_queue_counts_from_0_what_comes_as_a_dead_letter_up_to_rabbitmq_4_2(
    seam: Seam, request: pytest.FixtureRequest
) -> None:
    """From 4.3 on, it counts on from what the letter brings. The in-process broker counts as earlier versions do."""
    name = f"{seam.namespace}.again"
    more = {"x_dead_letter_exchange": "", "x_dead_letter_routing_key": name}
    queue = seam.queue("again", lasts=True, x_queue_type="quorum", x_delivery_limit=1, **more)
    assert queue.name == name
    async with seam.opened(queue) as end:
        assert await end.sent(name, b"x") is Published.CONFIRMED
        (await end.inbox.next()).reject()
        letter = await end.inbox.next()
        assert [(death["reason"], death["count"]) for death in deaths(letter)] == [("rejected", 1)]
        times = end.of("consuming").count("up")
        end.cut_one("consuming")
        await until(lambda: end.of("consuming").count("up") > times)
        assert await end.sent(name, b"y") is Published.CONFIRMED
        # Over the limit, it would come to its own queue without a rejection since: RabbitMQ drops that.
        later = await end.inbox.next()
        assert later.body == (b"y" if is_4_3(seam, request) else b"x")


async def test_a_message_that_is_rejected_without_requeue_comes_back_as_a_dead_letter(seam: Seam) -> None:
    queue = seam.requests_queue("things")
    async with seam.opened(queue) as worker, seam.opened(seam.own_queue()) as caller:
        cc = {"CC": [caller.names[0]]}
        assert await caller.sent("things", b"x", exchange=seam.requests.name, headers=cc) is Published.CONFIRMED
        delivery = await worker.inbox.next()
        await caller.barrier()
        assert not caller.inbox.all, "the caller got a copy while the request was on its way"
        delivery.reject()
        letter = await caller.inbox.next()
        assert letter.body == b"x"
        assert [(death["reason"], death["queue"]) for death in deaths(letter)] == [("rejected", queue.name)]


@pytest.mark.parametrize(
    "settlements",
    [("ack", "ack"), ("ack", "reject"), ("reject", "ack"), ("reject", "reject")],
    ids="-then-".join,
)
async def test_settling_twice_is_an_error_and_does_no_harm(seam: Seam, settlements: tuple[str, str]) -> None:
    async with seam.opened(seam.queue()) as end:
        assert await end.sent(end.names[0], b"x") is Published.CONFIRMED
        delivery = await end.inbox.next()
        getattr(delivery, settlements[0])()
        with pytest.raises(RuntimeError, match="settled before"):
            getattr(delivery, settlements[1])()
        await end.barrier()
        assert await end.sent(end.names[0], b"next") is Published.CONFIRMED
        assert (await end.inbox.next()).body == b"next"
        assert "lost" not in end.of("consuming")


async def test_an_acknowledged_message_is_gone_and_another_goes_to_the_next_consumer(seam: Seam) -> None:
    queue = seam.queue(lasts=True)
    async with seam.opened() as other:
        async with seam.opened(queue) as first:
            for body in (b"done", b"held"):
                assert await other.sent(queue.name, body) is Published.CONFIRMED
            (await first.inbox.next()).ack()
            await first.inbox.next()
        async with seam.opened(queue) as second:
            copy = await second.inbox.next()
            assert (copy.body, copy.redelivered) == (b"held", True)
            await second.barrier()
            assert len(second.inbox.all) == 1


async def test_after_stop_consuming_nothing_is_delivered_and_earlier_deliveries_can_be_acknowledged(seam: Seam) -> None:
    queue = seam.queue(lasts=True)
    async with seam.opened() as other:
        async with seam.opened(taken(queue, prefetch=10)) as stopping:
            assert await other.sent(queue.name, b"before") is Published.CONFIRMED
            delivery = await stopping.inbox.next()
            async with asyncio.timeout(SECONDS):
                await stopping.transport.stop_consuming()
            assert await other.sent(queue.name, b"after") is Published.CONFIRMED
            async with seam.opened(queue) as next_one:
                taken_over = await next_one.inbox.next()
                assert (taken_over.body, taken_over.redelivered) == (b"after", False)
                taken_over.ack()
            delivery.ack()
            assert await stopping.sent(queue.name, b"still publishes") is Published.CONFIRMED
            assert stopping.inbox.bodies == [b"before"]
        async with seam.opened(queue) as last:
            assert (await last.inbox.next()).body == b"still publishes"
            await last.barrier()
            assert len(last.inbox.all) == 1, "a message that was acknowledged after stop_consuming came again"


async def test_a_session_that_is_lost_after_stop_consuming_does_not_consume_again(seam: Seam) -> None:
    queue = seam.queue(lasts=True)
    async with seam.opened() as other, seam.opened(queue) as stopping:
        async with asyncio.timeout(SECONDS):
            await stopping.transport.stop_consuming()
        stopping.cut()
        # A transport may or may not open the consuming session again; the in-process one does not.
        await until(lambda: stopping.of("publishing") == ["up", "lost", "up"])
        if not seam.in_memory:
            await until(lambda: stopping.of("consuming") == ["up", "lost", "up"])
        assert await other.sent(queue.name, b"x") is Published.CONFIRMED
        async with seam.opened(queue) as next_one:
            taken_over = await next_one.inbox.next()
            assert (taken_over.body, taken_over.redelivered) == (b"x", False)
        assert not stopping.inbox.all


# A single active consumer.


@pytest.fixture(params=["classic", "quorum"])
def single(request: pytest.FixtureRequest, seam: Seam) -> Queue:
    more = {"x_queue_type": "quorum", "x_delivery_limit": 20} if request.param == "quorum" else {}
    return seam.queue(lasts=True, x_single_active_consumer=True, **more)


async def test_only_the_first_consumer_gets_messages_and_the_others_follow_in_the_order_in_which_they_came(
    seam: Seam, single: Queue
) -> None:
    async with seam.opened() as sender, contextlib.AsyncExitStack() as stack:
        ends = [await stack.enter_async_context(seam.opened(taken(single, prefetch=2))) for _ in range(3)]
        for at in range(3):
            for number in range(2):
                assert await sender.sent(single.name, b"%d%d" % (at, number)) is Published.CONFIRMED
            for end in ends[at:]:
                await end.barrier()
            assert [len(end.inbox.all) for end in ends] == [2] * (at + 1) + [0] * (2 - at)
            for _ in range(2):
                (await ends[at].inbox.next()).ack()
            await ends[at].transport.stop_consuming()
    assert [end.inbox.bodies for end in ends] == [[b"00", b"01"], [b"10", b"11"], [b"20", b"21"]]


async def test_the_single_active_consumer_holds_up_the_queue_at_its_prefetch(seam: Seam, single: Queue) -> None:
    async with seam.opened(taken(single, prefetch=1)) as active, seam.opened(taken(single, prefetch=10)) as waiting:
        for body in (b"a", b"b"):
            assert await active.sent(single.name, body) is Published.CONFIRMED
        (await active.inbox.next()).ack()
        (await active.inbox.next()).ack()
        await waiting.barrier()
        assert not waiting.inbox.all


async def test_a_consumer_that_is_cancelled_with_messages_in_hand_is_followed_at_once(
    seam: Seam, single: Queue
) -> None:
    """This is why a worker has to finish what it holds before it cancels, where the order matters."""
    async with seam.opened(taken(single, prefetch=1)) as active, seam.opened(taken(single, prefetch=1)) as waiting:
        assert await active.sent(single.name, b"held") is Published.CONFIRMED
        held = await active.inbox.next()
        await active.transport.stop_consuming()
        # A classic queue of RabbitMQ 3.10 gives the follower what is ready only when something else happens to it.
        assert await active.sent(single.name, b"next") is Published.CONFIRMED
        assert (await waiting.inbox.next()).body == b"next"
        held.reject(requeue=True)
        waiting.inbox.all[0].ack()
        copy = await waiting.inbox.next()
        assert (copy.body, copy.redelivered) == (b"held", True)


async def test_the_follower_of_a_lost_consumer_gets_first_what_that_one_held(seam: Seam, single: Queue) -> None:
    async with seam.opened(taken(single, prefetch=2)) as active, seam.opened(taken(single, prefetch=10)) as waiting:
        for at in range(4):
            assert await waiting.sent(single.name, b"%d" % at) is Published.CONFIRMED
        for _ in range(2):
            await active.inbox.next()
        active.cut_one("consuming")
        got = [await waiting.inbox.next() for _ in range(4)]
        assert [(it.body, it.redelivered) for it in got] == [
            (b"0", True),
            (b"1", True),
            (b"2", False),
            (b"3", False),
        ]
        await until(lambda: active.of("consuming") == ["up", "lost", "up"])
        assert await waiting.sent(single.name, b"4") is Published.CONFIRMED
        assert (await waiting.inbox.next()).body == b"4"
        await active.barrier()
        assert len(active.inbox.all) == 2, "who came back is the last in the order"


async def test_a_queue_with_a_single_active_consumer_is_another_queue_than_one_without(
    seam: Seam, single: Queue
) -> None:
    arguments = {name: value for name, value in single.arguments.items() if name != "x-single-active-consumer"}
    async with seam.opened(single):
        other = seam.end(replace(single, arguments=arguments))
        with pytest.raises(TopologyMismatch, match="x-single-active-consumer"):
            await other.start()
        await other.transport.close()


async def test_rabbitmq_refuses_to_get_from_a_queue_with_a_single_active_consumer(
    rabbitmq_url: str, namespace: str
) -> None:
    """The in-process broker cannot get at all: what looks at such a queue has to consume it."""
    seam = Seam(rabbitmq_url, namespace)
    arguments = {"x_queue_type": "quorum", "x_delivery_limit": 20, "x_single_active_consumer": True}
    single = seam.queue(lasts=True, **arguments)
    async with seam.opened(single), await aio_pika.connect(rabbitmq_url) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue(single.name)
        with pytest.raises(ChannelClosed, match="RESOURCE_LOCKED"):
            await queue.get()
        await (await connection.channel()).queue_delete(single.name)


# Dead letters.


@pytest.mark.parametrize("quorum", [False, True], ids=["classic", "quorum"])
async def test_a_request_that_expires_comes_back_to_its_caller_and_not_before(seam: Seam, quorum: bool) -> None:
    queue = seam.requests_queue("things", quorum=quorum)
    async with seam.opened(taken(queue, prefetch=1)) as worker, seam.opened(seam.own_queue()) as caller:
        name = caller.names[0]
        assert await caller.sent("things", exchange=seam.requests.name) is Published.CONFIRMED
        await worker.inbox.next()  # held, so that the next one waits
        encoder = RequestEncoder(name, "tests")
        raw = encoder.encode(b"an id", b"method", TTL_MS, int(time.time() * 1000) + TTL_MS, b"", notify=True)
        outcome = asyncio.get_running_loop().create_future()
        began = time.monotonic()
        caller.transport.publish(
            Message(seam.requests.name.encode(), b"things", b"an id", raw, b"{}", outcome.set_result)
        )
        async with asyncio.timeout(SECONDS):
            assert await outcome is Published.CONFIRMED
        await caller.barrier()
        if time.monotonic() - began < 0.8 * TTL_MS / 1000:  # otherwise this machine is too slow to check it
            assert not caller.inbox.all
        letter = await caller.inbox.next()
        # The expiry is set a tenth before the deadline; the broker counts whole milliseconds.
        assert 0.9 * TTL_MS / 1000 - 0.005 <= time.monotonic() - began < SECONDS
        assert read_reply(letter.properties, letter.body, name.encode()) == Notice(b"an id", "expired", queue.name)
        assert letter.body == b"{}"
        found = decode(letter.properties)
        assert (found.expiration, found.type, found.reply_to) == (None, b"method", name.encode())
        assert len(worker.inbox.all) == 1


async def test_a_request_that_is_taken_in_time_does_not_expire_while_it_is_in_hand(seam: Seam) -> None:
    queue = seam.requests_queue("things")
    async with seam.opened(queue) as worker, seam.opened(seam.own_queue()) as caller:
        cc = {"CC": [caller.names[0]]}
        how: dict[str, Any] = {"exchange": seam.requests.name, "headers": cc}
        assert await caller.sent("things", b"held", expiration=b"50", **how) is Published.CONFIRMED
        held = await worker.inbox.next()
        # The notice of a second request, which expires in a queue without consumers, shows that the time is over.
        unused = seam.queue("unused", lasts=True, x_dead_letter_exchange="")
        async with seam.opened(unused) as declaring:
            await declaring.transport.stop_consuming()
            assert await caller.sent(unused.name, b"waited", expiration=b"200", headers=cc) is Published.CONFIRMED
            for _ in range(2):  # the copy for CC, which comes at once through the default exchange, and the notice
                assert (await caller.inbox.next()).body == b"waited"
        held.ack()
        await caller.barrier()
        assert caller.inbox.bodies == [b"waited", b"waited"]


async def test_a_request_of_a_queue_that_delivers_once_comes_back_when_its_consumer_is_lost(seam: Seam) -> None:
    queue = seam.requests_queue("things", quorum=True)
    async with seam.opened(queue) as worker, seam.opened(seam.own_queue()) as caller:
        cc = {"CC": [caller.names[0]]}
        for body in (b"done", b"held"):
            sent = await caller.sent("things", body, exchange=seam.requests.name, headers=cc)
            assert sent is Published.CONFIRMED
        (await worker.inbox.next()).ack()
        assert (await worker.inbox.next()).body == b"held"
        await worker.barrier()
        worker.cut_one("consuming")
        letter = await caller.inbox.next()
        assert [(death["reason"], death["queue"]) for death in deaths(letter)] == [("delivery_limit", queue.name)]
        assert letter.body == b"held"
        await until(lambda: worker.of("consuming") == ["up", "lost", "up"])
        await worker.barrier()
        assert worker.inbox.bodies == [b"done", b"held"], "it was delivered a second time"
        assert caller.inbox.bodies == [b"held"]


async def test_a_classic_queue_gives_the_messages_of_a_lost_consumer_to_the_next_one(seam: Seam) -> None:
    queue = seam.queue()
    async with seam.opened(queue) as first:
        assert await first.sent(queue.name, b"x") is Published.CONFIRMED
        await first.inbox.next()
        async with seam.opened(queue) as second:
            first.cut_one("consuming")
            copy = await second.inbox.next()
            assert (copy.body, copy.redelivered) == (b"x", True)
            copy.ack()


@pytest.mark.long
@pytest.mark.timeout(240)
async def test_rabbitmq_keeps_what_no_queue_takes_as_a_dead_letter_until_one_does(namespace: str) -> None:
    """The in-process broker drops it. RabbitMQ tries again after 180 s, or what is set here."""
    with a_broker(setup=Setup()) as own:
        own.ctl("eval", "application:set_env(rabbit, dead_letter_worker_publisher_confirm_timeout, 2000).")
        seam = Seam(own.url, namespace)
        letters = seam.queue("letters")
        arguments = {
            "x_queue_type": "quorum",
            "x_delivery_limit": 20,
            "x_dead_letter_exchange": "",
            "x_dead_letter_routing_key": letters.name,
            "x_dead_letter_strategy": "at-least-once",
            "x_overflow": "reject-publish",
        }
        queue = seam.queue(lasts=True, **arguments)
        async with seam.opened(queue) as end:
            assert await end.sent(queue.name, b"x") is Published.CONFIRMED
            (await end.inbox.next()).reject()
            await end.barrier()
            async with seam.opened(letters) as reader:
                assert (await reader.inbox.next()).body == b"x"


# Queues.


async def test_queues_named_by_the_broker_differ_and_are_deleted_with_their_transport(seam: Seam) -> None:
    async with seam.opened() as other:
        async with seam.opened(seam.own_queue(), seam.own_queue()) as one, seam.opened(seam.own_queue()) as two:
            names = [*one.names, *two.names, *other.names]
            assert len(set(names)) == len(names)
            assert all(name.startswith("amq.gen-") for name in names)
            for end, name, inbox in ((one, one.names[1], one.inboxes[1]), (two, two.names[0], two.inbox)):
                assert await other.sent(name, name.encode()) is Published.CONFIRMED
                assert (await inbox.next()).body == name.encode()
                assert sum(len(it.all) for it in end.inboxes) == 1
        for name in (*one.names, *two.names):
            await other.gone(name)


async def test_a_queue_that_exists_with_other_arguments_is_named_and_nothing_is_left_open(seam: Seam) -> None:
    queue = seam.queue(x_max_length=3, x_overflow="reject-publish")
    async with seam.opened(queue) as owner:
        other = seam.end(seam.queue(x_max_length=4, x_overflow="reject-publish"))
        with pytest.raises(TopologyMismatch, match=queue.name) as caught:
            await other.start()
        assert caught.value.permanent
        assert not other.transport.can_publish
        assert other.publish(queue.name).result() is Published.UNSENT
        await other.transport.close()
        assert "up" not in other.of("consuming")
        assert await owner.sent(queue.name, b"x") is Published.CONFIRMED
        assert (await owner.inbox.next()).body == b"x"


async def test_an_exclusive_queue_is_refused_to_another_transport(seam: Seam) -> None:
    queue = Queue(f"{seam.namespace}.own", exclusive=True, auto_delete=True)
    async with seam.opened(queue) as owner:
        other = seam.end(queue)
        with pytest.raises(ResourceLocked, match="RESOURCE_LOCKED"):
            await other.start()
        await other.transport.close()
        assert await owner.sent(queue.name, b"x") is Published.CONFIRMED
        assert (await owner.inbox.next()).body == b"x"


# Sessions.


async def test_the_publishing_session_is_up_first_and_closing_is_not_reported(seam: Seam) -> None:
    async with seam.opened(seam.queue()) as end:
        assert end.events == [("publishing", "up"), ("consuming", "up")]
        assert len(end.names) == 2
    assert end.events == [("publishing", "up"), ("consuming", "up")]


async def test_both_sessions_come_back_after_a_cut_with_a_new_queue_name(seam: Seam) -> None:
    async with seam.opened(seam.queue(), seam.own_queue()) as end, seam.opened() as other:
        shared, own = end.names[:2]
        end.cut()
        await end.back()
        assert end.of("consuming") == ["up", "lost", "up"]
        assert end.of("publishing") == ["up", "lost", "up"]
        assert all(isinstance(cause, BrokerError) for cause in end.causes)
        assert end.names[0] == shared
        assert end.names[1] != own
        await other.gone(own)
        assert await end.sent(end.names[1], b"own") is Published.CONFIRMED
        assert await end.sent(shared, b"shared") is Published.CONFIRMED
        assert (await end.inboxes[1].next()).body == b"own"
        assert (await end.inbox.next()).body == b"shared"
        assert "lost" not in other.of("consuming")


@pytest.mark.parametrize("session", ["consuming", "publishing"])
async def test_the_loss_of_one_session_does_not_affect_the_other(seam: Seam, session: str) -> None:
    async with seam.opened(taken(seam.own_queue(), no_ack=True)) as end:
        name = end.names[0]
        end.cut_one(session)
        await until(lambda: end.of(session) == ["up", "lost", "up"])
        other = "publishing" if session == "consuming" else "consuming"
        assert end.of(other) == ["up"]
        assert (end.names[0] == name) == (session == "publishing")
        assert await end.sent(end.names[0], b"x") is Published.CONFIRMED
        assert (await end.inbox.next()).body == b"x"


async def test_sessions_come_back_again_and_again(seam: Seam) -> None:
    async with seam.opened(seam.queue()) as end:
        for times in range(2, 5):
            end.cut()
            await end.back(times)
        assert await end.sent(end.names[0], b"x") is Published.CONFIRMED
        assert (await end.inbox.next()).body == b"x"


async def test_settling_a_delivery_of_a_lost_session_does_no_harm(seam: Seam) -> None:
    queue = seam.queue(lasts=True)
    async with seam.opened(queue) as end:
        for at in range(4):
            assert await end.sent(queue.name, b"%d" % at) is Published.CONFIRMED
        old = [await end.inbox.next() for _ in range(4)]
        end.cut_one("consuming")
        await until(lambda: end.of("consuming") == ["up", "lost", "up"])
        new = [await end.inbox.next() for _ in range(4)]
        assert [(it.body, it.redelivered) for it in new] == [(b"%d" % at, True) for at in range(4)]
        old[0].ack()
        old[1].reject()
        old[2].reject(requeue=True)
        with pytest.raises(RuntimeError, match="settled before"):
            old[0].ack()
        await end.barrier()
        assert len(end.inbox.all) == 8, "the settlement of a lost session counted"
        for delivery in new:
            delivery.ack()
        await end.barrier()
        assert end.of("consuming") == ["up", "lost", "up"]
    async with seam.opened(queue) as later:
        await later.barrier()
        assert not later.inbox.all


async def test_settling_between_the_sessions_does_no_harm(seam: Seam) -> None:
    queue = seam.queue(lasts=True)
    async with seam.opened(queue) as end:
        assert await end.sent(queue.name, b"x") is Published.CONFIRMED
        delivery = await end.inbox.next()
        end.cut_one("consuming")
        await until(lambda: "lost" in end.of("consuming"))
        delivery.ack()
        copy = await end.inbox.next()
        assert copy.redelivered
        copy.ack()
        await until(lambda: end.of("consuming") == ["up", "lost", "up"])  # the report may come after the first delivery
        await end.barrier()
        assert end.of("consuming") == ["up", "lost", "up"]


async def cut_with_messages_under_way(end: End, key: str, count: int) -> list[asyncio.Future[Published]]:
    """Publish messages that are confirmed, that may be confirmed, and that are published just before the cut."""
    outcomes = []
    for at in range(count):
        outcomes.append(end.publish(key, b"%d" % at))
        if at % 10 == 0:
            await asyncio.sleep(0)
    end.cut_one("publishing")
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*outcomes)
    return outcomes


async def test_unconfirmed_messages_are_reported_as_unsent_or_unknown_when_the_session_is_cut(seam: Seam) -> None:
    async with seam.opened(seam.queue()) as end:
        await end.sent(end.names[0], b"first")
        counts: list[int] = []
        lost = end._lost

        def count_published(session: str, cause: BrokerError) -> None:
            counts.append(len(end.published))
            lost(session, cause)

        end._lost = count_published  # type: ignore[method-assign]
        outcomes = await cut_with_messages_under_way(end, end.names[0], 205)
        await until(lambda: "lost" in end.of("publishing"))
        assert counts == [206], "the session was reported as lost before all its messages were reported"
        published = [outcome.result() for outcome in outcomes]
        assert set(published) <= {Published.CONFIRMED, Published.UNSENT, Published.UNKNOWN}
        assert set(published[201:]) <= {Published.UNSENT, Published.UNKNOWN}  # published just before the cut
        await until(lambda: end.of("publishing") == ["up", "lost", "up"])
        assert await end.sent(end.names[0], b"last") is Published.CONFIRMED
        await until(lambda: end.inbox.bodies[-1:] == [b"last"])
        arrived = set(end.inbox.bodies)
        for at, how in enumerate(published):
            if how is Published.CONFIRMED:
                assert b"%d" % at in arrived
            elif how is Published.UNSENT:
                assert b"%d" % at not in arrived


async def test_a_message_that_was_handed_to_the_socket_and_not_confirmed_is_unknown(seam: Seam) -> None:
    async with seam.opened(seam.queue()) as end:
        outcome = end.publish(end.names[0], b"x")
        asyncio.get_running_loop().call_soon(end.cut_one, "publishing")  # right after this iteration has written
        async with asyncio.timeout(SECONDS):
            # In the in-process broker no time passes between the two.
            assert await outcome is (Published.CONFIRMED if seam.in_memory else Published.UNKNOWN)
        await until(lambda: end.of("publishing") == ["up", "lost", "up"])


async def test_between_the_sessions_messages_are_unsent_and_publishers_wait(seam: Seam) -> None:
    async with seam.opened(seam.queue()) as end:
        end.cut_one("publishing")
        await until(lambda: "lost" in end.of("publishing"))
        assert not end.transport.can_publish
        assert end.publish(end.names[0]).result() is Published.UNSENT
        async with asyncio.timeout(SECONDS):
            await end.transport.writable()
        assert end.of("publishing") == ["up", "lost", "up"]
        assert await end.sent(end.names[0], b"x") is Published.CONFIRMED


# Closing.


async def test_close_writes_what_is_pending_and_reports_every_message(seam: Seam) -> None:
    async with seam.opened(seam.queue()) as other:
        end = seam.end()
        await end.start()
        outcomes = [end.publish(other.names[0], b"%d" % at) for at in range(300)]
        async with asyncio.timeout(SECONDS):
            await end.transport.close()
        assert [outcome.done() for outcome in outcomes] == [True] * 300
        assert {outcome.result() for outcome in outcomes} == {Published.CONFIRMED}
        await until(lambda: len(other.inbox.all) == 300)


async def test_close_reports_the_messages_of_a_lost_session(seam: Seam) -> None:
    async with seam.opened(seam.queue()) as other:
        end = seam.end()
        await end.start()
        outcomes = [end.publish(other.names[0], b"%d" % at) for at in range(50)]
        end.cut()
        async with asyncio.timeout(SECONDS):
            await end.transport.close()
        assert all(outcome.done() for outcome in outcomes)
        assert {outcome.result() for outcome in outcomes} <= {Published.UNSENT, Published.UNKNOWN}
        assert len(end.published) == 50
        assert end.of("consuming").count("up") == 1


@pytest.mark.parametrize("prefetch", [0, 50, 1000])
async def test_acknowledgements_just_before_close_reach_the_broker(seam: Seam, prefetch: int) -> None:
    queue = seam.queue(lasts=True)
    async with seam.opened() as other:
        async with seam.opened(taken(queue, prefetch=prefetch)) as end:
            for _ in range(50):
                assert await other.sent(queue.name, b"x") is Published.CONFIRMED
            for _ in range(50):
                (await end.inbox.next()).ack()
        async with seam.opened(queue) as later:
            await later.barrier()
            assert not later.inbox.all


async def test_an_acknowledgement_that_waits_for_others_is_sent_when_none_come(seam: Seam) -> None:
    queue = seam.queue(lasts=True)
    async with seam.opened(taken(queue, prefetch=1000)) as end:
        for body in (b"a", b"b", b"c"):
            assert await end.sent(queue.name, body) is Published.CONFIRMED
        for _ in range(3):
            (await end.inbox.next()).ack()
        await asyncio.sleep(0.2)
        end.cut_one("consuming")
        await until(lambda: end.of("consuming").count("up") == 2)
        await end.barrier()
        assert len(end.inbox.all) == 3, "it came again"


async def test_an_acknowledgement_after_a_confirm_while_closing_reaches_the_broker(
    seam: Seam,
) -> None:
    queue = seam.queue(lasts=True)
    async with seam.opened(taken(seam.queue("replies"), no_ack=True)) as other:
        async with seam.opened(queue) as end:
            for _ in range(20):
                assert await other.sent(queue.name, b"x") is Published.CONFIRMED
            held = [await end.inbox.next() for _ in range(20)]
            raw, to = encode(Properties(correlation_id=b"c")), other.names[0].encode()
            for delivery in held:  # as a worker does it: inside the callback for the confirm
                reply = Message(b"", to, b"c", raw, b"reply", lambda _, delivery=delivery: delivery.ack())
                end.transport.publish(reply)
        await until(lambda: len(other.inbox.all) == 20)
        async with seam.opened(queue) as later:
            await later.barrier()
            assert not later.inbox.all, "it was replied to, but not acknowledged"


async def test_a_transport_may_be_closed_twice_between_sessions_and_before_its_start(seam: Seam) -> None:
    async with asyncio.timeout(SECONDS):
        await seam.transport().close()
        end = seam.end(seam.queue())
        await end.start()
        end.cut()
        await until(lambda: "lost" in end.of("consuming"))
        await end.transport.close()
        await end.transport.close()
        await end.transport.stop_consuming()
    assert end.of("consuming") == ["up", "lost"]


async def test_properties_arrive_as_they_were_encoded(seam: Seam) -> None:
    raw = encode(Properties(correlation_id=b"c", headers={"x-a": [1, "two", {"three": True}], "x-none": None}))
    async with seam.opened(seam.queue()) as end:
        outcome = asyncio.get_running_loop().create_future()
        end.transport.publish(Message(b"", end.names[0].encode(), b"c", raw, b"", outcome.set_result))
        delivery = await end.inbox.next()
        assert decode(delivery.properties) == decode(raw)
        async with asyncio.timeout(SECONDS):
            assert await outcome is Published.CONFIRMED
