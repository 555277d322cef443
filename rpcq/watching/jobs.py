"""A job that its sender watches."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import pydantic

from rpcq.errors import InvalidReply, NoResult
from rpcq.options import check_seconds
from rpcq.validation.bounds import NotRead, first_error
from rpcq.watching.watches import Watch
from rpcq.wire.jobs import Job
from rpcq.wire.replies import Reply, check_readable, read_body
from rpcq.wire.watching import Progress

T = TypeVar("T")

Read = Callable[[bytes], Any]
"""Reads a result from JSON."""

_UNSET: Final[Any] = None


@dataclass(frozen=True, slots=True)
class WatchedJob(Job, Generic[T]):
    """A job that its sender watches: `client.with_options(watch=True).send(...)` returns one.

    It is heard of over the connection of the client that sent it, and as long as that connection lasts. Use it in the
    event loop of the client; any number of tasks may read its progress and wait for its result. The job goes on
    also if nobody listens.

    Attributes:
        id: as for `Job`; so are `service`, `name`, `key`, `due` and `priority`.

    """

    _watch: Watch = field(default=_UNSET, repr=False, compare=False, kw_only=True)
    _read: Read | None = field(default=None, repr=False, compare=False, kw_only=True)

    async def result(self, *, timeout: float) -> T:  # noqa: ASYNC109 - as `call` has it
        """Wait until the job is done, and return what its handler returned.

        It may be asked again, also after a `TimeoutError`. If this is cancelled, the job goes on.

        Args:
            timeout: seconds to wait, above 0. A job of which nothing more is told ends no wait: for example, one that
                the broker buries because its workers were lost again and again.

        Returns:
            The result: validated as the job's function or contract annotates it, or as `returns=` in the options says;
            otherwise plain JSON types.

        Raises:
            TimeoutError: it had not ended by then, and goes on.
            JobFailed: it is dead, or the connection was lost over which it was watched; `executed` says what is known.
            NoResult: it is done, and its result cannot be had.
            ClosedError: the client was closed before it ended.
            ConfigurationError: the timeout is not valid.
            UsageError: this is another event loop than the client's.

        """
        check_seconds("timeout", timeout)
        return self._value(await self._watch.end(timeout))

    async def progress(self, *, timeout: float | None = None) -> AsyncIterator[Progress]:  # noqa: ASYNC109 - the same
        """How far the job is: `async for step in job.progress()`, until it has ended.

        The first step comes at once if something is known. A reader who is slow gets the newest step, and misses those
        between. It ends without an error, however the job ended: `result` says how.

        Args:
            timeout: seconds until it gives up, above 0; None for no limit.

        Raises:
            TimeoutError: the job had not ended by then, and goes on.
            ConfigurationError: the timeout is not valid.
            UsageError: this is another event loop than the client's.

        """
        until = None
        if timeout is not None:
            check_seconds("timeout", timeout)
            until = time.monotonic() + timeout
        version = 0
        while found := await self._watch.after(version, None if until is None else until - time.monotonic()):
            version, step = found
            yield step

    def _value(self, reply: Reply) -> T:
        label = f"{self.service}.{self.name}"
        try:
            if self._read is None or reply.body is None:
                value: T = read_body(reply)
            else:
                check_readable(reply)
                value = self._read(reply.body)
        except InvalidReply as error:
            raise NoResult(error.message, reason="unreadable", job_id=self.id) from None
        except (pydantic.ValidationError, NotRead) as error:
            msg = f"{label} gave what does not fit: {first_error(error)}"
            raise NoResult(msg, reason="unreadable", job_id=self.id) from error
        except Exception as error:  # what validators of the sender's own type raise
            msg = f"the result of {label} could not be read: {error!r}"
            raise NoResult(msg, reason="unreadable", job_id=self.id) from error
        return value
