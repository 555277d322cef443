"""The client's side of control messages: it asks, and collects the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import cache
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from rpcq import logs
from rpcq.transport.base import Message, Published, Transport
from rpcq.validation.bounds import NotRead, first_error
from rpcq.validation.schemas import Codec, make_codec
from rpcq.wire import control
from rpcq.wire.topology import EVERY_SERVICE, Topology

T = TypeVar("T")

PING_TIMEOUT: Final = 1.0
"""Seconds that a worker has to answer a ping."""

log = logs.get_logger("rpcq.control")


class Control:
    """The client's side: sends control messages, and collects the answers.

    Args:
        transport: sends the control messages.
        topology: has the name of the control exchange.
        ready: waits until the client has a reply queue and may publish; returns the queue's name.
        next_id: makes correlation IDs.

    """

    def __init__(
        self,
        transport: Transport,
        topology: Topology,
        ready: Callable[[], Awaitable[bytes]],
        next_id: Callable[[], bytes],
    ) -> None:
        self._transport = transport
        self._exchange = topology.control.name.encode()
        self._ready = ready
        self._next_id = next_id
        self._questions: dict[bytes, asyncio.Queue[bytes | None]] = {}  # the answers to each, by correlation ID
        self._waiting: set[asyncio.Task[bytes]] = set()
        self._seldom = logs.Seldom(log)

    def cancel(self, service: bytes, correlation_id: bytes, reply_to: bytes, deadline_ms: int) -> None:
        """Send to all workers of a service that the caller of this request is gone."""
        properties = control.encode_control(control.CANCEL, correlation_id, reply_to, deadline_ms)
        self._transport.publish(Message(self._exchange, service, correlation_id, properties, b"", lambda _: None))

    def answered(self, correlation_id: bytes, body: bytes | None) -> bool:
        """Take an answer from the reply queue; return False if the message is no answer to a question."""
        answers = self._questions.get(correlation_id) if self._questions else None
        if answers is None:
            return False
        if body is None:
            self._seldom.warning("answer of a worker dropped: it is larger than this client's max_body")
        else:
            answers.put_nowait(body)
        return True

    def read(self, kind: type[T], answer: bytes) -> T | None:
        """Validate an answer; if it does not fit, log that and return None: answers of other workers may fit."""
        try:
            found: T = _codec(kind).read(answer)  # type: ignore[arg-type]  # a class is hashable
        except (ValidationError, NotRead) as error:
            self._seldom.warning("answer of a worker dropped", cause=first_error(error), expected=kind.__name__)
            return None
        return found

    def close(self) -> None:
        """End all questions, also those that wait to be asked."""
        for answers in self._questions.values():
            answers.put_nowait(None)
        for waiting in self._waiting:
            waiting.cancel()

    async def ask(self, kind: bytes, service: str | None, wait: float) -> AsyncGenerator[bytes, None]:
        """Ask all workers of a service (None: every worker), and yield their answers as they come in `wait` seconds.

        It ends at once if there is no worker.
        """
        until = time.monotonic() + wait
        correlation_id = self._next_id()
        answers: asyncio.Queue[bytes | None] = asyncio.Queue()

        def on_published(published: Published) -> None:
            if published is not Published.CONFIRMED:
                answers.put_nowait(None)

        self._questions[correlation_id] = answers
        try:
            reply_to = await self._reply_to(wait)
            if reply_to is None:
                return
            key = EVERY_SERVICE if service is None else service
            properties = control.encode_control(kind, correlation_id, reply_to)
            self._transport.publish(
                Message(self._exchange, key.encode(), correlation_id, properties, b"", on_published)
            )
            while True:
                async with asyncio.timeout(until - time.monotonic()):
                    answer = await answers.get()
                if answer is None:
                    return
                yield answer
        except TimeoutError:
            return
        finally:
            del self._questions[correlation_id]

    async def _reply_to(self, wait: float) -> bytes | None:
        """The client's reply queue; None if the client cannot ask within `wait` seconds, or is closed before."""

        async def get_ready() -> bytes:
            return await self._ready()

        waiting = asyncio.get_running_loop().create_task(get_ready())
        self._waiting.add(waiting)
        try:
            await asyncio.wait([waiting], timeout=wait)
            return waiting.result() if waiting.done() and not waiting.cancelled() else None
        finally:
            self._waiting.discard(waiting)
            waiting.cancel()


@cache
def _codec(kind: type[Any]) -> Codec:
    return make_codec(kind, kind.__name__, written=False)
