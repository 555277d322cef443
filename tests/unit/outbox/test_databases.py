"""Transactions on engines of SQLAlchemy."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from rpcq.outbox import databases
from rpcq.outbox.databases import Database
from support.load import until


class Slow(sqlite3.Connection):
    """A connection that opens when it may."""

    opening = threading.Event()
    may_open = threading.Event()
    closed: int

    def __init__(self, *args: Any, **options: Any) -> None:
        Slow.opening.set()
        Slow.may_open.wait()
        super().__init__(*args, **options)

    def close(self) -> None:
        Slow.closed += 1
        super().close()


@pytest.mark.parametrize("is_patient", [True, False])
async def test_a_transaction_that_is_cancelled_while_it_opens_leaves_no_connection_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_patient: bool
) -> None:
    monkeypatch.setattr(databases, "ABANDON_TIMEOUT", 20.0 if is_patient else 0.05)
    Slow.closed = 0
    Slow.opening.clear()
    Slow.may_open.clear()
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}", connect_args={"factory": Slow})

    async def use() -> None:
        async with Database(engine).transaction():
            pass

    using = asyncio.create_task(use())
    await asyncio.to_thread(Slow.opening.wait)
    using.cancel()
    if not is_patient:
        with pytest.raises(asyncio.CancelledError):
            await using
    Slow.may_open.set()
    await asyncio.wait([using])
    assert using.cancelled()
    await until(lambda: engine.sync_engine.pool.checkedin() == 1)  # type: ignore[attr-defined]
    await engine.dispose()
    assert Slow.closed == 1
