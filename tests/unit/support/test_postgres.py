"""The harness that finds or starts PostgreSQL: what it chooses, what it says, and that it leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from support import containers, installing
from support import postgres as harness
from support.harness import Unavailable
from support.postgres import Postgres

TESTS = Path(__file__).parents[2]
THERE = Postgres("postgresql://there/", "a server")


def _fails(reason: str) -> Callable[[], Postgres]:
    def start() -> Postgres:
        raise Unavailable(reason)

    return start


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path | None, bool], None]:
    """What is there: why no engine answers, the folder of the programs, whether apt-get can be used."""

    def is_so(engine_problem: str, programs: Path | None, can_install: bool) -> None:
        monkeypatch.setattr(containers, "engine_problem", lambda: engine_problem)
        monkeypatch.setattr(harness, "find_programs", lambda: programs)
        monkeypatch.setattr(installing, "can_apt_install", lambda: can_install)

    return is_so


Machine = Callable[[str, Path | None, bool], None]
PROGRAMS = Path("/somewhere/bin")
INSTALL = "private server after apt-get install"


@pytest.mark.parametrize(
    ("engine_problem", "programs", "can_install", "expected"),
    [
        ("", PROGRAMS, True, ["container", "private server"]),
        ("", None, True, ["container", INSTALL]),
        ("", None, False, ["container"]),
        ("none answers", PROGRAMS, False, ["private server"]),
        ("none answers", None, True, [INSTALL]),
        ("none answers", None, False, []),
    ],
)
def test_the_ways_to_a_database_are_tried_in_this_order(
    machine: Machine, engine_problem: str, programs: Path | None, can_install: bool, expected: list[str]
) -> None:
    machine(engine_problem, programs, can_install)
    ways, reasons = harness.ways("", lambda _: None)
    assert list(ways) == expected
    assert any("none answers" in reason for reason in reasons) is bool(engine_problem)
    assert any("no initdb" in reason for reason in reasons) is (programs is None)


def test_a_url_that_was_given_is_the_only_way() -> None:
    ways, reasons = harness.ways("postgresql://there/", lambda _: None)
    assert (list(ways), reasons) == (["RPCQ_TEST_POSTGRES"], [])


def test_a_way_that_fails_is_told_of_and_the_next_one_is_tried() -> None:
    said: list[str] = []
    ways = {"container": _fails("the image cannot be had"), "private server": lambda: THERE}
    assert harness.first(ways, [], said.append) is THERE
    assert said == ["container: the image cannot be had; going on to: private server"]


def test_where_nothing_works_the_error_has_every_reason_and_says_what_to_do() -> None:
    with pytest.raises(Unavailable) as error:
        harness.first({"private server": _fails("disk full")}, ["container: none answers"], lambda _: None)
    for expected in ("disk full", "none answers", "apt-get install postgresql", "RPCQ_TEST_POSTGRES"):
        assert expected in str(error.value)


@pytest.mark.parametrize(
    ("url", "why"),
    [("mysql://there/", "not a URL of PostgreSQL"), ("postgresql://u:p@127.0.0.1:1/x", "no PostgreSQL answers")],
)
def test_a_url_where_no_postgresql_is_fails_once_and_clearly(
    url: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "URL_SECONDS", 0.2)
    with pytest.raises(Unavailable, match=why):
        harness.use_url(url)


def test_the_newest_version_that_has_both_programs_is_found(tmp_path: Path) -> None:
    for version, names in (("9", ("initdb", "postgres")), ("15", ("initdb", "postgres")), ("17", ("initdb",))):
        folder = tmp_path / version / "bin"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch(0o755)
    assert harness.find_programs(f"{tmp_path}/*/bin", path="") == tmp_path / "15" / "bin"
    assert harness.find_programs(f"{tmp_path}/none/*/bin", path=str(tmp_path / "9" / "bin")) == tmp_path / "9" / "bin"
    assert harness.find_programs(f"{tmp_path}/none/*/bin", path="") is None


def test_a_package_that_is_installed_without_its_programs_is_told_of(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("none answers", None, True)
    installed: list[str] = []
    monkeypatch.setattr(installing, "apt_install", installed.append)
    said: list[str] = []
    with pytest.raises(Unavailable, match="apt-get installed postgresql, but"):
        harness.first(*harness.ways("", said.append), said.append)
    assert installed == ["postgresql"]
    assert said == ["installing postgresql with apt-get, which takes a minute (root on Debian or Ubuntu)"]


@pytest.mark.usefixtures("postgres")  # so that there is one to be started
def test_a_server_of_our_own_is_taken_down_and_comes_back_with_its_data() -> None:
    with harness.postgres(own=True) as server:
        url = server.create("things")
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS x")
        for kill in (False, True):
            with psycopg.connect(url) as connection:
                server.down(kill=kill)
                with pytest.raises(psycopg.OperationalError):
                    connection.execute("SELECT 1")
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(url)
            server.up()
            with psycopg.connect(url) as connection:
                assert connection.execute("SELECT x FROM kept").fetchall() == [(7,)]
        server.drop("things")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(server.url)


@pytest.mark.usefixtures("postgres")
def test_nothing_is_left_when_the_process_that_started_a_server_is_killed(tmp_path: Path) -> None:
    program = (
        "import time\nfrom support.postgres import postgres\n"
        "with postgres(own=True) as it: print(it.url, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with psycopg.connect(url) as connection:
            ((folder,),) = connection.execute("SHOW data_directory").fetchall()
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while True:
        try:
            psycopg.connect(url, connect_timeout=2).close()
        except psycopg.OperationalError:
            if not Path(folder).exists():
                break
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_that_was_not_started_here_is_not_taken_down() -> None:
    with pytest.raises(Unavailable, match="not ours to take down"):
        THERE.down()
    THERE.stop()
