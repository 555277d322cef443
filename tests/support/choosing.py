"""The ways to a RabbitMQ for the tests: which are tried, in which order, and what is said if none works."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from support.containers import IMAGE, engine_problem, start_container
from support.harness import Say, Unavailable, to_stderr
from support.installing import can_apt_install
from support.nodes import SERVER_FOLDERS, find_server, install, start_node
from support.ports import wait_for_amqp
from support.servers import PLAIN, Broker, Setup

URL_SECONDS = 10.0

ADVICE = f"""\
No RabbitMQ to test against. Do one of these:
  - start Docker (the tests use the image {IMAGE}, and need the Python package testcontainers),
  - install rabbitmq-server (Debian, Ubuntu: apt-get install rabbitmq-server; macOS: brew install rabbitmq),
  - set RPCQ_TEST_URL to a running broker, as in RPCQ_TEST_URL=amqp://guest:guest@localhost:5672/"""


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
    say: Say = to_stderr,
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
