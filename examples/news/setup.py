"""Makes what has to be there before anything runs: tables, and the queues of all services.

Queues come first of all: what is published before a subscription has its queue is not in it.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys

from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncEngine

from examples.news import archive, editor, emails, mobile, phones
from rpcq import outbox

TARGETS = {name: f"examples.news.{name}:{name}" for name in ("editor", "mobile", "emails", "web")}
"""What `rpcq worker` calls each service."""


async def create_tables() -> None:
    """Make all tables, unless they are there."""
    for module in (editor, emails, archive):
        await _create(module.engine, module.Base.metadata, outbox.metadata)
    await _create(mobile.engine, outbox.metadata)
    await _create(phones.engine, phones.Base.metadata)


async def _create(engine: AsyncEngine, *tables: MetaData) -> None:
    async with engine.begin() as connection:
        for each in tables:
            await connection.run_sync(each.create_all)
    await engine.dispose()  # its connections belong to this event loop


def declare() -> None:
    """Declare the queues of all services.

    Raises:
        CalledProcessError: `rpcq setup` failed, and said why.

    """
    command = [sys.executable, "-m", "rpcq", "setup", *TARGETS.values()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own


if __name__ == "__main__":
    asyncio.run(create_tables())
    declare()
