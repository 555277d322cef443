"""Serve the page of the shop, with a process for each of its services, on the broker of RPCQ_URL.

Open the address that is printed. Ctrl-C ends all.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile

from examples.stage import pages
from examples.stage.workers import Workers


def main() -> int:
    """Run the command."""
    parser = pages.parser("python -m examples.shop", __doc__)
    parser.add_argument("--no-workers", action="store_true", help="start no services: they run elsewhere")
    parser.add_argument(
        "--metrics",
        type=int,
        metavar="PORT",
        help="have each service serve its metrics, at this port and those after it; default: none does",
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shop-") as folder:
        # The services inherit it. Without a database that is given, this run has files of its own.
        os.environ.setdefault("SHOP_DATABASE", f"sqlite+aiosqlite:///{folder}/{{service}}.sqlite")
        from examples.shop import setup  # noqa: PLC0415 - the modules of the services read the environment
        from examples.shop.app import create_app  # noqa: PLC0415

        asyncio.run(setup.create_tables())
        setup.declare()
        workers: dict[str, Workers] = {}
        if not asked.no_workers:
            workers = dict(zip(setup.NAMES, _workers(asked.metrics), strict=True))
        try:
            for each in workers.values():
                each.start()
            return pages.serve(create_app(workers or None), asked.host, asked.port)
        finally:
            for each in workers.values():
                each.stop()


def _workers(metrics: int | None) -> list[Workers]:
    """The processes of each service: two at most, or one that serves its metrics."""
    from examples.shop import setup  # noqa: PLC0415 - as in `main`

    if metrics is None:
        return [Workers(setup.target(name), "--job-prefetch", "4", most=2) for name in setup.NAMES]
    return [
        Workers(setup.target(name), "--job-prefetch", "4", "--http", f"127.0.0.1:{metrics + number}", most=1)
        for number, name in enumerate(setup.NAMES)
    ]


if __name__ == "__main__":
    sys.exit(main())
