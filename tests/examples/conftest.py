"""What the tests of the example systems share: a vhost for each file, and a browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

# Before a test imports the services: they open their databases then.
import examples.news.conftest
import examples.shop.conftest  # noqa: F401
from support.broker import Broker, Setup
from support.broker import broker as a_broker
from support.programs import launched


@pytest.fixture(scope="module")
def vhost(broker: Broker) -> Iterator[str]:
    """URL of a vhost that goes away with all its queues: the examples have names of their own for them."""
    url = broker.vhost()
    yield url
    broker.drop_vhost(url)


@pytest.fixture(scope="module")
def own() -> Iterator[Broker]:
    """A broker that is killed."""
    with a_broker(setup=Setup("loopback_users.guest = false\n")) as made:
        yield made


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with launched(chromium) as running:
        yield running
