"""What is known of each watched job, from what its workers tell.

    sent -> progress ... -> result               -> Reply
                         -> error                -> JobFailed, or NoResult
                         -> the session is lost  -> JobFailed, "session_lost"
                         -> the client is closed -> ClosedError

Only the last progress of a job is kept: a reader who is slow gets the newest one. A job that nobody refers to any more
is forgotten.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections import deque
from typing import Final
from weakref import KeyedRef

from rpcq import logs
from rpcq.errors import ClosedError, JobFailed, NoResult, RpcqError, SendError, UsageError
from rpcq.wire import watching
from rpcq.wire.replies import ERROR, RESULT, Reply
from rpcq.wire.watching import Progress, Told

REMEMBERED_JOBS: Final = 10_000
"""How many jobs that are not watched any more are remembered: what is told of them later is no stray message."""

REMEMBERED_RUNS: Final = 16
"""How many runs of a job are remembered that a later run has followed: what is told of them later is old."""

log = logs.get_logger("rpcq.client")


class Watch:
    """What is known of one watched job.

    Args:
        label: its name, as `service.job`.
        job_id: its ID.

    Attributes:
        latest: how far it is; None as long as no worker has told.
        version: how often that changed.
        outcome: its result, not read yet, or the error; None while it goes on.

    """

    __slots__ = (
        "__weakref__",
        "_changed",
        "_earlier",
        "_job_id",
        "_label",
        "_loop",
        "_number",
        "_run",
        "latest",
        "outcome",
        "version",
    )

    def __init__(self, label: str, job_id: str) -> None:
        self._label = label
        self._job_id = job_id
        self._loop = asyncio.get_running_loop()
        self._changed: asyncio.Future[None] | None = None  # what waits for the next change, if anything does
        self._run = ""
        self._number = 0
        self._earlier: deque[str] = deque(maxlen=REMEMBERED_RUNS)
        self.latest: Progress | None = None
        self.version = 0
        self.outcome: Reply | RpcqError | None = None

    async def end(self, timeout: float) -> Reply:  # noqa: ASYNC109 - as `WatchedJob.result` has it
        """Wait for the result, at most so many seconds.

        Raises:
            TimeoutError: the job had not ended by then.
            JobFailed: it is dead, or its end is not known.
            NoResult: it is done, and its result cannot be had.
            ClosedError: the client was closed before.
            UsageError: its client belongs to another event loop.

        """
        until = time.monotonic() + timeout
        while self.outcome is None:
            if not await self._wait(until - time.monotonic()):
                how = "no worker has told of it" if self.latest is None else f"it is {self.latest.state}"
                msg = f"{self._label} had not ended within {timeout:g} s: {how}, and it goes on (job={self._job_id})"
                raise TimeoutError(msg)
        if isinstance(self.outcome, Reply):
            return self.outcome
        raise copy.copy(self.outcome)

    async def after(self, version: int, timeout: float | None = None) -> tuple[int, Progress] | None:  # noqa: ASYNC109 - the same
        """Wait until its progress has another version; returns that version and the progress, or None at its end.

        Raises:
            TimeoutError: neither came within so many seconds; None waits without a limit.
            UsageError: its client belongs to another event loop.

        """
        until = None if timeout is None else time.monotonic() + timeout
        while self.version == version or self.latest is None:
            if self.outcome is not None:
                return None
            if not await self._wait(None if until is None else until - time.monotonic()):
                msg = f"nothing new was told of {self._label} in time; it goes on (job={self._job_id})"
                raise TimeoutError(msg)
        return self.version, self.latest

    async def _wait(self, seconds: float | None) -> bool:
        """Wait until something has changed; returns False if nothing has in so many seconds."""
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError(f"this job of {self._label} belongs to the event loop of the client that sent it")
        if self._changed is None:
            self._changed = self._loop.create_future()
        done, _ = await asyncio.wait([self._changed], timeout=None if seconds is None else max(seconds, 0.0))
        return bool(done)

    # What is told.

    def update(self, told: Told) -> None:
        """Take progress, unless it is older than what is known."""
        if self.outcome is not None:
            return
        if told.run != self._run:
            if told.run in self._earlier:
                return
            self._earlier.append(self._run)
            self._run, self._number = told.run, 0
        if told.number <= self._number:
            return
        self._number = told.number
        self.latest = told.progress
        self.version += 1
        self._wake()

    def finish(self, outcome: Reply | RpcqError) -> None:
        """Take its end, if it has none."""
        if self.outcome is None:
            self.outcome = outcome
            self._wake()

    def fail(self, failure: watching.Failure) -> None:
        """It ended without a result."""
        incident = failure.incident or None
        if failure.code in (watching.DONE_ALREADY, watching.INVALID_RESULT):
            error: RpcqError = NoResult(failure.message, reason=failure.code, job_id=self._job_id, incident=incident)
        else:
            error = JobFailed(
                failure.message or f"{self._label} failed",
                executed=failure.executed,
                reason=failure.code,
                attempts=failure.attempts,
                incident=incident,
                job_id=self._job_id,
            )
        self.finish(error)

    def lost(self, why: str) -> None:
        """The session that listens is gone: its end will not be heard."""
        if self.outcome is not None:
            return
        known = self.latest
        attempts = 0 if known is None else known.attempt - (known.state == "waiting")
        msg = f"the connection over which {self._label} was watched is lost, and the job goes on unheard: {why}"
        self.finish(
            JobFailed(msg, executed="maybe", reason="session_lost", attempts=max(0, attempts), job_id=self._job_id)
        )

    def close(self) -> None:
        """The client is closed."""
        self.finish(ClosedError(f"the client was closed; {self._label} goes on unheard (job={self._job_id})"))

    def _wake(self) -> None:
        changed, self._changed = self._changed, None
        if changed is not None and not changed.done():
            changed.set_result(None)


class Watches:
    """The watched jobs of a client, by ID. It does not keep them: a job that nobody refers to is forgotten.

    Args:
        limit: jobs that may be watched at once.

    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._watches: dict[bytes, KeyedRef[bytes, Watch]] = {}
        self._over: dict[bytes, None] = {}  # in order
        self._seldom = logs.Seldom(log)

    def __len__(self) -> int:
        return len(self._watches)

    def add(self, label: str, job_id: str) -> Watch:
        """Watch a job that is about to be sent.

        Raises:
            SendError: too many jobs are watched.

        """
        if len(self._watches) >= self._limit:
            msg = f"{self._limit} jobs are watched already (max_in_flight)"
            raise SendError(msg, queued="no", message_id=job_id)
        watch, key = Watch(label, job_id), job_id.encode()
        self._watches[key] = KeyedRef(watch, self._forgotten, key)
        return watch

    def take(self, came: Reply) -> bool:
        """Take a message of the reply queue; returns False if it is about no job of this client."""
        found = self._watches.get(came.correlation_id)
        watch = None if found is None else found()
        if watch is None:
            return came.correlation_id in self._over
        try:
            if came.kind == RESULT:
                watch.finish(came)
            elif came.kind == ERROR:
                watch.fail(watching.read_failure(came.body))
            elif came.kind == watching.PROGRESS:
                watch.update(watching.read_progress(came.body))
            else:
                msg = f"its type is {came.kind!r:.50}"
                raise ValueError(msg)  # noqa: TRY301 - as for what its reader raises
        except ValueError as error:
            self._seldom.warning("a message about a watched job is dropped", cause=str(error))
        if watch.outcome is not None:
            self._drop(came.correlation_id)
        return True

    def lost(self, why: str) -> None:
        """Nothing more is heard of the jobs that are watched now."""
        for key, watch in self._current():
            watch.lost(why)
            self._drop(key)

    def close(self) -> None:
        """The client is closed."""
        for key, watch in self._current():
            watch.close()
            self._drop(key)

    def _current(self) -> list[tuple[bytes, Watch]]:
        found = ((key, ref()) for key, ref in [*self._watches.items()])
        return [(key, watch) for key, watch in found if watch is not None]

    def _forgotten(self, ref: KeyedRef[bytes, Watch]) -> None:
        """Nobody refers to a job any more. May be called in any thread."""
        if self._watches.get(ref.key) is ref:
            self._drop(ref.key)

    def _drop(self, key: bytes) -> None:
        self._watches.pop(key, None)
        self._over[key] = None
        if len(self._over) > REMEMBERED_JOBS:
            self._over.pop(next(iter(self._over)), None)
