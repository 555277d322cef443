"""What is made of pictures, with Pillow. These functions run in the process of a pool, and block."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from examples.media.pool import say
from examples.media.steps import UnusableError

MOST_PIXELS = 60_000_000
"""Pixels of a picture: each takes three bytes of memory or more, whatever the size of its file."""

LARGE, PREVIEW, SMALL = 1600, 1000, 800
"""Pixels of the longer side."""

SMALL_BYTES = 60_000
"""Bytes that the small picture is to have at most."""

QUALITIES = (90, 80, 70, 60, 50, 40)

MARK = "© media example"


def resize(original: Path, part: Path) -> None:
    """Make a picture that fits on a screen."""
    picture = _opened(original, LARGE)
    picture.save(part, "JPEG", quality=88)
    say(3, 3)


def watermark(original: Path, part: Path) -> None:
    """Make a preview that says whose picture it is, all over."""
    picture = _opened(original, PREVIEW).convert("RGBA")
    font = ImageFont.load_default(size=28)
    layer = Image.new("RGBA", picture.size)
    draw = ImageDraw.Draw(layer)
    for top in range(0, picture.height, 110):
        for left in range(-(top % 220), picture.width, 300):
            draw.text((left, top), MARK, fill=(255, 255, 255, 110), font=font)
    Image.alpha_composite(picture, layer).convert("RGB").save(part, "JPEG", quality=80)
    say(3, 3)


def optimise(original: Path, part: Path) -> None:
    """Make a small picture: with the best quality that fits into `SMALL_BYTES`, or else the lowest one."""
    total = 2 + len(QUALITIES)
    picture = _opened(original, SMALL, total)
    for number, quality in enumerate(QUALITIES, 1):
        written = BytesIO()
        picture.save(written, "WEBP", quality=quality, method=6)
        say(2 + number, total)
        if written.tell() <= SMALL_BYTES:
            break
    say(total, total)
    part.write_bytes(written.getvalue())


def _opened(original: Path, longest: int, total: int = 3) -> Image.Image:
    """The picture, the right way up, no larger than that.

    Raises:
        UnusableError: it cannot be read, or is too large.

    """
    Image.MAX_IMAGE_PIXELS = None  # its own limit warns, or raises, at other sizes
    try:
        with warnings.catch_warnings(), Image.open(original, formats=("JPEG", "PNG", "GIF", "WEBP")) as found:
            warnings.simplefilter("ignore")  # about metadata
            if found.width * found.height > MOST_PIXELS:
                millions = round(found.width * found.height / 1e6)
                msg = f"the picture has {millions} million pixels; at most {MOST_PIXELS // 1_000_000} million are taken"
                raise UnusableError(msg)
            say(1, total)
            found.draft("RGB", (longest, longest))  # a JPEG is read in a smaller size at once
            upright = ImageOps.exif_transpose(found)
            picture = upright.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, and not the picture's
        raise UnusableError(f"the picture cannot be read: {error}") from error
    picture.thumbnail((longest, longest))
    say(2, total)
    return picture
