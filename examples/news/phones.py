"""The provider that pushes to phones. It is not ours, and is played here, with a table of its own.

As real ones, it takes a key with each push, here the reader and the story. A second push with the same key shows
nothing: so a service that was killed before it knew the answer may simply push again.
"""

from __future__ import annotations

from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.news.database import database

engine = database("phones")
sessions = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    """The tables of the provider."""


class Shown(Base):
    """What a phone shows, and how often it was asked for."""

    __tablename__ = "shown"
    reader: Mapped[str] = mapped_column(primary_key=True)
    story_id: Mapped[str] = mapped_column(primary_key=True)
    headline: Mapped[str]
    times: Mapped[int]


async def push(reader: str, story_id: str, headline: str) -> None:
    """Show a headline on the phone of a reader, once for each story."""
    row = {"reader": reader, "story_id": story_id, "headline": headline, "times": 1}
    again = insert(Shown).values(row).on_conflict_do_update(set_={"times": Shown.times + 1})
    async with sessions.begin() as db:
        await db.execute(again)
