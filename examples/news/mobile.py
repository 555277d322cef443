"""The service for phones: what cannot wait is pushed, not faster than the provider takes it.

A story becomes one job for each phone. Each is retried by itself, so one bad phone holds up nobody.
"""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from examples.news import phones, readers
from examples.news.contracts import RETRY, Story, asked_for
from examples.news.database import database
from rpcq import AnyEvent, Service
from rpcq.outbox import Inbox, Outbox

engine = database("mobile")
outbox = Outbox(engine)

mobile = Service("mobile", lifespan=lambda: outbox)


@mobile.job(rate="20/s", retry=RETRY, timeout=30)
async def push(reader: str, story_id: str, headline: str) -> None:
    """Push a story to one phone."""
    await phones.push(reader, story_id, headline)


@mobile.on("news.breaking.#", "news.sport.#", once=Inbox(engine), retry=RETRY)
async def spread(event: AnyEvent, db: AsyncSession) -> None:
    """Send a push for each reader who asked for the topic. They are sent if this is done, and once."""
    story = event.read(Story)
    for reader, choices in readers.PHONES.items():
        if asked_for(choices, event.name):
            outbox.send(db, push, reader=reader, story_id=story.story_id, headline=story.headline)
