"""Tells the senders that watch jobs how far these are, and how they end.

    run begins, or its handler reports -> marked; told within `INTERVAL`, the newest state of each run in one message
    run ended: done                    -> the last report, then the result, then the job is acknowledged
               again, or dead          -> the last report; once the job is confirmed elsewhere, when it runs again, or
                                          why it is dead; then it is acknowledged

All of it is told and not awaited: a watcher that is gone, or a message that is lost, neither holds up a job nor fails
it. What is told last is published again if a session is lost meanwhile, as long as this worker lives.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from rpcq import logs
from rpcq.errors import Executed, InvalidReply
from rpcq.jobs.outcomes import Again, Dead, Suspect
from rpcq.runtime.backlog import Backlog
from rpcq.transport.base import Outgoing, Published, Transport
from rpcq.wire import watching
from rpcq.wire.delays import STEP
from rpcq.wire.replies import ERROR, RESULT
from rpcq.wire.watching import PROGRESS, Failure, Progress, Told, encode_told

if TYPE_CHECKING:
    from rpcq.jobs.run import JobRun
    from rpcq.service import Report

log = logs.get_logger("rpcq.worker")

INTERVAL: Final = 0.1
"""Seconds between two messages on the progress of one run, at least."""

MOST_UNSENT: Final = 1000
"""Messages on the ends of jobs that wait for a connection; the oldest is given up for a further one."""


MOST_ID: Final = 255
"""Bytes of a job's ID that AMQP can carry back."""


class Watcher:
    """The watcher of a run.

    Attributes:
        reply_to: the queue where it listens.
        name: names this run, for the watcher.
        number: how often it was told of this run.
        reported: what the handler reported last: done, total, note.
        is_marked: it is to be told of that.
        is_over: nothing more is reported: the run has ended.
        fate: what becomes of the job, and the incident; None while that is not decided.

    """

    __slots__ = ("fate", "is_marked", "is_over", "name", "number", "reply_to", "reported")

    def __init__(self, reply_to: bytes) -> None:
        self.reply_to = reply_to
        self.name = os.urandom(4).hex()
        self.number = 0
        self.reported: tuple[float | None, float | None, str | None] = (None, None, None)
        self.is_marked = False
        self.is_over = False
        self.fate: tuple[Again | Dead | Suspect, str] | None = None


class _Message(Outgoing):
    """One message to a watcher. Without a queue it is dropped, and the broker does not return it."""

    __slots__ = ("is_last", "label", "teller")

    def __init__(self, teller: Teller, run: JobRun, watcher: Watcher, kind: bytes, body: bytes) -> None:
        job_id = run.job.id.encode()
        super().__init__(teller.exchange, watcher.reply_to, job_id, encode_told(kind, job_id), body, mandatory=False)
        self.teller = teller
        self.label = f"{run.served.service.name}.{run.job.name}"
        self.is_last = kind != PROGRESS

    def on_published(self, published: Published) -> None:
        """See `Outgoing`."""
        if self.is_last and published is not Published.CONFIRMED:
            self.teller.not_confirmed(self, published)


class Teller:
    """Tells watchers.

    Args:
        transport: the worker's.
        may_reply_to: whether the worker may reply to a queue.
        reply_exchange: the exchange for replies; None for the default one.
        max_body: the most bytes of a result.

    Attributes:
        exchange: the exchange for what is told.

    """

    def __init__(
        self,
        transport: Transport,
        *,
        may_reply_to: Callable[[bytes], bool],
        reply_exchange: str | None,
        max_body: int,
    ) -> None:
        self._transport = transport
        self._may_reply_to = may_reply_to
        self.exchange = (reply_exchange or "").encode()
        self._max_body = max_body
        self._marked: dict[JobRun, Watcher] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._unsent: Backlog[_Message] = Backlog(lambda: transport.can_publish, transport.writable, transport.publish)
        self._closed = False
        self._seldom = logs.Seldom(log)

    def stop(self) -> None:
        """Tell nothing more."""
        self._closed = True
        self._marked.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def close(self) -> None:
        """Tell nothing more, and forget what was not sent."""
        self.stop()
        await self._unsent.close()

    # The life of a run.

    def watched(self, run: JobRun) -> None:
        """A job came that its sender watches."""
        if not 0 < len(run.job.id.encode()) <= MOST_ID:
            return  # a program that is not rpcq wrote an ID that is no text, or none
        if self._may_reply_to(run.job.reply_to):
            run.watcher = Watcher(run.job.reply_to)
            return
        self._seldom.warning(
            "the watcher of a job is not told: its reply_to is not a queue that this worker replies to (reply_to)",
            **run.names,
            reply_to=run.job.reply_to.decode("utf-8", "replace"),
        )

    def begins(self, run: JobRun, watcher: Watcher) -> Report:
        """The handler is about to run; returns what takes its reports."""
        self._mark(run, watcher)
        return partial(self._report, asyncio.get_running_loop(), run, watcher)

    def _report(
        self,
        loop: asyncio.AbstractEventLoop,
        run: JobRun,
        watcher: Watcher,
        done: float,
        total: float | None,
        note: str | None,
    ) -> None:
        """Take a report, in any thread. However many there are, the loop is called once for each message."""
        watcher.reported = (done, total, note)
        if watcher.is_marked or watcher.is_over:
            return
        watcher.is_marked = True
        try:
            loop.call_soon_threadsafe(self._mark, run, watcher)
        except RuntimeError:
            if not loop.is_closed():  # else a thread outlasts its worker
                raise

    def _mark(self, run: JobRun, watcher: Watcher) -> None:
        if self._closed or watcher.is_over:
            return
        watcher.is_marked = True
        self._marked[run] = watcher
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL, self._tell_marked)

    def _tell_marked(self) -> None:
        self._timer = None
        if not self._transport.can_publish:  # later, of what is the newest then
            self._timer = asyncio.get_running_loop().call_later(INTERVAL, self._tell_marked)
            return
        marked, self._marked = self._marked, {}
        for run, watcher in marked.items():
            watcher.is_marked = False  # before it is read: a report that comes meanwhile marks it again
            self._tell_progress(run, watcher)

    def forget(self, run: JobRun, watcher: Watcher) -> None:
        """The run is over, and there is nothing to tell: the job goes back to its queue."""
        watcher.is_over = True
        self._marked.pop(run, None)

    def done(self, run: JobRun, watcher: Watcher, value: Any) -> None:
        """The handler returned this."""
        self._end(run, watcher)
        method = run.served.service.jobs[run.job.name]
        try:
            body = method.write_result(value, self._max_body)
        except InvalidReply as error:
            log.exception("the result of a job cannot be sent; the job is done", **run.names)
            self._fail(run, watcher, watching.INVALID_RESULT, error.message, "yes")
        else:
            self._tell(_Message(self, run, watcher, RESULT, body))

    def suppressed(self, run: JobRun, watcher: Watcher) -> None:
        """The job did not run: one with its key is done."""
        self._end(run, watcher)
        message = "a job with its key is done already, so it did not run, and its result is not known"
        self._fail(run, watcher, watching.DONE_ALREADY, message, "yes")

    def decided(self, run: JobRun, watcher: Watcher, fate: Again | Dead | Suspect, incident: str) -> None:
        """It is decided what becomes of the job. The watcher is told of it when the broker has confirmed it."""
        self._end(run, watcher)
        watcher.fate = fate, incident

    def moved(self, run: JobRun, watcher: Watcher) -> None:
        """The broker has the job elsewhere."""
        assert watcher.fate is not None  # noqa: S101 - it was decided before it was moved
        fate, incident = watcher.fate
        label = f"{run.served.service.name}.{run.job.name}"
        match fate:
            case Dead():
                # What the handler raised stays in the log, as for a call.
                message = f"{label} failed in its last attempt" if incident else fate.error
                self._fail(run, watcher, fate.reason, message, fate.executed, incident)
            case Again():
                message = f"{label} failed" if incident else fate.error
                self._tell_waiting(run, watcher, fate.reason, message, incident, fate.steps * STEP, fate.attempts)
            case Suspect():
                self._tell_waiting(run, watcher, "workers_lost", "its workers were lost", "", 0.0, 0)

    def _end(self, run: JobRun, watcher: Watcher) -> None:
        """Tell of the last report that the watcher has not heard of."""
        if watcher.is_over:
            return
        self.forget(run, watcher)
        if watcher.is_marked and watcher.reported[0] is not None:
            self._tell_progress(run, watcher)

    # Telling.

    def _tell_progress(self, run: JobRun, watcher: Watcher) -> None:
        done, total, note = watcher.reported
        progress = Progress(state="running", attempt=run.job.attempt, done=done, total=total, note=note)
        self._say(run, watcher, progress)

    def _tell_waiting(
        self, run: JobRun, watcher: Watcher, reason: str, error: str, incident: str, seconds: float, attempts: int
    ) -> None:
        progress = Progress(
            state="waiting",
            attempt=run.job.attempt + attempts,
            reason=reason,
            error=error,
            incident=incident,
            due=datetime.fromtimestamp(self._transport.now_ms() / 1000 + seconds, UTC),
        )
        self._say(run, watcher, progress)

    def _say(self, run: JobRun, watcher: Watcher, progress: Progress) -> None:
        watcher.number += 1
        body = watching.write_progress(Told(progress, watcher.name, watcher.number))
        self._tell(_Message(self, run, watcher, PROGRESS, body))

    def _fail(
        self, run: JobRun, watcher: Watcher, code: str, message: str, executed: Executed, incident: str = ""
    ) -> None:
        job = run.job
        ran = run.began or job.returns or job.earlier
        failure = Failure(code, message, executed, job.attempt if ran else job.attempt - 1, incident)
        self._tell(_Message(self, run, watcher, ERROR, watching.write_failure(failure)))

    def _tell(self, message: _Message) -> None:
        if self._closed:
            return
        if self._unsent.items or not self._transport.can_publish:
            self._wait(message)
        else:
            self._transport.publish(message)

    def _wait(self, message: _Message) -> None:
        """Keep a message until there is a connection."""
        if len(self._unsent) >= MOST_UNSENT:
            oldest = next(iter(self._unsent.items))
            self._unsent.discard(oldest)
            self._seldom.warning("a watcher is not told how its job ended: too many wait for a connection")
        self._unsent.add(message)

    def not_confirmed(self, message: _Message, published: Published) -> None:
        """The broker may not have what a watcher was told last."""
        if self._closed:
            return
        if published in (Published.UNSENT, Published.UNKNOWN):
            self._wait(message)
            return
        job_id = message.correlation_id.decode()
        self._seldom.warning(
            "a watcher is not told how its job ended", job=message.label, job_id=job_id, cause=published.value
        )
        if published is Published.TOO_LARGE:
            said = f"{message.label} returned {len(message.body)} bytes of JSON, more than the broker takes"
            body = watching.write_failure(Failure(watching.INVALID_RESULT, said, "yes", 1))
            if len(body) < len(message.body):
                message.body, message.properties = body, encode_told(ERROR, message.correlation_id)
                self._tell(message)
