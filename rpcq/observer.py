"""Observers: they are called with calls, requests, jobs, notices and sessions. Metrics, traces and logs are observers.

An observer is called in the same way at a client and at a worker: once when a call, a request, a send or an attempt of
a job begins; if it returns a function, that function is called once when it has ended. Neither can change the outcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeVar

from rpcq import logs
from rpcq.errors import CallError, ConfigurationError

Role = Literal["consuming", "publishing"]
Queued = Literal["", "yes", "no", "maybe"]
JobOutcome = Literal[
    "", "done", "retried", "put_off", "dead", "suspect", "suppressed", "filtered", "dropped", "given_back"
]

Carried = Literal["requests", "replies"]

OK: Final = "OK"
"""The code of a call that did not fail, as in gRPC."""

ABORTED: Final = "ABORTED"
CANCELLED: Final = "CANCELLED"
FAILED_PRECONDITION: Final = "FAILED_PRECONDITION"

log = logs.get_logger("rpcq.observer")


def code_of(error: BaseException) -> str:
    """Return the code of a call that ended with this error."""
    if isinstance(error, CallError):
        return error.code
    if isinstance(error, asyncio.CancelledError):
        return CANCELLED
    return FAILED_PRECONDITION  # the call could not be made, for example because its client is closed


class Observed:
    """A call or a send at a client, a request or an attempt of a job at a worker.

    Attributes:
        exchange: the exchange that it is published to; empty for the default exchange.
        service: name of the service; at a client with the option `queue`, name of that queue.
        method: name of the method; empty if a request named a method that the service does not have.
        label: both names, as "service.method".
        correlation_id: ID of the call; if the client made the call again, the ID of the last time.
        code: empty until it has ended; then "OK", "CANCELLED", or the error's code.
        error: the error that the caller gets, or None.
        attempt: 1 + the number of earlier requests of the call that may have run.
        seconds: duration: at a client until its caller went on, at a worker in the handler.

    """

    __slots__ = ("attempt", "code", "correlation_id", "error", "exchange", "label", "method", "seconds", "service")

    def __init__(self, exchange: bytes, service: str, method: str, label: str) -> None:
        self.exchange = exchange
        self.service = service
        self.method = method
        self.label = label
        self.correlation_id = ""
        self.code = ""
        self.error: BaseException | None = None
        self.attempt = 1
        self.seconds = 0.0


class ObservedCall(Observed):
    """A call at a client.

    Attributes:
        headers: W3C trace context, sent with each request of the call; an observer may set it.

    """

    __slots__ = ("headers",)

    def __init__(self, exchange: bytes, service: str, method: str, label: str) -> None:
        super().__init__(exchange, service, method, label)
        self.headers: Mapping[str, str] | None = None


class ObservedRequest(Observed):
    """A request at a worker; observers are called in the context (`contextvars`) of its handler.

    Attributes:
        caller: the name that the client gave itself, or empty.
        headers: headers of the request, as received; empty if it has only rpcq's own headers.
        queue_seconds: time from the client to the handler, by the clocks of both; None if the caller sent no time.
        body_size: bytes of the parameters as JSON.
        code: as for calls; it stays "OK" if the broker then refuses the result for its size and the caller gets an
            error.
        ran: True if the handler is entered, in the context that the observer is called in. False if the request is
            refused or given up before that; then no handler uses the context.

    """

    __slots__ = ("body_size", "caller", "headers", "queue_seconds", "ran")

    def __init__(self, exchange: bytes, service: str, method: str, label: str) -> None:
        super().__init__(exchange, service, method, label)
        self.caller = ""
        self.headers: Mapping[str, Any] = {}
        self.queue_seconds: float | None = None
        self.body_size = 0
        self.ran = False


class ObservedSend(Observed):
    """A job that a client sends, once its parameters are accepted; each job of a `send_many` is one.

    Attributes:
        exchange: as for calls; so are `service` and `label`.
        method: name of the job.
        correlation_id: ID of the job.
        headers: W3C trace context, sent with the job and kept in all its attempts; an observer may set it.
        body_size: bytes of the parameters as JSON.
        queued: whether the broker has the job: empty until the send has ended; then "yes", "no" or "maybe".
        code: "OK" if `queued` is "yes"; "CANCELLED"; otherwise "FAILED_PRECONDITION".
        seconds: until the caller went on: for `send_many`, until all its jobs were confirmed.

    """

    __slots__ = ("body_size", "headers", "queued")

    def __init__(self, exchange: bytes, service: str, method: str, label: str) -> None:
        super().__init__(exchange, service, method, label)
        self.headers: Mapping[str, str] | None = None
        self.body_size = 0
        self.queued: Queued = ""


class ObservedPublish(ObservedSend):
    """An event that a client publishes, once its fields are accepted.

    Attributes:
        service: empty: a publisher does not know who listens.
        method: name of the event; so is `label`.
        correlation_id: ID of the event.
        headers: as for a send; every subscription gets them.
        body_size: bytes of the fields as JSON.
        queued: whether the broker has the event, as for a send.
        heard: whether a queue took it; None if that is not known, and until it has ended.

    """

    __slots__ = ("heard",)

    def __init__(self, exchange: bytes, event: str) -> None:
        super().__init__(exchange, "", event, event)
        self.heard: bool | None = None


class ObservedWrite(ObservedSend):
    """A job or an event that is written into an outbox. Whether it is ever sent depends on the user's transaction.

    Attributes:
        service: of a job; empty for an event.
        event: name of the event; empty for a job.
        headers: as for a send: W3C trace context, which is in the row, and so in what a relay sends.
        queued: stays empty, as `code` does: nothing is sent yet.

    """

    __slots__ = ("event",)

    def __init__(self, exchange: bytes, service: str, method: str, label: str, *, event: str = "") -> None:
        super().__init__(exchange, service, method, label)
        self.event = event


class ObservedJob(Observed):
    """An attempt of a job, or of an event in a subscription, at a worker.

    Observers are called in the context (`contextvars`) of its handler. What the broker buries by itself, after workers
    were lost, reaches no observer.

    Attributes:
        exchange: the exchange that jobs, or events, are published to.
        method: name of the job, or of the subscription; empty if the service has no job of this name.
        event: name of the event, as its publisher wrote it; empty for a job.
        correlation_id: ID of the job or of the event; empty if it cannot be read.
        caller: the name of the program that sent it, or empty.
        headers: the sender's headers, with its trace context.
        queue_seconds: time from the sender to the handler, by the clocks of both. None if another time is part of it:
            for a retry, a replay, or a job that came back; or if the message does not say when it was sent.
        body_size: bytes of the parameters as JSON.
        ran: True if the handler is entered. False if it is decided before that what becomes of the job.
        outcome: empty until it is decided; then "done", "retried", "put_off" (it did not run, and comes again later),
            "dead", "suspect" (it runs alone later), "suppressed" (a job with its key is done already), "filtered" (no
            pattern of its subscription takes the event any more), "dropped" (a subscription of each instance does not
            retry) or "given_back" (its worker stops). It is decided before the broker confirms it: if the worker is
            lost meanwhile, the job comes back.
        code: "OK" if it is done; otherwise one word for the reason, of a limited number. For a dead letter, it is the
            reason that docs/wire.md has; "rejected" for what the worker cannot read at all. For a retry, it is "failed"
            (the handler raised), "retry_later", "timed_out", "unknown_method", and for events "unknown_event",
            "unsupported_version" or "unwanted"; for one that is put off "limits",
            "key_held", "store_failed", "not_begun" (no thread was free) or "stopped"; for a suspect "workers_lost"; for
            one that is suppressed "done_already"; for one that is filtered "unwanted"; for one that is dropped
            "failed", "timed_out", "rejected" or "stopped"; for one that is given back "stopped".
        error: what the handler raised, or None.
        incident: what to look for in the worker's log; empty for none.

    """

    __slots__ = ("body_size", "caller", "event", "headers", "incident", "outcome", "queue_seconds", "ran")

    def __init__(self, exchange: bytes, service: str, method: str, label: str) -> None:
        super().__init__(exchange, service, method, label)
        self.caller = ""
        self.event = ""
        self.headers: Mapping[str, Any] = {}
        self.queue_seconds: float | None = None
        self.body_size = 0
        self.ran = False
        self.outcome: JobOutcome = ""
        self.incident = ""


@dataclass(frozen=True, slots=True)
class ObservedBatch:
    """A handler batch of a worker: calls that one run of a handler took together. Each is a request of its own, too.

    Attributes:
        service: name of the service.
        method: name of the method.
        label: both names, as "service.method".
        size: calls that the handler got.
        seconds: duration of the handler.

    """

    service: str
    method: str
    label: str
    size: int
    seconds: float


class Counted(Protocol):
    """A client or a worker, as observers see it: they may read its counts at any time."""

    def counts(self) -> Mapping[str, int]:
        """Return its counters, which only grow, and its gauges, by name."""


class Observer:
    """The base class of observers: each method does nothing, and a subclass overrides those that it needs.

    Give it to `Client(observers=[...])` and `Worker(observers=[...])`. The methods are called inside the event loop
    and must not block. An exception that they raise is logged; the call goes on.
    """

    def on_call(self, call: ObservedCall) -> Callable[[ObservedCall], None] | None:
        """A call begins at a client. If this returns a function, it is called once the call has ended."""

    def on_request(self, request: ObservedRequest) -> Callable[[ObservedRequest], None] | None:
        """A request begins at a worker. If this returns a function, it is called once the request has ended.

        Both are called in the context of the handler.
        """

    def on_send(self, send: ObservedSend) -> Callable[[ObservedSend], None] | None:
        """A client sends a job. If this returns a function, it is called once the send has ended."""

    def on_publish(self, publish: ObservedPublish) -> Callable[[ObservedPublish], None] | None:
        """A client publishes an event. If this returns a function, it is called once that has ended."""

    def on_write(self, write: ObservedWrite) -> None:
        """A job or an event is written into an outbox: `Outbox(observers=[...])`.

        It is called in the thread that writes, which may have no event loop. That a relay sends it is not observed.
        """

    def on_job(self, job: ObservedJob) -> Callable[[ObservedJob], None] | None:
        """An attempt of a job, or of an event in a subscription, begins at a worker.

        If this returns a function, it is called once its outcome is decided.
        Both are called in the context of the handler.
        """

    def on_batch(self, batch: ObservedBatch) -> None:
        """The handler of a batch has ended at a worker, for methods with a `batch`. Called in no call's context."""

    def on_message(self, carried: Carried, calls: int) -> None:
        """A client published requests in one message, or a worker replies, of so many calls. Resends count again."""

    def on_notice(self, reason: str) -> None:
        """A client got a notice that a queue gave up a request: "expired", "delivery_limit", ..."""

    def on_session(self, owner: Counted, role: Role, cause: BaseException | None) -> None:
        """A session of a client or a worker is up (`cause` is None), or down for this cause."""

    def on_opened(self, owner: Counted) -> None:
        """A client or a worker is about to connect, inside its event loop."""

    def on_closed(self, owner: Counted) -> None:
        """A client or a worker is closed."""


Kind = TypeVar("Kind", bound=Observed)
Endings = list[Callable[[Kind], None]]


class Observers:
    """All observers of one client or worker. Only methods that an observer overrides are called.

    Args:
        observers: observers, in the order in which they are called.
        owner: the client or worker.

    Raises:
        ConfigurationError: one of them is not an `Observer`.

    Attributes:
        calls: functions to call with each call; if there are none, a call costs nothing more.
        requests: functions to call with each request.
        sends: functions to call with each job that is sent.
        publishes: functions to call with each event that is published.
        jobs: functions to call with each attempt of a job or an event.
        has_batches: whether an observer is called with batches.
        has_messages: whether an observer is called with messages.

    """

    def __init__(self, observers: Iterable[Observer], owner: Counted) -> None:
        self._observers = _checked(observers)
        self._owner = owner
        self.calls = tuple(it.on_call for it in self._overriding("on_call"))
        self.requests = tuple(it.on_request for it in self._overriding("on_request"))
        self.sends = tuple(it.on_send for it in self._overriding("on_send"))
        self.publishes = tuple(it.on_publish for it in self._overriding("on_publish"))
        self.jobs = tuple(it.on_job for it in self._overriding("on_job"))
        self.has_batches = bool(self._overriding("on_batch"))
        self.has_messages = bool(self._overriding("on_message"))

    def _overriding(self, name: str) -> list[Observer]:
        return _overriding(self._observers, name)

    def opened(self) -> None:
        """See `Observer.on_opened`."""
        self._call("on_opened", self._owner)

    def closed(self) -> None:
        """See `Observer.on_closed`."""
        self._call("on_closed", self._owner)

    def session(self, role: Role, cause: BaseException | None = None) -> None:
        """See `Observer.on_session`."""
        self._call("on_session", self._owner, role, cause)

    def batch(self, batch: ObservedBatch) -> None:
        """See `Observer.on_batch`."""
        self._call("on_batch", batch)

    def message(self, carried: Carried, calls: int) -> None:
        """See `Observer.on_message`."""
        self._call("on_message", carried, calls)

    def notice(self, reason: str) -> None:
        """See `Observer.on_notice`."""
        self._call("on_notice", reason)

    def _call(self, name: str, *args: Any) -> None:
        for observer in self._overriding(name):
            try:
                getattr(observer, name)(*args)
            except Exception:
                log.exception("observer failed", observer=type(observer).__name__, method=name)


def writes_of(observers: Iterable[Observer]) -> Sequence[Callable[[ObservedWrite], None]]:
    """Functions to call with each job or event that is written into an outbox.

    Raises:
        ConfigurationError: one of them is not an `Observer`.

    """
    return tuple(it.on_write for it in _overriding(_checked(observers), "on_write"))


def _checked(observers: Iterable[Observer]) -> Sequence[Observer]:
    found = tuple(observers)
    for observer in found:
        if not isinstance(observer, Observer):
            msg = f"observers must hold instances of rpcq.observer.Observer; got {observer!r}"
            raise ConfigurationError(msg)
    return found


def _overriding(observers: Sequence[Observer], name: str) -> list[Observer]:
    return [it for it in observers if getattr(type(it), name) is not getattr(Observer, name)]


def begin(observers: Sequence[Callable[[Kind], Callable[[Kind], None] | None]], observed: Kind) -> Endings[Kind]:
    """Call observers at the start of what is observed; return the functions to call at its end."""
    endings: Endings[Kind] = []
    for began in observers:
        try:
            ended = began(observed)
        except Exception:
            log.exception("observer failed", observer=repr(began))
        else:
            if ended is not None:
                endings.append(ended)
    return endings


def end(endings: Endings[Kind], observed: Kind) -> None:
    """Call what `begin` returned, once that has ended."""
    for ended in endings:
        try:
            ended(observed)
        except Exception:
            log.exception("observer failed", observer=repr(ended))
