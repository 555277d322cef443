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
"""Seconds that a handler ends before the caller's deadline, or a twentieth of the time left if that is less: its reply
must arrive in time."""


class Deduplication:
    """What makes several requests one call.

    Attributes:
        key: the service's name, the scope of the key, and the idempotency key, separated by slashes.
        fingerprint: of the method and the parameters, which must be the same under the same key.
        store: the store of the service; None for that of the worker.
        barred: why the call may not run if no result is stored; None if it may.

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
        queue_ms: milliseconds since the caller sent it, by the wall clocks of both; None if the request does not say.
        state: what the service's lifespan yielded.
        deduplication: for a call with an idempotency key; else None.
        authorize: the service's own function that says whether the caller may make this call, or None.

    """

    __slots__ = ("authorize", "deduplication", "queue_ms", "request", "state")

    method: Method

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
        """The fields that identify the call in logs."""
        request = self.request
        return {
            "method": self.method.label,
            "correlation_id": request.correlation_id.decode("utf-8", "replace"),
            "attempt": request.attempt,
        }

    def context(self) -> Context:
        """What the handler gets to know of the request."""
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
    """The key that a result is stored by: service, scope and idempotency key.

    The scope is `=scope` if the service's `authorize` returned one, else `@user` for a client that identifies itself,
    else empty. Both are quoted, so that neither contains `=` or `@`.
    """
    if scope is None:
        whose = f"@{quote(request.user, safe='')}" if request.user else ""
    else:
        whose = f"={quote(scope, safe='')}"
    return f"{service}/{whose}/{request.idempotency_key}"


class ExpiredOnArrival(CallTimeout):
    """The deadline had passed before the request came, by `late_ms` milliseconds on the worker's clock."""

    def __init__(self, late_ms: float) -> None:
        message = f"the deadline had passed {late_ms:.0f} ms ago, by the worker's clock"
        super().__init__(message, executed="no")
        self.late_ms = late_ms


class MayHaveRun(OutcomeUnknown):
    """The request may have run elsewhere already. The caller decides whether to try again."""


def why_it_may_have_run(request: Request, *, redelivered: bool, moved: bool) -> MayHaveRun | None:
    """Why a request that has just arrived may have run before; None if it certainly has not.

    Args:
        request: what its properties say.
        redelivered: the broker delivered it before.
        moved: it came through another exchange than the one for requests.

    """
    if redelivered:
        return MayHaveRun("it was redelivered")
    if moved and request.has_copy:
        return MayHaveRun("the request was moved from another queue, where a worker may have had it")
    return None


def never_no(error: CallError, may_have_run: MayHaveRun | None) -> CallError:
    """The error for the caller: an error that says `no` becomes `maybe` if the request may have run before.

    This is the one place of that rule. A worker may refuse a request because its methods or parameters are of another
    version, its store fails, or no time is left. None of these reasons says what became of the request before.
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

    A request that may have run before is refused, unless it has an idempotency key: then a result may be stored.

    Args:
        service: whose queue it came from.
        request: what its properties say.
        body: its body; None if it was too large to be kept.
        body_size: bytes that its sender announced.
        may_have_run: why it may have run before; None if it certainly has not.
        max_body: bytes that a body may have.
        wall_ms: the wall clock, milliseconds since the epoch.
        now: the monotonic clock, seconds.
        state: what the service's lifespan gave.

    Raises:
        CallError: the request does not run. The caller gets this error, by the rule of `never_no`.

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
        if request.method in service.jobs:
            label = f"{service.name}.{request.method}"
            raise MethodNotFound(f"{label} is a job: send it, client.send({label!r}, ...); it cannot be called")
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
    arguments = method.parameters.read(body)
    limit = left - min(MARGIN, left / 20)
    deduplication = None
    if key is not None:
        deduplication = Deduplication(
            key_of(request, service.name), fingerprint(method.name, body), service.result_store, barred
        )
    return CallInvocation(request, method, arguments, now + limit, queue_ms, state, deduplication, service.authorize)


def _time_left(service: Service, request: Request, wall_ms: float) -> tuple[float, float | None]:
    """Seconds until the caller's deadline, and milliseconds since the request was sent if the request says so.

    The request has its deadline twice: as an absolute time and as time left. The earlier one counts, because the
    absolute one is too late if this clock is behind the caller's.

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
