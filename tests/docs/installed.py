"""Stands in for pip where the documentation installs something: it says whether that is here, and installs nothing."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).parents[2] / "pyproject.toml"


def main(command: str, *wanted: str) -> str:
    """What is wrong, or nothing."""
    if command != "install":
        return f"pip {command}: the documentation installs"
    known = {*tomllib.loads(PROJECT.read_text("utf-8"))["project"]["optional-dependencies"]}
    for each in wanted:
        name, _, extras = each.strip("'\"").rstrip("]").partition("[")
        if name == ".":  # a clone
            if unknown := set(re.findall(r"[\w-]+", extras)) - known:
                return f"rpcq has no extra {', '.join(unknown)}"
        else:
            importlib.metadata.version(name)
    return ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) or 0)
