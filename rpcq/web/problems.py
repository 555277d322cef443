"""Errors of calls as HTTP: the problem documents of RFC 9457. Pure: no framework, no event loop.

    InvalidParams                     422   understood, and cannot be processed; `errors` lists the fields
    TooLarge                          413   the content is larger than the app can pass on
    NotSerializable                   500   a fault of the app, which made the parameters of it
    MethodNotFound                    502   the app calls what its service does not have; the user asked for nothing
                                            wrong, as 404 would say, and caches may keep 404 and 501
    PermissionDenied                  403   the service does not let this app, or its user, make the call
    ServiceUnavailable, Overloaded    503   it did not run, and may later; with Retry-After
    CallTimeout                       504   no timely answer from behind the app
    OutcomeUnknown                    502   the way to the service broke: it was not time that lacked, as 504 says
    InvalidReply, RemoteError         502   the service behind the app failed
    DomainError, in the user's table        as that says
    DomainError, otherwise            500   the app does not say what it means in HTTP: its omission
    BrokerError, ClosedError          503   no connection yet, or the app shuts down; with Retry-After
    anything else                     500   a fault of the app

The statuses are those of RFC 9110: 403 in 15.5.4, 413 in 15.5.14, 422 in 15.5.21, 500 in 15.6.1, 502 to 504 in 15.6.3
to 15.6.5. None says whether a request may be sent again: `executed` and `retryable` do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Mapping
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
    MethodNotFound,
    NotSerializable,
    OutcomeUnknown,
    Overloaded,
    PermissionDenied,
    RemoteError,
    ServiceUnavailable,
    TooLarge,
)
from rpcq.web.asgi import Receive, Scope, Send
from rpcq.wire import bodies

HEADERS: Final = {"content-type": "application/problem+json", "cache-control": "no-store"}
RETRY_AFTER: Final = 1.0
"""Seconds after which a user may come again, unless `on_call_error` says otherwise."""

WEBSOCKET_LATER: Final = 1013
WEBSOCKET_FAILED: Final = 1011
"""Codes that end a WebSocket: https://www.iana.org/assignments/websocket/websocket.xhtml"""

log = logs.get_logger("rpcq.web")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An error as HTTP: a response that every ASGI framework can send, and a value for those that are none.

    Attributes:
        status: of HTTP.
        document: RFC 9457's members, and rpcq's own: `code`, `executed`, `retryable`, `incident`, `details`, `errors`.
        headers: all that the response has, also its content type.

    """

    status: int
    document: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=lambda: dict(HEADERS))

    @property
    def body(self) -> bytes:
        """The document as JSON."""
        return bodies.dumps(self.document)

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Send it as the response of an ASGI request; a WebSocket is closed, as it has no other way to say it."""
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
"""What a domain error is in HTTP: a status, a status and a title, or all of the response."""

Domain = Mapping[type[DomainError], Answer | Callable[[Any], Answer]]
"""Which domain errors are what; subclasses are as their nearest base in it, unless it has them too."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What one class of errors is. `detail` is for users: the error's own message may name hosts and queues."""

    status: int
    title: str
    detail: str


_KINDS: Final[dict[type[BaseException], _Kind]] = {
    InvalidParams: _Kind(422, "Invalid parameters", "What was sent does not fit; 'errors' says where."),
    TooLarge: _Kind(413, "Too large", "What was sent is larger than can be passed on."),
    NotSerializable: _Kind(500, "Internal error", "The app could not pass this request on."),
    MethodNotFound: _Kind(502, "Not available here", "The service behind this app does not know this request."),
    PermissionDenied: _Kind(403, "Forbidden", "This request is not allowed."),
    ServiceUnavailable: _Kind(503, "Service unavailable", "Nobody could take the request; it did not run."),
    Overloaded: _Kind(503, "Overloaded", "There are too many requests; this one did not run."),
    CallTimeout: _Kind(504, "Timed out", "The service behind this app did not answer in time; 'executed' says more."),
    OutcomeUnknown: _Kind(502, "Outcome unknown", "The way to the service was lost: the request may have run."),
    InvalidReply: _Kind(502, "Invalid reply", "The service ran the request, and its answer cannot be used."),
    RemoteError: _Kind(502, "Service failed", "The service behind this app failed; give its operators 'incident'."),
    DomainError: _Kind(500, "Internal error", "The service refused, in a way that this app does not know."),
    CallError: _Kind(502, "Call failed", "The request could not be completed."),
    BrokerError: _Kind(503, "Service unavailable", "There is no connection yet; the request did not run."),
    ClosedError: _Kind(503, "Service unavailable", "The app is not ready, or shuts down; the request did not run."),
    BaseException: _Kind(500, "Internal error", "The app failed."),
}


def problem(error: BaseException, domain: Domain | None = None, *, retry_after: float = RETRY_AFTER) -> Problem:
    """What an error is in HTTP: the status, the headers and the problem document of RFC 9457.

    `type` (3.1.1) is a URN for each class of errors, `urn:rpcq:problem:call-timeout`, and for each code of a domain
    error, `urn:rpcq:domain:out_of_stock`: names to compare, which nobody is meant to open. `title` (3.1.3) is the same
    for each type; `detail` (3.1.4) is the error's own message only for parameters that do not fit and for domain errors
    of the table, since others may name hosts and queues (section 5); `instance` (3.1.5) names the call: its correlation
    ID without the last part, which is secret.

    Args:
        error: any; what is no error of rpcq's is 500, and says nothing of itself.
        domain: which domain errors are which status; see `Domain`.
        retry_after: seconds for Retry-After (RFC 9110, 10.2.3), which has whole ones: rounded up, at least 1.

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
    if isinstance(error, DomainError):
        answer = _answer(error, domain or {})
        if isinstance(answer, Problem):
            return answer
        if answer is not None:
            document |= _told(error, answer)
    headers = dict(HEADERS)
    if document["status"] == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["retry-after"] = str(max(1, math.ceil(retry_after)))
    return Problem(status=document["status"], document=document, headers=headers)


def on_call_error(
    domain: Domain | None = None, *, retry_after: float = RETRY_AFTER
) -> Callable[[Any, Any], Awaitable[Any]]:
    """A handler for `app.add_exception_handler`, of FastAPI, Starlette and what is like them.

    Register it for `RpcqError`, also the base of `BrokerError` and `ClosedError`, or for `CallError` alone. What
    the user is not told goes to the log: at error level where somebody has to mend something.

    Args:
        domain: which domain errors are which status: `{OutOfStock: 409}`; see `Domain`.
        retry_after: seconds, as for `problem`.

    Raises:
        ConfigurationError: `domain` has something that is no class of domain errors, or no status. At once.

    """
    domain = dict(domain or {})
    for kind, answer in domain.items():
        _check(kind, answer)

    async def handler(_request: Any, error: Any) -> Any:
        made = problem(error, domain, retry_after=retry_after)
        if made.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            later = made.status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
            say = log.warning if later else log.error
            say("request failed", status=made.status, error=type(error).__name__, cause=str(error))
        return made

    return handler


def _extensions(error: CallError) -> dict[str, Any]:
    """What a program can decide by; `details` come later, and for some."""
    found: dict[str, Any] = {"code": error.code, "executed": error.executed, "retryable": error.retryable}
    if error.correlation_id and (public := public_id(error.correlation_id)):
        found["instance"] = _urn("call", public)
    if error.incident:
        found["incident"] = error.incident
    if type(error) is InvalidParams:
        found |= {"detail": error.message, "errors": error.details if isinstance(error.details, list) else []}
    return found


def _answer(error: DomainError, domain: Domain) -> Answer | None:
    for kind in type(error).__mro__:
        if kind in domain:
            found = domain[kind]
            return found(error) if callable(found) and not isinstance(found, Problem) else found
    return None


def _told(error: DomainError, answer: int | tuple[int, str]) -> dict[str, Any]:
    """What the user's table tells of a domain error."""
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
        raise ConfigurationError(f"domain has {kind!r}; it has subclasses of DomainError")
    if callable(answer):
        return
    status, title = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, "")
    if (
        isinstance(status, bool)
        or not isinstance(status, int)
        or not 400 <= status <= 599
        or not isinstance(title, str)
    ):
        msg = (
            f"domain has {answer!r} for {kind.__name__}; it has a status from 400 to 599, (status, title) or a function"
        )
        raise ConfigurationError(msg)


def _title(code: str) -> str:
    return re.sub(r"[_.-]+", " ", code).strip().capitalize()


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()


def _urn(kind: str, name: str) -> str:
    return f"urn:rpcq:{kind}:{quote(name, safe='')}"
