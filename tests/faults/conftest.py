"""Where the faults strike: real worker processes on a real RabbitMQ, on both kinds of request queue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.load import Scene


# Both kinds with `make test-faults`; on a quorum queue all takes longer, and `make test` has its time.
@pytest.fixture(params=["classic", pytest.param("quorum", marks=pytest.mark.long)])
def queue_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def scene(rabbitmq_url: str, namespace: str, queue_type: str, tmp_path: Path) -> AsyncIterator[Scene]:
    async with Scene(rabbitmq_url, namespace, queue_type, tmp_path) as made:
        yield made
