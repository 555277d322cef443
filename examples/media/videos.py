"""The service that makes something of videos, with ffmpeg. Start it as that of pictures."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from examples.media import ffmpeg
from examples.media.books import Books, folder
from examples.media.files import Files
from examples.media.working import RETRY, Say, Tools, do_step
from rpcq import Context, Service


@asynccontextmanager
async def tools() -> AsyncGenerator[Tools, None]:
    """Open the books and the files of `MEDIA_FOLDER`, and the outbox, whose relay sends notices.

    Raises:
        RuntimeError: there is no ffmpeg. Jobs wait for a worker that has it, instead of failing here.

    """
    if not ffmpeg.is_there():
        raise RuntimeError(ffmpeg.MISSING)
    books = Books(folder())
    try:
        async with books.outbox:
            yield Tools(books, Files(folder()))
    finally:
        books.close()


videos = Service("videos", lifespan=tools)


@videos.job(timeout=1200, retry=RETRY)
async def transcode(context: Context[Tools], upload: str, height: Literal[720, 480, 240]) -> None:
    """Make a video of that height."""

    async def make(original: Path, part: Path, say: Say) -> None:
        await ffmpeg.transcode(original, part, height, say)

    await do_step(context, upload, f"{height}p", make)


@videos.job(timeout=300, retry=RETRY)
async def thumbnail(context: Context[Tools], upload: str) -> None:
    """Make a picture of the video."""
    await do_step(context, upload, "thumbnail", ffmpeg.thumbnail)
