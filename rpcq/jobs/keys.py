"""Which jobs are done, by idempotency key: a job whose key is that of one that is done does not run again.

A service without a store of results has the memory of its worker: two dictionaries, looked up for each job. With a
store (`Service(result_store=...)`), the key is claimed before the handler runs:

    claim -> a result                                    -> done: acknowledged, without a run
          -> another job has the key                     -> put off
          -> it raises, or does not answer in time       -> put off
          -> the key is taken, or has lapsed             -> the handler runs -> it returned: put
                                                                             -> it raised:   release

Only jobs that are done are stored. A job runs at least once, so it runs too when the claim of a lost worker has lapsed.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote

from rpcq import logs
from rpcq.jobs.outcomes import NotRun, of_key, of_store
from rpcq.results import ResultStore, StoredResult, fingerprint
from rpcq.runtime.backoff import OutageBackoff

if TYPE_CHECKING:
    from rpcq.execution import Enter
    from rpcq.invocation import Invocation
    from rpcq.jobs.run import JobRun
    from rpcq.wire.jobs import JobMessage

ENTRY: Final = 300
"""Bytes of memory that a key of a job takes, about."""

CLAIM_SLACK: Final = 1.0
"""Seconds that a job keeps its key after its timeout: time to cancel it, and to put or release the key."""

STORE_TIMEOUT: Final = 5.0
"""Seconds that a store has for each step."""

FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 60.0
"""Seconds that a job is put off at most after a store has failed once; after it has failed again and again."""

_DONE: Final = b"null"
"""The result that is stored for a job: what its handler returned is for a sender that watches it, and not stored."""

log = logs.get_logger("rpcq.worker")


class Claimed(NamedTuple):
    """A key that a job has in a store."""

    store: ResultStore
    key: str
    owner: str
    result: StoredResult


def key_of(service: str, job: JobMessage, subscription: str = "") -> str:
    """The key of a job: service, job with its scope, and idempotency key, separated by slashes.

    The scope is the broker's user that sent it, `@user`, if the message carries it. For an event, the second part has
    its `subscription` and its own name instead. In the key of a call, the second part is empty or begins with `=` or
    `@`; so no call has the key of a job.
    """
    kind = f"sub:{subscription}:{job.name}" if subscription else f"job:{job.name}"
    scope = f"@{quote(job.user, safe='')}" if job.user else ""
    return f"{service}/{kind}{scope}/{job.key}"


class Remembered:
    """The keys of jobs that are done, in the memory of this process; the older half is forgotten when it is full.

    Args:
        size: bytes that all of them may take, about; with 0 nothing is remembered.

    """

    def __init__(self, size: int) -> None:
        self._most = size // ENTRY // 2
        self._newer: dict[str, int] = {}
        self._older: dict[str, int] = {}

    def put(self, key: str, body: bytes) -> None:
        """Remember that the job of this key is done, with these parameters."""
        if len(self._newer) >= self._most:
            self._newer, self._older = {}, self._newer
            if not self._most:
                return
        self._newer[key] = hash(body)

    def get(self, key: str, body: bytes) -> bool | None:
        """Whether the job of this key that is done had the same parameters; None if none is remembered."""
        found = self._newer.get(key)
        if found is None:
            found = self._older.get(key)
            if found is None:
                return None
        return found == hash(body)


class Keys:
    """The keys of jobs in the stores of their services."""

    def __init__(self) -> None:
        self._owner = secrets.token_hex(8)
        self._owners = itertools.count(1)
        self._pauses = OutageBackoff(FIRST_PAUSE, LONGEST_PAUSE)
        self._seldom = logs.Seldom(log)
        self._ends: set[asyncio.Task[None]] = set()
        self._vanished = False

    async def run(self, run: JobRun, invocation: Invocation, store: ResultStore, enter: Enter) -> Any:
        """Run the handler of a job if its key says so; for `Executor.begin`.

        Raises:
            NotRun: the handler does not run.

        """
        job = run.job
        key = key_of(run.served.service.name, job, run.served.subscription)
        result = StoredResult(fingerprint(job.name, job.body), _DONE)
        claimed = Claimed(store, key, f"{self._owner}-{next(self._owners)}", result)
        try:
            async with asyncio.timeout(STORE_TIMEOUT):
                found = await store.claim(key, claimed.owner, invocation.deadline - time.monotonic() + CLAIM_SLACK)
        except (Exception, asyncio.CancelledError) as error:
            self.release(claimed)  # it may have the key all the same
            if _is_cancelled(run, error):
                raise
            self._seldom.warning("a store of results cannot claim the key of a job", key=key, exc_info=error)
            raise NotRun(of_store(self._pauses.jittered(time.monotonic()))) from error
        self._pauses.reset()
        if (not_run := of_key(job, found, result.fingerprint)) is not None:
            raise not_run
        run.claimed = claimed
        is_done = False
        try:
            value = await enter()
            is_done = True
        finally:
            if not is_done and not run.ran_on:  # a thread that goes on keeps the key: see `JobRunner`
                self.release(claimed)
        try:
            async with asyncio.timeout(STORE_TIMEOUT):
                await store.put(key, result)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the store's own; logged
            if not _is_cancelled(run, error):
                self._seldom.warning("a store of results cannot put a job that is done", key=key, exc_info=error)
            else:
                self.put(claimed)  # the handler has returned, so the job is done
        return value

    def put(self, claimed: Claimed) -> None:
        """Store that a job is done, in the background."""
        self._in_background(claimed.key, partial(claimed.store.put, claimed.key, claimed.result))

    def release(self, claimed: Claimed) -> None:
        """Free the key of a job that is not done, in the background."""
        self._in_background(claimed.key, partial(claimed.store.release, claimed.key, claimed.owner))

    def vanish(self) -> None:
        """Go on as if the process was killed: put and release nothing more."""
        self._vanished = True

    async def close(self) -> None:
        """Wait until the stores have what they were given."""
        if self._ends:
            await asyncio.wait(self._ends, timeout=STORE_TIMEOUT)

    def _in_background(self, key: str, end: Callable[[], Awaitable[object]]) -> None:
        async def finish() -> None:
            try:
                async with asyncio.timeout(STORE_TIMEOUT):
                    await end()
            except Exception as error:  # noqa: BLE001 - the store's own; logged
                self._seldom.warning("a store of results cannot put or release a job's key", key=key, exc_info=error)

        if self._vanished:
            return
        ending = asyncio.get_running_loop().create_task(finish())
        self._ends.add(ending)
        ending.add_done_callback(self._ends.discard)


def _is_cancelled(run: JobRun, error: BaseException) -> bool:
    """Whether the run was cancelled; a store may also raise a `CancelledError` of its own."""
    return isinstance(error, asyncio.CancelledError) and run.task is not None and run.task.cancelling() > 0
