"""A world whose time a test moves: what hours do to jobs, in milliseconds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, cast, overload

from rpcq import logs
from rpcq.client import Client
from rpcq.errors import ConfigurationError, UsageError
from rpcq.event_types import Event
from rpcq.service import Service
from rpcq.testing.events import Published, PublishedEvent
from rpcq.testing.fakes import FakeService
from rpcq.testing.jobs import DeadJob, Jobs, Target, WaitingJob
from rpcq.transport.memory.broker import MemoryBroker
from rpcq.transport.memory.clock import StoppedClock
from rpcq.transport.memory.transport import MemoryTransport
from rpcq.wire.events import EventTopology
from rpcq.worker import Worker

if TYPE_CHECKING:
    from rpcq.outbox import Outbox

E = TypeVar("E", bound=Event)

PATIENCE: Final = 10.0
"""Seconds of real time that the jobs which run at one time of the world may take."""

MOST: Final = 3650 * 86400.0
"""Seconds that the time may be moved at once."""


class WorkerKilled(BaseException):
    """Raised by `World.crash` in the handler that called it: its worker has ended.

    It is no `Exception`, so that the handler's own error handling does not catch it.
    """


class MortalWorker(Worker):
    """A worker that can end as if its process was killed."""

    def vanish(self) -> None:
        """Be gone for the broker: acknowledge and publish nothing more."""
        cast("MemoryTransport", self._transport).vanish()
        if self._jobs is not None:
            self._jobs.vanish()
        for instance in self._instances:
            instance.vanish()
            if instance.running is not None:
                self._executor.cancel(instance.running)

    async def kill(self) -> None:
        """End at once: cancel what runs, acknowledge nothing. Threads go on, because they cannot be ended."""
        self.vanish()
        await self._abandon()

    def take_middle_pauses(self) -> None:
        """Make each pause before a retry half of the longest one, instead of random."""
        if self._jobs is not None:
            self._jobs.spread = _half

    @property
    def is_ticking(self) -> bool:
        """Whether it is about to send the jobs of a schedule."""
        return any(ticker.is_at_work for ticker in self._tickers)

    @property
    def is_ordered(self) -> bool:
        """Whether jobs with an order key may wait here for a time."""
        return any(service.ordered for service in self.services)

    @property
    def paused(self) -> int:
        """Jobs with an order key that it holds until a time of the world."""
        return 0 if self._jobs is None else sum(lane.paused() for lane in self._jobs.ordering)

    def runs(self, invocation: object) -> bool:
        """Whether this is an invocation of a job that runs here."""
        return self._jobs is not None and any(run.invocation is invocation for run in self._jobs)


class World:
    """Services, a client, and an in-process broker whose time stands still until the test moves it.

    The delays of jobs, the expiry of messages and the times in messages follow the time of the world. All else is
    real: `timeout=` of a job, `asyncio.sleep` in a handler, and the deadlines of calls take real time. The pause before
    a retry is random in production; here it is half of the longest one, so that no test depends on chance. What
    `RetryLater` asks for is exact, rounded up to 0.25 s as in production.

    `async with world(...)` makes it.

    Attributes:
        client: a connected client.

    """

    def __init__(
        self,
        client: Client,
        broker: MemoryBroker,
        clock: StoppedClock,
        topology: EventTopology,
        services: Sequence[Service],
        make: Callable[..., MortalWorker],
    ) -> None:
        self.client = client
        self._broker = broker
        self._clock = clock
        self._real = [service for service in services if not isinstance(service, FakeService)]
        self._served = [*services]
        self._jobs = Jobs(broker, clock, topology, self._served)
        self._published = Published(broker.vhost, topology)
        self._make = make
        self._workers: list[MortalWorker] = []
        self._changing: list[asyncio.Task[None]] = []  # ends and replaces workers; kept until its errors are raised
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    @property
    def now(self) -> datetime:
        """The time of the world, in UTC."""
        return self._clock.wall()

    # Time.

    async def advance(
        self, *, days: float = 0.0, hours: float = 0.0, minutes: float = 0.0, seconds: float = 0.0
    ) -> None:
        """Move the time of the world forward, and let happen all that happens until then, in its order.

        Each delay that ends is a stop: the time stands still until the jobs that are due then have run, and so on. It
        returns when no job runs any more and nothing is left to do before the new time. A job that waits for a worker
        waits on.

        Args:
            days: 24 hours each.
            hours: 60 minutes each.
            minutes: 60 seconds each.
            seconds: at least 0, as the others; the sum is above 0.

        Raises:
            ConfigurationError: it is not a time above 0.
            TimeoutError: a job still runs after 10 s of real time; its handler goes on. The time of the world stands
                where that job began.

        """
        total = 0.0
        for name, value, unit in (
            ("days", days, 86400),
            ("hours", hours, 3600),
            ("minutes", minutes, 60),
            ("seconds", seconds, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ConfigurationError(f"{name} must be a number of at least 0; got {value!r}")
            total += value * unit
        if not 0 < total <= MOST:
            raise ConfigurationError(f"advance must be given more than 0 s and at most ten years; got {total:g} s")
        until = self._clock.now + total
        await self._until_quiet()
        while (due := self._broker.next_stop) is not None and due <= until:
            self._broker.move_clock(max(due, self._clock.now))
            await self._until_quiet()
        self._broker.move_clock(until)
        await self._until_quiet()

    async def settled(self, *outboxes: Outbox) -> None:
        """Wait until each job that was sent is done, delayed or dead. The time of the world stands still meanwhile.

        Args:
            outboxes: whose rows are to be sent, too, and what is done for them; the relay of each runs in this world,
                `Outbox(engine, url, namespace=w.client.options.namespace)`. Rows that are due later, or are tried
                again later, stay: a world does not move the time of a database.

        Raises:
            TimeoutError: a job still runs after 10 s of real time, and its handler goes on; or rows still wait.
            UsageError: a job waits for a worker, and no worker takes it; or no relay of an outbox runs here.

        """
        await self._until_quiet()
        if outboxes:
            await self._until_sent(outboxes)
        if stuck := [job.job for job in self.waiting() if job.due is None]:
            msg = f"{stuck[0]} and {len(stuck) - 1} more jobs wait" if len(stuck) > 1 else f"{stuck[0]} waits"
            raise UsageError(f"{msg} for a worker, and no worker takes jobs: await start_worker() first")

    async def _until_sent(self, outboxes: Sequence[Outbox]) -> None:
        """Wait until no row waits, and nothing happens any more."""
        for outbox in outboxes:
            if not outbox.is_relaying:
                raise UsageError("settled must be given outboxes whose relay runs: enter each one, async with outbox")
        quiet = 0
        try:
            async with asyncio.timeout(PATIENCE) as limit:
                # Twice: a row that a relay is just done with may have begun a job that writes the next one.
                while quiet < 2:
                    sent = [outbox.counts().sent for outbox in outboxes]
                    await self._until_quiet()
                    waiting = sum([(await outbox.depth()).waiting for outbox in outboxes])
                    is_quiet = not waiting and sent == [outbox.counts().sent for outbox in outboxes]
                    quiet = quiet + 1 if is_quiet else 0
                    await asyncio.sleep(0 if is_quiet else 0.005)
        except TimeoutError as error:
            if not limit.expired():
                raise  # a job still runs
            why = "; ".join(sorted({outbox.why_not_ready() for outbox in outboxes} - {""}))
            msg = f"after {PATIENCE:g} s of real time, rows of outboxes still wait"
            raise TimeoutError(f"{msg}: {why}" if why else msg) from error

    async def _until_quiet(self) -> None:
        """Wait until nothing happens any more at this time of the world."""
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    if self._changing:
                        await self._changed()
                    elif any(worker.is_ticking for worker in self._workers):
                        await asyncio.sleep(0)
                    elif not self._broker.is_at_work and not self._runs():
                        break
                    elif any(worker.is_ordered for worker in self._workers):
                        await asyncio.sleep(0.001)  # that a job begins to wait for a time is no work of the broker
                    else:
                        await self._broker.worked()
        except TimeoutError as error:
            run = ", ".join(sorted({*self._jobs.in_hand()})) or "no job"
            msg = f"after {PATIENCE:g} s of real time, still running: {run}. A world moves the delays of jobs, and not"
            raise TimeoutError(f"{msg} what a handler waits for") from error

    def _runs(self) -> bool:
        """Whether workers hold jobs that do not wait for a time."""
        return sum(1 for _ in self._jobs.in_hand()) > sum(worker.paused for worker in self._workers)

    async def _changed(self) -> None:
        """Wait until workers have been ended and replaced.

        Raises:
            BrokerError: a worker could not be started.

        """
        while self._changing:
            task = self._changing[0]
            await asyncio.wait([task])
            if task in self._changing:
                self._changing.remove(task)
                task.result()

    # Workers.

    async def start_worker(self, *services: Service) -> Worker:
        """Start a worker, beside those that run.

        Args:
            services: what it serves, for example a newer version of a service; none for the world's own services.

        """
        served = services or self._real
        if not served:
            raise UsageError("start_worker must be given a service: this world has only fakes, or nothing")
        worker = self._make(*served)
        worker.take_middle_pauses()
        await worker.start()
        self._workers.append(worker)
        self._served += [service for service in services if service not in self._served]
        return worker

    async def kill_worker(self, worker: Worker | None = None) -> None:
        """End a worker as kill -9 does: it acknowledges nothing, and the broker delivers again what it held.

        What runs in it is cancelled: `finally` blocks run, unlike in a process that is killed. A handler in a thread
        goes on until it returns, and what becomes of it is ignored. Start another worker with `start_worker`.

        Args:
            worker: what `start_worker` returned; None for all workers that run, besides those of fakes.

        Raises:
            UsageError: this worker does not run; or none does.

        """
        found = [it for it in self._workers if worker is None or it is worker]
        if not found:
            raise UsageError("kill_worker must be given a worker that runs" if worker else "no worker runs")
        for each in found:
            self._workers.remove(each)
            each.vanish()  # all before the first one has ended: what it held must not go to another one of them
        # In a task of its own: the caller may be a handler of such a worker, which is cancelled.
        await asyncio.shield(self._change(_kill_all(found)))

    def crash(self, *_: Any, **__: Any) -> NoReturn:
        """End the worker whose job calls this, as `kill_worker` does, and start another one, as a supervisor does.

        Put it where the process would die: `monkeypatch.setattr(images, "decode", w.crash)`. It takes any arguments,
        can be called from `def` and `async def` handlers of jobs, and never returns.

        Raises:
            WorkerKilled: always, in the handler that called it.
            UsageError: no job of this world calls it.

        """
        invocation = logs.current.get()
        for worker in self._workers:
            if invocation is not None and worker.runs(invocation):
                if threading.get_ident() == self._thread:
                    self._crash(worker)
                else:
                    self._loop.call_soon_threadsafe(self._crash, worker)
                raise WorkerKilled(f"the worker of {worker.services[0].name!r} was killed by its job")
        raise UsageError("crash must be called by a job that a worker of this world runs")

    def _crash(self, worker: MortalWorker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
            worker.vanish()
            self._change(self._replace(worker))

    async def _replace(self, worker: MortalWorker) -> None:
        await worker.kill()
        await self.start_worker(*worker.services)

    def _change(self, change: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(change)
        self._changing.append(task)
        return task

    async def close(self) -> None:
        """Stop the workers that run; for `world`.

        Raises:
            BrokerError: a worker could not be started after `crash`.

        """
        try:
            await self._changed()
        finally:
            for worker in self._workers:
                await worker.stop()

    # What there is.

    def dead(self, target: Target = None) -> list[DeadJob]:
        """The dead letters, those of each service in the order in which they died. They stay where they are.

        Args:
            target: of which jobs: a service, a function with `@service.job` or `@service.on`, `"service"`, or
                `"service.job"`, which may be a subscription; None for all.

        Raises:
            ConfigurationError: this world has no such service or job.
            UsageError: the function is not a job, or one of several services.

        """
        return self._jobs.dead(target)

    @overload
    def published(self, kind: None = None) -> list[PublishedEvent]: ...

    @overload
    def published(self, kind: type[E]) -> list[E]: ...

    def published(self, kind: type[E] | None = None) -> list[PublishedEvent] | list[E]:
        """The events that were published, in order, whether anybody listens or not.

            assert w.published(OrderCreated) == [OrderCreated(order_id="7")]

        Args:
            kind: a class of events, for those of its name and version as its instances; None for all events, with their
                names, fields, keys, and whether they were heard.

        """
        return self._published.all() if kind is None else self._published.of(kind)

    def waiting(self, target: Target = None) -> list[WaitingJob]:
        """The jobs that wait: first those that wait for a worker, then those that are delayed, the next one first.

        Args:
            target: of which jobs; as for `dead`.

        Raises:
            ConfigurationError: this world has no such service or job.
            UsageError: the function is not a job, or one of several services.

        """
        return self._jobs.waiting(target)


async def _kill_all(workers: Sequence[MortalWorker]) -> None:
    for worker in workers:
        await worker.kill()


def _half(longest: float) -> float:
    return longest / 2
