"""Stands in for pip where the documentation installs something: it says whether that is here, and installs nothing."""

from __future__ import annotations

import importlib.metadata
import re
import sys


def main(command: str, *wanted: str) -> str:
    """What is wrong, or nothing."""
    if command != "install":
        return f"pip {command}: the documentation installs"
    known = {"rpcq", *(importlib.metadata.metadata("rpcq").get_all("Provides-Extra") or ())}
    for each in wanted:
        name, _, extras = each.strip("'\"").rstrip("]").partition("[")
        if name == ".":  # a clone
            continue
        if name == "rpcq":
            if unknown := set(re.findall(r"[\w-]+", extras)) - known:
                return f"rpcq has no extra {', '.join(unknown)}"
        else:
            importlib.metadata.version(name)
    return ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) or 0)
