"""The relay: publishes the rows of an outbox and deletes them.

Any number of processes may have one: of those with the same database and namespace, one at a time does a step.

    PostgreSQL   one transaction: take the lock, select, publish, wait for the confirms, delete
    SQLite       the lock of a file; a transaction that selects; publish; a transaction that deletes

If a relay is lost after it published, its rows are still there, and are published again under the same IDs and keys.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from rpcq import logs
from rpcq.errors import BrokerError, BrokerUnreachable
from rpcq.options import ClientOptions
from rpcq.outbox import publishing, rows
from rpcq.outbox.databases import Database, file_of
from rpcq.outbox.publishing import Row
from rpcq.outbox.rows import Fate
from rpcq.runtime.backoff import Backoff
from rpcq.transport.base import Listener, Published, Transport
from rpcq.transport.opening import open_transport
from rpcq.url import mask
from rpcq.wire.events import EventTopology
from rpcq.wire.job_queues import no_queue

log = logs.get_logger("rpcq.outbox")

POLL: Final = 1.0
"""Seconds between two looks at the outbox while nothing is committed in this process."""

LOCKED_PAUSES: Final = (0.01, POLL)
"""Seconds before the first and the last try for the lock while another relay has it."""

FAILED_PAUSES: Final = (0.1, 5.0)
"""The same after an error of the database, or while there is no connection to the broker."""

STEP_TIMEOUT: Final = 60.0
"""Seconds that a step may take in all. A database that does not answer is given up then."""

LAST_STEP_TIMEOUT: Final = 5.0
"""Seconds that a relay has for what is committed when it is closed."""

REFUSED_PAUSE: Final = 60.0
"""Seconds after which an exchange is declared again that the broker refused to declare."""

SUSPECT_FROM: Final = 2
"""Tries from which on a row is published alone: it may be what ends the sessions of the others."""

UNCONFIRMED_PAUSES: Final = (0, 1_000, 5_000, 15_000, 60_000)
"""Milliseconds before a row is tried again that was not confirmed, or refused; the last one for ever."""

UNROUTABLE_PAUSES: Final = (5_000, 30_000, 180_000, 600_000)
"""The same for a row that no queue takes: its service may be about to start. Then it is dead."""


def is_sent(row: Row, published: Published | None, events: str) -> bool:
    """Whether nothing more is to be done for a row; `events` is the exchange for events, which nobody need hear."""
    return published is Published.CONFIRMED or (published is Published.RETURNED and row.exchange == events)


def fate_of(row: Row, published: Published) -> Fate | None:
    """What becomes of a row that is not sent; None if it waits as it is, because it was not handed over."""
    match published:
        case Published.TOO_LARGE:
            error = f"the parameters are {len(row.body)} bytes of JSON, more than the broker takes"
            return Fate(row.id, error, reason="too_large")
        case Published.RETURNED:
            service, _, lane = row.routing_key.partition(":")
            error = no_queue(service, lane or "normal")
            if row.tries < len(UNROUTABLE_PAUSES):
                return Fate(row.id, error, UNROUTABLE_PAUSES[row.tries])
            return Fate(row.id, f"{error}; then retry it", reason="unroutable")
        case Published.REFUSED | Published.UNKNOWN:
            error = "the broker refused it: its queue is full, or has no leader"
            if published is Published.UNKNOWN:
                error = "the broker did not confirm it, and may have it"
            return Fate(row.id, error, UNCONFIRMED_PAUSES[min(row.tries, len(UNCONFIRMED_PAUSES) - 1)])
        case _:
            return None


@dataclass(slots=True)
class Counts:
    """What a relay did.

    Attributes:
        sent: rows that were published, confirmed and deleted.
        retried: times that a row was not confirmed, or had no queue, and is tried again.
        dead: rows that cannot be published.

    """

    sent: int = 0
    retried: int = 0
    dead: int = 0


class Relay:
    """Publishes the rows of an outbox, in a task.

    Args:
        database: where the rows are.
        url: the broker.
        options: of the connections, and the namespace: rows of other namespaces are left alone.

    Attributes:
        counts: what it did.
        problem: why it sends nothing now; empty if it does, or another relay does.

    """

    def __init__(self, database: Database, url: str, options: ClientOptions) -> None:
        self.counts = Counts()
        self.problem = "the relay has not begun yet"
        self._database = database
        self._url = url
        self._options = options
        topology = EventTopology(options.namespace)
        self._events = topology.events.name
        self._exchanges = {topology.jobs.jobs.name: [topology.jobs.jobs], self._events: topology.exchanges()}
        self._declared: set[str] = set()
        self._refused: dict[str, float] = {}
        self._woken = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._transport: Transport | None = None
        self._stopping = False
        self._seldom = logs.Seldom(log)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Run in a task, until `close`. It connects to broker and database by itself, whenever they are there."""
        self._task = self._loop.create_task(self.run())

    async def open(self) -> None:
        """Connect to the broker now.

        Raises:
            BrokerError: the broker cannot be used; the message says why.

        """
        if self._transport is not None:
            return
        transport = open_transport(self._url, self._options)
        # No queue is consumed: what the sessions report is in `can_publish`, which is asked before each step.
        listener = Listener(
            consuming=lambda _: None,
            consuming_lost=lambda _: None,
            publishing=self.wake,
            publishing_lost=lambda cause: log.warning("the relay lost the broker", cause=str(cause)),
            publishing_blocked=lambda reason: log.warning("the broker takes no messages", reason=reason),
        )
        await transport.start([], [], listener)
        self._transport = transport
        self._declared.clear()
        log.info("relay open", url=mask(self._url), namespace=self._options.namespace)

    def wake(self) -> None:
        """Look for rows now. Inside the event loop."""
        self._woken.set()

    def wake_from_thread(self) -> None:
        """The same, from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._woken.set)

    async def run(self) -> None:
        """Relay until `close`."""
        failed, locked = Backoff(*FAILED_PAUSES), Backoff(*LOCKED_PAUSES)
        while True:
            is_last = self._stopping  # then what is committed now is still sent
            self._woken.clear()
            pause, found = POLL, 0
            try:
                await self._connected()
                async with asyncio.timeout(STEP_TIMEOUT):
                    done = await self.step()
            except BrokerError as error:
                self.problem = f"the relay cannot use the broker: {error}"
                self._seldom.warning("the relay cannot use the broker", cause=str(error))
                pause = failed.jittered()
            except Exception as error:  # noqa: BLE001 - the driver's own; logged, and tried again for ever
                self.problem = f"the relay cannot use the database: {type(error).__name__}: {error}"
                self._seldom.warning("the relay cannot use the database", cause=f"{type(error).__name__}: {error}")
                pause = failed.jittered()
            else:
                failed.reset()
                self.problem = ""
                found = done or 0
                if done is None:
                    # What was committed here is not seen by the relay that has the lock until its next step.
                    pause = locked.pause()
                else:
                    locked.reset()
            if is_last and not found:
                return
            if not found:
                await self._rest(pause)

    async def close(self) -> None:
        """Send what is committed, within `LAST_STEP_TIMEOUT`, and close the connections to the broker."""
        self._stopping = True
        self._woken.set()
        if self._task is not None:
            _, pending = await asyncio.wait([self._task], timeout=LAST_STEP_TIMEOUT)
            if pending:
                self._task.cancel()
                await asyncio.wait([self._task])
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.close()
        self._database.close()

    async def _connected(self) -> None:
        """Connect, and wait until a message may be published."""
        await self.open()
        assert self._transport is not None  # noqa: S101 - `open` made it
        if self._transport.can_publish:
            return
        self.problem = "there is no connection to the broker, or it takes no messages"
        try:
            async with asyncio.timeout(STEP_TIMEOUT):
                await self._transport.writable()
        except TimeoutError as error:
            raise BrokerUnreachable(self.problem) from error

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return

    async def step(self) -> int | None:
        """Publish up to `MOST_ROWS` rows and delete them; returns how many were done with, None if another relays."""
        return await (self._step_of_file() if self._database.is_sqlite else self._step_of_server())

    async def _step_of_server(self) -> int | None:
        async with self._database.transaction() as run:
            if not await run(rows.try_lock, self._options.namespace):
                return None
            found = await run(rows.select, self._usable())
            if not found:
                return 0
            sent, fates = await self._publish(found)
            await run(rows.settle, sent, fates)
        return self._count(sent, fates)

    async def _step_of_file(self) -> int | None:
        with _file_lock(f"{file_of(self._database.engine)}.{self._options.namespace}.relay") as has_lock:
            if not has_lock:
                return None
            async with self._database.transaction() as run:
                found = await run(rows.select, self._usable())
            if not found:
                return 0
            sent, fates = await self._publish(found)
            async with self._database.transaction() as run:
                await run(rows.settle, sent, fates)
        return self._count(sent, fates)

    def _usable(self) -> list[str]:
        """The exchanges to which this relay publishes: those of its namespace that it could declare."""
        now = self._loop.time()
        return [name for name in self._exchanges if self._refused.get(name, 0.0) <= now]

    async def _declare(self, name: str) -> bool:
        """Whether an exchange is there: publishing to one that does not exist ends the session.

        A program that only sends jobs may lack the permission for events: then another relay has to publish those.
        """
        assert self._transport is not None  # noqa: S101 - there is one before a step
        try:
            async with asyncio.timeout(publishing.CONFIRM_TIMEOUT):
                await self._transport.declare(self._exchanges[name])
        except BrokerError as error:
            if not error.permanent:
                raise
            self._seldom.warning("the relay cannot declare an exchange", exchange=name, cause=str(error))
            self._refused[name] = self._loop.time() + REFUSED_PAUSE
            return False
        self._declared.add(name)
        return True

    async def _publish(self, found: Sequence[Row]) -> tuple[list[int], list[Fate]]:
        assert self._transport is not None  # noqa: S101 - there is one before a step
        for name in {row.exchange for row in found} - self._declared:
            if not await self._declare(name):
                found = [row for row in found if row.exchange != name]
        together = [row for row in found if row.tries < SUSPECT_FROM]
        outcomes = await publishing.publish(self._transport, together) if together else {}
        for row in found:
            if row.tries >= SUSPECT_FROM and self._transport.can_publish:
                outcomes.update(await publishing.publish(self._transport, [row]))
                if outcomes[row.id] is Published.UNKNOWN:
                    break  # it has held up the others for long enough
        sent = [row.id for row in found if is_sent(row, outcomes.get(row.id), self._events)]
        done = {*sent}
        others = [fate_of(row, outcomes[row.id]) for row in found if row.id in outcomes and row.id not in done]
        return sent, [fate for fate in others if fate is not None]

    def _count(self, sent: Sequence[int], fates: Sequence[Fate]) -> int:
        self.counts.sent += len(sent)
        for fate in fates:
            if fate.pause_ms is None:
                self.counts.dead += 1
                log.error("a row of the outbox cannot be published: it is dead", row=fate.id, cause=fate.error)
            else:
                self.counts.retried += 1
                self._seldom.warning("a row of the outbox is tried again", row=fate.id, cause=fate.error)
        return len(sent) + len(fates)


@contextmanager
def _file_lock(path: str) -> Iterator[bool]:
    """Whether this process has the lock of a file, which ends with the block or the process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
