"""The contenders of `benchmarks.jobs`: one small module each, all with the same functions.

A job gets a text and does nothing. All use durable quorum queues and persistent messages, a prefetch of the same size,
and one process to send and one to run jobs.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, cast

from benchmarks.participants import Options

TEXT = "x" * 88
"""The parameter of every job. With it, the body of rpcq's message has 100 bytes."""
BODY = b'{"text":"%s"}' % TEXT.encode()

Send = Callable[[int], Awaitable[None]]
"""Sends so many jobs at once, and waits until the broker has confirmed all of them."""
Ended = Callable[[], None]
"""Called once for each job, at the end of its handler; also from other threads than that of the event loop."""


class Participant(Protocol):
    """What the module of a contender offers."""

    PACKAGES: tuple[str, ...]
    """The distributions whose versions matter."""
    PROMISES: str
    """How it sends and acknowledges, for the table."""

    def sender(self, options: Options) -> AbstractAsyncContextManager[Send]:
        """Be connected, with the queue declared, while inside."""

    def worker(self, options: Options, ended: Ended) -> AbstractAsyncContextManager[None]:
        """Run jobs while inside."""

    def names(self, options: Options) -> tuple[list[str], list[str]]:
        """The queues and the exchanges that are left at the broker, to be deleted."""


MODULES = {
    "floor": "with_sockets",
    "rpcq": "with_rpcq",
    "rpcq-each": "with_rpcq_each",
    "celery": "with_celery",
    "taskiq": "with_taskiq",
    "dramatiq": "with_dramatiq",
    "faststream": "with_faststream",
}


def load(name: str) -> Participant:
    """Import a contender, and nothing of the others: a process pays for what it uses."""
    return cast("Participant", importlib.import_module(f"{__name__}.{MODULES[name]}"))
