"""What is made of videos, with ffmpeg: programs, which say how far they are and are killed when that is cancelled."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Final, cast

from examples.media.steps import UnusableError
from examples.media.working import Say

MOST_SECONDS = 600.0
"""Seconds of a video."""

CPU_SECONDS = 900
"""Seconds of a CPU that ffmpeg may use: one whose worker was killed ends, too."""

MISSING: Final = "videos need ffmpeg, which is not installed here: apt-get install ffmpeg"

_READING: Final = ("-protocol_whitelist", "file", "-format_whitelist", "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm")
"""What a file may make ffmpeg read: itself, and no address that somebody has written into it."""


def is_there() -> bool:
    """Whether ffmpeg and ffprobe can be run here."""
    return shutil.which("ffmpeg") is not None and shutil.which("ffprobe") is not None


async def transcode(original: Path, part: Path, height: int, say: Say) -> None:
    """Make an MP4 that every browser plays, no higher than that many pixels.

    Raises:
        UnusableError: it is no video that can be read, or too long.
        RuntimeError: ffmpeg failed.

    """
    seconds = await _length(original)
    await _ffmpeg(
        *("-i", str(original), "-map", "0:v:0", "-map", "0:a:0?"),
        *("-vf", f"scale=-2:'trunc(min({height},ih)/2)*2'", "-pix_fmt", "yuv420p"),
        *("-c:v", "libx264", "-preset", "veryfast", "-crf", "26", "-threads", "1"),
        *("-c:a", "aac", "-movflags", "+faststart", "-f", "mp4", str(part)),
        seconds=seconds,
        say=say,
    )


async def thumbnail(original: Path, part: Path, say: Say) -> None:
    """Make a picture of the video: one that stands for it, from its beginning.

    Raises:
        UnusableError: it is no video that can be read, or too long.
        RuntimeError: ffmpeg failed.

    """
    seconds = await _length(original)
    picture = "-map", "0:v:0", "-vf", "thumbnail,scale=-2:360", "-frames:v", "1", "-c:v", "mjpeg", "-f", "image2"
    await _ffmpeg("-t", "10", "-i", str(original), *picture, "-update", "1", str(part), seconds=seconds, say=say)


async def sample(place: Path, seconds: int) -> None:
    """Make a video of coloured shapes, with sound.

    Raises:
        RuntimeError: ffmpeg failed.

    """
    await _ffmpeg(
        *("-f", "lavfi", "-i", f"testsrc2=size=1280x720:rate=25:duration={seconds}"),
        *("-f", "lavfi", "-i", f"sine=frequency=330:duration={seconds}"),
        *("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-c:a", "aac", "-f", "mp4", str(place)),
        reading=(),
    )


async def _length(original: Path) -> float:
    """How long a video is, in seconds.

    Raises:
        UnusableError: it is no video that can be read, or too long.

    """
    asked = "-select_streams", "v:0", "-show_entries", "format=duration:stream=codec_type", "-of", "json"
    process = await _started("ffprobe", "-v", "error", *_READING, *asked, str(original))
    try:
        out, err = await process.communicate()
    finally:
        await _ended(process)
    code = process.returncode or 0
    if code < 0:
        msg = f"ffprobe was killed by signal {-code}"
        raise RuntimeError(msg)
    found = json.loads(out) if code == 0 else {}
    if not found.get("streams"):
        raise UnusableError(f"the video cannot be read: {_last(err, original) or 'it has no pictures'}")
    seconds = float(found["format"].get("duration", 0.0))
    if seconds > MOST_SECONDS:
        raise UnusableError(f"the video is {seconds:.0f} s long; at most {MOST_SECONDS:.0f} s are taken")
    return seconds


async def _ffmpeg(
    *arguments: str, seconds: float = 0.0, say: Say | None = None, reading: tuple[str, ...] = _READING
) -> None:
    common = "-nostdin", "-v", "error", "-y", "-timelimit", str(CPU_SECONDS), "-progress", "pipe:1"
    process = await _started("ffmpeg", *common, *reading, *arguments)
    try:
        async with asyncio.TaskGroup() as group:  # both at once: it would wait for whoever does not read
            said = group.create_task(cast("asyncio.StreamReader", process.stderr).read())
            group.create_task(_follow(cast("asyncio.StreamReader", process.stdout), seconds, say))
        await process.wait()
    finally:
        await _ended(process)
    if process.returncode:
        msg = f"ffmpeg ended with {process.returncode}: {_last(said.result()) or 'it said nothing'}"
        raise RuntimeError(msg)


async def _started(program: str, *arguments: str) -> asyncio.subprocess.Process:
    if shutil.which(program) is None:
        raise RuntimeError(MISSING)
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        program, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )


async def _ended(process: asyncio.subprocess.Process) -> None:
    """End a program that runs because what waited for it was cancelled."""
    if process.returncode is None:
        process.kill()
        await process.wait()


async def _follow(stream: asyncio.StreamReader, seconds: float, say: Say | None) -> None:
    """Read what ffmpeg says of its progress: lines such as `out_time_us=1480000`."""
    async for line in stream:
        name, _, value = line.decode().strip().partition("=")
        if say is not None and seconds and name == "out_time_us" and value.isdigit():
            say(min(round(int(value) / 1e6, 2), seconds), seconds)


def _last(said: bytes, path: Path | None = None) -> str:
    """The last line of what a program said, without the path of the file, which is nobody's business."""
    lines = said.decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else ""
    return last.removeprefix(f"{path}: ")[-300:]
