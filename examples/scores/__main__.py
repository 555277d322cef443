"""Serve the page of the scores, with workers of its own, on the broker of RPCQ_URL.

Open the address that is printed. Ctrl-C ends all.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from examples.scores.app import create_app
from examples.scores.store import Store
from examples.stage import pages
from examples.stage.workers import Workers


def main() -> int:
    """Run the command."""
    parser = pages.parser("python -m examples.scores", __doc__)
    parser.add_argument("--workers", type=int, default=2, help="workers to start; 0 if they run elsewhere (default: 2)")
    parser.add_argument("--database", type=Path, help="the file with the scores (default: a new one, for this run)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scores-") as folder:
        database = asked.database or Path(folder) / "scores.sqlite"
        os.environ["SCORES_DATABASE"] = str(database.resolve())  # the workers inherit it
        workers = Workers("examples.scores.service:scores", "--job-prefetch", "1")
        try:
            for _ in range(asked.workers):
                workers.start()
            return pages.serve(create_app(Store(database), workers if asked.workers else None), asked.host, asked.port)
        finally:
            workers.stop()


if __name__ == "__main__":
    sys.exit(main())
