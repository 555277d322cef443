"""Ordered lanes: the jobs of one order key run one by one, in the order in which the broker has them.

    delivery -> another job of its key is in hand               -> waits for its turn
             -> it is the first of its key                      -> its turn
    turn     -> as many jobs run as may                         -> waits for a place
             -> what waits would be held here for too long      -> the lane is handed over, and consumed again
             -> else                                            -> considered, as any job that arrives
    then     -> done, or dead, and acknowledged                 -> the broker knows -> the next of its key has its turn
             -> runs again                                      -> waits here, and holds up its key -> its turn

The queue of a lane has a single active consumer, so one worker has the lane at a time. Nothing of a lane is published
again or given back one by one: that would put it behind later jobs of its key. What is not acknowledged goes back when
the lane is handed over, all at once and in its order. So the next worker begins with the first job that is not settled.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from rpcq.jobs.gathering import Gathering, sleep
from rpcq.jobs.outcomes import Again, Dead, of_ordered
from rpcq.jobs.run import JobRun
from rpcq.wire.job_queues import ALONE_FROM

if TYPE_CHECKING:
    from rpcq.jobs.holding import Hand
    from rpcq.transport.base import Delivery, Transport
    from rpcq.wire.jobs import JobMessage

ORDERED_PREFETCH: Final = 9
"""Deliveries of one lane that a worker may hold: one that runs, and eight that wait for it."""

LONGEST_HELD: Final = 28 * 60.0
"""Seconds after which all that a lane holds is settled or has gone back; RabbitMQ bounds that to 30 minutes."""

HAND_OVER_AFTER: Final = 24 * 60.0
"""Seconds that a lane holds a delivery before the lane is handed over."""

UNREADY_PAUSE: Final = 0.5
"""Seconds until the next look whether jobs may begin, while nothing can be published."""


class Runner(Protocol):
    """What a lane needs of the worker's jobs."""

    @property
    def may_begin(self) -> Callable[[], bool]:
        """Whether a job may begin now: what becomes of it must be published."""

    def consider(self, run: JobRun) -> None:
        """Begin a job, or settle it without a run."""

    def waits_here(self, run: JobRun, again: JobRun) -> None:
        """A job waits here until it runs again, as another run."""


@dataclass(slots=True)
class _Tried:
    """Since when a job has held up its key.

    Attributes:
        since: when it had its turn first, on `time.monotonic()`.
        pauses: seconds of its pauses since then, by the time of the broker, which a test may move.

    """

    since: float
    pauses: float = 0.0


class Room:
    """How many jobs of the ordered lanes of a service run at once in a worker.

    Args:
        most: that many.

    """

    def __init__(self, most: int) -> None:
        self.free = most
        self.waiting: deque[JobRun] = deque()

    def leave(self) -> None:
        """A place is free: the next job has its turn."""
        self.free += 1
        while self.free > 0 and self.waiting:
            run = self.waiting.popleft()
            assert run.lane is not None  # noqa: S101 - only jobs of ordered lanes wait here
            run.lane.turn(run)


class Lane:
    """One ordered lane of a service, in one worker.

    Args:
        name: of the lane, one of `ORDERED_LANES`.
        queue: the name of its queue.
        transport: the worker's.
        runner: what runs its jobs.
        hand: all jobs that the worker has in hand.
        room: of the service.
        gathering: of the worker.

    """

    def __init__(
        self,
        name: str,
        queue: str,
        transport: Transport,
        runner: Runner,
        hand: Hand,
        room: Room,
        gathering: Gathering,
    ) -> None:
        self.name = name
        self._queue = queue
        self._transport = transport
        self._runner = runner
        self._hand = hand
        self._room = room
        self._gathering = gathering
        self._keys: dict[str, deque[JobRun]] = {}  # the first one of each key has its turn
        self._arrived: dict[Delivery, float] = {}  # what is held, in its order, since when
        self._begun: set[JobRun] = set()  # jobs that have a place
        self._pauses: dict[JobRun, asyncio.Task[None]] = {}
        self._asleep: dict[JobRun, int] = {}  # until when, in milliseconds since the epoch
        self._settled: list[JobRun] = []  # the broker does not have their acknowledgements yet
        self._orphans: set[JobRun] = set()  # begun jobs whose session is lost: another worker may have them
        self._passed: set[str] = set()  # keys of which a job that came back often was settled here
        self._tried: dict[str, tuple[JobRun, _Tried]] = {}  # ID -> a job that was handed over before it ran again
        self._trying: dict[JobRun, _Tried] = {}  # jobs that have had a turn
        self._ends = False  # nothing begins: it is handed over, as soon as nothing runs
        self._stopping = False
        self._handed_over = asyncio.Event()  # for good
        self._task: asyncio.Task[None] | None = None

    # Called by the worker's jobs.

    def take(self, run: JobRun) -> None:
        """Take a delivery."""
        self._arrived[run.delivery] = time.monotonic()
        tried = self._tried.pop(run.job.id, None)
        if tried is not None:
            run.job.attempt, run.job.unknown = tried[0].job.attempt, tried[0].job.unknown
            self._trying[run] = tried[1]
        waiting = self._keys.setdefault(run.order_key, deque())
        waiting.append(run)
        if waiting[0] is not run:
            return
        if run.job.returns < ALONE_FROM:
            self.turn(run)
        elif not self._ends:
            self._gathering.add(run)

    def is_first(self, run: JobRun) -> bool:
        """Whether it is the first job of its key since this worker has the lane: it may be what killed the others."""
        return run.order_key not in self._passed

    def fate(self, run: JobRun, fate: Again) -> Again | Dead:
        """What becomes of a job that is to run again: see `of_ordered`."""
        tried = self._trying[run]
        return of_ordered(run.job, fate, max(time.monotonic() - tried.since, tried.pauses))

    def again(self, run: JobRun, job: JobMessage, seconds: float) -> None:
        """A job runs again after a pause, here, as this message."""
        self._leave(run)
        if run in self._orphans:
            self._gone(run)
            return
        again = JobRun(run.runner, run.served, run.delivery, job, run.method, is_suspect=False)
        self._runner.waits_here(run, again)
        self._keys[run.order_key][0] = again
        self._trying[again] = tried = self._trying.pop(run)
        tried.pauses += seconds
        self._hand.forget(run)
        self._hand.add(again)
        self._pause(again, seconds)
        self._go_on()

    def settled(self, run: JobRun) -> None:
        """A job is acknowledged. The next one of its key begins when the broker knows: so none runs after it."""
        if run.job.returns >= ALONE_FROM:
            self._passed.add(run.order_key)
        self._leave(run)
        self._settled.append(run)
        self._go_on()

    def put_back(self, run: JobRun) -> None:
        """A job that was considered is not settled here: it goes back with what else the lane holds."""
        self._leave(run)
        self._gone(run)
        self._go_on()

    def adopted(self, run: JobRun) -> None:
        """A job that runs here has taken over its redelivery: this worker still has the lane."""
        self._orphans.discard(run)
        self._arrived[run.delivery] = time.monotonic()

    def lost(self) -> None:
        """The consuming session is lost. What has not begun comes again, here or elsewhere; the rest goes on."""
        self._orphans = set(self._begun)
        self._settled.clear()
        self._arrived.clear()
        self._passed.clear()
        self._tried.clear()
        self._ends = self._stopping
        self._drop_waiting()
        self._go_on()

    def paused(self) -> int:
        """How many jobs wait for a time, or for one that does."""
        now = self._transport.now_ms()
        asleep = [run for run, until in self._asleep.items() if until > now]
        asleep += [run for run in self._gathering.asleep(now) if run.lane is self]
        return sum(len(self._keys[run.order_key]) for run in asleep)

    def look(self, now: float) -> None:
        """Hand the lane over if it has held a delivery for too long."""
        if self._oldest(now) >= HAND_OVER_AFTER:
            self._end()

    def stop(self) -> None:
        """Begin nothing more, and hand the lane over as soon as nothing runs."""
        self._stopping = True
        self._end()

    async def stopped(self) -> None:
        """Wait until it is handed over, after `stop`."""
        await self._handed_over.wait()

    def close(self) -> None:
        """Do nothing more. What is not settled, the broker delivers again."""
        self._stopping = self._ends = True
        for pause in self._pauses.values():
            pause.cancel()
        if self._task is not None:
            self._task.cancel()

    # Turns.

    def turn(self, run: JobRun) -> None:
        """A job is the first of its key: begin it, if there is a place and time for it."""
        self._pauses.pop(run, None)
        if self._ends:
            return  # it goes back
        now = time.monotonic()
        if self._oldest(now) + run.longest > LONGEST_HELD:
            self._end()
        elif not self._runner.may_begin():
            self._pause(run, UNREADY_PAUSE)
        elif self._room.free <= 0:
            self._room.waiting.append(run)
        else:
            self._room.free -= 1
            if run not in self._trying:
                self._trying[run] = _Tried(now)
            self._begun.add(run)
            self._runner.consider(run)

    def _pause(self, run: JobRun, seconds: float) -> None:
        """Have a job wait for its next turn."""
        if not self._ends:
            until_ms = self._transport.now_ms() + round(seconds * 1000)
            task = asyncio.get_running_loop().create_task(self._turn_at(run, until_ms, seconds))
            self._pauses[run] = task

    async def _turn_at(self, run: JobRun, until_ms: int, seconds: float) -> None:
        self._asleep[run] = until_ms
        try:
            await sleep(self._transport, until_ms, seconds)
        finally:
            del self._asleep[run]
        self.turn(run)

    def _oldest(self, now: float) -> float:
        """Seconds that the oldest delivery has been held."""
        return now - next(iter(self._arrived.values()), now)

    def _leave(self, run: JobRun) -> None:
        if run in self._begun:
            self._begun.discard(run)
            self._room.leave()

    def _gone(self, run: JobRun) -> None:
        """A job is settled for good, or is held here no more: the next one of its key has its turn."""
        self._orphans.discard(run)
        self._trying.pop(run, None)
        self._arrived.pop(run.delivery, None)
        self._hand.forget(run)
        waiting = self._keys.get(run.order_key)
        if waiting and waiting[0] is run:
            waiting.popleft()
            if waiting:
                self.turn(waiting[0])
            else:
                del self._keys[run.order_key]

    def _drop_waiting(self) -> None:
        """Forget what is held and has not begun."""
        for pause in self._pauses.values():
            pause.cancel()
        self._pauses.clear()
        dropped = [run for runs in self._keys.values() for run in runs if run not in self._begun]
        self._keys = {run.order_key: deque([run]) for run in self._begun}
        for run in dropped:
            self._trying.pop(run, None)
            self._gathering.discard(run)
            if run in self._room.waiting:
                self._room.waiting.remove(run)
            self._hand.forget(run)

    # What takes time.

    def _end(self) -> None:
        self._ends = True
        self._go_on()

    def _go_on(self) -> None:
        """Wait for the broker if there is something to wait for."""
        ends = self._ends and not self._begun and not self._handed_over.is_set()
        if self._task is None and (self._settled or ends):
            self._task = asyncio.get_running_loop().create_task(self._wait())
            self._task.add_done_callback(self._has_waited)

    async def _wait(self) -> None:
        while self._settled:
            settled, self._settled = self._settled, []
            # If the session is lost meanwhile, `lost` has dropped what waits for these.
            await self._transport.settled(self._queue)
            for run in settled:
                self._gone(run)
        if self._ends and not self._begun:
            await self._hand_over()

    def _has_waited(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled():
            task.result()  # an error here is a bug in rpcq: the loop logs it
            self._go_on()

    async def _hand_over(self) -> None:
        """Have all that is held go back; when the worker does not stop, consume again."""
        is_last = self._stopping
        self._tried = {run.job.id: (run, tried) for run, tried in self._trying.items()}
        self._drop_waiting()
        self._arrived.clear()
        self._passed.clear()
        self._ends = is_last
        await self._transport.hand_over(self._queue, again=not is_last)
        if is_last:
            self._handed_over.set()


class Ordering:
    """The ordered lanes of a worker.

    Args:
        transport: the worker's.
        runner: what runs their jobs.
        hand: all jobs that the worker has in hand.

    """

    def __init__(self, transport: Transport, runner: Runner, hand: Hand) -> None:
        self._transport = transport
        self._runner = runner
        self._hand = hand
        self._lanes: list[Lane] = []
        self._gathering = Gathering(transport, lambda: runner.may_begin())  # noqa: PLW0108 - it may be replaced

    def add(self, name: str, queue: str, room: Room) -> Lane:
        """Add a lane; see `Lane`."""
        lane = Lane(name, queue, self._transport, self._runner, self._hand, room, self._gathering)
        self._lanes.append(lane)
        return lane

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes)

    def lost(self) -> None:
        """The consuming session is lost."""
        for lane in self._lanes:
            lane.lost()

    def look(self, now: float) -> None:
        """Hand over the lanes that have held a delivery for too long."""
        for lane in self._lanes:
            lane.look(now)

    def stop(self) -> None:
        """Begin nothing more."""
        for lane in self._lanes:
            lane.stop()

    async def stopped(self) -> None:
        """Wait until all lanes are handed over, after `stop`."""
        for lane in self._lanes:
            await lane.stopped()

    def close(self) -> None:
        """Do nothing more. What is not settled, the broker delivers again."""
        self._gathering.close()
        for lane in self._lanes:
            lane.close()
