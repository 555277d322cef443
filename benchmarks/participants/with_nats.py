"""nats-py's request and reply, on a NATS server: another broker, made for short messages that are not stored.

The client's timeout is 30 seconds, and stays with the client. A request that nobody subscribes to is an error at once.
There are no confirms and no acknowledgements, so that what a worker holds is lost with it, and is not limited. Nothing
is validated. JSON is orjson's, which is the fastest one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import nats
import orjson
from nats.aio.msg import Msg

from benchmarks.participants import Call, Options

PACKAGES = ("nats-py",)
TIMEOUT = 30.0


@asynccontextmanager
async def worker(options: Options) -> AsyncIterator[None]:
    """Serve while inside."""

    async def add(request: Msg) -> None:
        parameters = orjson.loads(request.data)
        await request.respond(orjson.dumps(parameters["x"] + parameters["y"]))

    async with await nats.connect(options.server) as connection:
        await connection.subscribe(f"{options.namespace}.add", queue="workers", cb=add)
        await connection.flush()
        yield


@asynccontextmanager
async def client(options: Options) -> AsyncIterator[Call]:
    """Be connected while inside."""
    async with await nats.connect(options.server) as connection:
        name = f"{options.namespace}.add"

        async def call(i: int) -> int:
            reply = await connection.request(name, orjson.dumps({"x": i, "y": 1}), timeout=TIMEOUT)
            return cast("int", orjson.loads(reply.data))

        yield call
