"""The editor: a story that is saved is a story that is published, whatever is killed in between."""

from __future__ import annotations

import time

from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.news.contracts import TOPICS, EditorApi, Topic
from examples.news.database import database
from rpcq import Service
from rpcq.outbox import Outbox

engine = database("editor")
outbox = Outbox(engine)
sessions = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    """The tables of this service."""


class Saved(Base):
    """A story."""

    __tablename__ = "stories"
    story_id: Mapped[str] = mapped_column(primary_key=True)
    topic: Mapped[str]
    headline: Mapped[str]
    at: Mapped[float] = mapped_column(index=True)


editor = Service(api=EditorApi, lifespan=lambda: outbox)


@editor.method
async def publish(story_id: str, topic: Topic, headline: str) -> None:
    """Save a story, and write its event, in one transaction. The broker may be away."""
    story = {"story_id": story_id, "topic": topic, "headline": headline, "at": time.time()}
    async with sessions.begin() as db:
        is_new = (await db.execute(insert(Saved).values(story).on_conflict_do_nothing().returning(Saved.at))).first()
        if is_new:
            outbox.publish(db, TOPICS[topic](story_id=story_id, headline=headline))
