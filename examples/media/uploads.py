"""Takes uploads: a file is in its place before anybody is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from examples.media import ffmpeg
from examples.media.books import Books, new_id
from examples.media.files import HEAD, ORIGINAL, Files, kind_of
from examples.media.steps import Kind

MOST_BYTES = 200_000_000
"""Bytes of an upload."""


class RefusedError(Exception):
    """An upload is not taken; the text says why, and `status` says it as HTTP does."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


async def take(books: Books, files: Files, name: str, chunks: AsyncIterator[bytes], *, videos: bool) -> str:
    """Take an upload. When this returns, it is there, and its steps will be done.

    Args:
        books: where it is noted.
        files: where it is written.
        name: what its user calls it.
        chunks: its bytes.
        videos: whether videos are taken.

    Returns:
        Its ID.

    Raises:
        RefusedError: it is too large, or not of a kind that is taken. Nothing of it is kept.

    """
    upload = new_id()
    with _removed_unless_noted(files, upload):
        with files.writing(upload, ORIGINAL) as part:
            head, size = b"", 0
            with part.open("wb") as file:
                async for chunk in chunks:
                    head = head if len(head) >= HEAD else (head + chunk)[:HEAD]
                    size += len(chunk)
                    if size > MOST_BYTES:
                        raise RefusedError(f"An upload may have at most {MOST_BYTES // 1_000_000} MB.", 413)
                    await asyncio.to_thread(file.write, chunk)
            kind = _kind(head, videos=videos)
        await asyncio.to_thread(books.add, kind, name, size, upload)
    return upload


def _kind(head: bytes, *, videos: bool) -> Kind:
    kind = kind_of(head)
    if kind is None:
        raise RefusedError("This is no picture (JPEG, PNG, GIF, WebP) and no video (MP4, QuickTime, WebM).", 415)
    if kind == "video" and not videos:
        raise RefusedError(f"{ffmpeg.MISSING[0].upper()}{ffmpeg.MISSING[1:]}.", 415)
    return kind


@contextmanager
def _removed_unless_noted(files: Files, upload: str) -> Iterator[None]:
    try:
        yield
    except BaseException:  # the user who leaves, too
        files.remove(upload)
        raise
