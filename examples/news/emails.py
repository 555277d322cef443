"""The service for mailboxes: what comes within a few seconds is one e-mail.

The mailbox is a table here, in the database of this service, so that an e-mail is written once. `examples/mail` hands
e-mails to an SMTP server, and says what a crash does there.
"""

from __future__ import annotations

import time

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.news import readers
from examples.news.contracts import RETRY, Story, asked_for
from examples.news.database import database
from rpcq import AnyEvent, Service
from rpcq.outbox import Inbox, Outbox

GATHERING = 3.0
"""Seconds in which stories are gathered for one e-mail."""

engine = database("emails")
inbox = Inbox(engine)
outbox = Outbox(engine)
sessions = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    """The tables of this service."""


class Gathered(Base):
    """A story for the next e-mail of a reader."""

    __tablename__ = "gathered"
    reader: Mapped[str] = mapped_column(primary_key=True)
    story_id: Mapped[str] = mapped_column(primary_key=True)
    headline: Mapped[str]


class Mail(Base):
    """An e-mail in a mailbox."""

    __tablename__ = "mails"
    number: Mapped[int] = mapped_column(primary_key=True)
    reader: Mapped[str]
    at: Mapped[float]


class Line(Base):
    """A story in an e-mail."""

    __tablename__ = "lines"
    mail: Mapped[int] = mapped_column(primary_key=True)
    story_id: Mapped[str] = mapped_column(primary_key=True)
    headline: Mapped[str]


emails = Service("emails", lifespan=lambda: outbox)


@emails.job(once=inbox, retry=RETRY, timeout=30)
async def digest(db: AsyncSession, reader: str) -> None:
    """Write one e-mail with all that was gathered for a reader."""
    found = (await db.scalars(select(Gathered).where(Gathered.reader == reader))).all()
    mail = Mail(reader=reader, at=time.time())
    db.add(mail)
    await db.flush()  # it has a number now
    db.add_all(Line(mail=mail.number, story_id=it.story_id, headline=it.headline) for it in found)
    await db.execute(delete(Gathered).where(Gathered.reader == reader))


@emails.on("news.#", once=inbox, retry=RETRY)
async def collect(event: AnyEvent, db: AsyncSession) -> None:
    """Gather a story for each reader who asked for its topic. The first one of an e-mail asks for it, for later.

    SQLite has one writer at a time. Elsewhere, two of these for one reader, or one and a `digest`, need a lock.
    """
    story = event.read(Story)
    for reader, choices in readers.MAILBOXES.items():
        if not asked_for(choices, event.name):
            continue
        if not (await db.scalars(select(Gathered).where(Gathered.reader == reader).limit(1))).first():
            outbox.with_options(delay=GATHERING).send(db, digest, reader=reader)
        db.add(Gathered(reader=reader, story_id=story.story_id, headline=story.headline))
