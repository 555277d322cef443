"""Programs in other languages, with clients of RabbitMQ that are not rpcq's: what they need, and how they are run."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from support.harness import Unavailable
from support.installing import apt_install, can_apt_install

PROGRAMS: Final = Path(__file__).parents[1] / "interop" / "programs"
PATIENCE: Final = 25.0
"""Programs end by themselves within 20 seconds, or are ended."""

INSTALLING: Final = 180.0
"""Seconds that npm may take, and the packages of Debian."""

BUILDING: Final = 120.0
"""Seconds that building a program may take."""

Line = dict[str, Any]


def unavailable(why: str) -> NoReturn:
    """Skip the test, because a language is not installed. With RPCQ_TEST_FOREIGN, as in CI, it fails instead."""
    import pytest  # the benchmarks, which build programs too, do without

    if os.environ.get("RPCQ_TEST_FOREIGN"):
        pytest.fail(why, pytrace=False)
    pytest.skip(why)


async def run(*command: str | Path, stdin: str = "") -> list[Line]:
    """Runs a program to its end; the JSON lines that it printed."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(stdin.encode()), PATIENCE)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"{command} ended with {process.returncode}\n{out.decode()}\n{err.decode()}"
    return [json.loads(line) for line in out.splitlines()]


class Server:
    """A server that runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def next_line(self) -> Line:
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), PATIENCE)
        assert line, "the server ended before it printed another line; see its stderr above"
        parsed: Line = json.loads(line)
        return parsed

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()
        await asyncio.wait_for(self._process.communicate(), PATIENCE)


@asynccontextmanager
async def serving(*command: str | Path) -> AsyncIterator[Server]:
    """Runs a server that prints {"ready": true} when it serves."""
    process = await asyncio.create_subprocess_exec(*map(str, command), stdout=asyncio.subprocess.PIPE)
    server = Server(process)
    try:
        assert await server.next_line() == {"ready": True}
        yield server
    finally:
        await server.stop()


_JARS: Final = ("/usr/share/java/amqp-client.jar", "/usr/share/java/slf4j-api.jar")
_GO: Final = {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOFLAGS": "", "GOTOOLCHAIN": "local"}


@dataclass(frozen=True)
class Runtime:
    """A language with a client of RabbitMQ.

    Attributes:
        source: the program, in `tests/interop/programs`; it is a client and a server.
        packages: those of Debian and Ubuntu that it needs.
        check: a command that succeeds where they are installed.
        build: a command that makes a program from the source, as `{source}`, in `{folder}`; empty for none.
        command: what runs it.

    """

    name: str
    source: str
    packages: tuple[str, ...]
    check: tuple[str, ...]
    command: tuple[str, ...]
    build: tuple[str, ...] = ()

    def prepare(self, folder: Path, say: Callable[[str], None], beside: Sequence[Runtime] | None = None) -> list[str]:
        """The command that runs the program; `Unavailable`, saying what to install, where it cannot be run.

        What is missing for the languages in `beside`, by default all, is installed with it.
        """
        if not self._works() and can_apt_install():
            wanting = [it for it in (self, *(RUNTIMES if beside is None else beside)) if not it._works()]
            packages = sorted({package for runtime in wanting for package in runtime.packages})
            say(f"installing {', '.join(packages)} with apt-get, which takes a minute (root on Debian or Ubuntu)")
            apt_install(*packages)
        if not self._works():
            wanted = " ".join(self.packages)
            raise Unavailable(f"no {self.name} with a client of RabbitMQ: install {wanted} (of Debian and Ubuntu)")
        places = {"source": str(PROGRAMS / self.source), "folder": str(folder)}
        if self.build:
            environ = {**os.environ, **_GO, "GOCACHE": str(folder / "cache")}
            command = [part.format(**places) for part in self.build]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=BUILDING, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return [part.format(**places) for part in self.command]

    def _works(self) -> bool:
        if shutil.which(self.check[0]) is None:
            return False
        return subprocess.run(self.check, capture_output=True, timeout=BUILDING, check=False).returncode == 0


RUNTIMES: Final = (
    Runtime(
        "Ruby",
        "foreign.rb",
        ("ruby", "ruby-bunny"),
        ("ruby", "-e", 'require "bunny"'),
        ("ruby", "{source}"),
    ),
    Runtime(
        "PHP",
        "foreign.php",
        ("php-cli", "php-amqp", "php-amqplib"),
        ("php", "-r", 'require "PhpAmqpLib/autoload.php"; exit(extension_loaded("amqp") ? 0 : 1);'),
        ("php", "{source}"),
    ),
    Runtime(
        "Perl",
        "foreign.pl",
        ("perl", "libanyevent-rabbitmq-perl"),
        ("perl", "-MAnyEvent::RabbitMQ", "-e", "1"),
        ("perl", "{source}"),
    ),
    Runtime(
        "C",
        "foreign.c",
        ("gcc", "libc6-dev", "librabbitmq-dev"),
        ("gcc", "-E", "-include", "amqp.h", "-x", "c", "/dev/null"),
        ("{folder}/foreign",),
        ("gcc", "-Wall", "-Wextra", "-Werror", "{source}", "-lrabbitmq", "-o", "{folder}/foreign"),
    ),
    Runtime(
        "Java",
        "Foreign.java",
        ("default-jdk-headless", "librabbitmq-client-java", "libslf4j-java"),
        ("sh", "-c", f"command -v javac && test -f {_JARS[0]} && test -f {_JARS[1]}"),
        ("java", "-cp", ":".join((*_JARS, "{folder}")), "Foreign"),
        ("javac", "-cp", ":".join(_JARS), "-d", "{folder}", "{source}"),
    ),
    Runtime(
        "Go",
        "foreign.go",
        ("golang-go", "golang-github-rabbitmq-amqp091-go-dev"),
        ("sh", "-c", "command -v go && test -d /usr/share/gocode/src/github.com/rabbitmq/amqp091-go"),
        ("{folder}/foreign",),
        ("go", "build", "-o", "{folder}/foreign", "{source}"),
    ),
)
"""Python (pika) and Node (amqplib, from npm) need nothing of Debian but node, and are run as `test_interop.py` says."""
