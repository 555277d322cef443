"""Messages that the broker has not confirmed, and deliveries that are not settled. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from rpcq.errors import ProtocolError
from rpcq.transport.base import Outgoing, Published
from rpcq.transport.rabbitmq.frames import Encoder

_CONFIRMED: Final = Published.CONFIRMED  # access to a member of an enum is slow in CPython 3.11


class Unconfirmed:
    """Messages that were handed to the socket, and that the broker has not confirmed.

    Confirms come in any order, and one may cover all messages up to its number; each message is visited once. A return
    has no number: its message is found by routing key and correlation ID. It comes before the message's confirm
    (https://www.rabbitmq.com/docs/confirms#when-publishes-are-confirmed).

    Args:
        on_refused: called when the broker refuses a message, just before its `on_published`.

    """

    def __init__(self, on_refused: Callable[[], None] = lambda: None) -> None:
        self._on_refused = on_refused
        self._waiting: dict[int, Outgoing] = {}
        self._next = 1
        self._low = 1  # no message with a lower number is waiting
        self._returned: dict[tuple[bytes, bytes], int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, messages: Iterable[Outgoing]) -> None:
        """Add messages that are handed to the socket: they get the channel's next numbers."""
        waiting, number = self._waiting, self._next
        for message in messages:
            waiting[number] = message
            number += 1
        self._next = number

    def returned(self, routing_key: bytes, correlation_id: bytes) -> None:
        """Record that the broker returned a message; its confirm follows."""
        key = routing_key, correlation_id
        self._returned[key] = self._returned.get(key, 0) + 1

    def confirmed(self, number: int, multiple: bool, accepted: bool) -> None:
        """Take a confirm of one message, or of all up to it (with the number 0: of all).

        Raises:
            ProtocolError: no message with that number was sent.

        """
        if multiple and not number:
            number = self._next - 1
        if not 0 < number < self._next:
            msg = f"the broker confirmed message {number}, but {self._next - 1} were sent"
            raise ProtocolError(msg)
        if not multiple:
            message = self._waiting.pop(number, None)
            if number == self._low:
                self._advance(number + 1)
            if message is not None:
                self._report(message, accepted)
            return
        low = self._low
        self._advance(number + 1)
        pop = self._waiting.pop
        for each in range(low, number + 1):
            message = pop(each, None)
            if message is None:
                continue
            if accepted and not self._returned:
                message.on_published(_CONFIRMED)
            else:
                self._report(message, accepted)

    def lost(self, most: int | None = None) -> list[tuple[Outgoing, Published]]:
        """Remove all messages, because the session is down; returns them with what became of each.

        Args:
            most: the broker's limit in bytes, if it ended the session because a message was larger. It did not take
                that message, and did not read the ones after it on the channel.

        """
        waiting = list(self._waiting.values())
        self._waiting.clear()
        found = []
        otherwise = Published.UNKNOWN
        for message in waiting:
            if most is not None and len(message.body) > most:
                otherwise = Published.UNSENT
                found.append((message, Published.TOO_LARGE))
            else:
                found.append((message, otherwise))
        return found

    def _advance(self, low: int) -> None:
        low = max(self._low, low)
        while low < self._next and low not in self._waiting:
            low += 1
        self._low = low

    def _report(self, message: Outgoing, accepted: bool) -> None:
        if self._returned and message.mandatory:  # only mandatory messages are returned
            key = message.routing_key, message.correlation_id
            count = self._returned.pop(key, 0)
            if count > 1:
                self._returned[key] = count - 1
            if count:
                message.on_published(Published.RETURNED)
                return
        if accepted:
            message.on_published(_CONFIRMED)
        else:
            self._on_refused()
            message.on_published(Published.REFUSED)


class Unsettled:
    """Deliveries that are not settled yet, in order. Those that are settled together take few frames.

    One frame can acknowledge all deliveries up to its tag, if everything below it was settled too. A tag must not be
    settled twice: the broker closes the channel if it does not know a tag.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._tags: dict[int, None] = {}  # in order; prefetch is the limit of its size
        self._accepted: set[int] = set()
        self._rejected: list[bytes] = []

    def __len__(self) -> int:
        return len(self._tags)

    def __iter__(self) -> Iterator[int]:
        return iter(self._tags)

    def delivered(self, tag: int) -> None:
        """Add a delivery."""
        self._tags[tag] = None

    def settle(self, tag: int, *, accept: bool, requeue: bool) -> None:
        """Settle a delivery; `frames` returns the frame for the broker."""
        if accept:
            self._accepted.add(tag)
        else:
            del self._tags[tag]
            # From RabbitMQ 4.3 on, what is given back by nack does not count as a delivery.
            self._rejected.append(self._encoder.nack(tag) if requeue else self._encoder.reject(tag, requeue=False))

    def frames(self) -> bytes:
        """The frames to write for all that was settled since the last time."""
        accepted, self._accepted = self._accepted, set()
        frames, self._rejected = self._rejected, []
        low = count = 0
        for tag in self._tags:
            if tag not in accepted:
                break
            low = tag
            count += 1
        if count:
            frames.append(self._encoder.ack(low, multiple=count > 1))
        for tag in accepted:
            del self._tags[tag]
            if tag > low:
                frames.append(self._encoder.ack(tag))
        return b"".join(frames)
