"""The broker's URL: as given, or from the environment."""

from __future__ import annotations

import pytest

from rpcq.environment import broker_url
from rpcq.errors import ConfigurationError


def test_a_url_that_is_given_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPCQ_URL", "amqp://elsewhere/")
    assert broker_url("memory://") == "memory://"


@pytest.mark.parametrize("url", [None, ""])
def test_without_a_url_the_environment_says_it(url: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPCQ_URL", "amqp://elsewhere/")
    assert broker_url(url) == "amqp://elsewhere/"


@pytest.mark.parametrize("value", [None, ""])
def test_with_neither_the_error_says_what_to_do(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RPCQ_URL", raising=False)
    if value is not None:
        monkeypatch.setenv("RPCQ_URL", value)
    with pytest.raises(ConfigurationError, match="set RPCQ_URL"):
        broker_url(None)
