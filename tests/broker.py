"""A real RabbitMQ for the tests and the benchmarks: found, or started and taken away again.

In this order:

1. ``RPCQ_TEST_URL``, an AMQP URL: that broker, as it is.
2. A container, where a Docker engine answers.
3. A node of our own from an installed ``rabbitmq-server``: own ports, own name, own data folder.
4. As root on Debian or Ubuntu: install ``rabbitmq-server`` with apt, then as 3.
5. Otherwise :class:`Unavailable`, saying what to install. Nothing is ever skipped quietly.

``RPCQ_TEST_IMAGE``, an image such as ``rabbitmq:4.3-management``, leaves the second way alone, with that image: so one
chooses the version. ``RPCQ_TEST_WAY`` leaves one way alone too: ``container``, or ``node`` for 3 and 4. Both hold for
whatever is started here or by `cluster.py`, also for what a test starts beside the broker of ``RPCQ_TEST_URL``.

What is started belongs to a *guard*: this same file run as a small process in a session of its own, which waits
for its standard input to close, and then kills and deletes what it guards. A normal end closes that pipe, and so
does the kernel when the test process is killed, so that there is one way of cleaning up and every run uses it.

A fault test takes down a broker of its own, never that of the session: ``with broker(setup=Setup()) as own``.

``python tests/broker.py -- command args…`` runs a command with ``RPCQ_URL`` and ``RPCQ_TEST_URL`` set.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import io
import json
import os
import random
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

__all__ = [
    "Broker",
    "Container",
    "CtlFailed",
    "Facts",
    "Node",
    "Server",
    "Setup",
    "Unavailable",
    "Way",
    "broker",
    "first",
    "gather",
    "install",
    "plan",
]

IMAGE = "rabbitmq:4.0-management"
"""The image of containers, where RPCQ_TEST_IMAGE does not name another."""
VHOST = "rpcq-test"
"""Default vhost of a broker started here: `Broker.url` is a fresh vhost without a call of rabbitmqctl."""

CONTAINER_FOLDER = "/tmp/rpcq-test"  # in the container, where nobody else is
CONTAINER_PORT = 5680
WAIT = f"until [ -e {CONTAINER_FOLDER}/ready ]; do sleep 0.1; done; exec docker-entrypoint.sh rabbitmq-server"
"""The setup of a container: the folder of its files, the first of its further ports, and how it waits for the files."""

START_SECONDS = 60.0
CTL_SECONDS = 60.0
ENGINE_SECONDS = 3
URL_SECONDS = 10.0
STOP_SECONDS = 30.0
PORT_TAKEN = ("eaddrinuse", "already in use", "address in use", "already allocated")
APT_SECONDS = 900.0

PORTS = range(20000, 32000)
"""Where free ports are looked for.

Below those that the kernel gives to outgoing connections, on any system: a client that tries a port of that range
while nobody listens there may be given the same one as its own, is then connected to itself, and the broker that
was taken down cannot come back.
"""

SERVER_FOLDERS = ("/usr/lib/rabbitmq/bin", "/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")
"""Where a server may be that is not on PATH: the sbin folders are not on an ordinary user's PATH on Debian."""

ADVICE = f"""\
No RabbitMQ to test against. Do one of these:
  - start Docker (the tests use the image {IMAGE}, and need the Python package testcontainers),
  - install rabbitmq-server (Debian, Ubuntu: apt-get install rabbitmq-server; macOS: brew install rabbitmq),
  - set RPCQ_TEST_URL to a running broker, as in RPCQ_TEST_URL=amqp://guest:guest@localhost:5672/"""

Say = Callable[[str], None]


class Unavailable(Exception):
    """There is no broker to be had this way, or none at all, or the broker in use has no rabbitmqctl."""


class CtlFailed(Exception):
    """rabbitmqctl ran, and said no."""


def _say(text: str) -> None:
    sys.stderr.write(f"broker: {text}\n")
    sys.stderr.flush()


# --- What is asked of a broker ---------------------------------------------------------------------------------------


@dataclass
class Broker:
    """A running RabbitMQ. All its methods block, for a second or more."""

    url: str
    """AMQP URL of the vhost given out: one of its own, unless the URL came from RPCQ_TEST_URL."""
    origin: str
    """Where it comes from, for people."""
    version: str
    """As the broker says it in its server properties, or "unknown"."""
    _ctl: Callable[[Sequence[str]], str] | None = field(default=None, repr=False)
    _stop: Callable[[], None] | None = field(default=None, repr=False)
    ports: Mapping[int, int] = field(default_factory=dict)
    """The further ports of a `Setup`, in order: what the broker listens on -> where that is to be reached."""
    _server: Server | None = field(default=None, repr=False)

    @property
    def can_ctl(self) -> bool:
        """Whether there is a rabbitmqctl to ask; if not, isolation is by name, and vhosts are not made."""
        return self._ctl is not None

    def ctl(self, *args: str) -> str:
        """Run rabbitmqctl and return what it printed. Blocks for a second or more: Erlang has to start.

        Raises `Unavailable` where there is no rabbitmqctl, and `CtlFailed` when the command fails.
        """
        if self._ctl is None:
            raise Unavailable(
                f"no rabbitmqctl for the broker of {self.origin}: this test needs one started by the tests"
            )
        return self._ctl(args)

    def vhost(self) -> str:
        """Make a fresh vhost with full permissions and return its URL; without rabbitmqctl, return `url` itself."""
        if not self.can_ctl:
            return self.url
        name = f"rpcq-{secrets.token_hex(6)}"
        self.ctl("add_vhost", name)
        self.ctl("set_permissions", "-p", name, unquote(urlsplit(self.url).username or "guest"), ".*", ".*", ".*")
        return with_vhost(self.url, name)

    def drop_vhost(self, url: str) -> None:
        """Delete a vhost made by `vhost`, with all that is in it; without rabbitmqctl, do nothing."""
        if self.can_ctl:
            self.ctl("delete_vhost", vhost_of(url))

    def close_connections(self, url: str, reason: str = "closed by a test") -> None:
        """Have the broker close every client connection of the vhost of `url`."""
        self.ctl("close_all_connections", "--vhost", vhost_of(url), reason)

    def restart(self) -> None:
        """Stop in an orderly way, start again on the same ports with all data, and wait until AMQP answers.

        Clients are told, with `connection.close` and 320. Raises `Unavailable` for a broker not started here.
        """
        server = self._to_be_broken()
        server.down(kill=False)
        server.up()

    def kill(self) -> None:
        """End the broker with SIGKILL: clients are told nothing. Raises `Unavailable` for one not started here.

        RabbitMQ 3.10 writes down which quorum queues it has half a second after the last was declared: one that is
        newer than that is empty afterwards, and has no leader, whatever was confirmed.
        """
        self._to_be_broken().down(kill=True)

    def start(self) -> None:
        """Start what was killed, on the same ports with its data, and wait until AMQP answers."""
        self._to_be_broken().up()

    def _to_be_broken(self) -> Server:
        if self._server is None:
            raise Unavailable(f"the broker of {self.origin} is not ours to take down: use one started by the tests")
        return self._server

    def stop(self) -> None:
        """Take away what was started, if anything was; calling again does nothing."""
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()


@dataclass(frozen=True)
class Setup:
    """What a broker has beyond its plain listener."""

    config: str = ""
    """Lines of rabbitmq.conf. In them {folder} stands for where the files are, and {ports[0]} for the first port."""
    files: Callable[[str], Mapping[str, bytes]] = lambda _: {}
    """The host by which the broker will be reached -> its files, name -> content."""
    ports: int = 0
    """How many further ports it is to have."""
    erl_args: str = ""
    """Further arguments of its Erlang VM."""

    def written(self, host: str, folder: str, ports: Sequence[int]) -> dict[str, bytes]:
        """All files, the configuration with them, by their paths in the folder."""
        return {"conf.d/setup.conf": self.config.format(folder=folder, ports=ports).encode(), **self.files(host)}


PLAIN = Setup()


class Server(ABC):
    """A RabbitMQ that was started here: what `Broker` and a cluster are made of."""

    name: str
    """Of the Erlang node."""
    host: str
    port: int
    """Where it is reached, which a restart does not change."""

    @abstractmethod
    def ctl(self, args: Sequence[str]) -> str:
        """Run its rabbitmqctl."""

    @abstractmethod
    def down(self, *, kill: bool) -> None:
        """End it, with SIGKILL or else in an orderly way, and wait until it is gone."""

    def up(self) -> None:
        """Start it again, and wait until AMQP answers; nothing happens if it runs."""
        self.up_soon()
        self.wait()

    @abstractmethod
    def up_soon(self) -> None:
        """Start it again, without waiting."""

    def wait(self) -> str:
        """Wait until AMQP answers, and return the version."""
        return wait_for_amqp(self.host, self.port, START_SECONDS, self._gone)

    @abstractmethod
    def pause(self) -> None:
        """Let it stand still, with its connections open, as a machine that is suspended."""

    @abstractmethod
    def resume(self) -> None:
        """Let it go on."""

    @abstractmethod
    def reached(self) -> tuple[str, Sequence[str]]:
        """The address by which its kin reach it, and what a command is begun with to see packets that come to that."""

    @abstractmethod
    def _gone(self) -> str | None:
        """Why there is no point in waiting, if there is none."""

    @abstractmethod
    def stop(self) -> None:
        """Take it away, and its data."""


@contextlib.contextmanager
def broker(say: Say = _say, setup: Setup = PLAIN) -> Iterator[Broker]:
    """Find or start a broker, and take away at the end what was started. `say` gets what people should know.

    One with a setup is always started, even if that is `Setup()`: that of RPCQ_TEST_URL has another.
    """
    facts = gather(os.environ if setup is PLAIN else {**os.environ, "RPCQ_TEST_URL": ""})
    found = first(plan(facts), starters(facts, say, setup), facts, say)
    try:
        yield found
    finally:
        found.stop()


def vhost_of(url: str) -> str:
    """The vhost that an AMQP URL names; without a path, and with the path "/", it is the vhost "/"."""
    return unquote(urlsplit(url).path.removeprefix("/")) or "/"


def with_vhost(url: str, vhost: str) -> str:
    """The same URL with another vhost."""
    return urlsplit(url)._replace(path="/" + quote(vhost, safe="")).geturl()


# --- Choosing --------------------------------------------------------------------------------------------------------


class Way(Enum):
    """A way to a broker; the value is for people."""

    URL = "RPCQ_TEST_URL"
    CONTAINER = "container"
    NODE = "private node"
    INSTALL = "private node after apt-get install"


@dataclass(frozen=True)
class Facts:
    """What the choice depends on."""

    url: str = field(default="", repr=False)
    """RPCQ_TEST_URL; not shown, as there may be a password in it."""
    image: str = IMAGE
    """Of containers."""
    way: str = ""
    """The only way to try: RPCQ_TEST_WAY, or "container" where RPCQ_TEST_IMAGE is set; empty for all of them."""
    engine_problem: str = ""
    """Why containers are out of the question; empty if a Docker engine answers."""
    server: Path | None = None
    """A rabbitmq-server that can be run directly."""
    can_install: bool = False
    """Root, on a system with apt and a rabbitmq-server package."""


ALLOWED = {
    "": frozenset(Way),
    "container": frozenset({Way.URL, Way.CONTAINER}),
    "node": frozenset({Way.URL, Way.NODE, Way.INSTALL}),
}
"""RPCQ_TEST_WAY -> the ways that it leaves."""


def plan(facts: Facts) -> tuple[Way, ...]:
    """The ways to try, in order. What was asked for is the only way: another broker would be a surprise."""
    if facts.url:
        return (Way.URL,)
    ways: list[Way] = []
    if not facts.engine_problem:
        ways.append(Way.CONTAINER)
    if facts.server is not None:
        ways.append(Way.NODE)
    elif facts.can_install:
        ways.append(Way.INSTALL)
    return tuple(way for way in ways if way in ALLOWED[facts.way])


Found = TypeVar("Found")


def first(
    ways: Sequence[Way],
    starters: Mapping[Way, Callable[[], Found]],
    facts: Facts,
    say: Say = _say,
    advice: str = ADVICE,
) -> Found:
    """What the first way that works gives; `Unavailable` with every reason and the advice otherwise."""
    reasons = [] if facts.url or not facts.engine_problem else [f"{Way.CONTAINER.value}: {facts.engine_problem}"]
    if facts.way:
        reasons.append(f"no other way than: {facts.way}, as RPCQ_TEST_WAY or RPCQ_TEST_IMAGE says")
    if facts.server is None and not facts.url:
        reasons.append("rabbitmq-server: not on PATH, nor in " + ", ".join(SERVER_FOLDERS))
    for number, way in enumerate(ways, start=1):
        try:
            return starters[way]()
        except Unavailable as error:
            reasons.append(f"{way.value}: {error}")
            if number < len(ways):
                say(f"{way.value}: {error}; going on to: {ways[number].value}")
    raise Unavailable("\n".join([advice, "What was tried:", *(f"  - {reason}" for reason in reasons)]))


def gather(environ: Mapping[str, str]) -> Facts:
    """Look at the machine; quick, and starts nothing. Raises `Unavailable` for what cannot be meant."""
    if url := environ.get("RPCQ_TEST_URL", ""):
        return Facts(url=url)
    image, way = environ.get("RPCQ_TEST_IMAGE", ""), environ.get("RPCQ_TEST_WAY", "")
    if way not in ALLOWED:
        raise Unavailable(f"RPCQ_TEST_WAY is {way!r}: it has to be container or node")
    if image and way == "node":
        raise Unavailable(f"RPCQ_TEST_IMAGE is {image}, and RPCQ_TEST_WAY is node: an image is for containers")
    return Facts(
        image=image or IMAGE,
        way="container" if image else way,
        engine_problem=engine_problem(),
        server=find_server(environ.get("PATH", os.defpath)),
        can_install=can_apt_install(),
    )


def starters(facts: Facts, say: Say, setup: Setup = PLAIN) -> dict[Way, Callable[[], Broker]]:
    """What to call for each way."""

    def node(server: Path | None) -> Broker:
        if server is None:
            raise Unavailable("no rabbitmq-server found")
        return start_node(server, setup)

    return {
        Way.URL: lambda: use_url(facts.url),
        Way.CONTAINER: lambda: start_container(say, facts.image, setup),
        Way.NODE: lambda: node(facts.server),
        Way.INSTALL: lambda: node(install(say)),
    }


def find_server(path: str, folders: Sequence[str] = SERVER_FOLDERS) -> Path | None:
    """The rabbitmq-server to run: the one on PATH, else one in `folders`.

    The wrapper that Debian and the RPMs put into /usr/sbin is seen through: it switches to the user rabbitmq,
    and turns an ordinary user away, where the script behind it runs as anybody.
    """
    hit = shutil.which("rabbitmq-server", path=os.pathsep.join([path, *folders]))
    if hit is None:
        return None
    behind = Path("/usr/lib/rabbitmq/bin")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if f"{behind}/" in Path(hit).read_text("utf-8") and os.access(behind / "rabbitmq-server", os.X_OK):
            return behind / "rabbitmq-server"
    return Path(hit)


def is_debian(os_release: Path) -> bool:
    """Whether an os-release file is that of Debian, Ubuntu, or a system made from them."""
    try:
        text = os_release.read_text("utf-8")
    except OSError:
        return False
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    names = f"{values.get('ID', '')} {values.get('ID_LIKE', '')}".replace('"', " ").replace("'", " ").split()
    return not {"debian", "ubuntu"}.isdisjoint(names)


# --- 1. A URL --------------------------------------------------------------------------------------------------------


def use_url(url: str) -> Broker:
    """The broker of RPCQ_TEST_URL. That something speaks AMQP there is checked here, to fail once and clearly."""
    parts = urlsplit(url)
    if parts.scheme not in ("amqp", "amqps") or not parts.hostname:
        raise Unavailable("not an AMQP URL: it has to begin with amqp://host or amqps://host")
    if parts.scheme == "amqps":
        # What to trust is told by the URL's query, which is the client's to read, not ours.
        return Broker(url, Way.URL.value, "unknown")
    version = wait_for_amqp(parts.hostname, parts.port or 5672, URL_SECONDS, lambda: None)
    return Broker(url, Way.URL.value, version)


def amqp_version(host: str, port: int, seconds: float) -> str:
    """Say hello in AMQP and return the version in the answer. Raises OSError where no broker answers."""
    from pamqp import commands, frame  # the guard and the choice do without

    received = b""
    with socket.create_connection((host, port), timeout=seconds) as peer:
        peer.settimeout(seconds)
        peer.sendall(b"AMQP\x00\x00\x09\x01")
        # A frame: type, channel and payload length in 7 octets, the payload, and the octet that ends it.
        while len(received) < 7 or len(received) < 7 + int.from_bytes(received[3:7], "big") + 1:
            chunk = peer.recv(65536)
            if not chunk or (received + chunk)[:1] != b"\x01":
                raise ConnectionError("what listens there does not answer as an AMQP 0-9-1 broker")
            received += chunk
    start = frame.unmarshal(received)[2]
    if not isinstance(start, commands.Connection.Start):
        raise ConnectionError("what listens there does not begin as an AMQP 0-9-1 broker")
    version = (start.server_properties or {}).get("version", "unknown")
    return version.decode() if isinstance(version, bytes) else str(version)


def wait_for_amqp(host: str, port: int, seconds: float, gone: Callable[[], str | None]) -> str:
    """Wait until AMQP answers and return the broker's version. `gone` says why there is no point in waiting."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return amqp_version(host, port, 2.0)
        except OSError as error:
            why = gone()
            if why is not None:
                raise Unavailable(why) from error
            if time.monotonic() > deadline:
                raise Unavailable(f"no AMQP at {host}:{port} within {seconds:.0f} s: {error}") from error
        time.sleep(0.05)


def unless_a_port_is_taken(start: Callable[[], Found]) -> Found:
    """A second try if another program took one of the ports that were free a moment before."""
    try:
        return start()
    except Unavailable as error:
        if not any(sign in str(error).lower() for sign in PORT_TAKEN):
            raise
        return start()


# --- 2. A container --------------------------------------------------------------------------------------------------


def engine_problem() -> str:
    """Why there is no Docker engine to use; empty if one answers."""
    with warnings.catch_warnings():
        # docker leaves the socket of a failed connection to the garbage collector, and where a session makes errors
        # of warnings, that would be the error of whatever test runs at the time.
        warnings.simplefilter("ignore", ResourceWarning)
        problem = _engine_problem()
        gc.collect()
    return problem


def _engine_problem() -> str:
    try:
        # testcontainers' client finds the engine as the container's will: DOCKER_HOST, contexts, its properties file.
        from testcontainers.core.docker_client import DockerClient  # not installed for benchmarks

        client = DockerClient(timeout=ENGINE_SECONDS).client
    except ImportError as error:
        return f"the Python package testcontainers is not installed ({error})"
    except Exception as error:  # noqa: BLE001 - requests', docker's, paramiko's: any means no engine
        return f"no Docker engine answers ({_brief(error)})"
    try:
        client.ping()
    except Exception as error:  # noqa: BLE001 - requests', docker's, paramiko's: any means no engine
        return f"the Docker engine does not answer ({_brief(error)})"
    finally:
        client.close()
    return ""


def start_container(say: Say, image: str, setup: Setup = PLAIN) -> Broker:
    """A container. Whatever goes wrong on the way makes containers unavailable, no more than that."""
    return unless_a_port_is_taken(lambda: _start_container(say, image, setup))


def _start_container(say: Say, image: str, setup: Setup) -> Broker:
    pull_image(say, image)
    label = new_label()
    guard = Guard({"label": label})
    try:
        container = Container(image, label, setup)
        version = container.wait()
    except BaseException as error:
        guard.stop()
        if isinstance(error, Unavailable) or not isinstance(error, Exception):
            raise
        raise Unavailable(f"the container could not be started ({_brief(error)})") from error

    def stop() -> None:
        guard.stop()
        container.stop()

    url = f"amqp://guest:guest@{container.host}:{container.port}/{VHOST}"
    return Broker(
        url, f"container {image} ({version})", version, container.ctl, stop, container.ports, _server=container
    )


def pull_image(say: Say, image: str) -> None:
    """Have the image there."""
    try:
        from testcontainers.core.docker_client import DockerClient

        with contextlib.closing(DockerClient().client) as client:
            if not client.images.list(name=image):
                say(f"pulling the image {image}, which may take a minute")
                client.images.pull(image)
    except Exception as error:
        raise Unavailable(f"the image {image} cannot be had ({_brief(error)})") from error


def new_label() -> str:
    """What a guard of containers knows them by."""
    return f"rpcq-test-{secrets.token_hex(6)}"


class Container(Server):
    """A container, which the guard of `label` takes away.

    Its ports are chosen here: those that Docker chooses are others after a restart. With a name, it is known by that
    in a network of its kin, which share a cookie.
    """

    def __init__(
        self, image: str, label: str, setup: Setup = PLAIN, *, name: str = "", network: str = "", cookie: str = ""
    ) -> None:
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.container import DockerContainer

        # The guard does what Ryuk would do, without a second image to pull and the engine's socket to mount.
        testcontainers_config.ryuk_disabled = True
        inside = range(CONTAINER_PORT, CONTAINER_PORT + setup.ports)
        container = DockerContainer(image).with_env("RABBITMQ_DEFAULT_VHOST", VHOST)
        for one, port in zip((5672, *inside), free_ports(1 + setup.ports), strict=True):
            container.with_bind_ports(one, port)
        kwargs: dict[str, Any] = {"labels": {"rpcq-test": label}}
        if name:
            kwargs |= {"hostname": name, "network": network}
            container.with_name(name).with_env("RABBITMQ_ERLANG_COOKIE", cookie)
        container.with_kwargs(**kwargs)
        if setup.erl_args:
            container.with_env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", setup.erl_args)
        if setup != PLAIN:
            container.with_env("RABBITMQ_CONFIG_FILES", f"{CONTAINER_FOLDER}/conf.d").with_command(["sh", "-c", WAIT])
        self._client: Any = container.get_docker_client().client
        container.start()
        self._container: Any = container.get_wrapped_container()
        self.name = f"rabbit@{name or self._container.id[:12]}"
        self.host, self.port = container.get_container_host_ip(), int(container.get_exposed_port(5672))
        self.ports = {one: int(container.get_exposed_port(one)) for one in inside}
        if setup != PLAIN:
            files = {**setup.written(self.host, CONTAINER_FOLDER, inside), "ready": b""}
            packed = _packed({f"{CONTAINER_FOLDER}/{path}": it for path, it in files.items()})
            self._container.put_archive("/", packed)

    def ctl(self, args: Sequence[str]) -> str:
        """Run its rabbitmqctl."""
        if not self._running():
            raise CtlFailed(f"rabbitmqctl {' '.join(args)}: the container does not run")
        code, (out, err) = self._container.exec_run(["rabbitmqctl", "-q", *args], demux=True)
        if code != 0:
            raise CtlFailed(f"rabbitmqctl {' '.join(args)}: exit code {code}\n{_text(out)}{_text(err)}")
        return _text(out)

    def down(self, *, kill: bool) -> None:
        """End it, and wait until it is gone."""
        if not self._running():
            return
        if not kill:
            # Not a signal: it depends on the image whether one gets through to the node. This command's own exit code
            # says nothing, as it may end with the container.
            self._container.exec_run(["rabbitmqctl", "-q", "stop"])
            deadline = time.monotonic() + STOP_SECONDS
            while time.monotonic() < deadline and self._running():
                time.sleep(0.1)
        if self._running():
            self._container.kill()
        self._container.wait()

    def up_soon(self) -> None:
        """Start it again, without waiting."""
        self._container.start()

    def pause(self) -> None:
        """Let it stand still."""
        self._container.pause()

    def resume(self) -> None:
        """Let it go on."""
        self._container.unpause()

    def reached(self) -> tuple[str, Sequence[str]]:
        """Its address in the network of its kin, and how to be there."""
        self._container.reload()
        [network] = self._container.attrs["NetworkSettings"]["Networks"].values()
        return network["IPAddress"], ("nsenter", "--net", "--target", str(self._container.attrs["State"]["Pid"]))

    def _running(self) -> bool:
        self._container.reload()
        return bool(self._container.status == "running")

    def _gone(self) -> str | None:
        if self._running():
            return None
        return f"the container ended while starting:\n{_tail(_text(self._container.logs()))}"

    def stop(self) -> None:
        """Let go of it: it is the guard that takes it away."""
        self._client.close()


def _packed(files: Mapping[str, bytes]) -> bytes:
    """A tar archive of the files, in their order."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


# --- 3. A node of our own --------------------------------------------------------------------------------------------


def start_node(server: Path, setup: Setup = PLAIN) -> Broker:
    """A private node."""
    return unless_a_port_is_taken(lambda: _start_node(server, setup))


def _start_node(server: Path, setup: Setup) -> Broker:
    node = Node(server, setup)
    with stopped_if_it_fails([node]):
        version = node.wait()
    url = f"amqp://guest:guest@{node.host}:{node.port}/{VHOST}"
    return Broker(
        url, f"node {node.name} ({version})", version, node.ctl, node.stop, {one: one for one in node.ports}, node
    )


@contextlib.contextmanager
def stopped_if_it_fails(servers: Sequence[Server]) -> Iterator[None]:
    """Stop all of them if anything goes wrong meanwhile."""
    try:
        yield
    except BaseException:
        for one in servers:
            one.stop()
        raise


@dataclass(frozen=True)
class Kin:
    """What the nodes of one cluster have in common."""

    epmd_port: int
    cookie: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    addresses: Sequence[str] = ()
    """Those of the loopback network that nodes have to themselves, if they have."""


def node_name(host: str = "localhost") -> str:
    """A name for a node that no other has."""
    return f"rpcq-test-{secrets.token_hex(4)}@{host}"


class Node(Server):
    """A rabbitmq-server in a folder of its own, under a guard of its own; starting, once this returns.

    Without `kin` it has a port mapper and a secret of its own. With `kin` it uses theirs, and starts the port mapper
    if nobody has. If it is named after an address of its kin, it talks with them from there.
    """

    host = "127.0.0.1"

    def __init__(self, server: Path, setup: Setup = PLAIN, *, name: str = "", kin: Kin | None = None) -> None:
        self.name = name or node_name()
        self.port, dist_port, epmd_port, *self.ports = free_ports(3 + setup.ports)
        kin = kin or Kin(epmd_port)
        self._program = server
        self._folder = Path(tempfile.mkdtemp(prefix="rpcq-test-"))
        self._exited = self._folder / "exited"
        self._environ = node_environment(self._folder, self.name, self.port, dist_port, kin.epmd_port, kin.cookie)
        erl_args = setup.erl_args
        if (host := self.name.partition("@")[2]) in kin.addresses:
            own = f"{{{host.replace('.', ',')}}}"
            erl_args += f" -kernel inet_dist_use_interface {own} -kernel inet_dist_connect_options [{{ip,{own}}}]"
            self._environ["RABBITMQ_USE_LONGNAME"] = "true"
            self._environ["ERL_EPMD_ADDRESS"] = ",".join(kin.addresses)
        self._environ["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"] = erl_args
        for path, content in setup.written(self.host, str(self._folder), self.ports).items():
            (self._folder / path).parent.mkdir(exist_ok=True)
            (self._folder / path).write_bytes(content)
        # From here on the folder is the guard's: it outlives us, whatever becomes of us.
        self._guard = Guard(
            {
                "folder": str(self._folder),
                "environ": self._environ,
                "command": [str(server)],
                "epmd": shutil.which("epmd", path=self._environ["PATH"]),
            }
        )

    def ctl(self, args: Sequence[str]) -> str:
        """Run its rabbitmqctl."""
        command = [str(self._program.with_name("rabbitmqctl")), "-q", *args]
        try:
            done = subprocess.run(
                command,
                env=self._environ,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=CTL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise CtlFailed(f"rabbitmqctl {' '.join(args)}: no end within {CTL_SECONDS:.0f} s") from error
        if done.returncode != 0:
            raise CtlFailed(
                f"rabbitmqctl {' '.join(args)}: exit code {done.returncode}\n{_text(done.stdout)}{_text(done.stderr)}"
            )
        return _text(done.stdout)

    def down(self, *, kill: bool) -> None:
        """End it, and wait until it is gone; what does not end in an orderly way in time is killed."""
        self._guard.tell("kill" if kill else "terminate")
        deadline = time.monotonic() + STOP_SECONDS
        while not self._exited.exists():
            if time.monotonic() > deadline:
                if kill:
                    raise Unavailable(f"node {self.name} did not end within {STOP_SECONDS:.0f} s")
                self.down(kill=True)
            time.sleep(0.02)

    def up_soon(self) -> None:
        """Start it again, without waiting."""
        if self._exited.exists():
            # Before the guard starts it, and by us, so that the file is there again only if this start fails.
            self._exited.unlink()
            self._guard.tell("start")

    def pause(self) -> None:
        """Let it stand still."""
        self._guard.tell("pause")

    def resume(self) -> None:
        """Let it go on."""
        self._guard.tell("resume")

    def reached(self) -> tuple[str, Sequence[str]]:
        """Its address, which is one of this machine's."""
        return self.name.partition("@")[2], ()

    def wait(self) -> str:
        """Wait until AMQP answers, and return the version."""
        try:
            return super().wait()
        except Unavailable as error:
            logs = [self._folder / "output", *sorted(self._folder.glob("log/*.log"))]
            tail = "\n".join(_tail(_read(path)) for path in logs)
            raise Unavailable(f"{self._program}: {error}\n{tail}") from error

    def _gone(self) -> str | None:
        return "the node ended while starting" if self._exited.exists() else None

    def stop(self) -> None:
        """Take it away, and its folder."""
        self._guard.stop()


def node_environment(
    folder: Path, name: str, port: int, dist_port: int, epmd_port: int, cookie: str = ""
) -> dict[str, str]:
    """Write a node's files into `folder`, and return the environment that the node and its rabbitmqctl run in.

    Every path that would otherwise come from /etc/rabbitmq or /var/lib/rabbitmq is set: the node must neither read
    the machine's configuration nor write beside another node, and an ordinary user could do neither.
    """
    files = {
        # Both the node and rabbitmqctl find the shared secret of Erlang in their HOME, and insist on mode 0400.
        ".erlang.cookie": cookie or secrets.token_hex(16),
        "rabbitmq-env.conf": "",
        "rabbitmq.conf": f"default_vhost = {VHOST}\nlog.file.level = warning\nlog.console = false\n",
        "advanced.config": "[].\n",
        "enabled_plugins": "[].\n",
    }
    for file, text in files.items():
        (folder / file).write_text(text, "utf-8")
    (folder / ".erlang.cookie").chmod(0o400)
    kept = {
        key: value
        for key, value in os.environ.items()
        # NOTIFY_SOCKET: a node that has one reports to the service manager that started the tests.
        if not key.startswith(("RABBITMQ_", "ERL_", "XDG_")) and key != "NOTIFY_SOCKET"
    }
    return kept | {
        "HOME": str(folder),
        "PATH": os.pathsep.join([kept.get("PATH", os.defpath), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin"]),
        "LC_ALL": "C.UTF-8",  # Elixir warns on every call where the locale is not UTF-8
        "ERL_EPMD_PORT": str(epmd_port),  # so that the port mapper is ours as well, and can be ended with the node
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_CRASH_DUMP_SECONDS": "0",
        "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the Erlang VM, and does not stay on as its parent
        "RABBITMQ_NODENAME": name,
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(dist_port),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_CONFIG_FILES": str(folder / "conf.d"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
        "RABBITMQ_SCHEMA_DIR": str(folder / "schema"),
    }


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that are free now, all different."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().choice(PORTS)
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            ports.add(port)
    return list(ports)


# --- 4. Installing ---------------------------------------------------------------------------------------------------


def install(say: Say) -> Path:
    """apt-get install rabbitmq-server, without a system node coming up; the server to run."""
    say("installing rabbitmq-server with apt-get, which takes a minute (root on Debian or Ubuntu, no Docker engine)")
    apt_install("rabbitmq-server")
    server = find_server(os.environ.get("PATH", os.defpath))
    if server is None:
        raise Unavailable("apt-get installed rabbitmq-server, but there is no rabbitmq-server to be found")
    return server


def can_apt_install() -> bool:
    """Root, on a system with apt and Debian's packages."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None and is_debian(Path("/etc/os-release"))


def apt_install(package: str) -> None:
    """apt-get install a package, without a service of it coming up; one at a time on this machine."""
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    deadline = time.monotonic() + APT_SECONDS
    options = ("-q", "-o", "DPkg::Lock::Timeout=120")
    output = ""
    with locked(Path(tempfile.gettempdir(), "rpcq-apt.lock")), no_services_started(Path("/usr/sbin/policy-rc.d")):
        # A failed update (one dead third-party source is enough) need not keep the package from being installed.
        for action in (("update",), ("install", "-y", "--no-install-recommends", package)):
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
            output += _text(done.stdout)
    if done.returncode != 0:
        raise Unavailable(f"apt-get install {package} failed:\n{_tail(output)}")


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


# --- The guard -------------------------------------------------------------------------------------------------------


class Guard:
    """Our end of a guard process: it takes away what `spec` describes once its standard input closes.

    The first line it is sent is `spec`. The guard of a node takes further ones: `start`, and those of `_SIGNALS`. What
    became of them is seen in the node's folder: the guard makes the file `exited` whenever the node has ended.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        # A session of its own: Ctrl-C goes to every process of the terminal's group, and must not go to this one.
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--guard"],
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
            _say(f"the guard (pid {self._process.pid}) did not end within {STOP_SECONDS:.0f} s")
            self._process.kill()
            self._process.wait()


class _Ended(Exception):
    """A signal asked the guard to end."""


def guard_main() -> int:
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


# --- Small things ----------------------------------------------------------------------------------------------------


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "replace")


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text("utf-8", "replace")
    return ""


def _tail(text: str, lines: int = 30) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines()[-lines:])


# --- python tests/broker.py -- command args… -------------------------------------------------------------------------


def run(command: Sequence[str]) -> int:
    """Run a command with a broker: its exit code, or 128 + the number of the signal that ended it."""
    command_run = _CommandRun()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, command_run.on_signal)
    with broker() as found:
        _say(found.origin)
        return command_run(command, {**os.environ, "RPCQ_URL": found.url, "RPCQ_TEST_URL": found.url})


class _CommandRun:
    """One run of a command that is sent the signals we get; 10 s after the first of them it is killed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._starting = False
        self._signals: list[int] = []
        self._deadline = float("inf")

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Hand a signal on, or leave at once if the command is not there yet."""
        if self._child is None and not self._starting:
            raise SystemExit(128 + number)
        self._signals.append(number)

    def __call__(self, command: Sequence[str], environ: Mapping[str, str]) -> int:
        self._starting = True
        try:
            # A process group of its own, so that every signal reaches it once, through us, wherever it came from.
            child = self._child = subprocess.Popen(command, env=environ, process_group=0)
        except OSError as error:
            _say(f"cannot run {command[0]}: {error}")
            return 127
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(0.1)
                return code if code >= 0 else 128 - code
            if time.monotonic() > self._deadline:
                self._signals.append(signal.SIGKILL)
            while self._signals:
                self._deadline = min(self._deadline, time.monotonic() + 10.0)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, self._signals.pop(0))


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    if arguments == ["--guard"]:
        return guard_main()
    if len(arguments) < 2 or arguments[0] != "--":
        sys.stderr.write("usage: python tests/broker.py -- command [argument …]\n")
        return 2
    try:
        return run(arguments[1:])
    except Unavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
