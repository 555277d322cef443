"""Dead letters, by the commands that an operator has: `rpcq dlq list` and `rpcq dlq replay`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

MOST = 20
"""Letters of a service that the page shows."""


class FailedError(Exception):
    """A command failed; the text is what it said."""


async def listed(service: str) -> list[dict[str, Any]]:
    """The oldest dead letters of a service."""
    lines = await _rpcq("dlq", "list", service, "--json", "--limit", str(MOST))
    keys = "id", "job", "reason", "error"
    return [{key: letter[key] for key in keys} for letter in map(json.loads, lines)]


async def replayed(service: str, *ids: str) -> int:
    """Have dead letters of a service done again, those of the jobs with these IDs, or all; returns how many."""
    some = [argument for each in ids for argument in ("--id", each)]
    return len(await _rpcq("dlq", "replay", service, "--yes", "--json", *some))


async def _rpcq(*arguments: str) -> list[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rpcq", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        raise
    if process.returncode:
        raise FailedError(err.decode().strip())
    return out.decode().splitlines()
