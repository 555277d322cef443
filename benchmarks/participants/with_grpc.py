"""`grpc.aio`, with no broker: the client is connected to the worker over TCP, so that the worker has to be there.

Each call has a deadline of 30 seconds, which the worker gets. HTTP/2 matches replies to calls. There is nothing to
confirm or to acknowledge, and a worker takes all calls that come: a prefetch would refuse the others. The handler is a
generic one: parameters and result are JSON, by orjson, which is the fastest one, and nothing is validated.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc  # type: ignore[import-untyped]  # it ships no types
import orjson

from benchmarks.participants import Call, Options

PACKAGES = ("grpcio",)
SERVICE = "Calculator"
TIMEOUT = 30.0


@asynccontextmanager
async def worker(_options: Options) -> AsyncIterator[str]:
    """Serve while inside; gives the address."""

    async def add(parameters: dict[str, int], _context: object) -> int:
        return parameters["x"] + parameters["y"]

    handler = grpc.unary_unary_rpc_method_handler(add, orjson.loads, orjson.dumps)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"add": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


@asynccontextmanager
async def client(options: Options) -> AsyncIterator[Call]:
    """Be connected while inside."""
    async with grpc.aio.insecure_channel(options.server) as channel:
        add: Any = channel.unary_unary(f"/{SERVICE}/add", orjson.dumps, orjson.loads)

        async def call(i: int) -> int:
            return cast("int", await add({"x": i, "y": 1}, timeout=TIMEOUT))

        yield call
