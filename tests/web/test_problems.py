"""Errors of calls as HTTP: as values, and as a user gets them for real calls."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from rpcq import (
    BrokerError,
    CallError,
    CallTimeout,
    ClosedError,
    ConfigurationError,
    DomainError,
    GiveUp,
    InvalidParams,
    JobFailed,
    NoResult,
    Overloaded,
    RemoteError,
    Retry,
    RpcqError,
    SendError,
    Service,
    ServiceUnavailable,
    UsageError,
    contract,
    errors,
)
from rpcq.web import Problem, Rpc, on_call_error, problem
from support.late import let_others_speak_first
from support.places import cut_memory
from support.webserver import served

SECRET = "s3cr3t-0f-this-test"


class OutOfStock(DomainError):
    """No more."""


class SoldOut(OutOfStock):
    """For good."""


class NotYours(DomainError):
    """Of somebody else."""


@contract("things", errors=[OutOfStock, SoldOut, NotYours])
class Things(Protocol):
    async def double(self, x: int) -> int: ...

    async def word(self) -> int: ...

    async def sell(self, kind: str) -> None: ...


def things(began: asyncio.Event) -> Service:
    service = Service("things", errors=[OutOfStock, SoldOut, NotYours])

    @service.method
    async def double(x: int) -> int:
        return 2 * x

    @service.method
    async def word() -> str:
        return "no number"

    @service.method
    async def sell(kind: str) -> None:
        raise {"out": OutOfStock, "sold": SoldOut, "not": NotYours}[kind]("none left", details={"left": 2**70})

    @service.method
    async def fail() -> None:
        raise ValueError(SECRET)

    @service.method
    async def wait() -> None:
        began.set()
        await asyncio.Event().wait()

    return service


Ask = Callable[[str], Awaitable[httpx.Response]]


@asynccontextmanager
async def asking(namespace: str, domain: Any = None) -> AsyncIterator[Ask]:
    """An app with an endpoint for each error; what it gives asks it."""
    began = asyncio.Event()
    rpc = Rpc(
        f"memory://{namespace}",
        services=[things(began)],
        max_in_flight=1,
        max_body=500,
        grace=0,
        worker_options={"grace": 0.1},
    )
    api = rpc.bind(Things)

    async def overloaded() -> None:
        waits = asyncio.create_task(rpc.client.call("things.wait"))
        try:
            await began.wait()
            await api.double(1)
        finally:
            waits.cancel()

    async def lost() -> None:
        waits = asyncio.create_task(rpc.client.call("things.wait"))
        await began.wait()
        await cut_memory(rpc.client)
        await waits

    ways: dict[str, Callable[[], Awaitable[Any]]] = {
        "params": lambda: rpc.client.call("things.double", x="many"),
        "large": lambda: rpc.client.call("things.double", x="x" * 1000),
        "object": lambda: rpc.client.call("things.double", x=object()),
        "method": lambda: rpc.client.call("things.nothing"),
        "nobody": lambda: rpc.client.call("nobody.there"),
        "overloaded": overloaded,
        "timeout": lambda: rpc.client.with_options(timeout=0.2).call("things.wait"),
        "lost": lost,
        "reply": api.word,
        "remote": lambda: rpc.client.call("things.fail"),
        "out": lambda: api.sell("out"),
        "sold": lambda: api.sell("sold"),
        "not": lambda: api.sell("not"),
        "unknown": lambda: rpc.client.call("things.sell", kind="out"),
    }

    async def endpoint(request: Request) -> Response:
        return JSONResponse(await ways[request.path_params["way"]]())

    app = Starlette(
        routes=[Route("/{way}", endpoint)],
        lifespan=rpc.lifespan,
        exception_handlers={RpcqError: on_call_error(domain)},
    )
    async with served(app) as client:
        let_others_speak_first(rpc.client)
        yield lambda way: client.get(f"/{way}")


@pytest.mark.parametrize(
    ("way", "status", "kind", "code", "executed"),
    [
        ("params", 422, "invalid-params", "INVALID_ARGUMENT", "no"),
        ("large", 413, "too-large", "INVALID_ARGUMENT", "no"),
        ("object", 500, "not-serializable", "INVALID_ARGUMENT", "no"),
        ("method", 502, "method-not-found", "UNIMPLEMENTED", "no"),
        ("nobody", 503, "service-unavailable", "UNAVAILABLE", "no"),
        ("overloaded", 503, "overloaded", "RESOURCE_EXHAUSTED", "no"),
        ("timeout", 504, "call-timeout", "DEADLINE_EXCEEDED", "yes"),
        ("lost", 502, "outcome-unknown", "ABORTED", "maybe"),
        ("reply", 502, "invalid-reply", "INTERNAL", "yes"),
        ("remote", 502, "remote-error", "UNKNOWN", "yes"),
        ("unknown", 502, "remote-error", "out_of_stock", "yes"),
        ("out", 500, "domain-error", "out_of_stock", "yes"),
    ],
)
async def test_each_error_of_a_call_is_a_problem_of_its_own_kind(
    way: str, status: int, kind: str, code: str, executed: str, namespace: str
) -> None:
    async with asking(namespace) as ask:
        response = await ask(way)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    document = response.json()
    assert document["type"] == f"urn:rpcq:problem:{kind}"
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    assert (document["code"], document["executed"]) == (code, executed)
    assert document["retryable"] is (status == 503)
    assert ("retry-after" in response.headers) == (status == 503)
    assert "details" not in document
    assert SECRET not in response.text
    if way not in ("large", "object", "overloaded"):  # which were never given one
        assert document["instance"].startswith("urn:rpcq:call:")


async def test_parameters_that_do_not_fit_are_told_field_by_field(namespace: str) -> None:
    async with asking(namespace) as ask:
        document = (await ask("params")).json()
    (error,) = document["errors"]
    assert error["loc"] == ["x"]
    assert error["type"] == "int_parsing"
    assert "x: " in document["detail"]


async def test_an_exception_that_was_not_declared_has_an_incident_and_no_text(
    namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with asking(namespace) as ask:
        document = (await ask("remote")).json()
    told = [it for it in caplog.records if it.name == "rpcq.web"]
    assert [it.levelno for it in told] == [logging.ERROR]
    assert document["incident"] in told[0].cause  # type: ignore[attr-defined]
    assert SECRET not in told[0].cause  # type: ignore[attr-defined]


async def test_domain_errors_are_what_the_table_says_and_subclasses_as_their_nearest_base(namespace: str) -> None:
    domain = {OutOfStock: 409, NotYours: (403, "Not for you")}
    async with asking(namespace, domain) as ask:
        out, sold, not_yours = [await ask(way) for way in ("out", "sold", "not")]
    assert [it.status_code for it in (out, sold, not_yours)] == [409, 409, 403]
    assert {name: out.json()[name] for name in ("type", "title", "status", "detail", "code", "details")} == {
        "type": "urn:rpcq:domain:out_of_stock",
        "title": "Out of stock",
        "status": 409,
        "detail": "none left",
        "code": "out_of_stock",
        "details": {"left": 2**70},
    }
    assert sold.json()["type"] == "urn:rpcq:domain:sold_out"
    assert not_yours.json()["title"] == "Not for you"


async def test_a_function_of_the_table_makes_a_status_or_all_of_the_response(namespace: str) -> None:
    def whole(error: OutOfStock) -> Problem:
        return Problem(status=418, document={"title": error.message}, headers={"x-own": "1"})

    def changed(error: NotYours) -> Problem:
        made = problem(error, {NotYours: 404})
        return replace(made, document={**made.document, "help": "https://example.com/"})

    domain = {OutOfStock: whole, SoldOut: lambda error: (410, error.message), NotYours: changed}
    async with asking(namespace, domain) as ask:
        out, sold, not_yours = [await ask(way) for way in ("out", "sold", "not")]
    assert (out.status_code, out.headers["x-own"], out.json()) == (418, "1", {"title": "none left"})
    assert (sold.status_code, sold.json()["title"]) == (410, "none left")
    assert (not_yours.status_code, not_yours.json()["help"]) == (404, "https://example.com/")


# As values.


@pytest.mark.parametrize(
    "kind", [it for it in vars(errors).values() if inspect.isclass(it) and issubclass(it, CallError)]
)
def test_every_error_of_a_call_has_a_status_and_a_document_that_is_json(kind: type[CallError]) -> None:
    made = problem(kind(SECRET, incident="i1", correlation_id="1-2"))
    document = json.loads(made.body)
    assert 400 <= made.status <= 599
    assert document["status"] == made.status
    assert document.keys() >= {"type", "title", "detail", "instance", "code", "executed", "retryable", "incident"}
    assert (SECRET in str(document)) == (kind is InvalidParams)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (BrokerError(SECRET), 503, "broker-error"),
        (errors.AuthenticationFailed(SECRET), 503, "broker-error"),
        (ClosedError(SECRET), 503, "closed-error"),
        (UsageError(SECRET), 500, "internal-error"),
        (ConfigurationError(SECRET), 500, "internal-error"),
        (ValueError(SECRET), 500, "internal-error"),
    ],
)
def test_what_is_no_error_of_a_call_says_nothing_of_itself(error: Exception, status: int, kind: str) -> None:
    made = problem(error)
    assert (made.status, made.document["type"]) == (status, f"urn:rpcq:problem:{kind}")
    assert SECRET not in str(made.document)
    assert ("retry-after" in made.headers) == (status == 503)


@pytest.mark.parametrize("queued", ["no", "maybe"])
def test_a_job_that_could_not_be_sent_may_be_asked_for_again_if_it_is_certainly_not_queued(queued: Any) -> None:
    made = problem(SendError(SECRET, queued=queued, message_id="1", key="2"))
    assert (made.status, made.document["type"]) == (503, "urn:rpcq:problem:send-error")
    assert (made.document["queued"], made.document["retryable"]) == (queued, queued == "no")
    assert SECRET not in str(made.document)
    assert "retry-after" in made.headers


@pytest.mark.parametrize(
    ("reason", "code", "executed"),
    [("attempts", "UNKNOWN", "yes"), ("expired", "UNKNOWN", "no"), ("session_lost", "ABORTED", "maybe")],
)
def test_a_failed_job_is_a_bad_gateway_that_says_why_and_nothing_of_its_message(
    reason: str, code: str, executed: Any
) -> None:
    error = JobFailed(SECRET, executed=executed, reason=reason, attempts=2, incident="i1", job_id="5f0c-1a-0123456789")
    made = problem(error)
    assert (made.status, made.document["type"]) == (502, "urn:rpcq:problem:job-failed")
    wanted = {"reason": reason, "code": code, "executed": executed, "attempts": 2, "incident": "i1", "retryable": False}
    assert made.document.items() >= wanted.items()
    assert made.document["instance"] == "urn:rpcq:job:5f0c-1a"
    assert SECRET not in str(made.document)


@pytest.mark.parametrize(
    ("reason", "code"),
    [("done_already", "ALREADY_EXISTS"), ("invalid_result", "INTERNAL"), ("unreadable", "INTERNAL")],
)
def test_a_job_without_a_result_is_done_and_must_not_be_sent_again(reason: str, code: str) -> None:
    made = problem(NoResult(SECRET, reason=reason))
    assert (made.status, made.document["type"]) == (502, "urn:rpcq:problem:no-result")
    assert made.document.items() >= {"reason": reason, "code": code, "executed": "yes", "retryable": False}.items()
    assert not made.document.keys() & {"attempts", "incident", "instance"}
    assert SECRET not in str(made.document)


@pytest.mark.parametrize(
    ("way", "kind", "reason", "executed", "attempts"),
    [
        ("give_up", "job-failed", "gave_up", "yes", 1),
        ("fail", "job-failed", "attempts", "yes", 2),
        ("large", "no-result", "invalid_result", "yes", None),
        ("word", "no-result", "unreadable", "yes", None),
    ],
)
async def test_a_request_that_waits_for_a_job_gets_what_became_of_it(
    way: str, kind: str, reason: str, executed: str, attempts: int | None, namespace: str
) -> None:
    service = Service("works")

    @service.job(retry=Retry(max_attempts=2, initial_backoff=0.01, max_backoff=0.01))
    async def work(way: str) -> Any:
        if way == "give_up":
            raise GiveUp("no such picture")
        if way == "fail":
            raise ValueError(SECRET)
        return "x" * 2_000_000 if way == "large" else "no number"

    rpc = Rpc(f"memory://{namespace}", services=[service], grace=0, worker_options={"max_body": 1_000_000})

    async def endpoint(request: Request) -> Response:
        job = await rpc.client.with_options(watch=True, returns=int).send("works.work", way=request.path_params["way"])
        return JSONResponse(await job.result(timeout=10))

    app = Starlette(
        routes=[Route("/{way}", endpoint)], lifespan=rpc.lifespan, exception_handlers={RpcqError: on_call_error()}
    )
    async with served(app) as client:
        response = await client.get(f"/{way}")
    document = response.json()
    assert (response.status_code, document["type"]) == (502, f"urn:rpcq:problem:{kind}")
    assert (document["reason"], document["executed"], document.get("attempts")) == (reason, executed, attempts)
    assert document["instance"].startswith("urn:rpcq:job:")
    assert SECRET not in response.text


@pytest.mark.parametrize(("seconds", "header"), [(0, "1"), (0.2, "1"), (1, "1"), (1.01, "2"), (30, "30")])
def test_retry_after_is_whole_seconds_and_never_none(seconds: float, header: str) -> None:
    for error in (ServiceUnavailable(), Overloaded()):
        assert problem(error, retry_after=seconds).headers["retry-after"] == header


def test_a_timeout_says_what_is_known() -> None:
    for executed in ("no", "maybe", "yes"):
        document = problem(CallTimeout(executed=executed)).document
        assert (document["executed"], document["retryable"]) == (executed, executed == "no")


def test_a_call_is_named_without_what_would_let_somebody_forge_its_reply() -> None:
    document = problem(RemoteError("", correlation_id="5f0c-1a-0123456789abcdef")).document
    assert document["instance"] == "urn:rpcq:call:5f0c-1a"
    assert "0123456789abcdef" not in str(document)
    assert "instance" not in problem(RemoteError("", correlation_id="0123456789abcdef")).document


def test_ids_are_quoted() -> None:
    document = problem(RemoteError("", correlation_id="a b/\u00e9-1")).document
    assert document["instance"] == "urn:rpcq:call:a%20b%2F%C3%A9"


def test_a_table_that_cannot_be_is_told_when_it_is_given() -> None:
    for wrong in (
        {ValueError: 400},
        {OutOfStock: 200},
        {OutOfStock: "409"},
        {OutOfStock: (409, 1)},
        {OutOfStock: True},
    ):
        with pytest.raises(ConfigurationError, match=r"domain.* must be"):
            on_call_error(wrong)  # type: ignore[arg-type]


async def test_a_web_socket_is_closed_with_a_code(namespace: str) -> None:
    """What is sent, since httpx has no WebSockets."""
    rpc = Rpc(f"memory://{namespace}")

    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        await rpc.client.call("nobody.there")

    app = Starlette(routes=[WebSocketRoute("/", endpoint)], exception_handlers={CallError: on_call_error()})
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async with rpc.lifespan():
        await app({"type": "websocket", "path": "/", "headers": [], "query_string": b""}, receive, send)
    assert sent[-1] == {"type": "websocket.close", "code": 1013, "reason": "Service unavailable"}


def the_openapi(**table: Any) -> dict[str, Any]:
    """The OpenAPI of an app whose handler has this table."""
    handler = on_call_error(**table)
    app = FastAPI(responses=handler.responses)
    app.add_exception_handler(RpcqError, handler)

    @app.get("/things/{x}")
    async def things(x: int) -> int:
        return x

    found: dict[str, Any] = app.openapi()["paths"]["/things/{x}"]["get"]["responses"]
    return found


def test_the_openapi_of_an_app_has_every_response_that_the_handler_can_make() -> None:
    class Gone(DomainError):
        pass

    class Odd(DomainError):
        pass

    found = the_openapi(domain={OutOfStock: (409, "Sold out"), Gone: 503, Odd: lambda error: 400 + len(error.message)})
    assert {*found} == {"200", "403", "409", "413", "422", "500", "502", "503", "504", "default"}
    assert found["409"]["description"] == "Sold out"
    assert found["default"]["description"] == "Odd"
    assert found["503"]["description"] == "Service unavailable; Overloaded; Not queued; Gone"
    assert "Retry-After" in found["503"]["headers"]
    assert {*found["422"]["content"]} == {"application/problem+json", "application/json"}
    errors = [InvalidParams("x", details=[]), RemoteError("x"), CallTimeout("x"), BrokerError("x"), OutOfStock("x")]
    for error in errors:
        made = problem(error, {OutOfStock: 409})
        schema = found[str(made.status)]["content"][made.headers["content-type"]]["schema"]
        assert made.document.keys() <= schema["properties"].keys()
        assert made.document.keys() >= {*schema["required"]}


def test_the_openapi_of_an_app_without_a_table_has_no_default() -> None:
    assert {*the_openapi()} == {"200", "403", "413", "422", "500", "502", "503", "504"}
