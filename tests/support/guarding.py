"""The guard's process, which `guard.py` starts: it runs a node if asked to, and cleans up once its input closes.

It imports nothing of the tests, as it is run by its path.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any


class _Ended(Exception):
    """A signal asked the guard to end."""


def main() -> int:
    """The guard process: start the node if one is asked for, do as told until our input ends, clean up."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _Ended

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Unbuffered, octet by octet: what follows the line is read with select.
    line = io.FileIO(0, closefd=False).readline()
    if not line.endswith(b"\n"):
        return 0
    spec: dict[str, Any] = json.loads(line)
    if "folder" not in spec:
        with contextlib.suppress(_Ended):
            for _ in _commands(spec["parent"], lambda: None):
                pass
        for command in spec.get("undo", ()):
            with contextlib.suppress(OSError):
                subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if "label" in spec:
            remove_containers(spec["label"])
        return 0
    folder = Path(spec["folder"])
    try:
        with contextlib.suppress(_Ended):
            _run_node(spec, folder)
    finally:
        # A second signal must not cut this short: it is over in moments.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        kill_children()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _run_node(spec: Mapping[str, Any], folder: Path) -> None:
    if sys.platform == "linux":
        adopt_orphans()

    def start(command: Sequence[str]) -> int:
        with (folder / "output").open("ab") as output:
            child = subprocess.Popen(
                command,
                env=spec["environ"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent(),  # noqa: PLW1509 - the guard has one thread
            )
        _children.append(child)
        return child.pid

    if spec["epmd"]:
        # Otherwise the node starts one, as a daemon, which on other systems than Linux would get away. It stays when
        # the node goes, and in a cluster it is that of the others too; where there is one, this one ends at once.
        start([spec["epmd"]])
    node: int | None = start(spec["command"])

    def check() -> None:
        nonlocal node
        for pid in reap():
            if pid == node:
                node = None
                (folder / "exited").touch()

    for command in _commands(spec["parent"], check):
        # Until `check` has reaped it, the pid is that of the node and of nothing else.
        if command == "start" and node is None:
            node = start(spec["command"])
        elif command in _SIGNALS and node is not None:
            os.kill(node, _SIGNALS[command])


_SIGNALS = {
    "interrupt": signal.SIGINT,
    "kill": signal.SIGKILL,
    "terminate": signal.SIGTERM,
    "pause": signal.SIGSTOP,
    "resume": signal.SIGCONT,
}


def _commands(parent: int, check: Callable[[], None]) -> Iterator[str]:
    """The lines that come until standard input closes. The parent is looked at too: a fork may hold the pipe open."""
    rest = b""
    while os.getppid() == parent:
        check()
        if select.select([0], [], [], 0.2)[0]:
            data = os.read(0, 4096)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from (line.decode() for line in lines)


_children: list[subprocess.Popen[bytes]] = []
"""What the guard started, for systems where the kernel does not list a process's children."""


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def adopt_orphans() -> None:
    """Make this process the parent of descendants that lose theirs, so that none can get out of sight."""
    _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def die_with_parent() -> Callable[[], None] | None:
    """For a new process: be killed when its parent dies. It is what remains if the guard itself is killed."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # loaded before the fork: between fork and exec little is safe
    return lambda: prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def kill_children(seconds: float = 10.0) -> None:
    """Kill every child and wait for it, and for what it leaves to us by ending; the data is to be thrown away."""
    deadline = time.monotonic() + seconds
    for child in _children:
        child.kill()
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text("ascii").split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def reap() -> Iterator[int]:
    """Take note of the children that have ended, adopted ones too, and give their pids."""
    with contextlib.suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            yield pid


def remove_containers(label: str) -> None:
    """Remove the containers with a label, running or not, their volumes, and the networks with that label."""
    from testcontainers.core.docker_client import DockerClient

    client: Any = DockerClient().client
    labelled = {"label": f"rpcq-test={label}"}
    for container in client.containers.list(all=True, filters=labelled):
        if container.status == "paused":
            container.unpause()  # some versions of Docker do not end one that is paused
        container.remove(force=True, v=True)
    for network in client.networks.list(filters=labelled):
        network.remove()


if __name__ == "__main__":
    sys.exit(main())
