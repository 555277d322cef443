"""rpcq as it comes: confirms on both sides, `mandatory`, validation and a deadline for every call.

`single` is the same with `batching=False` at both ends: each message has one request or one reply.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from benchmarks.participants import Call, Options

if TYPE_CHECKING:
    from rpcq.observer import Observer

PACKAGES = ("rpcq-rabbitmq", "aio-pika", "aiormq")


@asynccontextmanager
async def worker(options: Options, observers: Sequence[Observer] = (), *, batching: bool = True) -> AsyncIterator[None]:
    """Serve while inside."""
    from rpcq import Service, Worker

    calculator = Service("calculator", batching=batching)

    @calculator.method
    async def add(x: int, y: int) -> int:
        return x + y

    async with Worker(
        calculator, url=options.url, prefetch=options.prefetch, namespace=options.namespace, observers=observers
    ):
        yield


@asynccontextmanager
async def client(options: Options, observers: Sequence[Observer] = (), *, batching: bool = True) -> AsyncIterator[Call]:
    """Be connected while inside."""
    from rpcq import Client

    async with Client(options.url, namespace=options.namespace, observers=observers, batching=batching) as client:
        await client.wait_for_service("calculator", timeout=30)
        calculator = client.service("calculator")

        async def call(i: int) -> int:
            return cast("int", await calculator.add(x=i, y=1))

        yield call


single = SimpleNamespace(
    PACKAGES=PACKAGES,
    worker=functools.partial(worker, batching=False),
    client=functools.partial(client, batching=False),
)
