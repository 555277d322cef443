"""One connection to RabbitMQ that is opened again whenever it is lost.

A session is: connect, declare, set QoS, consume, report that it is up. It ends as a whole when the broker closes its
connection or one of its channels, or cancels a consumer; the next session starts after a pause. Nothing of an old
session is kept for a new one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from aio_pika.abc import AbstractChannel

from rpcq import logs
from rpcq.errors import (
    AccessRefused,
    BrokerError,
    BrokerUnreachable,
    ClosedError,
    ConfigurationError,
    NotFound,
    PreconditionFailed,
    TopologyMismatch,
)
from rpcq.options import ConnectionOptions
from rpcq.runtime.backoff import Backoff, full_jitter
from rpcq.transport.base import Listener
from rpcq.transport.rabbitmq.connection import FrameConnection, FrameProtocol, connect
from rpcq.transport.rabbitmq.faults import heeding_cancellation, is_foreign, translate
from rpcq.url import BrokerURL
from rpcq.wire.topology import Exchange

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0
PERMANENT_PAUSE: Final = 15.0
"""Seconds: the limits of the pause before the first attempt, before any later one, and after an error that somebody has
to fix."""

CLOSE_TIMEOUT: Final = 2.0
"""Seconds that an orderly close may take; aiormq would wait three heartbeats under back-pressure."""

log = logs.get_logger("rpcq.rabbitmq")


@contextmanager
def naming_mismatch(what: str) -> Iterator[None]:
    """Turn a precondition failure in the block into an error that names what was declared.

    Args:
        what: what the block declares.

    Raises:
        TopologyMismatch: it exists with other arguments.

    """
    try:
        yield
    except Exception as error:
        ours = translate(error, None)
        if isinstance(ours, PreconditionFailed):
            msg = f"{what} exists with other arguments than rpcq's; delete or change it: {ours}"
            raise TopologyMismatch(msg) from error
        raise


async def declare_exchange(channel: AbstractChannel, exchange: Exchange) -> None:
    """Declare an exchange. If that fails, the broker closes the channel.

    Raises:
        TopologyMismatch: it exists with another type or other arguments.

    """
    with naming_mismatch(f"the exchange {exchange.name!r}"):
        declared = await channel.declare_exchange(
            exchange.name, exchange.type, durable=True, internal=exchange.internal, arguments=exchange.arguments
        )
    for source, key in exchange.bindings:
        await declared.bind(source, key)


class Link:
    """The connection of one session, and what was opened on it."""

    def __init__(self, connection: FrameConnection, protocol: FrameProtocol) -> None:
        self.connection = connection
        self.protocol = protocol
        self.frame_max: int = connection.transport.connection.connection_tune.frame_max  # type: ignore[union-attr]
        protocol.tuned(self.frame_max)

    async def channel(self, *, confirms: bool) -> tuple[AbstractChannel, int]:
        """Open a channel; returns it and its number."""
        channel = self.connection.channel(publisher_confirms=confirms)
        await channel.initialize()
        return channel, (await channel.get_underlay_channel()).number

    async def ensure_exchanges(self, exchanges: Sequence[Exchange]) -> None:
        """Declare the exchanges that do not exist: a user may be allowed to use an exchange but not to declare it.

        RabbitMQ 4.3 does not even let a user without permissions on an exchange ask whether it exists. The exchange is
        then used as it is.
        """
        channel, _ = await self.channel(confirms=False)
        may_bind = True
        for exchange in exchanges:
            is_there = False
            try:
                found = await channel.declare_exchange(exchange.name, exchange.type, passive=True)
                is_there = True
                for source, key in exchange.bindings if may_bind else ():
                    await found.bind(source, key)  # the program that declared it may have died before it bound it
            except Exception as error:
                refused = translate(error, self.protocol.lost)
                if not isinstance(refused, AccessRefused | NotFound):
                    raise
                may_bind = may_bind and not is_there  # each refusal costs a channel: the others are not bound either
                channel, _ = await self.channel(confirms=False)  # the broker closed the other one when it refused
                if isinstance(refused, NotFound):
                    await self._declare_missing(channel, exchange)
        await channel.close()

    async def _declare_missing(self, channel: AbstractChannel, exchange: Exchange) -> None:
        try:
            await declare_exchange(channel, exchange)
        except Exception as error:
            refused = translate(error, self.protocol.lost)
            if not isinstance(refused, AccessRefused):
                raise
            msg = f"{refused}; {exchange.name!r} does not exist: a user who may declare it must run 'rpcq setup'"
            raise AccessRefused(msg) from error

    async def close(self) -> None:
        """Close the connection in an orderly way, or abort it if that fails or takes too long."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                with heeding_cancellation():
                    await self.connection.close()
        except (Exception, asyncio.CancelledError) as error:
            if not is_foreign(error):
                raise
            log.debug("a connection did not close in an orderly way", cause=repr(error))
        finally:
            self.protocol.fail(BrokerUnreachable("the connection was closed"))
            self.protocol.abort()


class Session:
    """A connection that is opened again whenever it is lost. Subclasses define what is set up on it."""

    role = ""

    def __init__(
        self, url: BrokerURL, options: ConnectionOptions, exchanges: Sequence[Exchange], listener: Listener
    ) -> None:
        self._url = url
        self._options = options
        self._exchanges = exchanges
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._link: Link | None = None
        self._up = False
        self._hosts = deque(url.hosts)
        self._reconnecting: asyncio.Task[None] | None = None
        self._closed = False
        self._up_since = 0.0
        self._backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        self._closers: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Open the first session, and keep one open from then on."""
        await self._establish()

    async def close(self) -> None:
        """Close the session for good."""
        self._closed = True
        reconnecting, self._reconnecting = self._reconnecting, None
        if reconnecting is not None:
            reconnecting.cancel()
            await asyncio.gather(reconnecting, return_exceptions=True)
        self._up = False
        link, self._link = self._link, None
        if link is not None:
            await link.close()
        if self._closers:
            await asyncio.wait(self._closers)

    async def _set_up(self, link: Link) -> None:
        raise NotImplementedError

    def _on_up(self) -> None:
        raise NotImplementedError

    def _on_down(self, cause: BrokerError) -> None:
        raise NotImplementedError

    def _on_blocked(self, reason: str | None) -> None:
        """Do nothing: the broker blocks only connections that publish."""

    async def _establish(self) -> None:
        """Try each host once."""
        for attempt in range(len(self._hosts)):
            host, port = self._hosts[0]
            try:
                async with asyncio.timeout(self._options.connect_timeout):
                    await self._establish_at(host, port)
            except BrokerError as error:
                failure = error
            except TimeoutError:
                failure = BrokerUnreachable(
                    f"cannot reach {self._url.scheme}://{host}:{port}: "
                    f"it did not answer within {self._options.connect_timeout:g} s"
                )
            else:
                return
            self._hosts.rotate(-1)
            if attempt + 1 == len(self._hosts):
                raise failure

    async def _establish_at(self, host: str, port: int) -> None:
        link: Link | None = None

        def on_lost(cause: BrokerError) -> None:
            if link is not None and link is self._link:
                self._on_lost(link, cause)

        def on_blocked(reason: str | None) -> None:
            if link is not None and link is self._link:
                self._on_blocked(reason)

        connection, protocol = await connect(self._url, host, port, self._options, self.role, on_lost, on_blocked)
        link = Link(connection, protocol)
        try:
            with heeding_cancellation():
                await link.ensure_exchanges(self._exchanges)
                await self._set_up(link)
                self._check_wanted(protocol)
        except BaseException as error:
            foreign = is_foreign(error) and not isinstance(error, ClosedError)
            cause = translate(error, protocol.lost) if foreign else BrokerUnreachable("closed while it was opened")
            self._close_later(link)
            self._on_down(cause)  # the session may have delivered messages already
            if foreign:
                raise cause from error
            raise
        self._link = link
        self._up = True
        self._up_since = self._loop.time()
        self._on_up()

    def _check_wanted(self, protocol: FrameProtocol) -> None:
        if protocol.lost is not None:
            raise protocol.lost
        if self._closed:
            raise ClosedError("closed while it was opened")

    def _on_lost(self, link: Link, cause: BrokerError) -> None:
        self._link = None
        self._up = False
        log.warning("session down", role=self.role, cause=str(cause))
        self._close_later(link)
        self._hosts.rotate(-1)  # try the next node first: this one may be down
        self._reconnecting = self._loop.create_task(self._come_back())
        self._on_down(cause)

    def _close_later(self, link: Link) -> None:
        closer = self._loop.create_task(link.close())
        self._closers.add(closer)
        closer.add_done_callback(self._closers.discard)

    async def _come_back(self) -> None:
        if self._loop.time() - self._up_since > LONGEST_PAUSE:  # a session that was up more briefly: pause longer
            self._backoff.reset()
        pause = self._backoff.jittered()
        while True:
            await asyncio.sleep(pause)
            try:
                await self._establish()
            except (BrokerError, ConfigurationError) as error:
                # ConfigurationError: a file for TLS is gone, or cannot be used any more.
                permanent = not isinstance(error, BrokerError) or error.permanent
                pause = self._backoff.jittered()
                if permanent:
                    pause = full_jitter(PERMANENT_PAUSE)
                write = log.error if permanent else log.warning
                write("cannot come back yet", role=self.role, cause=str(error), error=type(error).__name__)
            except Exception:
                pause = full_jitter(PERMANENT_PAUSE)  # a bug in rpcq; keep retrying
                log.exception("cannot come back yet", role=self.role)
            else:
                log.info("session up again", role=self.role)
                return
