"""A database with the tables of outbox and inbox, with each driver; the in-process broker, or RabbitMQ."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rpcq import Service
from rpcq.outbox import Outbox
from support.jobs import Done
from support.places import Place, cut_memory
from support.stores import DRIVERS, Store, url_of

QUICK = ("asyncpg", "sqlite3")
"""One of each database, and of each kind of driver; the others run with `make test-faults`."""


@pytest.fixture(params=[pytest.param(it, marks=() if it in QUICK else pytest.mark.long) for it in DRIVERS])
def driver(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def store(request: pytest.FixtureRequest, driver: str, tmp_path: Path) -> AsyncIterator[Store]:
    found = Store(driver, url_of(driver, tmp_path, lambda: request.getfixturevalue("database_url")))
    yield found
    await found.close()


@pytest.fixture
def home(namespace: str) -> Place:
    return Place(f"memory://{namespace}", namespace, "quorum", cut_memory)


@pytest.fixture
def outbox(store: Store, home: Place) -> Outbox:
    return Outbox(store.engine, home.url, namespace=home.namespace)


@pytest.fixture
def service() -> Service:
    return Service(f"s{secrets.token_hex(6)}")


@pytest.fixture
async def done() -> Done:
    return Done()
