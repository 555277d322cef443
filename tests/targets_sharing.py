"""What `targets` serves, by workers that share the store of docs/howto/shared-answers.md, in the database DATABASE_URL.

The page's file `shared_answers.py` is in the folder of the process.
"""

from __future__ import annotations

import os

from shared_answers import PostgresAnswers  # type: ignore[import-not-found]

from targets import target

__all__ = ["target"]

target.result_store = PostgresAnswers(os.environ["DATABASE_URL"])
target.lifespan = target.result_store.opened
