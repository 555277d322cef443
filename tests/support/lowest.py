"""The lowest versions that pyproject.toml allows, one `name==version` a line: what pip-audit looks for known holes in.

``--reachable`` asks instead whether pypi.org can be reached, and tells holes: the exit code is 0 if so.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
import urllib.request
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
HOLED = "https://pypi.org/pypi/urllib3/1.24.1/json"
"""A version with holes that are known since 2019. A mirror may answer, and know none."""
SECONDS = 5


def lowest(text: str) -> list[str]:
    """The lower bound of each requirement.

    Raises:
        ValueError: one has none, or two bounds of a package differ.

    """
    project = tomllib.loads(text)["project"]
    found: dict[str, str] = {}
    for wanted in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in wanted:
            match = re.match(r"([A-Za-z0-9-]+)(?:\[.*\])?>=([0-9a-z.]+)", requirement)
            if match is None:
                raise ValueError(f"{requirement!r} has no lower bound")
            if found.setdefault(match[1], match[2]) != match[2]:
                raise ValueError(f"{match[1]} has the lower bounds {found[match[1]]} and {match[2]}")
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def is_reachable() -> bool:
    try:
        with urllib.request.urlopen(HOLED, timeout=SECONDS) as answer:
            return bool(json.load(answer)["vulnerabilities"])
    except (OSError, ValueError, KeyError):
        return False


if __name__ == "__main__":
    if sys.argv[1:] == ["--reachable"]:
        sys.exit(not is_reachable())
    sys.stdout.write("\n".join(lowest(PROJECT.read_text())) + "\n")
