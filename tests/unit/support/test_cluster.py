"""The harness that takes brokers down: the guard's part in it, and what a cluster writes and reads off rabbitmqctl."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rpcq import url
from support import choosing, cluster, links
from support.broker import Broker, Unavailable
from support.choosing import Facts
from support.cluster import Cluster, Connection, Member
from support.guard import Guard
from support.servers import Server


class Stub(Server):
    """A server whose rabbitmqctl says what it is told to."""

    def __init__(self, number: int, says: str = "") -> None:
        self.name, self.host, self.port = f"n{number}@localhost", "127.0.0.1", 20000 + number
        self.says = says
        self.asked: list[Sequence[str]] = []

    def ctl(self, args: Sequence[str]) -> str:
        self.asked.append(args)
        return self.says

    def down(self, *, kill: bool) -> None:
        assert kill

    def up_soon(self) -> None:
        pass

    def pause(self) -> None:
        self.says = "paused"

    def resume(self) -> None:
        self.says = "resumed"

    def reached(self) -> tuple[str, Sequence[str]]:
        return f"127.0.0.{self.port - 20000}", ("within",) * (self.port - 20001)

    def wait(self) -> str:
        return "4.0.5"

    def _gone(self) -> str | None:
        return None

    def stop(self) -> None:
        pass


def stubs(says: str = "") -> tuple[Cluster, list[Stub]]:
    servers = [Stub(number, says) for number in (1, 2, 3)]
    found = Cluster()
    found.nodes = [Member(f"amqp://guest:guest@{it.host}:{it.port}/v", it, found) for it in servers]
    return found, servers


def test_the_url_of_a_cluster_has_all_hosts_in_their_order() -> None:
    found, servers = stubs()
    assert found.url == "amqp://guest:guest@127.0.0.1:20001,127.0.0.1:20002,127.0.0.1:20003/v"
    parsed = url.parse(found.url)
    assert parsed.hosts == tuple((it.host, it.port) for it in servers)
    assert parsed.vhost == "v"


def test_nodes_that_join_are_told_of_all() -> None:
    assert cluster.joining(["a@localhost", "b@localhost"]).splitlines() == [
        "cluster_formation.peer_discovery_backend = classic_config",
        "cluster_formation.classic_config.nodes.1 = a@localhost",
        "cluster_formation.classic_config.nodes.2 = b@localhost",
    ]


@pytest.mark.parametrize("node", ["rpcq-test-1@localhost", "rabbit@rpcq-test-1", "rabbit@one.example.com"])
def test_a_connection_is_read_off_its_line(node: str) -> None:
    properties = '[{"product","rpcq"},{"capabilities",[{"basic.nack",true}]},{"connection_name","me consume"}]'
    assert Connection.of(f"<{node}.1795562240.680.0>\t55490\t{properties}") == Connection(node, 55490, "me consume")
    assert Connection.of(f"<{node}.1.2.3>\t55490\t[]") == Connection(node, 55490, "")


def test_a_connection_is_found_by_its_name_or_its_port() -> None:
    found, _ = stubs('<n2@localhost.1.2.3>\t4000\t[{"connection_name","me"}]\n<n3@localhost.1.2.3>\t4001\t[]\n')
    assert found.node_of_connection("me") is found.nodes[1]
    assert found.node_of_connection(4001) is found.nodes[2]


def test_what_is_on_two_nodes_or_on_none_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "FIND_SECONDS", 0.0)
    found, _ = stubs("".join(f'<n{it}@localhost.1.2.3>\t4000\t[{{"connection_name","me"}}]\n' for it in (1, 2)))
    for connection in ("me", "other", 4002):
        with pytest.raises(LookupError, match="no single node has the connection"):
            found.node_of_connection(connection)


def test_a_node_that_was_killed_leads_nothing_and_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "FIND_SECONDS", 0.0)
    found, servers = stubs('[{"name":"q","leader":"n1@localhost"},{"name":"p","leader":"n2@localhost"}]')
    assert found.leader_of("q") is found.nodes[0]
    found.nodes[0].kill()
    del servers[0].asked[:]
    with pytest.raises(LookupError, match="no node that is up leads the queue 'q'"):
        found.leader_of("q")
    assert found.leader_of("p") is found.nodes[1]
    assert not servers[0].asked


def test_a_node_that_is_paused_is_not_asked() -> None:
    found, servers = stubs()
    found.nodes[0].pause()
    found.ctl("status")
    assert [len(it.asked) for it in servers] == [0, 1, 0]
    found.nodes[0].resume()
    found.ctl("status")
    assert [(len(it.asked), it.says) for it in servers] == [(1, "resumed"), (1, ""), (0, "")]


def test_a_node_that_comes_back_waits_for_those_that_are_up() -> None:
    found, servers = stubs()
    one, two, _ = found.nodes
    one.kill()
    two.kill()
    one.start()
    assert servers[0].asked[-1][:2] == ("await_online_nodes", "2")
    two.start()
    assert servers[1].asked[-1][:2] == ("await_online_nodes", "3")


def test_with_nothing_to_make_one_of_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "gather", lambda _: Facts(engine_problem="no Docker engine answers"))
    with pytest.raises(Unavailable, match="apt-get install rabbitmq-server") as error, cluster.cluster():
        pass
    assert "no Docker engine answers" in str(error.value)
    assert "RPCQ_TEST_URL" not in str(error.value)


@pytest.mark.parametrize(("way", "expected"), [("", "nodes"), ("node", "nodes"), ("container", "containers of image")])
def test_a_cluster_is_of_nodes_unless_containers_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, way: str, expected: str
) -> None:
    facts = Facts(image="image", way=way, server=Path("/somewhere/rabbitmq-server"))
    monkeypatch.setattr(choosing, "gather", lambda _: facts)
    monkeypatch.setattr(cluster, "of_nodes", lambda *_: (Cluster(origin="nodes"), list))
    monkeypatch.setattr(
        cluster, "of_containers", lambda _say, image, *_: (Cluster(origin=f"containers of {image}"), list)
    )
    with cluster.cluster() as found:
        assert found.origin == expected


def test_a_broker_that_is_not_ours_is_not_taken_down() -> None:
    found = Broker("amqp://there/x", "RPCQ_TEST_URL", "unknown")
    for break_it in (found.restart, found.kill, found.start):
        with pytest.raises(Unavailable, match="RPCQ_TEST_URL is not ours"):
            break_it()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that links have run."""
    commands: list[str] = []
    monkeypatch.setattr(links, "_run", lambda command: commands.append(" ".join(command)))
    return commands


def rule(action: str, start: int, end: int) -> str:
    return f"iptables --wait {action} INPUT --source 127.0.0.{start} --destination 127.0.0.{end} --jump DROP"


def test_a_link_is_cut_where_packets_arrive_and_each_way_is_one_of_its_own(ran: list[str]) -> None:
    found, servers = stubs()
    one, two, three = found.nodes
    with links.Links(servers) as found._links:
        found.cut(three, one)
        found.cut(three, one)
        found.part(one, two)
        assert ran == [rule("--insert", 3, 1), f"within {rule('--insert', 1, 2)}", rule("--insert", 2, 1)]
        del ran[:]
        found.heal()
        found.heal()
        assert ran == [rule("--delete", 2, 1), f"within {rule('--delete', 1, 2)}", rule("--delete", 3, 1)]


def test_a_cluster_that_was_started_without_links_has_none_to_cut() -> None:
    found, _ = stubs()
    with pytest.raises(Unavailable, match="started without links"):
        found.part(*found.nodes[:2])


@pytest.mark.parametrize(
    ("user", "found", "problem"),
    [(1000, "/sbin/it", "this is not root"), (0, None, "missing: iptables, nsenter")],
)
def test_where_no_link_can_be_cut_it_is_said_why(
    monkeypatch: pytest.MonkeyPatch, user: int, found: str | None, problem: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(shutil, "which", lambda _: found)
    with pytest.raises(Unavailable, match=f"that takes root, iptables and nsenter; {problem}"):
        links.check_links()


def test_a_command_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(Unavailable, match="cannot be cut: sh -c echo no >&2; exit 1: no"):
        links._run(["sh", "-c", "echo no >&2; exit 1"])
    with pytest.raises(Unavailable, match="cannot be cut: FileNotFoundError"):
        links._run(["/no/such/program"])


def test_nodes_with_addresses_of_their_own_are_side_by_side_on_the_loopback_network() -> None:
    assert [it.rpartition(".")[2] for it in links.own_addresses(3)] == ["1", "2", "3"]
    assert len({it.rpartition(".")[0] for it in links.own_addresses(3)}) == 1
    assert links.own_addresses(1)[0].startswith("127.")


def test_a_guard_undoes_what_it_was_told_of_when_its_parent_lets_go(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.touch()
    guard = Guard({"undo": [["/no/such/program"], ["false"], ["rm", str(there)]]})
    time.sleep(0.1)
    assert there.exists()
    guard.stop()
    assert not there.exists()


def test_a_guard_pauses_what_it_started_and_lets_it_go_on_and_ends_it_while_it_is_paused(tmp_path: Path) -> None:
    folder, beats = tmp_path / "folder", tmp_path / "beats"
    folder.mkdir()
    beats.touch()
    script = tmp_path / "command"
    script.write_text(f"#!/bin/sh\nwhile :; do echo $$ >> {beats}; sleep 0.01; done\n", "utf-8")
    script.chmod(0o755)
    guard = Guard({"folder": str(folder), "environ": dict(os.environ), "command": [str(script)], "epmd": None})
    try:
        for _ in range(2):
            size = beats.stat().st_size
            until(lambda: beats.stat().st_size > size)  # noqa: B023 - used at once
            guard.tell("pause")
            pid = int(beats.read_text("utf-8").split()[0])
            until(lambda: ") T " in Path(f"/proc/{pid}/stat").read_text("utf-8"))  # noqa: B023 - used at once
            guard.tell("resume")
        guard.tell("pause")
    finally:
        guard.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("command", ["kill", "terminate"])
def test_a_guard_ends_what_it_started_and_starts_it_again(tmp_path: Path, command: str) -> None:
    folder, started = tmp_path / "folder", tmp_path / "pids"
    folder.mkdir()
    started.touch()
    script = tmp_path / "command"
    script.write_text(f"#!/bin/sh\necho $$ >> {started}\nexec sleep 600\n", "utf-8")
    script.chmod(0o755)
    guard = Guard({"folder": str(folder), "environ": dict(os.environ), "command": [str(script)], "epmd": None})
    try:
        for times in (1, 2, 3):
            until(lambda: started.read_text("utf-8").count("\n") == times)  # noqa: B023 - used at once
            guard.tell("start")  # nothing happens: it runs
            guard.tell(command)
            until((folder / "exited").exists)
            pid = int(started.read_text("utf-8").splitlines()[-1])
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            (folder / "exited").unlink()
            guard.tell("start")
        until(lambda: started.read_text("utf-8").count("\n") == 4)
    finally:
        guard.stop()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text("utf-8").splitlines()[-1]), 0)
    with pytest.raises(Unavailable, match="what guards the broker has ended"):
        guard.tell("start")
