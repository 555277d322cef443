"""Ports of this machine: free ones, and whether a broker answers on one."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable
from typing import TypeVar

from support.harness import Unavailable

PORT_TAKEN = ("eaddrinuse", "already in use", "address in use", "already allocated")
PORTS = range(20000, 32000)
"""Where free ports are looked for.

Below those that the kernel gives to outgoing connections, on any system: a client that tries a port of that range
while nobody listens there may be given the same one as its own, is then connected to itself, and the broker that
was taken down cannot come back.
"""

Found = TypeVar("Found")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that are free now, all different."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().choice(PORTS)
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            ports.add(port)
    return list(ports)


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
