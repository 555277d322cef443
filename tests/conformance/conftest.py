"""Where the suite runs: both transports, and both kinds of request queue."""

from __future__ import annotations

import pytest

from places import Place, cut_memory, cut_rabbitmq


@pytest.fixture(params=["memory-classic", "memory-quorum", "rabbitmq-classic", "rabbitmq-quorum"])
def place(request: pytest.FixtureRequest, namespace: str) -> Place:
    transport, _, queue_type = request.param.partition("-")
    if transport == "memory":
        return Place(f"memory://{namespace}", namespace, queue_type, cut_memory)
    url = request.getfixturevalue("rabbitmq_url")
    return Place(url, namespace, queue_type, cut_rabbitmq(request.getfixturevalue("broker"), url))
