"""What the worker serves that hostile peers attack, and how it bears it.

RPCQ_TEST_TOKEN is what `secret` is for. Into the file RPCQ_TEST_BEARING goes, twice a second, a line of JSON: how long
the event loop was busy at a stretch, in milliseconds of the processor's time, and the most memory that the process had.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel

from rpcq import Context, PermissionDenied, Service

LOOK = 0.005


class Row(BaseModel):
    article: int
    count: int
    price: float


class Plus(BaseModel):
    left: Tree
    right: Tree


class Minus(BaseModel):
    left: Tree
    right: Tree


Tree: TypeAlias = "Plus | Minus | int"


async def authorize(context: Context) -> str | None:
    if context.method == "secret" and context.metadata.get("x-token") != os.environ["RPCQ_TEST_TOKEN"]:
        raise PermissionDenied("this token is not good")
    return None


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[None]:
    watching = asyncio.create_task(watch(Path(os.environ["RPCQ_TEST_BEARING"]).write_text))
    yield
    watching.cancel()


async def watch(tell: Callable[[str], object]) -> None:
    longest, next_word = 0.0, 0.0
    while True:
        wall, used = time.perf_counter(), time.thread_time()
        await asyncio.sleep(LOOK)
        now = time.perf_counter()
        # A process that has to wait for the processor is late as well, and uses none.
        longest = max(longest, min(now - wall - LOOK, time.thread_time() - used))
        if now >= next_word:
            next_word = now + 0.5
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            tell(json.dumps({"longest_ms": longest * 1000, "most_mib": most}))


others = Service("others", queue_type="quorum", lifespan=watched, authorize=authorize)


@others.method
async def add(x: int, y: int) -> int:
    return x + y


@others.method
async def echo(value: Any = None) -> Any:
    return value


@others.method
async def secret() -> str:
    return "the secret"


@others.method
async def rows(rows: list[Row]) -> int:
    return len(rows)


@others.method
async def mixed(values: dict[str, list[int | Row | None]]) -> int:
    return len(values)


@others.method
async def tree(tree: Tree) -> int:
    return 1
