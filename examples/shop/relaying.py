"""The relay of an outbox, which counts its rows for Prometheus, too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rpcq.outbox import Outbox
from rpcq.outbox.watching import OutboxMetrics

EVERY = 5.0
"""Seconds between two looks at the rows."""


@asynccontextmanager
async def relaying(outbox: Outbox) -> AsyncIterator[None]:
    """Send what is in the outbox while the block runs: the lifespan of a service."""
    async with outbox, OutboxMetrics(outbox, every=EVERY):
        yield
