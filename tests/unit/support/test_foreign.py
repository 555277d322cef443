"""What the harness says of a language that is not installed, and what it installs where it may."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import foreign
from support.foreign import RUNTIMES, Runtime, unavailable
from support.harness import Unavailable

MISSING = Runtime("Nonesuch", "foreign.rb", ("nonesuch", "nonesuch-amqp"), ("rpcq-nonesuch",), ("rpcq-nonesuch",))


def test_a_language_that_is_not_installed_is_named_with_its_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(foreign, "can_apt_install", lambda: False)
    with pytest.raises(Unavailable, match=r"no Nonesuch .*: install nonesuch nonesuch-amqp \(of Debian and Ubuntu\)"):
        MISSING.prepare(tmp_path, lambda _: None)


def test_all_that_is_missing_is_installed_at_once_where_that_may_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed: list[tuple[str, ...]] = []
    said: list[str] = []
    monkeypatch.setattr(foreign, "can_apt_install", lambda: True)
    monkeypatch.setattr(foreign, "apt_install", lambda *packages: installed.append(packages))
    monkeypatch.setattr(
        foreign, "RUNTIMES", (MISSING, Runtime("Other", "", ("other",), ("rpcq-other",), ("rpcq-other",)))
    )
    with pytest.raises(Unavailable):
        MISSING.prepare(tmp_path, said.append)
    assert installed == [("nonesuch", "nonesuch-amqp", "other")]
    assert "nonesuch-amqp" in said[0]


def test_a_missing_language_is_skipped_and_fails_where_all_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RPCQ_TEST_FOREIGN", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no such language"):
        unavailable("no such language")
    monkeypatch.setenv("RPCQ_TEST_FOREIGN", "1")
    with pytest.raises(pytest.fail.Exception, match="no such language"):
        unavailable("no such language")


def test_every_program_of_a_language_is_there() -> None:
    assert len(RUNTIMES) >= 6
    for runtime in RUNTIMES:
        assert (foreign.PROGRAMS / runtime.source).is_file()
