"""The echo service."""

from __future__ import annotations

import asyncio

from consumer_service.contracts import EchoApi
from rpcq import Service

echo = Service(api=EchoApi)


@echo.method
async def process(message: str, delay: float = 0.0) -> str:
    """Return the message, processed, after `delay` seconds of simulated work."""
    if delay > 0:
        await asyncio.sleep(delay)
    return f"Consumer processed: {message}"
