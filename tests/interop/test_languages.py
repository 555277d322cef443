"""RabbitMQ's RPC tutorial in eight languages: their servers and clients with rpcq's, and a service that takes over.

Each program of `programs/` runs as a process of its own against the real broker. A language that is not installed is
skipped, and says so; CI has them all (RPCQ_TEST_FOREIGN).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rpcq import Client, Service, Worker
from support.foreign import INSTALLING, PROGRAMS, RUNTIMES, run, serving, unavailable
from support.harness import Unavailable, to_stderr

pytestmark = pytest.mark.timeout(INSTALLING + 60)  # the first test of a language may have to install it


@dataclass(frozen=True)
class Language:
    """The commands of a client and of a server; both take the URL and the queue, the client also numbers."""

    client: list[str | Path]
    server: list[str | Path]


@pytest.fixture(scope="session", params=["Python", "Node", *(runtime.name for runtime in RUNTIMES)])
def language(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Language:
    if request.param == "Python":
        return Language([sys.executable, PROGRAMS / "pika_client.py"], [sys.executable, PROGRAMS / "pika_server.py"])
    if request.param == "Node":
        folder = request.getfixturevalue("node_folder")
        return Language(["node", folder / "node_client.js"], ["node", folder / "foreign.js", "server"])
    runtime = next(it for it in RUNTIMES if it.name == request.param)
    try:
        command = runtime.prepare(tmp_path_factory.mktemp(runtime.name), to_stderr)
    except Unavailable as error:
        unavailable(str(error))
    return Language([*command, "client"], [*command, "server"])


@pytest.fixture
def full_url(rabbitmq_url: str) -> str:
    """The broker's URL with its vhost by name: clients disagree on what `/` alone means."""
    return f"{rabbitmq_url}%2F" if urlsplit(rabbitmq_url).path == "/" else rabbitmq_url


def fibonacci(n: int) -> int:
    before, last = 0, 1
    for _ in range(n):
        before, last = last, before + last
    return before


def fib_service(queue: str, *, declare_queue: bool) -> tuple[Service, list[int]]:
    service, ran = Service("fib", queue=queue, declare_queue=declare_queue), []

    @service.method
    async def fib(n: int) -> int:
        ran.append(n)
        return fibonacci(n)

    return service, ran


async def test_a_service_takes_over_the_queue_of_a_tutorial_server(
    rabbitmq_url: str, full_url: str, namespace: str, own_queue: str, language: Language
) -> None:
    service, ran = fib_service(own_queue, declare_queue=False)
    async with Client(rabbitmq_url, namespace=namespace, timeout=20.0) as client:
        old = client.with_options(queue=own_queue, idempotent=True, metadata={"x-tenant": "ada"})
        async with serving(*language.server, full_url, own_queue) as server:
            assert await old.call("fib", 30) == 832040
            assert (await server.next_line())["body"] == "30"
            assert await old.with_options(returns=int).call("fib", 7) == 13
        async with Worker(service, url=rabbitmq_url, namespace=namespace):
            printed = await run(*language.client, full_url, own_queue, "30", "0", "7")
            assert await old.call("fib", 8) == 21
    assert printed == [
        {"sent": "30", "reply": "832040"},
        {"sent": "0", "reply": "0"},
        {"sent": "7", "reply": "13"},
    ]
    assert ran == [30, 0, 7, 8]


async def test_a_tutorial_client_reads_results_and_errors_of_a_service_with_a_queue_of_its_own(
    rabbitmq_url: str, full_url: str, namespace: str, own_queue: str, language: Language
) -> None:
    service, ran = fib_service(own_queue, declare_queue=True)
    async with Worker(service, url=rabbitmq_url, namespace=namespace):
        good, bad, again = await run(*language.client, full_url, own_queue, "90", "thirty", "1")
    assert (good["reply"], again["reply"]) == ("2880067194370816120", "1")
    said = json.loads(bad["reply"])
    assert (said["code"], said["executed"]) == ("INVALID_ARGUMENT", "no")
    assert ran == [90, 1]
