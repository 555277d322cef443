"""A RabbitMQ cluster for tests that take nodes of it down: started here, and taken away again.

Nodes of an installed ``rabbitmq-server``, or containers in a network of their own, or, as root on Debian or Ubuntu,
nodes of a ``rabbitmq-server`` that is installed for it; otherwise :class:`~broker.Unavailable`. ``RPCQ_TEST_IMAGE`` and
``RPCQ_TEST_WAY`` choose, as for `broker.py`. Each node belongs to a guard of that, so that nothing is left when the
test process is killed. All methods block, for a second or more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import broker as harness
from broker import VHOST, Container, CtlFailed, Guard, Kin, Node, Server, Setup, Unavailable, Way

__all__ = ["Cluster", "Connection", "Member", "cluster"]

ADVICE = f"""\
No RabbitMQ to make a cluster of. Do one of these:
  - install rabbitmq-server (Debian, Ubuntu: apt-get install rabbitmq-server; macOS: brew install rabbitmq),
  - start Docker (the tests use the image {harness.IMAGE}, and need the Python package testcontainers)."""

JOIN_SECONDS = 60
FIND_SECONDS = 30.0

CONFIG = "raft.wal_max_size_bytes = 16000000\nloopback_users.guest = false\n"
"""A node holds in memory what is in the log that it writes, by default up to 512 MB; guest comes to a container too."""
ENVIRONMENT = b"SERVER_ADDITIONAL_ERL_ARGS='+S 2:2'\n"
"""Two schedulers a node, however many cores there are: each has memory of its own."""


@dataclass(frozen=True)
class Connection:
    """A client's connection, as rabbitmqctl tells of it."""

    node: str
    """The name of the node that it is on."""
    local_port: int
    """The client's end."""
    name: str
    """What the client calls it in its properties, or ""."""

    @staticmethod
    def of(line: str) -> Connection:
        """From a line of pid, peer_port and client_properties: `<name@host.1.2.3>`, and Erlang's terms."""
        pid, port, properties = line.split("\t")
        name = re.search(r'\{"connection_name","([^"]*)"\}', properties)
        return Connection(pid.strip("<>").rsplit(".", 3)[0], int(port), name[1] if name else "")


@dataclass
class Member:
    """A node of a cluster."""

    url: str
    """AMQP URL of this node alone."""
    _server: Server = field(repr=False)
    _cluster: Cluster = field(repr=False)
    up: bool = True
    """Whether it is to be running: not between `kill` and `start`."""

    @property
    def name(self) -> str:
        """Of the Erlang node, as rabbitmqctl prints it."""
        return self._server.name

    @property
    def port(self) -> int:
        """Where it is reached; the same after a restart."""
        return self._server.port

    def ctl(self, *args: str) -> str:
        """Run rabbitmqctl on this node and return what it printed; raises `CtlFailed` when it fails."""
        return self._server.ctl(args)

    def kill(self) -> None:
        """End it with SIGKILL, and wait until it is gone.

        What it has of a quorum queue that was declared less than a second before may be lost: see `Broker.kill`.
        """
        self.up = False
        self._server.down(kill=True)

    def start(self) -> None:
        """Start it again, with its data, and wait until it is back in the cluster."""
        self._cluster.start(self)


@dataclass
class Cluster:
    """A running cluster."""

    nodes: list[Member] = field(default_factory=list)
    origin: str = ""
    """What it is made of, for people."""

    @property
    def url(self) -> str:
        """One AMQP URL with all nodes, in their order, and a vhost that belongs to the tests."""
        return joined([node.url for node in self.nodes])

    def ctl(self, *args: str) -> str:
        """Run rabbitmqctl on a node that is up."""
        for node in self.nodes:
            if node.up:
                return node.ctl(*args)
        raise CtlFailed(f"rabbitmqctl {' '.join(args)}: no node is up")

    def start(self, *nodes: Member) -> None:
        """Start several nodes that were killed, at the same time, and wait until they are back in the cluster.

        After more than half of them, or all, were down: each waits for others, and alone it would not come up.
        """
        for node in nodes:
            node._server.up_soon()
        for node in nodes:
            node._server.wait()
            node.up = True
        self.wait(*nodes)

    def wait(self, *nodes: Member) -> None:
        """Wait until each of these sees all that are up."""
        count = str(sum(node.up for node in self.nodes))
        for node in nodes:
            node.ctl("await_online_nodes", count, "--timeout", str(JOIN_SECONDS))

    def leader_of(self, queue: str, vhost: str = VHOST) -> Member:
        """The node that leads a quorum queue; if there is none for now, the next. `LookupError` if none appears."""

        def find() -> Member | None:
            rows = json.loads(self.ctl("list_queues", "-p", vhost, "name", "leader", "--formatter", "json"))
            names = [row["leader"] for row in rows if row["name"] == queue]
            # A node that was just killed may be named until the others have voted.
            return next((node for node in self.nodes if node.up and node.name in names), None)

        return _found(find, f"no node that is up leads the queue {queue!r}")

    def node_of_connection(self, connection: str | int) -> Member:
        """The node of a client's connection, by its client-side name or by the client's local port.

        The name is all of `connection_name`, which a client of rpcq's makes of its own name and "consume" or
        "publish". `LookupError` if there is no such connection, or there are several on different nodes.
        """

        def find() -> Member | None:
            there = {row.node for row in self.connections() if connection in (row.name, row.local_port)}
            nodes = [node for node in self.nodes if node.name in there]
            return nodes[0] if len(nodes) == 1 else None

        return _found(find, f"no single node has the connection {connection!r}")

    def connections(self) -> list[Connection]:
        """The connections of clients, on all nodes that are up."""
        # Not as JSON: in that, a pid does not say its node.
        table = self.ctl("list_connections", "--no-table-headers", "pid", "peer_port", "client_properties")
        return [Connection.of(line) for line in table.splitlines() if line]


@contextlib.contextmanager
def cluster(nodes: int = 3, say: harness.Say = harness._say) -> Iterator[Cluster]:
    """Start a cluster, and take it away at the end. `say` gets what people should know."""
    # What runs elsewhere is of no use: nodes are to be killed.
    facts = harness.gather({**os.environ, "RPCQ_TEST_URL": ""})
    starters: dict[Way, Callable[[], _Started]] = {
        Way.NODE: lambda: of_nodes(facts.server, nodes),
        Way.INSTALL: lambda: of_nodes(harness.install(say), nodes),
        Way.CONTAINER: lambda: of_containers(say, facts.image, nodes),
    }
    # Nodes are preferred, where they need not be installed: they start in less time than containers.
    ways = sorted(harness.plan(facts), key=lambda way: way is not Way.NODE)
    found, stop = harness.first(ways, starters, facts, say, ADVICE)
    try:
        yield found
    finally:
        stop()


_Started = tuple[Cluster, Callable[[], None]]


def of_nodes(server: Path | None, count: int) -> _Started:
    """A cluster of private nodes, and what ends it."""
    if server is None:
        raise Unavailable("no rabbitmq-server found")
    return harness.unless_a_port_is_taken(lambda: _of_nodes(server, count))


def _of_nodes(server: Path, count: int) -> _Started:
    kin = Kin(harness.free_ports(1)[0])
    names = [harness.node_name() for _ in range(count)]
    servers: list[Server] = []

    def stop() -> None:
        for one in servers:
            one.stop()

    with _undone_by(stop):
        found = _joined(names, servers, lambda name, setup: Node(server, setup, name=name, kin=kin))
    return found, stop


def of_containers(say: harness.Say, image: str, count: int) -> _Started:
    """A cluster of containers, and what ends it."""
    harness.pull_image(say, image)
    return harness.unless_a_port_is_taken(lambda: _of_containers(image, count))


def _of_containers(image: str, count: int) -> _Started:
    from testcontainers.core.docker_client import DockerClient

    label, cookie = harness.new_label(), secrets.token_hex(16)
    names = [f"{label}-{number}" for number in range(1, count + 1)]
    guard = Guard({"label": label})
    servers: list[Server] = []

    def stop() -> None:
        guard.stop()
        for one in servers:
            one.stop()

    with _undone_by(stop):
        try:
            with contextlib.closing(DockerClient().client) as client:
                client.networks.create(label, labels={"rpcq-test": label})
            found = _joined(
                [f"rabbit@{name}" for name in names],
                servers,
                lambda name, setup: Container(
                    image, label, setup, name=name.removeprefix("rabbit@"), network=label, cookie=cookie
                ),
            )
        except Unavailable:
            raise
        except Exception as error:
            raise Unavailable(f"the containers could not be started ({harness._brief(error)})") from error
    return found, stop


@contextlib.contextmanager
def _undone_by(stop: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        stop()
        raise


def _joined(names: Sequence[str], servers: list[Server], start: Callable[[str, Setup], Server]) -> Cluster:
    """Start the first node, then all others at the same time, which join it while they start."""
    for number, name in enumerate(names):
        config = CONFIG + (joining(names) if number else "")
        servers.append(start(name, Setup(config, lambda _: {"rabbitmq-env.conf": ENVIRONMENT})))
        if not number:
            version = servers[0].wait()
    for one in servers[1:]:
        one.wait()
    kind = "containers" if isinstance(servers[0], Container) else "nodes"
    found = Cluster(origin=f"{len(names)} {kind} ({version})")
    for one in servers:
        found.nodes.append(Member(f"amqp://guest:guest@{one.host}:{one.port}/{VHOST}", one, found))
    found.wait(found.nodes[0])
    return found


def joining(names: Sequence[str]) -> str:
    """The configuration of a node that joins, when it starts for the first time, those of these that run."""
    lines = [f"cluster_formation.classic_config.nodes.{number} = {name}" for number, name in enumerate(names, start=1)]
    return "\n".join(["cluster_formation.peer_discovery_backend = classic_config", *lines, ""])


def joined(urls: Sequence[str]) -> str:
    """One AMQP URL with the hosts of all of these, which differ in nothing else."""
    parts = [urlsplit(url) for url in urls]
    credentials = parts[0].netloc.rpartition("@")[0]
    hosts = ",".join(part.netloc.rpartition("@")[2] for part in parts)
    return parts[0]._replace(netloc=f"{credentials}@{hosts}").geturl()


def _found(find: Callable[[], Member | None], problem: str) -> Member:
    deadline = time.monotonic() + FIND_SECONDS
    while (node := find()) is None:
        if time.monotonic() > deadline:
            raise LookupError(problem)
        time.sleep(0.1)
    return node
