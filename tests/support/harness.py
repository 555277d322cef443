"""What all parts of the harness share: its errors, how it says things to people, and texts for them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

Say = Callable[[str], None]


class Unavailable(Exception):
    """There is no broker to be had this way, or none at all, or the broker in use has no rabbitmqctl."""


class CtlFailed(Exception):
    """rabbitmqctl ran, and said no."""


def to_stderr(text: str) -> None:
    sys.stderr.write(f"broker: {text}\n")
    sys.stderr.flush()


def brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def decoded(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "replace")


def read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text("utf-8", "replace")
    return ""


def tail(text: str, lines: int = 30) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines()[-lines:])
