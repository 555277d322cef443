"""The service that makes something of pictures. Start it with `--job-prefetch 1`, as often as there are CPUs.

Steps take from a tenth of a second to many seconds. With a prefetch of 1, a worker takes a job only when it is free, so
that no short job waits behind a long one while another worker has nothing to do.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from examples.media import painting, working
from examples.media.books import Books, folder
from examples.media.files import Files
from examples.media.pool import Pool
from examples.media.working import RETRY, Say, do_step
from rpcq import Context, Service


@dataclass(frozen=True)
class Tools(working.Tools):
    """What the handlers share."""

    pool: Pool


@asynccontextmanager
async def tools() -> AsyncGenerator[Tools, None]:
    """Open books and files of `MEDIA_FOLDER`, a process for Pillow, and the outbox, whose relay sends notices."""
    books = Books(folder())
    try:
        async with Pool() as pool, books.outbox:
            yield Tools(books, Files(folder()), pool)
    finally:
        books.close()


pictures = Service("pictures", lifespan=tools)


@pictures.job(timeout=120, retry=RETRY)
async def resize(context: Context[Tools], upload: str) -> None:
    """Make a picture that fits on a screen."""
    await _paint(context, upload, "resize", painting.resize)


@pictures.job(timeout=120, retry=RETRY)
async def watermark(context: Context[Tools], upload: str) -> None:
    """Make a preview with a watermark."""
    await _paint(context, upload, "watermark", painting.watermark)


@pictures.job(timeout=120, retry=RETRY)
async def optimise(context: Context[Tools], upload: str) -> None:
    """Make a small picture."""
    await _paint(context, upload, "optimise", painting.optimise)


async def _paint(context: Context[Tools], upload: str, name: str, paint: Callable[[Path, Path], None]) -> None:
    async def make(original: Path, part: Path, say: Say) -> None:
        await context.state.pool.run(paint, original, part, on_progress=say)

    await do_step(context, upload, name, make)
