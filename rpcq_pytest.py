"""The pytest plugin. It imports rpcq only when a test uses the fixture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rpcq.testing import Running


@pytest.fixture
def rpcq_running(monkeypatch: pytest.MonkeyPatch) -> Running:
    """`rpcq.testing.running` in a namespace of this test.

    It uses the broker of `RPCQ_TEST_URL`, or a new one in this process. `RPCQ_URL` and `RPCQ_NAMESPACE` name broker and
    namespace while the test runs: code that opens its own client or worker reaches the same services. It is not an
    async fixture, so it works with any plugin for async tests, or none. Its type is `rpcq.testing.Running`.
    """
    from rpcq.testing import Place  # noqa: PLC0415

    place = Place()
    monkeypatch.setenv("RPCQ_URL", place.url)
    monkeypatch.delenv("RPCQ_URL_FILE", raising=False)  # only one of both may be set
    monkeypatch.setenv("RPCQ_NAMESPACE", place.namespace)
    return place.running
