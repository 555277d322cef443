"""The producer as a web app: `POST /process` for programs, and a page for people.

uvicorn --factory producer_service.app:create_app
python -m producer_service serve
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from http import HTTPStatus
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from pydantic import BaseModel, Field, StringConstraints
from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response

from consumer_service.calculator import calculator
from consumer_service.contracts import EchoApi
from consumer_service.echo import echo
from producer_service.asking import MOST_AT_ONCE, MOST_REQUESTS, Answer, Run
from producer_service.shielding import Shielding
from rpcq import Overloaded, RpcqError, ServiceUnavailable
from rpcq.environment import url_from_environment
from rpcq.observability.metrics import Metrics
from rpcq.web import CancelOnDisconnect, Rpc, on_call_error, problem

STATIC: Final = Path(__file__).parent / "static"
MOST_RUNS: Final = 32
"""The most runs under way at once, of all users; one more is refused, to protect the service from overload."""

INTERVAL: Final = 0.05
"""Seconds between two events of a stream: at most 20 a second, at any rate of answers."""

SHOWN: Final = 6
"""Answers in one event that contain their text: the page does not show more of them."""

PING: Final = 15
"""Seconds of silence after which a stream sends a comment, so that proxies do not close it."""

SEND_TIMEOUT: Final = 30.0
"""Seconds that a browser may take to read an event."""

AWAY: Final = "The message broker cannot be reached. The app keeps trying."

Delay = Annotated[float, Field(ge=0, le=60, description="Seconds of simulated work in each request.")]
Timeout = Annotated[float, Field(gt=0, le=300, description="Seconds until each request has ended.")]


log = logging.getLogger("producer_service")


class Messages(BaseModel):
    """The body of `POST /process`."""

    messages: Annotated[
        list[Annotated[str, StringConstraints(max_length=1000)]], Field(min_length=1, max_length=MOST_REQUESTS)
    ]
    delay: Delay = 0.0
    timeout: Timeout = 30.0


class Asked(BaseModel):
    """The query of `GET /stream`, from the form on the page."""

    requests: Annotated[int, Field(ge=1, le=MOST_REQUESTS)] = 200
    concurrency: Annotated[int, Field(ge=1, le=MOST_AT_ONCE)] = 50
    delay: Delay = 0.0
    timeout: Timeout = 30.0
    message: Annotated[str, StringConstraints(min_length=1, max_length=200)] = "request"


class Failure(BaseModel):
    """Why a call failed."""

    code: str
    title: str
    executed: str


class Processed(BaseModel):
    """The answer to one message, or its error."""

    message: str
    answer: str | None
    latency_ms: float
    error: Failure | None


class Answers(BaseModel):
    """The response of `POST /process`: one answer for each message, in their order."""

    answers: list[Processed]


class Ready(BaseModel):
    """The state in the header of the page."""

    ready: bool
    text: str
    worker: str


class Producer:
    """What the app does, apart from HTTP.

    Args:
        rpc: makes the app's calls.
        worker: where the worker runs, as a text for the page.

    """

    def __init__(self, rpc: Rpc, worker: str) -> None:
        self.rpc = rpc
        self.worker = worker
        self.runs = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count a run while it is under way.

        Raises:
            Overloaded: `MOST_RUNS` runs are under way.

        """
        if self.runs >= MOST_RUNS:
            raise Overloaded("too many runs at once", executed="no")
        self.runs += 1
        try:
            yield
        finally:
            self.runs -= 1

    async def process(self, asked: Messages) -> list[dict[str, Any]]:
        """Make a call for each message, and return the answers in the order of the messages.

        Raises:
            ServiceUnavailable: no worker took any of the messages.
            Overloaded: there are too many runs, or no call was accepted.

        """
        with self.counted():
            run = self._run(asked.messages, asked.delay, asked.timeout, MOST_AT_ONCE)
            await run.all()
        if run.unserved is not None:
            raise run.unserved
        return [it.as_json() for it in sorted(run.take(), key=attrgetter("number"))]

    async def events(self, asked: Asked) -> AsyncGenerator[dict[str, str], None]:
        """Server-sent events: `begun`, `answers`, then `done` or `failed`. Closing the generator cancels the calls."""
        try:
            with self.counted():
                self._check_ready()
                run = self._run(_numbered(asked), asked.delay, asked.timeout, asked.concurrency)
                yield _event("begun", asked.model_dump())
                async with aclosing(_answer_events(run)) as events:
                    async for event in events:
                        yield event
        except RpcqError as error:
            yield _event("failed", _why(error, ready=self.rpc.ready))
            return
        except Exception as error:
            log.exception("a run failed")
            yield _event("failed", dict(problem(error).document))
            return
        if run.unserved is None:
            yield _event("done", run.summary())
        else:
            yield _event("failed", _why(run.unserved, ready=self.rpc.ready) | {"summary": run.summary()})

    def _check_ready(self) -> None:
        """Raise at once if the broker is away: otherwise each call of the run would wait for its timeout."""
        if not self.rpc.ready:
            raise ServiceUnavailable(self.rpc.why_not_ready or "")

    def _run(self, messages: list[str], delay: float, timeout: float, concurrency: int) -> Run:
        return Run(self.rpc.bind(EchoApi, timeout=timeout), messages, delay, concurrency)


async def _answer_events(run: Run) -> AsyncGenerator[dict[str, str], None]:
    task = asyncio.create_task(run.all())
    shown = -1
    try:
        ended = False
        while not ended:
            await asyncio.wait([task], timeout=INTERVAL)
            ended = task.done()  # checked before `take`, so that no answer comes after the last one
            if (answers := run.take()) or run.sent != shown:
                shown = run.sent
                yield _event("answers", _answers(shown, answers))
        task.result()
    finally:
        task.cancel()
        await asyncio.wait([task])


def _answers(sent: int, answers: list[Answer]) -> dict[str, Any]:
    """The number, time, latency and kind of each answer, and all fields of the last ones."""
    return {
        "sent": sent,
        "ended": [[it.number, round(it.ended_ms, 1), round(it.latency_ms, 2), it.kind] for it in answers],
        "shown": [{"number": it.number, "kind": it.kind} | it.as_json() for it in answers[-SHOWN:]],
    }


def _numbered(asked: Asked) -> list[str]:
    """A different message for each request, so that an answer to another request is noticed."""
    return [f"{asked.message} {number}" for number in range(1, asked.requests + 1)]


def _why(error: RpcqError, *, ready: bool) -> dict[str, Any]:
    """A problem document with texts for the page."""
    document = dict(problem(error).document)
    if not ready:
        document |= {"title": "The broker is away", "detail": "Send again once it is back."}
    elif isinstance(error, ServiceUnavailable):
        document |= {"title": "No worker took the requests", "detail": "No worker of the service answers. None ran."}
    return document


def _event(name: str, data: object) -> dict[str, str]:
    return {"event": name, "data": json.dumps(data, ensure_ascii=False, separators=(",", ":"))}


def create_app(
    url: str | None = None, *, namespace: str = "rpcq", with_worker: bool = False, prefetch: int = 100
) -> FastAPI:
    """Make the app.

    Args:
        url: the broker's URL; None for that of the environment. If there is none either, the broker and the worker run
            in this process.
        namespace: prefix of queues and exchanges.
        with_worker: whether the worker runs in this process, in the event loop of the app.
        prefetch: calls of each service that this worker runs at once.

    Raises:
        ConfigurationError: an argument is not valid.

    """
    url = url or url_from_environment() or "memory://"
    beside = with_worker or url.startswith("memory:")
    services = [echo, calculator] if beside else []
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    rpc = Rpc(
        url,
        services=services,
        worker_options={"prefetch": prefetch},
        name="producer_service",
        namespace=namespace,
        observers=[Metrics(registry)],
    )
    producer = Producer(rpc, "in this process" if beside else "running elsewhere")
    # Without the documentation pages of FastAPI, which load scripts from another host.
    app = FastAPI(
        title="rpcq producer", lifespan=rpc.lifespan, docs_url=None, redoc_url=None, openapi_url="/openapi.json"
    )
    _add_calls(app, producer)
    _add_health(app, producer)
    _add_metrics(app, registry)
    _add_page(app)
    app.add_exception_handler(RpcqError, on_call_error())
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_middleware(Shielding)
    app.add_middleware(CancelOnDisconnect)  # added last, so it is the outermost middleware
    return app


def _add_calls(app: FastAPI, producer: Producer) -> None:
    @app.post("/process", summary="Send messages, and wait for all answers")
    async def process(asked: Messages) -> Answers:
        return Answers.model_validate({"answers": await producer.process(asked)})

    @app.get("/stream", summary="Send many requests, and see answers as they come", dependencies=[Depends(_own)])
    async def stream(asked: Annotated[Asked, Query()]) -> EventSourceResponse:
        return EventSourceResponse(producer.events(asked), ping=PING, send_timeout=SEND_TIMEOUT)


def _add_health(app: FastAPI, producer: Producer) -> None:
    @app.get("/livez", response_class=PlainTextResponse, summary="Whether the app runs")
    async def livez() -> str:
        return "alive"

    @app.get("/readyz", response_class=PlainTextResponse, summary="Whether the app is ready for requests")
    async def readyz() -> PlainTextResponse:
        # Not `rpc.why_not_ready`, which names the broker and is for the log.
        ready = producer.rpc.ready
        return PlainTextResponse("ready" if ready else AWAY, HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)

    @app.get("/status", summary="Whether the app is ready, always with status 200, for the page")
    async def status() -> Ready:
        ready = producer.rpc.ready
        return Ready(ready=ready, text="Broker connected" if ready else AWAY, worker=producer.worker)


def _add_metrics(app: FastAPI, registry: CollectorRegistry) -> None:
    @app.get("/metrics", summary="Metrics for Prometheus")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    files = StaticFiles(directory=STATIC)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)  # 304 if the browser has it

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> FileResponse:  # browsers request it on responses without a page, such as /livez
        return FileResponse(STATIC / "icon.svg")

    app.mount("/static", files)


async def _own(request: Request) -> None:
    """Refuse requests from other sites: an image or a link there must not start a run."""
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise HTTPException(HTTPStatus.FORBIDDEN, "This request came from another site.")


async def _refused(_request: Request, error: Any) -> Response:
    return _problem(error.status_code, str(error.detail), headers=error.headers)


async def _invalid(_request: Request, error: Any) -> Response:
    # Without the input, which may be megabytes.
    errors = [{name: it[name] for name in ("loc", "msg", "type")} for it in error.errors()]
    return _problem(HTTPStatus.UNPROCESSABLE_ENTITY, "The request is not valid; see 'errors'.", errors=errors)


def _problem(status: int, detail: str, headers: Any = None, **more: Any) -> Response:
    document = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    return JSONResponse(document, status, headers=headers, media_type="application/problem+json")
