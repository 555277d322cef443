"""Sends the requests of a client's calls: at once where there is a way, else in order as soon as there is one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from rpcq import logs
from rpcq.calls.gathering import Gathering
from rpcq.calls.outcomes import Call, CallEvent, Outcome, event_of_deadline, event_of_published
from rpcq.calls.pending import PendingCalls
from rpcq.calls.targets import Target
from rpcq.options import CallOptions, ClientOptions
from rpcq.runtime.backlog import Backlog
from rpcq.runtime.timeouts import Bucket
from rpcq.transport.base import Outgoing, Published, Transport
from rpcq.transport.sessions import Sessions
from rpcq.wire import requests
from rpcq.wire.batches import MAX_BATCH
from rpcq.wire.bodies import LINES
from rpcq.wire.replies import Notice

RESEND_PAUSE: Final = 0.01
"""The n-th resend of a call comes after this many seconds times 2**(n-1), at most 0.64 s; the first comes at once."""

KEPT_ELSEWHERE: Final = 1.0
"""Seconds that a client sends to the name of a service at least, before it tries the queue that delivers once again."""

log = logs.get_logger("rpcq.client")

_CONFIRMED: Final = Published.CONFIRMED
_CONFIRM: Final = CallEvent.CONFIRM


class ClientCall(Call):
    """A call with the future that its caller waits for, and all that it takes to send it.

    Attributes:
        deadline: on the monotonic clock.
        is_once: its last request was sent to one queue that delivers once, and to no other.
        written: when its last request was handed to the transport, on the monotonic clock.
        key: its idempotency key, or None.
        timeout: what ends it at its deadline.
        trace: headers that go with each of its requests, or None.

    """

    __slots__ = (
        "body",
        "deadline",
        "future",
        "is_once",
        "key",
        "options",
        "sender",
        "target",
        "timeout",
        "trace",
        "written",
    )

    def __init__(
        self,
        sender: Sender,
        correlation_id: bytes,
        target: Target,
        options: CallOptions,
        body: bytes,
        deadline: float,
        key: str | None,
        attempt: int,
    ) -> None:
        super().__init__(correlation_id, idempotent=options.idempotent)
        self.attempt = attempt
        self.key = key
        self.sender = sender
        self.target = target
        self.options = options
        self.body = body
        self.deadline = deadline
        self.is_once = False
        self.written = 0.0
        self.future: asyncio.Future[Outcome] = sender.loop.create_future()
        self.timeout: Bucket | asyncio.TimerHandle | None = None
        self.trace: Mapping[str, str] | None = None

    def ended(self, outcome: Outcome) -> None:
        """See `Call`."""
        if not self.future.done():  # its task may have been cancelled, and not have run since
            self.future.set_result(outcome)

    def again(self) -> None:
        """See `Call`."""
        self.sender.again(self)

    def elsewhere(self) -> None:
        """See `Call`."""
        self.sender.elsewhere(self)

    def headers(self, attempt: int) -> bytes:
        """The headers of a request of this call, without its times.

        Raises:
            TooLarge: the headers are over the limit.

        """
        return requests.encode_headers(key=self.key, attempt=attempt, metadata=self.options.metadata, trace=self.trace)


class _Request(Outgoing):
    """A request of a call; reports to the table what became of it."""

    __slots__ = ("call",)

    def __init__(self, call: ClientCall, routing_key: bytes, request_id: bytes, properties: bytes) -> None:
        # Does not call super().__init__(), to save time: one is made for each request.
        self.exchange = call.target.exchange
        self.routing_key = routing_key
        self.correlation_id = request_id
        self.properties = properties
        self.body = call.body
        self.mandatory = True
        self.call = call

    def on_published(self, settled: Published) -> None:
        call = self.call
        if call.request_id != self.correlation_id:
            return  # this was an earlier request of the call
        if settled is _CONFIRMED:
            call.sender.calls.happened(call, _CONFIRM)
        else:
            call.sender.failed(call, settled, len(self.properties))


class Sender:
    """Sends requests.

    Args:
        transport: what carries them.
        sessions: the client's sessions.
        calls: the table of calls under way.
        options: the client's.
        user: the broker's user, for the requests of a client that identifies itself; else empty.
        on_message: called with the number of requests in each message; None for no callback.

    Attributes:
        loop: the event loop, once opened.
        encoder: encodes requests with the name of the reply queue; None while the consuming session is down.
        waiting: calls that wait until they can be sent, in order.
        resent: requests that were sent again, because a session was lost or a worker turned the call away.
        gathering: gathers requests that go in one message.

    """

    def __init__(
        self,
        transport: Transport,
        sessions: Sessions,
        calls: PendingCalls,
        options: ClientOptions,
        *,
        user: str,
        on_message: Callable[[int], None] | None,
    ) -> None:
        self._transport = transport
        self._on_message = on_message
        self._sessions = sessions
        self.calls = calls
        self._name = options.name
        self._user = user
        # A worker does not know this client's limit, and could exceed it only with a batch.
        self._batches = options.batching and options.max_body >= MAX_BATCH
        self._unrun_within = options.unrun_within
        # Services that have no queue which delivers once -> when that was found, on the monotonic clock.
        self._not_once: dict[bytes, float] = {}
        self.loop: asyncio.AbstractEventLoop
        self.encoder: requests.RequestEncoder | None = None
        self._batch_encoder: requests.RequestEncoder
        self.gathering = Gathering(self)
        self.waiting: Backlog[ClientCall] = Backlog(
            lambda: sessions.can_exchange, sessions.ready, self._publish_waiting
        )
        self.resent = 0

    def open(self) -> None:
        """From now on, in this event loop."""
        self.loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Send nothing more."""
        await self.waiting.close()

    # The consuming session.

    def consuming(self, reply_queue: str) -> None:
        """The consuming session is up, with this reply queue."""
        self.encoder = requests.RequestEncoder(reply_queue, self._name, self._user, batches=self._batches)
        self._batch_encoder = requests.RequestEncoder(
            reply_queue, self._name, self._user, batches=self._batches, content_type=LINES
        )

    def consuming_lost(self) -> None:
        """The consuming session is down: there is no reply queue."""
        self.encoder = None

    async def reply_queue(self) -> bytes:
        """Wait until a message can be sent and be replied to; returns the name of the reply queue."""
        await self._sessions.ready()
        assert self.encoder is not None  # noqa: S101 - it is there while the consuming session is up
        return self.encoder.reply_to

    # Calls.

    def send(self, call: ClientCall) -> None:
        """Send a request of the call."""
        if self.encoder is not None and not self.waiting.items and self._transport.can_publish:
            if not self.gathering.told or not self.gathering.hold(call):
                self._publish(call, self.encoder)
        else:
            self.waiting.add(call)

    @property
    def can_send(self) -> bool:
        """Whether a request that is sent now is written at once, and none waits that must go before it."""
        return self.encoder is not None and not self.waiting.items and self._transport.can_publish

    def again(self, call: ClientCall) -> None:
        """Send another request: a session was lost, or a worker turned the call away."""
        self.resent += 1
        log.info("call is sent again", correlation_id=call.correlation_id.decode(), attempt=call.attempt)
        # Deferred: the transport may still be reporting losses.
        pause = RESEND_PAUSE * 2 ** min(call.sent - 1, 6) if call.sent > 1 else 0
        self.loop.call_later(pause, self._resend, call)

    def elsewhere(self, call: ClientCall) -> None:
        """Send the call under the name of the service: it has no queue that delivers once."""
        self._not_once[call.target.routing_key] = time.monotonic()
        self.loop.call_soon(self._resend, call)

    def failed(self, call: ClientCall, published: Published, size: int) -> None:
        """The broker does not have the last request of a call, or may not have it; its properties are `size` bytes."""
        why = ""
        if published is Published.TOO_LARGE:
            why = f"its body is {len(call.body)} bytes, its properties are {size}"
        elif published is Published.REFUSED and not call.is_once:
            self._look_again(call)
        elif published is Published.RETURNED and not call.is_once:
            self._not_once.pop(call.target.routing_key, None)
        event = event_of_published(published, is_once=call.is_once, is_ours=call.target.is_ours)
        self.calls.happened(call, event, why=why)

    def is_unrun(self, call: ClientCall, notice: Notice) -> bool:
        """Whether a notice of expiry proves that the last request of a call was never delivered."""
        once_key = call.target.once_key.decode()
        if not call.is_once and notice.queue == once_key:
            self._look_again(call)
        in_time = time.monotonic() - call.written < self._unrun_within
        return call.is_once and notice.queue == once_key and in_time

    def _look_again(self, call: ClientCall) -> None:
        """Try the queue that delivers once with the next request: its outcome would have been certain."""
        service = call.target.routing_key
        found = self._not_once.get(service)
        if found is not None and time.monotonic() - found > KEPT_ELSEWHERE:
            del self._not_once[service]

    # For the gathering.

    def confirmed(self, calls: Sequence[ClientCall]) -> None:
        """The broker has the message with the last requests of these calls."""
        for call in calls:
            self.calls.happened(call, _CONFIRM)

    def publish_alone(self, call: ClientCall) -> None:
        """Publish the request of a call, in a message of its own. Only while it can be sent.

        The caller's task does not run now: what cannot be written is an error for that call, and for no other.
        """
        if self.encoder is None:
            return
        try:
            self._publish(call, self.encoder)
        except Exception as error:  # noqa: BLE001 - raised by what an observer gave as trace context
            self.cannot_write(call, error)

    def cannot_write(self, call: ClientCall, error: Exception) -> None:
        """Let the caller of a call get the error that its request cannot be written with."""
        if not call.future.done():
            call.future.set_exception(error)

    def encode_batch(self, batch_id: bytes, left_ms: int, headers: bytes) -> bytes:
        """Encode the properties of a message batch; arguments as in `RequestEncoder.encode`."""
        deadline_ms = int(time.time() * 1000) + left_ms
        return self._batch_encoder.encode(batch_id, requests.REQUESTS, left_ms, deadline_ms, headers, notify=True)

    def publish(self, message: Outgoing, calls: int) -> None:
        """Publish a message with the requests of so many calls."""
        if self._on_message is not None:
            self._on_message(calls)
        self._transport.publish(message)

    def way_to(self, target: Target) -> tuple[bool, bytes]:
        """Whether a request goes to one queue that delivers once, and no other; and its routing key."""
        service = target.routing_key
        is_once = target.once_key != b"" and service not in self._not_once
        return is_once, target.once_key if is_once else service

    def expire(self, call: ClientCall) -> None:
        """The deadline of a call has come."""
        event = event_of_deadline(is_connected=not self._sessions.down, can_publish=self._transport.can_publish)
        self.calls.happened(call, event)

    def _resend(self, call: ClientCall) -> None:
        if not call.future.done():
            self.send(call)

    def _publish_waiting(self, call: ClientCall) -> None:
        if self.encoder is None or call.future.done():
            return
        if not self.gathering.told or not self.gathering.hold(call):
            self.publish_alone(call)

    def _publish(self, call: ClientCall, encoder: requests.RequestEncoder) -> None:
        target, options = call.target, call.options
        now = time.monotonic()
        left_ms = int((call.deadline - now) * 1000)
        if left_ms < 1:
            return  # its timeout is about to come
        call.is_once, routing_key = self.way_to(target)
        call.written = now
        request_id = self.calls.write(call)
        properties = encoder.encode(
            request_id,
            target.method,
            left_ms,
            int(time.time() * 1000) + left_ms,
            call.headers(call.attempt) if options.metadata or call.key is not None or call.trace is not None else b"",
            notify=target.is_ours,
        )
        self.publish(_Request(call, routing_key, request_id, properties), 1)
