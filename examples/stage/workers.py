"""Processes that somebody may kill and start: workers, and other programs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

STOP_SECONDS = 10.0
"""Seconds that a process has to end when it is stopped in an orderly way."""


class Programs:
    """Processes of one Python module, each with the same arguments. They inherit the environment.

    Args:
        arguments: those of `python -m`: the module and its own arguments.
        most: the most processes at once.

    """

    def __init__(self, *arguments: str, most: int = 1) -> None:
        self._command = [sys.executable, "-m", *arguments]
        self._processes: list[subprocess.Popen[bytes]] = []
        self.most = most

    @property
    def running(self) -> Sequence[int]:
        """The IDs of the processes that run, the oldest first."""
        self._processes = [process for process in self._processes if process.poll() is None]
        return [process.pid for process in self._processes]

    def start(self) -> int | None:
        """Start one: its process ID; None if there are as many as there may be."""
        if len(self.running) >= self.most:
            return None
        process = subprocess.Popen(self._command)  # noqa: S603 - our own command
        self._processes.append(process)
        return process.pid

    def kill(self) -> int | None:
        """Kill the oldest one, which has no time to give anything back: its process ID; None if none runs."""
        if not self.running:
            return None
        process = self._processes[0]
        process.kill()
        process.wait()
        return process.pid

    def stop(self) -> None:
        """Stop all: workers give their jobs back. One that does not end in time is killed. Blocks until then."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Workers(Programs):
    """Processes of `rpcq worker`, each with the same arguments. They inherit the broker's URL, too.

    Args:
        arguments: those of `rpcq worker`: services, as in `package.module:service`, and options.
        most: the most workers at once.

    """

    def __init__(self, *arguments: str, most: int = 8) -> None:
        super().__init__("rpcq", "worker", *arguments, "--grace", str(STOP_SECONDS / 2), most=most)
