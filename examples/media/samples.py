"""Pictures and videos for somebody who has none at hand."""

from __future__ import annotations

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 3600, 2400
SECONDS = 8
"""Of a video."""


def picture(place: Path, seed: int) -> None:
    """Paint hills under a sky, others for each seed. Blocks for about a second."""
    chance = random.Random(seed)  # noqa: S311 - for hills
    top, bottom = (chance.randint(30, 110) for _ in range(2))
    sky = Image.linear_gradient("L").resize((WIDTH, HEIGHT))
    painted = Image.merge("RGB", [sky.point(lambda it, by=by: by + it // 2) for by in (top + 40, bottom, 120)])
    draw = ImageDraw.Draw(painted)
    x, y = chance.randint(600, WIDTH - 600), chance.randint(300, 900)
    draw.ellipse((x - 190, y - 190, x + 190, y + 190), fill=(255, 226, 160))
    for row in range(6):
        base, height, length = HEIGHT * (0.42 + row * 0.1), 190 - row * 18, chance.uniform(240, 620)
        shift = chance.uniform(0, 9)
        hills = [
            (left, base - height * (math.sin(left / length + shift) + 0.4 * math.sin(left / 97 + shift)))
            for left in range(0, WIDTH + 20, 20)
        ]
        shade = tuple(int(part * (1 - row / 8)) for part in (96, 140, 150))
        draw.polygon([*hills, (WIDTH, HEIGHT), (0, HEIGHT)], fill=shade)
    grain = Image.effect_noise((WIDTH // 2, HEIGHT // 2), 26).resize((WIDTH, HEIGHT))
    painted = Image.blend(painted, Image.merge("RGB", [grain] * 3), 0.08).filter(ImageFilter.SMOOTH)
    painted.save(place, "JPEG", quality=90)
