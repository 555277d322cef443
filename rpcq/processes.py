"""Which process this is: sockets and event loops do not survive a fork."""

from __future__ import annotations

import os
from itertools import count

_forks = count(1)
generation = 0
"""How many forks lie between this process and the one that imported this."""


def _forked() -> None:
    global generation  # noqa: PLW0603 - one number for the process, changed here alone
    generation = next(_forks)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
