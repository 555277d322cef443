"""Calls with an idempotency key: run the handler once, store its result, and replay the stored result later.

The steps of a call: wait for a request with the same key that runs in this worker; look into the store, and claim the
key; run the handler; store its result, or release the key. If another worker has the key, look again until the
deadline. See `rpcq.results.ResultStore` for what a store promises.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Protocol

from rpcq import logs
from rpcq.calls.admission import CallInvocation, Deduplication, MayHaveRun
from rpcq.errors import InvalidParams, ServiceUnavailable
from rpcq.invocation import Refused
from rpcq.results import Claim, ResultStore, StoredResult
from rpcq.runtime.backoff import Backoff

LEASE_SLACK: Final = 1.0
"""Seconds that a call keeps its key after its deadline: time to cancel it, and to store its result."""

FIRST_LOOK: Final = 0.01
LONGEST_LOOK: Final = 0.5
"""Seconds between two looks whether another worker has ended a call with the same key: first pause, longest pause."""

RELEASE_TIMEOUT: Final = 5.0
"""Seconds that a store has to release a key. If it takes longer, the key stays taken until its time has passed."""

log = logs.get_logger("rpcq.worker")


class Repeatable(Protocol):
    """The part of a run that this module uses; see `rpcq.calls.replying.CallRun`."""

    may_have_run: MayHaveRun | None
    task: asyncio.Task[None] | None
    ran_on: bool

    @property
    def id(self) -> str:
        """The correlation ID, for logs."""


class Replays:
    """Runs calls with an idempotency key once, and replays their results.

    Args:
        results: store of results, for services that have no store of their own.
        max_body: largest size of a result, bytes.

    Attributes:
        replayed: number of requests that were answered with a stored result.

    """

    def __init__(self, results: ResultStore, max_body: int) -> None:
        self._results = results
        self._max_body = max_body
        self._turns: dict[str, asyncio.Event] = {}  # key of a call that runs -> set when it has ended
        self._owner = secrets.token_hex(8)
        self._owners = itertools.count(1)
        self._releases: set[asyncio.Task[None]] = set()
        self.replayed = 0

    async def run(
        self, run: Repeatable, invocation: CallInvocation, dedup: Deduplication, enter: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Return the result of a call: a `StoredResult`, or the value that `enter` returned if it cannot be sent.

        Raises:
            Refused: the handler must not run.

        """
        while (turn := self._turns.get(dedup.key)) is not None:
            _note_twin(run)
            await turn.wait()
        turn = self._turns[dedup.key] = asyncio.Event()
        store = self._results if dedup.store is None else dedup.store
        owner = f"{self._owner}-{next(self._owners)}"
        try:
            found = await self._recall(run, invocation, dedup, store, owner)
            return await self._enter(run, invocation, dedup, store, owner, enter) if found is None else found
        finally:
            del self._turns[dedup.key]
            turn.set()

    async def close(self) -> None:
        """Wait until the keys that are being released are free."""
        if self._releases:
            await asyncio.wait(self._releases, timeout=RELEASE_TIMEOUT)

    async def _recall(
        self, run: Repeatable, invocation: CallInvocation, dedup: Deduplication, store: ResultStore, owner: str
    ) -> StoredResult | None:
        """Return the stored result, or claim the key and return None: then the handler has to run."""
        backoff = Backoff(FIRST_LOOK, LONGEST_LOOK, 1.5)
        while (found := await self._look(run, invocation, dedup, store, owner)) is Claim.HELD:
            if invocation.method.idempotent and invocation.request.attempt > 1:
                return None  # the worker that holds the key may be lost, and running twice does no harm
            _note_twin(run)
            await asyncio.sleep(backoff.pause())
        if isinstance(found, StoredResult):
            if found.fingerprint != dedup.fingerprint:
                raise Refused(InvalidParams("its idempotency key was used for another method, or other parameters"))
            self.replayed += 1
            return found
        if dedup.barred is not None:
            raise Refused(dedup.barred)
        if found is Claim.LAPSED and not invocation.method.idempotent:
            # The handler does not run: let the claim end now, so that the next request does not wait for it.
            self._in_background(dedup.key, partial(store.claim, dedup.key, owner, 0.0))
            raise Refused(MayHaveRun("a worker that ran a request with its idempotency key was lost"))
        return None

    async def _look(
        self, run: Repeatable, invocation: CallInvocation, dedup: Deduplication, store: ResultStore, owner: str
    ) -> StoredResult | Claim | None:
        """Return what the store has for the key, and claim the key unless the call must not run."""
        try:
            if dedup.barred is not None:
                return await store.get(dedup.key)
            return await store.claim(dedup.key, owner, invocation.deadline - time.monotonic() + LEASE_SLACK)
        except (Exception, asyncio.CancelledError) as error:
            if _is_cancelled(run, error):
                raise
            log.exception("a stored result cannot be read", key=dedup.key, correlation_id=run.id)
            raise Refused(ServiceUnavailable("the worker could not look for a stored result")) from error

    async def _enter(
        self,
        run: Repeatable,
        invocation: CallInvocation,
        dedup: Deduplication,
        store: ResultStore,
        owner: str,
        enter: Callable[[], Awaitable[Any]],
    ) -> Any:
        result = None
        try:
            value = await enter()
            try:
                result = StoredResult(dedup.fingerprint, invocation.method.write_result(value, self._max_body))
            except Exception:  # noqa: BLE001 - reported where the reply is made
                return value
        finally:
            # Two handlers keep their key until its time has passed: one that outlasts its call, and one that succeeded
            # at the moment when its call ended.
            if result is None and not run.ran_on:
                self._release(store, dedup.key, owner)
        try:
            await store.put(dedup.key, result)
        except (Exception, asyncio.CancelledError) as error:
            if _is_cancelled(run, error):
                raise
            log.exception("a result cannot be stored", key=dedup.key, correlation_id=run.id)
        return result

    def _release(self, store: ResultStore, key: str, owner: str) -> None:
        """Release a key in the background; the caller gets the error of the call at once."""
        self._in_background(key, partial(store.release, key, owner))

    def _in_background(self, key: str, end: Callable[[], Awaitable[object]]) -> None:
        async def finish() -> None:
            try:
                async with asyncio.timeout(RELEASE_TIMEOUT):
                    await end()
            except Exception:
                log.exception("an idempotency key cannot be released", key=key)

        releasing = asyncio.get_running_loop().create_task(finish())
        self._releases.add(releasing)
        releasing.add_done_callback(self._releases.discard)


def _note_twin(run: Repeatable) -> None:
    """Note that another request with the same key ran; if this one times out, its call may have run."""
    if run.may_have_run is None:
        run.may_have_run = MayHaveRun("another request with its idempotency key ran")


def _is_cancelled(run: Repeatable, error: BaseException) -> bool:
    """Whether the call was cancelled; a store may also raise a `CancelledError` of its own."""
    return isinstance(error, asyncio.CancelledError) and run.task is not None and run.task.cancelling() > 0
