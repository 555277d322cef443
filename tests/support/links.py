"""Links between the nodes of a cluster that lose what is sent over them, for as long as a test wants.

Packets are dropped by a rule of iptables where they arrive, so that who sends them is told nothing. A container has a
network namespace for such rules. Nodes on this machine share the loopback interface: each has an address of that to
itself, which it listens on for the others and calls them from. What clients send is never touched.

All this takes root, on Linux; otherwise there is `Unavailable`.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from support.guard import Guard
from support.harness import Unavailable, brief
from support.servers import Server

__all__ = ["Links", "check_links", "own_addresses"]

COMMAND_SECONDS = 10.0


def own_addresses(count: int) -> list[str]:
    """Addresses of the loopback network, side by side, that nobody else is likely to use."""
    one, two = random.SystemRandom().choices(range(1, 255), k=2)
    return [f"127.{one}.{two}.{number}" for number in range(1, count + 1)]


def check_links() -> None:
    """Raise `Unavailable` if no link can be cut on this machine."""
    missing = [program for program in ("iptables", "nsenter") if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        why = f"missing: {', '.join(missing)}" if missing else "this is not root"
        raise Unavailable(f"links between nodes cannot be cut: that takes root, iptables and nsenter; {why}")
    _run(["iptables", "--wait", "--list-rules", "INPUT"])


class Links:
    """The links between some servers, each of which goes one way; whole again at the end, whatever becomes of us."""

    def __init__(self, servers: Sequence[Server]) -> None:
        places = [server.reached() for server in servers]
        # In a container the rules go away with it; those of this machine are also the business of a guard.
        rules = [
            _rule("--delete", start, end)
            for start, _ in places
            for end, prefix in places
            if start != end and not prefix
        ]
        self._guard = Guard({"undo": rules})
        self._cut: dict[tuple[str, str], list[str]] = {}

    def cut(self, start: Server, end: Server) -> None:
        """Drop what `start` sends to `end` from now on."""
        (source, _), (destination, prefix) = start.reached(), end.reached()
        if (source, destination) not in self._cut:
            _run([*prefix, *_rule("--insert", source, destination)])
            self._cut[source, destination] = [*prefix, *_rule("--delete", source, destination)]

    def heal(self) -> None:
        """Let everything through."""
        while self._cut:
            _run(self._cut.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._guard.stop()


def _rule(action: str, source: str, destination: str) -> list[str]:
    return [
        *("iptables", "--wait", action, "INPUT", "--source", source, "--destination", destination),
        *("--jump", "DROP"),
    ]


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"links between nodes cannot be cut: {brief(error)}") from error
    if done.returncode != 0:
        raise Unavailable(f"links between nodes cannot be cut: {' '.join(command)}: {done.stderr.strip()}")
