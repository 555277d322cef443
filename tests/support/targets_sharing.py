"""What `targets` serves, by workers that share the store of docs/howto/shared-results.md, in the database DATABASE_URL.

The page's file `shared_results.py` is in the folder of the process.
"""

from __future__ import annotations

import os

from shared_results import PostgresResults  # type: ignore[import-not-found]

from support.targets import target

__all__ = ["target"]

target.result_store = PostgresResults(os.environ["DATABASE_URL"])
target.lifespan = target.result_store.opened
