"""Goes through the letters of a queue for an operator: looks at them, replays them, deletes them.

    letter -> published to the exchange for jobs -> confirmed          -> acknowledged: it is gone
                                                 -> returned, refused  -> it stays where it is

A letter is acknowledged only when the broker has confirmed the job elsewhere. So none is lost; if the command is killed
between the two, the job is there twice, under one ID and key. Every walk ends: it looks at as many letters as the queue
had when it began, and it holds them until it ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from rpcq.errors import BrokerError, BrokerUnreachable, NotFound
from rpcq.jobs.letters import DeadLetter, Replay, Wanted, read_letter, replay_of
from rpcq.options import ConnectionOptions
from rpcq.transport.base import Listener, Message, Published, Transport
from rpcq.transport.opening import open_admin
from rpcq.url import parse
from rpcq.wire.events import EventTopology

if TYPE_CHECKING:
    from rpcq.transport.rabbitmq.admin import Admin, QueueState
    from rpcq.transport.rabbitmq.browsing import Browser

WINDOW: Final = 100
"""Letters that are published and not confirmed."""

CONFIRM_TIMEOUT: Final = 30.0
"""Seconds to wait for a confirm, or until the broker takes messages."""

HELD_AT_MOST: Final = 600.0
"""Seconds after which letters go back and are taken again: up to RabbitMQ 4.2, a channel whose consumer holds a message
for 30 minutes is closed, whatever the consumer asks for."""


class Letters:
    """The letters of one queue.

    Args:
        admin: a connection.
        topology: of the namespace.
        queue: the queue's name.

    Attributes:
        seen: letters that the last walk looked at.
        missed: letters that it should have found, and that somebody else took.

    """

    def __init__(self, admin: Admin, topology: EventTopology, queue: str) -> None:
        self.admin = admin
        self.topology = topology
        self.queue = queue
        self.seen = 0
        self.missed = 0

    async def state(self) -> QueueState:
        """The queue as it is now.

        Raises:
            NotFound: there is no such queue.
            BrokerError: the broker could not be asked, or refused.

        """
        found = await self.admin.queue(self.queue)
        if found is None:
            msg = f"there is no queue {self.queue!r}: a worker with jobs declares it; check the service and --namespace"
            raise NotFound(msg)
        return found

    async def walk(self, browser: Browser, wanted: Wanted, bound: int) -> AsyncGenerator[tuple[int, DeadLetter], None]:
        """Go through at most `bound` letters; yields the wanted ones, each with its delivery tag.

        Raises:
            BrokerError: the broker refused, or the connection was lost.

        """
        self.seen = self.missed = 0
        while self.seen < bound:
            taken = await browser.next(bound - self.seen)
            if taken is None:
                self.missed = bound - self.seen
                return
            self.seen += 1
            letter = read_letter(self.topology, taken.exchange, taken.routing_key, taken.properties, taken.body)
            if wanted.takes(letter):
                yield taken.tag, letter

    async def look(self, wanted: Wanted, bound: int) -> AsyncGenerator[DeadLetter, None]:
        """Go through at most `bound` letters; yields the wanted ones. All go back at the end.

        Close the iterator (`contextlib.aclosing`) to end earlier.

        Raises:
            BrokerError: the broker refused, or the connection was lost.

        """
        async with self.admin.browse(self.queue) as browser:
            async for _, letter in self.walk(browser, wanted, bound):
                yield letter

    async def purge(self, wanted: Wanted, bound: int, most: int, report: Callable[[DeadLetter], None]) -> None:
        """Delete the wanted ones of at most `bound` letters, at most `most`.

        Args:
            wanted: which.
            bound: letters to look at.
            most: letters to delete.
            report: called with each letter that is deleted.

        Raises:
            BrokerError: the broker refused, or the connection was lost: the letters that were reported last may still
                be there.

        """
        deleted = 0
        async with self.admin.browse(self.queue) as browser:
            async for tag, letter in self.walk(browser, wanted, bound):
                browser.ack(tag)
                report(letter)
                deleted += 1
                if deleted == most:
                    return


@asynccontextmanager
async def open_letters(url: str, options: ConnectionOptions, queue: str) -> AsyncIterator[Letters]:
    """The letters of a queue, over a connection to the first node that can be reached.

    Raises:
        ConfigurationError: the URL is one of the in-process broker.
        BrokerError: no node can be used; of the last one.

    """
    broker = parse(url)
    async with AsyncExitStack() as stack:
        for left, (host, port) in zip(reversed(range(len(broker.hosts))), broker.hosts, strict=True):
            try:
                admin = await stack.enter_async_context(open_admin(broker, options, host, port))
                break
            except BrokerError:
                if not left:
                    raise
        yield Letters(admin, EventTopology(options.namespace), queue)


class Replayer:
    """Publishes letters again as jobs.

    Args:
        letters: where they are.
        transport: what publishes; it is not started yet.
        to: the service that gets the jobs, or the `service:subscription` that gets the events; None for each letter's
            own.
        rate: letters a second; None for no limit.
        report: called with each letter and why it stays where it is; with an empty string if it is replayed.

    Attributes:
        done: letters that were replayed.
        stay: letters that stay where they are.

    """

    def __init__(
        self,
        letters: Letters,
        transport: Transport,
        *,
        to: str | None,
        rate: float | None,
        report: Callable[[DeadLetter, str], None],
    ) -> None:
        self._letters = letters
        self._transport = transport
        self._to = to
        self._pause = 0.0 if rate is None else 1 / rate
        self._report = report
        self._next_at = 0.0
        self._in_flight = 0
        self._changed = asyncio.Event()
        self._gone: set[bytes] = set()  # routing keys that have no queue
        self._there: set[bytes] = set()  # those whose queue was looked for, and is there
        self._tried: set[str] = set()  # IDs of the letters that stay: not tried again in a later round
        self._is_lost = False
        self.done = 0
        self.stay = 0

    async def run(self, wanted: Wanted, bound: int, most: int) -> None:
        """Replay the wanted ones of at most `bound` letters; try at most `most`.

        If it is cancelled, a letter whose confirm did not come stays where it is, and may be replayed nevertheless.

        Raises:
            BrokerError: the broker refused, or the connection was lost: letters that were replayed last may still be
                there.

        """
        nothing = Listener(*[lambda *_: None] * 5)
        topology = self._letters.topology.jobs
        await self._transport.start([topology.jobs], [], nothing)
        try:
            while await self._round(wanted, bound - self.done, most):
                pass
        finally:
            await self._transport.close()

    async def _round(self, wanted: Wanted, bound: int, most: int) -> bool:
        """Replay for `HELD_AT_MOST` seconds; returns whether there is more to do."""
        loop = asyncio.get_running_loop()
        until = loop.time() + HELD_AT_MOST
        letters, tried = self._letters, frozenset(self._tried)
        async with letters.admin.browse(letters.queue) as browser:
            try:
                async for tag, letter in letters.walk(browser, wanted, bound):
                    if letter.job.id in tried:
                        continue
                    await self._until(lambda: self._in_flight < WINDOW)
                    if self._is_lost or self._in_flight + self.done + self.stay >= most:
                        return False
                    await self._replay(browser, tag, letter)
                    if loop.time() > until:
                        return True
                return False
            finally:
                await self._until(lambda: not self._in_flight)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for confirms until the condition holds. If none comes, end the transport: it reports what is missing."""
        while not condition():
            self._changed.clear()
            try:
                async with asyncio.timeout(CONFIRM_TIMEOUT):
                    await self._changed.wait()
            except TimeoutError:
                self._is_lost = True
                await self._transport.close()
                return

    async def _replay(self, browser: Browser, tag: int, letter: DeadLetter) -> None:
        replay = replay_of(self._letters.topology, letter, self._to, round(time.time() * 1000))
        if isinstance(replay, str):
            self._stays(letter, replay)
            return
        if not await self._is_taken(replay):
            self._stays(letter, replay.nobody)
            return
        await self._paced()
        self._in_flight += 1
        published = partial(self._published, browser, tag, letter, replay)
        route, name = (replay.exchange, replay.routing_key), replay.job_id.encode()
        self._transport.publish(Message(*route, name, replay.properties, replay.body, published))

    async def _is_taken(self, replay: Replay) -> bool:
        """Whether a queue takes it, as far as is known."""
        key = replay.routing_key
        if replay.queue and key not in self._there and key not in self._gone:
            is_there = await self._letters.admin.queue(replay.queue) is not None
            (self._there if is_there else self._gone).add(key)
        return key not in self._gone

    async def _paced(self) -> None:
        loop = asyncio.get_running_loop()
        if self._pause:
            self._next_at = max(self._next_at + self._pause, loop.time())
            await asyncio.sleep(self._next_at - loop.time())
        if not self._transport.can_publish:
            try:
                async with asyncio.timeout(CONFIRM_TIMEOUT):
                    await self._transport.writable()
            except TimeoutError:
                msg = f"the broker took no messages for {CONFIRM_TIMEOUT:g} s: it may have a memory or disk alarm"
                raise BrokerUnreachable(msg) from None

    def _published(self, browser: Browser, tag: int, letter: DeadLetter, replay: Replay, published: Published) -> None:
        self._in_flight -= 1
        self._changed.set()
        match published:
            case Published.CONFIRMED:
                browser.ack(tag)
                self.done += 1
                self._report(letter, "")
            case Published.RETURNED:
                self._gone.add(replay.routing_key)
                self._stays(letter, replay.nobody)
            case Published.REFUSED:
                self._stays(letter, "the broker refused it: its queue takes nothing now")
            case Published.TOO_LARGE:
                self._stays(letter, "it is larger than the broker takes")
            case Published.UNSENT:
                self._is_lost = True
                self._stays(letter, "the connection was lost before it was sent")
            case Published.UNKNOWN:
                self._is_lost = True
                self._stays(letter, "the broker did not confirm it: it may be replayed, and be here nevertheless")

    def _stays(self, letter: DeadLetter, why: str) -> None:
        self.stay += 1
        self._tried.add(letter.job.id)
        self._report(letter, why)
