"""Which process this is, since sockets and event loops do not survive a fork; what it is of, and how it is run."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import count
from typing import Any, TypeVar

from rpcq.errors import UsageError

T = TypeVar("T")

_forks = count(1)
generation = 0
"""How many forks lie between this process and the one that imported this."""


def _forked() -> None:
    global generation  # noqa: PLW0603 - one number for the process, changed here alone
    generation = next(_forks)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Place:
    """The event loop and the process that something was opened in: it can be used in no other.

    Args:
        what: names it, for messages: "this client".

    Raises:
        RuntimeError: no event loop runs.

    """

    __slots__ = ("_generation", "_loop", "_thread", "_what")

    def __init__(self, what: str) -> None:
        self._what = what
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._generation = generation

    def check(self) -> None:
        """Check that this is still the place.

        Raises:
            UsageError: it is another event loop, or another process.

        """
        if self._generation != generation:
            msg = f"{self._what} was opened before a fork; open one in each process, after the fork"
            raise UsageError(msg)
        # As good as asking for the running loop, which is a system call in Python 3.11.
        if threading.get_ident() != self._thread or not self._loop.is_running():
            raise UsageError(f"{self._what} was opened in another event loop; open one in each loop")


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
