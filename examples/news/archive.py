"""The archive of the web: each story has a position there, and a browser says up to which one it has them.

Positions are given in the order of the commits, because SQLite has one writer at a time. In a database with several, a
later position may be committed before an earlier one, and who reads "all after 7" would miss it: there, give positions
under a lock.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.news.database import database

RECENT = 20
"""Stories that a browser gets at first."""

AT_ONCE = 100
"""Stories that are read at once for a browser that was away."""

engine = database("web")
sessions = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    """The tables of the web."""


class Page(Base):
    """A story on the web."""

    __tablename__ = "pages"
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012 - as SQLAlchemy has it; no position comes twice
    position: Mapped[int] = mapped_column(primary_key=True)
    story_id: Mapped[str] = mapped_column(unique=True)
    topic: Mapped[str]
    headline: Mapped[str]
    at: Mapped[float]


def _asked(choices: Sequence[str]) -> ColumnElement[bool]:
    """What `asked_for` says, for the database."""
    return or_(*(or_(Page.topic == choice, Page.topic.startswith(f"{choice}.", autoescape=True)) for choice in choices))


async def start(choices: Sequence[str], after: int | None) -> int:
    """The position after which a browser wants stories.

    Args:
        choices: what it asked for.
        after: the position that it has; None, or one that is not there yet: it gets the last stories.

    """
    async with sessions() as db:
        last = await db.scalar(select(func.max(Page.position))) or 0
        if after is not None and after <= last:
            return after
        recent = select(Page.position).where(_asked(choices)).order_by(Page.position.desc()).limit(RECENT)
        return min((await db.scalars(recent)).all(), default=last + 1) - 1


async def pages_after(position: int, choices: Sequence[str]) -> Sequence[Page]:
    """The next stories of these choices, the oldest first; at most `AT_ONCE`."""
    async with sessions() as db:
        found = select(Page).where(Page.position > position, _asked(choices)).order_by(Page.position).limit(AT_ONCE)
        return (await db.scalars(found)).all()
