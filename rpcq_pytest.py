"""The pytest plugin. What it needs of rpcq is imported by the first test that uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def rpcq_running(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`rpcq.testing.running`, in a place of this test alone.

    That is the broker of `RPCQ_TEST_URL`, or one in this process. `RPCQ_URL` and `RPCQ_NAMESPACE` name it while the
    test runs, so that code which opens a client or a worker of its own gets there too. It is no async fixture: any
    plugin for async tests will do, or none.
    """
    from rpcq.testing import Place  # noqa: PLC0415

    place = Place()
    monkeypatch.setenv("RPCQ_URL", place.url)
    monkeypatch.setenv("RPCQ_NAMESPACE", place.namespace)
    return place.running
