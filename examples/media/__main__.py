"""Serve the page of the uploads, with workers of its own, on the broker of RPCQ_URL.

Open the address that is printed. Ctrl-C ends all.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from examples.media import ffmpeg
from examples.media.app import create_app
from examples.stage import pages
from examples.stage.workers import Workers

WORKERS = {"pictures": (2, 3), "videos": (1, 2), "notices": (1, 1)}
"""How many workers each service begins with, and how many it may have."""


def main() -> int:
    """Run the command."""
    parser = pages.parser("python -m examples.media", __doc__)
    parser.add_argument(
        "--folder", type=Path, help="where files and database are (default: a new folder, for this run)"
    )
    parser.add_argument("--alone", action="store_true", help="the workers run elsewhere, with ffmpeg")
    asked = parser.parse_args()
    if not (asked.alone or ffmpeg.is_there()):
        print(f"{ffmpeg.MISSING}; pictures work without it", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="media-") as made:
        folder = (asked.folder or Path(made)).resolve()
        os.environ["MEDIA_FOLDER"] = str(folder)  # the workers inherit it
        services = [] if asked.alone else [name for name in WORKERS if name != "videos" or ffmpeg.is_there()]
        workers = {
            name: Workers(f"examples.media.{name}:{name}", "--job-prefetch", "1", most=WORKERS[name][1])
            for name in services
        }
        try:
            app = create_app(folder, workers, videos=True if asked.alone else None)
            for name, each in workers.items():
                for _ in range(WORKERS[name][0]):
                    each.start()
            return pages.serve(app, asked.host, asked.port)
        finally:
            for each in workers.values():
                each.stop()


if __name__ == "__main__":
    sys.exit(main())
