"""Text for terminals: characters that control a terminal, or hide or reorder other characters, are escaped. Pure.

Text from workers, callers and brokers may contain control characters, which move the cursor, set the window's title or
make the terminal answer, and marks that reverse the direction of text. `str.isprintable` is false for all of these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Final

_CANDIDATES: Final = re.compile(r"[^ -~]")


def printable(text: str, *, lines: bool = False) -> str:
    r"""The text with its unprintable characters as Python's escapes, such as `\x1b`.

    Args:
        text: any text.
        lines: keep newlines and tabs, because the text may have several lines.

    """
    return _escaped(text, "\n\t" if lines else "", lambda character: character.encode("unicode_escape").decode())


def printable_json(text: str) -> str:
    r"""A JSON text of the same value, with its unprintable characters as JSON's escapes, such as `\u001b`."""
    # Newlines are kept: in JSON they are only between values.
    return _escaped(text, "\n", lambda character: json.dumps(character)[1:-1])


def _escaped(text: str, kept: str, escape: Callable[[str], str]) -> str:
    if text.isprintable():
        return text

    def replace(found: re.Match[str]) -> str:
        character = found[0]
        return character if character.isprintable() or character in kept else escape(character)

    return _CANDIDATES.sub(replace, text)
