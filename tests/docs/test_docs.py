"""The documentation, as a reader takes it: the blocks of a page run in order, in one fresh folder, on a real broker.

What becomes of a block, its language says:

    python              a file, where the first line is `# name.py`; else a program, which is run
    sh                  commands; a worker or a relay that is started with ` &` is waited for, and ended with the
                        page. On the pages of PASTED nothing is waited for: their commands run as they are
    console             a transcript: commands after `$ `, and exactly what they print, errors too
    text                directly after one of those, what it prints; `...` stands for anything; elsewhere shown only
    json, toml, yaml    read, to see that it can be; a file, where the first line is `# name`
    py, proto           of another library: read, to see that it can be
    dockerfile          a file
    those of SHOWN      nothing: another language, or a diagram

A page in another language fails, and so does a block that this cannot see.
"""

from __future__ import annotations

import ast
import doctest
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from proto_schema_parser import Parser

from support.ports import free_ports

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]

DATABASE: Final = ("shared-results",)
"""Pages that have a PostgreSQL at DATABASE_URL."""

LONG: Final = (
    "dead-letters",
    "events",
    "load-testing",
    "long-jobs",
    "outbox",
    "production",
    "progress",
    "replacing-jobs",
    "schedules",
    "script",
    "sync",
    "testing",
    "tutorial",
    "tutorial-jobs",
)
"""Pages that take long."""

PASTED: Final = ("README", "tutorial", "tutorial-jobs", "project")
"""Pages that a newcomer pastes line by line: no command of theirs may need that the one before it has got somewhere."""

RUN: Final = ("python", "sh", "console")
READ: Final[dict[str, Callable[[str], Any]]] = {
    "json": json.loads,
    "toml": tomllib.loads,
    "yaml": yaml.safe_load,
    "py": lambda text: compile(text, "another library", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True),
    "proto": Parser().parse,
}
FILES: Final = ("python", "toml", "yaml", "dockerfile")
SHOWN: Final = ("javascript", "ini", "mermaid", "dockerfile", "erlang")

FENCED: Final = re.compile(r"^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
FILE: Final = re.compile(r"# ([\w./-]+\.\w+|Dockerfile)\n")
BACKGROUND: Final = re.compile(r"(?P<command>.+) &(?: *#.*)?\Z")

CLONE: Final = "/path/to/rpcq"
"""Where the pages say that a reader's clone is."""

SMTP_PORT: Final = "8025"
"""The port of the pages' mail server: another one, because tests run at once."""

OUTSIDE: Final = ("rpc_queue", "upper_queue", "multiply_rpc", "old_queue")
"""Queues of the pages that are in no namespace."""

STAND_INS: Final = {
    # What a reader does once for a machine is checked, and not done.
    "docker": "exit 0",
    "make": f'command -p make --dry-run --no-print-directory -C "{ROOT}" "$@" >/dev/null',
    "pip": f'exec "{sys.executable}" "{Path(__file__).with_name("installed.py")}" "$@"',
    "python3": f"""
        test "$1 $2" = "-m venv" || exec "{sys.executable}" "$@"
        mkdir -p "$3/bin" && : >"$3/bin/activate"
    """,
}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; `follows` where only blank lines are between it and the one before."""

    line: int
    language: str
    text: str
    follows: bool

    @property
    def name(self) -> str | None:
        """The file that a block is."""
        found = FILE.match(self.text) if self.language in FILES else None
        return found and found[1]

    @property
    def runs(self) -> bool:
        """Whether something is done for it."""
        return self.language in RUN or self.name is not None

    @property
    def printed(self) -> str:
        """What a transcript shows besides commands."""
        return "".join(line for line in self.text.splitlines(keepends=True) if not line.startswith("$ "))


def blocks_of(page: str) -> list[Block]:
    blocks, end = [], 0
    for found in FENCED.finditer(page):
        line = page.count("\n", 0, found.start()) + 1
        language = found["language"].split(" ")[0]
        blocks.append(Block(line, language, found["text"], follows=not page[end : found.start()].strip()))
        end = found.end()
    assert page.count("```") == 2 * len(blocks), "a fence is indented, has no end, or is not made of three backticks"
    return blocks


def commands_of(block: Block, at: int, *, pasted: bool = False) -> list[str]:
    """What the shell is to do for a block."""
    if block.language not in ("sh", "console"):
        name = block.name or f"block_{at}.py"
        return [f'mkdir -p "$(dirname {name})"', f"cp .blocks/{at} {name}", *([] if block.name else [f"python {name}"])]
    if block.language == "sh":
        lines = block.text.splitlines()
        return lines if pasted else [serving(line, f"{at}.{number}") for number, line in enumerate(lines)]
    lines = [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]
    if not pasted:
        lines = [serving(line, f"{at}.{number}") for number, line in enumerate(lines)]
    return [f"{{ {line}\n}} 2>&1 || :" for line in lines]


def serving(line: str, name: str) -> str:
    """A command that goes on in the background serves before the next one begins."""
    found = BACKGROUND.match(line)
    if not found:
        return line
    log = f".blocks/{name}.log"
    return (
        f'{found["command"]} >{log} 2>&1 & pids="$pids $!"\n'
        f"until grep -q -e 'worker started' -e 'relay open' {log}; "
        f"do kill -0 $! || {{ cat {log} >&2; exit 1; }}; sleep 0.05; done"
    )


def same(shown: str, printed: str) -> bool:
    """Whether that was printed, whatever the width of tables and the spaces at the ends of lines."""
    texts = [re.sub(r"[ \t]+$|([ ━─])\1+", r"\1", text, flags=re.MULTILINE) for text in (shown, printed)]
    return doctest.OutputChecker().check_output(*texts, doctest.ELLIPSIS)


class Page:
    """A page as a shell script, run once: what is exported or started stays so until its end."""

    def __init__(self, blocks: list[Block], folder: Path, environment: dict[str, str], *, pasted: bool = False) -> None:
        self.blocks = blocks
        self._pasted = pasted
        self._folder = folder
        self._environment = environment

    def run(self) -> dict[int, str]:
        """What each runnable block printed, by its place."""
        (self._folder / ".blocks").mkdir()
        script = ["set -e", "pids=", "trap 'kill $pids $(jobs -p) 2>/dev/null || :; wait' EXIT"]
        for at, block in enumerate(self.blocks):
            if block.runs:
                (self._folder / ".blocks" / str(at)).write_text(block.text)
                script += [*commands_of(block, at, pasted=self._pasted), f"printf '\\036{at}\\036'"]
        process = subprocess.Popen(
            ["bash", "-c", "\n".join(script)],  # a shell with jobs, as a newcomer's
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=240)  # the page about loads takes over a minute
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        pieces = stdout.split("\036")
        printed = {int(at): text for text, at in zip(pieces[::2], pieces[1::2], strict=False)}
        failed = next((it for at, it in enumerate(self.blocks) if it.runs and at not in printed), None)
        if failed is not None:
            pytest.fail(f"the block at line {failed.line} failed:\n{pieces[-1]}{stderr}", pytrace=False)
        return printed

    def check(self, printed: dict[int, str]) -> None:
        """That blocks printed what the page shows."""
        for at, block in enumerate(self.blocks):
            if block.language == "console":
                shown, shows = block.printed, at
            elif block.language == "text" and block.follows and at - 1 in printed:
                shown, shows = block.text, at - 1
            else:
                continue
            if not same(shown, printed[shows]):
                told = f"the page shows at line {block.line}:\n{shown}\nand this is printed:\n{printed[shows]}"
                pytest.fail(told, pytrace=False)


def stand_ins(folder: Path, **programs: str) -> str:
    """A folder for the PATH, with a program of a shell for each."""
    folder.mkdir()
    for name, what in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{what}\n")
        (folder / name).chmod(0o755)
    return str(folder)


@pytest.fixture
def environment(rabbitmq_url: str, namespace: str, tmp_path: Path) -> dict[str, str]:
    path = [stand_ins(tmp_path / "stand-ins", **STAND_INS), str(Path(sys.executable).parent), os.environ["PATH"]]
    outer = {
        name: value for name, value in os.environ.items() if not name.startswith(("RPCQ_", "PYTEST_", "MAKE", "MFLAGS"))
    }
    return outer | {"PATH": ":".join(path), "RPCQ_URL": rabbitmq_url, "RPCQ_NAMESPACE": namespace, "COLUMNS": "120"}


@pytest.mark.timeout(270)
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=str(path.relative_to(ROOT)), marks=[pytest.mark.long] if path.stem in LONG else [])
        for path in PAGES
        if path.stem not in DATABASE
    ],
)
def test_the_blocks_of_a_page_do_what_it_says(path: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    _check(path, request, tmp_path)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("name", DATABASE)
def test_the_blocks_of_a_page_about_a_database_do_what_it_says(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, database_url: str
) -> None:
    (path,) = (path for path in PAGES if path.stem == name)
    _check(path, request, tmp_path, DATABASE_URL=database_url)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["README", "tutorial"])
def test_a_page_for_newcomers_runs_in_a_fresh_environment(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    (path,) = (path for path in PAGES if path.stem == name and path.parent in (ROOT, ROOT / "docs"))
    blank = f'test "$1 $2" = "-m venv" && exec "{getattr(sys, "_base_executable", sys.executable)}" "$@"; exit 1'
    programs = stand_ins(tmp_path / "programs", docker="exit 0", make=STAND_INS["make"], python3=blank)
    ours = {str(Path(sys.executable).parent), *sys.path}
    outer = [it for it in os.environ["PATH"].split(":") if it not in ours]
    _check(path, request, tmp_path, PATH=":".join([programs, *outer]), PYTHONPATH="")


@pytest.mark.long  # it installs packages from the package index
@pytest.mark.timeout(300)
def test_a_newcomer_gets_from_a_clone_to_a_typed_call(environment: dict[str, str]) -> None:
    environment["PATH"] = os.environ["PATH"]  # no stand-ins: what the page installs is installed
    script = Path(__file__).with_name("newcomer.py")
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^typed call after \d+ s$", ran.stdout, re.MULTILINE)


def _check(path: Path, request: pytest.FixtureRequest, tmp_path: Path, **more: str) -> None:
    blocks = blocks_of(path.read_text())
    for block in blocks:
        assert block.language in (*RUN, "text", *READ, *SHOWN), f"line {block.line} is in {block.language!r}"
        if block.language in READ:
            READ[block.language](block.text)
    if not any(block.runs for block in blocks):
        return  # no broker is wanted for it
    environment = request.getfixturevalue("environment") | more
    # What a page says of a broker at its usual place is done on the broker and in the namespace of this test.
    namespace = environment["RPCQ_NAMESPACE"]
    here = {
        "amqp://localhost/": environment["RPCQ_URL"],
        CLONE: str(ROOT),
        SMTP_PORT: str(free_ports(1)[0]),
        **{name: f"{namespace}.{name}" for name in OUTSIDE},
    }
    here |= {
        f"rpcq.{name}": f"{namespace}.{name}" for name in ("requests", "control", "notices", "req.", "once.", "dead.")
    }
    for usual, ours in here.items():
        blocks = [replace(block, text=block.text.replace(usual, ours)) for block in blocks]
    folder = tmp_path / "page"
    folder.mkdir()
    page = Page(blocks, folder, environment, pasted=path.stem in PASTED)
    page.check(page.run())
