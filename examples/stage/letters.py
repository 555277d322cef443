"""The dead letters of a service, for a page."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

from rpcq import RpcqError
from rpcq.dead_letters import DeadLetters

MOST = 20
"""Letters of a service that the page shows."""


async def listed(service: str) -> list[dict[str, Any]]:
    """The oldest dead letters of a service."""
    found = await DeadLetters(service).find(limit=MOST)
    return [{"id": it.id, "job": it.label, "reason": it.reason, "error": it.error} for it in found.letters]


async def replayed(service: str, *ids: str) -> int:
    """Have dead letters of a service done again, those of the jobs with these IDs, or all; returns how many.

    Raises:
        HTTPException: not all were sent again.

    """
    try:
        found = await DeadLetters(service).replay(ids=ids)
    except RpcqError as error:
        raise HTTPException(503, f"Not all dead letters were replayed: {error}") from error
    if found.kept:
        raise HTTPException(503, f"Not all dead letters were replayed: {found.kept[0][1]}")
    return len(found.letters)
