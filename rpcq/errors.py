"""Every error that rpcq raises, and how a call's error goes over the wire.

    RpcqError
    +-- ConfigurationError (ValueError)       an argument is not valid: a URL, a name, a service, an option
    +-- UsageError (RuntimeError)             used at the wrong time or place
    |   +-- ClosedError                       the client or worker is closed, or was never opened
    +-- BrokerError (ConnectionError)         the broker cannot be used, with the cause by name
    |   +-- BrokerUnreachable                 no connection: host, port, network, timeout, TLS
    |   +-- AuthenticationFailed              user or password refused
    |   +-- VhostNotFound                     no such vhost, or the user may not enter it
    |   +-- AccessRefused                     the user lacks a permission
    |   +-- NotFound                          no such queue or exchange                           (404)
    |   +-- ResourceLocked                    the queue is exclusive to another connection        (405)
    |   +-- PreconditionFailed                the broker refuses an argument or a property        (406)
    |   |   +-- TopologyMismatch              a queue or exchange exists with other arguments
    |   +-- ProtocolError                     the peer violated AMQP 0-9-1
    +-- SendError                             a job is not queued, or may not be; says which
    +-- JobFailed                             a watched job is dead, or its end is not known; says whether it ran
    +-- NoResult                              a watched job is done, and its result cannot be had
    +-- RetryLater                            raised by the handler of a job: run it again later
    +-- GiveUp                                raised by the handler of a job: never run it again
    +-- CallError                             how a call failed; says whether it ran      executed  retryable
        +-- InvalidParams                     the worker refused the parameters           no        no
        |   +-- NotSerializable (TypeError)   JSON cannot carry a parameter; not sent     no        no
        |   +-- TooLarge (ValueError)         body or headers over the limit; not sent    no        no
        +-- MethodNotFound                    the service has no such method              no        no
        +-- PermissionDenied                  the caller may not make this call           no        no
        +-- ServiceUnavailable                no worker could take the call               no        yes
        +-- Overloaded                        a queue or a limit is full                  no        yes
        +-- CallTimeout (TimeoutError)        the deadline passed                         any       if no
        +-- OutcomeUnknown                    the connection or the worker was lost       maybe     no
        +-- InvalidReply                      it ran, but its result cannot be used       yes       no
        +-- RemoteError                       the handler raised                          yes       no
        +-- DomainError                       the base of a service's own errors          yes       no

`executed` is "no", "maybe" or "yes". `retryable` is true where the same call may be sent again as it is: it did not
run, and the cause may pass. A call whose outcome is "maybe" is safe to repeat only if it is idempotent, and only its
caller knows whether it is.

An error that is shown here with "no" can be "maybe" and not retryable: when an earlier attempt may have run, or when a
classic queue refused the request, because it may have delivered it anyway.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Self, get_args

Executed = Literal["no", "maybe", "yes"]

EXECUTED: Final = frozenset(get_args(Executed))
STATUS_CODES: Final = (
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
"""gRPC's, without OK: https://grpc.io/docs/guides/status-codes/"""

DOMAIN_CODE: Final = re.compile(r"[a-z][a-z0-9_.-]{0,99}\Z")


class RpcqError(Exception):
    """The base of all errors of rpcq."""


class ConfigurationError(RpcqError, ValueError):
    """An argument or an option is not valid. The message names it and says what is valid."""


class UsageError(RpcqError, RuntimeError):
    """Something is used at the wrong time or place: in another event loop, after a fork, or twice."""


class ClosedError(UsageError):
    """The client or worker is closed, or was never opened."""


class BrokerError(RpcqError, ConnectionError):
    """The broker cannot be used. If `permanent` is true, trying again does not help until somebody fixes the cause."""

    permanent: ClassVar[bool] = True


class BrokerUnreachable(BrokerError):
    """No connection to the broker: wrong host or port, network, timeout, TLS, or it went away."""

    permanent = False


class AuthenticationFailed(BrokerError):
    """The broker refused the user or the password."""


class VhostNotFound(BrokerError):
    """The vhost does not exist, or the user may not enter it."""


class AccessRefused(BrokerError):
    """The user lacks a permission to configure, write or read."""


class NotFound(BrokerError):
    """There is no such queue or exchange (reply code 404)."""


class ResourceLocked(BrokerError):
    """The queue is exclusive to another connection (reply code 405)."""


class PreconditionFailed(BrokerError):
    """The broker refuses an argument, a property or a delivery tag (reply code 406)."""


class TopologyMismatch(PreconditionFailed):
    """A queue or an exchange exists already, with other arguments."""


class ProtocolError(BrokerError):
    """The peer violated AMQP 0-9-1. The session was ended, because later frames could be misread."""

    permanent = False


class SendError(RpcqError):
    """A job could not be sent, or an event not published, or the broker did not confirm it.

    Attributes:
        queued: whether the broker has it: "no" or "maybe". After "maybe", send it again under the same key.
        message_id: its ID, or None if it never got one.
        key: its idempotency key, or None if it never got one.

    """

    def __init__(
        self, message: str, *, queued: Literal["no", "maybe"], message_id: str | None = None, key: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.queued = queued
        self.message_id = message_id
        self.key = key

    def __str__(self) -> str:
        named = "" if self.message_id is None else f", id={self.message_id}"
        return f"{self.message} (queued={self.queued}{named})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__new__, (type(self),), {**self.__dict__, "args": self.args}


class JobFailed(RpcqError):
    """A watched job is dead, or its end cannot be known any more.

    Attributes:
        message: what happened, for people. It never has the text of an exception; look for `incident`.
        executed: whether an attempt ran: "no", "maybe" or "yes".
        reason: one word: that of its dead letter ("attempts", "gave_up", "expired", ...); or "session_lost": the
            connection over which its sender listened is gone, and the job goes on unheard.
        attempts: attempts that ran, as far as is known.
        incident: what to look for in the worker's log; None for nothing.
        job_id: the job's ID.

    """

    def __init__(
        self,
        message: str,
        *,
        executed: Executed,
        reason: str,
        attempts: int = 0,
        incident: str | None = None,
        job_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.executed: Executed = executed
        self.reason = reason
        self.attempts = attempts
        self.incident = incident
        self.job_id = job_id

    def __str__(self) -> str:
        marks = [f"reason={self.reason}", f"executed={self.executed}", f"attempts={self.attempts}"]
        if self.incident:
            marks.append(f"incident={self.incident}")
        if self.job_id:
            marks.append(f"job={self.job_id}")
        return f"{self.message} ({', '.join(marks)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__new__, (type(self),), {**self.__dict__, "args": self.args}


class NoResult(RpcqError):
    """A watched job is done, and its result cannot be had. Do not send the job again for it.

    Attributes:
        message: why, for people.
        reason: one word: "done_already": a job with its key had been done, so it did not run; "invalid_result": the
            worker cannot send the result, for example because it is too large; "unreadable": it does not fit the type
            that its sender expects.
        job_id: the job's ID.
        incident: what to look for in the worker's log; None for nothing.

    """

    def __init__(self, message: str, *, reason: str, job_id: str | None = None, incident: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.job_id = job_id
        self.incident = incident

    def __str__(self) -> str:
        marks = [f"reason={self.reason}"]
        if self.incident:
            marks.append(f"incident={self.incident}")
        if self.job_id:
            marks.append(f"job={self.job_id}")
        return f"the job is done, and there is no result: {self.message} ({', '.join(marks)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__new__, (type(self),), {**self.__dict__, "args": self.args}


class RetryLater(RpcqError):
    """Raised by the handler of a job: run it again later. It counts as an attempt.

    Attributes:
        seconds: the pause, up to 48 days; rounded up to 250 ms.

    """

    def __init__(self, seconds: float) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= 48 * 24 * 3600:
            msg = f"RetryLater must have a number of seconds from 0 to {48 * 24 * 3600} (48 days); got {seconds!r}"
            raise ConfigurationError(msg)
        super().__init__(f"again in {seconds:g} s")
        self.seconds = seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.seconds,)


class GiveUp(RpcqError):
    """Raised by the handler of a job: never run it again. It becomes a dead letter with this reason as its error.

    Attributes:
        reason: why, for the people who read the dead letter.

    Raises:
        ConfigurationError: the reason is empty, or not a string. The job then fails with this error instead.

    """

    def __init__(self, reason: str) -> None:
        if not isinstance(reason, str) or not reason.strip():
            msg = f"GiveUp must have a reason for the people who read the dead letter, a string; got {reason!r}"
            raise ConfigurationError(msg)
        super().__init__(reason)
        self.reason = reason


class CallError(RpcqError):
    """How a call failed.

    Attributes:
        code: one of gRPC's status names, or a domain error's own code in lower case.
        message: text for people; it never contains the text of an exception that the service did not declare.
        executed: whether the handler ran: "no", "maybe" or "yes".
        retryable: whether the same call may be sent again as it is.
        details: what the service attached, as JSON values, or None.
        incident: an ID that is also in the worker's log, or None.
        correlation_id: the call's correlation ID, or None if it never got one.
        attempt: the attempt that failed: 1 + the number of earlier attempts that may have run.

    """

    code: ClassVar[str] = "UNKNOWN"
    default_executed: ClassVar[Executed] = "yes"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        executed: Executed | None = None,
        retryable: bool | None = None,
        details: Any = None,
        incident: str | None = None,
        correlation_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.executed: Executed = self.default_executed if executed is None else executed
        self.retryable = (self.default_retryable and self.executed == "no") if retryable is None else retryable
        self.details = details
        self.incident = incident
        self.correlation_id = correlation_id
        self.attempt = 1

    def __str__(self) -> str:
        marks = [f"executed={self.executed}"]
        if self.incident:
            marks.append(f"incident={self.incident}")
        if self.correlation_id:
            marks.append(f"call={self.correlation_id}")
        return f"{self.message or type(self).__name__} ({', '.join(marks)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__new__, (type(self),), {**self.__dict__, "args": self.args}

    def __setstate__(self, state: dict[str, Any] | None) -> None:
        state = dict(state or {})
        self.args = state.pop("args", ())
        self.__dict__.update(state)


class InvalidParams(CallError):
    """The parameters do not fit the method. `details` lists what is wrong, field by field."""

    code = "INVALID_ARGUMENT"
    default_executed = "no"


class NotSerializable(InvalidParams, TypeError):
    """JSON cannot carry a parameter, which the message names. Nothing was sent."""


class TooLarge(InvalidParams, ValueError):
    """The body or the headers are over a limit: the client's (nothing was sent), the worker's or the broker's."""


class MethodNotFound(CallError):
    """The service has no such method."""

    code = "UNIMPLEMENTED"
    default_executed = "no"


class PermissionDenied(CallError):
    """This caller may not make this call: the service's `allow` excludes it, or its `authorize` raised this error."""

    code = "PERMISSION_DENIED"
    default_executed = "no"


class ServiceUnavailable(CallError):
    """No worker could take the call: no such service, no connection until the deadline, or the worker shuts down."""

    code = "UNAVAILABLE"
    default_executed = "no"
    default_retryable = True


class Overloaded(CallError):
    """The request queue, the client's limit of calls in flight or the broker is full.

    `executed` is "maybe" where the broker refused the request for a classic queue: it may have delivered it anyway.
    """

    code = "RESOURCE_EXHAUSTED"
    default_executed = "no"
    default_retryable = True


class CallTimeout(CallError, TimeoutError):
    """The deadline passed. `executed` says what is known: "no", "maybe" (no reply came) or "yes" (it was running).

    Attributes:
        deadline: the call's deadline on its caller's `time.monotonic()`; None if it is not known.

    """

    code = "DEADLINE_EXCEEDED"
    default_executed = "maybe"
    default_retryable = True

    def __init__(self, message: str = "", **rest: Any) -> None:
        super().__init__(message, **rest)
        self.deadline: float | None = None


class OutcomeUnknown(CallError):
    """The connection or the worker was lost after the call was sent: it may have run, or may still run."""

    code = "ABORTED"
    default_executed = "maybe"


class InvalidReply(CallError):
    """The handler ran, but its result cannot be sent, or cannot be read as what the caller expects."""

    code = "INTERNAL"


class RemoteError(CallError):
    """The handler raised an exception that its service does not declare. Look for `incident` in the worker's log.

    `executed` is "no" where the service's `authorize` raised it.

    `code` is UNKNOWN, or the reply's code if rpcq has no class for it.
    """

    def __init__(self, message: str = "", *, code: str = "UNKNOWN", **rest: Any) -> None:
        super().__init__(message, **rest)
        self.code = code  # type: ignore[misc]  # the one class whose code is known only at run time

    def __str__(self) -> str:
        return f"{self.code}: {super().__str__()}"


class DomainError(CallError):
    """The base of a service's own errors: subclass it, declare it in `errors=`, raise it in a handler.

    The code defaults to the class's name in snake_case: `class OutOfStock(DomainError)` has code "out_of_stock".
    The message, `details` and the attributes that the class annotates in its body (`sku: str`) reach the caller, who
    gets the same class if it declares it too, else `RemoteError` with the same code. Attributes travel in `details`. A
    caller does not have those that the reply lacks, or whose value does not fit the annotation.

    `str(error)` is the message, or the class's name if there is none.
    """

    code = "domain_error"

    def __new__(cls, *args: Any, **_rest: Any) -> Self:
        """Set all attributes here: a subclass may have an `__init__` that does not call this class's."""
        error = super().__new__(cls, *args)
        CallError.__init__(error)
        error.args = args
        return error

    def __str__(self) -> str:
        return str(self.message) or type(self).__name__

    if not TYPE_CHECKING:  # to a type checker, it would have every name

        def __getattr__(self, name: str) -> Any:
            msg = f"{type(self).__name__} has no {name!r}; its details are {self.__dict__.get('details')!r}"
            raise AttributeError(msg, name=name, obj=self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "code" not in cls.__dict__:
            cls.code = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        if not isinstance(cls.code, str) or not DOMAIN_CODE.match(cls.code):
            msg = f"{cls.__name__}.code must be lower case ({DOMAIN_CODE.pattern}); got {cls.code!r}"
            raise ConfigurationError(msg)


BY_CODE: Final[dict[str, type[CallError]]] = {
    kind.code: kind
    for kind in (
        InvalidParams,
        MethodNotFound,
        PermissionDenied,
        ServiceUnavailable,
        Overloaded,
        CallTimeout,
        OutcomeUnknown,
        InvalidReply,
    )
}


def to_wire(error: CallError) -> dict[str, Any]:
    """The body of an error reply, before JSON."""
    body = {
        "code": error.code,
        "message": str(error.message).encode("utf-8", "replace").decode(),  # may be no string, or not UTF-8
        "executed": error.executed,
        "retryable": error.retryable,
        "details": error.details,
    }
    if error.incident:
        body["incident"] = error.incident
    return body


_LONGEST_FOREIGN: Final = 1000
"""Characters of a foreign error's body in the text of the error."""


def in_short(body: dict[str, Any]) -> dict[str, Any]:
    """An error reply's body without its details, and with at most 1000 characters of its message."""
    return body | {"details": None, "message": str(body["message"])[:1000]}


def from_wire(body: Any, domain: Sequence[type[DomainError]] = ()) -> CallError:
    """Make the exception for an error reply; `domain` lists the domain errors that the caller declared.

    A body that is not an error by the wire contract gives `InvalidReply` with the body as its text and `details`: it is
    what a foreign server says. Unknown codes give `RemoteError` with that code; an unknown `executed` counts as
    "maybe".
    """
    if not isinstance(body, dict) or not isinstance(body.get("code"), str):
        said = json.dumps(body, ensure_ascii=False)[:_LONGEST_FOREIGN]
        return InvalidReply(f"the body of an error reply has no code; it is {said}", executed="maybe", details=body)
    code = body["code"]
    message, incident, executed = body.get("message"), body.get("incident"), body.get("executed")
    fields: dict[str, Any] = {
        "message": "" if message is None else str(message),
        "executed": executed if isinstance(executed, str) and executed in EXECUTED else "maybe",
        "retryable": body.get("retryable") is True,
        "details": body.get("details"),
        "incident": incident if isinstance(incident, str) else None,
    }
    for kind in domain:
        if kind.code == code:
            own = kind.__new__(kind)  # a domain error may have an __init__ of its own
            CallError.__init__(own, **fields)
            return own
    if known := BY_CODE.get(code):
        return known(**fields)
    error = RemoteError(code=code, **fields)
    if DOMAIN_CODE.match(code):
        error.add_note(f"to catch {code!r} by its class, declare it in errors= of the contract or of with_options")
    return error
