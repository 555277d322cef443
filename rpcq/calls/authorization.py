"""Asks the service's own function whether a caller may make a call, before the call is run or replayed."""

from __future__ import annotations

import asyncio
import secrets
from typing import Final

from rpcq import logs
from rpcq.calls.admission import CallInvocation, key_of
from rpcq.errors import PermissionDenied, RemoteError
from rpcq.invocation import Refused
from rpcq.service import Authorize

MAX_SCOPE: Final = 255
"""Bytes of a scope."""

log = logs.get_logger("rpcq.worker")


async def authorize(invocation: CallInvocation, ask: Authorize, seldom: logs.Seldom) -> None:
    """Ask the service's function; the scope that it returns becomes part of the call's idempotency key.

    Raises:
        Refused: the caller may not make this call; or the function failed: then rpcq cannot know, and nothing runs.

    """
    try:
        scope = _check(await ask(invocation.context()))
    except PermissionDenied as error:
        seldom.warning("call denied", **invocation.names(), user=invocation.request.user, cause=error.message)
        raise Refused(PermissionDenied(error.message, details=error.details)) from error
    except (Exception, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and _is_cancelled():
            raise
        incident = secrets.token_hex(6)
        log.exception("a call cannot be authorized", **invocation.names(), incident=incident)
        message = f"the service could not check whether this call of {invocation.method.label} is allowed"
        raise Refused(RemoteError(message, executed="no", incident=incident)) from error
    if scope is not None and invocation.deduplication is not None:
        invocation.deduplication.key = key_of(invocation.request, invocation.method.service, scope)


def _check(scope: object) -> str | None:
    if scope is None or (isinstance(scope, str) and len(scope.encode()) <= MAX_SCOPE):
        return scope
    raise ValueError(f"authorize must return a string of at most {MAX_SCOPE} bytes, or None; got {scope!r:.300}")


def _is_cancelled() -> bool:
    """Whether the call was cancelled; the service's function may also raise a `CancelledError` of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
