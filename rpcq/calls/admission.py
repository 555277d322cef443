"""From a request's properties and body to an invocation, or to the error that its caller gets. Pure.

The order is fixed: whether it may run at all, its deadline, its method, who may call that (`allow`), its parameters.
The service's `authorize` is asked later, in the event loop.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

from rpcq.errors import (
    CallError,
    CallTimeout,
    InvalidParams,
    MethodNotFound,
    OutcomeUnknown,
    PermissionDenied,
    TooLarge,
)
from rpcq.invocation import Invocation
from rpcq.options import MAX_TIMEOUT
from rpcq.results import ResultStore, fingerprint
from rpcq.runtime.deadline import Deadline
from rpcq.service import Authorize, Context, Method, Service
from rpcq.wire.requests import Request

MARGIN: Final = 0.1
"""Seconds, at most a twentieth of what is left, that a handler ends before the caller's deadline: so that the word
that it ran gets there in time."""


class Deduplication:
    """What makes several requests one call.

    Attributes:
        key: the service's name, whose key it is, and the idempotency key, with slashes between.
        fingerprint: of the method and the parameters: under the same key they have to be the same.
        store: where the service remembers answers; None for where the worker does.
        barred: why it may not run, where no answer is remembered; None if it may.

    """

    __slots__ = ("barred", "fingerprint", "key", "store")

    def __init__(self, key: str, fingerprint: bytes, store: ResultStore | None, barred: CallError | None) -> None:
        self.key = key
        self.fingerprint = fingerprint
        self.store = store
        self.barred = barred


class CallInvocation(Invocation):
    """The handler of a call, with what its request says.

    Attributes:
        request: what its properties say.
        queue_ms: milliseconds since the caller sent it, by the wall clocks of both; None where the caller told none.
        state: what the service's lifespan gave.
        deduplication: where it has an idempotency key; else None.
        authorize: the service's own function that says whether the caller may make this call, or None.

    """

    __slots__ = ("authorize", "deduplication", "queue_ms", "request", "state")

    def __init__(
        self,
        request: Request,
        method: Method,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        deadline: float,
        queue_ms: float | None,
        state: Any,
        deduplication: Deduplication | None,
        authorize: Authorize | None = None,
    ) -> None:
        super().__init__(method, arguments, deadline)
        self.request = request
        self.queue_ms = queue_ms
        self.state = state
        self.deduplication = deduplication
        self.authorize = authorize

    def names(self) -> dict[str, Any]:
        """What tells the call apart, for logs."""
        request = self.request
        return {
            "method": self.method.label,
            "correlation_id": request.correlation_id.decode("utf-8", "replace"),
            "attempt": request.attempt,
        }

    def context(self) -> Context:
        """What the handler may know of the request."""
        request = self.request
        return Context(
            service=self.method.service,
            method=self.method.name,
            correlation_id=request.correlation_id.decode("utf-8", "replace"),
            deadline=Deadline(self.deadline),
            attempt=request.attempt,
            idempotency_key=request.idempotency_key,
            caller=request.app_id or None,
            user=request.user or None,
            metadata=request.metadata,
            state=self.state,
        )


def key_of(request: Request, service: str, scope: str | None = None) -> str:
    """What answers are remembered by: the same idempotency key of another service or in another scope is another one.

    The scope is what the service's `authorize` gave, as `=scope`; where that is None, the broker's user, as `@user`;
    and where the client does not say that, nothing. Quoted, neither has an `=` or `@` of its own.
    """
    if scope is None:
        whose = f"@{quote(request.user, safe='')}" if request.user else ""
    else:
        whose = f"={quote(scope, safe='')}"
    return f"{service}/{whose}/{request.idempotency_key}"


class ExpiredOnArrival(CallTimeout):
    """The deadline had passed before the request came; `late_ms` says by how much, on the worker's clock."""

    def __init__(self, late_ms: float) -> None:
        message = f"the deadline had passed {late_ms:.0f} ms ago, by the worker's clock"
        super().__init__(message, executed="no")
        self.late_ms = late_ms


class MayHaveRun(OutcomeUnknown):
    """The request may have run somewhere else already. Whether to try again is the caller's to decide."""


def why_it_may_have_run(request: Request, *, redelivered: bool, moved: bool) -> MayHaveRun | None:
    """Why a request that has just come may have run before; None if it certainly has not.

    Args:
        request: what its properties say.
        redelivered: the broker delivered it before.
        moved: it did not come through the exchange that it was sent to.

    """
    if redelivered:
        return MayHaveRun("it was redelivered")
    if moved and request.has_copy:
        return MayHaveRun("the request was moved from another queue, where a worker may have had it")
    return None


def never_no(error: CallError, may_have_run: MayHaveRun | None) -> CallError:
    """The error that a caller gets who was about to get `error`: of what may have run, nobody says that it did not.

    The one place of this rule. A worker may refuse a request for many reasons: its methods or parameters are those of
    another version, its store of answers fails, no time is left. None of them says what became of the request before.
    """
    if may_have_run is None or error.executed != "no":
        return error
    message = f"{may_have_run.message}; this worker refuses it: {error.message}"
    kind = CallTimeout if isinstance(error, CallTimeout) else MayHaveRun
    return kind(message, executed="maybe", incident=error.incident)


def admit(  # noqa: PLR0913 - what a request is made of, and what it is held against
    service: Service,
    request: Request,
    body: bytes | None,
    body_size: int,
    *,
    may_have_run: MayHaveRun | None = None,
    max_body: int,
    wall_ms: float,
    now: float,
    state: Any = None,
) -> CallInvocation:
    """Check everything that can be checked before the handler runs.

    What may have run before is refused here, unless it has an idempotency key: then an answer may be remembered.

    Args:
        service: whose queue it came from.
        request: what its properties say.
        body: its body; None where it was too large to be kept.
        body_size: bytes that its sender announced.
        may_have_run: why it may have run before; None if it certainly has not.
        max_body: bytes that a body may have.
        wall_ms: the wall clock, milliseconds since the epoch.
        now: the monotonic clock, seconds.
        state: what the service's lifespan gave.

    Raises:
        CallError: it does not run; this is what its caller gets, by the rule of `never_no`.

    """
    if request.problem:
        raise InvalidParams(request.problem)
    key = request.idempotency_key
    barred: CallError | None = may_have_run
    if barred is not None and key is None:
        raise barred
    left, queue_ms = _time_left(service, request, wall_ms)
    method = service.find(request.method)
    if method is None:
        asked = f"no method {request.method!r}" if request.method else "several methods, and the request names none"
        raise MethodNotFound(f"service {service.name!r} has {asked}; it has {', '.join(sorted(service.methods))}")
    if request.attempt > 1 and not method.idempotent and barred is None:
        barred = OutcomeUnknown(f"{method.label} is not declared idempotent, and an earlier attempt may have run")
        if key is None:
            raise barred
    if method.allow is not None and request.user not in method.allow:
        who = f"the user {request.user!r}" if request.user else "a client that does not say who it is (identify=True)"
        raise PermissionDenied(f"{method.label} is not for {who}")
    if body is None or body_size > max_body:
        raise TooLarge(f"the parameters are {body_size} bytes of JSON; the worker's limit is {max_body} (max_body)")
    arguments = method.read_params(body)
    limit = left - min(MARGIN, left / 20)
    if method.timeout is not None and method.timeout < limit:
        limit = method.timeout
    deduplication = None
    if key is not None:
        deduplication = Deduplication(
            key_of(request, service.name), fingerprint(method.name, body), service.result_store, barred
        )
    return CallInvocation(request, method, arguments, now + limit, queue_ms, state, deduplication, service.authorize)


def _time_left(service: Service, request: Request, wall_ms: float) -> tuple[float, float | None]:
    """Seconds until the caller's deadline, and milliseconds since the request was sent, where they are told.

    A deadline that has passed always counts; the relative time counts where the absolute one lies further ahead, as it
    does where this clock is behind the caller's.

    Raises:
        CallTimeout: no time is left.

    """
    left_ms = service.timeout * 1000 if request.timeout_ms is None else float(request.timeout_ms)
    queue_ms = None
    if request.deadline_ms is not None:
        absolute = request.deadline_ms - wall_ms
        if absolute <= 0:
            raise ExpiredOnArrival(-absolute)
        if request.timeout_ms is None:
            left_ms = absolute
        else:
            queue_ms = max(0.0, wall_ms - (request.deadline_ms - request.timeout_ms))
            left_ms = min(left_ms, absolute)
    if left_ms <= 0:
        raise CallTimeout("no time was left when the request was sent", executed="no")
    return min(left_ms / 1000, MAX_TIMEOUT), queue_ms
