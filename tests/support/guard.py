"""Our end of a guard: a process that takes away what the tests started, however the tests end.

The guard is `guarding.py`, run as a small process in a session of its own, which waits for its standard input to close,
and then kills and deletes what it guards. A normal end closes that pipe, and so does the kernel when the test process
is killed, so that there is one way of cleaning up and every run uses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.harness import Unavailable, to_stderr

STOP_SECONDS = 30.0
PROGRAM = Path(__file__).resolve().with_name("guarding.py")


class Guard:
    """Our end of a guard process, which takes away what `spec` describes once its standard input closes.

    The first line it is sent is `spec`. The guard of a node takes further ones: `start`, and those of `_SIGNALS` in
    `guarding.py`. What became of them is seen in the node's folder: the guard makes the file `exited` whenever the node
    has ended.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        # A session of its own: Ctrl-C goes to every process of the terminal's group, and must not go to this one.
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._input = self._process.stdin
        self._input.write(json.dumps({**spec, "parent": os.getpid()}).encode() + b"\n")
        self._input.flush()

    def tell(self, command: str) -> None:
        """Send the guard a command."""
        try:
            self._input.write(command.encode() + b"\n")
            self._input.flush()
        except (OSError, ValueError) as error:
            raise Unavailable("what guards the broker has ended, and the broker with it") from error

    def stop(self) -> None:
        """Have the guard clean up, and wait for it."""
        with contextlib.suppress(OSError):
            self._input.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            to_stderr(f"the guard (pid {self._process.pid}) did not end within {STOP_SECONDS:.0f} s")
            self._process.kill()
            self._process.wait()
