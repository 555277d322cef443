"""The files: each upload has a folder with the original and what is made of it.

A file is written beside its place and put there when it is complete. So nobody reads half a file, and a step that runs
twice, even at the same time, leaves one file.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from examples.media.steps import Kind

ORIGINAL = "original"

HEAD = 16
"""Bytes that tell the kind of a file."""

OLD = 3600.0
"""Seconds after which nobody writes to a file any more: longer than any attempt of a step."""


def kind_of(head: bytes) -> Kind | None:
    """The kind of a file by its first bytes; None for what is neither. Its name may say anything."""
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8")) or (head[:4], head[8:12]) == (
        b"RIFF",
        b"WEBP",
    ):
        return "picture"
    if head[4:8] == b"ftyp" or head.startswith(b"\x1a\x45\xdf\xa3"):  # MP4 and QuickTime; WebM and Matroska
        return "video"
    return None


class Files:
    """The folder with all files.

    Args:
        folder: where it is; it is made if it is not there.

    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve() / "uploads"
        self._folder.mkdir(parents=True, exist_ok=True)

    def path(self, upload: str, name: str) -> Path:
        """Where a file of an upload is, or will be."""
        return self._folder / upload / name

    @contextmanager
    def writing(self, upload: str, name: str) -> Iterator[Path]:
        """A path to write to; at the end, the file is put in its place. After an exception, nothing is left."""
        place = self.path(upload, name)
        place.parent.mkdir(exist_ok=True)
        part = place.with_name(f"{name}.{uuid4().hex}.part")
        try:
            yield part
            with part.open("rb") as written:
                os.fsync(written.fileno())  # who is told that it is done finds it, even after a power cut
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)

    def remove(self, upload: str) -> None:
        """Remove an upload that came to nothing."""
        shutil.rmtree(self._folder / upload, ignore_errors=True)

    def tidy(self, known: Collection[str]) -> None:
        """Remove what killed programs have left behind: parts of files, and uploads that nobody was told of."""
        long_ago = time.time() - OLD
        for folder in self._folder.iterdir():
            left = folder.glob("*.part") if folder.name in known else [folder]
            for each in left:
                if each.stat().st_mtime > long_ago:
                    continue
                if each.is_dir():
                    shutil.rmtree(each)
                else:
                    each.unlink(missing_ok=True)
