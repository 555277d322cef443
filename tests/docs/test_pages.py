"""What pages say of the code and of each other, where that can be checked without running them."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import yaml
from mkdocs.config import load_config

import rpcq
from rpcq.calls.outcomes import TRANSITIONS, Act
from rpcq.cli import app
from rpcq.environment import settings

ROOT: Final = Path(__file__).parents[2]
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())
REFERENCE: Final = "\n".join(page.read_text() for page in sorted((ROOT / "docs" / "reference").glob("*.md")))
CONTRIBUTING: Final = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The reference.


def test_every_public_name_is_in_the_reference() -> None:
    documented = set(re.findall(r"^::: (\S+)", REFERENCE, re.MULTILINE))
    errors = {name for name in rpcq.__all__ if f"rpcq.{name}" not in documented}
    assert "rpcq.errors" in documented
    assert all(issubclass(getattr(rpcq, name), rpcq.RpcqError) for name in errors), errors


def test_every_command_and_all_its_options_are_in_the_reference(hooks: Any) -> None:
    shown = hooks.on_page_markdown((ROOT / "docs" / "reference" / "cli.md").read_text())
    for command in app.registered_commands:
        assert f"`rpcq {command.name or command.callback.__name__}`" in shown
    for option in ("--url", "--namespace", "--timeout", "--prefetch", "--processes", "--log-level", "`parameters`"):
        assert option in shown
    assert "Exit codes:" in shown


def test_every_setting_is_in_the_reference(hooks: Any) -> None:
    shown = hooks.on_page_markdown((ROOT / "docs" / "reference" / "settings.md").read_text())
    for setting in settings():
        (row,) = (line for line in shown.splitlines() if line.startswith(f"| `{setting.variable}` |"))
        assert re.search(r"\| \S[^|]+\. \|\Z", row), f"no meaning: {row}"


def test_every_place_for_something_generated_has_a_generator(hooks: Any) -> None:
    for page in sorted((ROOT / "docs").glob("**/*.md")):
        assert "<!-- generated" not in hooks.on_page_markdown(page.read_text()), page


def test_every_place_for_source_has_the_source_of_today(hooks: Any) -> None:
    for page in sorted((ROOT / "docs").glob("**/*.md")):
        assert "<!-- source" not in hooks.on_page_markdown(page.read_text()), page
    shown = hooks.on_page_markdown("<!-- source: examples/scores/service.py compute -->")
    assert shown.startswith("```python\n# examples/scores/service.py\n@scores.job(")
    shown = hooks.on_page_markdown("<!-- source: examples/media/files.py Files.writing -->")
    assert shown.startswith("```python\n# examples/media/files.py\n@contextmanager\ndef writing(")
    with pytest.raises(ValueError, match="has no function or class nothing"):
        hooks.on_page_markdown("<!-- source: examples/scores/service.py nothing -->")


def test_every_picture_is_small_and_on_a_page_that_says_what_it_shows() -> None:
    docs = ROOT / "docs"
    pages = "\n".join(page.read_text() for page in docs.rglob("*.md"))
    pictures = {path.name: path for path in (docs / "assets").iterdir() if path.suffix in (".png", ".svg")}
    shown = {name for _, name in re.findall(r"!\[([^\]]+)\]\([\w./-]*assets/([\w.-]+)\)", pages)}
    assert shown == pictures.keys()
    assert all(path.stat().st_size < 150_000 for path in pictures.values())


def test_the_figures_are_those_of_the_benchmarks(hooks: Any) -> None:
    shown = hooks.on_page_markdown((ROOT / "docs" / "explanations" / "peers.md").read_text())
    assert "| in flight |" in shown
    assert shown.count("| in flight |") == (ROOT / "benchmarks" / "README.md").read_text().count("| in flight |")


@pytest.mark.parametrize(
    ("tag", "foreign"),
    [
        ('<script src="https://unpkg.com/mermaid.js">', True),
        ('<link rel="stylesheet" href="//fonts.googleapis.com/css">', True),
        ('<img src="http://shields.io/badge.svg">', True),
        ('<script src="assets/bundle.js">', False),
        ('<a href="https://www.rabbitmq.com/docs/ttl">', False),
    ],
)
def test_a_page_that_would_load_something_from_elsewhere_is_told(hooks: Any, tag: str, foreign: bool) -> None:
    assert bool(hooks.FOREIGN.search(tag)) is foreign


# Explanations.


def test_every_way_in_which_the_table_of_calls_ends_one_is_explained() -> None:
    page = (ROOT / "docs" / "explanations" / "delivery.md").read_text()
    rows = [re.split(r" \| ", line.strip("| ")) for line in page.splitlines() if line.startswith("| ")]
    explained = {(name, row[2]) for row in rows if len(row) >= 3 for name in re.findall(r"`(\w+)`", row[1])}
    for transition in TRANSITIONS.values():
        if transition.act in (Act.FAIL, Act.AGAIN_OR_FAIL):
            assert transition.error is not None
            assert (transition.error.__name__, transition.executed) in explained, transition
    for name, executed in explained:
        kind = getattr(rpcq, name)
        assert kind in (rpcq.CallTimeout, rpcq.Overloaded, rpcq.RemoteError) or kind.default_executed == executed


# The site.


def test_every_page_is_linked_on_the_home_page() -> None:
    docs = ROOT / "docs"
    linked = set(re.findall(r"\]\(([\w/.-]+\.md)\)", (docs / "index.md").read_text()))
    assert linked == {str(page.relative_to(docs)) for page in docs.rglob("*.md")} - {"index.md"}


def test_the_home_page_begins_with_how_to_install() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Install", "Try it"]


def test_the_site_shows_the_version(hooks: Any) -> None:
    shown = hooks.on_page_markdown((ROOT / "docs" / "index.md").read_text())
    assert f"This is the documentation of version {PROJECT['project']['version']}." in shown
    config = hooks.on_config(SimpleNamespace(site_name="rpcq", extra_javascript=[]))
    assert config.site_name == f"rpcq {PROJECT['project']['version']}"


@pytest.mark.parametrize("address", ["https://example.org/team/rpcq", ""])
def test_the_site_links_to_the_repository_that_the_environment_names(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RPCQ_DOCS_REPOSITORY", address)
    assert load_config(str(ROOT / "mkdocs.yml")).repo_url == (address or None)


# The house.


def test_the_drawing_of_the_house_has_its_floors() -> None:
    (layers,) = (it["layers"] for it in PROJECT["tool"]["importlinter"]["contracts"] if it["type"] == "layers")
    (drawing,) = re.findall(r"^```mermaid\n(.*?)^```$", CONTRIBUTING, re.DOTALL | re.MULTILINE)
    rooms = dict(re.findall(r'^ *(\w+)\["(.+?)(?:<br>.*)?"\]$', drawing, re.MULTILINE))
    (arrows,) = re.findall(r"^ *(\w+(?: --> \w+)+)$", drawing, re.MULTILINE)
    assert [rooms[floor] for floor in arrows.split(" --> ")] == layers
    assert len(rooms) == len(layers)


def test_the_table_of_the_house_has_its_floors() -> None:
    (layers,) = (it["layers"] for it in PROJECT["tool"]["importlinter"]["contracts"] if it["type"] == "layers")
    page = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", page, re.MULTILINE)
    floors = [{name.rstrip("/") for name in re.findall(r"`([^`]+)`", modules)} for _, modules in rows]
    assert floors == [set(layer.split(" | ")) for layer in layers if layer != "__main__"]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md", "README.md"])
def test_every_path_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"(?:`|ARGS=\")((?:rpcq|tests|docs|benchmarks|\.ci|\.github)/[\w./-]*)", text)
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text)
    for path in (*(ROOT / name for name in named), *((ROOT / page).parent / name for name in linked)):
        assert path.exists(), path


# Continuous integration.


def test_ci_runs_every_supported_python_with_the_oldest_and_the_newest_broker_and_each_broker_with_two() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    prefix = "Programming Language :: Python :: 3."
    supported = [it.rpartition(" ")[2] for it in PROJECT["project"]["classifiers"] if it.startswith(prefix)]
    matrix, own = workflow["jobs"]["matrix"], workflow["jobs"]["own-broker"]
    brokers = ["3.10", "3.13", "4.0", "4.3"]
    pairs = matrix["strategy"]["matrix"]
    assert (pairs["python"], pairs["rabbitmq"]) == (supported, brokers)
    left_out = {(it["python"], it["rabbitmq"]) for it in pairs["exclude"]}
    ends = (supported[0], supported[-1]), (brokers[0], brokers[-1])
    assert left_out == {(one, other) for one in supported for other in brokers if one not in ends[0]} - {
        (one, other) for one in supported for other in ends[1]
    }
    assert matrix["services"]["rabbitmq"]["image"] == "rabbitmq:${{ matrix.rabbitmq }}"
    assert matrix["env"]["RPCQ_TEST_IMAGE"] == "rabbitmq:${{ matrix.rabbitmq }}-management"
    assert matrix["env"]["RPCQ_TEST_URL"] == "amqp://guest:guest@localhost:5672/"
    assert "services" not in own
    assert "RPCQ_TEST_URL" not in own["env"]
    for job in (matrix, own):
        assert job["env"]["PYTHON"] == "python"
        assert job["steps"][-1] == {"run": ".ci/run"}
    assert workflow[True]["pull_request"] is None  # YAML 1.1 reads `on` as true
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_test_that_the_page_on_reliability_names_is_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| \d+", line)]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[-2]) if len(name) > 20}
    files = [path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(named) > 40
    assert not {name for name in named if not any(f"def test_{name}(" in text for text in files)}
    numbers = {int(number) for row in rows for number in re.findall(r"\d+", row.split("|")[1])}
    assert numbers | set(range(23, 28)) == set(range(1, 52))


def test_what_the_in_process_broker_does_not_keep_is_tested_on_rabbitmq() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    section = page.partition("## What `memory://` does not keep\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 13
    for *_, tests in rows:
        suite, *names = re.findall(r"`(\w+)`", tests)
        files = [path.read_text("utf-8") for path in (ROOT / "tests").glob(f"*/test_{suite}.py")]
        assert names
        assert not {name for name in names if not any(f"def test_{name}(" in text for text in files)}, suite
