"""A running RabbitMQ as tests have it, and what every way to start one has in common."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlsplit

from support.harness import Unavailable
from support.ports import wait_for_amqp

VHOST = "rpcq-test"
"""Default vhost of a broker started here: `Broker.url` is a fresh vhost without a call of rabbitmqctl."""

START_SECONDS = 180.0
STOP_SECONDS = 30.0


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
    def release(self) -> tuple[int, ...]:
        """The first two numbers of its version, such as (4, 3)."""
        return tuple(int(part) for part in self.version.split(".")[:2])

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


def vhost_of(url: str) -> str:
    """The vhost that an AMQP URL names; without a path, and with the path "/", it is the vhost "/"."""
    return unquote(urlsplit(url).path.removeprefix("/")) or "/"


def with_vhost(url: str, vhost: str) -> str:
    """The same URL with another vhost."""
    return urlsplit(url)._replace(path="/" + quote(vhost, safe="")).geturl()
