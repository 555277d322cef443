"""What the commands print: markup of Rich and control characters of terminals in it have no effect.

The name of a worker and the message of an error may come from any worker: `plain` or `print_json` prints them.
"""

from __future__ import annotations

from typing import Any

from rich.text import Text

from rpcq.terminal import printable, printable_json
from rpcq.wire import bodies


def plain(text: object, style: str = "", *, lines: bool = False) -> Text:
    """A text for Rich without markup or control characters; `lines` keeps its newlines."""
    return Text(printable(str(text), lines=lines), style=style)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON, for programs."""
    print(printable_json(bodies.dumps(value).decode()))
