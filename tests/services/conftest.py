"""What the tests of the example services share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.command import delete_queues


@pytest.fixture
def url(rabbitmq_url: str, namespace: str) -> Iterator[str]:
    """The broker's; what the services declare there is taken away."""
    yield rabbitmq_url
    delete_queues(rabbitmq_url, namespace, ("echo", "calculator"))
