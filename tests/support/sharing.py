"""The store of results of docs/howto/shared-results.md, as tests use it."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "shared-results.md"


def source() -> str:
    """The file of the page."""
    (found,) = re.findall(r"^```python\n(# shared_results\.py\n.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return str(found)


def module() -> Any:
    made = ModuleType("shared_results")
    exec(compile(source(), "shared_results.py", "exec"), made.__dict__)
    return made


def asked(url: str, statement: str) -> Any:
    """The rows of a statement, if it gives any."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else None
