"""Gathers the requests of one iteration of the event loop into messages, where a service takes several in one.

    hold -> nobody said that the service takes several, or few calls are under way -> not held: sent alone, at once
         -> else                                                                   -> sent when the iteration ends

There is no timer: nothing waits for calls that are not made yet. A message batch is a carrier. What becomes of it is an
event for each of its calls, by the table of `rpcq.calls.outcomes`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, Final

from rpcq import logs
from rpcq.transport.base import Outgoing, Published
from rpcq.wire import requests
from rpcq.wire.batches import HEAD_SIZE, MAX_BATCH, MAX_ENTRY, MAX_REQUESTS, write_head, write_requests

if TYPE_CHECKING:
    from rpcq.calls.sending import ClientCall, Sender

SHARE: Final = 8
"""A message has at most this part of the calls under way: with several workers, each must get some."""

FEWEST: Final = 2 * SHARE
"""Calls under way below which each goes alone, at once."""

APART: Final = 1.0
"""Seconds that the deadlines of calls in one message differ at most; a tenth of the least time left if that is less."""

BARRED: Final = 60.0
"""Seconds for which a service gets no message batch after one of its workers could not read one."""

log = logs.get_logger("rpcq.client")


class RequestBatch(Outgoing):
    """Requests in one message; reports to each of their calls what became of it."""

    __slots__ = ("gathering", "service")

    def __init__(
        self,
        gathering: Gathering,
        service: bytes,
        exchange: bytes,
        routing_key: bytes,
        batch_id: bytes,
        properties: bytes,
        body: bytes,
    ) -> None:
        super().__init__(exchange, routing_key, batch_id, properties, body)
        self.gathering = gathering
        self.service = service

    def on_published(self, published: Published) -> None:
        """See `Outgoing`."""
        self.gathering.published(self, published)


class Gathering:
    """Gathers requests.

    Args:
        sender: publishes them.

    Attributes:
        told: services whose workers said how many calls they want in one message -> that number.

    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._most_bytes = MAX_BATCH
        self.told: dict[bytes, int] = {}
        self._barred: dict[bytes, float] = {}  # services -> until when they get no message batch
        self._held: dict[bytes, list[ClientCall]] = {}

    def told_by(self, call: ClientCall, takes: int) -> None:
        """A worker said with its reply to a call how many calls it wants in one message; 0 for one."""
        if not call.target.is_ours:
            return
        service = call.target.routing_key
        until = self._barred.get(service)
        if until is not None:
            if time.monotonic() < until:
                return
            del self._barred[service]
        if takes > 1:
            self.told[service] = min(takes, MAX_REQUESTS)
        else:
            self.told.pop(service, None)

    def bar(self, service: bytes) -> None:
        """A worker of the service cannot read message batches: send it none for a minute."""
        log.info("a worker reads no message batches: its service gets none for a while", service=service.decode())
        self._barred[service] = time.monotonic() + BARRED
        self.told.pop(service, None)

    def hold(self, call: ClientCall) -> bool:
        """Hold a call until the iteration ends. Returns False if it is to be sent alone, at once."""
        service = call.target.routing_key
        if (
            service not in self.told
            or len(self._sender.calls) < FEWEST
            or call.sent
            or call.attempt > 1
            or not call.target.is_ours
            or len(call.body) > MAX_ENTRY
        ):
            return False
        held = self._held.get(service)
        if held is None:
            if not self._held:
                self._sender.loop.call_soon(self._flush)
            held = self._held[service] = []
        held.append(call)
        return True

    def published(self, batch: RequestBatch, published: Published) -> None:
        """The broker has a message batch, or does not have it: that is news for each of its calls."""
        sender = self._sender
        calls: Any = sender.calls.together(batch.correlation_id)
        if published is Published.CONFIRMED:
            sender.confirmed(calls)
            return
        if published is Published.TOO_LARGE:
            self._most_bytes = min(self._most_bytes, len(batch.body) // 2)
            published = Published.UNSENT  # it took no message of this size: each request goes alone
        for call in calls:
            sender.failed(call, published, len(batch.properties))

    def _flush(self) -> None:
        """The iteration has ended: send what was held."""
        held, self._held = self._held, {}
        for service, calls in held.items():
            live = [call for call in calls if not call.future.done()]
            most = min(self.told.get(service, 1), len(self._sender.calls) // SHARE)
            if most < 2 or len(live) < 2:
                groups: list[list[ClientCall]] = [[call] for call in live]
            else:
                groups = [part for group in by_deadline(live, time.monotonic()) for part in split(group, most)]
            for group in groups:
                self._send(service, group)

    def _send(self, service: bytes, group: list[ClientCall]) -> None:
        sender = self._sender
        if not sender.can_send:
            for call in group:
                sender.waiting.add(call)
        elif len(group) == 1:
            sender.publish_alone(group[0])
        else:
            self._publish(service, group)

    def _publish(self, service: bytes, calls: list[ClientCall]) -> None:
        """Publish requests in one message, or in several if they have too many bytes."""
        sender = self._sender
        now = time.monotonic()
        shared = _shared(calls)
        written: list[ClientCall] = []
        heads: list[bytes] = []
        size = 0
        for call in calls:
            left_ms = int((call.deadline - now) * 1000)
            if left_ms < 1:
                continue  # its timeout is about to come
            try:
                head = write_head(call.request_id, call.target.method, left_ms, _headers(call, shared))
            except Exception as error:  # noqa: BLE001 - raised by what an observer gave as trace context
                sender.cannot_write(call, error)
                continue
            if len(head) > MAX_ENTRY or b"\n" in call.body:
                sender.publish_alone(call)
                continue
            more = len(head) + len(call.body) + 2
            if size + more + HEAD_SIZE > self._most_bytes and written:
                self._publish_batch(service, written, heads, shared, now)
                written, heads, size = [], [], 0
            written.append(call)
            heads.append(head)
            size += more
        if written:
            self._publish_batch(service, written, heads, shared, now)

    def _publish_batch(
        self, service: bytes, calls: list[ClientCall], heads: list[bytes], shared: Mapping[str, str], now: float
    ) -> None:
        sender = self._sender
        if len(calls) == 1:
            sender.publish_alone(calls[0])
            return
        target = calls[0].target
        is_once, routing_key = sender.way_to(target)
        batch_id = sender.calls.next_id()
        least = min(call.deadline for call in calls)
        properties = sender.encode_batch(
            batch_id,
            int((least - now) * 1000),
            requests.encode_headers(key=None, attempt=1, metadata=shared) if shared else b"",
        )
        body = write_requests(heads, [call.body for call in calls])
        for call in calls:
            call.is_once = is_once
            call.written = now
            sender.calls.write(call)
        sender.calls.put_together(batch_id, calls)
        sender.publish(
            RequestBatch(self, service, target.exchange, routing_key, batch_id, properties, body), len(calls)
        )


def by_deadline(calls: Sequence[ClientCall], now: float) -> list[list[ClientCall]]:
    """Put calls together whose deadlines are near each other, in their order; `now` on `time.monotonic()`."""
    deadlines = [call.deadline for call in calls]
    groups: list[list[int]] = []
    until = -inf
    for number in sorted(range(len(calls)), key=deadlines.__getitem__):
        at = deadlines[number]
        if at <= until:
            groups[-1].append(number)
        else:
            groups.append([number])
            until = at + min(APART, (at - now) / 10)
    return [[calls[number] for number in sorted(group)] for group in groups]


def split(calls: list[ClientCall], most: int) -> list[list[ClientCall]]:
    """Split calls into as few parts as possible of at most `most`, and of about the same size."""
    parts = -(-len(calls) // most)
    size = -(-len(calls) // parts)
    return [calls[at : at + size] for at in range(0, len(calls), size)]


def _shared(calls: Sequence[ClientCall]) -> Mapping[str, str]:
    """The metadata that all of these calls have: it goes once, in the headers of the message."""
    first = calls[0].options.metadata
    return first if all(call.options.metadata == first for call in calls) else {}


def _headers(call: ClientCall, shared: Mapping[str, str]) -> dict[str, str]:
    """The headers of a request that are not those of the message."""
    own: dict[str, str] = {}
    if call.options.metadata and not shared:
        own.update(call.options.metadata)
    if call.key is not None:
        own[requests.KEY] = call.key
    if call.trace is not None:
        own.update(call.trace)
    return own
