"""How rpcq is installed: what the wheel contains, and what pages and messages tell users to install."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from rpcq.runtime.distribution import DISTRIBUTION, install_command, missing

ROOT: Final = Path(__file__).parents[2]
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

FOLDERS: Final = ("rpcq", "producer_service", "consumer_service", "examples", "benchmarks", "docs", "docker", "tests")
NAMES: Final = ("*.md", "*.py", "*.yml", "*.html", "*.j2", "Dockerfile")
HOME: Final = ROOT / "rpcq" / "runtime" / "distribution.py"

COMMAND: Final = re.compile(r"\b(?:install|add|uvx|pipx run|pip download)\b(?P<words>[^\n#`]*)")
NAMED: Final = re.compile(r"""(?<![\w./-])['"]?rpcq(?:-rabbitmq)?(?=['"\s\[<>=~!;]|\Z)""")
EXTRAS: Final = re.compile(r"""\.\[(?P<names>[a-z]+(?:, ?[a-z]+)*)\]""")


def texts() -> Iterator[tuple[Path, str]]:
    """Every text of the project, but not this file, which has bad examples."""
    pages = [*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "rpcq_pytest.py", *ROOT.glob("docker-compose*.yml")]
    for folder in FOLDERS:
        pages += [path for name in NAMES for path in sorted((ROOT / folder).rglob(name))]
    for path in pages:
        if path != Path(__file__):
            yield path, path.read_text("utf-8")


def misleading(text: str) -> list[str]:
    """The commands in a text that install rpcq from a package index, by a name that may be somebody else's."""
    return [command[0] for command in COMMAND.finditer(text) if NAMED.search(command["words"])]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install rpcq", True),
        ("pip install 'rpcq[metrics]'", True),
        ('pip install --upgrade "rpcq>=0.2"', True),
        ("python -m pip install pika rpcq-rabbitmq", True),
        ("uv add rpcq[web]", True),
        ("Use `pipx install rpcq`.", True),
        ("RUN pip install rpcq==0.1", True),
        ("pip install .  # in a clone; the rpcq on PyPI is another project", False),
        ("in a clone of rpcq, run pip install '.[bench]'", False),
        ("pip install ./rpcq", False),
        ("pip install opentelemetry-distro", False),
    ],
)
def test_a_command_that_installs_rpcq_from_an_index_is_found(text: str, found: bool) -> None:
    assert bool(misleading(text)) is found


def test_no_page_and_no_message_sends_anybody_to_a_name_that_is_not_ours() -> None:
    seen = {path for path, _ in texts()}
    assert {ROOT / "README.md", ROOT / "docs" / "tutorial.md", ROOT / "rpcq" / "cli" / "bench.py", HOME} <= seen
    for path, text in texts():
        assert not misleading(text), path
        assert not re.search(r"\brpcq(?:-rabbitmq)?\[[a-z]", text), f"{path} names an extra of rpcq by its name"


def test_every_extra_that_a_page_or_a_message_names_exists() -> None:
    named = {
        extra for _, text in texts() for found in EXTRAS.finditer(text) for extra in re.split(r", ?", found["names"])
    }
    assert {"bench", "metrics", "tracing"} <= named <= {*PROJECT["optional-dependencies"]}
    for path in sorted((ROOT / "rpcq").rglob("*.py")):
        for what, extra in re.findall(r'missing\("([^"]+)", "[^"]+", "([a-z]+)"\)', path.read_text("utf-8")):
            assert extra in PROJECT["optional-dependencies"], what


def test_every_hint_of_the_code_is_made_in_one_place() -> None:
    assert install_command() == "pip install ."
    assert missing("--http", "prometheus-client", "metrics") == (
        "--http needs the package prometheus-client: in a clone of rpcq, run pip install '.[metrics]'"
    )
    for path, text in texts():
        if path.suffix == ".py" and path.is_relative_to(ROOT / "rpcq") and path != HOME:
            assert "pip install" not in text, f"{path} has a hint of its own"


def test_the_distribution_has_its_own_name_and_the_package_and_the_command_keep_theirs() -> None:
    assert PROJECT["name"] == DISTRIBUTION == "rpcq-rabbitmq"
    assert PROJECT["scripts"] == {"rpcq": "rpcq.cli:main"}


@pytest.mark.long  # it installs packages from the package index
@pytest.mark.timeout(300)
def test_the_wheel_has_all_that_the_command_needs_in_a_fresh_environment(tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "wheels", ROOT)
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name == f"rpcq_rabbitmq-{PROJECT['version']}-py3-none-any.whl"
    venv.create(tmp_path / "fresh", symlinks=True)
    programs = tmp_path / "fresh" / "bin"
    inside = (*pip, "--python", programs / "python")
    run(*inside, "install", "--quiet", wheel)
    assert run(*inside, "check") == "No broken requirements found.\n"
    assert run(programs / "rpcq", "--version") == f"rpcq {PROJECT['version']}\n"
    assert "10 of 10 matched" in run(programs / "rpcq", "demo", "--calls", "10")
