"""The steps: what is made of each kind of upload, by which job, into which file.

Each step is a job that reads the original and writes one file. So each is repeated by itself, and none waits for
another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["picture", "video"]


@dataclass(frozen=True)
class Step:
    """A step.

    Attributes:
        name: its name among those of an upload.
        job: the job that does it.
        file: what it writes.
        parameters: those of the job, besides the ID of the upload.

    """

    name: str
    job: str
    file: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


STEPS: Mapping[Kind, tuple[Step, ...]] = {
    "picture": (
        Step("resize", "pictures.resize", "large.jpg"),
        Step("watermark", "pictures.watermark", "preview.jpg"),
        Step("optimise", "pictures.optimise", "small.webp"),
    ),
    "video": (
        Step("thumbnail", "videos.thumbnail", "thumbnail.jpg"),
        Step("720p", "videos.transcode", "720p.mp4", {"height": 720}),
        Step("480p", "videos.transcode", "480p.mp4", {"height": 480}),
        Step("240p", "videos.transcode", "240p.mp4", {"height": 240}),
    ),
}

BY_NAME = {step.name: step for steps in STEPS.values() for step in steps}


class UnusableError(Exception):
    """An upload of which nothing can be made, however often it is tried; the text says why."""
