"""What mypy --strict and pyright make of `rpcq.web` in an app."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("typed.py")
ROOT = Path(__file__).parents[2]
WANTED = {
    (number, match[1])
    for number, line in enumerate(FILE.read_text().splitlines(), start=1)
    if (match := re.search(r"# error: ([a-z-]+)\Z", line))
}


def said_by(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, cwd=ROOT)
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.timeout(120)
def test_mypy_knows_the_types_in_an_app(tmp_path: Path) -> None:
    options = ("--strict", "--config-file=", "--no-error-summary", "--no-pretty", "--python-version", "3.11")
    said = said_by(sys.executable, "-m", "mypy", *options, "--cache-dir", str(tmp_path), str(FILE))
    found = re.findall(r"typed\.py:(\d+): error: .*\[([a-z-]+)\]", said)
    assert {(int(line), code) for line, code in found} == WANTED, said


@pytest.mark.timeout(120)
def test_pyright_knows_the_types_in_an_app(tmp_path: Path) -> None:
    settings = {
        "include": [str(FILE)],
        "typeCheckingMode": "standard",
        "pythonVersion": "3.11",
        "extraPaths": [str(ROOT)],
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    said = said_by(
        sys.executable, *("-m", "basedpyright", "-p", str(tmp_path), "--pythonpath", sys.executable, "--outputjson")
    )
    report = json.loads(said)
    assert report["summary"]["filesAnalyzed"] == 1
    found = {
        it["range"]["start"]["line"] + 1: it["message"]
        for it in report["generalDiagnostics"]
        if it["severity"] == "error"
    }
    assert found.keys() == {line for line, _ in WANTED}, found
