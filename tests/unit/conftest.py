"""The `rpcq` command, for the tests of its commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.command import SERVICES, Rpcq, delete_queues


@pytest.fixture
def rpcq(rabbitmq_url: str, namespace: str, tmp_path: Path) -> Iterator[Rpcq]:
    (tmp_path / "services.py").write_text(SERVICES)
    found = Rpcq(rabbitmq_url, namespace, tmp_path)
    yield found
    for process in found.processes:
        process.kill()
    delete_queues(rabbitmq_url, namespace)
