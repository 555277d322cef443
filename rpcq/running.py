"""What a worker has in hand: handlers that run, and replies on their way, each until it is acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Final

from rpcq import deadline as deadlines
from rpcq import logs, observer, wire
from rpcq.admission import Job, MayHaveRun, Refused, never_no
from rpcq.authorization import authorize
from rpcq.errors import (
    CallError,
    CallTimeout,
    InvalidReply,
    OutcomeUnknown,
    RemoteError,
    ServiceUnavailable,
    in_short,
    to_wire,
)
from rpcq.idempotency import Answer, AnswerStore
from rpcq.observer import CANCELLED, OK, Endings, SeenRequest
from rpcq.replaying import Replays
from rpcq.threads import CannotStart, Ended, Threads
from rpcq.timeouts import Bucket, Timeouts
from rpcq.transport.base import Delivery, Outgoing, Settled, Transport
from rpcq.transport.topology import DIRECT_REPLY_TO

log = logs.get_logger("rpcq.worker")

CANCEL_TIMEOUT: Final = 1.0
"""Seconds that handlers have to end once they are cancelled."""

CUT_OFF_TIMEOUT: Final = 2.0
"""Seconds that the broker has to confirm what the callers of handlers that were cut off are told."""

_CONFIRMED: Final = Settled.CONFIRMED  # as in `rpcq.transport.settling`

Key = tuple[bytes, bytes]
"""reply_to and correlation ID: what names a call among all clients."""


class Running(Outgoing):
    """A request in hand; once its handler has ended, the reply to it.

    Attributes:
        delivery: what is acknowledged in the end.
        key: reply_to and correlation ID; an empty reply_to where no reply is wanted.
        may_have_run: why the call may have run before; None if it certainly has not.
        kind: of the reply: `wire.RESULT` or `wire.ERROR`; there with its body.
        said: what an error reply's body says; there with it.
        job: what runs; None where it was refused, and once it has ended.
        began: whether the handler was entered.
        keeps_key: its call ended by itself, and the handler, in a thread, goes on or has just succeeded.
        seen: what observers are told of it; None where there are none.
        endings: who of them wants to be told of its end; None until they were told that it begins.

    """

    kind: bytes
    said: dict[str, Any]
    __slots__ = (
        "began",
        "cancelled",
        "delivery",
        "endings",
        "handler_ms",
        "job",
        "keeps_key",
        "key",
        "kind",
        "may_have_run",
        "queue_ms",
        "result",
        "runs",
        "said",
        "seen",
        "started",
        "task",
        "thread",
        "timed_out",
        "timeout",
    )

    def __init__(self, runs: Runs, delivery: Delivery, key: Key, may_have_run: MayHaveRun | None = None) -> None:
        self.exchange = runs.reply_exchange
        self.routing_key, self.correlation_id = key
        # RabbitMQ may return what goes by direct reply-to even when it delivers it.
        self.mandatory = not self.routing_key.startswith(DIRECT_REPLY_TO)
        self.runs = runs
        self.delivery = delivery
        self.key = key
        self.may_have_run = may_have_run
        self.job: Job | None = None
        self.queue_ms: float | None = None
        self.started = 0.0  # on time.perf_counter(); 0 until its task has run
        self.handler_ms = 0.0
        self.task: asyncio.Task[None] | None = None
        self.timeout: Bucket | asyncio.TimerHandle | None = None
        self.thread: Future[Ended] | None = None
        self.result: asyncio.Future[Ended] | None = None
        self.began = False
        self.keeps_key = False
        self.timed_out = False
        self.cancelled = False
        self.seen: SeenRequest | None = None
        self.endings: Endings[SeenRequest] | None = None

    @property
    def outlasts(self) -> bool:
        """Whether its handler still runs though its call has ended: in a thread, which cannot be ended."""
        return self.thread is not None and not self.thread.done()

    @property
    def id(self) -> str:
        """The correlation ID, for logs."""
        return self.correlation_id.decode("utf-8", "replace")

    def on_settled(self, settled: Settled) -> None:
        """What became of the reply."""
        self.runs.replied(self, settled)


class Runs:
    """Runs handlers, replies, and acknowledges once the broker has the reply.

    Args:
        transport: where replies go.
        reply_exchange: the exchange that they go through; None for the default one.
        max_body: bytes of a reply.
        threads: `def` handlers that may run at once.
        answers: where results of calls with an idempotency key are remembered, unless their service says otherwise.
        observers: of requests, as `Observers.requests` has them.

    Attributes:
        finished: requests that were in hand, and are no more.
        refused_redeliveries: requests answered and not run, because they may have run before.
        unroutable_replies: replies whose caller was gone.

    """

    def __init__(
        self,
        transport: Transport,
        *,
        reply_exchange: str | None,
        max_body: int,
        threads: int,
        answers: AnswerStore,
        observers: Sequence[Callable[[SeenRequest], Callable[[SeenRequest], None] | None]],
    ) -> None:
        self._transport = transport
        self._observers = observers
        self._replays = Replays(answers, max_body)
        self.reply_exchange = (reply_exchange or "").encode()
        self._loop: asyncio.AbstractEventLoop
        self._timeouts: Timeouts[Running]
        self._max_body = max_body
        self._threads = Threads(threads)
        self._encoder = wire.ReplyEncoder()
        self._by_key: dict[Key, Running] = {}
        self._others: set[Running] = set()  # no reply is wanted, or the caller used a correlation ID twice
        self._unsent: deque[Running] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._abandoned = False
        self._seldom = logs.Seldom(log)
        self.finished = 0
        self.refused_redeliveries = 0
        self.unroutable_replies = 0

    def __len__(self) -> int:
        return len(self._by_key) + len(self._others)

    @property
    def replayed(self) -> int:
        """Requests that were answered with a remembered result."""
        return self._replays.replayed

    # From outside.

    def open(self) -> None:
        """From now on, in this event loop."""
        self._loop = asyncio.get_running_loop()
        self._timeouts = Timeouts(self._loop, self._time_out)

    def begin(self, run: Running, job: Job, now: float) -> None:
        """Start the handler; `now` on `time.monotonic()`."""
        run.job = job
        run.queue_ms = job.queue_ms
        self._hold(run)
        self._timeouts.set(run, job.deadline, now)
        task = self._loop.create_task(self._run(run, job))
        if not run.started:  # else the loop starts tasks at once, and it may have ended
            run.task = task

    def refuse(self, run: Running, error: CallError) -> None:
        """Answer with an error, and run nothing."""
        self._hold(run)
        self._refused(run, error)

    def adopt(self, key: Key, delivery: Delivery) -> bool:
        """Take a redelivery as that of a call that is still in hand; False if there is none.

        The session that the call came by is gone. One that came by the same session as the redelivery is another call
        of the same reply_to and correlation ID.
        """
        if not key[0]:
            return False
        for run in (self._by_key.get(key), *self._others):
            if run is not None and run.key == key and run.delivery.source is not delivery.source:
                run.delivery = delivery
                return True
        return False

    def holds(self, key: Key) -> bool:
        """Whether a call that wants a reply is in hand under this key."""
        return bool(key[0]) and key in self._by_key

    def cancel(self, key: Key) -> bool:
        """The caller is gone: cancel the handler; False if the call is not in hand."""
        run = self._by_key.get(key)
        if run is None:
            return False
        run.cancelled = True
        self._interrupt(run)
        return True

    def name_of(self, task: asyncio.Task[Any]) -> dict[str, Any]:
        """What a task runs, as fields for a log; may be called from another thread."""
        for run in (*self._by_key.values(), *self._others):  # a copy: they change meanwhile
            if run.task is task:
                job = run.job  # gone once the handler has ended
                return {"method": job.method.label if job else None, "correlation_id": run.id}
        return {"task": task.get_name()}  # that a handler made, or rpcq

    async def all_done(self) -> None:
        """Wait until nothing is in hand."""
        await self._idle.wait()

    async def abandon(self) -> None:
        """Cancel what still runs, and tell its callers, as long as there is a way to the broker.

        What they could not be told is left to the broker unacknowledged. Threads cannot be ended, and are left.
        """
        self._abandoned = True
        runs = [*self._by_key.values(), *self._others]
        if runs:
            log.error("calls cut off", count=len(runs), correlation_ids=[run.id for run in runs[:20]])
        handlers = {run.task: run for run in runs if run.task is not None}
        self._timeouts.close()
        self._threads.abandon()
        for run in runs:
            self._timeouts.cancel(run)
            self._interrupt(run)
        if handlers:
            _, stuck = await asyncio.wait(handlers, timeout=CANCEL_TIMEOUT)
            if stuck:
                log.error("handlers do not let themselves be cancelled", count=len(stuck))
            for task in stuck:
                run = handlers[task]
                if run.job is not None:
                    self._interrupted(run, run.job)
        if self._transport.can_publish:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CUT_OFF_TIMEOUT):
                    await self.all_done()
        for run in runs:
            if run.result is not None:
                run.result.cancel()  # its thread may end after the loop
        if self._pump is not None:
            self._pump.cancel()
        await self._replays.close()

    # Running.

    async def _run(self, run: Running, job: Job) -> None:
        run.started = time.perf_counter()
        if run.task is None:
            run.task = asyncio.current_task()
        deadlines.current.set(job.deadline)
        logs.current.set(job)
        if run.seen is not None:
            run.seen.ran = True
            run.endings = self._tell_begin(run, run.seen)
        try:
            if job.authorize is not None:
                await authorize(job, job.authorize, self._seldom)
                self._check_wanted(run)
            if job.once is not None:
                value = await self._replays.run(run, job, job.once, partial(self._enter, run, job))
            elif job.method.is_async:
                run.began = True
                value = await job.call()
            else:
                value = await self._run_in_thread(run, job)
        except (KeyboardInterrupt, SystemExit):
            raise  # asyncio ends the loop over these
        except BaseException as error:  # noqa: BLE001 - the handler's own; logged and answered
            if run.job is not None:  # else its caller has been answered: it did not let itself be cancelled
                self._raised(run, job, error)
        else:
            if run.job is not None:
                self._finished(run)
                self._reply_value(run, job, value)

    def _raised(self, run: Running, job: Job, error: BaseException) -> None:
        """The handler raised, or was not entered."""
        if isinstance(error, asyncio.CancelledError):
            self._interrupted(run, job)
            return
        self._finished(run)
        if isinstance(error, Refused):
            self._refused(run, error.error)
        elif isinstance(error, job.method.errors):
            self._reply_error(run, error, raised=True)
        elif isinstance(error, CallTimeout) and error.deadline == job.deadline:
            message = f"{job.method.label} ran into the deadline in a call of its own: {error.message}"
            self._reply_error(run, CallTimeout(message, executed="yes"))
        else:
            self._failed(run, job, error)

    def _check_wanted(self, run: Running) -> None:
        """That the handler is to be entered still.

        What the user has a request wait for (`authorize`, a store) may swallow its cancellation, or outlast it: its
        caller has been told that it did not run, or the time of its call is over.

        Raises:
            asyncio.CancelledError: it is not.

        """
        if run.job is None or run.timed_out or run.cancelled or self._abandoned:
            raise asyncio.CancelledError

    async def _enter(self, run: Running, job: Job) -> Any:
        self._check_wanted(run)
        if job.method.is_async:
            run.began = True
            return await job.call()
        return await self._run_in_thread(run, job)

    async def _run_in_thread(self, run: Running, job: Job) -> Any:
        def call() -> Any:
            run.began = True
            return job.call()

        try:
            run.thread = self._threads.start(call)
        except CannotStart as error:
            log.error("a handler cannot begin", method=job.method.label, correlation_id=run.id, cause=str(error))  # noqa: TRY400 - its cause is all there is to it
            raise Refused(ServiceUnavailable(f"the worker could not begin: {error}")) from error
        run.result = asyncio.wrap_future(run.thread)
        try:
            ended = await asyncio.shield(run.result)
        except asyncio.CancelledError:
            run.keeps_key = not run.thread.done() or (not run.thread.cancelled() and run.thread.result().error is None)
            raise
        return ended.unwrap(job.method.label)

    def _finished(self, run: Running) -> None:
        if run.started:
            run.handler_ms = (time.perf_counter() - run.started) * 1000
        self._timeouts.cancel(run)
        run.job = None  # it is not needed while the reply is on its way

    def _time_out(self, run: Running) -> None:
        run.timed_out = True
        self._interrupt(run)

    def _interrupt(self, run: Running) -> None:
        task, job = run.task, run.job
        if task is None or job is None or task.done():
            return
        task.cancel()
        if not run.started:  # cancelled before its first step, a task never gets to say so
            self._interrupted(run, job)

    def _interrupted(self, run: Running, job: Job) -> None:
        """The handler was cancelled; by whom decides what is said."""
        self._finished(run)
        if run.thread is not None and not run.thread.cancel():
            run.began = True  # else it still waited for a free thread, and never begins
        if run.cancelled:
            if run.seen is not None:
                self._tell_end(run, run.seen, CANCELLED)
            self._settle(run)
        elif not run.began and not run.timed_out:
            self._reply_error(run, ServiceUnavailable(f"the worker of {job.method.label} stopped, and did not begin"))
        elif self._abandoned and not run.timed_out:
            message = f"it was stopped, and cut {job.method.label} off after {run.handler_ms / 1000:.3f} s"
            self._reply_error(run, OutcomeUnknown(message))
        elif not run.timed_out:
            self._failed(run, job, asyncio.CancelledError("the handler cancelled itself"))
        elif run.began:
            message = f"{job.method.label} ran into the deadline after {run.handler_ms / 1000:.3f} s"
            self._reply_error(run, CallTimeout(message, executed="yes"))
        else:
            message = f"{job.method.label} did not begin until the deadline: its worker, authorize or a store was busy"
            self._reply_error(run, CallTimeout(message, executed="no"))

    def _failed(self, run: Running, job: Job, error: BaseException) -> None:
        """An exception that the service does not declare: its text stays here."""
        incident = secrets.token_hex(6)
        log.error(
            "handler failed",
            method=job.method.label,
            correlation_id=run.id,
            attempt=job.request.attempt,
            incident=incident,
            duration_ms=round(run.handler_ms, 3),
            exc_info=error,
        )
        self._reply_error(run, RemoteError(f"{job.method.label} failed", incident=incident))

    # Replying.

    def _refused(self, run: Running, error: CallError) -> None:
        if run.may_have_run is not None or isinstance(error, MayHaveRun):
            self.refused_redeliveries += 1
        self._reply_error(run, error)

    def _reply_value(self, run: Running, job: Job, value: Any) -> None:
        try:
            body = value.body if type(value) is Answer else job.method.write_result(value, self._max_body)
        except InvalidReply as error:
            log.exception("result cannot be sent", method=job.method.label, correlation_id=run.id)
            self._reply_error(run, error)
        except Exception as error:  # noqa: BLE001 - of a serialiser of the handler's own type
            self._failed(run, job, error)
        else:
            if run.seen is not None:
                self._tell_end(run, run.seen, OK)
            self._reply(run, wire.RESULT, body)

    def _reply_error(self, run: Running, error: CallError, *, raised: bool = False) -> None:
        """Answer with an error; `raised` where the handler raised it, whatever it says of itself."""
        error = never_no(error, run.may_have_run) if not raised else error
        said = to_wire(error)
        if raised:
            said |= {"executed": "yes", "retryable": False}
        try:
            body = wire.dumps(said)
        except Exception:  # noqa: BLE001 - of a serialiser of the details' own type
            body = b""
        if not body or len(body) > self._max_body:
            log.error("an error's details cannot be sent", correlation_id=run.id, code=error.code)
            said = in_short(said)
            body = wire.dumps(said)
        run.said = said
        if run.seen is not None:
            self._tell_end(run, run.seen, error.code, error)
        self._reply(run, wire.ERROR, body)

    def _tell_begin(self, run: Running, seen: SeenRequest) -> Endings[SeenRequest]:
        seen.queue_seconds = None if run.queue_ms is None else run.queue_ms / 1000
        return observer.begin(self._observers, seen)

    def _tell_end(self, run: Running, seen: SeenRequest, code: str, error: CallError | None = None) -> None:
        endings = self._tell_begin(run, seen) if run.endings is None else run.endings  # it may never have begun
        seen.code, seen.error, seen.seconds = code, error, run.handler_ms / 1000
        run.seen = run.endings = None
        observer.end(endings, seen)

    def _reply(self, run: Running, kind: bytes, body: bytes) -> None:
        run.task = None
        if not run.routing_key:
            self._settle(run)
            return
        run.properties = self._encoder.encode(kind, run.correlation_id, run.queue_ms, run.handler_ms)
        run.body = body
        run.kind = kind
        self._transport.publish(run)

    def replied(self, run: Running, settled: Settled) -> None:
        """What became of a reply."""
        if settled is _CONFIRMED:
            self._settle(run)
        elif settled in (Settled.UNSENT, Settled.UNKNOWN):
            if not self._abandoned:
                self._unsent.append(run)  # published again once there is a way
                if self._pump is None or self._pump.done():
                    self._pump = self._loop.create_task(self._publish_unsent())
        elif settled is Settled.TOO_LARGE:
            self._reply_in_short(run)
        else:
            self.unroutable_replies += 1
            log.debug("the caller is gone", correlation_id=run.id, reply=settled.value)
            self._settle(run)

    def _reply_in_short(self, run: Running) -> None:
        """The broker takes no message of the reply's size: say so in one that it takes."""
        size = len(run.body)
        log.error("a reply is larger than the broker takes (its max_message_size)", correlation_id=run.id, bytes=size)
        if run.kind == wire.ERROR:
            run.said = in_short(run.said)
        else:
            run.said = to_wire(InvalidReply(f"the result is {size} bytes of JSON, more than the broker takes"))
        body = wire.dumps(run.said)
        if len(body) < size:
            self._reply(run, wire.ERROR, body)
        else:
            self._settle(run)  # there is no way to tell the caller

    async def _publish_unsent(self) -> None:
        while self._unsent:
            await self._transport.writable()
            while self._unsent and self._transport.can_publish:
                self._transport.publish(self._unsent.popleft())

    # Acknowledging.

    def _hold(self, run: Running) -> None:
        if not run.key[0] or self._by_key.setdefault(run.key, run) is not run:
            self._others.add(run)
        self._idle.clear()

    def _settle(self, run: Running) -> None:
        """Acknowledge, once the thread has ended too: it holds the slot that prefetch gave it."""
        if run.outlasts and not self._abandoned:
            assert run.result is not None  # noqa: S101 - made with the thread
            run.result.add_done_callback(lambda _: self._settle(run))
            return
        if self._by_key.get(run.key) is run:
            del self._by_key[run.key]
        else:
            self._others.discard(run)
        self.finished += 1
        run.delivery.ack()
        if not self._by_key and not self._others:
            self._idle.set()
