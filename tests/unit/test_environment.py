"""Settings: as given, or from the environment, or the defaults."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from rpcq import Client, Service, Worker
from rpcq.environment import broker_url, options_from, settings, url_from_environment, variable
from rpcq.errors import ConfigurationError
from rpcq.options import ClientOptions, WorkerOptions


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in settings():
        monkeypatch.delenv(setting.variable, raising=False)


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


@pytest.mark.parametrize("text", ["amqp://me:s3cr3t@there/", " \n amqp://me:s3cr3t@there/\r\n\n"])
def test_a_file_may_contain_the_url(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "url").write_text(text)
    monkeypatch.setenv("RPCQ_URL_FILE", str(tmp_path / "url"))
    assert broker_url(None) == url_from_environment() == "amqp://me:s3cr3t@there/"
    assert broker_url("memory://") == "memory://"
    (tmp_path / "url").write_text("memory://changed")
    assert broker_url(None) == "memory://changed"
    assert Client(namespace="a").options == ClientOptions(namespace="a")


def test_only_one_of_both_variables_may_be_set_and_an_empty_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "url").write_text("amqp://in-the-file/")
    monkeypatch.setenv("RPCQ_URL_FILE", str(tmp_path / "url"))
    monkeypatch.setenv("RPCQ_URL", "amqp://elsewhere/")
    with pytest.raises(ConfigurationError, match="only one of RPCQ_URL and RPCQ_URL_FILE may be set: unset the other"):
        broker_url(None)
    assert broker_url("memory://") == "memory://"  # an argument beats both
    monkeypatch.setenv("RPCQ_URL", "")
    assert broker_url(None) == "amqp://in-the-file/"
    monkeypatch.setenv("RPCQ_URL_FILE", "")
    assert url_from_environment() is None


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "must name a file that can be read; got '.*url': No such file or directory"),
        (b"", "must name a file with one line, the broker's URL; got '.*url', with 0 lines"),
        (b" \n", "with 0 lines"),
        (b"user = me\npassword = s3cr3t\n", "with 2 lines"),
        (b"amqp://me:s3cr3t\xff@there/", "must name a file of text in UTF-8; got '.*url'"),
    ],
)
def test_a_file_that_has_no_url_is_named_and_its_text_is_not_shown(
    content: bytes | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "url").write_bytes(content)
    monkeypatch.setenv("RPCQ_URL_FILE", str(tmp_path / "url"))
    with pytest.raises(ConfigurationError, match=f"RPCQ_URL_FILE .*{why}") as caught:
        broker_url(None)
    assert "s3cr3t" not in str(caught.value)


SET = {
    "RPCQ_NAME": ("staging-web", "staging-web"),
    "RPCQ_NAMESPACE": ("staging", "staging"),
    "RPCQ_HEARTBEAT": ("20", 20.0),
    "RPCQ_CONNECT_TIMEOUT": ("2.5", 2.5),
    "RPCQ_MAX_BODY": ("2048", 2048),
    "RPCQ_REPLY_EXCHANGE": ("staging.replies", "staging.replies"),
    "RPCQ_TIMEOUT": ("0.5", 0.5),
    "RPCQ_MAX_IN_FLIGHT": ("10", 10),
    "RPCQ_IDENTIFY": ("true", True),
    "RPCQ_DISCONNECTED_TIMEOUT": ("90", 90.0),
    "RPCQ_UNHEARD_KEPT": ("true", True),
    "RPCQ_BATCHING": ("false", False),
    "RPCQ_PREFETCH": ("7", 7),
    "RPCQ_GRACE": ("1", 1.0),
    "RPCQ_REPLY_TO": ("orders\\..*  audit", ("orders\\..*", "audit")),
    "RPCQ_REMEMBER": ("0", 0),
    "RPCQ_BLOCKED_AFTER": ("0.25", 0.25),
    "RPCQ_JOB_PREFETCH": ("3", 3),
}


@pytest.mark.parametrize("kind", [ClientOptions, WorkerOptions])
def test_every_option_has_a_variable(
    kind: type[ClientOptions | WorkerOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {variable(it.name) for it in fields(kind)} <= SET.keys()
    for name, (text, _) in SET.items():
        monkeypatch.setenv(name, text)
    found = options_from(kind, {})
    for it in fields(kind):
        assert getattr(found, it.name) == SET[variable(it.name)][1], it.name


@pytest.mark.parametrize("kind", [ClientOptions, WorkerOptions])
def test_without_variables_the_defaults_count_and_an_empty_variable_is_none(
    kind: type[ClientOptions | WorkerOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert options_from(kind, {}) == kind()
    for name in SET:
        monkeypatch.setenv(name, "")
    assert options_from(kind, {}) == kind()


def test_an_argument_beats_its_variable_even_one_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPCQ_PREFETCH", "many")
    monkeypatch.setenv("RPCQ_GRACE", "3")
    assert options_from(WorkerOptions, {"prefetch": 5}) == WorkerOptions(prefetch=5, grace=3.0)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("RPCQ_PREFETCH", "many", "RPCQ_PREFETCH must be a whole number; got 'many'"),
        ("RPCQ_PREFETCH", "0", "RPCQ_PREFETCH: prefetch must be a whole number from 1 to 65535; got 0"),
        ("RPCQ_NAMESPACE", "a b", "RPCQ_NAMESPACE: namespace must be .*; got 'a b'"),
        ("RPCQ_HEARTBEAT", "-1", "RPCQ_HEARTBEAT: heartbeat must be .*; got -1.0"),
        ("RPCQ_REPLY_TO", "(", r"RPCQ_REPLY_TO: reply_to must be regular expressions; got '\('"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(
    name: str, text: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigurationError, match=why):
        options_from(WorkerOptions, {})


def test_clients_and_workers_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPCQ_NAMESPACE", "staging")
    monkeypatch.setenv("RPCQ_PREFETCH", "7")
    monkeypatch.setenv("RPCQ_TIMEOUT", "0.5")
    service = Service("things")
    service.method(_work)
    assert Worker(service, url="memory://").options == WorkerOptions(namespace="staging", prefetch=7)
    assert Client("memory://").options == ClientOptions(namespace="staging", timeout=0.5)
    assert Client("memory://", namespace="other").options == ClientOptions(namespace="other", timeout=0.5)


async def _work() -> None: ...


def test_each_option_is_one_setting() -> None:
    found = settings()
    assert [it.variable for it in found] == ["RPCQ_URL", "RPCQ_URL_FILE", *SET]
    assert {it.variable for it in found if it.read_by == ("client", "worker")} == {
        "RPCQ_URL",
        "RPCQ_URL_FILE",
        "RPCQ_NAME",
        "RPCQ_NAMESPACE",
        "RPCQ_HEARTBEAT",
        "RPCQ_CONNECT_TIMEOUT",
        "RPCQ_MAX_BODY",
        "RPCQ_REPLY_EXCHANGE",
    }


def test_an_option_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="prefetsch"):
        options_from(WorkerOptions, {"prefetsch": 1})
