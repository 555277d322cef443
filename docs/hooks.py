# ruff: noqa: INP001 - no package: MkDocs loads it by its path
"""The generated parts of the pages; MkDocs calls the functions `on_...` (its "hooks").

In a page, `<!-- generated: NAME -->` is replaced by the result of the function of that name in GENERATORS, and
`<!-- source: FILE NAME... -->` by what these functions, classes or methods are in a file of the repository. A page that
would load something from another site causes a warning, which `mkdocs build --strict` makes an error.

The theme draws Mermaid's diagrams. Its script loads Mermaid from unpkg.com while a page with a diagram is read. A site
that is built with the path of a `mermaid.min.js` (from `dist/` in npm's package mermaid) in RPCQ_DOCS_MERMAID has that
file itself, and loads nothing from elsewhere.
"""

from __future__ import annotations

import ast
import logging
import os
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Final

import griffe
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from rpcq.cli import app
from rpcq.environment import settings

log = logging.getLogger("mkdocs.hooks.rpcq")

ROOT: Final = Path(__file__).parents[1]
PLACE: Final = re.compile(r"<!-- generated: (?P<name>[a-z-]+) -->")
SOURCE: Final = re.compile(r"<!-- source: (?P<file>[\w./]+)(?P<names>(?: [\w.]+)+) -->")
URL: Final = re.compile(r"\b(?:amqps?|memory)://[^\s,]*[^\s,.]|\b(?:amqps?|memory)://")
FOREIGN: Final = re.compile(
    r"<(?:script|img|iframe|link(?! rel=\"canonical\"))\b[^>]*(?:src|href)=\"(?:https?:)?//[^>]*>"
)


MERMAID: Final = "assets/mermaid.min.js"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show the version on every page; load Mermaid from the site, if it is to have it."""
    config.site_name = f"{config.site_name} {_version()}"
    if os.environ.get("RPCQ_DOCS_MERMAID"):
        config.extra_javascript.append(MERMAID)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add Mermaid to the site, if it is to have it."""
    if path := os.environ.get("RPCQ_DOCS_MERMAID"):
        files.append(File.generated(config, MERMAID, abs_src_path=path))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the generated parts."""
    markdown = SOURCE.sub(lambda found: source(found["file"], found["names"].split()), markdown)
    return PLACE.sub(lambda found: GENERATORS[found["name"]](), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Check that the page loads nothing from another site."""
    for found in FOREIGN.findall(output):
        log.warning("%s would load something from elsewhere: %s", page.file.src_uri, found)
    return output


# Source.


def source(file: str, names: list[str]) -> str:
    """Functions, classes, or methods (`Class.method`) of a file, as they are there.

    Raises:
        ValueError: the file does not have one of these names.

    """
    text = (ROOT / file).read_text()
    lines = text.splitlines()
    places = {}
    for name, node in _definitions(ast.parse(text).body):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        places[name] = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
    if missing := [name for name in names if name not in places]:
        raise ValueError(f"{file} has no function or class {', '.join(missing)} at its top level, and no such method")
    shown = "\n\n\n".join(places[name] for name in names)
    return f"```python\n# {file}\n{shown}\n```"


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{name}", inner) for name, inner in _definitions(node.body))


# The version.


def version() -> str:
    """What this site documents."""
    return f"This is the documentation of version {_version()}."


def _version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


# The command line.


def command_line() -> str:
    """Every command of `rpcq`, with its arguments and options."""
    return "\n\n".join(_commands("rpcq", typer.main.get_command(app)))


def _commands(called: str, command: Any) -> Iterator[str]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield f"## `{called}`\n\n{_help(command.help)}\n\n{_usage(called, command.params)}"
        yield from _parameters("Argument", [it for it in command.params if it.param_type_name == "argument"])
        yield from _parameters("Option", [it for it in command.params if it.param_type_name == "option"])
        if command.epilog:
            yield _help(command.epilog)
        return
    for name, each in inner.items():
        if not each.hidden:
            yield from _commands(f"{called} {name}", each)


def _usage(called: str, params: list[Any]) -> str:
    words = [called, "[options]"]
    for it in params:
        if it.param_type_name == "argument":
            word = it.name + ("..." if it.nargs == -1 else "")
            words.append(word if it.required else f"[{word}]")
    return f"```text\n{' '.join(words)}\n```"


def _parameters(kind: str, params: list[Any]) -> Iterator[str]:
    shown = [it for it in params if not getattr(it, "hidden", False)]
    if not shown:
        return
    rows = []
    for it in shown:
        names = [it.name] if kind == "Argument" else [*it.opts, *it.secondary_opts]
        meaning = URL.sub(r"`\g<0>`", _help(it.help))
        if isinstance(it.default, Enum):
            meaning += f" One of {', '.join(f'`{choice.value}`' for choice in type(it.default))}."
        if it.envvar:
            variables = [it.envvar] if isinstance(it.envvar, str) else it.envvar
            meaning += f" From the environment: {', '.join(f'`{name}`' for name in variables)}."
        default = it.show_default if isinstance(it.show_default, str) else it.default
        rows.append((", ".join(f"`{name}`" for name in names), _value(default), meaning))
    yield _table((kind, "Default", "Meaning"), rows)


def _help(text: str | None) -> str:
    return " ".join((text or "").split())


def _value(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    return "" if value is None or value is False or value in ((), "") or callable(value) else f"`{value}`"


# Options and their variables.


def settings_table() -> str:
    """The broker's URL and every option of a client and of a worker, with its variable."""
    meanings = _meanings() | {
        "url": "the broker: amqp://user:password@host:port/vhost, amqps://..., or memory://",
        "url_file": "a file with the broker's URL, such as a Docker secret; instead of `RPCQ_URL`",
    }
    rows = [
        (
            f"`{it.variable}`",
            f"`{it.kind}`",
            _value(it.default),
            " and ".join(it.read_by),
            URL.sub(r"`\g<0>`", _sentence(meanings[it.option])),
        )
        for it in settings()
    ]
    return _table(("Variable", "Type", "Default", "Read by", "Meaning"), rows)


def _meanings() -> dict[str, str]:
    """What the docstrings in `rpcq.options` say of each option, read by the parser that mkdocstrings uses."""
    module = griffe.load("rpcq.options", search_paths=[ROOT])
    return {
        attribute.name: " ".join(attribute.description.split())
        for kind in ("ConnectionOptions", "ClientOptions", "WorkerOptions")
        for section in griffe.parse_google(module[kind].docstring)
        if section.kind is griffe.DocstringSectionKind.attributes
        for attribute in section.value
    }


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


# Results of benchmarks.


def figures() -> str:
    """The results, from the benchmarks' README."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    found = re.search(r"^## What they showed\n(.+?)(?=^## )", text, re.DOTALL | re.MULTILINE)
    if found is None:
        log.warning("benchmarks/README.md has no part 'What they showed'")
        return ""
    return found[1].strip()


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


GENERATORS: Final[dict[str, Callable[[], str]]] = {
    "command-line": command_line,
    "settings": settings_table,
    "figures": figures,
    "version": version,
}
