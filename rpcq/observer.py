"""What is told of calls, requests and sessions, and to whom. Metrics, traces and logs are observers; so may be yours.

An observer of calls has one shape, the same at a client and at a worker: it is called when one begins, and may give a
function that is called when it has ended. Neither can change what becomes of the call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, TypeVar

from rpcq import logs
from rpcq.errors import CallError, ConfigurationError

Role = Literal["consuming", "publishing"]

OK: Final = "OK"
"""The code of what did not fail, as gRPC has it."""

ABORTED: Final = "ABORTED"
CANCELLED: Final = "CANCELLED"
FAILED_PRECONDITION: Final = "FAILED_PRECONDITION"

log = logs.get_logger("rpcq.observer")


def code_of(error: BaseException) -> str:
    """The code of a call that ended with this error."""
    if isinstance(error, CallError):
        return error.code
    if isinstance(error, asyncio.CancelledError):
        return CANCELLED
    return FAILED_PRECONDITION  # it could not be made: its client is closed, for one


class Observed:
    """A call at a client, or a request at a worker.

    Attributes:
        exchange: that it goes through; empty for the default one.
        service: its name; at a client with the option `queue`, that queue's.
        method: its name; empty where a request named none that the service has.
        label: both, as "service.method".
        correlation_id: the call's; at a client where it was made again, that of the last time.
        code: empty until it has ended; then "OK", "CANCELLED", or the error's code.
        error: what its caller gets, or None.
        attempt: 1 + the number of earlier ones that may have run.
        seconds: how long it took: at a client until its caller went on, at a worker in the handler.

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
        headers: W3C trace context that goes with each of its requests; an observer may set it.

    """

    __slots__ = ("headers",)

    def __init__(self, exchange: bytes, service: str, method: str, label: str) -> None:
        super().__init__(exchange, service, method, label)
        self.headers: Mapping[str, str] | None = None


class ObservedRequest(Observed):
    """A request at a worker; its observers are called in the context of its handler.

    Attributes:
        caller: the name that the client gave itself, or empty.
        headers: those of the request, as they came; empty where it has none but rpcq's own.
        queue_seconds: between the client and the handler, by the clocks of both; None where the caller told none.
        body_size: bytes of the parameters as JSON.
        code: as for calls, also where the broker then refuses the result for its size, and the caller gets an error.
        ran: the handler is entered, in the context that the observer is called in; else the request is refused, or
            is given up before that, and the context is nobody's.

    """

    __slots__ = ("body_size", "caller", "headers", "queue_seconds", "ran")

    def __init__(self, exchange: bytes, service: str, method: str, label: str) -> None:
        super().__init__(exchange, service, method, label)
        self.caller = ""
        self.headers: Mapping[str, Any] = {}
        self.queue_seconds: float | None = None
        self.body_size = 0
        self.ran = False


class Watched(Protocol):
    """A client or a worker, as observers see it: what it counts, at any time."""

    def counts(self) -> Mapping[str, int]:
        """Its counters by name, which only grow, and its gauges."""


class Observer:
    """The base of observers: each method does nothing, and a subclass overrides those that it needs.

    Give it to `Client(observers=[...])` and `Worker(observers=[...])`. The methods are called inside the event loop,
    and must not block; what they raise is logged, and costs no call.
    """

    def on_call(self, call: ObservedCall) -> Callable[[ObservedCall], None] | None:
        """A call begins at a client. What this gives is called once it has ended."""

    def on_request(self, request: ObservedRequest) -> Callable[[ObservedRequest], None] | None:
        """A request begins at a worker, in the context of its handler. What this gives is called once it has ended."""

    def on_notice(self, reason: str) -> None:
        """The broker told a client that a queue gave up a request: "expired", "delivery_limit", ..."""

    def on_session(self, owner: Watched, role: Role, cause: BaseException | None) -> None:
        """A session of a client or a worker is up, or down for this cause."""

    def on_opened(self, owner: Watched) -> None:
        """A client or a worker is about to connect, inside its event loop."""

    def on_closed(self, owner: Watched) -> None:
        """It is closed."""


Kind = TypeVar("Kind", bound=Observed)
Endings = list[Callable[[Kind], None]]


class Observers:
    """All observers of one client or worker; each method is called only where an observer overrides it.

    Args:
        observers: in the order in which they are told.
        owner: the client or worker.

    Raises:
        ConfigurationError: one is none.

    Attributes:
        calls: what is called with each call; empty where nobody looks, and then nothing is paid.
        requests: the same with requests.

    """

    def __init__(self, observers: Iterable[Observer], owner: Watched) -> None:
        self._observers: Sequence[Observer] = tuple(observers)
        for observer in self._observers:
            if not isinstance(observer, Observer):
                msg = f"observers holds {observer!r}; it holds instances of rpcq.observer.Observer"
                raise ConfigurationError(msg)
        self._owner = owner
        self.calls = tuple(it.on_call for it in self._overriding("on_call"))
        self.requests = tuple(it.on_request for it in self._overriding("on_request"))

    def _overriding(self, name: str) -> list[Observer]:
        return [it for it in self._observers if getattr(type(it), name) is not getattr(Observer, name)]

    def opened(self) -> None:
        """See `Observer.on_opened`."""
        self._tell("on_opened", self._owner)

    def closed(self) -> None:
        """See `Observer.on_closed`."""
        self._tell("on_closed", self._owner)

    def session(self, role: Role, cause: BaseException | None = None) -> None:
        """See `Observer.on_session`."""
        self._tell("on_session", self._owner, role, cause)

    def notice(self, reason: str) -> None:
        """See `Observer.on_notice`."""
        self._tell("on_notice", reason)

    def _tell(self, name: str, *args: Any) -> None:
        for observer in self._overriding(name):
            try:
                getattr(observer, name)(*args)
            except Exception:
                log.exception("observer failed", observer=type(observer).__name__, method=name)


def begin(observers: Sequence[Callable[[Kind], Callable[[Kind], None] | None]], seen: Kind) -> Endings[Kind]:
    """Tell that a call or a request begins; gives who wants to be told of its end."""
    endings: Endings[Kind] = []
    for told in observers:
        try:
            ended = told(seen)
        except Exception:
            log.exception("observer failed", observer=repr(told))
        else:
            if ended is not None:
                endings.append(ended)
    return endings


def end(endings: Endings[Kind], seen: Kind) -> None:
    """Tell that it has ended."""
    for ended in endings:
        try:
            ended(seen)
        except Exception:
            log.exception("observer failed", observer=repr(ended))
