"""Runs handlers: in a task, in a thread of a pool, or for several calls together, until their deadline.

A run begins with `Executor.begin` and ends once, with one of three methods that each subclass of `Run` defines:

    begin -> the handler returns           -> Run.returned
          -> it raises                     -> Run.raised
          -> its task is cancelled, or its -> Run.interrupted, which says why
             deadline comes

What becomes of the message afterwards is not decided here: a call is answered and acknowledged (`rpcq.calls.replying`).
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import Future
from functools import partial
from typing import Any, Final

from rpcq import logs
from rpcq.errors import ServiceUnavailable
from rpcq.execution.batching import Batches, Member, OnBatch
from rpcq.invocation import Interruption, Invocation, Refused
from rpcq.runtime import deadline as deadlines
from rpcq.runtime.threads import CannotStart, Ended, Threads
from rpcq.runtime.timeouts import Bucket, Timeouts

log = logs.get_logger("rpcq.worker")

CANCEL_TIMEOUT: Final = 1.0
"""Seconds that handlers have to end once they are cancelled."""

Enter = Callable[[], Awaitable[Any]]
"""Runs the handler, and gives what it returns."""

Around = Callable[[Enter], Awaitable[Any]]
"""Runs inside the task, around the handler: it awaits `Enter`, or gives a result without it, or raises."""


class Run(ABC):
    """One run of a handler. Subclasses deal with its end.

    Attributes:
        invocation: what runs; None before it begins, and once it has ended.
        began: whether the handler was entered.
        cancelled: it is no longer wanted.
        timed_out: its deadline has come.
        started: when its task began, on time.perf_counter(); 0 before.
        handler_ms: milliseconds from then to its end.
        task: runs it; None before it begins.
        thread: the pool's future of a handler in a thread.
        result: the result of the thread, or of the batch, as a future of the event loop.
        member: its place in a batch, if its handler takes several calls together.
        ran_on: the run was interrupted, and its handler, in a thread or a batch, goes on or has just succeeded.
        timeout: its timer.

    """

    __slots__ = (
        "began",
        "cancelled",
        "handler_ms",
        "invocation",
        "member",
        "ran_on",
        "result",
        "started",
        "task",
        "thread",
        "timed_out",
        "timeout",
    )

    def __init__(self) -> None:
        self.invocation: Invocation | None = None
        self.began = False
        self.cancelled = False
        self.timed_out = False
        self.started = 0.0
        self.handler_ms = 0.0
        self.task: asyncio.Task[None] | None = None
        self.thread: Future[Ended] | None = None
        self.result: asyncio.Future[Ended] | None = None
        self.member: Member | None = None
        self.ran_on = False
        self.timeout: Bucket | asyncio.TimerHandle | None = None

    @property
    @abstractmethod
    def id(self) -> str:
        """Its name in logs."""

    @property
    def outlasts(self) -> bool:
        """Whether its handler still runs, although the run has ended: in a thread, or for other calls of a batch."""
        if self.member is not None:
            return self.member.goes_on
        return self.thread is not None and not self.thread.done()

    @abstractmethod
    def returned(self, invocation: Invocation, value: Any) -> None:
        """The handler, or the code around it, returned this value."""

    @abstractmethod
    def raised(self, invocation: Invocation, error: BaseException) -> None:
        """The handler, or the code around it, raised this."""

    @abstractmethod
    def interrupted(self, invocation: Invocation, why: Interruption) -> None:
        """The handler was interrupted. In a thread, it goes on, and in a batch as long as another call waits for it."""


class Executor:
    """Runs handlers.

    Args:
        threads: `def` handlers that may run at once.
        on_batch: called when the handler of a batch has ended.

    """

    def __init__(self, threads: int, on_batch: OnBatch = lambda *_: None) -> None:
        self._threads = Threads(threads)
        self._batches = Batches(self._threads, on_batch)
        self._loop: asyncio.AbstractEventLoop
        self._timeouts: Timeouts[Run]
        self._abandoned = False

    def open(self) -> None:
        """From now on, in this event loop."""
        self._loop = asyncio.get_running_loop()
        self._timeouts = Timeouts(self._loop, self._time_out)
        self._batches.open(self._loop)

    def hold(self, run: Run, invocation: Invocation, now: float) -> None:
        """Let a run wait until `begin`; `now` on `time.monotonic()`.

        It may end before that, by its deadline, `cancel` or `abandon`: then `Run.interrupted` is called, and its
        `invocation` is None.
        """
        run.invocation = invocation
        self._timeouts.set(run, invocation.deadline, now)

    def begin(self, run: Run, invocation: Invocation, now: float, around: Around | None = None) -> None:
        """Start the handler in a task of its own; `now` on `time.monotonic()`. A run that was held goes on."""
        if run.invocation is None:
            run.invocation = invocation
            self._timeouts.set(run, invocation.deadline, now)
        task = self._loop.create_task(self._run(run, invocation, around))
        if not run.started:  # else the loop starts tasks at once, and it may have ended
            run.task = task

    def shorten(self, run: Run, invocation: Invocation, now: float) -> None:
        """The deadline of a run that is held comes sooner; `now` on `time.monotonic()`."""
        self._timeouts.cancel(run)
        self._timeouts.set(run, invocation.deadline, now)

    def drop(self, run: Run) -> None:
        """End a run that is held; none of its methods is called."""
        self._ended(run)

    def cancel(self, run: Run) -> None:
        """The run is no longer wanted: cancel the handler."""
        run.cancelled = True
        self._interrupt(run)

    def hurry(self) -> None:
        """Let no call wait for others that would go with it: from now on, batches begin at once."""
        self._batches.hurry()

    def write_off(self, run: Run) -> None:
        """End a run now, although its handler goes on: none of the run's methods is called for it any more.

        The handler is cancelled once more. One in a thread goes on, and its thread is free when it ends.
        """
        self._ended(run)
        if run.thread is not None:
            run.thread.cancel()
        if run.task is not None:
            run.task.cancel()

    async def abandon(self, runs: Collection[Run]) -> None:
        """Cancel all these runs, and start nothing more. Threads cannot be ended, and go on.

        It takes at most `CANCEL_TIMEOUT` seconds: a handler that does not end until then counts as interrupted.
        """
        self._abandoned = True
        handlers = {run.task: run for run in runs if run.task is not None}
        self._timeouts.close()
        self._threads.abandon()
        for run in runs:
            self._timeouts.cancel(run)
            self._interrupt(run)
        if tasks := {*handlers, *self._batches.handlers}:
            _, stuck = await asyncio.wait(tasks, timeout=CANCEL_TIMEOUT)
            if stuck:
                log.error("handlers do not let themselves be cancelled", count=len(stuck))
            for task in stuck & handlers.keys():
                run = handlers[task]
                if run.invocation is not None:
                    self._interrupted(run, run.invocation)
        self._batches.release()

    def check_wanted(self, run: Run) -> None:
        """Check that the handler may still begin.

        What a run waits for before (an `authorize` function, a store) may swallow its cancellation, or outlast it. By
        then, its caller may have got the reply that it did not run.

        Raises:
            asyncio.CancelledError: the run has ended, or is to end.

        """
        if run.invocation is None or run.timed_out or run.cancelled or self._abandoned:
            raise asyncio.CancelledError

    async def _run(self, run: Run, invocation: Invocation, around: Around | None) -> None:
        run.started = time.perf_counter()
        if run.task is None:
            run.task = asyncio.current_task()
        deadlines.current.set(invocation.deadline)
        logs.current.set(invocation)
        try:
            if around is not None:
                value = await around(partial(self._enter, run, invocation))
            elif invocation.method.batch is not None:
                value = await self._run_in_batch(run, invocation)
            elif invocation.method.is_async:
                run.began = True
                value = await invocation.call()
            else:
                value = await self._run_in_thread(run, invocation)
        except (KeyboardInterrupt, SystemExit):
            raise  # asyncio ends the loop over these
        except BaseException as error:  # noqa: BLE001 - the handler's own, for the run to deal with
            if run.invocation is not None:  # else it has ended: the handler did not let itself be cancelled
                if isinstance(error, asyncio.CancelledError):
                    self._interrupted(run, invocation)
                else:
                    self._ended(run)
                    run.raised(invocation, error)
        else:
            if run.invocation is not None:
                self._ended(run)
                run.returned(invocation, value)

    async def _enter(self, run: Run, invocation: Invocation) -> Any:
        self.check_wanted(run)
        if invocation.method.batch is not None:
            return await self._run_in_batch(run, invocation)
        if invocation.method.is_async:
            run.began = True
            return await invocation.call()
        return await self._run_in_thread(run, invocation)

    async def _run_in_batch(self, run: Run, invocation: Invocation) -> Any:
        member = run.member = self._batches.join(run, invocation)
        run.result = member.ended
        try:
            await asyncio.shield(member.ended)
        except asyncio.CancelledError:
            member.leave()
            run.ran_on = member.goes_on or member.succeeded
            raise
        return member.result()

    async def _run_in_thread(self, run: Run, invocation: Invocation) -> Any:
        def call() -> Any:
            run.began = True
            return invocation.call()

        label = invocation.method.label
        try:
            run.thread = self._threads.start(call)
        except CannotStart as error:
            log.error("a handler cannot begin", **invocation.names(), cause=str(error))  # noqa: TRY400 - the cause says everything
            raise Refused(ServiceUnavailable(f"the worker could not begin: {error}")) from error
        run.result = asyncio.wrap_future(run.thread)
        try:
            ended = await asyncio.shield(run.result)
        except asyncio.CancelledError:
            run.ran_on = not run.thread.done() or (not run.thread.cancelled() and run.thread.result().error is None)
            raise
        return ended.unwrap(label)

    def _ended(self, run: Run) -> None:
        if run.started:
            run.handler_ms = (time.perf_counter() - run.started) * 1000
        self._timeouts.cancel(run)
        run.invocation = None

    def _time_out(self, run: Run) -> None:
        run.timed_out = True
        self._interrupt(run)

    def _interrupt(self, run: Run) -> None:
        task, invocation = run.task, run.invocation
        if invocation is None:
            return
        if task is None:  # it is held
            self._interrupted(run, invocation)
            return
        if task.done():
            return
        task.cancel()
        if not run.started:  # a task that is cancelled before its first step never reaches its except blocks
            self._interrupted(run, invocation)

    def _interrupted(self, run: Run, invocation: Invocation) -> None:
        """The handler was cancelled: find out why."""
        self._ended(run)
        if run.thread is not None and not run.thread.cancel():
            run.began = True  # else it still waited for a free thread, and never begins
        if run.cancelled:
            run.interrupted(invocation, Interruption.CANCELLED)
        elif run.timed_out:
            run.interrupted(invocation, Interruption.TIMED_OUT if run.began else Interruption.TIMED_OUT_UNBEGUN)
        elif not run.began:
            run.interrupted(invocation, Interruption.CUT_OFF_UNBEGUN)
        elif self._abandoned:
            run.interrupted(invocation, Interruption.CUT_OFF)
        else:
            run.raised(invocation, asyncio.CancelledError("the handler cancelled itself"))
