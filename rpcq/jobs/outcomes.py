"""What becomes of a job: done, run again later, or dead. Pure.

Everything that decides this is here. `executed` of a dead letter never claims more than is known: "no" only if no
attempt can have begun.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final
from zlib import crc32

from rpcq.errors import CallError, Executed, GiveUp, RetryLater
from rpcq.invocation import Interruption, Refused
from rpcq.once import Found, NotCommitted
from rpcq.options import JobOptions, Retry
from rpcq.results import Claim, StoredResult
from rpcq.wire.delays import coarse, steps_of
from rpcq.wire.job_queues import ALONE_FROM, DELIVERY_LIMIT, ORDERED_LIMIT, SUSPECT_FROM, SUSPECT_LIMIT
from rpcq.wire.jobs import JobMessage

UNKNOWN_PAUSES: Final = (5.0, 30.0, 180.0, 600.0)
"""Seconds that a job waits whose name the worker does not know: while a deploy rolls, some workers are older."""

HELD_PAUSE: Final = 5.0
"""Seconds that a job waits while another one with its key runs."""

LONGEST_PAUSE: Final = 60.0
LONGEST_TRIED: Final = 20 * 60.0
"""Seconds that a job of an ordered lane waits at most before it runs again, and that it holds up its key in all."""

MAX_ERROR: Final = 1000
"""Characters of an exception's text that a dead letter carries."""


@dataclass(frozen=True, slots=True)
class Again:
    """The job runs again later.

    Attributes:
        steps: of 250 ms; 0 for at once.
        reason: one word for it, for metrics; `ObservedJob` lists them.
        error: why, for the log.
        attempts: 1 if this was an attempt, else 0.
        unknown: 1 if the worker does not know such a job, else 0.

    """

    steps: int
    reason: str
    error: str
    attempts: int = 0
    unknown: int = 0

    @property
    def is_retry(self) -> bool:
        """Whether it counts as a retry; otherwise it is put off, and did not run."""
        return bool(self.attempts or self.unknown)


@dataclass(frozen=True, slots=True)
class Dead:
    """The job becomes a dead letter.

    Attributes:
        reason: one word for it, as in docs/wire.md.
        executed: whether an attempt ran.
        error: what happened, for people.

    """

    reason: str
    executed: Executed
    error: str


@dataclass(frozen=True, slots=True)
class Suspect:
    """The job came back too often: it may be what kills its workers. It runs with no other job beside it."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """The job is acknowledged without a run: its queue gets what nobody here wants; `error` says why, for the log."""

    error: str


class NotRun(Exception):
    """The handler does not run; `fate` says what becomes of the job. None: it is done already."""

    def __init__(self, fate: Again | Dead | None) -> None:
        super().__init__(fate)
        self.fate = fate


def before(job: JobMessage) -> Executed:
    """Whether an attempt ran before this delivery."""
    if job.attempt > 1:
        return "yes"
    return "maybe" if job.returns or job.earlier else "no"


def of_delivery(
    job: JobMessage,
    *,
    is_suspects: bool,
    known: JobOptions | None,
    unknown: Callable[[JobMessage], Again | Dead | Filtered],
    now_ms: int,
    is_first: bool = True,
) -> Again | Dead | Suspect | Filtered | None:
    """What becomes of a job as it arrives; None if it may run.

    Args:
        job: the job.
        is_suspects: whether it came from the queue for suspects.
        known: the options of what runs it; None if the worker has nothing that does.
        unknown: says what becomes of it then.
        now_ms: the time, in milliseconds since the epoch.
        is_first: of a job with an order key: whether no other job of its key has been settled since the worker has the
            lane. One that has only waited for such a job came back as often as that, and is not what killed workers.

    """
    if job.problem:
        return Dead("invalid", before(job), job.problem)
    if (dead := of_returns(job, is_suspects=is_suspects, is_first=is_first)) is not None:
        return dead
    if job.expires_ms is not None and now_ms >= job.expires_ms:
        return Dead("expired", before(job), f"it expired {(now_ms - job.expires_ms) / 1000:.3f} s ago")
    if known is None:
        return unknown(job)
    if known.at_most_once and job.order_key is not None:
        said = "it runs at most once, and has an order key: send it without, or define it without at_most_once"
        return Dead("invalid", before(job), said)
    if known.at_most_once and (job.returns or job.earlier):
        return Dead("interrupted", "maybe", "its worker was lost while it had it, and it runs at most once")
    suspect_from = SUSPECT_FROM if job.order_key is None else ALONE_FROM
    if job.returns + job.earlier >= suspect_from and not is_suspects and not known.at_most_once:
        return Suspect()
    return None


def of_unknown(job: JobMessage, *, is_method: bool) -> Again | Dead | Filtered:
    """What becomes of a job whose name the worker does not know; `is_method`: its service has such a method."""
    if is_method:
        return Dead("unknown_method", before(job), f"{job.name!r} is a method: call it, do not send it")
    last = Dead("unknown_method", before(job), f"no worker that got it has a job {job.name!r}")
    return of_stranger(job, f"this worker has no job {job.name!r}", last, "unknown_method")


def of_stranger(job: JobMessage, said: str, last: Dead | Filtered, reason: str) -> Again | Dead | Filtered:
    """What becomes of a job that another worker may know, while a deploy rolls; `last`, if none that got it did."""
    longest = len(UNKNOWN_PAUSES) - 1
    if job.unknown > longest and job.order_key is None:
        return last
    return Again(steps_of(UNKNOWN_PAUSES[min(job.unknown, longest)]), reason, said, unknown=1)


def of_ordered(job: JobMessage, fate: Again, waited: float) -> Again | Dead:
    """What becomes of a job of an ordered lane that is to run again: it waits in its worker, and holds up its key.

    Args:
        job: the job.
        fate: as of another job.
        waited: seconds since it had its turn first.

    """
    steps = min(fate.steps, steps_of(LONGEST_PAUSE))
    if not fate.is_retry or waited + steps / 4 <= LONGEST_TRIED:
        return replace(fate, steps=steps)
    reason, executed = ("attempts", "yes") if fate.attempts else ("unknown_method", before(job))
    said = f"{fate.error}; it has held up its order key for {waited:.0f} s"[:MAX_ERROR]
    return Dead(reason, executed, said)  # type: ignore[arg-type]  # one of `Executed`


def turn_of(job: JobMessage) -> int:
    """Which suspect comes first, of several: the lowest.

    Those of ordered lanes come back together when one of them kills the worker. The order of two keys is reversed each
    second time, and is another one every two times; jobs of one key have the same turn.
    """
    if job.order_key is None:
        return -1
    turn = crc32(f"{job.returns // 2} {job.order_key}".encode())
    return turn if job.returns % 2 else turn ^ 0xFFFFFFFF


def of_returns(job: JobMessage, *, is_suspects: bool, is_first: bool = True) -> Dead | None:
    """What becomes of a job that came back so often; None if it may come back again."""
    limit = DELIVERY_LIMIT if is_first else ORDERED_LIMIT
    if job.returns + job.earlier < limit and not (is_suspects and job.returns >= SUSPECT_LIMIT):
        return None
    times = job.returns + job.earlier
    return Dead("delivery_limit", "maybe", f"its workers were lost, or held it too long, {times} times")


def of_key(job: JobMessage, found: StoredResult | Claim, fingerprint: bytes) -> NotRun | None:
    """What becomes of a job by what a store has for its key; None if it runs.

    It runs if the key has lapsed: its earlier worker is lost, and a job runs at least once.
    """
    if isinstance(found, StoredResult):
        return NotRun(of_done(job, same=found.fingerprint == fingerprint))
    if found is Claim.HELD:
        return NotRun(of_twin())
    return None


def of_once(job: JobMessage, found: Found, seconds: float) -> NotRun:
    """What becomes of a job by what its inbox has for its key; `seconds` is the pause if that could not be asked."""
    match found:
        case Found.DONE | Found.OTHER:
            return NotRun(of_done(job, same=found is Found.DONE))
        case Found.HELD:
            return NotRun(of_twin())
        case Found.FAILED:
            said = "the database of its inbox failed: it cannot say whether it is done"
            return NotRun(Again(max(1, coarse(steps_of(seconds))), "inbox_failed", said))


def of_twin() -> Again:
    """What becomes of a job while another one has its key."""
    return Again(steps_of(HELD_PAUSE), "key_held", "another job with its key runs, or its worker was lost")


def of_wait(seconds: float) -> Again:
    """What becomes of a job whose turn is not near; `seconds` is the time until then, about."""
    said = "its turn is not near: others run, or its limits hold it up"
    return Again(max(1, coarse(steps_of(seconds))), "limits", said)


def of_done(job: JobMessage, *, same: bool) -> Dead | None:
    """What becomes of a job whose key is that of one that is done; None if it is the same job, with its parameters."""
    if same:
        return None
    return Dead("invalid", before(job), "its idempotency key is that of a job that is done, with other parameters")


def of_store(seconds: float) -> Again:
    """What becomes of a job whose store of results failed; `seconds` is the pause."""
    said = "the store of results failed: it cannot say whether it is done"
    return Again(max(1, coarse(steps_of(seconds))), "store_failed", said)


def of_error(
    job: JobMessage, options: JobOptions, error: BaseException, spread: Callable[[float], float]
) -> Again | Dead:
    """What becomes of a job whose handler raised; `spread` makes a pause random."""
    said = f"{type(error).__name__}: {error}"[:MAX_ERROR]
    if isinstance(error, Refused):  # no thread could be started: it did not begin
        return Again(_pause(job, options.retry, spread), "not_begun", error.error.message)
    if isinstance(error, GiveUp):
        return Dead("gave_up", "yes", error.reason[:MAX_ERROR])
    if isinstance(error, RetryLater):
        return _again(job, options, "retry_later", said, steps_of(error.seconds))
    if isinstance(error, NotCommitted):  # whether it is done, its inbox knows
        return _again(job, options, "not_committed", str(error)[:MAX_ERROR], _pause(job, options.retry, spread))
    wanted = isinstance(error, options.retry_on) and not isinstance(error, options.give_up_on)
    if not wanted:
        return Dead("gave_up", "yes", said)
    return _again(job, options, "failed", said, _pause(job, options.retry, spread))


def of_interruption(
    job: JobMessage, options: JobOptions, why: Interruption, seconds: float, spread: Callable[[float], float]
) -> Again | Dead | None:
    """What becomes of a job whose handler was interrupted; None to give it back to its queue."""
    match why:
        case Interruption.TIMED_OUT:
            error = f"it timed out after {seconds:.3f} s"
            return _again(job, options, "timed_out", error, _pause(job, options.retry, spread))
        case Interruption.TIMED_OUT_UNBEGUN:
            error = "it did not begin in time: no thread was free, or its store of results did not answer"
            return Again(_pause(job, options.retry, spread), "not_begun", error)
        case Interruption.CUT_OFF | Interruption.CANCELLED if options.at_most_once:
            return Dead("interrupted", "maybe", f"its worker stopped, and cut it off after {seconds:.3f} s")
        case Interruption.CUT_OFF_UNBEGUN if options.at_most_once:
            return of_stopping()
        case _:
            return None


def of_stopping() -> Again:
    """What becomes of a job that runs at most once and has not begun: if it came back, it would count as run."""
    return Again(0, "stopped", "its worker stopped before it began")


def of_refusal(job: JobMessage, error: CallError) -> Dead:
    """What becomes of a job whose parameters do not fit."""
    return Dead("invalid", before(job), error.message)


def is_last_attempt(job: JobMessage, options: JobOptions) -> bool:
    """Whether a job that fails in this attempt becomes a dead letter, however it fails."""
    return job.attempt >= options.max_attempts


def _again(job: JobMessage, options: JobOptions, reason: str, error: str, steps: int) -> Again | Dead:
    if is_last_attempt(job, options):
        return Dead("attempts", "yes", error)
    return Again(steps, reason, error, attempts=1)


def _pause(job: JobMessage, retry: Retry | None, spread: Callable[[float], float]) -> int:
    """The steps of the pause before the next attempt: at least 1, so that no loop of retries is without a pause."""
    longest = 1.0 if retry is None else retry.longest_pause(job.attempt - 1)
    return max(1, coarse(steps_of(min(spread(longest), 48 * 24 * 3600))))
