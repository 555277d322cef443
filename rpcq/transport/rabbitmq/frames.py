"""The codec of the fast path: the few AMQP 0-9-1 frames that are hot, bytes <-> values. Pure.

These are: published messages (method, header and body as one piece), delivered and returned messages, confirms, and
acknowledgements. `FrameReader` takes them from the stream, for the channels that registered a `FastChannel`. It hands
on every other frame unchanged. Lengths are checked before they are used. A frame that is malformed or out of order
raises `ProtocolError`, which ends the session: nothing is ever misread.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Final

from rpcq.errors import ProtocolError
from rpcq.transport.base import Outgoing
from rpcq.wire.properties import MalformedProperties, decode, short

# Layouts, from sections 2.3.5 and 4.2 of the AMQP 0-9-1 specification; basic.nack is an extension of RabbitMQ's.
# Numbers are big-endian. A shortstr is its length in one byte, then its bytes.
#
# Every frame:
#
#     | type u8 | channel u16 | length u32 | payload, `length` bytes | end u8 = CE |
#     0         1             3            7                         7 + length
#
# The payload of a method frame (type 1) is a class, a method, and the method's values. n is the consumer tag's length:
#
#     basic.publish   | 60 u16 | 40 u16 | ticket u16 = 0 | exchange shortstr | routing key shortstr | 1: mandatory |
#     basic.deliver   | 60 | 60 | consumer tag | delivery tag u64 | 1: redelivered | exchange | routing key |
#                     0         4              5 + n              13 + n           14 + n
#     basic.return    | 60 | 50 | reply code u16 | reply text | exchange | routing key |
#     basic.cancel    | 60 | 30 | consumer tag | 1: no-wait |
#     basic.ack       | 60 | 80 | delivery tag u64 | 1: multiple |
#     basic.nack      | 60 | 120 | delivery tag u64 | 1: multiple, 2: requeue |
#     basic.reject    | 60 | 90 | delivery tag u64 | 1: requeue |
#                     0         4                  12             13
#     channel.close         | 20 | 40 | reply code u16 | reply text | class u16 | method u16 |
#     connection.close      | 10 | 50 | reply code u16 | reply text | class u16 | method u16 |
#     connection.blocked    | 10 | 60 | reason |
#     connection.unblocked  | 10 | 61 |
#
# The header frame (type 2) and the body frames (type 3) follow the method frame of publish, deliver and return. There
# are as many body frames as the body's size needs, none for an empty body:
#
#     header payload  | class u16 = 60 | weight u16 = 0 | body size u64 | property flags u16 | properties |
#                     0                2                4               12                   14
#     body payload    | a part of the body |

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
FRAME_END: Final = 0xCE
FRAME_OVERHEAD: Final = 8
"""Bytes of a frame around its payload: type, channel, length and the end octet."""

MAX_FRAME: Final = 512 * 1024 * 1024
"""The limit of a frame if the broker sets none: the largest message that RabbitMQ takes."""

DELIVER: Final = b"\x00\x3c\x00\x3c"
RETURN: Final = b"\x00\x3c\x00\x32"
CANCEL: Final = b"\x00\x3c\x00\x1e"
ACK: Final = b"\x00\x3c\x00\x50"
NACK: Final = b"\x00\x3c\x00\x78"
REJECT: Final = b"\x00\x3c\x00\x5a"
PUBLISH: Final = b"\x00\x3c\x00\x28"
BASIC_CONTENT: Final = b"\x00\x3c\x00\x00"
CHANNEL_CLOSE: Final = b"\x00\x14\x00\x28"
CONNECTION_CLOSE: Final = b"\x00\x0a\x00\x32"
CONNECTION_BLOCKED: Final = b"\x00\x0a\x00\x3c"
CONNECTION_UNBLOCKED: Final = b"\x00\x0a\x00\x3d"

HEARTBEAT_FRAME: Final = b"\x08\x00\x00\x00\x00\x00\x00\xce"

_FRAME: Final = struct.Struct(">BHI")  # the first 7 bytes of a frame: type, channel, length
_U64: Final = struct.Struct(">Q")  # a delivery tag, or the size of a body
_CONTENT: Final = struct.Struct(">BHI4sQ")  # the first 19 bytes of a header frame: _FRAME, class and weight, body size
_TAG: Final = struct.Struct(">QB")  # in basic.deliver: delivery tag, bits
_TAGGED: Final = struct.Struct(">BHI4sQBB")  # a whole ack or reject: _FRAME, class and method, tag, bits, end


def _ignore(*_: object) -> None:
    """The default callback, for what does not come on a channel of this kind."""


class FastChannel:
    """One channel of the fast path: collects its messages frame by frame, and calls back when one is complete.

    Args:
        max_body: bytes; the body of a larger message is not kept, and None is passed in its place.
        on_deliver: called with (delivery tag, redelivered, properties, body or None, body size in bytes).
        on_return: called with (routing key, correlation ID) of a message that no queue was bound for.
        on_confirm: called with (delivery tag, multiple, accepted).
        on_end: called with (reply code, text) when the broker closes the channel or cancels the consumer.

    Attributes:
        beginning: the last delivery's method frame, up to the delivery tag; it is the same for all of one consumer.
        exchange: the exchange that the last delivery was published to.

    """

    __slots__ = (
        "_chunks",
        "_delivery",
        "_ending",
        "_left",
        "_method",
        "_properties",
        "_routing_key",
        "_size",
        "beginning",
        "exchange",
        "max_body",
        "on_confirm",
        "on_deliver",
        "on_end",
        "on_return",
    )

    def __init__(
        self,
        *,
        max_body: int,
        on_end: Callable[[int, str], None],
        on_deliver: Callable[[int, bool, bytes, bytes | None, int], None] = _ignore,
        on_return: Callable[[bytes, bytes], None] = _ignore,
        on_confirm: Callable[[int, bool, bool], None] = _ignore,
    ) -> None:
        self.max_body = max_body
        self.on_deliver = on_deliver
        self.on_return = on_return
        self.on_confirm = on_confirm
        self.on_end = on_end
        self._method: bytes | None = None  # of the message that is being received
        self._left = -1  # bytes of the body that are still to come; -1 while no header has come
        self._size = 0
        self._chunks: list[bytes] = []
        self._properties = b""
        self._delivery = (0, False)  # tag, redelivered
        self._routing_key = b""  # of a returned message
        self.beginning = b"none has come"
        self.exchange = b""
        self._ending = b""  # of the frame of `beginning`: from the exchange to the end

    @property
    def routing_key(self) -> bytes:
        """The routing key of the last delivery."""
        key = _after_short(self._ending, 0)
        return self._ending[key + 1 : _after_short(self._ending, key)]

    def take_similar(self, data: bytes, at: int, number: int, max_payload: int) -> int:
        """Take a delivery that differs from the last one only in its tag, properties and body.

        This is the fast way for a complete delivery in `data` that has its body in one frame. Its method frame starts
        at `at`, on the channel `number`, with `beginning`:

            at          tag            tag + 9    header                              body                    end
            | beginning | tag u64, bits | _ending | header frame: 19 bytes, properties, CE | body frame, with CE |

        Returns where the delivery ends; or 0 if it is different or not complete, and then nothing was taken: `method`,
        `header` and `body` take it frame by frame, and find what is wrong with it, if anything is.
        """
        tag = at + len(self.beginning)
        header = tag + 9 + len(self._ending)
        try:
            kind, channel, length, content, size = _CONTENT.unpack_from(data, header)
            body = header + FRAME_OVERHEAD + length
            body_kind, body_channel, body_length = _FRAME.unpack_from(data, body)
            end: int = body + FRAME_OVERHEAD + body_length
            if not (
                kind == HEADER
                and body_kind == BODY
                and channel == body_channel == number
                and content == BASIC_CONTENT
                and 14 <= length <= max_payload
                and 0 < size == body_length <= max_payload
                and size <= self.max_body
                and data[body - 1] == data[end - 1] == FRAME_END
                and data.startswith(self._ending, tag + 9)
                and self._method is None
            ):
                return 0
        except (IndexError, struct.error):
            return 0  # not all of it has come
        delivery_tag, bits = _TAG.unpack_from(data, tag)
        self.on_deliver(delivery_tag, bits & 1 == 1, data[header + 19 : body - 1], data[body + 7 : end - 1], size)
        return end

    def method(self, channel: int, payload: bytes) -> bool:
        """Take a method frame; returns False if it must be handed on: it is not a hot one, or aiormq needs it too."""
        if self._method is not None:
            msg = f"a method frame {payload[:4].hex()} came inside a message"
            raise ProtocolError(msg)
        method = payload[:4]
        try:
            if method == DELIVER:
                tag = 5 + payload[4]
                key = _after_short(payload, tag + 9)
                _check_end(payload, _after_short(payload, key))
                self._delivery = int.from_bytes(payload[tag : tag + 8], "big"), payload[tag + 8] & 1 == 1
                self._method = method
                self.exchange = payload[tag + 10 : key]
                self.beginning = _FRAME.pack(METHOD, channel, len(payload)) + payload[:tag]
                self._ending = payload[tag + 9 :] + b"\xce"
                return True
            if method in (ACK, NACK):
                (number,) = _U64.unpack_from(payload, 4)
                _check_end(payload, 13)
                self.on_confirm(number, payload[12] & 1 == 1, method == ACK)
                return True
            if method == RETURN:
                at = _after_short(payload, _after_short(payload, 6))
                end = _after_short(payload, at)
                _check_end(payload, end)
                self._routing_key = payload[at + 1 : end]
                self._method = method
                return True
            if method == CHANNEL_CLOSE:
                self.on_end(*_close_reason(payload))
            elif method == CANCEL:
                end = 5 + payload[4]
                _check_end(payload, end + 1)
                self.on_end(0, f"the broker cancelled the consumer {payload[5:end].decode('utf-8', 'replace')}")
        except (IndexError, struct.error) as error:
            msg = f"a method frame {method.hex()} ends early"
            raise ProtocolError(msg) from error
        return False

    def header(self, payload: bytes) -> None:
        """Take a content header frame."""
        if self._method is None or self._left >= 0:
            raise ProtocolError("a content header came without its method")
        if len(payload) < 14 or payload[:4] != BASIC_CONTENT:
            msg = f"a content header is malformed: {payload[:14].hex()}"
            raise ProtocolError(msg)
        (self._size,) = _U64.unpack_from(payload, 4)
        self._properties = payload[12:]
        self._left = self._size
        if not self._left:
            self._whole(b"")

    def body(self, payload: bytes) -> None:
        """Take a content body frame."""
        size = len(payload)
        if self._left == size and size == self._size:
            self._whole(payload if size <= self.max_body else None)
            return
        if size > self._left:
            msg = f"a body frame of {size} bytes came where at most {max(self._left, 0)} were expected"
            raise ProtocolError(msg)
        self._left -= size
        if size and self._size <= self.max_body:  # any number of empty frames could come: do not keep them
            self._chunks.append(payload)
        if not self._left:
            body = b"".join(self._chunks) if self._size <= self.max_body else None
            self._chunks = []
            self._whole(body)

    def _whole(self, body: bytes | None) -> None:
        method, self._method, self._left = self._method, None, -1
        if method == DELIVER:
            tag, redelivered = self._delivery
            self.on_deliver(tag, redelivered, self._properties, body, self._size)
            return
        try:
            correlation_id = decode(self._properties).correlation_id or b""
        except MalformedProperties as error:
            msg = f"a returned message is malformed: {error}"
            raise ProtocolError(msg) from error
        self.on_return(self._routing_key, correlation_id)


def _after_short(payload: bytes, at: int) -> int:
    return at + 1 + payload[at]


def _check_end(payload: bytes, at: int) -> None:
    if at != len(payload):
        msg = f"a method frame {payload[:4].hex()} has {len(payload)} bytes; its values take {at}"
        raise ProtocolError(msg)


def _close_reason(payload: bytes) -> tuple[int, str]:
    end = 7 + payload[6]
    _check_end(payload, end + 4)
    return payload[4] << 8 | payload[5], payload[7:end].decode("utf-8", "replace")


class FrameReader:
    """Splits a connection's bytes into frames, in pieces of any size.

    Attributes:
        channels: channel number -> its fast channel. Empty during the handshake.
        max_payload: bytes; the owner sets it when `frame_max` is known.

    Args:
        on_other: called with each complete frame that no fast channel takes.
        on_close: called with (reply code, text) when the broker closes the connection, before `on_other`.
        on_blocked: called with the reason when the broker takes no messages, and with None when it does again.

    """

    def __init__(
        self,
        on_other: Callable[[bytes], None],
        on_close: Callable[[int, str], None],
        on_blocked: Callable[[str | None], None],
    ) -> None:
        self.channels: dict[int, FastChannel] = {}
        self.max_payload = 128 * 1024
        self._on_other = on_other
        self._on_close = on_close
        self._on_blocked = on_blocked
        self._rest: list[bytes] = []  # the pieces of a frame that is not complete
        self._missing = 0  # bytes that have to come before more of it can be read

    def feed(self, data: bytes) -> None:
        """Take bytes from the socket.

        Raises:
            ProtocolError: they are not AMQP; nothing more may be fed.

        """
        if self._rest:
            data = self._completed(data)
        at, size, channels = 0, len(data), self.channels
        while size - at >= 7:
            number = data[at + 1] << 8 | data[at + 2]
            channel = channels.get(number)
            if channel is None or not data.startswith(channel.beginning, at):
                end = self._frame(channel, data, at)
            else:
                end = channel.take_similar(data, at, number, self.max_payload) or self._frame(channel, data, at)
            if not end:
                break
            at = end
        if at < size:
            self._keep(data[at:])

    def _frame(self, channel: FastChannel | None, data: bytes, at: int) -> int:
        """Take the frame that starts at `at`; returns where it ends, or 0 if not all of it has come."""
        kind, number, length = _FRAME.unpack_from(data, at)
        if length > self.max_payload or (kind > BODY and kind != HEARTBEAT) or not kind:
            msg = f"not an AMQP frame: {data[at : at + 16]!r}"
            raise ProtocolError(msg)
        end: int = at + FRAME_OVERHEAD + length
        if end > len(data):
            return 0
        if data[end - 1] != FRAME_END:
            msg = f"a frame of {length} bytes on channel {number} has no end octet after them"
            raise ProtocolError(msg)
        if channel is None:
            self._other(kind, number, data[at:end])
        elif kind == BODY:
            channel.body(data[at + 7 : end - 1])
        elif kind == HEADER:
            channel.header(data[at + 7 : end - 1])
        elif kind != METHOD:
            msg = f"a heartbeat came on channel {number}"
            raise ProtocolError(msg)
        elif not channel.method(number, data[at + 7 : end - 1]):
            self._on_other(data[at:end])
        return end

    def _keep(self, rest: bytes) -> None:
        size = len(rest)
        self._rest.append(rest)
        self._missing = (FRAME_OVERHEAD + _FRAME.unpack_from(rest)[2] if size >= 7 else 7) - size

    def _completed(self, data: bytes) -> bytes:
        """The kept pieces and `data` together, or nothing while bytes are missing; joined once for any sizes."""
        self._rest.append(data)
        self._missing -= len(data)
        if self._missing > 0:
            return b""
        data, self._rest = b"".join(self._rest), []
        return data

    def _other(self, kind: int, number: int, frame: bytes) -> None:
        if kind == METHOD and not number:
            payload = frame[7:-1]
            method = payload[:4]
            try:
                if method == CONNECTION_CLOSE:
                    self._on_close(*_close_reason(payload))
                elif method == CONNECTION_BLOCKED:
                    _check_end(payload, _after_short(payload, 4))
                    self._on_blocked(payload[5:].decode("utf-8", "replace"))
                elif method == CONNECTION_UNBLOCKED:
                    _check_end(payload, 4)
                    self._on_blocked(None)
            except IndexError as error:
                msg = f"a method frame {method.hex()} ends early"
                raise ProtocolError(msg) from error
        self._on_other(frame)


class Encoder:
    """Frames to send on one channel.

    Args:
        channel: the channel's number.
        frame_max: the limit in bytes for a frame, as agreed with the broker; 0 for no limit.

    Attributes:
        most_properties: the limit in bytes for a message's properties: a header cannot be split into several frames.

    """

    _KEEP = 1024  # method frames that are kept: one for each exchange, routing key and value of `mandatory`

    def __init__(self, channel: int, frame_max: int) -> None:
        self._channel = channel
        self._max_payload = (frame_max or MAX_FRAME) - FRAME_OVERHEAD
        self.most_properties = self._max_payload - 12
        self._methods: dict[tuple[bytes, bytes, bool], bytes] = {}

    def publish(self, messages: Iterable[Outgoing]) -> list[bytes]:
        """The pieces to write, in order: for each message its method, header and body frames."""
        channel, most, methods = self._channel, self._max_payload, self._methods
        pack_frame, pack_content = _FRAME.pack, _CONTENT.pack
        pieces: list[bytes] = []
        for message in messages:
            method = methods.get((message.exchange, message.routing_key, message.mandatory))
            if method is None:
                method = self._publish_method(message)
            body, properties = message.body, message.properties
            size = len(body)
            header = pack_content(HEADER, channel, 12 + len(properties), BASIC_CONTENT, size)
            if 0 < size <= most:
                pieces += (method, header, properties, b"\xce", pack_frame(BODY, channel, size), body, b"\xce")
            else:
                pieces += (method, header, properties, b"\xce")
                for at in range(0, size, most):
                    part = body[at : at + most]
                    pieces += (pack_frame(BODY, channel, len(part)), part, b"\xce")
        return pieces

    def ack(self, tag: int, *, multiple: bool = False) -> bytes:
        """The frame that acknowledges one delivery, or all up to it."""
        return _TAGGED.pack(METHOD, self._channel, 13, ACK, tag, multiple, FRAME_END)

    def reject(self, tag: int, *, requeue: bool) -> bytes:
        """The frame that gives one delivery back to its queue, or gives it up."""
        return _TAGGED.pack(METHOD, self._channel, 13, REJECT, tag, requeue, FRAME_END)

    def nack(self, tag: int, *, multiple: bool = False, requeue: bool = True) -> bytes:
        """The frame that gives one delivery, or all up to it (with the tag 0: all), back or up.

        To give back by nack counts as a delivery up to RabbitMQ 4.2, and by reject on every version.
        """
        return _TAGGED.pack(METHOD, self._channel, 13, NACK, tag, multiple | requeue << 1, FRAME_END)

    def _publish_method(self, message: Outgoing) -> bytes:
        payload = b"".join(
            (
                PUBLISH,
                b"\x00\x00",
                short(message.exchange),
                short(message.routing_key),
                b"\x01" if message.mandatory else b"\x00",
            )
        )
        method = _FRAME.pack(METHOD, self._channel, len(payload)) + payload + b"\xce"
        if len(self._methods) >= self._KEEP:
            self._methods.clear()
        self._methods[message.exchange, message.routing_key, message.mandatory] = method
        return method
