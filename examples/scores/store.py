"""The store of scores: SQLite. The web app and the workers share its file; with PostgreSQL they would share a server.

Each method is one transaction in a connection of its own, and blocks: call it in a thread.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from examples.scores.simulation import Footprint

Lane = Literal["high", "normal", "low"]
State = Literal["none", "queued", "computing", "old", "fresh"]

ASK_AGAIN = 60.0
"""Seconds after which a product that is still wanted is sent again: to send a job twice does no harm here."""

LOST = 60.0
"""Seconds that a computation takes at most: the job's timeout. One that is not done then was lost with its worker."""

KEPT = 5
"""Editions of which requests and computations are remembered."""

BUSY = 30.0
"""Seconds that a transaction waits for another one."""

TABLES = """
CREATE TABLE IF NOT EXISTS editions (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS asked (
    product TEXT, edition INTEGER, lane TEXT, at REAL NOT NULL, sent REAL, done REAL,
    PRIMARY KEY (product, edition, lane)
);
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY, product TEXT NOT NULL, edition INTEGER NOT NULL, worker TEXT NOT NULL,
    began REAL NOT NULL, ended REAL
);
CREATE TABLE IF NOT EXISTS scores (
    product TEXT PRIMARY KEY, edition INTEGER NOT NULL, kg REAL NOT NULL, low REAL NOT NULL, high REAL NOT NULL,
    grade TEXT NOT NULL, at REAL NOT NULL
);
INSERT OR IGNORE INTO editions VALUES (1, 'first');
"""


@dataclass(frozen=True)
class Score:
    """The score of a product: its footprint, the edition that it was computed with, and when (seconds since 1970)."""

    footprint: Footprint
    edition: int
    at: float


@dataclass(frozen=True)
class Run:
    """One computation of a score: begun by a worker, and not ended if that was lost."""

    id: int
    product: str
    edition: int
    worker: str
    ended: float | None


@dataclass(frozen=True)
class Waits:
    """How long those waited who asked in a lane, from the request to the score: seconds, None for nobody."""

    done: int
    median: float | None
    longest: float | None


class Store:
    """The scores, who asked for them, and who computes them.

    Args:
        path: the database's file; it is made if it is not there.

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with closing(sqlite3.connect(path, timeout=BUSY)) as database:
            database.execute("PRAGMA journal_mode = WAL")  # who reads does not wait for who writes
            database.executescript(TABLES)

    # Editions of the emission factors.

    @property
    def edition(self) -> int:
        """The edition of the emission factors that counts."""
        with self._reading() as database:
            return _edition(database)

    def new_edition(self, key: str) -> int:
        """Take a new edition, once for each key: a job that runs again gets the edition that it got before."""
        with self._writing() as database:
            database.execute("INSERT OR IGNORE INTO editions SELECT max(number) + 1, ? FROM editions", (key,))
            for table in ("asked", "runs"):
                database.execute(f"DELETE FROM {table} WHERE edition <= ?", (_edition(database) - KEPT,))  # noqa: S608
            (number,) = database.execute("SELECT number FROM editions WHERE key = ?", (key,)).fetchone()
        return int(number)

    # Asking.

    def score(self, product: str) -> Score | None:
        """The score of a product, of whatever edition."""
        with self._reading() as database:
            row = database.execute(
                "SELECT kg, low, high, grade, edition, at FROM scores WHERE product = ?", (product,)
            ).fetchone()
        return None if row is None else Score(Footprint(*row[:4]), *row[4:])

    def ask(self, products: Iterable[str], lane: Lane) -> list[str]:
        """Note that somebody wants scores: the products that are to be sent, which `sent` is to be told of.

        Those are left out that have their score, and those that were sent to this lane a moment ago.
        """
        now = time.time()
        wanted = []
        with self._writing() as database:
            edition = _edition(database)
            for product in dict.fromkeys(products):
                (fresh,) = database.execute(
                    "SELECT count(*) FROM scores WHERE product = ? AND edition = ?", (product, edition)
                ).fetchone()
                if fresh:
                    continue
                database.execute(
                    "INSERT OR IGNORE INTO asked VALUES (?, ?, ?, ?, NULL, NULL)", (product, edition, lane, now)
                )
                (sent,) = database.execute(
                    "SELECT sent FROM asked WHERE product = ? AND edition = ? AND lane = ?", (product, edition, lane)
                ).fetchone()
                if sent is None or sent < now - ASK_AGAIN:
                    wanted.append(product)
        return wanted

    def sent(self, products: Iterable[str], lane: Lane) -> None:
        """Note that the broker has the jobs for these products."""
        with self._writing() as database:
            edition = _edition(database)
            database.executemany(
                "UPDATE asked SET sent = ? WHERE product = ? AND edition = ? AND lane = ?",
                [(time.time(), product, edition, lane) for product in products],
            )

    # Computing.

    def begin(self, product: str, worker: str) -> Run | None:
        """Begin to compute a score with the edition that counts; None if it is there already."""
        with self._writing() as database:
            edition = _edition(database)
            (fresh,) = database.execute(
                "SELECT count(*) FROM scores WHERE product = ? AND edition = ?", (product, edition)
            ).fetchone()
            if fresh:
                return None
            cursor = database.execute(
                "INSERT INTO runs VALUES (NULL, ?, ?, ?, ?, NULL)", (product, edition, worker, time.time())
            )
            return Run(cursor.lastrowid or 0, product, edition, worker, None)

    def finish(self, run: Run, footprint: Footprint) -> None:
        """Keep the score, unless that of a later edition is there; who asked for it has it."""
        now = time.time()
        values = (footprint.kg, footprint.low, footprint.high, footprint.grade, now)
        with self._writing() as database:
            database.execute("UPDATE runs SET ended = ? WHERE id = ?", (now, run.id))
            database.execute(
                "INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (product) DO UPDATE SET "
                "edition = excluded.edition, kg = excluded.kg, low = excluded.low, high = excluded.high, "
                "grade = excluded.grade, at = excluded.at WHERE excluded.edition >= scores.edition",
                (run.product, run.edition, *values),
            )
            database.execute(
                "UPDATE asked SET done = ? WHERE product = ? AND edition <= ? AND done IS NULL",
                (now, run.product, run.edition),
            )

    # Looking.

    def states(self) -> dict[str, State]:
        """What is known of each product that was ever asked for."""
        now = time.time()
        with self._reading() as database:
            edition = _edition(database)
            states: dict[str, State] = {
                product: "fresh" if of == edition else "old"
                for product, of in database.execute("SELECT product, edition FROM scores")
            }
            queued = database.execute(
                "SELECT product FROM asked WHERE edition = ? AND sent IS NOT NULL AND done IS NULL", (edition,)
            )
            states.update({product: "queued" for (product,) in queued if states.get(product) != "fresh"})
            computing = database.execute(
                "SELECT product FROM runs WHERE edition = ? AND ended IS NULL AND began > ?", (edition, now - LOST)
            )
            states.update({product: "computing" for (product,) in computing if states.get(product) != "fresh"})
        return states

    def scores(self) -> dict[str, Score]:
        """All scores, by product."""
        with self._reading() as database:
            rows = database.execute("SELECT product, kg, low, high, grade, edition, at FROM scores").fetchall()
        return {row[0]: Score(Footprint(*row[1:5]), *row[5:]) for row in rows}

    def waits(self, lane: Lane, seconds: float) -> Waits:
        """How long those waited in a lane who got their score in the last seconds."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT done - at FROM asked WHERE lane = ? AND done > ? ORDER BY 1", (lane, time.time() - seconds)
            ).fetchall()
        found = [waited for (waited,) in rows]
        return Waits(len(found), found[len(found) // 2], found[-1]) if found else Waits(0, None, None)

    def runs(self) -> Sequence[Run]:
        """All computations of the last editions, the oldest first."""
        with self._reading() as database:
            rows = database.execute("SELECT id, product, edition, worker, ended FROM runs ORDER BY id").fetchall()
        return [Run(*row) for row in rows]

    # Transactions.

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=BUSY)) as database:
            database.execute("BEGIN")  # all that is read is of one moment
            yield database

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=BUSY)) as database:
            # Not when it first writes: what it read before might no longer be true then, and SQLite would refuse.
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.commit()


def _edition(database: sqlite3.Connection) -> int:
    (number,) = database.execute("SELECT max(number) FROM editions").fetchone()
    return int(number)
