"""Packages of Debian that the tests install where they may: as root, on a system with apt."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from support.harness import Unavailable, decoded, tail

APT_SECONDS = 900.0


def can_apt_install() -> bool:
    """Root, on a system with apt and Debian's packages."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None and is_debian(Path("/etc/os-release"))


def apt_install(*packages: str) -> None:
    """apt-get install packages, without a service of them coming up; one at a time on this machine."""
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    deadline = time.monotonic() + APT_SECONDS
    options = ("-q", "-o", "DPkg::Lock::Timeout=120")
    output = ""
    with locked(Path(tempfile.gettempdir(), "rpcq-apt.lock")), no_services_started(Path("/usr/sbin/policy-rc.d")):
        # A failed update (one dead third-party source is enough) need not keep the package from being installed.
        for action in (("update",), ("install", "-y", "--no-install-recommends", *packages)):
            try:
                done = subprocess.run(
                    ["apt-get", *options, *action],
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    timeout=max(1.0, deadline - time.monotonic()),
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise Unavailable(f"apt-get {action[0]} did not end within {APT_SECONDS:.0f} s") from error
            output += decoded(done.stdout)
    if done.returncode != 0:
        raise Unavailable(f"apt-get install {' '.join(packages)} failed:\n{tail(output)}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for, and have, a lock among processes: each process of a test run may be the one that installs."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given up when the file is closed
        yield


@contextlib.contextmanager
def no_services_started(policy: Path) -> Iterator[None]:
    """Keep packages from starting their services meanwhile, unless the machine has a policy of its own."""
    try:
        handle = os.open(policy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o755)
    except FileExistsError:
        yield
        return
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as script:
            # It says no only while this process lives: left behind by a kill, it changes nothing.
            script.write(f"#!/bin/sh\nkill -0 {os.getpid()} 2>/dev/null && exit 101\nexit 0\n")
        policy.chmod(0o755)
        yield
    finally:
        policy.unlink(missing_ok=True)


def is_debian(os_release: Path) -> bool:
    """Whether an os-release file is that of Debian, Ubuntu, or a system made from them."""
    try:
        text = os_release.read_text("utf-8")
    except OSError:
        return False
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    names = f"{values.get('ID', '')} {values.get('ID_LIKE', '')}".replace('"', " ").replace("'", " ").split()
    return not {"debian", "ubuntu"}.isdisjoint(names)
