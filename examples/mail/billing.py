"""The service that bills: it opens an account for each new user.

It knows of users by the event alone. While it does not run, its queue keeps the events for it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy import Engine

from examples.mail.contracts import UserCreated
from examples.mail.tables import Account, add_once, opened
from rpcq import Context, Service


@asynccontextmanager
async def database() -> AsyncGenerator[Engine, None]:
    """Open the database of `MAIL_DATABASE`."""
    with opened() as engine:
        yield engine


billing = Service("billing", lifespan=database)


@billing.on(UserCreated, timeout=60)
def open_account(event: UserCreated, context: Context[Engine]) -> None:
    """Open an account, unless the user has one."""
    add_once(context.state, Account(user_id=event.user_id, cents=0))
