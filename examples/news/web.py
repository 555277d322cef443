"""The service for browsers: it keeps each story, and each of its processes has browsers that get stories live.

    news.# -> keep: one process writes the story into the archive -> web.kept -> ring: every process wakes up its
    browsers, and each reads what it does not have from the archive

What a browser gets comes from the archive alone. `web.kept` only says that there is something new: it comes to each
process while it runs, at most once. One that is lost costs `LOOK_EVERY` seconds, and no story.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated

from fastapi import FastAPI, Header, Query
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession

from examples.news import archive
from examples.news.archive import Page
from examples.news.contracts import RETRY, Choice, Story
from examples.stage import pages
from rpcq import AnyEvent, Event, Service, Worker
from rpcq.outbox import Inbox, Outbox

LOOK_EVERY = 1.0
"""Seconds after which a browser's archive is looked at, if nothing is heard. A comment is sent then, too."""

AGAIN_MS = 500
"""Milliseconds after which a browser that lost its connection comes again."""

outbox = Outbox(archive.engine)


class Kept(Event, name="web.kept"):
    """A story is in the archive."""

    story_id: str


class Bell:
    """Wakes up those who wait for stories in this process."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Event] = set()
        self.is_closing = False

    def ring(self) -> None:
        """Wake up all."""
        for each in self._waiting:
            each.set()

    def close(self) -> None:
        """Let all streams end: the process stops."""
        self.is_closing = True
        self.ring()

    @contextmanager
    def listening(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever it rings."""
        made = asyncio.Event()
        self._waiting.add(made)
        try:
            yield made
        finally:
            self._waiting.discard(made)


bell = Bell()
web = Service("web", lifespan=lambda: outbox)


@web.on("news.#", once=Inbox(archive.engine), retry=RETRY)
async def keep(event: AnyEvent, db: AsyncSession) -> None:
    """Put a story into the archive, and tell all processes after that. The processes share this queue."""
    story = event.read(Story)
    db.add(Page(story_id=story.story_id, topic=event.name, headline=story.headline, at=time.time()))
    outbox.publish(db, Kept(story_id=story.story_id))


@web.on(Kept, each_instance=True)
async def ring(_event: Kept) -> None:
    """Wake up the browsers of this process."""
    bell.ring()


async def stream(name: str, choices: Sequence[str], after: int | None) -> AsyncGenerator[str, None]:
    """Stories as server-sent events, with their positions as IDs, until the browser leaves or the process stops."""
    position = await archive.start(choices, after)
    yield f"retry: {AGAIN_MS}\nevent: hello\ndata: {json.dumps(name)}\n\n"
    with bell.listening() as heard:
        while not bell.is_closing:
            heard.clear()  # before it reads: what is kept meanwhile rings again
            found = await archive.pages_after(position, choices)
            for page in found:
                data = {"id": page.story_id, "topic": page.topic, "headline": page.headline}
                yield f"id: {page.position}\ndata: {json.dumps(data)}\n\n"
                position = page.position
            if not found:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(heard.wait(), LOOK_EVERY)
                yield ":\n\n"


Choices = Annotated[list[Choice], Query(min_length=1, description="topics, or their first words")]
After = Annotated[int | None, Query(ge=0, description="the position that the browser has")]
LastId = Annotated[int | None, Header(alias="Last-Event-ID", ge=0, description="the same: counts more")]


def create_app(name: str) -> FastAPI:
    """Make the app of a process, which serves `web` too."""

    @asynccontextmanager
    async def serving(_app: FastAPI) -> AsyncIterator[None]:
        async with Worker(web, job_prefetch=4):
            yield

    app = FastAPI(title="News", lifespan=serving)

    @app.get("/live")
    async def live(choices: Choices, after: After = None, last_id: LastId = None) -> StreamingResponse:
        """Stories as they come, after those that the browser has."""
        told = stream(name, choices, after if last_id is None else last_id)
        return StreamingResponse(told, media_type="text/event-stream", headers={"cache-control": "no-store"})

    return app


def main() -> int:
    """Run the command."""
    parser = pages.parser("python -m examples.news.web", __doc__)
    parser.add_argument("--name", default="web", help="what the page calls this process (default: web)")
    asked = parser.parse_args()
    return pages.serve(create_app(asked.name), asked.host, asked.port, on_stop=bell.close, announces=False)


if __name__ == "__main__":
    sys.exit(main())
