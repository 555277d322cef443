"""A sender of jobs that dies at a chosen point: `targets_sending.py SERVICE PREFIX COUNT POINT`; broker by RPCQ_URL.

It prints each name whose job is sent. With the job number COUNT it dies: "before it is written", "after it is
written", which is before its confirmation is read, or "after it is confirmed", which is before `send` returns.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from rpcq import Client
from rpcq.jobs.confirming import Sending
from rpcq.transport.base import Published
from rpcq.transport.rabbitmq.publishing import PublishingSession

SERVICE, PREFIX, COUNT, POINT = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
sent: list[str] = []


def die(point: str) -> None:
    if point == POINT and len(sent) == COUNT:
        os.kill(os.getpid(), signal.SIGKILL)


write, on_published = PublishingSession._write, Sending.on_published


def writing(self: PublishingSession, messages: Any) -> None:
    die("before it is written")
    write(self, messages)
    die("after it is written")


def confirmed(self: Sending, published: Published) -> None:
    die("after it is confirmed")
    on_published(self, published)


PublishingSession._write = writing  # type: ignore[method-assign]
Sending.on_published = confirmed  # type: ignore[method-assign]


async def main() -> None:
    async with Client(namespace=os.environ["RPCQ_NAMESPACE"]) as client:
        while True:
            name = f"{PREFIX}-{len(sent)}"
            await client.send(f"{SERVICE}.work", name=name)
            sent.append(name)
            print(name, flush=True)  # noqa: T201 - whoever started it reads it


asyncio.run(main())
