"""What operators do with a broker: ask what it is, look at queues and exchanges, declare and delete them.

Each question uses its own channel, because the broker closes the channel of a question that it refuses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any, TypeVar

from aio_pika.abc import AbstractChannel

from rpcq.errors import BrokerError, BrokerUnreachable, NotFound
from rpcq.options import ConnectionOptions
from rpcq.transport.rabbitmq.browsing import Browser
from rpcq.transport.rabbitmq.connection import connect
from rpcq.transport.rabbitmq.consuming import declare
from rpcq.transport.rabbitmq.faults import heeding_cancellation, is_foreign, translate
from rpcq.transport.rabbitmq.session import Link, declare_exchange
from rpcq.url import BrokerURL
from rpcq.wire.topology import Exchange, Queue

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class QueueState:
    """A queue as it is now.

    Attributes:
        name: the queue's name.
        messages: how many messages are ready to be delivered.
        consumers: how many consumers it has.

    """

    name: str
    messages: int
    consumers: int


class Admin:
    """One connection to one node, for questions; see `open_admin`.

    Attributes:
        product: the broker's name for itself: "RabbitMQ".
        version: the version that it reports.
        host: the node's host, as in the URL.
        port: the node's port.
        is_encrypted: whether the connection uses TLS.

    """

    def __init__(self, link: Link, url: BrokerURL, host: str, port: int, on_lost: set[Callable[[], None]]) -> None:
        server = link.connection.transport.connection.server_properties  # type: ignore[union-attr]  # it is open
        self._link = link
        self._on_lost = on_lost
        self.product = _text(server.get("product"))
        self.version = _text(server.get("version"))
        self.host = host
        self.port = port
        self.is_encrypted = url.scheme == "amqps"

    async def queue(self, name: str) -> QueueState | None:
        """The state of a queue; None if it does not exist.

        Raises:
            BrokerError: the broker could not be asked, or refused.

        """

        async def ask(channel: AbstractChannel) -> QueueState:
            found = (await channel.declare_queue(name, passive=True)).declaration_result
            return QueueState(name, found.message_count or 0, found.consumer_count or 0)

        try:
            return await self._ask(ask)
        except NotFound:
            return None

    async def has_exchange(self, name: str) -> bool:
        """Whether an exchange exists.

        Raises:
            BrokerError: the broker could not be asked, or refused.

        """

        async def ask(channel: AbstractChannel) -> None:
            await channel.declare_exchange(name, passive=True)

        try:
            await self._ask(ask)
        except NotFound:
            return False
        return True

    async def declare(self, exchanges: Sequence[Exchange], queues: Sequence[Queue]) -> list[str]:
        """Declare exchanges, then queues with their bindings; returns the names of the queues.

        Raises:
            TopologyMismatch: one exists with other arguments.
            BrokerError: the broker refused.

        """
        for each in exchanges:
            await self._ask(partial(declare_exchange, exchange=each))
        return [await self._ask(partial(declare, queue=queue.for_session())) for queue in queues]

    async def delete(self, queues: Sequence[str] = (), exchanges: Sequence[str] = ()) -> None:
        """Delete queues with their messages, and exchanges; those that do not exist are skipped."""
        for queue in queues:
            await self._ask(methodcaller("queue_delete", queue))
        for exchange in exchanges:
            await self._ask(methodcaller("exchange_delete", exchange))

    async def unbind(self, queue: str, exchange: str, key: str) -> None:
        """Remove a binding of a queue; one that does not exist is skipped.

        Raises:
            BrokerError: the broker refused.

        """

        async def ask(channel: AbstractChannel) -> None:
            found = await channel.get_queue(queue, ensure=False)
            await found.unbind(exchange, key)

        try:
            await self._ask(ask)
        except NotFound:
            return

    @asynccontextmanager
    async def browse(self, queue: str) -> AsyncIterator[Browser]:
        """Take the messages of a queue; those that are not acknowledged go back to it at the end of the block.

        If the connection is lost, or the process, the broker puts them back by itself.

        Raises:
            BrokerError: the broker refused, or the connection was lost.

        """
        browser = Browser(self._link, queue)
        self._on_lost.add(browser.wake)
        try:
            yield browser
        finally:
            self._on_lost.discard(browser.wake)
            await browser.close()
        if (lost := self._link.protocol.lost) is not None:
            raise lost  # what was acknowledged last may still be there

    async def _ask(self, question: Callable[[AbstractChannel], Awaitable[T]]) -> T:
        try:
            with heeding_cancellation():
                channel, _ = await self._link.channel(confirms=False)
                answer = await question(channel)
                await channel.close()
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            raise translate(error, self._link.protocol.lost) from error
        return answer


@asynccontextmanager
async def open_admin(url: BrokerURL, options: ConnectionOptions, host: str, port: int) -> AsyncIterator[Admin]:
    """Open a connection to one node of the URL; it closes at the end of the block.

    Raises:
        BrokerError: the node cannot be reached or used; the message says why.

    """
    on_lost: set[Callable[[], None]] = set()

    def lost(_: BrokerError) -> None:
        for each in on_lost:
            each()

    try:
        async with asyncio.timeout(options.connect_timeout):
            connection, protocol = await connect(url, host, port, options, "admin", lost, lambda _: None)
    except TimeoutError as error:
        where, limit = f"{url.scheme}://{host}:{port}", options.connect_timeout
        raise BrokerUnreachable(f"cannot reach {where}: it did not answer within {limit:g} s") from error
    link = Link(connection, protocol)
    try:
        yield Admin(link, url, host, port, on_lost)
    finally:
        await link.close()


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "unknown")
