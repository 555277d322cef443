"""Takes the requests that are delivered to a worker: reads each, and has it run or refused.

    delivery -> there is no way to reply to it               -> dropped
             -> a message batch                              -> each of its requests, as if it had come alone:
             -> a redelivery of a call that is in hand here  -> the run takes it over
             -> its caller has cancelled the call            -> dropped
             -> admitted                                     -> Replier.begin
             -> refused                                      -> Replier.refuse

Requests that come while nothing can be published wait until it can: no call begins that cannot be replied to.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any, Final

from rpcq import logs
from rpcq.calls.admission import ExpiredOnArrival, admit, why_it_may_have_run
from rpcq.calls.carrier import Carrier
from rpcq.calls.in_hand import CallRun, Key
from rpcq.calls.replying import Replier
from rpcq.calls.slots import Slots
from rpcq.errors import CallError, PermissionDenied, ServiceUnavailable, TooLarge
from rpcq.observer import ObservedRequest, Observers
from rpcq.options import MAX_PROPERTIES, MAX_TIMEOUT, WorkerOptions
from rpcq.runtime.backlog import Backlog
from rpcq.service import Service
from rpcq.transport.base import Delivery
from rpcq.transport.sessions import Sessions
from rpcq.wire import requests
from rpcq.wire.batches import MAX_BATCH, read_requests
from rpcq.wire.bodies import LINES, why_not_read
from rpcq.wire.properties import MalformedProperties, Properties
from rpcq.wire.requests import Request
from rpcq.wire.topology import Topology

REMEMBERED_CANCELS: Final = 10_000
"""Calls cancelled before they arrived that a worker remembers."""

log = logs.get_logger("rpcq.worker")


class Taking(Enum):
    """What an intake does with requests."""

    ALL = auto()
    """Requests are admitted as usual."""
    REPLAYS = auto()
    """No new call runs; stored results are still replayed."""
    NOTHING = auto()
    """All are left to the broker."""


_NOTHING: Final = Taking.NOTHING
_REPLAYS: Final = Taking.REPLAYS
"""Names of their own: getting at a member of an enum takes as long as calling a function in CPython 3.11."""


@dataclass(eq=False, slots=True)
class Served:
    """A service that is served, with what its lifespan yielded."""

    service: Service
    state: Any
    slots: Slots


@dataclass(eq=False, slots=True)
class Waiting:
    """A request that waits until it can be replied to."""

    served: Served
    delivery: Delivery


class Intake:
    """Takes requests.

    Args:
        replier: what runs and refuses them.
        sessions: the worker's sessions.
        topology: of the namespace.
        options: the worker's.
        observers: the worker's.

    Attributes:
        taking: what it does with requests.
        waiting: messages that wait until something can be published.
        slots: of the services that are served, by name.
        expired_on_arrival: requests answered and not run, because their deadline had passed.

    """

    def __init__(
        self,
        replier: Replier,
        sessions: Sessions,
        topology: Topology,
        options: WorkerOptions,
        observers: Observers,
    ) -> None:
        self._replier = replier
        self._sessions = sessions
        self._requests = topology.requests.name.encode()
        self._options = options
        self._observers = observers
        self._reply_prefixes = topology.reply_prefixes(options.reply_exchange)
        self._allowed = [re.compile(pattern.encode()) for pattern in options.reply_to]
        self._cancels: dict[Key, float] = {}
        self._seldom = logs.Seldom(log)
        self.slots: dict[str, Slots] = {}
        self.taking = Taking.ALL
        self.waiting: Backlog[Waiting] = Backlog(
            lambda: sessions.can_exchange, sessions.ready, lambda it: self._take(it.served, it.delivery)
        )
        self.expired_on_arrival = 0

    def serve(self, service: Service, state: Any) -> Callable[[Delivery], None]:
        """The callback for the deliveries of a service; `state` is what its lifespan yielded."""
        # It asks for no messages that it would not keep. Smaller ones, which others asked for, it takes.
        batching = service.batching and self._options.max_body >= MAX_BATCH
        slots = Slots(self._options.prefetch, batching=batching)
        self.slots[service.name] = slots
        return partial(self._on_delivery, Served(service, state, slots))

    def takes(self, service: str) -> int:
        """How many calls a service wants in one message now; 0 for one."""
        slots = self.slots.get(service)
        return 0 if slots is None else slots.takes

    def stop(self) -> None:
        """Begin no new call: the worker shuts down."""
        self.taking = Taking.REPLAYS
        for slots in self.slots.values():
            slots.close()
            self._replier.turn_away_waiting(slots)

    async def close(self) -> None:
        """Take nothing more."""
        self.taking = Taking.NOTHING
        await self.waiting.close()
        for slots in self.slots.values():
            slots.release()

    def is_reply_queue(self, reply_to: bytes) -> bool:
        """Whether a queue is the reply queue of an rpcq client, by its name."""
        return reply_to.startswith(self._reply_prefixes)

    def may_reply_to(self, reply_to: bytes) -> bool:
        """Whether this worker replies to a queue: a reply queue, or one that its option `reply_to` allows."""
        return reply_to.startswith(self._reply_prefixes) or any(it.fullmatch(reply_to) for it in self._allowed)

    def cancel(self, key: Key, found: Properties) -> None:
        """The caller of a call is gone; `found` are the properties of the control message."""
        if self._replier.cancel(key):
            return
        # It may still be in the queue, or with another worker.
        now_ms = time.time() * 1000
        until = (found.headers or {}).get(requests.DEADLINE)
        self._cancels[key] = until if isinstance(until, int) else now_ms + MAX_TIMEOUT * 1000
        if len(self._cancels) > REMEMBERED_CANCELS:
            kept = [(it, end) for it, end in self._cancels.items() if end > now_ms]
            self._cancels = dict(kept[-REMEMBERED_CANCELS // 2 :])

    def _on_delivery(self, served: Served, delivery: Delivery) -> None:
        if self.waiting.items or not self._sessions.can_exchange:
            # Before the session is up, it may not have all of its queues.
            self.waiting.add(Waiting(served, delivery))
        else:
            self._take(served, delivery)

    def _take(self, served: Served, delivery: Delivery) -> None:
        """Take a message: a request, or several."""
        if self.taking is _NOTHING:
            return
        request = self._read(served.service, delivery)
        if request is None:
            delivery.ack()
        elif request.is_batch and not request.problem:
            self._take_batch(served, delivery, request)
        else:
            served.slots.took(delivery, 1)
            self._take_request(served, delivery, request, delivery.body, delivery.body_size)

    def _take_batch(self, served: Served, delivery: Delivery, batch: Request) -> None:
        """Take the requests in a message batch, each for itself."""
        if not served.service.batching:
            batch.problem = why_not_read(LINES, None)
        elif len(delivery.properties) > MAX_PROPERTIES:  # each request would share its headers
            batch.problem = f"its properties are over {MAX_PROPERTIES} bytes"
        else:
            try:
                found = read_requests(batch, delivery.body)
            except ValueError as error:
                batch.problem = f"it is no message batch of requests: {error}"
        if batch.problem:
            served.slots.took(delivery, 1)
            self._take_request(served, delivery, batch, delivery.body, delivery.body_size)
            return
        served.slots.took(delivery, len(found))
        carrier = Carrier(delivery, len(found))
        for request, body in found:
            self._take_request(served, carrier, request, body, len(body))

    def _take_request(
        self, served: Served, delivery: Delivery | Carrier, request: Request, body: bytes | None, body_size: int
    ) -> None:
        replier, slots = self._replier, served.slots
        key = request.reply_to, request.correlation_id
        if delivery.redelivered and replier.in_hand.adopt(key, delivery):
            return  # its first delivery came over a session that was lost, and it is still in hand
        if self._cancels and self._cancels.pop(key, None) is not None:
            slots.settled(delivery)
            return
        moved = delivery.exchange != self._requests
        may_have_run = None
        if delivery.redelivered or moved:
            may_have_run = why_it_may_have_run(request, redelivered=delivery.redelivered, moved=moved)
        if may_have_run is not None and key in replier.in_hand:
            slots.settled(delivery)  # a copy of a call that is in hand here, and will be replied to
            return
        run = CallRun(replier, slots, delivery, key, may_have_run)
        run.reads_batches = request.reads_batches and served.service.batching
        if self._observers.requests:
            run.observed = self._observe(served.service, request, body_size)
        now = time.monotonic()
        try:
            if self.taking is _REPLAYS and may_have_run is None:
                raise ServiceUnavailable("the worker shuts down, and did not begin")
            if slots.held >= slots.most_held:
                raise ServiceUnavailable(f"the worker has {slots.held} calls in hand already, and did not begin")
            if len(delivery.properties) > MAX_PROPERTIES:
                raise TooLarge(f"the properties are {len(delivery.properties)} bytes; the limit is {MAX_PROPERTIES}")
            invocation = admit(
                served.service,
                request,
                body,
                body_size,
                may_have_run=may_have_run,
                max_body=self._options.max_body,
                wall_ms=time.time() * 1000,
                now=now,
                state=served.state,
            )
        except CallError as error:
            self._report_refused(served.service, error, key)
            replier.refuse(run, error)
        else:
            replier.begin(run, invocation, now)

    def _read(self, service: Service, delivery: Delivery) -> Request | None:
        """Read the request. None if there is no way to reply to it; it is not run then."""
        try:
            request = requests.read_request(delivery.properties)
        except MalformedProperties as error:
            self._seldom.warning("request dropped", service=service.name, cause=str(error))
            return None
        reply_to = request.reply_to
        if request.correlation_id and reply_to.startswith(self._reply_prefixes):
            return request
        if not reply_to:
            return request
        if not request.correlation_id:
            why = "it wants a reply and has no correlation_id"
        elif self.may_reply_to(reply_to):
            return request
        else:
            why = f"its reply_to is {reply_to!r}; the worker's option reply_to says what else is allowed"
            if self._options.reply_exchange is not None:
                why += ", and rpcq clients need the option reply_exchange as this worker has it"
        correlation_id = request.correlation_id.decode("utf-8", "replace")
        self._seldom.warning("request dropped", service=service.name, correlation_id=correlation_id, cause=why)
        return None

    def _observe(self, service: Service, request: Request, body_size: int) -> ObservedRequest:
        """The request as observers see it. A method that does not exist has no name: metrics must stay bounded."""
        method = service.find(request.method)
        name, label = ("", service.name) if method is None else (method.name, method.label)
        observed = ObservedRequest(self._requests, service.name, name, label)
        observed.correlation_id = request.correlation_id.decode("utf-8", "replace")
        observed.attempt = request.attempt if type(request.attempt) is int else 1
        observed.caller = request.app_id
        observed.headers = request.headers
        observed.body_size = body_size
        return observed

    def _report_refused(self, service: Service, error: CallError, key: Key) -> None:
        """Log refusals that point to a problem elsewhere, and those whose caller gets no reply."""
        correlation_id = key[1].decode("utf-8", "replace")
        if isinstance(error, ExpiredOnArrival):
            self.expired_on_arrival += 1
            self._seldom.warning(
                "request expired on arrival; if this goes on, compare the clocks of callers and workers",
                correlation_id=correlation_id,
                late_ms=round(error.late_ms),
                so_far=self.expired_on_arrival,
            )
        elif isinstance(error, PermissionDenied):
            self._seldom.warning("call denied", correlation_id=correlation_id, cause=error.message)
        elif not key[0]:
            self._seldom.warning(
                "request refused, and its caller wants no reply",
                service=service.name,
                correlation_id=correlation_id,
                code=error.code,
                cause=error.message,
            )
