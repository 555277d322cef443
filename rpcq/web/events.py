"""A watched job as server-sent events, for a page that shows how far it is.

The format is that of https://html.spec.whatwg.org/multipage/server-sent-events.html. It imports no framework: what
`progress` returns is the body of a streaming response.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any, Final

from rpcq.errors import ClosedError, JobFailed, NoResult
from rpcq.options import check_seconds
from rpcq.watching import WatchedJob
from rpcq.wire import bodies

MEDIA_TYPE: Final = "text/event-stream"

END_TIMEOUT: Final = 1.0
"""Seconds for the result of a job that has ended: it is there already."""

_HEARTBEAT: Final = b": still there\n\n"


async def progress(
    job: WatchedJob[Any], *, heartbeat: float = 15.0, last_event_id: str | None = None
) -> AsyncIterator[bytes]:
    """A watched job as server-sent events: `StreamingResponse(progress(job), media_type="text/event-stream")`.

    Each event has one JSON object as its data:

    - `progress`: the members of `rpcq.Progress` that are known, such as `{"state": "running", "done": 3}`. Its
      ID counts, so that a browser that connects again does not get again what it has.
    - `result`: `{"result": ...}`, what the handler returned. It is the last event.
    - `failed`: `{"reason", "executed", "attempts", "incident", "message"}` of `rpcq.JobFailed`; for `rpcq.NoResult`,
      whose job is done, `executed` is "yes", and `reason` says why there is no result. It is the last event, too.

    A page closes its `EventSource` at the last event: otherwise the browser connects again, and gets that event again.
    When the user leaves, the server cancels the response, and the job goes on.

    Args:
        job: what `send` returned with `watch=True`.
        heartbeat: seconds, above 0, after which a comment is sent if there was no event. Proxies close connections over
            which nothing comes, and servers see by it that a user has left.
        last_event_id: the header `Last-Event-ID` of the request, or None. What it says may be anything.

    Raises:
        ConfigurationError: the heartbeat is not valid.
        UsageError: this is another event loop than that of the job's client.

    """
    check_seconds("heartbeat", heartbeat)
    version = _version(last_event_id)
    if version > job._watch.version:  # noqa: SLF001 - of one piece
        version = 0  # of another job
    while True:
        try:
            found = await job._watch.after(version, heartbeat)  # noqa: SLF001 - of one piece
        except TimeoutError:
            yield _HEARTBEAT
            continue
        if found is None:
            break
        version, step = found
        known = {name: value for name, value in asdict(step).items() if value not in (None, "")}
        yield _event("progress", known, version)
    try:
        ended = {"result": await job.result(timeout=END_TIMEOUT)}
        written = _event("result", ended)
    except JobFailed as error:
        names = ("reason", "executed", "attempts", "incident", "message")
        written = _event("failed", {name: getattr(error, name) for name in names})
    except NoResult as error:
        written = _event("failed", _without_result(error.reason, error.message, error.incident))
    except ClosedError as error:
        written = _event("failed", {"reason": "closed", "executed": "maybe", "attempts": 0, "message": str(error)})
    except (ValueError, TypeError) as error:  # a type of the app's own that JSON cannot carry
        written = _event("failed", _without_result("unreadable", f"JSON cannot carry the result: {error}", None))
    yield written


def _without_result(reason: str, message: str, incident: str | None) -> dict[str, Any]:
    return {"reason": reason, "executed": "yes", "incident": incident, "message": message}


def _event(name: str, data: dict[str, Any], number: int | None = None) -> bytes:
    """One event. JSON has no line break outside of its strings, and writes those in them as escapes."""
    identified = b"" if number is None else b"id: %d\n" % number
    return b"event: %b\n%bdata: %b\n\n" % (name.encode(), identified, bodies.dumps(data))


def _version(last_event_id: str | None) -> int:
    said = last_event_id or ""
    return int(said) if said.isascii() and said.isdigit() and len(said) < 18 else 0
