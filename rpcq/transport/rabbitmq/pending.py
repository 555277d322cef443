"""What is not settled yet: messages sent that the broker has not confirmed, and deliveries not acknowledged. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from rpcq.errors import ProtocolError
from rpcq.transport.base import Outgoing, Published
from rpcq.transport.rabbitmq.frames import Encoder

_CONFIRMED: Final = Published.CONFIRMED  # a member of an enum is slow to get at, in CPython 3.11


class Unconfirmed:
    """Messages handed to the socket of which the broker has not said what became.

    Confirms come in any order, and one may cover all up to its number; each message is visited once. A return has no
    number: it is told by routing key and correlation ID, and comes before its message's confirm
    (https://www.rabbitmq.com/docs/confirms#when-publishes-are-confirmed).

    Args:
        on_refused: the broker refused a message, whose `on_published` is called next.

    """

    def __init__(self, on_refused: Callable[[], None] = lambda: None) -> None:
        self._on_refused = on_refused
        self._waiting: dict[int, Outgoing] = {}
        self._next = 1
        self._low = 1  # no number below is waiting
        self._returned: dict[tuple[bytes, bytes], int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, messages: Iterable[Outgoing]) -> None:
        """Messages are handed to the socket: they have the channel's next numbers."""
        waiting, number = self._waiting, self._next
        for message in messages:
            waiting[number] = message
            number += 1
        self._next = number

    def returned(self, routing_key: bytes, correlation_id: bytes) -> None:
        """The broker returned a message."""
        key = routing_key, correlation_id
        self._returned[key] = self._returned.get(key, 0) + 1

    def confirmed(self, number: int, multiple: bool, accepted: bool) -> None:
        """The broker confirmed a message, or all up to it (a number of 0 means all).

        Raises:
            ProtocolError: no such number was sent.

        """
        if multiple and not number:
            number = self._next - 1
        if not 0 < number < self._next:
            msg = f"the broker confirmed message {number}, and {self._next - 1} were sent"
            raise ProtocolError(msg)
        if not multiple:
            message = self._waiting.pop(number, None)
            if number == self._low:
                self._advance(number + 1)
            if message is not None:
                self._settle(message, accepted)
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
                self._settle(message, accepted)

    def lost(self, most: int | None = None) -> list[tuple[Outgoing, Published]]:
        """All that still wait, and what became of them; the session is down.

        Args:
            most: where the broker ended it over a message with more bytes than these: that one was not taken, nor what
                came after it on the channel, which the broker does not read any more.

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

    def _settle(self, message: Outgoing, accepted: bool) -> None:
        if self._returned and message.mandatory:  # no other is ever returned
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
    """Deliveries that are not settled yet, in order: what is settled together is acknowledged in few frames.

    One frame acknowledges all up to its tag. It may be used where everything below has been settled as well: the
    broker closes the channel over a tag that it does not wait for.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._tags: dict[int, None] = {}  # as many as are prefetched
        self._accepted: set[int] = set()
        self._rejected: list[bytes] = []

    def __len__(self) -> int:
        return len(self._tags)

    def delivered(self, tag: int) -> None:
        """A delivery came."""
        self._tags[tag] = None

    def settle(self, tag: int, *, accept: bool, requeue: bool) -> None:
        """A delivery is settled; `frames` says so to the broker."""
        if accept:
            self._accepted.add(tag)
        else:
            del self._tags[tag]
            self._rejected.append(self._encoder.reject(tag, requeue=requeue))

    def frames(self) -> bytes:
        """What was settled since the last time, as frames to write."""
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
