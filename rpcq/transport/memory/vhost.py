"""What RabbitMQ does with messages: exchanges, queues, consumers, expiry and dead letters. Pure.

It has no event loop and no clock: the owner of a `Vhost` passes the monotonic time as `now`, in seconds, and delivers
what it finds in `Vhost.outbox`. The rules are RabbitMQ's, from these pages; what they leave open was observed on 3.10:

    https://www.rabbitmq.com/docs/queues      arguments, exclusive, auto-delete, reserved names, equivalence
    https://www.rabbitmq.com/docs/ttl         TTL of messages and of queues: a message expires only at the head
    https://www.rabbitmq.com/docs/ae          alternate exchanges
    https://www.rabbitmq.com/docs/e2e         bindings between exchanges
    https://www.rabbitmq.com/docs/dlx         dead-lettering: reasons, headers, cycles
    https://www.rabbitmq.com/docs/maxlength   only messages that are ready count; reject-publish and drop-head
    https://www.rabbitmq.com/docs/quorum-queues   delivery limit; x-delivery-count
    https://www.rabbitmq.com/docs/consumers#single-active-consumer   one consumer gets everything while it is there
    https://www.rabbitmq.com/docs/sender-selected CC
    https://www.rabbitmq.com/tutorials/amqp-concepts#exchange-topic   wildcards of topic exchanges

Other arguments of a queue are not supported; they are refused by name rather than ignored. BCC and priorities are not
supported either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from heapq import heappop, heappush
from itertools import count
from secrets import token_urlsafe
from typing import Any, Final

from rpcq.errors import AccessRefused, NotFound, PreconditionFailed, ResourceLocked, TopologyMismatch
from rpcq.transport.base import Published
from rpcq.transport.memory.queues import DEFAULT_EXCHANGE, Connection, Consumer, Entry, Handed, LiveQueue
from rpcq.transport.memory.routing import LiveExchange
from rpcq.transport.memory.rules import (
    Reason,
    check_arguments,
    check_equivalent,
    check_reserved,
    check_user,
    is_cycle,
    milliseconds,
    record_death,
)
from rpcq.wire.properties import EXPIRATION, HEADERS, USER_ID, MalformedProperties, decode, encode
from rpcq.wire.topology import Exchange, Queue

_HIGH_BYTE: Final = (HEADERS | EXPIRATION) >> 8


class Vhost:
    """Exchanges and queues, and all that happens to their messages.

    Args:
        wall: returns the time for the headers of dead letters, with a time zone.

    Attributes:
        outbox: messages that were handed to consumers, in order; the owner takes them out and delivers them.
        on_publish: for tests: called with each message that is published (exchange, routing key, properties, body), and
            whether a queue takes it; None for nothing.

    """

    def __init__(self, wall: Callable[[], datetime]) -> None:
        self.outbox: deque[Handed] = deque()
        self.queues: dict[str, LiveQueue] = {}
        self.on_publish: Callable[[bytes, bytes, bytes, bytes, bool], None] | None = None
        self._wall = wall
        # Every queue is bound to the default exchange under its name.
        self._exchanges: dict[bytes, LiveExchange] = {}
        self._exchanges[DEFAULT_EXCHANGE] = LiveExchange(Exchange(""), self._exchanges)
        self._wakes: list[tuple[float, int, LiveQueue]] = []
        self._ties = count()
        self._letters: list[tuple[LiveQueue, Entry]] | None = None  # dead letters that are held back; see `settle`

    @property
    def next_expiry(self) -> float | None:
        """When to call `expire` next, if nothing happens until then."""
        return self._wakes[0][0] if self._wakes else None

    def declare_exchange(self, exchange: Exchange) -> None:
        """Declare an exchange, or find the existing one.

        Raises:
            AccessRefused: the name is reserved for RabbitMQ.
            NotFound: there is no exchange to bind it to.
            TopologyMismatch: it exists with another type or alternate exchange, or is internal and should not be, or
                the reverse.

        """
        check_reserved("exchange", exchange.name)
        live = self._exchanges.setdefault(exchange.name.encode(), LiveExchange(exchange, self._exchanges))
        if replace(live.declared, bindings=()) != replace(exchange, bindings=()):
            msg = f"PRECONDITION_FAILED - the exchange {exchange.name!r} exists as {live.declared}, not as {exchange}"
            raise TopologyMismatch(msg)
        for name, key in exchange.bindings:
            source = self._exchanges.get(name.encode())
            if source is None:
                msg = f"NOT_FOUND - no exchange {name!r} to bind the exchange {exchange.name!r} to"
                raise NotFound(msg)
            source.bind_exchange(live, key.encode())

    def declare_queue(self, queue: Queue, connection: Connection) -> str:
        """Declare and bind a queue, or find the existing one; returns its name.

        Raises:
            AccessRefused: the name is reserved for RabbitMQ, or a binding is to the default exchange.
            NotFound: there is no exchange to bind it to; or it is to be used as it is, and does not exist.
            ResourceLocked: it is exclusive to another connection.
            PreconditionFailed: it exists with other arguments (`TopologyMismatch`), or its arguments are not allowed.

        """
        check_reserved("queue", queue.name)
        live = self.queues.get(queue.name)
        if live is None and queue.as_it_is:
            msg = f"the queue {queue.name!r} must exist, because its service has declare_queue=False: NOT_FOUND"
            raise NotFound(msg)
        if live is None:
            live = self._create(queue, connection)
        else:
            _check_owner(live, connection)
            if not queue.as_it_is:
                check_equivalent(live.declared, queue)
        for exchange, key in (*queue.bindings, *((exchange, live.name) for exchange in queue.bound_by_name)):
            self._bind(live, exchange, key)
        return live.name

    def consume(
        self,
        name: str,
        connection: Connection,
        deliver: Callable[[Handed], None],
        *,
        prefetch: int,
        no_ack: bool,
        now: float,
    ) -> Consumer:
        """Add a consumer to a queue, and hand it messages up to its prefetch.

        Raises:
            NotFound: the queue does not exist.
            ResourceLocked: the queue is exclusive to another connection.

        """
        live = self.queues.get(name)
        if live is None:
            msg = f"NOT_FOUND - no queue {name!r}"
            raise NotFound(msg)
        _check_owner(live, connection)
        consumer = Consumer(live, connection, deliver, prefetch, no_ack)
        live.add_consumer(consumer)
        connection.consumers.append(consumer)
        self._serve(live, now)
        return consumer

    def cancel(self, consumer: Consumer, now: float) -> None:
        """Remove a consumer from its queue. Its deliveries can still be settled.

        If it was the single active one, the next one becomes active at once, whatever the first one still holds.
        """
        self._remove(consumer)
        self._serve(consumer.queue, now)

    def hand_over(self, consumer: Consumer, now: float) -> list[int]:
        """Remove a consumer, and put back what it holds before another one gets anything: its channel is closed.

        Returns the tags of what it held; they cannot be settled any more.
        """
        self._remove(consumer)
        unacked = consumer.connection.unacked
        held = [tag for tag, (holder, _, _) in unacked.items() if holder is consumer]
        if held:
            self._return(consumer.queue, [unacked.pop(tag)[2] for tag in held], now)
        self._serve(consumer.queue, now)
        return held

    def disconnect(self, connections: Iterable[Connection], now: float) -> None:
        """End connections, all at once: remove their consumers and exclusive queues, and put back what they hold."""
        ended = list(connections)
        touched: dict[LiveQueue, Any] = {}
        for connection in ended:
            for consumer in connection.consumers[:]:
                self._remove(consumer)
                if consumer.queue.is_single:
                    touched[consumer.queue] = None
            for queue in connection.exclusive:
                self._delete(queue)
        for connection in ended:
            held: dict[LiveQueue, list[Entry]] = {}
            for consumer, _, entry in connection.unacked.values():
                held.setdefault(consumer.queue, []).append(entry)
            connection.unacked.clear()
            for queue, entries in held.items():
                self._return(queue, entries, now)
            touched.update(held)
        for queue in touched:
            self._serve(queue, now)

    def publish(
        self,
        exchange: bytes,
        routing_key: bytes,
        properties: bytes,
        body: bytes,
        mandatory: bool,
        now: float,
    ) -> Published:
        """Route a message to its queues; returns whether it was confirmed, returned or refused.

        RabbitMQ would close the channel in the first three cases, with 404, 406 and 403.

        Raises:
            NotFound: the exchange does not exist.
            PreconditionFailed: the expiration or the header CC is invalid, or `user_id` names another user.
            AccessRefused: the exchange is internal.
            MalformedProperties: the properties cannot be read. Only those that are needed are read.

        """
        live = self._exchanges.get(exchange)
        if live is None:
            msg = f"NOT_FOUND - no exchange {exchange.decode(errors='replace')!r}"
            raise NotFound(msg)
        if live.declared.internal:
            msg = f"ACCESS_REFUSED - cannot publish to internal exchange {live.declared.name!r}"
            raise AccessRefused(msg)
        expires = None
        if len(properties) < 2:
            raise MalformedProperties("the properties end early")
        # A search for the header's name is much cheaper than decoding; a false match only costs time.
        if properties[0] & _HIGH_BYTE and (properties[0] & (EXPIRATION >> 8) or b"\x02CC" in properties):
            found = decode(properties)
            if found.expiration is not None:
                expires = now + milliseconds(found.expiration) / 1000
            targets = live.route(routing_key, found.headers)
        else:
            targets = live.bound_to(routing_key)
        if properties[1] & USER_ID:
            check_user(decode(properties).user_id)
        if self.on_publish is not None:
            self.on_publish(exchange, routing_key, properties, body, bool(targets))
        if not targets:
            return Published.RETURNED if mandatory else Published.CONFIRMED
        published = Published.CONFIRMED
        for queue in targets:
            if not self._enqueue(queue, Entry(exchange, routing_key, properties, body, expires), now):
                published = Published.REFUSED
        return published

    def settle(self, connection: Connection, tag: int, accept: bool, requeue: bool, now: float) -> None:
        """Acknowledge or reject a delivery of a connection.

        Raises:
            PreconditionFailed: the connection does not hold this tag; RabbitMQ would close the channel, with 406.

        """
        handed = connection.unacked.pop(tag, None)
        if handed is None:
            msg = f"PRECONDITION_FAILED - unknown delivery tag {tag}"
            raise PreconditionFailed(msg)
        consumer, _, entry = handed
        queue = consumer.queue
        if requeue and queue.quorum and queue.delivery_limit is None:
            queue.put_last(entry)
        elif requeue:
            self._return(queue, [entry], now)
        if consumer.held == consumer.prefetch and not consumer.cancelled:
            queue.available.append(consumer)
        consumer.held -= 1
        letters: list[tuple[LiveQueue, Entry]] = []
        if not accept and not requeue and not queue.deleted:
            # The dead letter arrives before those of messages that have expired meanwhile, but after the consumer got
            # its next message. So a full queue that is its own dead-letter target has room for it.
            self._letters = letters
            self._dead_letter(queue, entry, "rejected", now)
        if queue.ready:
            self._serve(queue, now)
        self._letters = None
        for target, letter in letters:
            if not target.deleted:
                self._enqueue(target, letter, now)

    def expire(self, now: float) -> None:
        """Give up messages that have expired at the heads of their queues."""
        while self._wakes and self._wakes[0][0] <= now:
            queue = heappop(self._wakes)[2]
            queue.wake = None
            self._serve(queue, now)

    def _remove(self, consumer: Consumer) -> None:
        consumer.connection.consumers.remove(consumer)
        queue = consumer.queue
        queue.remove_consumer(consumer)
        if queue.declared.auto_delete and not queue.consumers:
            self._delete(queue)

    def _create(self, queue: Queue, connection: Connection) -> LiveQueue:
        check_arguments(queue)
        name = queue.name or f"amq.gen-{token_urlsafe(16)}"
        live = LiveQueue(name, queue, connection if queue.exclusive else None)
        self.queues[name] = live
        self._exchanges[DEFAULT_EXCHANGE].bind(live, name.encode())
        if queue.exclusive:
            connection.exclusive.append(live)
        return live

    def _bind(self, queue: LiveQueue, exchange: str, key: str) -> None:
        if not exchange:
            raise AccessRefused("ACCESS_REFUSED - operation not permitted on the default exchange")
        live = self._exchanges.get(exchange.encode())
        if live is None:
            msg = f"NOT_FOUND - no exchange {exchange!r} to bind the queue {queue.name!r} to"
            raise NotFound(msg)
        if live.bind(queue, key.encode()):
            queue.bound.append((exchange.encode(), key.encode()))

    def _delete(self, queue: LiveQueue) -> None:
        if queue.deleted:
            return
        queue.deleted = True
        queue.ready.clear()
        del self.queues[queue.name]
        for exchange, key in queue.bound:
            self._exchanges[exchange].unbind(queue, key)

    def _enqueue(self, queue: LiveQueue, entry: Entry, now: float) -> bool:
        """Add a message; returns whether the queue took it. Its limit counts ready messages only."""
        if queue.max_length is not None and len(queue.ready) >= queue.max_length:
            self._serve(queue, now)  # remove messages that have expired since the last call
            if len(queue.ready) >= queue.max_length:
                if not queue.drops_head:
                    return False
                queue.ready.popleft()
        entry.position = next(queue.positions)
        if queue.ttl is not None:
            expires = now + queue.ttl / 1000
            entry.expires = expires if entry.expires is None else min(expires, entry.expires)
        if queue.available and not queue.ready:  # before the TTL is checked: with a TTL of 0, a free consumer gets it
            self._hand_over(queue, entry)
            return True
        queue.ready.append(entry)
        if entry.expires is not None and len(queue.ready) == 1:
            self._serve(queue, now)
        return True

    def _serve(self, queue: LiveQueue, now: float) -> None:
        """Hand out what consumers can take, give up an expired head, and plan the expiry of the next head."""
        while queue.ready:
            expires = queue.ready[0].expires
            if expires is not None and expires <= now:
                self._dead_letter(queue, queue.ready.popleft(), "expired", now)
            elif queue.available:
                self._hand_over(queue, queue.ready.popleft())
            else:
                if expires is not None and (queue.wake is None or expires < queue.wake):
                    queue.wake = expires
                    heappush(self._wakes, (expires, next(self._ties), queue))
                return

    def _hand_over(self, queue: LiveQueue, entry: Entry) -> None:
        available = queue.available
        consumer = available[0]
        connection = consumer.connection
        connection.last_tag = tag = connection.last_tag + 1
        handed = (consumer, tag, entry)
        if consumer.no_ack:
            available.rotate(-1)
        else:
            connection.unacked[tag] = handed
            consumer.held += 1
            if consumer.held == consumer.prefetch:
                available.popleft()
            else:
                available.rotate(-1)
        self.outbox.append(handed)

    def _return(self, queue: LiveQueue, entries: list[Entry], now: float) -> None:
        if queue.deleted:
            return
        kept = []
        for entry in entries:
            entry.deliveries += 1
            if queue.delivery_limit is not None and entry.deliveries > queue.delivery_limit:
                self._dead_letter(queue, entry, "delivery_limit", now)
            else:
                kept.append(entry)
        if kept:
            queue.put_back(kept)

    def _dead_letter(self, queue: LiveQueue, entry: Entry, reason: Reason, now: float) -> None:
        """Route a message that its queue gives up, under its own keys or the queue's `x-dead-letter-routing-key`.

        It is dropped if no queue takes it.
        """
        if queue.dead_letter_exchange is None:
            return
        exchange = self._exchanges.get(queue.dead_letter_exchange)
        if exchange is None:
            return
        try:
            properties = decode(entry.properties)
        except MalformedProperties:
            return  # unreadable properties: x-death cannot be added. RabbitMQ would have refused the message.
        headers = properties.headers or {}
        key = entry.routing_key if queue.dead_letter_key is None else queue.dead_letter_key
        targets = exchange.route(key, headers if queue.dead_letter_key is None else None)
        deaths = record_death(
            headers, queue.name, reason, entry.exchange, entry.routing_key, properties.expiration, self._wall()
        )
        if queue.dead_letter_key is not None:
            headers.pop("CC", None)
        properties.headers = headers
        properties.expiration = None  # otherwise it would expire again in the next queue
        raw = encode(properties)
        for target in targets:
            if reason == "rejected" or not is_cycle(target.name, deaths):
                letter = Entry(queue.dead_letter_exchange, key, raw, entry.body, None)
                if self._letters is None:
                    self._enqueue(target, letter, now)
                else:
                    self._letters.append((target, letter))


def _check_owner(queue: LiveQueue, connection: Connection) -> None:
    if queue.owner is not None and queue.owner is not connection:
        msg = f"RESOURCE_LOCKED - the queue {queue.name!r} is exclusive to another connection"
        raise ResourceLocked(msg)
