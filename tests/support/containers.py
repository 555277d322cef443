"""RabbitMQ in a container, where a Docker engine answers."""

from __future__ import annotations

import contextlib
import gc
import io
import secrets
import tarfile
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from support.guard import Guard
from support.harness import CtlFailed, Say, Unavailable, brief, decoded, tail
from support.ports import free_ports, unless_a_port_is_taken
from support.servers import PLAIN, STOP_SECONDS, VHOST, Broker, Server, Setup

IMAGE = "rabbitmq:4.0-management"
"""The image of containers, where RPCQ_TEST_IMAGE does not name another."""

CONTAINER_FOLDER = "/tmp/rpcq-test"  # in the container, where nobody else is
CONTAINER_PORT = 5680
WAIT = f"until [ -e {CONTAINER_FOLDER}/ready ]; do sleep 0.1; done; exec docker-entrypoint.sh rabbitmq-server"
"""The setup of a container: the folder of its files, the first of its further ports, and how it waits for the files."""

ENGINE_SECONDS = 3


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
        return f"no Docker engine answers ({brief(error)})"
    try:
        client.ping()
    except Exception as error:  # noqa: BLE001 - requests', docker's, paramiko's: any means no engine
        return f"the Docker engine does not answer ({brief(error)})"
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
        raise Unavailable(f"the container could not be started ({brief(error)})") from error

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
        raise Unavailable(f"the image {image} cannot be had ({brief(error)})") from error


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
            raise CtlFailed(f"rabbitmqctl {' '.join(args)}: exit code {code}\n{decoded(out)}{decoded(err)}")
        return decoded(out)

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
        return f"the container ended while starting:\n{tail(decoded(self._container.logs()))}"

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
