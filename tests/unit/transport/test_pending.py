"""What becomes of published messages, and how deliveries are settled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pamqp.commands import Basic

from rpcq.errors import ProtocolError
from rpcq.transport.base import Outgoing, Published
from rpcq.transport.rabbitmq.frames import Encoder
from rpcq.transport.rabbitmq.pending import Unconfirmed, Unsettled
from support.frames import dozens, frames_of, message

# What becomes of published messages.


class Sent:
    """A message that keeps what became of it."""

    def __init__(self, correlation_id: bytes = b"", *, mandatory: bool = True) -> None:
        self.published: list[Published] = []
        self.mandatory = mandatory
        self.key = (b"math", correlation_id)
        self.outgoing = message(correlation_id=correlation_id, mandatory=mandatory, on_published=self.published.append)


class Confirming(RuleBasedStateMachine):
    """A broker that returns and confirms in any way: also twice, and also messages that were never sent."""

    @initialize()
    def begin(self) -> None:
        self.unconfirmed = Unconfirmed()
        self.sent: list[Sent] = []
        self.waiting: dict[int, Sent] = {}
        self.returns: Counter[tuple[bytes, bytes]] = Counter()
        self.unique = 0

    @rule(count=st.integers(1, 8), twin=st.booleans(), mandatory=st.booleans())
    def send(self, count: int, *, twin: bool, mandatory: bool) -> None:
        for _ in range(count):
            self.unique += 1
            sent = Sent(b"twin" if twin else b"%d" % self.unique, mandatory=mandatory)
            self.unconfirmed.add([sent.outgoing])
            self.sent.append(sent)
            self.waiting[len(self.sent)] = sent

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def return_one(self, data: st.DataObject) -> None:
        waiting = Counter(sent.key for sent in self.waiting.values() if sent.mandatory) - self.returns
        if waiting:
            key = data.draw(st.sampled_from(sorted(waiting)))
            self.unconfirmed.returned(*key)
            self.returns[key] += 1

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), multiple=st.booleans(), accepted=st.booleans())
    def confirm(self, data: st.DataObject, *, multiple: bool, accepted: bool) -> None:
        number = data.draw(st.integers(0 if multiple else 1, len(self.sent)))
        if number == 0:
            covered = sorted(self.waiting)
        else:
            covered = [each for each in sorted(self.waiting) if each == number or (multiple and each < number)]
        self.unconfirmed.confirmed(number, multiple=multiple, accepted=accepted)
        for each in covered:
            sent = self.waiting.pop(each)
            outcome = Published.CONFIRMED if accepted else Published.REFUSED
            if sent.mandatory and self.returns[sent.key]:
                self.returns[sent.key] -= 1
                outcome = Published.RETURNED
            assert sent.published == [outcome]

    @rule(beyond=st.integers(1, 2**63), multiple=st.booleans())
    def confirm_what_was_never_sent(self, beyond: int, *, multiple: bool) -> None:
        with pytest.raises(ProtocolError, match="were sent"):
            self.unconfirmed.confirmed(len(self.sent) + beyond, multiple=multiple, accepted=True)

    @rule()
    def confirm_number_zero(self) -> None:
        with pytest.raises(ProtocolError, match="confirmed message 0"):
            self.unconfirmed.confirmed(0, multiple=False, accepted=True)

    @rule()
    def lose(self) -> None:
        assert self.unconfirmed.lost() == [
            (self.waiting[each].outgoing, Published.UNKNOWN) for each in sorted(self.waiting)
        ]
        self.waiting.clear()
        self.returns.clear()
        self.unconfirmed._returned.clear()  # the next session has an `Unconfirmed` of its own

    @invariant()
    def each_is_reported_once_and_not_too_early(self) -> None:
        assert len(self.unconfirmed) == len(self.waiting)
        for sent in self.waiting.values():
            assert sent.published == []
        assert all(len(sent.published) <= 1 for sent in self.sent)
        assert sum(self.unconfirmed._returned.values()) == sum(self.returns.values())


class TestConfirming(Confirming.TestCase):  # type: ignore[misc,valid-type]  # Hypothesis makes it as it runs
    settings = settings(dozens, max_examples=60, stateful_step_count=30)


def test_a_message_that_is_returned_before_its_confirm_is_reported_as_returned() -> None:
    unconfirmed = Unconfirmed()
    one, gone, other = Sent(b"1"), Sent(b"2"), Sent(b"3")
    for sent in (one, gone, other):
        unconfirmed.add([sent.outgoing])
    unconfirmed.returned(*gone.key)
    unconfirmed.confirmed(3, multiple=True, accepted=True)
    assert (one.published, gone.published, other.published) == (
        [Published.CONFIRMED],
        [Published.RETURNED],
        [Published.CONFIRMED],
    )


def test_two_returns_of_the_same_key_are_two_messages() -> None:
    unconfirmed = Unconfirmed()
    twins = [Sent(b"same") for _ in range(3)]
    for sent in twins:
        unconfirmed.add([sent.outgoing])
    unconfirmed.returned(*twins[0].key)
    unconfirmed.returned(*twins[0].key)
    for number in (1, 2, 3):
        unconfirmed.confirmed(number, multiple=False, accepted=True)
    assert [sent.published for sent in twins] == [
        [Published.RETURNED],
        [Published.RETURNED],
        [Published.CONFIRMED],
    ]


def test_a_message_that_is_not_mandatory_is_never_returned() -> None:
    unconfirmed = Unconfirmed()
    control, request = Sent(b"same", mandatory=False), Sent(b"same")
    unconfirmed.add([control.outgoing])
    unconfirmed.add([request.outgoing])
    unconfirmed.returned(*request.key)
    unconfirmed.confirmed(2, multiple=True, accepted=True)
    assert (control.published, request.published) == ([Published.CONFIRMED], [Published.RETURNED])


def test_before_anything_is_sent_every_confirm_is_refused() -> None:
    for number in (0, 1):
        for multiple in (True, False):
            with pytest.raises(ProtocolError, match="0 were sent"):
                Unconfirmed().confirmed(number, multiple=multiple, accepted=True)


def test_a_message_that_is_sent_during_a_confirm_is_not_covered_by_it() -> None:
    unconfirmed = Unconfirmed()
    late = Sent(b"late")
    unconfirmed.add([message(on_published=lambda _: unconfirmed.add([late.outgoing]))])
    unconfirmed.confirmed(0, multiple=True, accepted=True)
    assert late.published == []
    assert len(unconfirmed) == 1
    unconfirmed.confirmed(2, multiple=False, accepted=True)
    assert late.published == [Published.CONFIRMED]


def test_messages_after_the_one_that_ended_the_session_were_not_taken() -> None:
    sizes = (10, 100, 101, 3, 200, 100)
    sent = [message(b"x" * size) for size in sizes]
    unconfirmed = Unconfirmed()
    unconfirmed.add(sent)
    unconfirmed.confirmed(1, multiple=False, accepted=True)
    assert unconfirmed.lost(100) == list(
        zip(
            sent[1:],
            (
                Published.UNKNOWN,
                Published.TOO_LARGE,
                Published.UNSENT,
                Published.TOO_LARGE,
                Published.UNSENT,
            ),
            strict=True,
        )
    )
    assert len(unconfirmed) == 0


class Counted(dict[int, Outgoing]):
    """The messages that wait; counts how often one is looked up."""

    looks = 0

    def __contains__(self, key: object) -> bool:
        self.looks += 1
        return super().__contains__(key)

    def pop(self, *args: Any) -> Any:
        self.looks += 1
        return super().pop(*args)


MANY = 20_000
Confirms = Iterable[tuple[int, bool]]


@pytest.mark.parametrize(
    "confirms",
    [
        [(number, False) for number in range(1, MANY + 1)],
        [(number, True) for number in range(1, MANY + 1)],
        [(number, False) for number in range(MANY, 0, -1)],
        [(number, False) for number in range(MANY, 1, -1)] + [(number, True) for number in range(1, MANY + 1)],
        [(number, True) for number in range(MANY, 0, -1)],
        [(number, False) for number in range(1, MANY + 1)] + [(1, True)] * MANY,
        [(number, False) for number in range(1, MANY + 1)] + [(1, False)] * MANY,
        [(number, False) for number in range(2, MANY + 1)] + [(2, True)] * MANY,
        [(number, False) for number in range(2, MANY + 1)] + [(2, False)] * MANY + [(1, False)] * MANY,
        [each for number in range(MANY, 1, -2) for each in ((number, False), (MANY - number + 1, True))],
        [(0, True)] * MANY,
        [each for number in range(1, MANY + 1) for each in ((number, False), (1, True), (0, False))][: 3 * MANY],
    ],
    ids=[
        "one by one",
        "all up to each",
        "backwards",
        "backwards, then all up to each",
        "the last of all first",
        "the first again and again, with all before it",
        "the first again and again",
        "the second again and again, the first missing",
        "the first last",
        "from both ends",
        "all, again and again",
        "each, then the first again",
    ],
)
def test_each_number_is_looked_up_a_few_times_in_any_order(confirms: Confirms) -> None:
    unconfirmed = Unconfirmed()
    unconfirmed._waiting = waiting = Counted()
    published: list[Published] = []
    what = message(on_published=published.append)
    for _ in range(MANY):
        unconfirmed.add([what])
    count = 0
    for number, multiple in confirms:
        if number or multiple:
            unconfirmed.confirmed(number, multiple=multiple, accepted=True)
            count += 1
    left = len(unconfirmed)
    assert len(published) == MANY - left
    assert waiting.looks <= 2 * MANY + 2 * count
    unconfirmed.confirmed(0, multiple=True, accepted=True)
    assert published == [Published.CONFIRMED] * MANY
    assert waiting.looks <= 3 * MANY + 2 * count


def test_a_confirm_of_all_does_not_look_up_what_was_confirmed_one_by_one() -> None:
    unconfirmed = Unconfirmed()
    unconfirmed._waiting = waiting = Counted()
    for number in range(1, MANY + 1):
        unconfirmed.add([message()])
        unconfirmed.confirmed(number, multiple=False, accepted=True)
    unconfirmed.add([message()])
    before = waiting.looks
    unconfirmed.confirmed(0, multiple=True, accepted=True)
    assert len(unconfirmed) == 0
    assert waiting.looks - before <= 3


# Settling deliveries.


def settle_at_broker(raw: bytes, waiting: dict[int, None]) -> dict[int, str]:
    """What a broker does with these frames; each tag must be one that it waits for, or it would close the channel."""
    found: dict[int, str] = {}
    for _, what in frames_of(raw):
        tag = what.delivery_tag
        assert tag in waiting
        for each in [each for each in waiting if each == tag or (getattr(what, "multiple", False) and each < tag)]:
            del waiting[each]
            found[each] = "ack" if isinstance(what, Basic.Ack) else f"requeue={what.requeue}"
    return found


@dozens
@given(st.lists(st.tuples(st.integers(0, 4), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)))), max_size=8))
def test_each_delivery_is_settled_as_asked_in_any_order(rounds: list[tuple[int, list[Any]]]) -> None:
    unsettled = Unsettled(Encoder(1, 4096))
    broker: dict[int, None] = {}
    open_tags: list[int] = []
    tag = 0
    for deliveries, settlements in rounds:
        for _ in range(deliveries):
            tag += 1
            broker[tag] = None
            open_tags.append(tag)
            unsettled.delivered(tag)
        meant = {}
        for place, how in settlements:
            if place < len(open_tags):
                each = open_tags.pop(place)
                accept, requeue = how > 1, how == 1
                meant[each] = "ack" if accept else f"requeue={requeue}"
                unsettled.settle(each, accept=accept, requeue=requeue)
        raw = unsettled.frames()
        assert settle_at_broker(raw, broker) == meant
        assert list(broker) == open_tags == list(unsettled._tags)
        assert unsettled.frames() == b""


def test_deliveries_that_are_accepted_without_a_gap_take_one_frame() -> None:
    encoder = Encoder(1, 4096)
    unsettled = Unsettled(encoder)
    for tag in range(1, 101):
        unsettled.delivered(tag)
    for tag in range(100, 1, -1):
        unsettled.settle(tag, accept=True, requeue=False)
    assert len(frames_of(unsettled.frames())) == 99  # the first is still in hand
    for tag in (101, 102):
        unsettled.delivered(tag)
        unsettled.settle(tag, accept=True, requeue=False)
    unsettled.settle(1, accept=True, requeue=False)
    assert unsettled.frames() == encoder.ack(102, multiple=True)
