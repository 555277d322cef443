"""The harness that finds or starts RabbitMQ: what it chooses, and what it says when there is nothing to choose."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pamqp import commands, frame

from support import broker, choosing, containers, installing, nodes, ports
from support.broker import VHOST, Broker, CtlFailed, Unavailable, vhost_of, with_vhost
from support.choosing import Facts, Way
from support.guard import Guard

SERVER = Path("/somewhere/rabbitmq-server")


@pytest.mark.parametrize(
    ("facts", "ways"),
    [
        (Facts(url="amqp://there/", engine_problem="", server=SERVER, can_install=True), (Way.URL,)),
        (Facts(url="amqp://there/", engine_problem="none", server=None, can_install=False), (Way.URL,)),
        (Facts(engine_problem="", server=SERVER, can_install=True), (Way.CONTAINER, Way.NODE)),
        (Facts(engine_problem="", server=None, can_install=True), (Way.CONTAINER, Way.INSTALL)),
        (Facts(engine_problem="", server=None, can_install=False), (Way.CONTAINER,)),
        (Facts(engine_problem="none", server=SERVER, can_install=True), (Way.NODE,)),
        (Facts(engine_problem="none", server=None, can_install=True), (Way.INSTALL,)),
        (Facts(engine_problem="none", server=None, can_install=False), ()),
        (Facts(way="container", engine_problem="", server=SERVER, can_install=True), (Way.CONTAINER,)),
        (Facts(way="container", engine_problem="none", server=SERVER, can_install=True), ()),
        (Facts(way="node", engine_problem="", server=SERVER, can_install=True), (Way.NODE,)),
        (Facts(way="node", engine_problem="", server=None, can_install=True), (Way.INSTALL,)),
    ],
)
def test_the_ways_are_tried_in_this_order(facts: Facts, ways: tuple[Way, ...]) -> None:
    assert choosing.plan(facts) == ways


def test_a_given_url_is_all_that_is_looked_at() -> None:
    assert choosing.gather({"RPCQ_TEST_URL": "amqp://there/"}) == Facts(url="amqp://there/")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing is looked for."""
    monkeypatch.setattr(choosing, "engine_problem", lambda: "")
    monkeypatch.setattr(choosing, "find_server", lambda _: SERVER)
    monkeypatch.setattr(choosing, "can_apt_install", lambda: True)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("environ", "image", "way"),
    [
        ({}, containers.IMAGE, ""),
        ({"RPCQ_TEST_IMAGE": ""}, containers.IMAGE, ""),
        ({"RPCQ_TEST_IMAGE": "rabbitmq:x"}, "rabbitmq:x", "container"),
        ({"RPCQ_TEST_IMAGE": "rabbitmq:x", "RPCQ_TEST_WAY": "container"}, "rabbitmq:x", "container"),
        ({"RPCQ_TEST_WAY": "container"}, containers.IMAGE, "container"),
        ({"RPCQ_TEST_WAY": "node"}, containers.IMAGE, "node"),
    ],
)
def test_an_image_that_is_named_is_the_one_and_leaves_containers_alone(
    environ: dict[str, str], image: str, way: str
) -> None:
    facts = choosing.gather(environ)
    assert (facts.image, facts.way) == (image, way)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"RPCQ_TEST_WAY": "boat"}, "has to be container or node"),
        ({"RPCQ_TEST_WAY": "node", "RPCQ_TEST_IMAGE": "rabbitmq:x"}, "an image is for containers"),
    ],
)
def test_what_cannot_be_meant_is_refused(environ: dict[str, str], problem: str) -> None:
    with pytest.raises(Unavailable, match=problem):
        choosing.gather(environ)


def test_a_container_is_of_the_image_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Broker("amqp://there/", "a container", "4.0.5")
    asked: list[str] = []
    monkeypatch.setattr(choosing, "start_container", lambda _say, image, _setup: asked.append(image) or there)
    facts = Facts(image="rabbitmq:x", way="container")
    assert choosing.first(choosing.plan(facts), choosing.starters(facts, print), facts) is there
    assert asked == ["rabbitmq:x"]


def _fails(reason: str) -> Callable[[], Broker]:
    def start() -> Broker:
        raise Unavailable(reason)

    return start


def test_a_way_that_fails_is_told_of_and_the_next_is_tried() -> None:
    there = Broker("amqp://there/", "a node", "4.0.5")
    said: list[str] = []
    starters = {Way.CONTAINER: _fails("the image cannot be had"), Way.NODE: lambda: there}
    found = choosing.first((Way.CONTAINER, Way.NODE), starters, Facts(server=SERVER), said.append)
    assert found is there
    assert said == ["container: the image cannot be had; going on to: private node"]


def test_the_first_way_that_works_is_the_last_that_is_tried() -> None:
    there = Broker("amqp://there/", "a container", "4.0.5")
    starters = {Way.CONTAINER: lambda: there, Way.NODE: _fails("never asked")}
    said: list[str] = []
    assert choosing.first((Way.CONTAINER, Way.NODE), starters, Facts(server=SERVER), said.append) is there
    assert said == []


def test_with_nothing_to_try_the_error_says_what_to_install() -> None:
    facts = Facts(engine_problem="no Docker engine answers")
    with pytest.raises(Unavailable) as error:
        choosing.first(choosing.plan(facts), {}, facts)
    for expected in ("Docker", "apt-get install rabbitmq-server", "RPCQ_TEST_URL", "no Docker engine answers", "PATH"):
        assert expected in str(error.value)


def test_with_only_one_way_allowed_the_error_says_so() -> None:
    facts = Facts(way="container", engine_problem="no Docker engine answers", server=SERVER)
    with pytest.raises(Unavailable, match="no other way than: container, as RPCQ_TEST_WAY or RPCQ_TEST_IMAGE says"):
        choosing.first(choosing.plan(facts), {}, facts)


def test_when_every_way_fails_the_error_has_every_reason() -> None:
    said: list[str] = []
    starters = {Way.CONTAINER: _fails("no such image"), Way.NODE: _fails("disk full")}
    with pytest.raises(Unavailable) as error:
        choosing.first((Way.CONTAINER, Way.NODE), starters, Facts(server=SERVER), said.append)
    assert "no such image" in str(error.value)
    assert "disk full" in str(error.value)
    assert len(said) == 1


@pytest.mark.parametrize("url", ["http://there/", "there:5672", "amqp:///vhost"])
def test_what_is_no_amqp_url_is_refused(url: str) -> None:
    with pytest.raises(Unavailable, match="not an AMQP URL"):
        choosing.use_url(url)


def _executable(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    path.chmod(0o755)
    return path


def test_a_server_on_path_comes_before_one_elsewhere(tmp_path: Path) -> None:
    on_path = _executable(tmp_path / "bin" / "rabbitmq-server")
    elsewhere = _executable(tmp_path / "sbin" / "rabbitmq-server")
    folders = [str(elsewhere.parent)]
    assert nodes.find_server(str(on_path.parent), folders) == on_path
    assert nodes.find_server(str(tmp_path), folders) == elsewhere
    assert nodes.find_server(str(tmp_path), []) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NAME=x\nID=debian\n", True),
        ("ID=ubuntu\nID_LIKE=debian\n", True),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', True),
        ('ID="fedora"\n', False),
        ("ID=alpine\n", False),
        ("", False),
    ],
)
def test_debian_and_its_kin_are_known_by_os_release(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "os-release").write_text(text, "utf-8")
    assert installing.is_debian(tmp_path / "os-release") is expected


def test_no_os_release_is_no_debian(tmp_path: Path) -> None:
    assert not installing.is_debian(tmp_path / "none")


@pytest.mark.parametrize(
    ("url", "vhost"),
    [
        ("amqp://guest:guest@localhost", "/"),
        ("amqp://guest:guest@localhost/", "/"),
        ("amqp://guest:guest@localhost:5672/%2F", "/"),
        ("amqp://guest:guest@localhost:5672/a", "a"),
        ("amqp://guest:guest@localhost:5672/a%2Fb?heartbeat=5", "a/b"),
    ],
)
def test_vhost_of_a_url(url: str, vhost: str) -> None:
    assert vhost_of(url) == vhost
    assert vhost_of(with_vhost(url, vhost)) == vhost


def test_with_another_vhost_the_rest_of_the_url_stays() -> None:
    assert with_vhost("amqps://u:p%40@host:1/x?a=b", "y/z") == "amqps://u:p%40@host:1/y%2Fz?a=b"


def test_a_vhost_is_made_with_full_permissions_for_the_user_of_the_url() -> None:
    asked: list[tuple[str, ...]] = []

    def ctl(args: object) -> str:
        assert isinstance(args, tuple)
        asked.append(args)
        return ""

    found = Broker("amqp://me:secret@localhost:1/one", "here", "4.0.5", ctl)
    url = found.vhost()
    name = vhost_of(url)
    found.close_connections(url, "because")
    found.drop_vhost(url)
    assert url == f"amqp://me:secret@localhost:1/{name}"
    assert asked == [
        ("add_vhost", name),
        ("set_permissions", "-p", name, "me", ".*", ".*", ".*"),
        ("close_all_connections", "--vhost", name, "because"),
        ("delete_vhost", name),
    ]


def test_without_rabbitmqctl_the_url_is_what_there_is() -> None:
    found = Broker("amqp://there/x", "RPCQ_TEST_URL", "unknown")
    assert not found.can_ctl
    assert found.vhost() == found.url
    found.drop_vhost(found.url)
    with pytest.raises(Unavailable, match="RPCQ_TEST_URL"):
        found.ctl("status")
    with pytest.raises(Unavailable):
        found.close_connections(found.url)


def test_a_failure_of_rabbitmqctl_is_not_taken_for_a_missing_one() -> None:
    assert not issubclass(CtlFailed, Unavailable)


def test_stopping_twice_stops_once() -> None:
    stops: list[str] = []
    found = Broker("amqp://there/", "here", "4.0.5", None, lambda: stops.append("stop"))
    found.stop()
    found.stop()
    assert stops == ["stop"]


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], int]]:
    """Listeners that answer the first octets they get; given the answer, the port."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(listener: socket.socket, answer: bytes) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(8)
            peer.sendall(answer)

    def listen(answer: bytes) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(5)
        listeners.append(listener)
        threads.append(threading.Thread(target=serve, args=(listener, answer)))
        threads[-1].start()
        return int(listener.getsockname()[1])

    yield listen
    for thread in threads:
        thread.join()
    for listener in listeners:
        listener.close()


def test_the_version_is_read_from_the_server_properties(answering: Callable[[bytes], int]) -> None:
    start = commands.Connection.Start(server_properties={"version": "4.0.5", "product": "RabbitMQ"})
    assert ports.amqp_version("127.0.0.1", answering(frame.marshal(start, 0)), 1.0) == "4.0.5"


@pytest.mark.parametrize("answer", [b"", b"AMQP\x00\x01\x00\x00", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x01\x00"])
def test_what_does_not_answer_as_a_broker_is_none(answering: Callable[[bytes], int], answer: bytes) -> None:
    with pytest.raises(OSError, match="AMQP 0-9-1"):
        ports.amqp_version("127.0.0.1", answering(answer), 1.0)


def test_waiting_for_a_broker_is_bounded_and_ends_early_for_a_reason() -> None:
    [port] = ports.free_ports(1)
    with pytest.raises(Unavailable, match=f"no AMQP at 127.0.0.1:{port} within 0 s"):
        ports.wait_for_amqp("127.0.0.1", port, 0.0, lambda: None)
    with pytest.raises(Unavailable, match="the node ended"):
        ports.wait_for_amqp("127.0.0.1", port, 60.0, lambda: "the node ended")


def test_free_ports_differ() -> None:
    assert len(set(ports.free_ports(5))) == 5


def test_a_node_has_nothing_of_the_machine_in_its_environment(tmp_path: Path) -> None:
    environ = nodes.node_environment(tmp_path, "n@localhost", 1, 2, 3)
    paths = {key: value for key, value in environ.items() if key.startswith("RABBITMQ_") and "/" in value}
    assert len(paths) >= 8
    assert all(Path(value).is_relative_to(tmp_path) for value in paths.values())
    assert environ["HOME"] == str(tmp_path)
    assert environ["RABBITMQ_NODE_PORT"] == "1"
    assert (tmp_path / ".erlang.cookie").stat().st_mode & 0o777 == 0o400
    assert f"default_vhost = {VHOST}" in (tmp_path / "rabbitmq.conf").read_text("utf-8")


def test_services_are_kept_from_starting_only_meanwhile(tmp_path: Path) -> None:
    policy = tmp_path / "policy-rc.d"
    with installing.no_services_started(policy):
        assert subprocess.run([policy], check=False).returncode == 101
    assert not policy.exists()


def test_a_policy_left_behind_by_a_kill_forbids_nothing(tmp_path: Path) -> None:
    policy = tmp_path / "policy-rc.d"
    killed = (
        "import os, pathlib, signal, sys\n"
        "from support.installing import no_services_started\n"
        "with no_services_started(pathlib.Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    folder = Path(installing.__file__).parents[1]
    command = [sys.executable, "-c", killed, str(policy)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(folder)}, check=False)
    assert policy.exists()
    assert subprocess.run([policy], check=False).returncode == 0


def test_a_policy_of_the_machine_stays_as_it_is(tmp_path: Path) -> None:
    policy = _executable(tmp_path / "policy-rc.d", "#!/bin/sh\nexit 104\n")
    with installing.no_services_started(policy):
        assert subprocess.run([policy], check=False).returncode == 104
    assert policy.read_text("utf-8") == "#!/bin/sh\nexit 104\n"


def _guarded(folder: Path, started: Path) -> Guard:
    """A guard over a command that leaves a process of its own behind, in another session, and writes down its pid."""
    command = _executable(
        folder / "command",
        f"#!/bin/sh\nsetsid sleep 600 &\necho $! > {started}.part; mv {started}.part {started}; exec sleep 600\n",
    )
    return Guard({"folder": str(folder), "environ": dict(os.environ), "command": [str(command)], "epmd": None})


def _wait_for_file(path: Path) -> str:
    for _ in range(200):
        if path.exists():
            return path.read_text("utf-8")
        threading.Event().wait(0.01)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans to the guard")
@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs the command setsid")
def test_the_guard_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    folder, started = tmp_path / "folder", tmp_path / "pid"
    folder.mkdir()
    guard = _guarded(folder, started)
    pid = int(_wait_for_file(started))
    guard.stop()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_command_line_wants_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert broker.main([]) == 2
    assert broker.main(["--"]) == 2
    assert broker.main(["--postgres", "DATABASE", "--"]) == 2
    assert "usage" in capsys.readouterr().err
