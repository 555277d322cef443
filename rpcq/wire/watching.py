"""What a worker tells the sender that watches a job: values <-> bytes. Pure; `docs/wire.md` is the contract."""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from rpcq.errors import EXECUTED, Executed
from rpcq.wire import bodies
from rpcq.wire import properties as amqp
from rpcq.wire.bodies import JSON
from rpcq.wire.properties import short
from rpcq.wire.replies import ERROR, RESULT

PROGRESS: Final = b"progress"
"""The type of a message that says how far a job is; its end is a `result` or an `error`, as for a call."""

DONE_ALREADY: Final = "done_already"
INVALID_RESULT: Final = "invalid_result"
"""Codes of an error for a job that is done: its result is not known, or cannot be sent."""

_FLAGS: Final = amqp.CONTENT_TYPE | amqp.DELIVERY_MODE | amqp.CORRELATION_ID | amqp.TYPE
_START: Final = struct.pack(">H", _FLAGS) + short(JSON) + b"\x01"
_ENDS: Final = {kind: short(kind) for kind in (PROGRESS, RESULT, ERROR)}

State = Literal["running", "waiting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a watched job is.

    Attributes:
        state: "running": its handler runs. "waiting": it runs again later, because an attempt failed or it was put off.
        attempt: the number of the attempt that runs or comes next, from 1.
        done: how much is done, as its handler said in this attempt; None if it has not said so yet.
        total: how much there is to do; None if its handler does not say.
        note: what its handler says besides; None for nothing.
        reason: why it waits, one word: "failed", "retry_later", "timed_out", "limits", ...; as `ObservedJob.code` has
            them. Empty while it runs.
        error: why it waits, for people. It never has the text of an exception; look for `incident` in the worker's log.
        incident: what to look for in the worker's log; empty for none.
        due: when it runs again at the earliest, in UTC; None while it runs.

    """

    state: State
    attempt: int
    done: float | None = None
    total: float | None = None
    note: str | None = None
    reason: str = ""
    error: str = ""
    incident: str = ""
    due: datetime | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """A `Progress` as a worker tells it.

    Attributes:
        run: which run of the job's handler it is about: a random name.
        number: counts what is told of one run, from 1.

    """

    progress: Progress
    run: str
    number: int


@dataclass(frozen=True, slots=True)
class Failure:
    """What a worker tells of a job that has no result.

    Attributes:
        code: the reason of its dead letter, or `DONE_ALREADY`, or `INVALID_RESULT`.
        message: what happened, for people.
        executed: whether an attempt ran.
        attempts: attempts that ran, as far as is known.
        incident: what to look for in the worker's log; empty for none.

    """

    code: str
    message: str
    executed: Executed
    attempts: int
    incident: str = ""


def encode_told(kind: bytes, job_id: bytes) -> bytes:
    """Encode the properties of a message to a watcher; `kind` is PROGRESS, RESULT or ERROR."""
    return b"".join((_START, short(job_id), _ENDS[kind]))


def write_progress(told: Told) -> bytes:
    """Write the body of a message of type PROGRESS; what is None or empty is left out."""
    progress = told.progress
    body: dict[str, Any] = {
        "state": progress.state,
        "attempt": progress.attempt,
        "run": told.run,
        "number": told.number,
        "done": progress.done,
        "total": progress.total,
        "note": progress.note,
        "reason": progress.reason or None,
        "message": _written(progress.error) or None,
        "incident": progress.incident or None,
        "due": None if progress.due is None else round(progress.due.timestamp() * 1000),
    }
    return bodies.dumps({name: value for name, value in body.items() if value is not None})


def read_progress(body: bytes | None) -> Told:
    """Read the body of a message of type PROGRESS.

    Raises:
        ValueError: it is none.

    """
    found = _object(body)
    state, run, due = found.get("state"), found.get("run"), found.get("due")
    if state not in ("running", "waiting") or not isinstance(run, str):
        msg = f"it must have a state and a run; got {state!r:.50} and {run!r:.50}"
        raise ValueError(msg)
    note = found.get("note")
    progress = Progress(
        state=state,
        attempt=_count(found.get("attempt")),
        done=_amount(found.get("done")),
        total=_amount(found.get("total")),
        note=note if isinstance(note, str) else None,
        reason=_text(found.get("reason")),
        error=_text(found.get("message")),
        incident=_text(found.get("incident")),
        due=_time(due) if type(due) is int else None,
    )
    return Told(progress, run, _count(found.get("number")))


def write_failure(failure: Failure) -> bytes:
    """Write the body of a message of type ERROR."""
    body: dict[str, Any] = {
        "code": failure.code,
        "message": _written(failure.message),
        "executed": failure.executed,
        "retryable": False,
        "attempts": failure.attempts,
    }
    return bodies.dumps({**body, "incident": failure.incident} if failure.incident else body)


def read_failure(body: bytes | None) -> Failure:
    """Read the body of a message of type ERROR.

    Raises:
        ValueError: it is none.

    """
    found = _object(body)
    code, executed = found.get("code"), found.get("executed")
    if not isinstance(code, str):
        msg = f"it must have a code; got {code!r:.50}"
        raise ValueError(msg)  # noqa: TRY004 - of what a peer sent
    return Failure(
        code=code,
        message=_text(found.get("message")),
        executed=executed if isinstance(executed, str) and executed in EXECUTED else "maybe",  # type: ignore[arg-type]  # one of them
        attempts=_count(found.get("attempts")),
        incident=_text(found.get("incident")),
    )


def _written(said: str) -> str:
    """A text that UTF-8 can carry."""
    return said.encode("utf-8", "replace").decode()


def _object(body: bytes | None) -> dict[str, Any]:
    if body is None:
        msg = "its body is over the limit (max_body)"
        raise ValueError(msg)
    found = bodies.loads(body)
    if not isinstance(found, dict):
        msg = f"its body must be an object; got a {type(found).__name__}"
        raise ValueError(msg)  # noqa: TRY004 - of what a peer sent
    return found


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


def _amount(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and 0 <= value <= sys.float_info.max else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _time(ms: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(ms / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        return None
