"""The service that counts who signs up, by the domain of the address.

It knows of users by the event alone. While it does not run, its queue keeps the events for it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy import Engine

from examples.mail.contracts import UserCreated
from examples.mail.tables import SignUp, add_once, opened
from rpcq import Context, Service


@asynccontextmanager
async def database() -> AsyncGenerator[Engine, None]:
    """Open the database of `MAIL_DATABASE`."""
    with opened() as engine:
        yield engine


analytics = Service("analytics", lifespan=database)


@analytics.on(UserCreated, timeout=60)
def count(event: UserCreated, context: Context[Engine]) -> None:
    """Count a user, once."""
    add_once(context.state, SignUp(user_id=event.user_id, domain=event.address.rpartition("@")[2]))
