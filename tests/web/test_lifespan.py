"""A client and a worker that live as long as an app: with a broker, before there is one, and to the end."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request

from rpcq import (
    CallTimeout,
    Client,
    ClosedError,
    ConfigurationError,
    OutcomeUnknown,
    RpcqError,
    Service,
    ServiceUnavailable,
    UsageError,
    Worker,
    contract,
)
from rpcq.observer import Observer
from rpcq.web import Rpc, on_call_error
from support.command import Process, delete_queues
from support.load import until
from support.proxy import Proxy, proxy
from support.webserver import NotStarted, answers, served

SECONDS = 20.0
ROOT = Path(__file__).resolve().parents[2]


@contract("things")
class Things(Protocol):
    async def double(self, x: int) -> int: ...


def things(**options: Any) -> Service:
    service = Service("things", **options)

    @service.method
    async def double(x: int) -> int:
        return 2 * x

    return service


def app_of(rpc: Rpc, lifespan: Any = None) -> FastAPI:
    app = FastAPI(lifespan=lifespan or rpc.lifespan)
    app.add_exception_handler(RpcqError, on_call_error(retry_after=1.5))
    bound = Depends(rpc.api(Things))

    @app.get("/double")
    async def double(x: int, api: Things = bound) -> int:
        return await api.double(x)

    @app.get("/ready")
    async def ready() -> str:
        if not rpc.ready:
            raise HTTPException(503, rpc.why_not_ready)
        return "ready"

    return app


@pytest.fixture
def clean(rabbitmq_url: str, namespace: str) -> Iterator[None]:
    yield
    delete_queues(rabbitmq_url, namespace, ["things"])


@pytest.fixture
async def between(rabbitmq_url: str, clean: None) -> AsyncIterator[Proxy]:
    async with proxy(rabbitmq_url) as made:
        yield made


# A broker that is there.


async def test_an_app_has_a_client_and_serves_beside_it(rabbitmq_url: str, namespace: str, clean: None) -> None:
    rpc = Rpc(rabbitmq_url, services=[things()], namespace=namespace)
    async with served(app_of(rpc)) as client:
        assert (await answers(lambda: client.get("/ready"), 200)).json() == "ready"
        assert (await client.get("/double", params={"x": 21})).json() == 42
    assert rpc.why_not_ready == "the app has not started, or has ended"


async def test_the_same_object_can_be_used_by_one_run_of_the_app_after_another(namespace: str) -> None:
    rpc = Rpc(f"memory://{namespace}", services=[things()])
    app, clients = app_of(rpc), []
    for _ in range(2):
        async with served(app) as client:
            assert (await client.get("/double", params={"x": 1})).json() == 2
            clients.append(rpc.client)
    assert clients[0] is not clients[1]
    assert not any(it.connected for it in clients)


async def test_two_apps_at_once_cannot_share_one(namespace: str) -> None:
    rpc = Rpc(f"memory://{namespace}")
    async with rpc.lifespan():
        with pytest.raises(UsageError, match="give each app its own"):
            async with rpc.lifespan():
                pass
        assert rpc.ready


async def test_proxies_can_be_made_before_there_is_a_client(namespace: str) -> None:
    rpc = Rpc(f"memory://{namespace}", services=[things()], timeout=5)
    bound, depends = rpc.bind(Things, timeout=2.0), rpc.api(Things)
    with pytest.raises(ClosedError, match="not entered"):
        _ = rpc.client
    with pytest.raises(ClosedError, match="not entered"):
        await bound.double(1)
    async with rpc.lifespan():
        assert await bound.double(1) == 2
        assert await (await depends()).double(2) == 4
        assert rpc.client.options.timeout == 5
    with pytest.raises(ClosedError, match="not entered"):
        await bound.double(1)


async def test_the_worker_reaches_the_broker_as_the_client_does_unless_told_otherwise(namespace: str) -> None:
    rpc = Rpc(f"memory://{namespace}", services=[things()], namespace="n", name="me", worker_options={"name": "w"})
    async with rpc.lifespan():
        assert [it.name async for it in rpc.client.workers()] == ["w"]


async def test_observers_are_told_of_the_client_and_of_the_worker(namespace: str) -> None:
    opened: list[object] = []

    class Told(Observer):
        def on_opened(self, owner: object) -> None:
            opened.append(type(owner))

    rpc = Rpc(f"memory://{namespace}", services=[things()], observers=[Told()])
    async with rpc.lifespan():
        assert sorted(it.__name__ for it in opened) == ["Client", "Worker"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "http://localhost/"}, "http"),
        ({"url": "memory://", "timeout": -1}, "timeout"),
        ({"url": "memory://", "grace": -1}, "grace"),
        ({"url": "memory://", "first_wait": "1"}, "first_wait"),
        ({"url": "memory://", "services": [Service("empty")]}, "empty"),
        ({"url": "memory://", "services": [things()], "worker_options": {"prefetch": 0}}, "prefetch"),
    ],
)
def test_what_cannot_be_is_told_when_it_is_made(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Rpc(**options)


async def test_the_environment_is_read_when_the_lifespan_is_entered(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("URL", "NAMESPACE", "PREFETCH", "TIMEOUT"):
        monkeypatch.setenv(f"RPCQ_{name}", "cannot be used")
    rpc = Rpc(services=[things()])
    bound = rpc.bind(Things)
    for name, value in {"URL": "memory://", "NAMESPACE": namespace, "PREFETCH": "7", "TIMEOUT": "3"}.items():
        monkeypatch.setenv(f"RPCQ_{name}", value)
    async with rpc.lifespan():
        assert (rpc.client.options.namespace, rpc.client.options.timeout) == (namespace, 3)
        assert [it.prefetch async for it in rpc.client.workers()] == [7]
        assert await bound.double(1) == 2
        assert await rpc.bind(Things).double(2) == 4
    monkeypatch.setenv("RPCQ_NAMESPACE", f"{namespace}-next")
    async with rpc.lifespan():
        assert rpc.client.options.namespace == f"{namespace}-next"
        assert await bound.double(1) == 2


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("URL", "", "set RPCQ_URL"),
        ("URL", "http://localhost/", "http"),
        ("TIMEOUT", "-1", "RPCQ_TIMEOUT"),
        ("PREFETCH", "many", "RPCQ_PREFETCH"),
    ],
)
async def test_an_environment_that_cannot_be_used_fails_the_start_and_not_the_import(
    variable: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RPCQ_URL", "memory://")
    monkeypatch.setenv(f"RPCQ_{variable}", value)
    rpc = Rpc(services=[things()])
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=says):
            async with rpc.lifespan():
                pass
        assert rpc.why_not_ready == "the app has not started, or has ended"


async def test_an_environment_that_changes_while_the_broker_is_away_changes_nothing(
    between: Proxy, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RPCQ_URL", between.url)
    monkeypatch.setenv("RPCQ_NAMESPACE", namespace)
    between.refuse()
    rpc = Rpc(services=[things()], first_wait=0.0)
    async with rpc.lifespan():
        monkeypatch.setenv("RPCQ_URL", "amqp://127.0.0.1:1/")
        monkeypatch.setenv("RPCQ_NAMESPACE", "another")
        between.allow()
        await until(lambda: rpc.ready)
        assert rpc.client.options.namespace == namespace
        assert await rpc.bind(Things).double(1) == 2


async def test_a_proxy_that_was_made_at_import_has_the_timeout_of_the_client_unless_it_has_its_own(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rpc = Rpc(f"memory://{namespace}", services=[waiting(asyncio.Event(), asyncio.Event())])
    bound, own = rpc.bind(Waiting), rpc.bind(Waiting, timeout=1000)
    monkeypatch.setenv("RPCQ_TIMEOUT", "0.05")
    async with rpc.lifespan():
        waits = asyncio.create_task(own.wait())
        for _ in range(3):
            with pytest.raises(CallTimeout):
                await asyncio.wait_for(bound.wait(), SECONDS)
        assert not waits.done()
        waits.cancel()


# A broker that is not.


async def test_an_app_starts_before_its_broker_and_is_ready_once_that_has_come(between: Proxy, namespace: str) -> None:
    between.refuse()
    rpc = Rpc(between.url, services=[things()], namespace=namespace, first_wait=0.1)
    async with served(app_of(rpc)) as client:
        not_ready = await client.get("/ready")
        assert not_ready.status_code == 503
        assert "has not reached the broker yet" in not_ready.json()["detail"]
        refused = await client.get("/double", params={"x": 1})
        assert refused.status_code == 503
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.headers["retry-after"] == "2"
        assert (refused.json()["executed"], refused.json()["retryable"]) == ("no", True)
        assert "127.0.0.1" not in refused.text
        await until(lambda: "127.0.0.1" in (rpc.why_not_ready or ""))
        with pytest.raises(ServiceUnavailable, match=r"has not reached the broker yet: .*127\.0\.0\.1") as caught:
            _ = rpc.client
        assert caught.value.executed == "no"
        between.allow()
        await answers(lambda: client.get("/ready"), 200)
        assert (await client.get("/double", params={"x": 1})).json() == 2


async def test_an_app_is_not_ready_while_its_connections_are_down(between: Proxy, namespace: str) -> None:
    rpc = Rpc(between.url, namespace=namespace)
    async with served(app_of(rpc)) as client:
        await answers(lambda: client.get("/ready"), 200)
        between.refuse()
        between.reset()
        response = await answers(lambda: client.get("/ready"), 503)
        assert response.json()["detail"] == "the client is not connected to the broker"
        between.allow()
        await answers(lambda: client.get("/ready"), 200)


async def test_a_wrong_password_is_told_loudly_and_the_app_starts_all_the_same(
    rabbitmq_url: str, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    parts = urlsplit(rabbitmq_url)
    url = urlunsplit(parts._replace(netloc=f"nobody:s3cr3t@{parts.hostname}:{parts.port}"))
    rpc = Rpc(url, namespace=namespace, first_wait=0.1)
    async with served(app_of(rpc)) as client:
        await until(lambda: [it for it in caplog.records if it.name == "rpcq.web" and it.levelno == logging.ERROR])
        response = await client.get("/ready")
        assert response.status_code == 503
        assert "s3cr3t" not in response.text + caplog.text


async def test_an_app_whose_broker_never_came_ends_all_the_same(between: Proxy, namespace: str) -> None:
    between.freeze()  # it accepts connections, and says nothing
    rpc = Rpc(between.url, services=[things()], namespace=namespace, first_wait=0.0)
    async with served(app_of(rpc)) as client:
        assert (await client.get("/ready")).status_code == 503
        await until(lambda: len(between) >= 2)
    between.thaw()
    await until(lambda: not len(between))


# What no attempt mends.


async def test_a_mistake_that_no_attempt_mends_fails_the_start_of_the_app(
    namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    @asynccontextmanager
    async def wrong() -> AsyncIterator[None]:
        raise ValueError("no such table")
        yield

    rpc = Rpc(f"memory://{namespace}", services=[things(lifespan=wrong)])
    with pytest.raises(NotStarted):
        async with served(app_of(rpc)):
            pass
    assert "no such table" in caplog.text
    assert rpc.why_not_ready == "the app has not started, or has ended"


LATE = """
import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from fastapi import FastAPI
from rpcq import Service
from rpcq.web import Rpc

@asynccontextmanager
async def slow():
    while not Path("go").exists():
        await asyncio.sleep(0.01)
    raise ValueError("no such table")
    yield

service = Service("things", lifespan=slow)

@service.method
async def double(x: int) -> int:
    return 2 * x

rpc = Rpc("memory://", services=[service], first_wait=0.01)
app = FastAPI(lifespan=rpc.lifespan)
"""


@pytest.fixture
def uvicorn(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start uvicorn as a user does, with a module `app`; it serves."""
    with ExitStack() as stack:

        def start(code: str, **environment: str) -> Process:
            (tmp_path / "app.py").write_text(code)
            command = [sys.executable, "-m", "uvicorn", "app:app", "--port", "0", "--no-access-log"]
            paths = {"PATH": "", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
            process = stack.enter_context(Process(command, tmp_path, {**paths, **environment}))
            process.wait_for(lambda: port_of(process))
            return process

        yield start


def port_of(process: Process) -> str | None:
    return next((line.split(" (")[0].rpartition(":")[2] for line in process.lines if "running on" in line), None)


def test_a_mistake_that_shows_late_ends_the_app(uvicorn: Callable[..., Process], tmp_path: Path) -> None:
    process = uvicorn(LATE)
    (tmp_path / "go").touch()
    assert process.ended() != 0
    said = "\n".join(process.lines)
    assert "the client or the worker of the app cannot be opened; the app has to stop" in said
    assert "ValueError: no such table" in said
    assert "Application shutdown failed" in said


# The end.

DRAINING = """
import asyncio
from pathlib import Path
from fastapi import FastAPI
from rpcq import Service
from rpcq.web import Rpc

service = Service("things")

@service.method
async def wait() -> str:
    Path("began").touch()
    while not Path("go").exists():
        await asyncio.sleep(0.01)
    return "done"

rpc = Rpc(services=[service])
app = FastAPI(lifespan=rpc.lifespan)

@app.get("/wait")
async def wait() -> str:
    return await rpc.client.call("things.wait")
"""


async def test_an_app_that_is_told_to_stop_answers_what_it_has_begun(
    uvicorn: Callable[..., Process], tmp_path: Path, rabbitmq_url: str, namespace: str, clean: None
) -> None:
    process = await asyncio.to_thread(uvicorn, DRAINING, RPCQ_URL=rabbitmq_url, RPCQ_NAMESPACE=namespace)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port_of(process)}", timeout=SECONDS) as client:
        asked = asyncio.create_task(client.get("/wait"))
        await until((tmp_path / "began").exists)
        process.signal(signal.SIGTERM)
        await until(lambda: any("Waiting for connections to close" in line for line in process.lines))
        (tmp_path / "go").touch()
        assert (await asked).json() == "done"
    await asyncio.to_thread(process.ended)
    assert any("Application shutdown complete" in line for line in process.lines), process.lines
    assert not any("Traceback" in line for line in process.lines)


@contract("elsewhere")
class Elsewhere(Protocol):
    async def double(self, x: int) -> int: ...


async def test_at_the_end_the_worker_stops_first_and_its_handlers_may_still_call(namespace: str) -> None:
    url, began, said = f"memory://{namespace}", asyncio.Event(), []
    service, elsewhere = things(), Service("elsewhere")
    rpc = Rpc(url, services=[service])

    @service.method
    async def wait_and_call() -> int:
        began.set()
        while rpc.ready:  # noqa: ASYNC110 - what it looks at tells nobody
            await asyncio.sleep(0.01)
        said.append(rpc.why_not_ready)
        return await rpc.bind(Elsewhere).double(4)

    @elsewhere.method
    async def double(x: int) -> int:
        return 2 * x

    async with Worker(elsewhere, url=url), Client(url) as client:
        async with rpc.lifespan():
            asked = asyncio.create_task(client.call("things.wait_and_call"))
            await began.wait()
        assert await asked == 8
    assert said == ["the app shuts down"]


def waiting(began: asyncio.Event, let_go: asyncio.Event) -> Service:
    service = Service("waiting")

    @service.method
    async def wait() -> str:
        began.set()
        await let_go.wait()
        return "done"

    return service


async def test_calls_under_way_have_the_grace_time_to_end(namespace: str) -> None:
    url, began, let_go = f"memory://{namespace}", asyncio.Event(), asyncio.Event()
    rpc = Rpc(url, grace=1000)

    async def end() -> None:
        await until(lambda: not rpc.ready)
        let_go.set()

    async with Worker(waiting(began, let_go), url=url):
        async with rpc.lifespan():
            call = asyncio.create_task(rpc.client.call("waiting.wait"))
            await began.wait()
            ending = asyncio.create_task(end())
        assert await call == "done"
        await ending


async def test_calls_that_take_longer_than_the_grace_time_have_an_unknown_outcome(namespace: str) -> None:
    url, began = f"memory://{namespace}", asyncio.Event()
    rpc = Rpc(url, grace=0.05)
    async with Worker(waiting(began, asyncio.Event()), url=url, grace=0.1):
        async with rpc.lifespan():
            call = asyncio.create_task(rpc.client.call("waiting.wait"))
            await began.wait()
        with pytest.raises(OutcomeUnknown):
            await call


async def test_cancelling_the_end_lets_calls_end_at_once_and_closes_all(namespace: str) -> None:
    url, began = f"memory://{namespace}", asyncio.Event()
    rpc = Rpc(url, services=[things()], grace=1000)
    opened: list[Client] = []
    calls: list[asyncio.Task[Any]] = []

    async def run() -> None:
        async with rpc.lifespan():
            opened.append(rpc.client)
            calls.append(asyncio.create_task(rpc.client.call("waiting.wait")))
            await began.wait()

    async with Worker(waiting(began, asyncio.Event()), url=url, grace=0.1):
        task = asyncio.create_task(run())
        await until(lambda: began.is_set() and rpc.why_not_ready == "the app shuts down")
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert not opened[0].connected
        with pytest.raises(OutcomeUnknown):
            await calls[0]
    with pytest.raises(ClosedError):
        _ = rpc.client


@pytest.mark.parametrize("first_wait", [0.0, 1000.0])
async def test_cancelling_an_app_that_waits_for_its_broker_leaves_nothing_open(
    between: Proxy, namespace: str, first_wait: float
) -> None:
    between.freeze()
    rpc = Rpc(between.url, services=[things()], namespace=namespace, first_wait=first_wait)

    async def run() -> None:
        async with rpc.lifespan():
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await until(lambda: len(between) >= 2)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    between.thaw()
    await until(lambda: not len(between))


# An app with a lifespan of its own.


async def test_an_apps_own_lifespan_is_entered_first_and_left_last_and_keeps_its_state(namespace: str) -> None:
    order: list[str] = []

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        order.append("own in")
        yield {"made": "by the app"}
        order.append("own out")

    @asynccontextmanager
    async def of_the_service() -> AsyncIterator[None]:
        order.append("service in")
        yield
        order.append("service out")

    rpc = Rpc(f"memory://{namespace}", services=[things(lifespan=of_the_service)])
    app = app_of(rpc, rpc.around(own))

    @app.get("/made")
    async def made(request: Request) -> str:
        return request.state.made

    async with served(app) as client:
        assert (await client.get("/made")).json() == "by the app"
        assert (await client.get("/double", params={"x": 1})).json() == 2
        order.append("served")
    assert order == ["own in", "service in", "served", "service out", "own out"]


async def test_an_error_inside_passes_through_both_lifespans(namespace: str) -> None:
    seen: list[BaseException] = []

    @asynccontextmanager
    async def own(_app: None) -> AsyncIterator[None]:
        try:
            yield
        except ValueError as error:
            seen.append(error)
            raise

    rpc = Rpc(f"memory://{namespace}")
    with pytest.raises(ValueError, match="inside"):
        async with rpc.around(own)(None):
            raise ValueError("inside")
    assert [str(it) for it in seen] == ["inside"]
    assert not rpc.ready


async def test_a_proxys_own_timeout_counts(namespace: str) -> None:
    rpc = Rpc(f"memory://{namespace}", services=[waiting(asyncio.Event(), asyncio.Event())])
    async with rpc.lifespan():
        with pytest.raises(CallTimeout):
            await rpc.bind(Waiting, timeout=0.05).wait()


@contract("waiting")
class Waiting(Protocol):
    async def wait(self) -> str: ...
