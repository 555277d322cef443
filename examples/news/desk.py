"""What has become of the stories, for the page: it looks into the databases of all. A real one has a dashboard."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, literal, select

from examples.news import archive, editor, emails, phones, readers
from examples.news.archive import Page
from examples.news.contracts import asked_for
from examples.news.editor import Saved
from examples.news.emails import Line, Mail
from examples.news.phones import Shown


@dataclass(frozen=True)
class Reader:
    """A reader.

    Attributes:
        name: the name.
        by: "push" or "e-mail".
        choices: what was asked for.
        wanted: the IDs of the stories of these topics.
        got: the IDs of those that have come, each as often as the reader sees it.
        mails: the e-mails that they came in; 0 for phones.
        last: the headline that came last; empty if none has.

    """

    name: str
    by: str
    choices: tuple[str, ...]
    wanted: frozenset[str]
    got: tuple[str, ...]
    mails: int
    last: str

    @property
    def is_right(self) -> bool:
        """Whether each story of these topics has come once, and no other."""
        return sorted(self.got) == sorted(self.wanted)


async def stories() -> dict[str, str]:
    """The topic of each story that was saved, by its ID."""
    async with editor.sessions() as db:
        return {row.story_id: row.topic for row in await db.execute(select(Saved.story_id, Saved.topic))}


async def kept() -> dict[str, str]:
    """The topic of each story on the web, by its ID, in the order of their positions."""
    async with archive.sessions() as db:
        found = await db.execute(select(Page.story_id, Page.topic).order_by(Page.position))
        return {row.story_id: row.topic for row in found}


async def pushed_again() -> int:
    """How often a push was asked for that the phone had already."""
    async with phones.sessions() as db:
        return await db.scalar(select(func.sum(Shown.times - 1))) or 0


async def all_readers() -> list[Reader]:
    """All readers, and what each has got."""
    topics = await stories()
    async with phones.sessions() as db:
        shown = list(await db.execute(select(Shown.reader, Shown.story_id, Shown.headline, literal(0))))
    async with emails.sessions() as db:
        mail = select(Mail.reader, Line.story_id, Line.headline, Mail.number).join(Line, Line.mail == Mail.number)
        lines = list(await db.execute(mail.order_by(Mail.number)))
    found = []
    for by, people, rows in (("push", readers.PHONES, shown), ("e-mail", readers.MAILBOXES, lines)):
        for name, choices in people.items():
            own = [row for row in rows if row[0] == name]
            wanted = frozenset(story for story, topic in topics.items() if asked_for(choices, topic))
            mails = len({row[3] for row in own} - {0})
            got = tuple(row[1] for row in own)
            found.append(Reader(name, by, choices, wanted, got, mails, own[-1][2] if own else ""))
    return found
