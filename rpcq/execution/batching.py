"""Gathers calls into batches, and runs the handler of each batch once.

Each call has its own run, with its own deadline and outcome. Here, a call is a member of a batch:

    join -> it waits in the line of its method -> its batch begins -> entered: the handler gets its arguments
                                                                   -> the handler ends: `ended` has the call's part
    leave: before it is entered, the handler never gets it; after that, nobody waits for its part

A handler whose members have all left is cancelled; one in a thread goes on.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from rpcq import logs
from rpcq.errors import InvalidReply, ServiceUnavailable
from rpcq.invocation import Invocation, Refused, Unfit, call_together
from rpcq.runtime import deadline as deadlines
from rpcq.runtime.threads import CannotStart, Ended, Threads
from rpcq.service import Offered

if TYPE_CHECKING:
    from rpcq.execution.running import Run

NAMED: Final = 20
"""Calls of a batch whose correlation IDs are in the logs that its handler writes."""

OnBatch = Callable[[Offered, int, float], None]
"""Called when the handler of a batch has ended, with its method, its calls and its seconds."""

log = logs.get_logger("rpcq.worker")


class Member:
    """A call that waits for a batch, or is in one.

    Attributes:
        invocation: the call.
        joined: when it began to wait, on the event loop's clock.
        entered: whether the handler got it.
        ended: its part of what the handler returned or raised.

    """

    __slots__ = ("_batch", "_left", "_line", "_run", "_traceback", "ended", "entered", "invocation", "joined")

    def __init__(self, line: _Line, run: Run, invocation: Invocation, loop: asyncio.AbstractEventLoop) -> None:
        self._line = line
        self._run = run
        self._batch: _Batch | None = None
        self._left = False
        self._traceback: TracebackType | None = None
        self.invocation = invocation
        self.joined = loop.time()
        self.entered = False
        self.ended: asyncio.Future[Ended] = loop.create_future()

    @property
    def goes_on(self) -> bool:
        """Whether the handler that got it has not ended."""
        return self.entered and not self.ended.done()

    @property
    def succeeded(self) -> bool:
        """Whether the handler that got it has returned a result for it."""
        return self.entered and self.ended.done() and not self.ended.cancelled() and self.ended.result().error is None

    def enter(self) -> bool:
        """The handler gets it now, perhaps in a thread. Returns False if it has left."""
        if self._left:
            return False
        self.entered = self._run.began = True
        return True

    def end(self, ended: Ended) -> None:
        """The handler has ended, with this for the call."""
        if not self.ended.done():
            self._traceback = None if ended.error is None else ended.error.__traceback__
            self.ended.set_result(ended)

    def result(self) -> Any:
        """What the handler returned for the call.

        Raises:
            BaseException: what it raised. Several calls may raise one exception: each begins with the same traceback.

        """
        ended = self.ended.result()
        if ended.error is not None:
            ended.error.__traceback__ = self._traceback
        return ended.unwrap(self.invocation.method.label)

    def leave(self) -> None:
        """Nobody waits for it any more."""
        if self._batch is None:
            self._line.leave(self)
        elif not self._left:
            self._batch.leave(self)

    def put(self, batch: _Batch) -> None:
        """It waits no longer: it is in this batch."""
        self._batch = batch

    def withdraw(self) -> None:
        """It leaves its batch."""
        self._left = True


class _Batch:
    """Calls that the handler gets together."""

    def __init__(self, method: Offered, members: Sequence[Member]) -> None:
        self._method = method
        self.is_async = method.is_async
        self._members = members
        self._wanted = len(members)
        self._lock = threading.Lock()  # a thread enters the handler while the event loop withdraws calls
        self._thread: Future[Ended] | None = None
        self.task: asyncio.Task[Any] | None = None
        self.entered: list[Member] = []
        self.began = 0.0
        for member in members:
            member.put(self)

    def names(self) -> dict[str, Any]:
        """The fields that identify the batch in logs; see `logs.Named`."""
        ids = [member.invocation.names().get("correlation_id") for member in self.entered[:NAMED]]
        return {"method": self._method.label, "calls": len(self.entered), "correlation_ids": ids}

    async def run(self, threads: Threads) -> Any:
        """Run the handler."""
        logs.current.set(self)
        if self.is_async:
            handler = self._enter()
            return [] if handler is None else await handler
        # Not known before a thread is free: calls may leave until then. Nothing is lost with a later deadline, because
        # each call has a timer of its own.
        deadlines.current.set(max(member.invocation.deadline for member in self._members))
        try:
            self._thread = threads.start(self._enter)
        except CannotStart as error:
            log.error("a handler cannot begin", **self.names(), cause=str(error))  # noqa: TRY400 - the cause says everything
            raise Refused(ServiceUnavailable(f"the worker could not begin: {error}")) from error
        return (await asyncio.wrap_future(self._thread)).unwrap(self._method.label)

    def _enter(self) -> Any:
        """Call the handler with the calls that have not left; None if there are none."""
        with self._lock:
            self.entered = [member for member in self._members if member.enter()]
        if not self.entered:
            return None
        self.began = time.perf_counter()
        if self.is_async:
            deadlines.current.set(max(member.invocation.deadline for member in self.entered))
        return call_together([member.invocation for member in self.entered])

    def leave(self, member: Member) -> None:
        """Nobody waits for a call any more; if that was the last one, cancel the handler."""
        with self._lock:
            member.withdraw()
        self._wanted -= 1
        if self._wanted:
            return
        if self._thread is not None:
            self._thread.cancel()
        elif self.task is not None and self.is_async:
            self.task.cancel()

    def ended(self, task: asyncio.Task[Any]) -> None:
        """The handler has ended: give each call its part."""
        if task.cancelled():
            error: BaseException | None = asyncio.CancelledError()
        else:
            error = task.exception()
        if error is None:
            parts = _parts(self._method.label, task.result(), len(self.entered))
        else:
            parts = [Ended(None, error)] * len(self.entered)
        for member, part in zip(self.entered, parts, strict=True):
            member.end(part)
        for member in self._members:
            if not member.entered and error is not None:
                member.end(Ended(None, error))  # no thread could be started


class _Line:
    """The calls of one method that wait, in order, and how many of its batches run."""

    def __init__(self, batches: Batches, method: Offered) -> None:
        assert method.batch is not None  # noqa: S101 - only such methods have a line
        self._batches = batches
        self._method = method
        self._options = method.batch
        self._waiting: dict[Member, None] = {}
        self._running = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_due = False  # the first call has waited long enough

    def join(self, member: Member) -> None:
        """A call waits from now on."""
        self._waiting[member] = None
        if len(self._waiting) == 1:
            self._set_timer(self._options.max_wait)
        self.go_on()

    def leave(self, member: Member) -> None:
        """A call does not wait any more."""
        self._waiting.pop(member, None)
        if not self._waiting:
            self._clear_timer()

    def go_on(self) -> None:
        """Begin the batches that may begin now."""
        options = self._options
        while self._waiting and self._running < options.max_concurrency:
            if not (self._is_due or self._batches.is_hurried or len(self._waiting) >= options.max_size):
                return
            members = list(self._waiting)[: options.max_size]
            for member in members:
                del self._waiting[member]
            self._begin(members)
            self._clear_timer()
            if self._waiting:
                first = next(iter(self._waiting))
                self._set_timer(first.joined + options.max_wait - self._batches.loop.time())

    def _begin(self, members: Sequence[Member]) -> None:
        self._running += 1
        batch = _Batch(self._method, members)
        batch.task = self._batches.start(batch, f"{self._method.label}, a batch of {len(members)}")
        batch.task.add_done_callback(lambda task: self._ended(batch, task))

    def _ended(self, batch: _Batch, task: asyncio.Task[Any]) -> None:
        self._running -= 1
        batch.ended(task)
        if batch.entered:
            self._batches.on_batch(self._method, len(batch.entered), time.perf_counter() - batch.began)
        self.go_on()

    def _set_timer(self, seconds: float) -> None:
        if seconds > 0:
            self._timer = self._batches.loop.call_later(seconds, self._come_due)
        elif self._options.max_wait > 0:
            self._is_due = True
        else:  # together with the calls that begin in the same iteration
            self._timer = self._batches.loop.call_later(0, self._come_due)

    def _clear_timer(self) -> None:
        self._is_due = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _come_due(self) -> None:
        self._timer = None
        self._is_due = True
        self.go_on()


class Batches:
    """The batches of an executor.

    Args:
        threads: what runs `def` handlers.
        on_batch: called when the handler of a batch has ended.

    Attributes:
        loop: the event loop, once opened.
        is_hurried: whether calls no longer wait for others.
        handlers: the tasks of `async def` handlers.
        on_batch: as above.

    """

    def __init__(self, threads: Threads, on_batch: OnBatch) -> None:
        self._threads = threads
        self._lines: dict[Offered, _Line] = {}
        self._context: contextvars.Context
        self.loop: asyncio.AbstractEventLoop
        self.is_hurried = False
        self.handlers: set[asyncio.Task[Any]] = set()
        self._in_threads: set[asyncio.Task[Any]] = set()
        self.on_batch = on_batch

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on, in this event loop. Handlers run in the context of now: they belong to no single call."""
        self.loop = loop
        self._context = contextvars.copy_context()

    def join(self, run: Run, invocation: Invocation) -> Member:
        """A call waits for a batch from now on."""
        line = self._lines.get(invocation.method)
        if line is None:
            line = self._lines[invocation.method] = _Line(self, invocation.method)
        member = Member(line, run, invocation, self.loop)
        line.join(member)
        return member

    def hurry(self) -> None:
        """From now on, calls do not wait for others: no more may come."""
        self.is_hurried = True
        for line in self._lines.values():
            line.go_on()

    def release(self) -> None:
        """Wait no longer for handlers in threads: they go on, and may outlast the event loop."""
        for task in self._in_threads:
            task.cancel()

    def start(self, batch: _Batch, name: str) -> asyncio.Task[Any]:
        """Run the handler of a batch in a task of its own."""
        task = self.loop.create_task(batch.run(self._threads), name=name, context=self._context.copy())
        tasks = self.handlers if batch.is_async else self._in_threads
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task


def _parts(label: str, value: Any, count: int) -> list[Ended]:
    """What a handler returned, call by call: an exception in the list is the error of its call."""
    if isinstance(value, list | tuple) and len(value) == count:
        return [Ended(None, it) if isinstance(it, BaseException) else Ended(it, None) for it in value]
    got = f"a {type(value).__name__}" if not isinstance(value, list | tuple) else f"{len(value)}"
    error = Unfit(InvalidReply(f"{label} must return a list of {count} results, one for each call; got {got}"))
    return [Ended(None, error)] * count
