"""Users who leave, on real connections to a real server: what is cancelled, and what is not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from rpcq import Service
from rpcq.web import CancelOnDisconnect, Rpc, on_call_error
from support.load import until
from support.webserver import browser, served

KIB = 1024


class Seen(list[str]):
    """What happened, in order."""

    async def until(self, *what: str) -> None:
        await until(lambda: [it for it in self if it in what] == [*what], what=f"{what} is not what happened: {self}")

    @contextlib.asynccontextmanager
    async def around(self, name: str) -> AsyncIterator[None]:
        self.append(f"{name} began")
        try:
            yield
        except asyncio.CancelledError:
            self.append(f"{name} cancelled")
            raise
        self.append(f"{name} ended")


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def let_go() -> asyncio.Event:
    return asyncio.Event()


def app_of(*endpoints: Any, middleware: list[Middleware] | None = None, **options: Any) -> Starlette:
    """An app with a route for each, by its name."""
    routes = [Route(f"/{it.__name__}", it, methods=["GET", "POST"]) for it in endpoints]
    return Starlette(routes=routes, middleware=[Middleware(CancelOnDisconnect), *(middleware or [])], **options)


def slow_service(seen: Seen, let_go: asyncio.Event) -> Service:
    service = Service("things")

    @service.method
    async def wait() -> str:
        async with seen.around("handler"):
            await let_go.wait()
        return "done"

    return service


def calling_app(url: str, namespace: str, seen: Seen, let_go: asyncio.Event) -> Starlette:
    rpc = Rpc(url, services=[slow_service(seen, let_go)], namespace=namespace)

    async def call(_request: Request) -> Response:
        async with seen.around("request"):
            return JSONResponse(await rpc.client.call("things.wait"))

    return app_of(call, lifespan=rpc.lifespan)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_user_who_leaves_cancels_the_handler_at_the_worker(
    how: Literal["close", "reset"], rabbitmq_url: str, namespace: str, seen: Seen, let_go: asyncio.Event
) -> None:
    async with served(calling_app(rabbitmq_url, namespace, seen, let_go)) as client, browser(client) as user:
        await user.get("/call")
        await seen.until("handler began")
        await user.leave(how)
        await seen.until("handler cancelled")
        assert "request cancelled" in seen


async def test_the_end_of_one_user_is_nothing_to_another(
    rabbitmq_url: str, namespace: str, seen: Seen, let_go: asyncio.Event
) -> None:
    async with served(calling_app(rabbitmq_url, namespace, seen, let_go)) as client, browser(client) as user:
        other = asyncio.create_task(client.get("/call"))
        await seen.until("handler began")
        await user.get("/call")
        await seen.until("handler began", "handler began")
        await user.leave()
        await until(lambda: "handler cancelled" in seen)
        let_go.set()
        assert (await other).json() == "done"
        assert seen.count("handler cancelled") == 1


async def test_requests_on_a_connection_that_stays_are_answered_one_after_the_other() -> None:
    async def echo(request: Request) -> Response:
        return PlainTextResponse(await request.body())

    async with served(app_of(echo)) as client, browser(client) as user:
        for number in range(5):
            text = b"number %d" % number
            await user.send(b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
            assert await user.answer() == (200, text)
        await user.get("/echo")
        assert await user.answer() == (200, b"")
        # The next request is there before the answer to the one before.
        await user.send(b"GET /echo HTTP/1.1\r\nHost: h\r\n\r\n" * 3)
        assert [await user.answer() for _ in range(3)] == [(200, b"")] * 3


@pytest.mark.parametrize("inside", [True, False])
async def test_a_large_upload_is_streamed_in_bounded_memory(inside: bool, let_go: asyncio.Event) -> None:
    """What the app does not take stays with the user: the server reads no further than it would without."""
    size = 64 * KIB * KIB
    largest = 0

    async def upload(request: Request) -> Response:
        nonlocal largest
        await let_go.wait()
        total = 0
        async for chunk in request.stream():
            largest = max(largest, len(chunk))
            total += len(chunk)
        return PlainTextResponse(str(total))

    app = Starlette(
        routes=[Route("/upload", upload, methods=["POST"])],
        middleware=[Middleware(CancelOnDisconnect)] if inside else [],
    )
    async with served(app) as client, browser(client) as user:
        sent = 0

        async def send() -> None:
            nonlocal sent
            await user.send(b"POST /upload HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % size)
            for _ in range(size // (64 * KIB)):
                await user.send(bytes(64 * KIB))
                sent += 64 * KIB

        sending = asyncio.create_task(send())
        before = -1
        while sent != before:  # it goes on for as long as somebody takes it
            before = sent
            await asyncio.sleep(0.2)
        assert not sending.done(), "all of it was taken, and nobody asked for it"
        let_go.set()
        assert await user.answer() == (200, str(size).encode())
        await sending
    assert largest <= 1024 * KIB


async def test_a_body_that_nobody_reads_does_not_hide_that_the_user_left(seen: Seen, let_go: asyncio.Event) -> None:
    async def ignore(_request: Request) -> Response:
        async with seen.around("request"):
            await let_go.wait()
        return Response()

    async with served(app_of(ignore)) as client, browser(client) as user:
        await user.send(b"POST /ignore HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody")
        await seen.until("request began")
        await user.leave()
        await seen.until("request cancelled")


async def test_an_app_that_reads_the_body_is_told_and_not_cancelled(seen: Seen) -> None:
    async def read(request: Request) -> Response:
        seen.append("request began")
        try:
            await request.body()
        except ClientDisconnect:
            seen.append("told")
        return Response()

    async with served(app_of(read)) as client, browser(client) as user:
        await user.send(b"POST /read HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbo")
        await seen.until("request began")
        await user.leave()
        await seen.until("told")


async def test_nothing_is_read_before_the_app_asks_where_the_user_waits_to_be_told(
    seen: Seen, let_go: asyncio.Event
) -> None:
    async def refuse(_request: Request) -> Response:
        seen.append("request began")
        await let_go.wait()
        return Response(status_code=413)

    async with served(app_of(refuse)) as client, browser(client) as user:
        await user.send(b"POST /refuse HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n")
        await seen.until("request began")
        await client.get("/nothing")  # meanwhile it would have been read
        let_go.set()
        assert await user.answer() == (413, b"")  # and no 100 before it


async def test_an_app_can_be_asked_to_continue(seen: Seen) -> None:
    async def read(request: Request) -> Response:
        return Response(await request.body())

    async with served(app_of(read)) as client, browser(client) as user:
        await user.send(b"POST /read HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert await user.answer() == (100, b"")
        await user.send(b"body")
        assert await user.answer() == (200, b"body")


@pytest.mark.parametrize("with_middleware", [True, False])
async def test_a_stream_ends_with_its_user(with_middleware: bool, seen: Seen) -> None:
    async def numbers() -> AsyncIterator[str]:
        seen.append("stream began")
        try:
            while True:
                yield "number\n"
                await asyncio.sleep(0.01)
        finally:
            seen.append("stream ended")

    async def stream(_request: Request) -> Response:
        return StreamingResponse(numbers())

    app = app_of(stream) if with_middleware else Starlette(routes=[Route("/stream", stream)])
    async with served(app) as client, browser(client) as user:
        await user.get("/stream")
        await user.reader.readuntil(b"number")
        await user.leave()
        await seen.until("stream began", "stream ended")


async def test_what_an_app_does_after_its_response_goes_on_without_the_user(seen: Seen, let_go: asyncio.Event) -> None:
    async def later() -> None:
        async with seen.around("later"):
            await let_go.wait()

    async def answer(_request: Request) -> Response:
        return PlainTextResponse("ok", background=BackgroundTask(later))

    async with served(app_of(answer)) as client, browser(client) as user:
        await user.get("/answer")
        assert await user.answer() == (200, b"ok")
        await seen.until("later began")
        await user.leave()
        await client.get("/nothing")  # by then the server has seen it
        let_go.set()
        await seen.until("later ended")


async def test_an_exception_goes_through() -> None:
    async def fail(_request: Request) -> Response:
        raise ValueError("text")

    caught: list[Exception] = []

    async def caught_it(_request: Any, error: Exception) -> Response:
        caught.append(error)
        return Response(status_code=500)

    async with served(app_of(fail, exception_handlers={ValueError: caught_it})) as client:
        assert (await client.get("/fail")).status_code == 500
    assert [str(it) for it in caught] == ["text"]


async def test_a_cleanup_that_fails_is_not_hidden_behind_the_cancellation(seen: Seen) -> None:
    """Plain ASGI, so that no framework is between."""
    errors: list[BaseException] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            seen.append("began")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("the cleanup failed") from None

    guarded = CancelOnDisconnect(app)

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        try:
            await guarded(scope, receive, send)
        except ValueError as error:
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            errors.append(error)

    async with served(outer) as client, browser(client) as user:
        await user.get("/")
        await seen.until("began")
        await user.leave()
        await until(lambda: errors)


async def lifespan(receive: Any, send: Any) -> None:
    for _ in range(2):
        asked = await receive()
        await send({"type": f"{asked['type']}.complete"})


async def test_a_cancellation_from_outside_goes_through_also_where_the_user_has_left() -> None:
    """Plain calls: no server cancels the task of a request and says so."""
    for leaves in (False, True):
        left, began = asyncio.Event(), asyncio.Event()

        async def receive(left: asyncio.Event = left) -> dict[str, Any]:
            await left.wait()
            return {"type": "http.disconnect"}

        async def app(scope: Any, receive: Any, send: Any, began: asyncio.Event = began) -> None:
            began.set()
            await asyncio.Event().wait()

        async def send(message: Any) -> None: ...

        scope = {"type": "http", "headers": []}
        task = asyncio.create_task(CancelOnDisconnect(app)(scope, receive, send))  # type: ignore[arg-type]
        await began.wait()
        if leaves:
            left.set()
            while not task.cancelling():  # noqa: ASYNC110
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


async def test_the_cleanup_after_a_cancellation_from_outside_is_not_disturbed_by_a_user_who_leaves(seen: Seen) -> None:
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            async with seen.around("request"):
                await asyncio.Event().wait()
        finally:
            left.set()
            for _ in range(10):
                await asyncio.sleep(0)
            seen.append("cleaned up")

    async def send(message: Any) -> None: ...

    task = asyncio.create_task(CancelOnDisconnect(app)({"type": "http"}, receive, send))  # type: ignore[arg-type]
    await seen.until("request began")
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert seen == ["request began", "request cancelled", "cleaned up"]


async def test_after_the_user_has_left_the_task_can_be_used_on() -> None:
    began = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await began.wait()
        return {"type": "http.disconnect"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        await asyncio.Event().wait()

    async def send(message: Any) -> None: ...

    async def whole() -> int:
        await CancelOnDisconnect(app)({"type": "http"}, receive, send)  # type: ignore[arg-type]
        async with asyncio.timeout(SECONDS_OF_A_TEST):
            await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    assert await asyncio.create_task(whole()) == 0


SECONDS_OF_A_TEST = 10.0


async def test_a_server_that_fails_to_receive_fails_the_app_as_without_it() -> None:
    async def receive() -> dict[str, Any]:
        raise OSError("the socket")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def send(message: Any) -> None: ...

    with pytest.raises(OSError, match="the socket"):
        await CancelOnDisconnect(app)({"type": "http"}, receive, send)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
async def test_what_is_no_request_passes_untouched(kind: str) -> None:
    given: list[Any] = []

    async def app(*arguments: Any) -> None:
        given.append(arguments)

    async def receive() -> dict[str, Any]:
        return {}

    async def send(message: Any) -> None: ...

    scope = {"type": kind}
    await CancelOnDisconnect(app)(scope, receive, send)  # type: ignore[arg-type]
    assert given == [(scope, receive, send)]


class Passing(BaseHTTPMiddleware):
    """Does nothing, in the way in which Starlette's helper for middleware does it."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


async def test_a_base_http_middleware_inside_lets_the_cancellation_through(seen: Seen, let_go: asyncio.Event) -> None:
    async def wait(_request: Request) -> Response:
        async with seen.around("request"):
            await let_go.wait()
        return Response()

    async with served(app_of(wait, middleware=[Middleware(Passing)])) as client, browser(client) as user:
        await user.get("/wait")
        await seen.until("request began")
        await user.leave()
        await seen.until("request cancelled")


async def test_errors_of_calls_keep_their_way_to_the_handler_of_the_app(namespace: str) -> None:
    rpc = Rpc(f"memory://{namespace}")

    async def call(_request: Request) -> Response:
        return JSONResponse(await rpc.client.call("nobody.there"))

    from rpcq import CallError

    app = app_of(call, lifespan=rpc.lifespan, exception_handlers={CallError: on_call_error()})
    async with served(app) as client:
        response: httpx.Response = await client.get("/call")
    assert (response.status_code, response.json()["code"]) == (503, "UNAVAILABLE")


async def test_a_base_http_middleware_outside_fails_for_each_user_who_leaves_and_the_handler_ends(
    seen: Seen, let_go: asyncio.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """As the page on web apps says."""

    async def wait(_request: Request) -> Response:
        async with seen.around("request"):
            await let_go.wait()
        return Response()

    routes = [Route("/wait", wait)]
    app = Starlette(routes=routes, middleware=[Middleware(Passing), Middleware(CancelOnDisconnect)])
    async with served(app) as client, browser(client) as user:
        await user.get("/wait")
        await seen.until("request began")
        await user.leave()
        await seen.until("request cancelled")
        await until(lambda: "No response returned." in caplog.text)
