"""A RabbitMQ cluster for tests that take nodes of it down: started here, and taken away again.

Nodes of an installed ``rabbitmq-server``, or containers in a network of their own, or, as root on Debian or Ubuntu,
nodes of a ``rabbitmq-server`` that is installed for it; otherwise `Unavailable`. ``RPCQ_TEST_IMAGE`` and
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

from support import choosing
from support.choosing import Way
from support.containers import IMAGE, Container, new_label, pull_image
from support.guard import Guard
from support.harness import CtlFailed, Say, Unavailable, brief, to_stderr
from support.links import Links, check_links, own_addresses
from support.nodes import Kin, Node, install, node_name
from support.ports import free_ports, unless_a_port_is_taken
from support.servers import VHOST, Server, Setup

__all__ = ["Cluster", "Connection", "Member", "cluster"]

ADVICE = f"""\
No RabbitMQ to make a cluster of. Do one of these:
  - install rabbitmq-server (Debian, Ubuntu: apt-get install rabbitmq-server; macOS: brew install rabbitmq),
  - start Docker (the tests use the image {IMAGE}, and need the Python package testcontainers)."""

JOIN_SECONDS = 60
FIND_SECONDS = 30.0

CONFIG = "raft.wal_max_size_bytes = 16000000\nloopback_users.guest = false\n"
"""A node holds in memory what is in the log that it writes, by default up to 512 MB; guest comes to a container too."""
ERL_ARGS = "+S 2:2"
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
    """Whether it is to be running: not between `kill` and `start`, nor between `pause` and `resume`."""

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

    def pause(self) -> None:
        """Let it stand still, with all its connections open, until `resume`; others notice by their own means."""
        self.up = False
        self._server.pause()

    def resume(self) -> None:
        """Let it go on, and do not wait for anything."""
        self._server.resume()
        self.up = True

    def start(self) -> None:
        """Start it again, with its data, and wait until it is back in the cluster."""
        self._cluster.start(self)


@dataclass
class Cluster:
    """A running cluster."""

    nodes: list[Member] = field(default_factory=list)
    origin: str = ""
    """What it is made of, for people."""
    _links: Links | None = field(default=None, repr=False)

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

    @property
    def links(self) -> Links:
        """What its nodes reach each other by. Raises `Unavailable` if it was not started with links."""
        if self._links is None:
            raise Unavailable("this cluster was started without links that can be cut")
        return self._links

    def cut(self, start: Member, end: Member) -> None:
        """Drop whatever one node sends to another one, from now on. The way back is a link of its own."""
        self.links.cut(start._server, end._server)

    def part(self, one: Member, other: Member) -> None:
        """Drop whatever these two send to each other."""
        self.cut(one, other)
        self.cut(other, one)

    def heal(self) -> None:
        """Let everything through again."""
        self.links.heal()

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


@dataclass(frozen=True)
class Plan:
    """What a cluster is to be like."""

    count: int
    """How many nodes."""
    links: bool = False
    """Whether its links can be cut."""
    config: str = CONFIG
    erl_args: str = ERL_ARGS

    def setup(self, more: str) -> Setup:
        return Setup(self.config + more, erl_args=self.erl_args)


@contextlib.contextmanager
def cluster(
    nodes: int = 3, say: Say = to_stderr, *, links: bool = False, config: str = "", tick: int = 0
) -> Iterator[Cluster]:
    """Start a cluster, and take it away at the end.

    Args:
        nodes: how many.
        say: gets what people should know.
        links: whether links between nodes can be cut, which takes root; see `links.py`.
        config: further lines of rabbitmq.conf.
        tick: seconds without a word after which a node takes another one for lost, give or take a quarter; 0 for the
            default, 60.
    """
    # What runs elsewhere is of no use: nodes are to be killed.
    facts = choosing.gather({**os.environ, "RPCQ_TEST_URL": ""})
    if links:
        check_links()
    plan = Plan(nodes, links, CONFIG + config, f"{ERL_ARGS} -kernel net_ticktime {tick}" if tick else ERL_ARGS)
    starters: dict[Way, Callable[[], _Started]] = {
        Way.NODE: lambda: of_nodes(facts.server, plan),
        Way.INSTALL: lambda: of_nodes(install(say), plan),
        Way.CONTAINER: lambda: of_containers(say, facts.image, plan),
    }
    # Nodes are preferred, where they need not be installed: they start in less time than containers.
    ways = sorted(choosing.plan(facts), key=lambda way: way is not Way.NODE)
    found, stop = choosing.first(ways, starters, facts, say, ADVICE)
    try:
        yield found
    finally:
        stop()


_Started = tuple[Cluster, Callable[[], None]]


def of_nodes(server: Path | None, plan: Plan) -> _Started:
    """A cluster of private nodes, and what ends it."""
    if server is None:
        raise Unavailable("no rabbitmq-server found")
    return unless_a_port_is_taken(lambda: _of_nodes(server, plan))


def _of_nodes(server: Path, plan: Plan) -> _Started:
    addresses = own_addresses(plan.count) if plan.links else []
    kin = Kin(free_ports(1)[0], addresses=addresses)
    names = [node_name(host) for host in addresses or ["localhost"] * plan.count]
    with contextlib.ExitStack() as stack:
        found = _joined(plan, names, stack, lambda name, setup: Node(server, setup, name=name, kin=kin))
        return found, stack.pop_all().close


def of_containers(say: Say, image: str, plan: Plan) -> _Started:
    """A cluster of containers, and what ends it."""
    pull_image(say, image)
    return unless_a_port_is_taken(lambda: _of_containers(image, plan))


def _of_containers(image: str, plan: Plan) -> _Started:
    from testcontainers.core.docker_client import DockerClient

    label, cookie = new_label(), secrets.token_hex(16)
    names = [f"rabbit@{label}-{number}" for number in range(1, plan.count + 1)]

    def start(name: str, setup: Setup) -> Server:
        return Container(image, label, setup, name=name.removeprefix("rabbit@"), network=label, cookie=cookie)

    with contextlib.ExitStack() as stack:
        try:
            guard = Guard({"label": label})
            stack.callback(guard.stop)
            with contextlib.closing(DockerClient().client) as client:
                client.networks.create(label, labels={"rpcq-test": label})
            found = _joined(plan, names, stack, start)
        except Unavailable:
            raise
        except Exception as error:
            raise Unavailable(f"the containers could not be started ({brief(error)})") from error
        return found, stack.pop_all().close


def _joined(
    plan: Plan, names: Sequence[str], stack: contextlib.ExitStack, start: Callable[[str, Setup], Server]
) -> Cluster:
    """Start the first node, then all others at the same time, which join it while they start."""
    servers: list[Server] = []
    for number, name in enumerate(names):
        servers.append(start(name, plan.setup(joining(names) if number else "")))
        stack.callback(servers[-1].stop)
        if not number:
            version = servers[0].wait()
    for one in servers[1:]:
        one.wait()
    kind = "containers" if isinstance(servers[0], Container) else "nodes"
    found = Cluster(origin=f"{len(names)} {kind} ({version})")
    for one in servers:
        found.nodes.append(Member(f"amqp://guest:guest@{one.host}:{one.port}/{VHOST}", one, found))
    found.wait(found.nodes[0])
    if plan.links:
        found._links = stack.enter_context(Links(servers))
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
