"""What the commands print: text that came from elsewhere is shown as it is, without Rich's markup or a terminal's.

A name or an error's message may come from any worker, so it goes through `plain` or `print_json` before it is printed.
"""

from __future__ import annotations

from typing import Any

from rich.text import Text

from rpcq.terminal import printable, printable_json
from rpcq.wire import bodies


def plain(text: object, style: str = "", *, lines: bool = False) -> Text:
    """A text for Rich, printed as it is; `lines` keeps its newlines."""
    return Text(printable(str(text), lines=lines), style=style)


def print_json(value: Any) -> None:
    """Print a value as JSON in one line, for programs."""
    print(printable_json(bodies.dumps(value).decode()))
