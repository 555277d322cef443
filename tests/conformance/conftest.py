"""Where the suite runs: both transports, and both kinds of request queue.

A module that sets `QUEUE_TYPE_MATTERS = False` runs on one kind for each transport in `make test`, and on the others in
`make test-faults`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aio_pika
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rpcq import Service, logs
from support.jobs import Done
from support.observed import Scraped, Spans
from support.places import Place, cut_memory, cut_rabbitmq
from support.seam import Seam

SHARED = f"t{secrets.token_hex(8)}"
"""The namespace of all tests of jobs on RabbitMQ: each has a ladder of 24 queues."""

PLACES = ["memory-classic", "memory-quorum", "rabbitmq-classic", "rabbitmq-quorum"]
ONE_OF_EACH = ["memory-classic", "rabbitmq-quorum"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "place" not in metafunc.fixturenames:
        return
    quick = PLACES if getattr(metafunc.module, "QUEUE_TYPE_MATTERS", True) else ONE_OF_EACH
    places = [pytest.param(it, marks=() if it in quick else pytest.mark.long) for it in PLACES]
    metafunc.parametrize("place", places, indirect=True)


@pytest.fixture
def place(request: pytest.FixtureRequest, namespace: str) -> Place:
    transport, _, queue_type = request.param.partition("-")
    if transport == "memory":
        return Place(f"memory://{namespace}", namespace, queue_type, cut_memory)
    url = request.getfixturevalue("rabbitmq_url")
    return Place(url, namespace, queue_type, cut_rabbitmq(request.getfixturevalue("broker"), url))


@pytest.fixture(params=["memory", "rabbitmq"])
def seam_url(request: pytest.FixtureRequest, namespace: str) -> str:
    return f"memory://{namespace}" if request.param == "memory" else request.getfixturevalue("rabbitmq_url")


@pytest.fixture
async def seam(seam_url: str, namespace: str) -> AsyncIterator[Seam]:
    """Transports of both kinds; no test may leave a task behind."""
    before = asyncio.all_tasks()
    found = Seam(seam_url, namespace)
    yield found
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left
    if not found.in_memory:
        async with await aio_pika.connect(seam_url) as connection:
            channel = await connection.channel()
            await channel.exchange_delete(found.requests.name)
            for queue in found.lasting:
                await channel.queue_delete(queue)


# For tests of jobs.


@pytest.fixture(params=["memory", "rabbitmq"])
def home(request: pytest.FixtureRequest, namespace: str) -> Place:
    if request.param == "memory":
        return Place(f"memory://{namespace}", namespace, "quorum", cut_memory)
    url = request.getfixturevalue("rabbitmq_url")
    return Place(url, SHARED, "quorum", cut_rabbitmq(request.getfixturevalue("broker"), url))


@pytest.fixture
def service() -> Service:
    return Service(f"s{secrets.token_hex(6)}")


@pytest.fixture
async def done() -> Done:
    return Done()


@pytest.fixture
def scraped() -> Scraped:
    return Scraped()


@pytest.fixture
def spans() -> Iterator[Spans]:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider, exporter
    provider.shutdown()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What a program of rpcq's own writes."""
    root = logging.getLogger()
    before, level, written = root.handlers[:], root.level, []

    class Err:
        def write(self, text: str) -> None:
            written.append(text)

        def flush(self) -> None:
            """Written already."""

        def isatty(self) -> bool:
            return False

    with monkeypatch.context() as patched:
        patched.setattr("sys.stderr", Err())
        logs.configure()
    yield lambda: [json.loads(line) for line in "".join(written).splitlines()]
    root.handlers[:] = before
    root.setLevel(level)
