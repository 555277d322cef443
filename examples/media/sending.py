"""Sends the steps of uploads, and hears how far they are.

How far a watched job is, its worker tells the client that sent it. A job in an outbox is sent by a relay, which does
not watch. So the web app sends these jobs itself, and the table says what is not sent yet. If the app is killed before
it could note that a step was sent, the step is sent again. Its key says that it is the same one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from examples.media.books import Books
from examples.media.steps import BY_NAME
from rpcq import Progress, SendError, ServiceUnavailable, WatchedJob
from rpcq.web import Rpc

LOOK_EVERY = 1.0
"""Seconds between two looks for steps that are not sent: a broker that was away, another app that was killed."""

AT_ONCE = 100
"""Steps that are sent after one look."""

LISTEN = 3600.0
"""Seconds after which nothing more is expected to be heard of a job."""

log = logging.getLogger("media")

Key = tuple[str, str]


class Sender:
    """Sends what is not sent, until it is cancelled.

    Args:
        books: say what is not sent.
        rpc: sends it.

    Attributes:
        trouble: why the last step could not be sent; None if it was.

    """

    def __init__(self, books: Books, rpc: Rpc) -> None:
        self.trouble: str | None = None
        self._books = books
        self._rpc = rpc
        self._told: dict[Key, Progress] = {}
        self._changed = asyncio.Event()
        self._more = asyncio.Event()

    def wake(self) -> None:
        """Say that there is something to send."""
        self._more.set()

    async def run(self) -> None:
        """Send what is not sent, now and whenever there is more, until it is cancelled."""
        async with asyncio.TaskGroup() as listeners:
            while True:
                self._more.clear()
                try:
                    for upload, name in await asyncio.to_thread(self._books.unsent, AT_ONCE):
                        job = await self._send(upload, name)
                        listeners.create_task(self._listen((upload, name), job))
                    self.trouble = None
                except (SendError, ServiceUnavailable) as error:  # the second one: there was no connection yet
                    if self.trouble is None:
                        log.warning("steps cannot be sent, and wait: %s", error)
                    self.trouble = str(error)
                    await asyncio.sleep(LOOK_EVERY)
                    continue
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY):
                        await self._more.wait()

    async def _send(self, upload: str, name: str) -> WatchedJob[Any]:
        step = BY_NAME[name]
        client = self._rpc.client.with_options(watch=True, idempotency_key=f"{upload}.{name}")
        job = await client.send(step.job, upload=upload, **step.parameters)
        await asyncio.to_thread(self._books.sent, upload, name, job.id)
        return job

    async def _listen(self, key: Key, job: WatchedJob[Any]) -> None:
        try:
            async for step in job.progress(timeout=LISTEN):
                self._told[key] = step
                self._notify()
        except TimeoutError:
            log.warning("step %s of %s told nothing of its end for an hour", key[1], key[0])
        finally:
            self._told.pop(key, None)
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def told(self) -> AsyncIterator[tuple[str, str, Progress]]:
        """Upload, step and progress: of all steps under way, and then whenever one is told of."""
        seen: dict[Key, Progress] = {}
        while True:
            changed = self._changed
            new = {key: step for key, step in self._told.items() if seen.get(key) != step}
            seen = dict(self._told)
            for (upload, name), step in new.items():
                yield upload, name, step
            await changed.wait()
