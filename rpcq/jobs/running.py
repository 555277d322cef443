"""Takes the jobs that are delivered to a worker, runs them, and settles their deliveries.

    delivery -> it is in hand here already                  -> the run takes it over
             -> its key is that of a job that is done       -> acknowledged
             -> it may not run (`outcomes.of_delivery`)     -> moved: delayed, to the suspects, or to the dead letters
             -> nobody here wants it                         -> acknowledged
             -> it has an order key                         -> at its turn (`ordering`), as below
             -> it may run, within its own limits (`limits`) -> Executor.begin
    run ended -> done                                       -> acknowledged
              -> again, or dead (`outcomes.of_error`)       -> moved
              -> its worker stopped                         -> given back to its queue
    moved = published elsewhere -> confirmed -> acknowledged

A job is acknowledged only when it is done, or when the broker has confirmed it elsewhere. So it is never lost; if the
worker dies between the two, it is there twice, under one ID and key.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from rpcq import logs
from rpcq.errors import GiveUp, InvalidParams, RetryLater
from rpcq.execution import Around, Executor
from rpcq.invocation import Interruption, Invocation
from rpcq.jobs.holding import Hand
from rpcq.jobs.invocation import JobInvocation, Served
from rpcq.jobs.keys import Keys, Remembered, key_of
from rpcq.jobs.limits import Limits
from rpcq.jobs.moving import Mover
from rpcq.jobs.observing import JobObservers, JobObserving
from rpcq.jobs.once import OnceRunner
from rpcq.jobs.ordering import Ordering
from rpcq.jobs.outcomes import (
    Again,
    Dead,
    Filtered,
    NotRun,
    Suspect,
    of_delivery,
    of_done,
    of_error,
    of_interruption,
    of_returns,
    of_stopping,
    of_twin,
    of_wait,
)
from rpcq.jobs.overdue import Overdue
from rpcq.jobs.run import JobRun
from rpcq.jobs.suspects import Suspects
from rpcq.jobs.telling import Teller
from rpcq.observer import OK
from rpcq.once import NotBegun
from rpcq.runtime.backlog import Backlog
from rpcq.runtime.backoff import full_jitter
from rpcq.runtime.threads import Ended
from rpcq.transport.base import Delivery, Transport
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.jobs import JobMessage, misplaced, read_job
from rpcq.wire.properties import MalformedProperties

log = logs.get_logger("rpcq.worker")


class JobRunner:
    """Runs the jobs of a worker's services.

    Args:
        transport: the worker's.
        executor: what runs handlers.
        topology: of the namespace.
        may_begin: whether a job may begin now: what becomes of it must be published. An attribute, too.
        ready: waits for that.
        teller: tells the senders that watch jobs.
        remember: bytes for the keys of jobs that are done.
        observers: of jobs, as `Observers.jobs` has them.

    Attributes:
        finished: jobs that are settled.
        retried: jobs that run again later.
        put_off: jobs that come back later because they did not run: by their limits or their keys, for example.
        suppressed: jobs that did not run because they were done, by their keys.
        filtered: events that no pattern of their subscription takes any more.
        dead: jobs that became dead letters here.
        spread: makes the longest pause before a retry into the pause, in seconds.
        ordering: the ordered lanes.

    """

    def __init__(
        self,
        transport: Transport,
        executor: Executor,
        topology: JobTopology,
        *,
        may_begin: Callable[[], bool],
        ready: Callable[[], Any],
        teller: Teller,
        remember: int = 0,
        observers: JobObservers = (),
    ) -> None:
        self._transport = transport
        self._executor = executor
        self._observing = JobObserving(observers, transport.now_ms) if observers else None
        self.may_begin = may_begin
        self._teller = teller
        self._in_hand = Hand()
        self._running: set[JobRun] = set()
        self._arriving: Backlog[tuple[Served, Delivery, bool]] = Backlog(may_begin, ready, self._take)
        self._mover = Mover(transport, topology, self._moved, self._reject)
        self._remembered = Remembered(remember) if remember else None
        self._busy: set[str] = set()  # keys of jobs that run
        self._keys = Keys()
        self._once = OnceRunner()
        self._limits = Limits(self._start, self._put_off, lambda: not self._suspects)
        self._suspects = Suspects(self._running, self._begin, self._limits.go_on)
        self.ordering = Ordering(transport, self, self._in_hand)
        waiting = (self._suspects, self._limits, self.ordering)
        self._overdue = Overdue(self._in_hand, self._running, waiting, self._write_off_overdue, self._put_off)
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._abandoned = False
        self._seldom = logs.Seldom(log)
        self.finished = 0
        self.retried = 0
        self.put_off = 0
        self.suppressed = 0
        self.filtered = 0
        self.dead = 0
        self.spread: Callable[[float], float] = full_jitter

    def __len__(self) -> int:
        return len(self._in_hand) + len(self._arriving)

    def __iter__(self) -> Iterator[JobRun]:
        return iter(self._in_hand)

    def serve(self, served: Served, *, is_suspects: bool = False) -> Callable[[Delivery], None]:
        """The callback for the deliveries of one of a service's queues."""
        return lambda delivery: self._on_delivery(served, delivery, is_suspects)

    def lost(self) -> None:
        """The consuming session is down: the broker delivers again what has not begun."""
        self._arriving.clear()
        self.ordering.lost()
        for run in self._take_waiting():
            self._forget(run)
        self._note_idle()

    async def stop(self) -> None:
        """Begin nothing more, give back what has not begun, and wait until the rest is settled."""
        self._stopping = True
        self.ordering.stop()
        for served, delivery, is_suspects in [*self._arriving.items]:
            self._take((served, delivery, is_suspects))
        self._arriving.clear()
        for run in self._take_waiting():
            self._turn_away(run)
        self._note_idle()
        await self.ordering.stopped()
        self._note_idle()
        await self._idle.wait()

    def name_of(self, task: asyncio.Task[Any]) -> dict[str, Any] | None:
        """What a task runs, as fields for a log; None if it is no job. May be called from another thread."""
        return next((run.names for run in self if run.task is task), None)

    def cut_off(self) -> list[JobRun]:
        """The runs that are left when the worker closes; for `Executor.abandon`."""
        runs = list(self)
        if runs:
            log.error("jobs cut off", count=len(runs), job_ids=[run.id for run in runs[:20]])
        return runs

    def vanish(self) -> None:
        """Go on as if the process was killed: begin and publish nothing more, and cancel what runs."""
        self._abandoned = True
        self._overdue.close()
        self.ordering.close()
        self._mover.stop()
        self._teller.stop()
        self._keys.vanish()
        self._take_waiting()
        for run in self:
            self._executor.cancel(run)

    async def close(self) -> None:
        """Publish nothing more. What is not settled, the broker delivers again."""
        self._abandoned = True
        self._overdue.close()
        self.ordering.close()
        await self._arriving.close()
        await self._mover.close()
        await self._teller.close()
        await self._keys.close()

    # Taking.

    def _on_delivery(self, served: Served, delivery: Delivery, is_suspects: bool) -> None:
        # A lane waits by itself: what it holds may go back to its queue meanwhile.
        if served.lane is None and (self._arriving.items or not (self.may_begin() or self._stopping)):
            self._arriving.add((served, delivery, is_suspects))
            self._idle.clear()
        else:
            self._take((served, delivery, is_suspects))

    def _take(self, arrived: tuple[Served, Delivery, bool]) -> None:
        served, delivery, is_suspects = arrived
        if delivery.body is None:
            self._bury_as_it_is(served, delivery, f"its body is {delivery.body_size} bytes, over the limit (max_body)")
            return
        try:
            job = read_job(delivery.properties, delivery.body, redelivered=delivery.redelivered)
        except MalformedProperties as error:
            self._bury_as_it_is(served, delivery, str(error))
            return
        if delivery.redelivered and self._adopt(served, job, delivery, is_suspects):
            return
        lane = served.lane
        job.problem = job.problem or misplaced(job, served.service.name, None if lane is None else lane.name)
        run = JobRun(self, served, delivery, job, served.find(job), is_suspect=is_suspects)
        self._in_hand.add(run)
        if job.reply_to and not served.subscription:
            self._teller.watched(run)
        self._idle.clear()
        if lane is not None:
            lane.take(run)
            self._overdue.look_later()
        elif self._stopping:
            self._turn_away(run)
        else:
            self.consider(run)

    def consider(self, run: JobRun) -> None:
        """Begin a job, or settle it without a run."""
        job, served, method, lane = run.job, run.served, run.method, run.lane
        if self._remembered is not None and served.service.result_store is None:
            run.key = key_of(served.service.name, job, served.subscription)
            same = self._remembered.get(run.key, job.body)
            if same is not None:
                self._not_run(run, of_done(job, same=same))
                return
        fate = of_delivery(
            job,
            is_suspects=run.is_suspect,
            known=None if method is None else method.job,
            unknown=served.unknown,
            now_ms=self._transport.now_ms(),
            is_first=lane is None or lane.is_first(run),
        )
        if run.is_suspect if fate is None else (lane is not None and isinstance(fate, Suspect)):
            self._suspects.add(run)
        elif fate is not None:
            self._turn_down(run, fate)
        elif self._suspects:
            self._suspects.hold(run)
            self._overdue.look_later()
        else:
            self._begin(run)

    def _adopt(self, served: Served, job: JobMessage, delivery: Delivery, is_suspects: bool) -> bool:
        """Let a job that is still in hand take over its redelivery; returns whether there is one."""
        run = self._in_hand.adopt(served, job, delivery)
        if run is None:
            return False
        # From RabbitMQ 4.3 on, a job that its worker held for too long comes back without a bound.
        dead = of_returns(job, is_suspects=is_suspects)
        if dead is not None and run in self._running:
            self._write_off(run, dead)
        return True

    def _bury_as_it_is(self, served: Served, delivery: Delivery, why: str) -> None:
        """Let the broker make a dead letter of what cannot be read here: nothing of it is lost so."""
        self.dead += 1
        self._seldom.warning("a job that cannot be read is dead", service=served.service.name, cause=why)
        if self._observing is not None:
            self._observing.unreadable(served, delivery.body_size)
        delivery.reject()

    def _begin(self, run: JobRun) -> None:
        if run.options.is_limited:
            self._limits.enter(run)
            self._overdue.look_later()
        else:
            self._start(run)

    def _start(self, run: JobRun) -> None:
        served, method = run.served, run.method
        assert method is not None  # noqa: S101 - without one, it is moved on arrival
        fate: Again | Dead | Filtered
        try:
            arguments = served.read(run.job)
        except InvalidParams as error:
            fate = served.refused(run.job, error)
        else:
            if run.key not in self._busy:
                run.since = now = time.monotonic()
                report = None if run.watcher is None else self._teller.begins(run, run.watcher)
                deadline = now + run.options.timeout
                invocation = JobInvocation(run.job, method, arguments, deadline, served, report)
                self._running.add(run)
                if run.key is not None:
                    self._busy.add(run.key)
                self._overdue.look_later()
                store = served.service.result_store
                around: Around | None = None
                if run.options.once is not None:
                    around = self._once.around(invocation, run.options.once)
                elif store is not None:
                    around = partial(self._keys.run, run, invocation, store)
                if self._observing is not None:
                    around = self._observing.wrap(run, around)
                self._executor.begin(run, invocation, now, around)
                return
            fate = of_twin()
        self._limits.leave(run, 0.0)
        self._turn_down(run, fate)

    def _take_waiting(self) -> list[JobRun]:
        """Take out the jobs that wait to begin."""
        return [*self._suspects.take_waiting(), *self._limits.take_waiting()]

    # Ends of a run.

    def returned(self, run: JobRun, value: Any) -> None:
        """The handler returned: the job is done. The result is on its way before the job is acknowledged."""
        if run.key is not None and self._remembered is not None:
            self._remembered.put(run.key, run.job.body)
        if self._observing is not None:
            self._observing.end(run, "done", OK)
        if run.watcher is not None:
            self._teller.done(run, run.watcher, value)
        self._acknowledge(run)
        self._ended(run)

    def raised(self, run: JobRun, invocation: Invocation, error: BaseException) -> None:
        """The handler raised, or did not run."""
        if isinstance(error, NotBegun):
            error = self._once.not_run(run, error)
        if isinstance(error, NotRun):
            self._not_run(run, error.fate)
            self._ended(run)
            return
        fate = of_error(run.job, run.options, error, self.spread)
        if isinstance(error, RetryLater | GiveUp):  # its handler says what is to become of it
            self._settle(run, fate, error)
            self._ended(run)
            return
        incident = secrets.token_hex(6)
        write = log.error if isinstance(fate, Dead) else log.warning
        write(
            "job failed",
            **invocation.names(),
            incident=incident,
            duration_ms=round(run.handler_ms, 3),
            exc_info=error,
        )
        self._settle(run, fate, error, incident)
        self._ended(run)

    def interrupted(self, run: JobRun, invocation: Invocation, why: Interruption) -> None:
        """The handler was interrupted, or never entered.

        A thread cannot be interrupted: the fate of its job waits until it ends, so that no two attempts run at once.
        """
        if (run.outlasts or run.ran_on) and not self._abandoned:  # it goes on, or has just succeeded
            assert run.result is not None  # noqa: S101 - made with the thread
            log.warning("job goes on beyond its timeout, in a thread", **invocation.names())
            run.result.add_done_callback(lambda result: self._outlasted(run, invocation, why, result))
        else:
            self._interrupted(run, invocation, why)

    def _outlasted(self, run: JobRun, invocation: Invocation, why: Interruption, result: asyncio.Future[Ended]) -> None:
        if self._abandoned or run not in self._running:
            if self._observing is not None:
                self._observing.given_back(run)
            return  # the broker delivers it again; or it was written off
        is_done = not result.cancelled() and result.result().error is None
        if run.claimed is not None:
            (self._keys.put if is_done else self._keys.release)(run.claimed)
        if is_done:
            self.returned(run, result.result().value)
        else:
            self._interrupted(run, invocation, why)

    def _interrupted(self, run: JobRun, invocation: Invocation, why: Interruption) -> None:
        fate = of_interruption(run.job, run.options, why, run.handler_ms / 1000, self.spread)
        if fate is None:
            self._give_back(run)
        else:
            log.warning("job interrupted", **invocation.names(), why=why.name.lower(), cause=fate.error)
            self._settle(run, fate)
        self._ended(run)

    def _ended(self, run: JobRun) -> None:
        """Its handler has ended: others may begin."""
        self._running.discard(run)
        if run.key is not None:
            self._busy.discard(run.key)
        if run.limit is not None:
            self._limits.leave(run, time.monotonic() - run.since)
        self._suspects.ended(run)
        self._suspects.go_on()
        self._note_idle()

    def _write_off_overdue(self, run: JobRun, seconds: float) -> None:
        fate = of_interruption(run.job, run.options, Interruption.TIMED_OUT, seconds, self.spread)
        assert fate is not None  # noqa: S101 - a timeout has one
        self._write_off(run, fate)

    def _write_off(self, run: JobRun, fate: Again | Dead) -> None:
        """Settle a job although its handler goes on."""
        self._executor.write_off(run)
        self._settle(run, fate)
        self._ended(run)

    # Settling.

    def _not_run(self, run: JobRun, fate: Again | Dead | None) -> None:
        """Settle a job whose handler does not run, by its key."""
        if fate is None:
            self.suppressed += 1
            log.info("job is done already, by its key", **run.names, key=run.job.key)
            if self._observing is not None:
                self._observing.end(run, "suppressed", "done_already")
            if run.watcher is not None:
                self._teller.suppressed(run, run.watcher)
            self._acknowledge(run)
        else:
            self._settle(run, fate)

    def _turn_down(self, run: JobRun, fate: Again | Dead | Suspect | Filtered) -> None:
        """Settle a job that does not run now."""
        if isinstance(fate, Filtered):
            self.filtered += 1
            self._seldom.warning("an event that nobody here wants is dropped", **run.names, cause=fate.error)
            if self._observing is not None:
                self._observing.filtered(run)
            self._acknowledge(run)
        else:
            self._settle(run, fate)

    def _put_off(self, run: JobRun, seconds: float) -> None:
        """Have the broker, or its ordered lane, hold a job whose turn is not near."""
        self._settle(run, of_wait(seconds))

    def _settle(
        self, run: JobRun, fate: Again | Dead | Suspect, error: BaseException | None = None, incident: str = ""
    ) -> None:
        if run.lane is not None and isinstance(fate, Again):
            fate = run.lane.fate(run, fate)
        if self._observing is not None:
            if self._abandoned:
                self._observing.given_back(run)
            else:
                self._observing.settled(run, fate, error, incident)
        if self._abandoned:
            return  # the broker delivers it again
        match fate:
            case Again():
                self.retried += fate.is_retry
                self.put_off += not fate.is_retry
            case Dead():
                self.dead += 1
        if run.watcher is not None:
            self._teller.decided(run, run.watcher, fate, incident)
        self._mover.move(run, fate, incident)

    def _moved(self, run: JobRun) -> None:
        """The broker has the job in its new queue."""
        if run.watcher is not None:
            self._teller.moved(run, run.watcher)
        self._acknowledge(run)

    def waits_here(self, run: JobRun, again: JobRun) -> None:
        """A job of an ordered lane waits here until it runs again, as another run."""
        if run.watcher is not None:
            self._teller.moved(run, run.watcher)
            self._teller.watched(again)

    def _reject(self, run: JobRun) -> None:
        log.error("a job is larger than the broker takes: the broker itself makes it a dead letter", **run.names)
        self._release(run)
        run.delivery.reject()

    def _turn_away(self, run: JobRun) -> None:
        """Let another worker have a job that has not begun here.

        One that runs at most once would count as run if it came back, so it is published again.
        """
        if run.method is not None and run.options.at_most_once and not run.job.returns:
            self._settle(run, of_stopping())
        else:
            self._give_back(run)

    def _give_back(self, run: JobRun) -> None:
        if self._observing is not None:
            self._observing.given_back(run)
        if run.watcher is not None:
            self._teller.forget(run, run.watcher)
        self._forget(run)
        if run.lane is None:
            run.delivery.reject(requeue=True)

    def _acknowledge(self, run: JobRun) -> None:
        self.finished += 1
        self._release(run)
        run.delivery.ack()

    def _release(self, run: JobRun) -> None:
        self._in_hand.forget(run)
        if run.lane is not None:
            run.lane.settled(run)
        self._note_idle()

    def _forget(self, run: JobRun) -> None:
        """Let a job go that is not settled."""
        self._in_hand.forget(run)
        if run.lane is not None:
            run.lane.put_back(run)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._in_hand and not self._running and not self._arriving.items:
            self._idle.set()
