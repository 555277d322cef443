"""Runs the handler of a job in a transaction that also has the key of the job: see `rpcq.once`.

key is there                    -> acknowledged, without a run
another one is about to do it   -> put off
the database fails              -> put off
handler returned                -> committed -> acknowledged
                                -> not, or unknown -> tried again: the key says whether it is done
handler raised                  -> rolled back, and what `of_error` says
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from rpcq import logs
from rpcq.jobs.invocation import JobInvocation, once_key
from rpcq.jobs.outcomes import NotRun, of_once
from rpcq.once import Found, NotBegun, Once
from rpcq.runtime.backoff import OutageBackoff

if TYPE_CHECKING:
    from rpcq.execution import Around, Enter
    from rpcq.jobs.run import JobRun

FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 60.0
"""Seconds that a job is put off at most after its database has failed once; after it has failed again and again."""

log = logs.get_logger("rpcq.worker")


class OnceRunner:
    """Runs handlers of jobs with `once`, for one worker."""

    def __init__(self) -> None:
        self._pauses = OutageBackoff(FIRST_PAUSE, LONGEST_PAUSE)
        self._seldom = logs.Seldom(log)

    def around(self, invocation: JobInvocation, once: Once) -> Around | None:
        """What runs around the handler in its task; a `def` handler does it itself, in its thread."""
        return partial(self._run, invocation, once) if invocation.method.is_async else None

    async def _run(self, invocation: JobInvocation, once: Once, enter: Enter) -> Any:
        async with once.open(once_key(invocation.method, invocation.job)) as given:
            self._pauses.reset()
            invocation.given = given
            return await enter()

    def not_run(self, run: JobRun, error: NotBegun) -> NotRun:
        """What becomes of a job whose handler did not begin."""
        if error.found is not Found.FAILED:
            self._pauses.reset()
            return of_once(run.job, error.found, 0.0)
        self._seldom.warning("the database of an inbox fails", **run.names, exc_info=error.__cause__ or error)
        return of_once(run.job, error.found, self._pauses.jittered(time.monotonic()))
