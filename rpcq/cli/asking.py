"""Asks for confirmation."""

from __future__ import annotations

import sys

from rpcq.cli.options import errors
from rpcq.cli.text import plain


def confirmed(question: str) -> bool:
    """Ask on standard error: standard output may go to a program. No answer is a no."""
    errors.print(plain(f"{question} [y/N]"), end=" ", soft_wrap=True)
    answer = sys.stdin.readline()
    if not answer:
        errors.print(plain("nobody answers: give --yes", "red"))
    return answer.strip().lower() in ("y", "yes")
