"""A client or a worker that is opened as soon as the broker lets it, however long that takes."""

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
"""Seconds: the upper bounds of the pause before the first and the n-th try, and for what somebody has to mend."""

Kept = TypeVar("Kept", Client, Worker)

log = logs.get_logger("rpcq.web")


class Keeper(Generic[Kept]):
    """Opens one; from then on it keeps itself connected.

    Each attempt is with a new one, as each can be opened once only.

    Attributes:
        opened: the one that is open, or None.
        cause: why the last attempt failed, or None.
        task: runs until one is open; it fails with what is no `BrokerError`, since no attempt mends that.

    """

    def __init__(self, what: str, make: Callable[[], Kept], start: Callable[[Kept], Awaitable[object]]) -> None:
        self.what = what
        self.opened: Kept | None = None
        self.cause: BrokerError | None = None
        self._make: Callable[[], Kept] = make
        self._start: Callable[[Kept], Awaitable[object]] = start
        self.task: asyncio.Task[None] = asyncio.create_task(self._open())

    @property
    def why_not_ready(self) -> str | None:
        """What is missing, or None."""
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
            say = log.error if self.cause.permanent else log.warning
            say(f"{self.what} not open yet", cause=str(self.cause), error=type(self.cause).__name__)
            pause = backoff.jittered()
            await asyncio.sleep(full_jitter(PERMANENT_PAUSE) if self.cause.permanent else pause)

    async def give_up(self) -> None:
        """Try no more; what was being opened is closed, and what is open stays so."""
        self.task.cancel()
        await asyncio.wait([self.task])
