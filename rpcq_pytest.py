"""The pytest plugin. It imports rpcq only when a test uses a fixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rpcq.testing import Running, Worlds


@pytest.fixture
def rpcq_running(_rpcq_place: Any) -> Running:
    """`rpcq.testing.running` in a namespace of this test.

    It uses the broker of `RPCQ_TEST_URL`, or a new one in this process. `RPCQ_URL` and `RPCQ_NAMESPACE` name broker and
    namespace while the test runs: code that opens its own client or worker reaches the same services. It is not an
    async fixture, so it works with any plugin for async tests, or none. Its type is `rpcq.testing.Running`.
    """
    running: Running = _rpcq_place.running
    return running


@pytest.fixture
def rpcq_running_sync(_rpcq_place: Any) -> Callable[..., Any]:
    """`rpcq.testing.running_sync` in a namespace of this test, for code that blocks; otherwise as `rpcq_running`."""
    running: Callable[..., Any] = _rpcq_place.running_sync
    return running


@pytest.fixture
def rpcq_world(_rpcq_place: Any) -> Worlds:
    """`rpcq.testing.world` in a namespace of this test, on a new broker in this process; otherwise as `rpcq_running`.

    Its type is `rpcq.testing.Worlds`.
    """
    world: Worlds = _rpcq_place.world
    return world


@pytest.fixture
def _rpcq_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from rpcq.sync import disconnect_all  # noqa: PLC0415
    from rpcq.testing import Place, memory_url  # noqa: PLC0415

    # The clock of RabbitMQ cannot be moved.
    place = Place(memory_url() if "rpcq_world" in request.fixturenames else None)
    with monkeypatch.context() as patch:
        patch.setenv("RPCQ_URL", place.url)
        patch.delenv("RPCQ_URL_FILE", raising=False)  # only one of both may be set
        patch.setenv("RPCQ_NAMESPACE", place.namespace)
        disconnect_all()  # blocking clients of modules read the environment when they connect
        yield place
    disconnect_all()
