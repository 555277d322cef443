"""How many calls a service wants in one message, and which messages its worker keeps back."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Iterator

import pytest

from rpcq.calls import slots as module
from rpcq.calls.carrier import Carrier
from rpcq.calls.slots import FEW, KEPT, MOST, SHARE, Slots
from rpcq.transport.base import Delivery


class Broker:
    """Delivers messages while fewer than `prefetch` are not acknowledged; each is the number of calls in it."""

    def __init__(self, prefetch: int = 100, *, batching: bool = True) -> None:
        self.slots = Slots(prefetch, batching=batching)
        self.queue: deque[int] = deque()
        self.in_hand: deque[tuple[Delivery, Carrier, int]] = deque()
        self.session = 0
        self.acknowledged: list[int] = []
        self.tags = 0
        self.unacknowledged = 0
        self.most_held = 0

    def settle(self, tag: int, accept: bool, requeue: bool) -> None:
        assert accept
        assert not requeue
        self.acknowledged.append(tag)
        self.unacknowledged -= 1

    def deliver(self) -> None:
        """Deliver what may be delivered."""
        while self.queue and self.unacknowledged < self.slots.prefetch:
            calls = self.queue.popleft()
            self.tags += 1
            self.unacknowledged += 1
            delivery = Delivery(self, self.tags, False, b"", b"body", 4)
            self.slots.took(delivery, calls)
            self.session = self.slots.session
            self.slots.held += calls
            self.in_hand.append((delivery, Carrier(delivery, calls), calls))
            self.most_held = max(self.most_held, self.slots.held)

    def finish(self, ms: float = 0.01) -> None:
        """The calls of the first message have ended."""
        _, carrier, calls = self.in_hand.popleft()
        for _ in range(calls):
            self.slots.ended(ms)
            self.slots.held -= self.session == self.slots.session
            self.slots.settled(carrier)

    def work(self, messages: int, *, calls: int | None = None, ms: float = 0.01) -> None:
        """Messages with as many calls as the service takes, or with this number, are worked off while more wait."""
        for _ in range(messages):
            while len(self.queue) < self.slots.prefetch:
                self.queue.append(max(1, self.slots.takes) if calls is None else calls)
            self.deliver()
            self.finish(ms)

    def look(self, calls: int = 12, *, messages: int = 10) -> None:
        """Messages with so many calls come and are finished; then the worker looks whether it keeps the others back."""
        for _ in range(messages):
            self.queue.append(calls)
            self.deliver()
            self.finish()
        self.slots._look_again()

    @property
    def kept(self) -> int:
        """Messages that are finished, and not acknowledged."""
        return self.unacknowledged - len(self.in_hand)


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks come when a test says so, and no timer is left."""
    monkeypatch.setattr(module, "LOOK_EVERY", 3600.0)
    made: list[Slots] = []
    init = Slots.__init__

    def keep(self: Slots, prefetch: int, *, batching: bool) -> None:
        made.append(self)
        init(self, prefetch, batching=batching)

    monkeypatch.setattr(Slots, "__init__", keep)
    yield
    for each in made:
        each.close()


async def test_a_service_wants_as_many_as_its_handlers_do_in_two_milliseconds() -> None:
    broker = Broker()
    slots = broker.slots
    assert slots.takes == 0  # nothing is known of them
    slots.ended(0.1)
    assert slots.takes == 2
    broker.work(500)
    assert slots.takes == 100 // SHARE
    for mean, takes in ((0.1, 12), (0.25, 8), (0.5, 4), (1.0, 2), (1.5, 0), (20.0, 0)):
        for _ in range(300):
            slots.ended(mean)
        assert slots.takes == takes
    slots.close()
    assert slots.takes == 0


@pytest.mark.parametrize(("prefetch", "batching"), [(100, False), (15, True), (1, True)])
async def test_a_service_without_batching_and_a_worker_with_few_slots_want_each_call_alone(
    prefetch: int, batching: bool
) -> None:
    broker = Broker(prefetch, batching=batching)
    broker.work(500, calls=3)
    assert broker.slots.takes == 0
    assert broker.most_held <= 3 * prefetch


@pytest.mark.parametrize("prefetch", [16, 24, 33, 100, 101, 1000, 5000])
async def test_a_busy_worker_gets_full_messages_and_holds_at_most_twice_its_slots(prefetch: int) -> None:
    broker = Broker(prefetch)
    broker.work(20 * prefetch)
    assert broker.slots.takes == min(prefetch // SHARE, MOST)
    assert prefetch <= broker.slots.held <= broker.most_held <= 2 * prefetch
    assert broker.unacknowledged <= prefetch
    assert broker.acknowledged == sorted(broker.acknowledged)  # what was kept back first goes first


async def test_a_worker_that_is_not_busy_keeps_nothing_back() -> None:
    broker = Broker()
    for _ in range(1000):
        broker.queue.extend([2] * 20)
        broker.deliver()
        while broker.in_hand:
            broker.finish()
    assert (broker.kept, broker.slots.takes) == (0, 2)


@pytest.mark.parametrize("ms", [0.01, 30.0])
async def test_when_clients_send_each_call_alone_again_all_slots_are_used(ms: float) -> None:
    broker = Broker()
    broker.work(500)
    assert broker.kept == 84
    broker.queue.clear()
    broker.queue.extend([1] * 300)
    while broker.queue:
        broker.deliver()
        assert broker.slots.held >= 100 or not broker.queue
        broker.finish(ms)
    assert broker.kept == 0


async def test_when_handlers_stop_ending_the_broker_delivers_until_all_slots_are_used() -> None:
    broker = Broker()
    broker.work(500)
    while broker.in_hand:
        broker.finish()
    assert broker.kept == 84
    broker.queue = deque([1] * 300)
    broker.deliver()  # none of these ends
    assert (broker.kept, broker.slots.held) == (0, 100)


async def test_of_slow_handlers_as_many_run_as_there_are_slots() -> None:
    broker = Broker()
    broker.work(500)
    broker.queue = deque([1] * 300)
    for _ in range(300):
        broker.deliver()
        assert broker.slots.held >= 100 or not broker.queue
        broker.finish(ms=30.0)
    assert broker.slots.takes == 0


async def test_one_slow_handler_among_quick_ones_brings_no_flood() -> None:
    broker = Broker()
    broker.work(500)
    broker.work(1, ms=40.0)
    broker.work(500)
    assert broker.most_held <= 200


async def test_a_call_that_ends_makes_room_if_others_of_its_message_do_not_end() -> None:
    broker = Broker()
    broker.work(500)
    broker.queue = deque([12] * 300)
    broker.deliver()
    hanging = deque(broker.in_hand)
    broker.in_hand.clear()
    for _, carrier, calls in hanging:
        for _ in range(calls - 1):
            broker.slots.held -= 1
            broker.slots.settled(carrier)
    broker.deliver()
    assert broker.slots.held >= 100


@pytest.mark.parametrize("prefetch", [3, 16, 100])
async def test_calls_that_are_turned_away_make_no_room_for_others(prefetch: int) -> None:
    """Its own do not end. If it could go on refusing, it would send all calls of the service back."""
    broker = Broker(prefetch)
    slots = broker.slots
    slots.ended(0.01)
    broker.queue = deque([12] * 1000)
    refused = 0
    for _ in range(1000):
        broker.deliver()
        for delivery, carrier, calls in list(broker.in_hand):
            if slots.held > slots.most_held and delivery.tag > prefetch // 2:
                broker.in_hand.remove((delivery, carrier, calls))
                refused += 1
                for _ in range(calls):
                    slots.held -= 1
                    slots.settled(carrier)
    assert refused <= 2 * prefetch


async def test_what_is_kept_back_has_no_body() -> None:
    broker = Broker()
    broker.work(500)
    assert {it.body for it in broker.slots._kept} == {None}


async def test_what_nobody_follows_is_acknowledged_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)
    broker = Broker()
    broker.work(500)
    while broker.in_hand:
        broker.finish()
    broker.queue.clear()
    assert broker.kept == 84
    async with asyncio.timeout(10):
        while broker.kept:  # noqa: ASYNC110 - an acknowledgement sets no event
            await asyncio.sleep(0.01)
    assert sorted(broker.acknowledged) == list(range(1, broker.tags + 1))


def emptied() -> Broker:
    """One whose worker has nothing more to do, and has kept back what it may."""
    broker = Broker()
    broker.work(500)
    while broker.in_hand:
        broker.finish()
    broker.queue.clear()
    broker.look()
    assert broker.kept == 84
    return broker


@pytest.mark.parametrize(("calls", "kept"), [(12, 84), (6, 84), (5, 73), (2, 0)])
async def test_what_was_kept_back_stays_so_while_messages_come_that_are_at_least_half_full(
    calls: int, kept: int
) -> None:
    assert calls > FEW or not kept
    broker = emptied()
    broker.look(calls)
    assert broker.kept == kept


async def test_while_messages_are_less_than_half_full_less_is_kept_back_little_by_little() -> None:
    broker = emptied()
    kept = []
    for _ in range(20):
        broker.look(3)
        kept.append(broker.kept)
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 73
    assert kept[-1] == kept[-2] > 0
    assert 3 <= broker.slots.takes <= 6


async def test_a_worker_that_gets_a_message_now_and_then_keeps_nothing_back() -> None:
    broker = emptied()
    broker.look(12, messages=1)
    assert broker.kept == 0


async def test_a_busy_worker_acknowledges_even_if_its_calls_do_not_end() -> None:
    broker = Broker()
    broker.work(500)
    broker.deliver()
    for _ in range(10 * KEPT):
        assert broker.slots.held > 100
        broker.slots._look_again()
        broker.deliver()
    assert broker.kept == 0


async def test_nothing_of_an_earlier_session_is_counted_or_acknowledged() -> None:
    broker, after = Broker(), Broker()
    broker.work(500)
    slots, settled = broker.slots, len(broker.acknowledged) + len(broker.in_hand)
    slots.took(Delivery(after, 1, True, b"", b"", 0), 1)
    slots.held += 1
    assert slots.takes == 2  # nothing is kept back
    while broker.in_hand:
        broker.finish()
    assert len(broker.acknowledged) == settled  # the transport drops those of a session that is lost
    after.slots, after.tags, after.unacknowledged = slots, 1, 1
    after.queue = deque([1] * 300)
    after.deliver()
    assert slots.held == 100


async def test_a_worker_that_stops_acknowledges_what_it_kept_back_when_its_consumers_are_cancelled() -> None:
    broker = Broker()
    broker.work(500)
    kept = broker.kept
    broker.slots.close()
    while broker.in_hand:
        broker.finish()
    assert broker.kept == kept
    broker.slots.release()
    assert broker.kept == broker.unacknowledged == 0


async def test_a_message_is_settled_once_for_each_of_its_calls() -> None:
    carrier = Carrier(Delivery(Broker(), 1, False, b"", b"", 0), 2)
    assert [carrier.let_go(), carrier.let_go()] == [False, True]
    with pytest.raises(RuntimeError, match="more requests"):
        carrier.let_go()


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_comes_no_slot_is_free_while_messages_wait_and_all_is_acknowledged(seed: int) -> None:
    rng = random.Random(seed)
    prefetch = rng.choice([16, 40, 100, 256])
    broker = Broker(prefetch)
    for _ in range(60):
        ms = rng.choice([0.001, 0.1, 0.3, 5.0])
        style = rng.choice(["told", "alone", "mixed"])
        for _ in range(rng.randrange(200)):
            while len(broker.queue) < prefetch:
                told = max(1, broker.slots.takes)
                broker.queue.append({"told": told, "alone": 1, "mixed": rng.randint(1, told)}[style])
            broker.deliver()
            assert broker.slots.held >= prefetch
            assert broker.slots.held <= broker.slots.most_held
            assert broker.unacknowledged <= prefetch
            broker.in_hand.rotate(rng.randrange(3))
            broker.finish(ms)
    while broker.in_hand:
        broker.finish()
        broker.deliver()
    broker.slots.release()
    assert sorted(broker.acknowledged) == list(range(1, broker.tags + 1))
