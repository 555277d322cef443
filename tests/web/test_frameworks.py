"""The example apps, each under the server that its users run it with."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from consumer_service.calculator import calculator
from consumer_service.contracts import EchoApi
from rpcq import Service, Worker
from support.command import Process, delete_queues
from support.load import until
from support.webserver import answers, browser

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20.0


class Echo:
    """The service of the examples, which tells what becomes of its handler."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.service = Service("echo")
        self.service.method(self.process)

    async def process(self, message: str, delay: float = 0.0) -> str:
        self.seen.append("began")
        try:
            await asyncio.sleep(delay)
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise
        return f"Consumer processed: {message}"


@pytest.fixture
def clean(rabbitmq_url: str, namespace: str) -> Iterator[None]:
    yield
    delete_queues(rabbitmq_url, namespace, ["echo", "calculator"])


@pytest.fixture
async def echo(rabbitmq_url: str, namespace: str, clean: None) -> AsyncIterator[Echo]:
    made = Echo()
    async with Worker(made.service, calculator, url=rabbitmq_url, namespace=namespace):
        yield made


@asynccontextmanager
async def under_uvicorn(name: str, url: str, namespace: str) -> AsyncIterator[httpx.AsyncClient]:
    outer = {name: value for name, value in os.environ.items() if not name.startswith("RPCQ_")}
    command = [sys.executable, "-m", "uvicorn", f"examples.{name}:app", "--port", "0", "--no-access-log"]
    with Process(command, ROOT, {**outer, "RPCQ_URL": url, "RPCQ_NAMESPACE": namespace}) as process:
        await asyncio.to_thread(process.wait_for, lambda: any("running on" in line for line in process.lines))
        said = next(line for line in process.lines if "running on" in line)
        base = said.split("running on ")[1].split(" ")[0]
        async with httpx.AsyncClient(base_url=base, timeout=SECONDS) as client:
            yield client
        process.signal(signal.SIGTERM)
        await asyncio.to_thread(process.ended)
        assert any("Application shutdown complete" in line for line in process.lines), process.lines
        assert not any("Traceback" in line for line in process.lines), process.lines


@asynccontextmanager
async def under_aiohttp(url: str, namespace: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    monkeypatch.setenv("RPCQ_URL", url)
    monkeypatch.setenv("RPCQ_NAMESPACE", namespace)
    sys.modules.pop("examples.aiohttp_app", None)
    app = importlib.import_module("examples.aiohttp_app").app
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
            yield client
    finally:
        await runner.cleanup()


@pytest.fixture(params=["fastapi_app", "starlette_app", "aiohttp_app"])
async def client(
    request: pytest.FixtureRequest, rabbitmq_url: str, namespace: str, clean: None, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an example app."""
    if request.param == "aiohttp_app":
        app = under_aiohttp(rabbitmq_url, namespace, monkeypatch)
    else:
        app = under_uvicorn(request.param, rabbitmq_url, namespace)
    async with app as made:
        await answers(lambda: made.get("/health/ready"), 200)
        yield made


async def test_an_example_calls_its_services(client: httpx.AsyncClient, echo: Echo) -> None:
    added = await client.get("/add", params={"x": 2**60, "y": 1})
    assert (added.status_code, added.json()) == (200, 2**60 + 1)
    divided = await client.get("/divide", params={"x": "1", "y": "8"})
    assert divided.json() == "0.125"
    told = await client.get("/echo", params={"message": "hello"})
    assert told.json() == "Consumer processed: hello"


async def test_an_example_answers_errors_with_problem_documents(client: httpx.AsyncClient, echo: Echo) -> None:
    refused = await client.get("/divide", params={"x": "1", "y": "0"})
    assert refused.status_code == 422
    assert refused.headers["content-type"] == "application/problem+json"
    document = refused.json()
    assert document["type"] == "urn:rpcq:domain:division_by_zero"
    assert document["details"] == {"x": "1"}


async def test_an_example_without_its_services_says_when_to_come_again(client: httpx.AsyncClient) -> None:
    response = await client.get("/echo", params={"message": "hello"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["retryable"] is True


async def test_a_user_who_leaves_an_example_cancels_the_handler_at_the_worker(
    client: httpx.AsyncClient, echo: Echo
) -> None:
    async with browser(client) as user:
        await user.get("/echo?message=slow&delay=60")
        await until(lambda: echo.seen == ["began"])
        await user.leave()
        await until(lambda: echo.seen == ["began", "cancelled"])
    assert (await client.get("/echo", params={"message": "next"})).status_code == 200


def test_importing_the_package_loads_no_web_framework() -> None:
    code = "import sys, rpcq.web; print(*{it.partition('.')[0] for it in sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=SECONDS)
    loaded = set(ran.stdout.split())
    assert "rpcq" in loaded
    assert not loaded & {"starlette", "fastapi", "uvicorn", "aiohttp", "anyio", "httpx"}


def test_the_contract_of_the_examples_has_what_this_test_serves() -> None:
    methods: dict[str, Any] = {name: it for name, it in vars(EchoApi).items() if not name.startswith("_")}
    assert methods.keys() == Echo().service.methods.keys()
