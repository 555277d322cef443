"""Calls with an idempotency key: the result that is remembered, else that of the handler, which then alone runs.

The way of one: wait for a request of the same key that runs in this worker; look into the store, and claim the key; run
the handler; put its result, or release the key. Who finds the key with another worker looks again and again until its
deadline. See `rpcq.idempotency.ResultStore` for what a store promises.
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
"""Seconds after its deadline that a call still has its key: to be cancelled, and for its result to be stored."""

FIRST_LOOK: Final = 0.01
LONGEST_LOOK: Final = 0.5
"""Seconds between two looks at whether another worker has ended a call of the same key: at first, and at most."""

RELEASE_TIMEOUT: Final = 5.0
"""Seconds that a store has to release a key. After that, its time has to pass."""

log = logs.get_logger("rpcq.worker")


class Repeatable(Protocol):
    """A request in hand, as far as this module is concerned; see `rpcq.calls.replying.CallRun`."""

    may_have_run: MayHaveRun | None
    task: asyncio.Task[None] | None
    ran_on: bool

    @property
    def id(self) -> str:
        """The correlation ID, for logs."""


class Replays:
    """Runs calls with an idempotency key once, and replays what they gave.

    Args:
        answers: where results are remembered, unless their service says otherwise.
        max_body: bytes of a result.

    Attributes:
        replayed: requests that were answered with a remembered result.

    """

    def __init__(self, answers: ResultStore, max_body: int) -> None:
        self._answers = answers
        self._max_body = max_body
        self._turns: dict[str, asyncio.Event] = {}  # key of a call that runs -> set when it has ended
        self._owner = secrets.token_hex(8)
        self._owners = itertools.count(1)
        self._releases: set[asyncio.Task[None]] = set()
        self.replayed = 0

    async def run(
        self, run: Repeatable, invocation: CallInvocation, dedup: Deduplication, enter: Callable[[], Awaitable[Any]]
    ) -> Any:
        """The result of a call: an `StoredResult`, or what `enter` gave where that cannot be sent.

        Raises:
            Refused: the handler may not run.

        """
        while (turn := self._turns.get(dedup.key)) is not None:
            _wait_for_twin(run)
            await turn.wait()
        turn = self._turns[dedup.key] = asyncio.Event()
        store = self._answers if dedup.store is None else dedup.store
        owner = f"{self._owner}-{next(self._owners)}"
        try:
            found = await self._recall(run, invocation, dedup, store, owner)
            return await self._enter(run, invocation, dedup, store, owner, enter) if found is None else found
        finally:
            del self._turns[dedup.key]
            turn.set()

    async def close(self) -> None:
        """Wait for the keys that are being released."""
        if self._releases:
            await asyncio.wait(self._releases, timeout=RELEASE_TIMEOUT)

    async def _recall(
        self, run: Repeatable, invocation: CallInvocation, dedup: Deduplication, store: ResultStore, owner: str
    ) -> StoredResult | None:
        """The answer that is remembered; None where the handler is to run, for which the key is claimed."""
        backoff = Backoff(FIRST_LOOK, LONGEST_LOOK, 1.5)
        while (found := await self._look(run, invocation, dedup, store, owner)) is Claim.HELD:
            if invocation.method.idempotent and invocation.request.attempt > 1:
                return None  # the worker that holds the key may be lost, and running twice does no harm
            _wait_for_twin(run)
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
        """What the store has under the key, which is claimed unless the call may not run."""
        try:
            if dedup.barred is not None:
                return await store.get(dedup.key)
            return await store.claim(dedup.key, owner, invocation.deadline - time.monotonic() + LEASE_SLACK)
        except (Exception, asyncio.CancelledError) as error:
            if _is_cancelled(run, error):
                raise
            log.exception("answers cannot be recalled", key=dedup.key, correlation_id=run.id)
            raise Refused(ServiceUnavailable("the worker could not look for an earlier answer")) from error

    async def _enter(
        self,
        run: Repeatable,
        invocation: CallInvocation,
        dedup: Deduplication,
        store: ResultStore,
        owner: str,
        enter: Callable[[], Awaitable[Any]],
    ) -> Any:
        answer = None
        try:
            value = await enter()
            try:
                answer = StoredResult(dedup.fingerprint, invocation.method.write_result(value, self._max_body))
            except Exception:  # noqa: BLE001 - told where the reply is made
                return value
        finally:
            # A handler that outlasts its call keeps its key until the time of that has passed, and so does one that
            # succeeded at the moment at which its call ended.
            if answer is None and not run.ran_on:
                self._release(store, dedup.key, owner)
        try:
            await store.put(dedup.key, answer)
        except (Exception, asyncio.CancelledError) as error:
            if _is_cancelled(run, error):
                raise
            log.exception("an answer cannot be remembered", key=dedup.key, correlation_id=run.id)
        return answer

    def _release(self, store: ResultStore, key: str, owner: str) -> None:
        """Release a key, while its caller is told that the call failed."""
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


def _wait_for_twin(run: Repeatable) -> None:
    if run.may_have_run is None:
        run.may_have_run = MayHaveRun("another request with its idempotency key ran")


def _is_cancelled(run: Repeatable, error: BaseException) -> bool:
    """Whether an error is the cancellation of the call, and not one that a store of answers ended in by itself."""
    return isinstance(error, asyncio.CancelledError) and run.task is not None and run.task.cancelling() > 0
