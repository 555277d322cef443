"""What type checkers make of the public names: mypy --strict and pyright over files that they accept and refuse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SAMPLE = ROOT / "examples" / "sample"
ACCEPTED = ("accepted.py", "accepted_sync.py")
REFUSED = ("refused.py", "refused_sync.py")
FOUND = re.compile(r"(?P<file>[^:]+):(?P<line>\d+): error: (?P<text>.*?)(?:  \[(?P<code>[a-z-]+)\])?\Z")
EXPECTED = re.compile(r"# error: (?P<code>[a-z-]+)\Z")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str, str]]]:
    """What mypy says: file -> (line, code, message)."""
    cache = tmp_path_factory.mktemp("mypy")
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", "--no-pretty"),
            *("--python-version", "3.11", "--cache-dir", str(cache)),
            *(str(HERE / name) for name in (*ACCEPTED, *REFUSED)),
        ],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=ROOT,
    )
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    said: dict[str, list[tuple[int, str, str]]] = {}
    for line in ran.stdout.splitlines():
        if match := FOUND.match(line):
            said.setdefault(Path(match["file"]).name, []).append((int(match["line"]), match["code"], match["text"]))
    return said


def expected(file: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if match := EXPECTED.search(line):
            yield number, match["code"]


@pytest.mark.parametrize("name", ACCEPTED)
def test_mypy_accepts_what_users_may_write(name: str, found: dict[str, list[tuple[int, str, str]]]) -> None:
    assert found.get(name, []) == []


@pytest.mark.parametrize(("name", "least"), [*zip(REFUSED, (40, 20), strict=True)])
def test_mypy_refuses_what_users_may_not_write_each_line_for_its_own_reason(
    name: str, least: int, found: dict[str, list[tuple[int, str, str]]]
) -> None:
    refused = found.get(name, [])
    wanted = set(expected(HERE / name))
    assert len(wanted) > least
    said = {(line, code) for line, code, _ in refused}
    assert said - wanted == set(), [it for it in refused if it[:2] not in wanted]
    assert wanted - said == set(), "mypy accepts these lines"


def test_mypy_finds_nothing_in_the_package_itself_that_users_would_see(
    found: dict[str, list[tuple[int, str, str]]],
) -> None:
    assert found.keys() <= {*ACCEPTED, *REFUSED}


@pytest.fixture(scope="module")
def by_pyright(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """What pyright says: file -> line -> message. basedpyright is pyright with its Node.js in the package."""
    folder = tmp_path_factory.mktemp("pyright")
    files = [str(HERE / name) for name in (*ACCEPTED, *REFUSED)]
    settings = {"include": files, "typeCheckingMode": "standard", "pythonVersion": "3.11", "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    ran = subprocess.run(
        [sys.executable, "-m", "basedpyright", "-p", str(folder), "--pythonpath", sys.executable, "--outputjson"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=ROOT,
    )
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    said: dict[str, dict[int, str]] = {name: {} for name in (*ACCEPTED, *REFUSED)}
    report = json.loads(ran.stdout)
    assert report["summary"]["filesAnalyzed"] == 4
    for it in report["generalDiagnostics"]:
        if it["severity"] == "error":
            said[Path(it["file"]).name][it["range"]["start"]["line"] + 1] = it["message"]
    return said


@pytest.mark.parametrize("name", ACCEPTED)
def test_pyright_accepts_what_users_may_write(name: str, by_pyright: dict[str, dict[int, str]]) -> None:
    assert by_pyright[name] == {}


@pytest.mark.parametrize("name", REFUSED)
def test_pyright_refuses_what_users_may_not_write(name: str, by_pyright: dict[str, dict[int, str]]) -> None:
    # Comparisons that are never true are for linters to tell, by pyright's lights.
    wanted = {line for line, code in expected(HERE / name) if code != "comparison-overlap"}
    refused = by_pyright[name]
    assert {line: refused[line] for line in refused.keys() - wanted} == {}
    assert wanted - refused.keys() == set(), "pyright accepts these lines"


def test_mypy_strict_finds_nothing_in_the_sample_project(tmp_path: Path) -> None:
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file=", "--warn-unreachable"),
            *("--python-version", "3.11", "--cache-dir", str(tmp_path), "-p", "examples.sample"),
        ],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"no issues found in {len([*SAMPLE.glob('*.py')])} source files" in ran.stdout


def test_pyright_strict_finds_nothing_in_the_sample_project(tmp_path: Path) -> None:
    settings = {
        "include": [str(SAMPLE)],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
        "extraPaths": [str(ROOT)],
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    ran = subprocess.run(
        [sys.executable, "-m", "basedpyright", "-p", str(tmp_path), "--pythonpath", sys.executable, "--outputjson"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=ROOT,
    )
    report = json.loads(ran.stdout)
    assert report["summary"]["filesAnalyzed"] == len([*SAMPLE.glob("*.py")])
    found = [it for it in report["generalDiagnostics"] if it["severity"] == "error"]
    assert found == []


def test_the_sample_project_uses_what_it_is_a_sample_of() -> None:
    text = "".join(it.read_text() for it in SAMPLE.glob("*.py"))
    assert len(text.splitlines()) > 300
    for used in ("Service(api=", "Context[", "with_options(", "rpcq_running: Running", ".left", "errors.responses"):
        assert used in text, used
