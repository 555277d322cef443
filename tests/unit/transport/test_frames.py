"""The codec of the fast path, compared with pamqp: what it sends, what it reads, and what it refuses."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import commands, frame
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from rpcq.errors import ProtocolError
from rpcq.transport.base import Outgoing
from rpcq.transport.rabbitmq import frames as codec
from rpcq.transport.rabbitmq.frames import HEARTBEAT_FRAME, MAX_FRAME, Encoder, FastChannel, FrameReader
from rpcq.transport.rabbitmq.pending import Unconfirmed
from support.frames import dozens, frames_of, message

Basic, Channel, Connection = commands.Basic, commands.Channel, commands.Connection
Event = tuple[Any, ...]

CHANNELS = (1, 2)
ALIEN = 7
"""A channel that is open and is no fast channel."""

MAX_BODY = 40
HOT = (codec.DELIVER, codec.RETURN, codec.ACK, codec.NACK)


# A connection under test, and what it reports.


@dataclass
class Wire:
    """A reader with its fast channels, and all callbacks, in order."""

    max_body: int = MAX_BODY
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        add = self.events.append
        self.reader = FrameReader(
            lambda raw: add(("other", raw)),
            lambda code, text: add(("close", code, text)),
            lambda reason: add(("blocked", reason)),
        )
        self.reader.channels.update({number: self.channel(number) for number in CHANNELS})

    def channel(self, number: int) -> FastChannel:
        add = self.events.append
        return FastChannel(
            max_body=self.max_body,
            on_deliver=lambda *what: add(("deliver", number, *what)),
            on_return=lambda *what: add(("return", number, *what)),
            on_confirm=lambda *what: add(("confirm", number, *what)),
            on_end=lambda *what: add(("end", number, *what)),
        )

    @property
    def kept(self) -> int:
        """How many bytes it keeps of incomplete frames and messages."""
        channels = self.reader.channels.values()
        return sum(map(len, self.reader._rest)) + sum(len(chunk) for each in channels for chunk in each._chunks)


def events_of(pieces: Iterable[bytes], max_body: int = MAX_BODY) -> list[Event]:
    """What a connection reports when it gets these pieces; the last event may be that they are not AMQP."""
    wire = Wire(max_body)
    try:
        for piece in pieces:
            wire.reader.feed(piece)
    except ProtocolError:
        return [*wire.events, ("refused",)]
    return wire.events


def one_by_one(raw: bytes) -> Iterator[bytes]:
    return (raw[at : at + 1] for at in range(len(raw)))


def cut(raw: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(places), len(raw)]
    return [raw[start:end] for start, end in pairwise(edges)]


def signed(number: int) -> int:
    """A delivery tag for pamqp, which reads and writes them as signed numbers."""
    return number - 2**64 if number >= 2**63 else number


def frame_of(kind: int, channel: int, payload: bytes, end: int = codec.FRAME_END) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + bytes((end,))


def method(what: Frame, channel: int = 1) -> bytes:
    return frame.marshal(what, channel)


def payload_of(what: Frame) -> bytes:
    return method(what)[7:-1]


# Streams, as a broker sends them, in frames of pamqp; each frame with the events that it must cause.

Step = tuple[bytes, list[Event]]


def content(properties: commands.Basic.Properties, parts: Sequence[bytes], channel: int) -> tuple[bytes, list[bytes]]:
    """The properties as bytes on the wire, and the frames after the method."""
    size = sum(map(len, parts))
    header = ContentHeader(body_size=size, properties=properties)
    frames = [frame.marshal(header, channel), *(frame.marshal(ContentBody(part), channel) for part in parts)]
    return properties.marshal(), frames


def delivered(channel: int, tag: int, parts: Sequence[bytes] = (), properties: Any = None, **fields: Any) -> list[Step]:
    deliver = Basic.Deliver(
        fields.get("consumer_tag", "ctag1"),
        signed(tag),
        fields.get("redelivered", False),
        fields.get("exchange", "rpcq.requests"),
        fields.get("routing_key", "math"),
    )
    raw, frames = content(properties or Basic.Properties(), parts, channel)
    body = b"".join(parts)
    event = ("deliver", channel, tag, deliver.redelivered, raw, body if len(body) <= MAX_BODY else None, len(body))
    return [(each, []) for each in (method(deliver, channel), *frames[:-1])] + [(frames[-1], [event])]


def returned(channel: int, key: str, correlation_id: str | None, parts: Sequence[bytes] = ()) -> list[Step]:
    raw = method(Basic.Return(312, "NO_ROUTE", "rpcq.requests", key), channel)
    _, frames = content(Basic.Properties(correlation_id=correlation_id, reply_to="r"), parts, channel)
    event = ("return", channel, key.encode(), (correlation_id or "").encode())
    return [(each, []) for each in (raw, *frames[:-1])] + [(frames[-1], [event])]


def confirmed(channel: int, number: int, *, multiple: bool, accepted: bool) -> list[Step]:
    what = Basic.Ack(signed(number), multiple) if accepted else Basic.Nack(signed(number), multiple, requeue=True)
    return [(method(what, channel), [("confirm", channel, number, multiple, accepted)])]


def handed_on(raw: bytes, *before: Event) -> list[Step]:
    return [(raw, [*before, ("other", raw)])]


def closed(channel: int, code: int, text: str) -> list[Step]:
    return handed_on(method(Channel.Close(code, text, 60, 40), channel), ("end", channel, code, text))


def cancelled(channel: int, tag: str) -> list[Step]:
    text = f"the broker cancelled the consumer {tag}"
    return handed_on(method(Basic.Cancel(tag, nowait=True), channel), ("end", channel, 0, text))


def blocked(reason: str) -> list[Step]:
    return handed_on(method(Connection.Blocked(reason), 0), ("blocked", reason))


def unblocked() -> list[Step]:
    return handed_on(method(Connection.Unblocked(), 0), ("blocked", None))


def connection_closed(code: int, text: str) -> list[Step]:
    return handed_on(method(Connection.Close(code, text, 0, 0), 0), ("close", code, text))


RICH = Basic.Properties(
    content_type="application/json",
    headers={"rpcq-deadline": 1_700_000_000_000, "CC": ["amq.gen-x"]},
    correlation_id="\u20ac",
    delivery_mode=1,
)
HEARTBEAT = frame.marshal(Heartbeat(), 0)

SIMILAR: list[Step] = [
    *delivered(1, 1, [b"one"]),
    *delivered(1, 2**64 - 1, [b"the last of all tags"], RICH, redelivered=True),
    *delivered(1, 3, [b"after it"]),
]
"""Deliveries to one consumer: their methods differ only in the tag and in whether they were redelivered."""

STREAM: list[Step] = [
    *handed_on(HEARTBEAT),
    *delivered(1, 1),
    *delivered(1, 2, [b"whole"], RICH, redelivered=True, consumer_tag="", exchange="", routing_key=""),
    *confirmed(1, 1, multiple=False, accepted=True),
    *delivered(2, 2**64 - 1, [b"in ", b"th", b"ree"], RICH),
    *handed_on(method(Channel.OpenOk(), ALIEN)),
    *returned(1, "nobody", "id-1", [b"gone"]),
    *returned(1, "", None),
    *blocked("low on memory \u20ac"),
    *confirmed(2, 2**64 - 1, multiple=True, accepted=True),
    *confirmed(1, 9, multiple=False, accepted=False),
    *confirmed(1, 0, multiple=True, accepted=False),
    *unblocked(),
    *delivered(2, 3, [b"x" * MAX_BODY]),
    *delivered(2, 4, [b"x" * (MAX_BODY + 1)]),
    *delivered(2, 5, [b"x" * MAX_BODY, b"y"]),
    *delivered(2, 6, [b"after"]),
    *handed_on(method(Basic.ConsumeOk("ctag1"), 2)),
    *handed_on(method(Basic.Reject(1), 2)),  # no broker sends this; it confirms nothing
    *handed_on(method(Basic.Deliver("c", 1, False, "", "k"), ALIEN)),
    *handed_on(frame.marshal(ContentHeader(body_size=1), ALIEN)),
    *handed_on(frame.marshal(ContentBody(b"\xce"), ALIEN)),
    *handed_on(method(Basic.Ack(1), ALIEN)),
    *cancelled(2, "ctag1"),
    *closed(2, 404, "NOT_FOUND - no queue"),
    *closed(1, 504, ""),
    *handed_on(method(Connection.UpdateSecretOk(), 0)),
    *connection_closed(320, "CONNECTION_FORCED - shutdown"),
    *handed_on(HEARTBEAT),
]
"""Every frame that may come, once."""

WHOLE = b"".join(raw for raw, _ in STREAM)
EVENTS = [event for _, events in STREAM for event in events]

texts = st.text(max_size=12)
names = st.text("abc.-_:", max_size=12)
tags = st.integers(0, 2**64 - 1)
parts = st.lists(st.binary(min_size=1, max_size=30), max_size=4)
properties = st.builds(
    Basic.Properties,
    correlation_id=st.none() | texts,
    headers=st.none() | st.dictionaries(texts, st.integers(-(2**63), 2**63 - 1), max_size=3),
    priority=st.none() | st.integers(0, 255),
)


def on_fast_channel(channel: int) -> st.SearchStrategy[list[Step]]:
    here = st.just(channel)
    return st.one_of(
        st.builds(
            delivered,
            here,
            tags,
            parts,
            properties,
            consumer_tag=texts,
            redelivered=st.booleans(),
            exchange=names,
            routing_key=texts,
        ),
        st.builds(returned, here, texts, st.none() | texts.filter(bool), parts),
        st.builds(confirmed, here, tags, multiple=st.booleans(), accepted=st.booleans()),
        st.builds(cancelled, here, texts),
        st.builds(closed, here, st.integers(0, 65535), texts),
        st.sampled_from((Channel.FlowOk(True), Basic.CancelOk("c"), Basic.QosOk(), Channel.CloseOk())).map(
            lambda what: handed_on(method(what, channel))
        ),
    )


elsewhere = st.one_of(
    st.builds(blocked, texts),
    st.builds(unblocked),
    st.builds(connection_closed, st.integers(0, 65535), texts),
    st.just(handed_on(HEARTBEAT)),
    st.binary(max_size=20).map(lambda raw: handed_on(frame_of(3, ALIEN, raw))),
    st.integers(0, 255).map(lambda low: handed_on(frame_of(1, ALIEN, bytes((0, 60, 0, low))))),
)


@st.composite
def streams(draw: st.DrawFn) -> list[Step]:
    """Frames of several channels, mixed; the frames of each channel stay in order."""
    queues = [
        [step for steps in draw(st.lists(kind, max_size=5)) for step in steps]
        for kind in (on_fast_channel(1), on_fast_channel(2), elsewhere)
    ]
    mixed = []
    while queues := [queue for queue in queues if queue]:
        mixed.append(queues[draw(st.integers(0, len(queues) - 1))].pop(0))
    return mixed


# Reading.


def test_every_frame_that_may_come_is_reported_once_and_in_order() -> None:
    assert events_of([WHOLE]) == EVENTS


def test_it_makes_no_difference_where_the_bytes_are_split() -> None:
    assert events_of(one_by_one(WHOLE)) == EVENTS
    for at in range(len(WHOLE) + 1):
        assert events_of(cut(WHOLE, [at])) == EVENTS


def test_it_makes_no_difference_how_long_the_pieces_are() -> None:
    for size in (*range(2, 40), 64, 100, 1000):
        assert events_of(cut(WHOLE, range(size, len(WHOLE), size))) == EVENTS


@dozens
@given(streams(), st.data())
def test_mixed_channels_in_pieces_are_reported_as_they_were_sent(steps: list[Step], data: st.DataObject) -> None:
    raw = b"".join(each for each, _ in steps)
    meant = [event for _, events in steps for event in events]
    assert events_of([raw]) == meant
    assert events_of(one_by_one(raw)) == meant
    places = data.draw(st.lists(st.integers(0, len(raw)), max_size=8))
    assert events_of(cut(raw, places)) == meant
    assert oracle(raw) == (meant, True)


def test_without_fast_channels_every_byte_is_handed_on() -> None:
    other: list[bytes] = []
    reader = FrameReader(other.append, lambda *_: None, lambda _: None)
    for piece in cut(WHOLE, range(11, len(WHOLE), 11)):
        reader.feed(piece)
    assert other == [raw for raw, _ in STREAM]


def test_frames_after_the_fast_channels_were_removed_are_handed_on() -> None:
    other: list[bytes] = []
    wire = Wire()
    reader = FrameReader(other.append, lambda *_: reader.channels.clear(), lambda _: None)
    reader.channels[1] = wire.channel(1)
    late = [raw for raw, _ in delivered(1, 2, [b"late"])]
    close = method(Connection.Close(320, "", 0, 0), 0)
    reader.feed(b"".join([*(raw for raw, _ in delivered(1, 1)), close, *late]))
    assert [event[:3] for event in wire.events] == [("deliver", 1, 1)]
    assert other == [close, *late]


def test_a_message_is_not_reported_before_its_last_byte_has_come() -> None:
    for steps in (delivered(1, 1), delivered(1, 1, [b"abc"]), delivered(1, 1, [b"abc", b"d"]), returned(1, "k", "i")):
        raw = b"".join(each for each, _ in steps)
        wire = Wire()
        for byte in one_by_one(raw[:-1]):
            wire.reader.feed(byte)
        assert wire.events == []
        wire.reader.feed(raw[-1:])
        assert len(wire.events) == 1
        assert wire.kept == 0


def test_empty_pieces_change_nothing() -> None:
    assert events_of([b"", WHOLE[:9], b"", b"", WHOLE[9:], b""]) == EVENTS


def test_a_frame_as_long_as_was_agreed_is_read_and_one_byte_more_refused() -> None:
    wire = Wire(max_body=4096)
    wire.reader.max_payload = 4088
    wire.reader.feed(b"".join(raw for raw, _ in delivered(1, 1, [b"x" * 4088, b"y"])))
    assert wire.events[-1][5:] == (b"x" * 4088 + b"y", 4089)
    with pytest.raises(ProtocolError, match="not an AMQP frame"):
        wire.reader.feed(struct.pack(">BHI", 3, 1, 4089))


def test_the_pieces_of_a_long_frame_are_joined_once() -> None:
    raw = b"".join(each for each, _ in delivered(1, 1, [b"x" * 30_000]))
    wire = Wire()
    for at, byte in enumerate(one_by_one(raw)):
        before = wire.reader._rest
        wire.reader.feed(byte)
        # Joined when the header or the end of the frame has come; otherwise only kept.
        assert wire.reader._rest is before or wire.kept in (0, 7), at
    assert [event[6] for event in wire.events] == [30_000]


def test_a_body_over_the_limit_is_counted_and_not_kept() -> None:
    size = 64 * 100_000
    part = frame.marshal(ContentBody(b"x" * 100_000), 1)
    wire = Wire()
    wire.reader.feed(method(Basic.Deliver("c", 5, False, "", "k")) + frame.marshal(ContentHeader(body_size=size), 1))
    tracemalloc.start()
    try:
        for _ in range(64):
            assert wire.events == []
            wire.reader.feed(part)
            assert wire.kept == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert wire.events == [("deliver", 1, 5, False, b"\x00\x00", None, size)]
    assert peak < 1_000_000


def test_an_absurd_size_is_waited_for_and_costs_nothing() -> None:
    wire = Wire(max_body=2**70)
    header = ContentHeader(body_size=2**64 - 1)
    wire.reader.feed(method(Basic.Deliver("c", 5, False, "", "k")) + frame.marshal(header, 1))
    wire.reader.feed(frame.marshal(ContentBody(b"x"), 1))
    assert wire.events == []
    assert wire.kept == 1


def test_empty_body_frames_inside_a_message_are_skipped_and_not_kept() -> None:
    wire = Wire()
    head, body = frame.marshal(ContentHeader(body_size=4), 1), frame.marshal(ContentBody(b"ab"), 1)
    empty = frame_of(3, 1, b"")
    wire.reader.feed(method(Basic.Deliver("c", 5, False, "", "k")) + head + empty * 1000)
    assert wire.reader.channels[1]._chunks == []
    wire.reader.feed(body + empty + body)
    assert wire.events == [("deliver", 1, 5, False, b"\x00\x00", b"abab", 4)]


def test_the_whole_body_after_an_empty_frame_leaves_nothing_behind() -> None:
    wire = Wire()
    head, body = frame.marshal(ContentHeader(body_size=4), 1), frame.marshal(ContentBody(b"abcd"), 1)
    for _ in range(2):
        wire.reader.feed(method(Basic.Deliver("c", 5, False, "", "k")) + head + frame_of(3, 1, b"") + body)
    assert [event[5] for event in wire.events] == [b"abcd", b"abcd"]
    assert wire.kept == 0


# What is refused.


def test_the_heartbeat_is_that_of_amqp() -> None:
    assert HEARTBEAT_FRAME == HEARTBEAT


HOT_METHODS = [
    Basic.Deliver("ctag", 5, True, "exchange", "key"),
    Basic.Return(312, "NO_ROUTE", "exchange", "key"),
    Basic.Ack(5, True),
    Basic.Nack(5, True, True),
    Basic.Cancel("ctag", nowait=True),
    Channel.Close(404, "NOT_FOUND", 60, 40),
]
CONNECTION_METHODS = [Connection.Close(320, "FORCED", 0, 0), Connection.Blocked("memory")]


@pytest.mark.parametrize("what", [*HOT_METHODS, *CONNECTION_METHODS], ids=lambda what: what.name)
def test_a_method_that_ends_early_is_refused_wherever_it_ends(what: Frame) -> None:
    payload = payload_of(what)
    channel = 0 if what in CONNECTION_METHODS else 1
    assert ("refused",) not in events_of([frame_of(1, channel, payload)])
    for end in range(4, len(payload)):
        assert events_of([frame_of(1, channel, payload[:end])]) == [("refused",)], end


@pytest.mark.parametrize("what", [*HOT_METHODS, *CONNECTION_METHODS, Connection.Unblocked()], ids=lambda it: it.name)
def test_a_method_that_goes_on_too_long_is_refused(what: Frame) -> None:
    channel = 0 if what.frame_id and what.name.startswith("Connection") else 1
    for more in (b"\x00", b"\xce", bytes(20)):
        assert events_of([frame_of(1, channel, payload_of(what) + more)]) == [("refused",)]


@pytest.mark.parametrize("size", range(4))
def test_a_method_frame_without_a_method_is_handed_on(size: int) -> None:
    for channel in (0, 1, ALIEN):
        raw = frame_of(1, channel, codec.DELIVER[:size])
        assert events_of([raw]) == [("other", raw)]


DELIVER = method(HOT_METHODS[0])
SIZED = frame.marshal(ContentHeader(body_size=5), 1)


TOO_LONG = 128 * 1024 + 1
REFUSED = [
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"AMQP\x00\x00\x09\x01",  # the broker wants another version
    b"AMQP\x03\x01\x00\x00",
    b"\x15\x03\x03\x00\x02\x02\x46",  # an alert of TLS
    b"SSH-2.0-OpenSSH_9.2p1\r\n",
    bytes(8),
    b"\xff" * 8,
    frame_of(0, 1, b""),
    frame_of(4, 0, b""),
    frame_of(7, 1, b""),
    frame_of(9, 0, b""),
    frame_of(8, 1, b""),  # a heartbeat belongs to the whole connection
    struct.pack(">BHI", 1, 0, 2**32 - 1),
    struct.pack(">BHI", 3, 1, 128 * 1024 + 1),
    HEARTBEAT[:-1] + b"\x00",
    DELIVER[:-1] + b"\xcf",
    frame_of(2, 1, payload_of(HOT_METHODS[0])),
    SIZED,
    frame_of(3, 1, b""),
    frame_of(3, 1, b"body"),
    DELIVER + frame_of(3, 1, b"body"),
    DELIVER + frame_of(3, 1, b""),
    DELIVER + DELIVER,
    DELIVER + method(Basic.Ack(1)),
    DELIVER + SIZED + method(Channel.Close(404, "", 0, 0)),
    DELIVER + SIZED + SIZED,
    DELIVER + SIZED + frame_of(3, 1, b"sixsix"),
    DELIVER + SIZED + frame_of(3, 1, b"four") + frame_of(3, 1, b"22"),
    DELIVER + SIZED + frame_of(3, 1, b"five5") + frame_of(3, 1, b""),
    DELIVER + frame_of(2, 1, b""),
    DELIVER + frame_of(2, 1, b"\x00\x3c\x00\x00" + bytes(9)),
    DELIVER + frame_of(2, 1, b"\x00\x3c\x00\x00" + struct.pack(">Q", 1)) + frame_of(3, 1, b"1"),  # no flags
    DELIVER + frame_of(2, 1, b"\x00\x3c\x00\x00" + struct.pack(">QH", 1, 0) + bytes(TOO_LONG)) + frame_of(3, 1, b"1"),
    DELIVER + frame_of(2, 1, b"\x00\x3c\x00\x00" + struct.pack(">QH", TOO_LONG, 0)) + frame_of(3, 1, bytes(TOO_LONG)),
    DELIVER + frame_of(2, 1, b"\x00\x3c\x00\x00" + bytes(10)) + frame_of(3, 1, b""),
    DELIVER + frame_of(2, 1, b"\x00\x3d\x00\x00" + bytes(10)),  # another class
    DELIVER + frame_of(2, 1, b"\x00\x3c\x00\x01" + bytes(10)),  # a weight, which AMQP 0-9-1 does not have
    method(Basic.GetOk(1, False, "", "k", 0)) + SIZED,
    method(HOT_METHODS[1]) + frame_of(2, 1, b"\x00\x3c\x00\x00" + bytes(8) + b"\x80\x00"),
]


@pytest.mark.parametrize("raw", REFUSED, ids=lambda raw: repr(raw[:80]))
def test_a_frame_that_may_not_come_is_refused_and_has_no_effect(raw: bytes) -> None:
    found = events_of([raw])
    assert found[-1] == ("refused",)
    assert events_of(one_by_one(raw)) == found
    kinds = [event[0] for event in found[:-1]]
    assert kinds in ([], ["other"], ["deliver"])
    if kinds == ["deliver"]:
        assert found[0][5] in (b"five5", b"")


@pytest.mark.parametrize("raw", REFUSED, ids=lambda raw: repr(raw[:80]))
def test_it_is_also_refused_after_a_similar_delivery(raw: bytes) -> None:
    before = DELIVER + SIZED + frame_of(3, 1, b"first")
    assert events_of([before + raw], TOO_LONG) == events_of([before], TOO_LONG) + events_of([raw], TOO_LONG)


def test_a_refusal_says_what_came() -> None:
    for raw, said in [
        (b"HTTP/1.1 400 Bad Request", "HTTP/1.1"),
        (frame_of(1, 0, codec.CONNECTION_BLOCKED), "000a003c ends early"),
        (frame_of(1, 0, codec.CONNECTION_BLOCKED + b"\x09no"), "000a003c has 7 bytes; its values take 14"),
        (frame_of(1, 1, codec.ACK), "003c0050 ends early"),
        (DELIVER + SIZED + frame_of(3, 1, b"sixsix"), "6 bytes came where at most 5"),
    ]:
        with pytest.raises(ProtocolError, match=said):
            Wire().reader.feed(raw)


def test_an_error_in_a_callback_ends_the_session() -> None:
    unconfirmed = Unconfirmed()
    channel = FastChannel(
        max_body=0,
        on_deliver=lambda *_: None,
        on_return=unconfirmed.returned,
        on_confirm=unconfirmed.confirmed,
        on_end=lambda *_: None,
    )
    wire = Wire()
    wire.reader.channels[1] = channel
    with pytest.raises(ProtocolError, match="confirmed message 1, but 0 were sent"):
        wire.reader.feed(method(Basic.Ack(1)))


# Damage: the oracle reads the same bytes frame by frame; nothing else may be reported.


def oracle(raw: bytes) -> tuple[list[Event], bool]:
    """The events of the frames in these bytes as pamqp reads them, and whether it could read them to the end.

    pamqp accepts more than we do (bytes after a method), and also less (text that is not UTF-8): it stops there.
    """
    events: list[Event] = []
    open_messages: dict[int, list[Any]] = {}
    try:
        for kind, channel, each in frames_in(raw):
            events += read_by_pamqp(kind, channel, each, open_messages)
    except Exception:  # noqa: BLE001 - pamqp does not catch what its parts raise
        return events, False
    return events, True


def frames_in(raw: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while len(raw) - at >= 7:
        kind, channel, length = struct.unpack_from(">BHI", raw, at)
        end = at + 8 + length
        if kind not in (1, 2, 3, 8) or length > 128 * 1024:
            raise ValueError(kind)
        if end > len(raw):
            return
        if raw[end - 1] != 0xCE:
            raise ValueError(end)
        yield kind, channel, raw[at:end]
        at = end


def read_by_pamqp(kind: int, channel: int, raw: bytes, messages: dict[int, list[Any]]) -> list[Event]:
    """The events of one frame; `messages` holds the incomplete messages."""
    if channel not in CHANNELS:
        what = frame.unmarshal(raw)[2] if kind == 1 and not channel and raw[7:9] == b"\x00\x0a" else None
        return [*on_connection(what), ("other", raw)]
    if kind != 1:
        return content_by_pamqp(kind, channel, raw, messages)
    if channel in messages:
        raise ValueError(raw)
    if len(raw) < 12 or raw[7:11] not in (*HOT, codec.CANCEL, codec.CHANNEL_CLOSE):
        return [("other", raw)]
    what = frame.unmarshal(raw)[2]
    match what:
        case Basic.Ack() | Basic.Nack():
            number = what.delivery_tag % 2**64
            return [("confirm", channel, number, what.multiple, isinstance(what, Basic.Ack))]
        case Basic.Cancel():
            return [("end", channel, 0, f"the broker cancelled the consumer {what.consumer_tag}"), ("other", raw)]
        case Channel.Close():
            return [("end", channel, what.reply_code, what.reply_text), ("other", raw)]
    messages[channel] = [what]
    return []


def on_connection(what: Any) -> list[Event]:
    match what:
        case Connection.Close():
            return [("close", what.reply_code, what.reply_text)]
        case Connection.Blocked():
            return [("blocked", what.reason)]
        case Connection.Unblocked():
            return [("blocked", None)]
    return []


def content_by_pamqp(kind: int, channel: int, raw: bytes, messages: dict[int, list[Any]]) -> list[Event]:
    message = messages[channel]
    if kind == 2 and len(message) == 1:
        message += [struct.unpack_from(">Q", raw, 11)[0], raw[19:-1], b""]
    elif kind == 3 and len(message) == 4:
        message[3] += raw[7:-1]
    else:
        raise ValueError(kind)
    what, size, raw_properties, body = message
    if len(body) > size:
        raise ValueError(size)
    if len(body) < size:
        return []
    del messages[channel]
    if isinstance(what, Basic.Return):
        header = ContentHeader()
        header.unmarshal(bytes(12) + raw_properties)
        return [
            ("return", channel, (what.routing_key or "").encode(), (header.properties.correlation_id or "").encode())
        ]
    kept = body if size <= MAX_BODY else None
    return [("deliver", channel, what.delivery_tag % 2**64, what.redelivered, raw_properties, kept, size)]


def check_against_oracle(raw: bytes) -> None:
    found = events_of([raw])
    assert events_of(one_by_one(raw)) == found
    refused = found[-1:] == [("refused",)]
    if refused:
        found = found[:-1]
    for event in found:
        check_consistent(event)
    meant, read_all = oracle(raw)
    if read_all:
        assert found == meant if not refused else found == meant[: len(found)]
    else:
        both = min(len(found), len(meant))
        assert found[:both] == meant[:both]


def check_consistent(event: Event) -> None:
    match event:
        case "deliver", _, int(tag), bool(), bytes(), body, int(size):
            assert 0 <= tag < 2**64
            assert body is None if size > MAX_BODY else len(body) == size
        case "return", _, bytes(key), bytes(correlation_id):
            assert max(len(key), len(correlation_id)) <= 255
        case "confirm", _, int(number), bool(), bool():
            assert 0 <= number < 2**64
        case ("end", _, int(code), str()) | ("close", int(code), str()):
            assert 0 <= code < 2**16
        case "blocked", str() | None:
            pass
        case "other", bytes(raw):
            kind, channel, length = struct.unpack_from(">BHI", raw)
            assert kind in (1, 2, 3, 8)
            assert len(raw) == length + 8
            assert raw[-1] == 0xCE
            assert channel not in CHANNELS or (kind == 1 and raw[7:11] not in HOT)
        case _:
            pytest.fail(f"reported {event}")


def test_the_oracle_reads_what_a_broker_sends() -> None:
    assert oracle(WHOLE) == (EVENTS, True)


def with_payload(raw: bytes, payload: bytes) -> bytes:
    """A frame with another payload, and with the right length."""
    return raw[:3] + struct.pack(">I", len(payload)) + payload + b"\xce" if raw else raw


some_bytes = st.binary(max_size=9)
frame_damages: st.SearchStrategy[Callable[[bytes], bytes]] = st.one_of(
    st.just(lambda _: b""),
    st.just(lambda raw: raw * 2),
    st.sampled_from((0, 1, 2, 7)).map(lambda channel: lambda raw: raw and raw[:1] + bytes((0, channel)) + raw[3:]),
    st.sampled_from((1, 2, 3, 8)).map(lambda kind: lambda raw: raw and bytes((kind,)) + raw[1:]),
    st.integers(1, 20).map(lambda count: lambda raw: with_payload(raw, raw[7:-1][:-count])),
    some_bytes.map(lambda more: lambda raw: with_payload(raw, raw[7:-1] + more)),
)
lengths = (st.integers(0, 60) | st.integers(0, 2**32 - 1)).map(lambda length: struct.pack(">I", length))
byte_damages = st.one_of(  # remove bytes, and insert bytes
    st.tuples(st.just(1), st.binary(min_size=1, max_size=1)),
    st.tuples(st.just(0), some_bytes),
    st.tuples(st.integers(1, 9), st.just(b"")),
    st.tuples(st.just(4), lengths),
)


@st.composite
def damaged(draw: st.DrawFn, frames: list[bytes]) -> bytes:
    frames = list(frames)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(frames) - 1))
        if draw(st.booleans()):
            frames[at] = draw(frame_damages)(frames[at])
        else:
            frames[at], frames[at - 1] = frames[at - 1], frames[at]
    raw = b"".join(frames)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(raw)))
        out, put = draw(byte_damages)
        raw = raw[:at] + put + raw[at + out :]
    return raw


@settings(dozens, max_examples=300)
@given(damaged([raw for raw, _ in STREAM]) | damaged([raw for raw, _ in SIMILAR]))
def test_a_damaged_stream_is_refused_or_reported_as_it_reads(raw: bytes) -> None:
    check_against_oracle(raw)


def test_each_damaged_bit_of_similar_deliveries_is_refused_or_reported_as_it_reads() -> None:
    raw = b"".join(raw for raw, _ in SIMILAR)
    for at, bit in product(range(len(raw)), range(8)):
        check_against_oracle(raw[:at] + bytes((raw[at] ^ 1 << bit,)) + raw[at + 1 :])


@dozens
@given(streams().map(lambda steps: [raw for raw, _ in steps] or [b""]).flatmap(damaged))
def test_any_damaged_stream_is_refused_or_reported_as_it_reads(raw: bytes) -> None:
    check_against_oracle(raw)


loose_payloads = st.one_of(
    st.binary(max_size=30),
    st.tuples(
        st.sampled_from((*HOT, codec.CANCEL, codec.CHANNEL_CLOSE, codec.CONNECTION_BLOCKED, codec.CONNECTION_CLOSE)),
        st.binary(max_size=30),
    ).map(b"".join),
    st.tuples(st.just(codec.BASIC_CONTENT), st.integers(0, 9), st.binary(max_size=9)).map(
        lambda it: it[0] + struct.pack(">Q", it[1]) + it[2]
    ),
)
loose_frames = st.builds(
    frame_of, st.sampled_from((1, 1, 2, 3, 8)), st.sampled_from((0, 1, 1, 2, ALIEN)), loose_payloads
)


@settings(dozens, max_examples=300)
@given(st.lists(loose_frames, max_size=6).map(b"".join) | st.binary(max_size=60))
def test_loose_frames_are_refused_or_reported_as_they_read(raw: bytes) -> None:
    check_against_oracle(raw)


def test_every_flipped_bit_is_refused_or_reported_as_it_reads() -> None:
    raws = [
        b"".join(raw for raw, _ in steps) for steps in (delivered(1, 1, [b"a", b"b"]), returned(1, "k", "i", [b"a"]))
    ]
    for raw in (*raws, *(method(what) for what in HOT_METHODS), *(method(what, 0) for what in CONNECTION_METHODS)):
        for at in range(len(raw)):
            for bit in range(8):
                flipped = bytearray(raw)
                flipped[at] ^= 1 << bit
                check_against_oracle(bytes(flipped) + HEARTBEAT)


# Sending.


def check_published(raw: bytes, messages: Sequence[Outgoing], channel: int, frame_max: int) -> None:
    found = frames_of(raw, frame_max or MAX_FRAME)
    assert {channel for channel, _ in found} <= {channel}
    rest = iter([what for _, what in found])
    for each in messages:
        publish, header = next(rest), next(rest)
        assert isinstance(publish, Basic.Publish)
        assert (publish.exchange, publish.routing_key) == (each.exchange.decode(), each.routing_key.decode())
        assert (publish.mandatory, publish.immediate, publish.ticket) == (each.mandatory, False, 0)
        assert isinstance(header, ContentHeader)
        assert (header.weight, header.body_size) == (0, len(each.body))
        assert header.properties.marshal() == each.properties
        parts: list[bytes] = []
        while sum(map(len, parts)) < len(each.body):
            part = next(rest)
            assert isinstance(part, ContentBody)
            parts.append(part.value)
        assert b"".join(parts) == each.body
        if frame_max:  # all parts except the last have the full length
            assert all(len(part) == frame_max - 8 for part in parts[:-1])
        else:
            assert len(parts) <= 1
    assert next(rest, None) is None


@pytest.mark.parametrize("mandatory", [True, False])
@pytest.mark.parametrize("frame_max", [4096, 131072, 0])
def test_a_body_is_split_where_a_frame_is_full(frame_max: int, *, mandatory: bool) -> None:
    most = (frame_max or 131072) - 8
    for size in (0, 1, most - 1, most, most + 1, 2 * most, 2 * most + 1, 5 * most + 3):
        what = message(bytes(range(256)) * (size // 256) + b"z" * (size % 256), mandatory=mandatory)
        raw = b"".join(Encoder(3, frame_max).publish([what]))
        check_published(raw, [what], 3, frame_max)
        count = -(-size // most) if frame_max else min(size, 1)
        assert len(frames_of(raw)) == 2 + count


def test_a_body_within_one_frame_is_not_copied() -> None:
    body = b"x" * 1000
    assert any(piece is body for piece in Encoder(1, 4096).publish([message(body)]))


@dozens
@given(
    st.lists(
        st.builds(
            message,
            st.binary(max_size=60),
            exchange=texts.map(str.encode),
            key=texts.map(str.encode) | st.just(b"k" * 255),
            mandatory=st.booleans(),
            properties=st.sampled_from((b"\x00\x00", RICH.marshal())),
        ),
        max_size=6,
    ),
    st.integers(1, 65535),
    st.integers(9, 40) | st.just(0),
)
def test_pamqp_reads_published_messages_as_they_were_meant(
    messages: list[Outgoing], channel: int, frame_max: int
) -> None:
    encoder = Encoder(channel, frame_max)
    for _ in range(2):  # the second time with kept methods
        raw = b"".join(encoder.publish(messages))
        found = frames_of(raw)
        assert all(each <= frame_max - 8 for each in body_sizes(found) if frame_max)
        if not frame_max:
            check_published(raw, messages, channel, frame_max)
        bodies = b"".join(what.value for _, what in found if isinstance(what, ContentBody))
        assert bodies == b"".join(each.body for each in messages)
        assert [what.body_size for _, what in found if isinstance(what, ContentHeader)] == [
            len(each.body) for each in messages
        ]
        assert [
            (what.exchange, what.routing_key, what.mandatory) for _, what in found if isinstance(what, Basic.Publish)
        ] == [(each.exchange.decode(), each.routing_key.decode(), each.mandatory) for each in messages]


def body_sizes(found: list[tuple[int, Any]]) -> list[int]:
    return [len(what.value) for _, what in found if isinstance(what, ContentBody)]


def test_nothing_to_publish_is_nothing_to_write() -> None:
    assert Encoder(1, 4096).publish([]) == []


def test_a_name_over_255_bytes_is_refused() -> None:
    for what in (message(exchange=b"k" * 256), message(key=b"k" * 256)):
        with pytest.raises(ValueError, match="256"):
            Encoder(1, 4096).publish([what])


def test_the_number_of_kept_methods_is_bounded() -> None:
    encoder = Encoder(1, 4096)
    keys = [b"reply-%d" % number for number in range(3 * Encoder._KEEP)]
    most = 0
    for key in (*keys, *keys):
        what = message(b"x", key=key)
        check_published(b"".join(encoder.publish([what])), [what], 1, 4096)
        most = max(most, len(encoder._methods))
    assert most == Encoder._KEEP


def test_a_method_is_made_once_for_each_exchange_key_and_mandatory() -> None:
    encoder = Encoder(1, 4096)
    first = encoder.publish([message()])[0]
    assert encoder.publish([message(b"other")])[0] is first
    others = [message(mandatory=False), message(key=b"m"), message(exchange=b""), message(exchange=b"m", key=b"ath")]
    assert len({first, *(encoder.publish([other])[0] for other in others)}) == 5


@given(tags, st.integers(1, 65535))
@dozens
def test_settlements_are_those_of_amqp(tag: int, channel: int) -> None:
    encoder = Encoder(channel, 4096)
    [(at, ack)] = frames_of(encoder.ack(tag))
    assert (at, type(ack), ack.delivery_tag % 2**64, ack.multiple) == (channel, Basic.Ack, tag, False)
    for requeue in (True, False):
        [(at, reject)] = frames_of(encoder.reject(tag, requeue=requeue))
        assert (at, type(reject), reject.delivery_tag % 2**64) == (channel, Basic.Reject, tag)
        assert reject.requeue is requeue
    for requeue, multiple in product((True, False), repeat=2):
        [(at, nack)] = frames_of(encoder.nack(tag, multiple=multiple, requeue=requeue))
        assert (at, type(nack), nack.delivery_tag % 2**64) == (channel, Basic.Nack, tag)
        assert (nack.multiple, nack.requeue) == (multiple, requeue)
