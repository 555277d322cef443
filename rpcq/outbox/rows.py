"""What is done with the rows of an outbox in a transaction: select, delete, try again, bury, count.

Each function takes a `Connection`. A relay never selects by `id > last`: numbers are not in the order of commits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    and_,
    bindparam,
    cast,
    delete,
    exists,
    func,
    insert,
    or_,
    update,
)
from sqlalchemy import select as select_
from sqlalchemy.orm import aliased

from rpcq.outbox.databases import lock_key
from rpcq.outbox.publishing import Row
from rpcq.outbox.tables import dead, outbox

MOST_ROWS: Final = 500
"""Rows of one transaction."""

MOST_BYTES: Final = 8 * 1024 * 1024
"""Bytes of the bodies of one transaction; a larger one is alone in it."""

_COPIED: Final = ("message_id", "label", "order_key", "exchange", "routing_key", "properties", "body", "created")


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a row that was not confirmed.

    Attributes:
        id: its number.
        error: why, for people.
        pause_ms: when it is tried again; None if it is dead.
        reason: of a dead one.

    """

    id: int
    error: str
    pause_ms: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class OutboxDepth:
    """How much waits in an outbox.

    Attributes:
        waiting: rows that are to be sent now.
        oldest: seconds since the oldest of these was written, or was due; None if there is none.
        retried: rows that were not confirmed, or had no queue, and are tried again.
        later: rows that are due later.
        dead: rows that cannot be published.

    """

    waiting: int
    oldest: float | None
    retried: int
    later: int
    dead: int


def now_ms(connection: Connection) -> ColumnElement[Any] | int:
    """The time: that of PostgreSQL's clock, which is the same for all; for a file, the machine's."""
    if connection.dialect.name == "sqlite":
        return time.time_ns() // 1_000_000
    return cast(func.extract("epoch", func.clock_timestamp()) * 1000, BigInteger)


def try_lock(connection: Connection, namespace: str) -> bool:
    """Whether this transaction may relay: one at a time does, until its end. Only for PostgreSQL."""
    key = lock_key("rpcq", "relay", namespace)
    return bool(connection.execute(select_(func.pg_try_advisory_xact_lock(key))).scalar_one())


def select(connection: Connection, exchanges: Sequence[str]) -> list[Row]:
    """The rows that are to be published now, in order; locked until the end of the transaction.

    Rows with a key come only if no row of their key before them waits for another try.
    """
    mine = outbox.c.exchange.in_(exchanges)
    before = aliased(outbox)
    held_up = exists().where(
        before.c.order_key == outbox.c.order_key, before.c.id < outbox.c.id, before.c.due.is_not(None)
    )
    sizes = select_(outbox.c.id, func.length(outbox.c.body)).with_for_update(skip_locked=True)
    again = sizes.where(mine, outbox.c.due <= now_ms(connection)).order_by(outbox.c.due).limit(MOST_ROWS // 2)
    found = [(number, size) for number, size in connection.execute(again)]
    at_once = sizes.where(mine, outbox.c.due.is_(None), or_(outbox.c.order_key.is_(None), ~held_up))
    at_once = at_once.order_by(outbox.c.id).limit(MOST_ROWS - len(found))
    found += [(number, size) for number, size in connection.execute(at_once)]
    chosen: list[int] = []
    total = 0
    for number, size in found:
        total += size
        if chosen and total > MOST_BYTES:
            break
        chosen.append(number)
    if not chosen:
        return []
    columns = (getattr(outbox.c, name) for name in Row.__dataclass_fields__)
    rows = select_(*columns).where(outbox.c.id.in_(chosen)).order_by(outbox.c.id)
    return [Row(*it) for it in connection.execute(rows)]


def settle(connection: Connection, sent: Sequence[int], fates: Sequence[Fate]) -> None:
    """Delete the rows that were sent, and note what becomes of the others."""
    if sent:
        connection.execute(delete(outbox).where(outbox.c.id.in_(sent)))
    now = now_ms(connection)
    again = [{"number": it.id, "pause": it.pause_ms, "why": it.error} for it in fates if it.pause_ms is not None]
    if again:
        changed = update(outbox).where(outbox.c.id == bindparam("number"))
        due = now + bindparam("pause", type_=BigInteger)
        connection.execute(changed.values(tries=outbox.c.tries + 1, due=due, error=bindparam("why")), again)
    for it in fates:
        if it.pause_ms is None:
            _bury(connection, it, now)


def _bury(connection: Connection, fate: Fate, now: ColumnElement[Any] | int) -> None:
    copied = [outbox.c[name] for name in _COPIED]
    died = now if isinstance(now, ColumnElement) else bindparam("died", now, BigInteger)
    values = select_(*copied, died, bindparam("reason", fate.reason), bindparam("error", fate.error))
    values = values.where(outbox.c.id == fate.id)
    connection.execute(insert(dead).from_select([*_COPIED, "died", "reason", "error"], values))
    connection.execute(delete(outbox).where(outbox.c.id == fate.id))


def cancel(message_id: str, now: ColumnElement[Any] | int) -> Any:
    """The statement that deletes a row that is not due yet, and was not published."""
    is_later = and_(outbox.c.tries == 0, outbox.c.due.is_not(None), outbox.c.due > now)
    return delete(outbox).where(outbox.c.message_id == message_id, is_later)


def depth(connection: Connection) -> OutboxDepth:
    """How much waits."""
    now = now_ms(connection)
    is_due = or_(outbox.c.due.is_(None), outbox.c.due <= now)
    since = func.coalesce(outbox.c.due, outbox.c.created)
    is_new = outbox.c.tries == 0
    counted = select_(
        func.count().filter(is_due, is_new),
        now - func.min(since).filter(is_due, is_new)
        if isinstance(now, ColumnElement)
        else func.min(since).filter(is_due, is_new),
        func.count().filter(~is_new),
        func.count().filter(outbox.c.due > now, is_new),
    )
    waiting, age, retried, later = connection.execute(counted.select_from(outbox)).one()
    if isinstance(now, int) and age is not None:
        age = now - age
    of_dead = connection.execute(select_(func.count()).select_from(dead)).scalar_one()
    return OutboxDepth(waiting, None if age is None else max(0.0, float(age) / 1000), retried, later, of_dead)


@dataclass(frozen=True, slots=True)
class DeadRow:
    """A row that could not be published.

    Attributes:
        id: its number among the dead.
        message_id: the ID of its message.
        label: what it is, such as the job `emails.welcome`.
        order_key: its order key; None for none.
        created: when it was written, milliseconds since the epoch.
        died: when it was given up, milliseconds since the epoch.
        reason: `unroutable` or `too_large`.
        error: why, for people.
        body: the parameters, as JSON.

    """

    id: int
    message_id: str
    label: str
    order_key: str | None
    created: int
    died: int
    reason: str
    error: str
    body: bytes


def dead_rows(connection: Connection, limit: int, ids: Sequence[int] | None = None) -> list[DeadRow]:
    """The rows that could not be published, the oldest first; with `ids`, only these."""
    it = dead.c
    columns = (it.id, it.message_id, it.label, it.order_key, it.created, it.died, it.reason, it.error, it.body)
    wanted = select_(*columns).order_by(it.id).limit(limit)
    if ids:
        wanted = wanted.where(it.id.in_(ids))
    return [DeadRow(*row) for row in connection.execute(wanted)]


def retry_dead(connection: Connection, ids: Sequence[int]) -> int:
    """Put rows that could not be published back into the outbox, at its end; returns how many."""
    copied = [dead.c[name] for name in _COPIED]
    values = select_(*copied, bindparam("tries", 0)).where(dead.c.id.in_(ids)).order_by(dead.c.id)
    connection.execute(insert(outbox).from_select([*_COPIED, "tries"], values))
    return connection.execute(delete(dead).where(dead.c.id.in_(ids))).rowcount


def delete_dead(connection: Connection, ids: Sequence[int]) -> int:
    """Delete rows that could not be published; returns how many."""
    return connection.execute(delete(dead).where(dead.c.id.in_(ids))).rowcount
