"""Stands in for pip where the documentation installs something: it says whether that is here, and installs nothing."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from typing import Final

CLONE: Final = Path(__file__).parents[2]


def main(command: str, *wanted: str) -> str:
    """What is wrong, or nothing."""
    if command not in ("install", "wheel"):
        return f"pip {command}: the documentation installs"
    project = tomllib.loads((CLONE / "pyproject.toml").read_text())["project"]
    for each in (it for it in wanted if not it.startswith("--")):
        name, _, extras = each.strip("'\"").rstrip("]").partition("[")
        if name in (".", str(CLONE), project["name"]):  # the folder of the clone, or its distribution
            if unknown := {*re.findall(r"[\w-]+", extras)} - {*project["optional-dependencies"]}:
                return f"rpcq has no extra {', '.join(unknown)}"
        elif "/" in name:
            if not (Path(name) / "pyproject.toml").is_file():
                return f"{name} is no project"
        else:
            importlib.metadata.version(name)
    return ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) or 0)
