"""Publishes what a client sends until the broker has confirmed it, or the time for that is over.

published -> confirmed            -> sent
          -> returned             -> its kind says what that means (`Sending.returned`)
          -> refused, or unknown  -> published again under the same ID and key, unless it is for at most once
          -> not written          -> published when there is a connection
timeout, close                    -> an error that says what is known
"""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Final

from rpcq.errors import BrokerError, ClosedError, SendError
from rpcq.observer import Queued
from rpcq.runtime.backlog import Backlog
from rpcq.runtime.timeouts import Bucket, Timeouts
from rpcq.transport.base import Outgoing, Published, Transport
from rpcq.wire.topology import Exchange

REFUSED_PAUSE: Final = 0.1
"""Seconds before a message is published again that the broker refused: its queue elects a leader."""

_CONFIRMED: Final = Published.CONFIRMED  # a name of its own: getting at an enum's member is slow in CPython 3.11


class Sending(Outgoing):
    """A message on its way to the broker.

    Args:
        confirms: what publishes it.
        message_id: its ID.
        key: its idempotency key.
        route: the exchange and the routing key.
        properties: encoded.
        body: the body.
        is_once: whether it must not be published again when it may have arrived.

    Attributes:
        done: ends when the broker has it, or with a `SendError`.
        may_be_queued: whether the broker may have it although that was not confirmed.

    """

    __slots__ = ("confirms", "done", "id", "is_once", "key", "may_be_queued")

    def __init__(
        self,
        confirms: Confirms,
        message_id: str,
        key: str,
        route: tuple[bytes, bytes],
        properties: bytes,
        body: bytes,
        *,
        is_once: bool,
    ) -> None:
        super().__init__(*route, message_id.encode(), properties, body)
        self.confirms = confirms
        self.id = message_id
        self.key = key
        self.done: asyncio.Future[None] = confirms.loop.create_future()
        self.is_once = is_once
        self.may_be_queued = False

    def on_published(self, published: Published) -> None:
        """See `Outgoing`."""
        if published is _CONFIRMED:
            if not self.done.done():
                self.done.set_result(None)
        else:
            self.confirms.not_confirmed(self, published)

    @abstractmethod
    def returned(self) -> None:
        """No queue is bound for it: end `done`."""

    def fail(self, message: str, *, is_certain: bool) -> None:
        """End it with an error; `is_certain` says that the broker did not take it when it was published last."""
        queued = "no" if is_certain and not self.may_be_queued else "maybe"
        self.done.set_exception(SendError(message, queued=queued, message_id=self.id, key=self.key))  # type: ignore[arg-type]  # one of both

    def known(self, failed: BaseException | None) -> tuple[Queued, BaseException | None]:
        """What is known of it once its send has ended; `failed` is what its caller got."""
        if not self.done.done():  # it was never to be published
            return "no", failed
        if self.done.cancelled():  # its caller is gone, or another one of the same send has failed
            return "maybe" if self.may_be_queued else "no", failed
        error = self.done.exception()
        return error.queued if isinstance(error, SendError) else "yes", error


class Declared:
    """Exchanges that have to be there before something is published to them."""

    __slots__ = ("exchanges", "is_there", "task")

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self.exchanges = exchanges
        self.task: asyncio.Task[None] | None = None
        self.is_there = False


class _Batch:
    """The messages of one `send`, which share its timeout."""

    __slots__ = ("seconds", "sendings", "timeout")

    def __init__(self, sendings: Sequence[Sending], seconds: float) -> None:
        self.sendings = sendings
        self.seconds = seconds
        self.timeout: Bucket | asyncio.TimerHandle | None = None

    def end(self, why: str) -> None:
        """End those that are not confirmed."""
        for sending in self.sendings:
            _end(sending, why)


class Confirms:
    """What a client sends, until it is confirmed.

    Args:
        transport: the client's.

    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._waiting: Backlog[Sending] = Backlog(lambda: transport.can_publish, transport.writable, transport.publish)
        self._under_way: set[_Batch] = set()
        self._declaring: set[asyncio.Task[None]] = set()
        self._timeouts: Timeouts[_Batch]
        self._closed = False
        self.loop: asyncio.AbstractEventLoop

    def open(self) -> None:
        """From now on, in this event loop."""
        self.loop = asyncio.get_running_loop()
        self._timeouts = Timeouts(self.loop, _time_out)

    async def close(self) -> None:
        """End every send that is under way."""
        self._closed = True
        for task in self._declaring:
            task.cancel()
        await self._waiting.close()
        self._timeouts.close()
        for batch in self._under_way:
            batch.end("the client was closed")

    async def send(
        self, sendings: Sequence[Sending], seconds: float, declared: Declared, *, in_order: bool = False
    ) -> None:
        """Publish messages, and wait until the broker has all of them.

        Args:
            sendings: the messages.
            seconds: how long that may take.
            declared: the exchanges that they go to.
            in_order: publish each one only when the broker has the one before: one that it refuses, and takes when it
                is published again, would be overtaken.

        Raises:
            SendError: of the first message that failed. Its `queued` is about that message; others may be in a queue.
            BrokerError: the exchanges cannot be declared.
            ClosedError: the client was closed meanwhile.

        """
        until = time.monotonic() + seconds
        if not declared.is_there:
            try:
                async with asyncio.timeout(seconds):
                    await self._declare(declared)
            except TimeoutError as error:
                msg = f"there was no connection to the broker within {seconds:g} s"
                raise SendError(msg, queued="no") from error
        batch = _Batch(sendings, seconds)
        self._under_way.add(batch)
        self._timeouts.set(batch, until, time.monotonic())
        try:
            for sending in sendings:
                self._publish(sending)
                if in_order:
                    await sending.done
            for sending in sendings:
                await sending.done
        except BaseException:
            for sending in sendings:
                if sending.done.done() and not sending.done.cancelled():
                    sending.done.exception()  # the first one is raised; the others count as seen
                else:
                    sending.may_be_queued = sending.may_be_queued or not self.waits(sending)
                    sending.done.cancel()
                self._waiting.discard(sending)
            raise
        finally:
            self._timeouts.cancel(batch)
            self._under_way.discard(batch)

    def not_confirmed(self, sending: Sending, published: Published) -> None:
        """The broker did not confirm a message: publish it again, or end it."""
        if sending.done.done():
            return
        match published:
            case Published.RETURNED:
                sending.returned()
            case Published.TOO_LARGE:
                msg = f"the body is {len(sending.body)} bytes of JSON, more than the broker takes"
                sending.fail(msg, is_certain=True)
            case Published.REFUSED | Published.UNKNOWN if sending.is_once:
                sending.may_be_queued = True
                sending.fail("the broker did not confirm it, and it runs at most once", is_certain=False)
            case Published.REFUSED:
                sending.may_be_queued = True
                self.loop.call_later(REFUSED_PAUSE, self._publish_again, sending)
            case Published.UNKNOWN:
                sending.may_be_queued = True
                self._waiting.add(sending)  # again under the same ID and key
            case _:
                self._waiting.add(sending)

    def waits(self, sending: Sending) -> bool:
        """Whether a message waits to be handed to the transport."""
        return sending in self._waiting.items

    def _publish_again(self, sending: Sending) -> None:
        if not sending.done.done():
            self._publish(sending)

    def _publish(self, sending: Sending) -> None:
        if self._waiting.items or not self._transport.can_publish:
            self._waiting.add(sending)
        else:
            self._transport.publish(sending)

    async def _declare(self, declared: Declared) -> None:
        """Wait until exchanges are declared: publishing to one that does not exist ends the session."""
        while declared.task is None or not declared.task.done() or not _succeeded(declared.task):
            if self._closed:
                raise ClosedError("this client is closed")
            if declared.task is None or declared.task.done():
                declared.task = self.loop.create_task(self._transport.declare(declared.exchanges))
                self._declaring.add(declared.task)
                declared.task.add_done_callback(self._declaring.discard)
            await asyncio.wait([declared.task])
            error = None if declared.task.cancelled() else declared.task.exception()
            if error is not None and (not isinstance(error, BrokerError) or error.permanent):
                raise error
        declared.is_there = True


def _succeeded(task: asyncio.Task[None]) -> bool:
    return not task.cancelled() and task.exception() is None


def _end(sending: Sending, why: str) -> None:
    if sending.done.done():
        return
    queued = "maybe" if sending.may_be_queued or not sending.confirms.waits(sending) else "no"
    fix = f"; send it again with idempotency_key={sending.key!r}" if queued == "maybe" else ""
    sending.done.set_exception(SendError(f"{why}{fix}", queued=queued, message_id=sending.id, key=sending.key))  # type: ignore[arg-type]  # one of both


def _time_out(batch: _Batch) -> None:
    batch.end(f"the broker did not confirm it within {batch.seconds:g} s")
