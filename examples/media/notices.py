"""The service that tells users that their uploads are ready."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from examples.media.books import Books, folder
from examples.media.working import RETRY
from rpcq import Context, Service


@asynccontextmanager
async def books() -> AsyncGenerator[Books, None]:
    """Open the books of `MEDIA_FOLDER`."""
    opened = Books(folder())
    try:
        yield opened
    finally:
        opened.close()


notices = Service("notices", lifespan=books)


@notices.job(timeout=60, retry=RETRY)
def notify(context: Context[Books], upload: str) -> None:
    """Tell a user that an upload is ready, once, however often this comes."""
    context.state.notify(upload)
