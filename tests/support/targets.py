"""What the workers of the fault tests serve. Each handler first appends its nonce to a file, so that runs are counted.

A worker process imports this as `rpcq worker support.targets:target`. RPCQ_TEST_RUNS names the file, and
RPCQ_TEST_QUEUE_TYPE the kind of the request queue. RPCQ_TEST_TIMES may name another file, for when and in which process
they ran.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

from rpcq import Context, DomainError, Service

APPEND = os.O_APPEND | os.O_CREAT | os.O_WRONLY
_runs = os.open(os.environ["RPCQ_TEST_RUNS"], APPEND)
_times = os.open(os.environ["RPCQ_TEST_TIMES"], APPEND) if "RPCQ_TEST_TIMES" in os.environ else None

target = Service("target", queue_type=os.environ.get("RPCQ_TEST_QUEUE_TYPE", "classic"))  # type: ignore[arg-type]


class Refused(DomainError):
    """What the service says no to."""


def began(nonce: str, *more: str) -> None:
    """Say that the handler of this call was entered, and perhaps more about it."""
    write(nonce, *more)
    if _times is not None:
        os.write(_times, f"{nonce} {time.time():.3f} {os.getpid()}\n".encode())


def cancelled(nonce: str) -> None:
    write(f"cancelled {nonce}")


def write(*lines: str) -> None:
    """One write, so that lines of several processes do not mix."""
    os.write(_runs, "".join(f"{line}\n" for line in lines).encode())


@target.method
async def once(nonce: str, seconds: float = 0.0) -> str:
    began(nonce)
    if seconds:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            cancelled(nonce)
            raise
    return nonce


@target.method(idempotent=True)
async def again(nonce: str, seconds: float = 0.0) -> str:
    return await once(nonce, seconds)


@target.method
def thread(nonce: str, seconds: float = 0.0) -> str:
    began(nonce)
    time.sleep(seconds)
    return nonce


@target.method
async def block(nonce: str, seconds: float) -> str:
    """Blocks the event loop, as no handler should."""
    began(nonce)
    time.sleep(seconds)  # noqa: ASYNC251
    return nonce


@target.method
async def stick(nonce: str) -> str:
    """Does not let itself be cancelled."""
    began(nonce)
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled(nonce)


@target.method
async def die(nonce: str) -> str:
    """A poison request: it kills its worker, but for one that is told to live."""
    began(nonce)
    if not os.environ.get("RPCQ_TEST_LIVES"):
        os.kill(os.getpid(), signal.SIGKILL)
    return nonce


@target.method(idempotent=True)
async def die_again(nonce: str) -> str:
    return await die(nonce)


@target.method(errors=[Refused])
async def refuse(nonce: str) -> None:
    began(nonce)
    raise Refused(f"not {nonce}")


@target.method
async def fail(nonce: str) -> None:
    began(nonce)
    raise ValueError(nonce)


@target.method
async def odd(nonce: str, kind: str) -> Any:
    """Results that cannot be sent, or that their caller does not expect."""
    began(nonce)
    return {"object": object(), "nan": float("nan"), "large": "x" * (2 * 1024 * 1024), "text": nonce}[kind]


@target.method(errors=[Refused])
async def deep(nonce: str) -> None:
    """Says no, in details that are written as JSON, but too deep to be read."""
    began(nonce)
    details: Any = "x" * 2000
    for _ in range(220):
        details = [details]
    raise Refused(f"no to {nonce}", details=details)


@target.method
async def hold(nonce: str, until: str) -> str:
    """Runs until there is a file of that name."""
    began(nonce)
    while not os.path.exists(until):  # noqa: ASYNC110, ASYNC240, PTH110 - nothing tells, and the file is local
        await asyncio.sleep(0.01)
    return nonce


@target.method
async def left(nonce: str, context: Context) -> float:
    """Seconds until the deadline, as the worker counts them."""
    began(nonce)
    return context.deadline.remaining()
