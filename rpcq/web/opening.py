"""Opens a client or a worker in the background, and tries again until it is open."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from rpcq import logs
from rpcq.client import Client
from rpcq.errors import BrokerError
from rpcq.runtime.backoff import Backoff, full_jitter
from rpcq.worker import Worker

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0
PERMANENT_PAUSE: Final = 30.0
"""Seconds, upper bounds of a pause: after the first try, after any try, and after an error that somebody has to fix."""

Opened = TypeVar("Opened", Client, Worker)

log = logs.get_logger("rpcq.web")


class Opener(Generic[Opened]):
    """Opens a client or a worker in the background, until it is open. After that, it reconnects by itself.

    Each attempt makes a new client or worker, since each can be opened only once.

    Args:
        what: "client" or "worker", for messages.
        make: makes one that is not open.
        start: opens it.

    Attributes:
        opened: the client or worker, once it is open; else None.
        cause: error of the last attempt, or None.
        task: runs until one is open. It fails with an error that is not a `BrokerError`: trying again does not help.

    """

    def __init__(self, what: str, make: Callable[[], Opened], start: Callable[[Opened], Awaitable[object]]) -> None:
        self.what = what
        self.opened: Opened | None = None
        self.cause: BrokerError | None = None
        self._make: Callable[[], Opened] = make
        self._start: Callable[[Opened], Awaitable[object]] = start
        self.task: asyncio.Task[None] = asyncio.create_task(self._open())

    @property
    def why_not_ready(self) -> str | None:
        """Why it is not connected, or None if it is."""
        if self.opened is None:
            cause = "" if self.cause is None else f": {self.cause}"
            return f"the {self.what} has not reached the broker yet{cause}"
        return None if self.opened.connected else f"the {self.what} is not connected to the broker"

    async def _open(self) -> None:
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        while True:
            made = self._make()
            try:
                await self._start(made)
            except BrokerError as error:
                self.cause = error
            else:
                self.opened, self.cause = made, None
                return
            write = log.error if self.cause.permanent else log.warning
            write(f"{self.what} not open yet", cause=str(self.cause), error=type(self.cause).__name__)
            pause = backoff.jittered()
            await asyncio.sleep(full_jitter(PERMANENT_PAUSE) if self.cause.permanent else pause)

    async def give_up(self) -> None:
        """Stop trying: close what is being opened; what is open stays open."""
        self.task.cancel()
        await asyncio.wait([self.task])
