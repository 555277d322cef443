"""RabbitMQ as a node of our own: an installed server with ports, a name and a folder of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.guard import Guard
from support.harness import CtlFailed, Say, Unavailable, decoded, read, tail
from support.installing import apt_install
from support.ports import free_ports, unless_a_port_is_taken
from support.servers import PLAIN, STOP_SECONDS, VHOST, Broker, Server, Setup

CTL_SECONDS = 60.0

SERVER_FOLDERS = ("/usr/lib/rabbitmq/bin", "/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")
"""Where a server may be that is not on PATH: the sbin folders are not on an ordinary user's PATH on Debian."""


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


def install(say: Say) -> Path:
    """apt-get install rabbitmq-server, without a system node coming up; the server to run."""
    say("installing rabbitmq-server with apt-get, which takes a minute (root on Debian or Ubuntu, no Docker engine)")
    apt_install("rabbitmq-server")
    server = find_server(os.environ.get("PATH", os.defpath))
    if server is None:
        raise Unavailable("apt-get installed rabbitmq-server, but there is no rabbitmq-server to be found")
    return server


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
            output = f"{decoded(done.stdout)}{decoded(done.stderr)}"
            raise CtlFailed(f"rabbitmqctl {' '.join(args)}: exit code {done.returncode}\n{output}")
        return decoded(done.stdout)

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
            ends = "\n".join(tail(read(path)) for path in logs)
            raise Unavailable(f"{self._program}: {error}\n{ends}") from error

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
