"""A real PostgreSQL for the tests: found, or started and taken away again, in the way of `broker.py`.

In this order:

1. ``RPCQ_TEST_POSTGRES``, a URL of a user who may create databases: that server, as it is.
2. A container, where a Docker engine answers.
3. A server of our own from installed programs: own port, own data folder; as root it runs as another user, since
   PostgreSQL refuses to run as root.
4. As root on Debian or Ubuntu: install ``postgresql`` with apt, then as 3.
5. Otherwise `Unavailable`, saying what to install. Nothing is ever skipped quietly.

What is started belongs to a guard (`guard.py`), so that nothing is left when the test process is killed. A test that
takes the server down has one of its own, never that of the session: ``with postgres(own=True) as server``.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from support import containers, installing
from support.containers import new_label, pull_image
from support.guard import Guard
from support.harness import Say, Unavailable, brief, decoded, read, tail, to_stderr
from support.ports import free_ports, unless_a_port_is_taken

__all__ = ["Postgres", "postgres"]

IMAGE = "postgres:17-alpine"
USER = "rpcq"
DATABASE = "postgres"
"""The database that every server has."""

START_SECONDS = 60.0
URL_SECONDS = 10.0
STOP_SECONDS = 30.0

FOLDERS = "/usr/lib/postgresql/*/bin"
"""Where Debian has the programs of each version: they are not on the PATH."""

OPTIONS = ("listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off", "max_connections=300")
"""Only the machine may crash without fsync, and the data is to be thrown away."""

ADVICE = f"""\
No PostgreSQL to test against. Do one of these:
  - start Docker (the tests use the image {IMAGE}, and need the Python package testcontainers),
  - install a server (Debian, Ubuntu: apt-get install postgresql; macOS: brew install postgresql),
  - set RPCQ_TEST_POSTGRES to a running one, as in RPCQ_TEST_POSTGRES=postgresql://user:password@localhost/postgres"""


@dataclass
class Postgres:
    """A running PostgreSQL. All its methods block."""

    url: str = field(repr=False)
    """Of a database and a user who may create others."""
    origin: str
    """Where it comes from, for people."""
    _server: Server | None = field(default=None, repr=False)

    def create(self, name: str) -> str:
        """Make a database, and return its URL."""
        self._do("CREATE DATABASE {}", name)
        return urlsplit(self.url)._replace(path=f"/{name}").geturl()

    def drop(self, name: str) -> None:
        """Delete a database, whoever is connected to it."""
        self._do("DROP DATABASE {} WITH (FORCE)", name)

    def _do(self, statement: str, name: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(sql.Identifier(name)))

    def down(self, *, kill: bool = False) -> None:
        """End it, with SIGKILL or else in an orderly way that does not wait for clients, and wait until it is gone."""
        self._ours().down(kill=kill)

    def up(self) -> None:
        """Start it again, on the same port with its data, and wait until it answers."""
        self._ours().up()

    def _ours(self) -> Server:
        if self._server is None:
            raise Unavailable(f"the server of {self.origin} is not ours to take down: use one started by the tests")
        return self._server

    def stop(self) -> None:
        """Take away what was started, if anything was; calling again does nothing."""
        server, self._server = self._server, None
        if server is not None:
            server.stop()


@contextlib.contextmanager
def postgres(say: Say = to_stderr, *, own: bool = False) -> Iterator[Postgres]:
    """Find or start a server, and take away at the end what was started. `say` gets what people should know.

    With `own` it is always started, also where there is a URL.
    """
    found = first(*ways("" if own else os.environ.get("RPCQ_TEST_POSTGRES", ""), say), say)
    try:
        yield found
    finally:
        found.stop()


# --- Choosing --------------------------------------------------------------------------------------------------------

Ways = Mapping[str, Callable[[], Postgres]]


def ways(url: str, say: Say) -> tuple[Ways, list[str]]:
    """The ways to try, in order, and why there are no others. A URL that was given is the only way."""
    if url:
        return {"RPCQ_TEST_POSTGRES": lambda: use_url(url)}, []
    found: dict[str, Callable[[], Postgres]] = {}
    reasons = []
    if problem := containers.engine_problem():
        reasons.append(f"container: {problem}")
    else:
        found["container"] = lambda: unless_a_port_is_taken(lambda: start(Container(say)))
    if (programs := find_programs()) is not None:
        found["private server"] = lambda: start_private(programs)
    else:
        reasons.append(f"private server: no initdb and postgres in {FOLDERS}, nor on PATH")
        if installing.can_apt_install():
            found["private server after apt-get install"] = lambda: start_private(install(say))
    return found, reasons


def first(ways: Ways, reasons: Sequence[str], say: Say) -> Postgres:
    """What the first way that works gives; `Unavailable` with every reason and the advice otherwise."""
    reasons = list(reasons)
    for number, (way, begin) in enumerate(ways.items(), start=1):
        try:
            return begin()
        except Unavailable as error:
            reasons.append(f"{way}: {error}")
            if number < len(ways):
                say(f"{way}: {error}; going on to: {list(ways)[number]}")
    raise Unavailable("\n".join([ADVICE, "What was tried:", *(f"  - {reason}" for reason in reasons)]))


def find_programs(folders: str = FOLDERS, path: str | None = None) -> Path | None:
    """The folder of `initdb` and `postgres`: of the newest version that Debian has installed, else on PATH."""
    installed = [Path(folder) for folder in glob.glob(folders)]  # noqa: PTH207 - the pattern is absolute
    newest = sorted(installed, key=lambda it: [int(each) for each in re.findall(r"\d+", it.parent.name)], reverse=True)
    on_path = shutil.which("initdb", path=path)
    for folder in (*newest, *([Path(on_path).resolve().parent] if on_path else [])):
        if all(os.access(folder / name, os.X_OK) for name in ("initdb", "postgres")):
            return folder
    return None


def install(say: Say) -> Path:
    """apt-get install postgresql, without a service coming up; the folder of its programs."""
    say("installing postgresql with apt-get, which takes a minute (root on Debian or Ubuntu)")
    installing.apt_install("postgresql")
    programs = find_programs()
    if programs is None:
        raise Unavailable(f"apt-get installed postgresql, but there are no initdb and postgres in {FOLDERS}")
    return programs


def wait_for(url: str, seconds: float, gone: Callable[[], str | None] = lambda: None) -> str:
    """Wait until a server answers, and return its version. `gone` says why there is no point in waiting."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with psycopg.connect(url, connect_timeout=2) as connection:
                return "{}.{}".format(*divmod(connection.info.server_version, 10000))
        except psycopg.OperationalError as error:
            if (why := gone()) is not None:
                raise Unavailable(why) from error
            if time.monotonic() > deadline:
                raise Unavailable(f"no PostgreSQL answers within {seconds:.0f} s: {brief(error)}") from error
        time.sleep(0.05)


def use_url(url: str) -> Postgres:
    """The server of RPCQ_TEST_POSTGRES. That it answers is checked here, to fail once and clearly."""
    if urlsplit(url).scheme not in ("postgresql", "postgres"):
        raise Unavailable("not a URL of PostgreSQL: it has to begin with postgresql://")
    return Postgres(url, f"RPCQ_TEST_POSTGRES ({wait_for(url, URL_SECONDS)})")


# --- What is started -------------------------------------------------------------------------------------------------


class Server(ABC):
    """A PostgreSQL that was started here."""

    kind: str
    """What it is, for people."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self.host = "127.0.0.1"
        self.password = secrets.token_hex(8)

    @property
    def url(self) -> str:
        return f"postgresql://{USER}:{self.password}@{self.host}:{self.port}/{DATABASE}"

    def wait(self) -> str:
        """Wait until it answers, and return its version."""
        return wait_for(self.url, START_SECONDS, self._gone)

    @abstractmethod
    def down(self, *, kill: bool) -> None:
        """End it, and wait until it is gone."""

    @abstractmethod
    def up(self) -> None:
        """Start it again, and wait until it answers."""

    @abstractmethod
    def stop(self) -> None:
        """Take it away, and its data."""

    @abstractmethod
    def _gone(self) -> str | None:
        """Why there is no point in waiting, if there is none."""


def start(server: Server) -> Postgres:
    """Wait for a server that is starting, and take it away if it does not come."""
    try:
        version = server.wait()
    except BaseException:
        server.stop()
        raise
    return Postgres(server.url, f"{server.kind} ({version})", server)


class Container(Server):
    """A container of `IMAGE`. Whatever goes wrong on the way makes containers unavailable, no more than that."""

    kind = f"container {IMAGE}"

    def __init__(self, say: Say) -> None:
        super().__init__()
        pull_image(say, IMAGE)
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.container import DockerContainer

        testcontainers_config.ryuk_disabled = True  # the guard does what it would do
        label = new_label()
        self._guard = Guard({"label": label})
        container = DockerContainer(IMAGE).with_bind_ports(5432, self.port)
        container.with_env("POSTGRES_USER", USER).with_env("POSTGRES_PASSWORD", self.password)
        container.with_env("POSTGRES_DB", DATABASE).with_kwargs(labels={"rpcq-test": label})
        self._client: Any = container.get_docker_client().client
        try:
            container.start()
            self._container: Any = container.get_wrapped_container()
            self.host, self.port = container.get_container_host_ip(), int(container.get_exposed_port(5432))
        except BaseException as error:
            self.stop()
            if not isinstance(error, Exception):
                raise
            raise Unavailable(f"the container could not be started ({brief(error)})") from error

    def down(self, *, kill: bool) -> None:
        self._container.kill("SIGKILL" if kill else "SIGINT")
        self._container.wait(timeout=STOP_SECONDS)

    def up(self) -> None:
        self._container.start()
        self.wait()

    def stop(self) -> None:
        self._guard.stop()
        self._client.close()

    def _gone(self) -> str | None:
        self._container.reload()
        if self._container.status == "running":
            return None
        return f"the container ended while starting:\n{tail(decoded(self._container.logs()))}"


def start_private(programs: Path) -> Postgres:
    """A server of our own from the programs of that folder."""
    return unless_a_port_is_taken(lambda: start(Private(programs)))


class Private(Server):
    """A server in a folder of its own, under a guard of its own; starting, once this is made."""

    kind = "private server"

    def __init__(self, programs: Path) -> None:
        super().__init__()
        self._programs = programs
        # The server reports to no service manager, and reads no settings of whoever runs the tests.
        kept = {name: it for name, it in os.environ.items() if not name.startswith(("PG", "NOTIFY_SOCKET"))}
        self._environ = {**kept, "LC_ALL": "C", "TZ": "UTC"}
        self._folder = Path(tempfile.mkdtemp(prefix="rpcq-test-"))
        self._exited = self._folder / "exited"
        try:
            self._initialise()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        options = [*OPTIONS, f"port={self.port}"]
        # From here on the folder is the guard's: it outlives us, whatever becomes of us.
        self._guard = Guard(
            {
                "folder": str(self._folder),
                "environ": self._environ,
                "command": [
                    *_as_another_user(),
                    str(programs / "postgres"),
                    *("-D", str(self._folder / "data")),
                    *(part for option in options for part in ("-c", option)),
                ],
                "epmd": None,
            }
        )

    def _initialise(self) -> None:
        secret = self._folder / "password"
        secret.write_text(self.password, "utf-8")
        if os.geteuid() == 0:
            account = _account()
            for path in (self._folder, secret):
                os.chown(path, account.pw_uid, account.pw_gid)
        command = [
            *_as_another_user(),
            str(self._programs / "initdb"),
            *("-D", str(self._folder / "data"), "-U", USER, f"--pwfile={secret}", "--auth=scram-sha-256"),
            *("--encoding=UTF8", "--locale=C", "--no-sync"),
        ]
        try:
            done = subprocess.run(
                command,
                env=self._environ,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=START_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"initdb cannot be run: {brief(error)}") from error
        if done.returncode != 0:
            raise Unavailable(f"initdb failed:\n{tail(decoded(done.stdout))}")

    def down(self, *, kill: bool) -> None:
        # SIGINT is PostgreSQL's fast shutdown; SIGTERM waits for clients to leave.
        self._guard.tell("kill" if kill else "interrupt")
        deadline = time.monotonic() + STOP_SECONDS
        while not self._exited.exists():
            if time.monotonic() > deadline:
                raise Unavailable(f"the server did not end within {STOP_SECONDS:.0f} s")
            time.sleep(0.02)

    def up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._exited.exists():
            # Before the guard starts it, and by us, so that the file is there again only if this start fails: after a
            # kill it does, as long as the processes of its connections are ending.
            self._exited.unlink()
            self._guard.tell("start")
            try:
                self.wait()
            except Unavailable:
                if not self._exited.exists() or time.monotonic() > deadline:
                    raise

    def stop(self) -> None:
        self._guard.stop()

    def _gone(self) -> str | None:
        if not self._exited.exists():
            return None
        return f"the server ended while starting:\n{tail(read(self._folder / 'output'))}"


def _account() -> pwd.struct_passwd:
    """Whom a server runs as that root starts."""
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise Unavailable("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")


def _as_another_user() -> list[str]:
    """What comes before a command that root runs; nothing for others.

    A process that changes its user is no longer killed with its parent, unless it asks for that once more.
    """
    if os.geteuid() != 0:
        return []
    program = shutil.which("setpriv")
    if program is None:
        raise Unavailable("PostgreSQL does not run as root, and there is no setpriv (of util-linux) to change the user")
    account = _account()
    return [
        *(program, f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"),
        *(["--pdeathsig=KILL"] if sys.platform == "linux" else []),
    ]
