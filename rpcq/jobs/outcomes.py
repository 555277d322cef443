"""What becomes of a job: done, run again later, or dead. Pure.

Everything that decides this is here. `executed` of a dead letter never claims more than is known: "no" only if no
attempt can have begun.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from rpcq.errors import CallError, Executed, GiveUp, RetryLater
from rpcq.invocation import Interruption, Refused
from rpcq.options import JobOptions, Retry
from rpcq.wire.delays import coarse, steps_of
from rpcq.wire.jobs import DELIVERY_LIMIT, SUSPECT_FROM, SUSPECT_LIMIT, JobMessage

UNKNOWN_PAUSES: Final = (5.0, 30.0, 180.0, 600.0)
"""Seconds that a job waits whose name the worker does not know: while a deploy rolls, some workers are older."""

MAX_ERROR: Final = 1000
"""Characters of an exception's text that a dead letter carries."""


@dataclass(frozen=True, slots=True)
class Again:
    """The job runs again later.

    Attributes:
        steps: of 250 ms; 0 for at once.
        error: why, for the log.
        attempts: 1 if this was an attempt, else 0.
        unknown: 1 if the worker has no such job, else 0.

    """

    steps: int
    error: str
    attempts: int = 0
    unknown: int = 0


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


def before(job: JobMessage) -> Executed:
    """Whether an attempt ran before this delivery."""
    if job.attempt > 1:
        return "yes"
    return "maybe" if job.returns else "no"


def of_delivery(
    job: JobMessage, *, is_suspects: bool, known: JobOptions | None, is_method: bool, now_ms: int
) -> Again | Dead | Suspect | None:
    """What becomes of a job as it arrives; None if it may run.

    Args:
        job: the job.
        is_suspects: whether it came from the queue for suspects.
        known: the options of the job of this name; None if the worker has none.
        is_method: whether the service has a method of this name.
        now_ms: the time, in milliseconds since the epoch.

    """
    if job.problem:
        return Dead("invalid", before(job), job.problem)
    if job.returns >= (SUSPECT_LIMIT if is_suspects else DELIVERY_LIMIT):
        return Dead("delivery_limit", "maybe", f"its workers were lost {job.returns} times while they had it")
    if job.expires_ms is not None and now_ms >= job.expires_ms:
        return Dead("expired", before(job), f"it expired {(now_ms - job.expires_ms) / 1000:.3f} s ago")
    if known is None:
        if is_method:
            return Dead("unknown_method", before(job), f"{job.name!r} is a method: call it, do not send it")
        if job.unknown >= len(UNKNOWN_PAUSES):
            return Dead("unknown_method", before(job), f"no worker that got it has a job {job.name!r}")
        return Again(steps_of(UNKNOWN_PAUSES[job.unknown]), f"this worker has no job {job.name!r}", unknown=1)
    if known.at_most_once and job.returns:
        return Dead("interrupted", "maybe", "its worker was lost while it had it, and it runs at most once")
    if job.returns >= SUSPECT_FROM and not is_suspects and not known.at_most_once:
        return Suspect()
    return None


def of_error(
    job: JobMessage, options: JobOptions, error: BaseException, spread: Callable[[float], float]
) -> Again | Dead:
    """What becomes of a job whose handler raised; `spread` makes a pause random."""
    said = f"{type(error).__name__}: {error}"[:MAX_ERROR]
    if isinstance(error, Refused):  # no thread could be started: it did not begin
        return Again(_pause(job, options.retry, spread), error.error.message)
    if isinstance(error, GiveUp):
        return Dead("gave_up", "yes", error.reason[:MAX_ERROR])
    if isinstance(error, RetryLater):
        return _again(job, options, said, steps_of(error.seconds))
    wanted = isinstance(error, options.retry_on) and not isinstance(error, options.give_up_on)
    if not wanted:
        return Dead("gave_up", "yes", said)
    return _again(job, options, said, _pause(job, options.retry, spread))


def of_interruption(
    job: JobMessage, options: JobOptions, why: Interruption, seconds: float, spread: Callable[[float], float]
) -> Again | Dead | None:
    """What becomes of a job whose handler was interrupted; None to give it back to its queue."""
    match why:
        case Interruption.TIMED_OUT:
            return _again(job, options, f"it timed out after {seconds:.3f} s", _pause(job, options.retry, spread))
        case Interruption.TIMED_OUT_UNBEGUN:
            return Again(_pause(job, options.retry, spread), "it did not begin in time: no thread was free")
        case Interruption.CUT_OFF | Interruption.CANCELLED if options.at_most_once:
            return Dead("interrupted", "maybe", f"its worker stopped, and cut it off after {seconds:.3f} s")
        case Interruption.CUT_OFF_UNBEGUN if options.at_most_once:
            return Again(0, "its worker stopped before it began")  # if it came back, it would count as run
        case _:
            return None


def of_refusal(job: JobMessage, error: CallError) -> Dead:
    """What becomes of a job whose parameters do not fit."""
    return Dead("invalid", before(job), error.message)


def _again(job: JobMessage, options: JobOptions, error: str, steps: int) -> Again | Dead:
    if job.attempt >= options.max_attempts:
        return Dead("attempts", "yes", error)
    return Again(steps, error, attempts=1)


def _pause(job: JobMessage, retry: Retry | None, spread: Callable[[float], float]) -> int:
    """The steps of the pause before the next attempt: at least 1, so that no loop of retries is without a pause."""
    longest = 1.0 if retry is None else retry.longest_pause(job.attempt - 1)
    return max(1, coarse(steps_of(min(spread(longest), 48 * 24 * 3600))))
