"""Whether a caller may make a call, as the service's own function says, before anything is run or replayed for it."""

from __future__ import annotations

import secrets

from rpcq import logs
from rpcq.admission import Job, Refused, key_of
from rpcq.contract import Authorize
from rpcq.errors import PermissionDenied, RemoteError

log = logs.get_logger("rpcq.worker")


async def authorize(job: Job, ask: Authorize) -> None:
    """Ask the service's function; what it gives is the scope of the call's idempotency key.

    Raises:
        Refused: the caller may not make this call, or the function failed: then it is not known, and nothing runs.

    """
    try:
        scope = _check(await ask(job.context()))
    except PermissionDenied as error:
        raise Refused(PermissionDenied(error.message, details=error.details)) from error
    except Exception as error:
        incident = secrets.token_hex(6)
        log.exception("a call cannot be authorized", **job.names(), incident=incident)
        message = f"whether this call of {job.method.label} is allowed could not be found out"
        raise Refused(RemoteError(message, executed="no", incident=incident)) from error
    if scope is not None and job.once is not None:
        job.once.key = key_of(job.request, job.method.service, scope)


def _check(scope: object) -> str | None:
    if scope is not None and not isinstance(scope, str):
        raise TypeError(f"authorize gave {scope!r}; it gives a string, or None")
    return scope
