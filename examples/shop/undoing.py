"""How a step of an order ends that others come after, and before: done, tried again, or undone with all before it."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncSession

from rpcq import Context, Event, GiveUp, Retry
from rpcq.outbox import Outbox

RETRY = Retry(max_attempts=6, initial_backoff=0.5, max_backoff=30)
"""How often a step is tried. What fails then is for people: a dead letter, or undone."""

log = logging.getLogger("shop")


@asynccontextmanager
async def undone(
    outbox: Outbox, db: AsyncSession, context: Context, failed: Callable[[str], Event]
) -> AsyncGenerator[None, None]:
    """Publish that a step has failed if it fails for good: with `GiveUp`, or at its last attempt.

    What the step itself wrote is rolled back. The event is in the transaction that has the key of the job: so the step
    is done then, and no dead letter. Whoever did something for the order before hears the event, and undoes it.

    Args:
        outbox: publishes the event.
        db: the handler's session.
        context: says which attempt this is.
        failed: makes the event of the reason.

    """
    try:
        async with db.begin_nested():
            yield
    except GiveUp as error:
        outbox.publish(db, failed(error.reason))
    except Exception as error:
        if not context.is_last_attempt:
            raise
        log.exception("a step failed at each of its attempts: what came before is undone")
        outbox.publish(db, failed(f"{type(error).__name__} at each of {context.attempt} attempts"))
