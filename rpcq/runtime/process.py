"""The process: forks, after which sockets and event loops cannot be used; rpcq's version; running a coroutine."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from functools import cache
from importlib.util import find_spec
from itertools import count
from typing import Any, TypeVar

from rpcq.errors import UsageError
from rpcq.runtime.distribution import DISTRIBUTION

T = TypeVar("T")

_forks = count(1)
generation = 0
"""Number of forks from the process that imported this module to this process."""


def _forked() -> None:
    global generation  # noqa: PLW0603 - one number for the process; only this function changes it
    generation = next(_forks)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Place:
    """The event loop and the process that something was opened in. It can be used only there.

    Args:
        what: name of that thing for messages, such as "this client".

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
        """Check that the caller is in the same event loop and the same process.

        Raises:
            UsageError: the caller is in another event loop or another process.

        """
        if self._generation != generation:
            msg = f"{self._what} was opened before a fork; open one in each process, after the fork"
            raise UsageError(msg)
        # Checks the same as asking for the running loop, without its system call in Python 3.11.
        if threading.get_ident() != self._thread or not self._loop.is_running():
            raise UsageError(f"{self._what} was opened in another event loop; open one in each loop")


@cache
def own_version() -> str:
    """Return the version of rpcq in this process; "unknown" if rpcq is not installed."""
    from importlib import metadata  # noqa: PLC0415 - seldom needed, and slow to import

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:  # it runs from a source folder
        return "unknown"


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a new event loop; use uvloop if it is installed."""
    # Do not catch an ImportError here: every traceback of `main` would start with it.
    if find_spec("uvloop") is None:
        return asyncio.run(main)
    import uvloop  # noqa: PLC0415 - an extra

    return uvloop.run(main)
