"""Errors of calls as HTTP: the problem documents of RFC 9457. Pure: no framework, no event loop.

    InvalidParams                     422   the parameters are not valid; `errors` lists the fields
    TooLarge                          413   the content is larger than the app can pass on
    NotSerializable                   500   an error in the app: it made parameters that JSON cannot carry
    MethodNotFound                    502   an error in the app: it calls a method that the service does not have. Not
                                            404, since the user's request is right; and caches may keep 404 and 501
    PermissionDenied                  403   the service does not let this app, or its user, make the call
    ServiceUnavailable, Overloaded    503   it did not run, and may run later; with Retry-After
    CallTimeout                       504   the service behind the app did not reply in time
    OutcomeUnknown                    502   the connection to the service was lost. Not 504: it is not about time
    InvalidReply, RemoteError         502   the service behind the app failed
    DomainError, in the user's table        the status in that table
    DomainError, otherwise            500   an error in the app: its table has no status for this error
    BrokerError, ClosedError          503   no connection yet, or the app is shutting down; with Retry-After
    SendError                         503   the broker does not have the job or the event, or did not confirm it:
                                            `queued` says which; with Retry-After
    JobFailed                         502   a watched job failed, or its end cannot be known; `reason` says which
    NoResult                          502   a watched job is done, and its result cannot be had; `reason` says why
    anything else                     500   an error in the app

The statuses are from RFC 9110: 403 in 15.5.4, 413 in 15.5.14, 422 in 15.5.21, 500 in 15.6.1, 502 to 504 in 15.6.3 to
15.6.5. A status does not say whether a request may be sent again: `executed` and `retryable` do. They are about the job
after `JobFailed` and `NoResult`, and `retryable` is false: a dead letter may be replayed, and what is done must not be
done again. The `TimeoutError` of `WatchedJob.result` is no error of the job, which goes on: the app says what it means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

from rpcq import logs
from rpcq.calls.pending import public_id
from rpcq.errors import (
    BrokerError,
    CallError,
    CallTimeout,
    ClosedError,
    ConfigurationError,
    DomainError,
    InvalidParams,
    InvalidReply,
    JobFailed,
    MethodNotFound,
    NoResult,
    NotSerializable,
    OutcomeUnknown,
    Overloaded,
    PermissionDenied,
    RemoteError,
    SendError,
    ServiceUnavailable,
    TooLarge,
)
from rpcq.web import openapi
from rpcq.web.asgi import Receive, Scope, Send
from rpcq.wire import bodies

HEADERS: Final = {"content-type": "application/problem+json", "cache-control": "no-store"}
RETRY_AFTER: Final = 1.0
"""Seconds after which a user may try again, by default."""

WEBSOCKET_LATER: Final = 1013
WEBSOCKET_FAILED: Final = 1011
"""Codes that end a WebSocket: https://www.iana.org/assignments/websocket/websocket.xhtml"""

log = logs.get_logger("rpcq.web")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An error as HTTP: a response that every ASGI framework can send; other frameworks read its attributes.

    Attributes:
        status: HTTP status.
        document: members of RFC 9457, and rpcq's own: `code`, `executed`, `queued`, `retryable`, `incident`, `details`,
            `errors`, `reason`, `attempts`.
        headers: all headers of the response, with its content type.

    """

    status: int
    document: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=lambda: dict(HEADERS))

    @property
    def body(self) -> bytes:
        """The document as JSON."""
        return bodies.dumps(self.document)

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Send it as the response of an ASGI request; a WebSocket cannot get a response, and is closed with a code."""
        body = self.body
        if scope["type"] == "websocket":
            code = WEBSOCKET_LATER if self.status == HTTPStatus.SERVICE_UNAVAILABLE else WEBSOCKET_FAILED
            await send({"type": "websocket.close", "code": code, "reason": str(self.document.get("title", ""))[:40]})
            return
        headers = {**self.headers, "content-length": str(len(body))}
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


Answer = int | tuple[int, str] | Problem
"""A domain error as HTTP: a status, a status and a title, or the whole response."""

Domain = Mapping[type[DomainError], Answer | Callable[[Any], Answer]]
"""Table from classes of domain errors to HTTP; a class that it does not have is treated as its nearest base class."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """One class of errors as HTTP. `detail` is for users: the error's own message may name hosts and queues."""

    status: int
    title: str
    detail: str


_KINDS: Final[dict[type[BaseException], _Kind]] = {
    InvalidParams: _Kind(422, "Invalid parameters", "The parameters are not valid; 'errors' lists the fields."),
    TooLarge: _Kind(413, "Too large", "The request is larger than the app can pass on."),
    NotSerializable: _Kind(500, "Internal error", "The app could not pass this request on."),
    MethodNotFound: _Kind(502, "Not available here", "The service behind this app has no such method."),
    PermissionDenied: _Kind(403, "Forbidden", "This request is not allowed."),
    ServiceUnavailable: _Kind(503, "Service unavailable", "The service could not take the request; it did not run."),
    Overloaded: _Kind(503, "Overloaded", "There are too many requests; this one did not run."),
    CallTimeout: _Kind(504, "Timed out", "The service behind this app did not reply in time; see 'executed'."),
    OutcomeUnknown: _Kind(502, "Outcome unknown", "The connection to the service was lost: the request may have run."),
    InvalidReply: _Kind(502, "Invalid reply", "The service ran the request, but its reply cannot be used."),
    RemoteError: _Kind(502, "Service failed", "The service behind this app failed; give its operators 'incident'."),
    DomainError: _Kind(500, "Internal error", "The service refused with an error that this app does not know."),
    CallError: _Kind(502, "Call failed", "The request could not be completed."),
    BrokerError: _Kind(503, "Service unavailable", "There is no connection yet; the request did not run."),
    ClosedError: _Kind(503, "Service unavailable", "The app is starting or shutting down; the request did not run."),
    SendError: _Kind(503, "Not queued", "The app could not hand this work over, or cannot know that; see 'queued'."),
    JobFailed: _Kind(
        502, "Job failed", "The work did not succeed, or its end cannot be known; see 'reason' and 'executed'."
    ),
    NoResult: _Kind(502, "No result", "The work is done, but its result cannot be had; see 'reason'."),
    BaseException: _Kind(500, "Internal error", "The app failed."),
}


def problem(error: BaseException, domain: Domain | None = None, *, retry_after: float = RETRY_AFTER) -> Problem:
    """Turn an error into HTTP: the status, the headers and the problem document of RFC 9457.

    `type` (3.1.1) is a URN for each class of errors, `urn:rpcq:problem:call-timeout`, and for each code of a domain
    error, `urn:rpcq:domain:out_of_stock`: names to compare, not addresses to open. `title` (3.1.3) is the same for each
    type. `detail` (3.1.4) is the error's own message only for `InvalidParams` and for domain errors in the table; the
    messages of other errors may name hosts and queues (section 5). `instance` (3.1.5) names the call, or the job: its
    correlation ID, or its ID, without the last part, which is secret.

    Args:
        error: any exception; one that is not rpcq's becomes 500, without its message.
        domain: table of domain errors; see `Domain`.
        retry_after: seconds for Retry-After (RFC 9110, 10.2.3), rounded up to whole seconds, at least 1.

    """
    base, kind = next((base, _KINDS[base]) for base in type(error).__mro__ if base in _KINDS)
    document: dict[str, Any] = {
        "type": _urn("problem", _kebab(base.__name__ if base is not BaseException else "InternalError")),
        "title": kind.title,
        "status": kind.status,
        "detail": kind.detail,
    }
    if isinstance(error, CallError):
        document |= _extensions(error)
    elif isinstance(error, BrokerError | ClosedError):
        document |= {"code": "UNAVAILABLE", "executed": "no", "retryable": True}
    elif isinstance(error, SendError):
        # What may be queued may be sent again under the same key alone, which the user of the app does not have.
        document |= {"code": "UNAVAILABLE", "queued": error.queued, "retryable": error.queued == "no"}
    elif isinstance(error, JobFailed | NoResult):
        document |= _of_job(error)
    if isinstance(error, DomainError):
        answer = _answer(error, domain or {})
        if isinstance(answer, Problem):
            return answer
        if answer is not None:
            document |= _domain_members(error, answer)
    headers = dict(HEADERS)
    if document["status"] == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["retry-after"] = str(max(1, math.ceil(retry_after)))
    return Problem(status=document["status"], document=document, headers=headers)


class ErrorHandler:
    """What `on_call_error` makes: a handler of exceptions for FastAPI, Starlette and similar frameworks.

    Attributes:
        responses: the responses that it makes, by status, for the OpenAPI of an app: `FastAPI(responses=...)`. A domain
            error whose answer is a function is under "default".

    """

    def __init__(self, domain: Domain, retry_after: float) -> None:
        self._domain = domain
        self._retry_after = retry_after
        self.responses = openapi.responses(
            [(it.status, it.title, base is InvalidParams) for base, it in _KINDS.items() if base is not BaseException]
            + [_described(kind, answer) for kind, answer in domain.items()]
        )

    async def __call__(self, _request: Any, error: Any, /) -> Any:
        """The response for an error; for the framework."""
        made = problem(error, self._domain, retry_after=self._retry_after)
        if made.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            later = made.status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
            write = log.warning if later else log.error
            write("request failed", status=made.status, error=type(error).__name__, cause=str(error))
        return made


def on_call_error(domain: Domain | None = None, *, retry_after: float = RETRY_AFTER) -> ErrorHandler:
    """Make a handler for `app.add_exception_handler` of FastAPI, Starlette and similar frameworks.

    Register it for `RpcqError`, which is also the base of `BrokerError` and `ClosedError`, or for `CallError` alone. A
    status of 500 or more is logged with the error's own message, which the user does not see: 503 and 504 as warnings,
    others as errors, since somebody has to fix them.

    Its attribute `responses` describes the responses for the app's OpenAPI: `FastAPI(responses=handler.responses)`.

    Args:
        domain: table of domain errors: `{OutOfStock: 409}`; see `Domain`.
        retry_after: seconds, as for `problem`.

    Raises:
        ConfigurationError: `domain` has a key that is not a class of domain errors, or a value that is not a status;
            raised at once.

    """
    domain = dict(domain or {})
    for kind, answer in domain.items():
        _check(kind, answer)
    return ErrorHandler(domain, retry_after)


def _described(kind: type[DomainError], answer: Answer | Callable[[Any], Answer]) -> tuple[int | None, str, bool]:
    """The status of a domain error, None if it depends on the error; its title; and False, for it has no `errors`."""
    if isinstance(answer, Problem):
        return answer.status, str(answer.document.get("title", _title(kind.code))), False
    if callable(answer):
        return None, _title(kind.code), False
    status, title = answer if isinstance(answer, tuple) else (answer, _title(kind.code))
    return status, title, False


def _extensions(error: CallError) -> dict[str, Any]:
    """Return the members that programs decide by; only domain errors in the table also get `details`."""
    found: dict[str, Any] = {"code": error.code, "executed": error.executed, "retryable": error.retryable}
    if error.correlation_id and (public := public_id(error.correlation_id)):
        found["instance"] = _urn("call", public)
    if error.incident:
        found["incident"] = error.incident
    if type(error) is InvalidParams:
        found |= {"detail": error.message, "errors": error.details if isinstance(error.details, list) else []}
    return found


def _of_job(error: JobFailed | NoResult) -> dict[str, Any]:
    """Return the members of a watched job that gave no result."""
    found: dict[str, Any] = {"reason": error.reason, "retryable": False}
    if isinstance(error, JobFailed):
        code = "ABORTED" if error.reason == "session_lost" else "UNKNOWN"
        found |= {"code": code, "executed": error.executed, "attempts": error.attempts}
    else:
        code = "ALREADY_EXISTS" if error.reason == "done_already" else "INTERNAL"
        found |= {"code": code, "executed": "yes"}
    if error.job_id and (public := public_id(error.job_id)):
        found["instance"] = _urn("job", public)
    if error.incident:
        found["incident"] = error.incident
    return found


def _answer(error: DomainError, domain: Domain) -> Answer | None:
    for kind in type(error).__mro__:
        if kind in domain:
            found = domain[kind]
            return found(error) if callable(found) and not isinstance(found, Problem) else found
    return None


def _domain_members(error: DomainError, answer: int | tuple[int, str]) -> dict[str, Any]:
    """Return the members of a domain error that is in the user's table."""
    status, title = answer if isinstance(answer, tuple) else (answer, _title(error.code))
    found = {
        "type": _urn("domain", error.code),
        "title": title,
        "status": status,
        "detail": error.message or title,
    }
    return found if error.details is None else found | {"details": error.details}


def _check(kind: Any, answer: Any) -> None:
    if not (isinstance(kind, type) and issubclass(kind, DomainError)):
        raise ConfigurationError(f"the keys of domain must be subclasses of DomainError; got {kind!r}")
    if callable(answer):
        return
    status, title = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, "")
    if (
        isinstance(status, bool)
        or not isinstance(status, int)
        or not 400 <= status <= 599
        or not isinstance(title, str)
    ):
        msg = f"domain[{kind.__name__}] must be a status from 400 to 599, (status, title) or a function; got {answer!r}"
        raise ConfigurationError(msg)


def _title(code: str) -> str:
    return re.sub(r"[_.-]+", " ", code).strip().capitalize()


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()


def _urn(kind: str, name: str) -> str:
    return f"urn:rpcq:{kind}:{quote(name, safe='')}"
