"""rpcq with a concurrent `send` for each job, where several are sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.job_participants import TEXT, Options, Send
from benchmarks.job_participants.with_rpcq import PACKAGES, PROMISES, client, names, worker

__all__ = ["PACKAGES", "PROMISES", "names", "sender", "worker"]


@asynccontextmanager
async def sender(options: Options) -> AsyncIterator[Send]:
    """Be connected while inside."""
    async with client(options) as (connected, service):
        job = service.jobs["nothing"].handler

        async def send(count: int) -> None:
            await asyncio.gather(*(connected.send(job, text=TEXT) for _ in range(count)))

        yield send
