"""The contenders: one small module each, all with the same two functions; one is a program in C.

`worker(options)` serves `add(x, y)` while inside; `client(options)` gives the function that calls it.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, cast

Call = Callable[[int], Awaitable[int]]
"""Sends `{"x": i, "y": 1}`; its answer should be `i + 1`."""


@dataclass(frozen=True, slots=True)
class Options:
    """The same for all contenders."""

    url: str
    namespace: str
    """Begins all names at the broker, so that runs do not meet."""
    prefetch: int
    """Requests or jobs that a worker may hold unacknowledged."""
    server: str = ""
    """The address of the contender's server, if that is not the RabbitMQ."""


class Participant(Protocol):
    """What the module of a contender offers."""

    PACKAGES: tuple[str, ...]
    """The distributions whose versions matter."""

    def worker(self, options: Options) -> AbstractAsyncContextManager[str | None]:
        """Serve while inside; gives the address, if clients connect to the worker itself."""

    def client(self, options: Options) -> AbstractAsyncContextManager[Call]:
        """Be connected while inside."""


PEERS = {
    "rpcq": "with_rpcq",
    "rpcq-single": "with_rpcq:single",
    "aio-pika": "with_aio_pika",
    "faststream": "with_faststream",
    "nats-py": "with_nats",
    "grpc.aio": "with_grpc",
}
WATCHED = {
    "rpcq+metrics": "with_rpcq_watched:metrics",
    "rpcq+sampled": "with_rpcq_watched:sampled",
    "rpcq+everything": "with_rpcq_watched:everything",
}
FLOOR = {"floor": "with_sockets"}
MODULES = PEERS | WATCHED | FLOOR
"""Name -> module, or what in it is the contender."""
PROGRAMS = {"rabbitmq-c": "rabbitmq.c"}
"""Name -> source of a program of its own, which does what `__main__.py` does for the modules."""


def load(name: str) -> Participant:
    """Import a contender, and nothing of the others: a process pays for what it uses."""
    module, _, attribute = MODULES[name].partition(":")
    found = importlib.import_module(f"{__name__}.{module}")
    return cast("Participant", getattr(found, attribute) if attribute else found)
