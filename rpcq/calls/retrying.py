"""Makes a call again if it failed, as its option `retry` says: after a pause, before the deadline of the call."""

from __future__ import annotations

import asyncio
import time

from rpcq import logs
from rpcq.errors import CallError
from rpcq.options import Retry
from rpcq.runtime.backoff import full_jitter

log = logs.get_logger("rpcq.client")


class Retries:
    """The calls that are made again, and the pauses before that.

    Attributes:
        retried: calls that were made again.

    """

    def __init__(self) -> None:
        self._pausing: set[asyncio.Future[None]] = set()
        self._closed = False
        self.retried = 0

    def __len__(self) -> int:
        """Calls that failed and wait to be made again."""
        return len(self._pausing)

    def close(self) -> None:
        """End all pauses: each call ends with its last error."""
        self._closed = True
        for pause in self._pausing:
            pause.cancel()

    async def pause(self, error: CallError, retry: Retry, retries: int, deadline: float, *, idempotent: bool) -> bool:
        """Wait before a call is made again. Returns False, at once, if it is not made again.

        Args:
            error: what the call ended with.
            retry: when it is made again.
            retries: how often it was made again before.
            deadline: of the call, on the monotonic clock.
            idempotent: whether it may be made again where it may have run.

        """
        pause = full_jitter(retry.longest_pause(retries))
        if (
            retries + 1 == retry.max_attempts
            or error.code not in retry.codes
            or (error.executed != "no" and not idempotent)
            or time.monotonic() + pause >= deadline
            or not await self._wait(pause)
        ):
            return False
        log.info("call is made again", correlation_id=error.correlation_id, code=error.code, retries=retries + 1)
        self.retried += 1
        return True

    async def _wait(self, seconds: float) -> bool:
        """Wait. Returns False if `close` ends the pause."""
        if self._closed:
            return False
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pausing.add(ended)
        try:
            await asyncio.wait([ended], timeout=seconds)
        finally:
            self._pausing.discard(ended)
        return not ended.done()
