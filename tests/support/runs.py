"""Runs of handlers that keep how they ended."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from rpcq.execution import Run
from rpcq.invocation import Interruption, Invocation

PATIENCE: Final = 5.0
"""Seconds until a run must have ended."""


class Recorded(Run):
    """A run that keeps how it ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[tuple[str, Any]] = []
        self.over = asyncio.Event()

    @property
    def id(self) -> str:
        return "id"

    def returned(self, invocation: Invocation, value: Any) -> None:
        self._end("returned", value)

    def raised(self, invocation: Invocation, error: BaseException) -> None:
        self._end("raised", error)

    def interrupted(self, invocation: Invocation, why: Interruption) -> None:
        self._end("interrupted", why)

    def _end(self, how: str, what: Any) -> None:
        self.ends.append((how, what))
        self.over.set()

    async def end(self) -> tuple[str, Any]:
        """How it ended, once it has ended."""
        async with asyncio.timeout(PATIENCE):
            await self.over.wait()
        (end,) = self.ends
        return end
