"""Which process this is, since sockets and event loops do not survive a fork; what it is of, and how it is run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import count
from typing import Any, TypeVar

T = TypeVar("T")

_forks = count(1)
generation = 0
"""How many forks lie between this process and the one that imported this."""


def _forked() -> None:
    global generation  # noqa: PLW0603 - one number for the process, changed here alone
    generation = next(_forks)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@cache
def own_version() -> str:
    """The version of rpcq that this process runs; "unknown" where it is not installed."""
    try:
        return version("rpcq")
    except PackageNotFoundError:  # run from its folder
        return "unknown"


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop where it is installed."""
    # Not by an ImportError: every traceback of `main` would begin with it.
    if find_spec("uvloop") is None:
        return asyncio.run(main)
    import uvloop  # noqa: PLC0415 - an extra

    return uvloop.run(main)
