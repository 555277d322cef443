"""What the workers of the soak serve: two services alike, in two generations, as during a deploy.

A worker process imports this as `rpcq worker soak.services:target soak.services:other`. RPCQ_TEST_GENERATION says
which one it is of, and RPCQ_TEST_STORE where the store is that the workers share; `other` keeps its answers there. To a
worker of the other generation, each has methods and parameters that it does not know.
"""

from __future__ import annotations

import asyncio
import os
import time
import zlib

from rpcq import Context, Service
from soak.store import SharedAnswers
from support import targets
from support.targets import began, once, target, write

__all__ = ["other", "target"]

other = Service("other", queue_type=target.queue_type, result_store=SharedAnswers(os.environ["RPCQ_TEST_STORE"]))
for _method in target.methods.values():
    other.method(name=_method.name, idempotent=_method.idempotent, errors=_method.errors)(_method.handler)

CALL = "x-call"
"""The header by which the requests of one key are told apart: their parameters have to be the same."""


def entered(nonce: str, context: Context) -> str:
    """Say that a call of this key was entered: which one."""
    call = context.metadata[CALL]
    began(call, f"key {nonce} {call}")
    return call


def failed(nonce: str, call: str) -> None:
    """Say that it failed, by which the key is free again."""
    write(f"failed {nonce} {call}")


async def keyed(nonce: str, context: Context, seconds: float = 0.0) -> str:
    call = entered(nonce, context)
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        failed(nonce, call)
        raise
    return call


def keyed_thread(nonce: str, context: Context, seconds: float = 0.0) -> str:
    call = entered(nonce, context)
    time.sleep(seconds)
    return call


async def keyed_fails(nonce: str, context: Context, seconds: float = 0.0) -> str:
    """Fails for every second call, whatever its key."""
    call = await keyed(nonce, context, seconds)
    if zlib.crc32(call.encode()) % 2:
        failed(nonce, call)
        raise ValueError(call)
    return call


async def changed_former(nonce: str, seconds: float = 0.0) -> str:
    return await once(nonce, seconds)


async def changed_latter(nonce: str, amount: int, seconds: float = 0.0) -> str:
    return await once(nonce, seconds)


for _service in (target, other):
    for _handler in (keyed, keyed_thread, keyed_fails):
        _service.method(_handler)
    if os.environ["RPCQ_TEST_GENERATION"] == "former":
        _service.method(name="former")(once)
        _service.method(name="former_again", idempotent=True)(targets.again)
        _service.method(name="former_keyed")(keyed)
        _service.method(name="changed")(changed_former)
    else:
        _service.method(name="latter")(once)
        _service.method(name="latter_again", idempotent=True)(targets.again)
        _service.method(name="latter_keyed")(keyed)
        _service.method(name="changed")(changed_latter)
