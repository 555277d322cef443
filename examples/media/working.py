"""How each step is done, whatever it makes: asked whether it is done, made, put in its place, noted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from examples.media.books import Books
from examples.media.files import ORIGINAL, Files
from examples.media.steps import BY_NAME, UnusableError
from rpcq import Context, GiveUp, Retry

RETRY = Retry(max_attempts=4, initial_backoff=2, max_backoff=30)
"""Of a step whose failure may be over soon; after that, somebody has to look."""

Say = Callable[[float, float], None]
"""Says how far a step is: so much, of so much."""

Make = Callable[[Path, Path, Say], Awaitable[None]]
"""Makes a file: reads the first one, writes the second one."""


@dataclass(frozen=True)
class Tools:
    """What the handlers of steps share."""

    books: Books
    files: Files


async def do_step(context: Context[Tools], upload: str, name: str, make: Make) -> None:
    """Do a step of an upload. It may run any number of times, and be lost anywhere.

    Raises:
        GiveUp: nothing can be made of this upload, or there is none.

    """
    books, files = context.state.books, context.state.files
    if not await asyncio.to_thread(books.begin, upload, name, context.attempt):
        return
    try:
        if name in await asyncio.to_thread(books.faults):
            msg = f"{name} is made to fail"
            raise RuntimeError(msg)  # noqa: TRY301 - as if the work had raised it
        with files.writing(upload, BY_NAME[name].file) as part:
            await make(files.path(upload, ORIGINAL), part, context.progress)
            size = part.stat().st_size
    except Exception as error:
        await asyncio.to_thread(books.fail, upload, name, str(error) or repr(error))
        if isinstance(error, UnusableError):
            raise GiveUp(str(error)) from error
        raise
    await asyncio.to_thread(books.finish, upload, name, size)
