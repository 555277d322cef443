"""aio-pika's connection, with the fast path for hot frames.

aio-pika still does the handshake, TLS, heartbeats, topology and close. Its transport factory lets us supply the stream
protocol. This takes the hot frames of the channels that registered a fast channel, and passes every other byte to
aiormq.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable
from typing import Any, Final

from aio_pika.abc import ConnectionParameter
from aio_pika.connection import Connection
from aiormq.connection import TransportFactory
from yarl import URL

from rpcq.errors import (
    BrokerError,
    BrokerUnreachable,
    ProtocolError,
)
from rpcq.options import ConnectionOptions
from rpcq.transport.rabbitmq.faults import closed_by_broker, heeding_cancellation, is_foreign, refused
from rpcq.transport.rabbitmq.frames import (
    ACK,
    BODY,
    DELIVER,
    FRAME_OVERHEAD,
    HEADER,
    HEARTBEAT_FRAME,
    MAX_FRAME,
    NACK,
    RETURN,
    FastChannel,
    FrameReader,
)
from rpcq.transport.rabbitmq.tls import tls_context
from rpcq.url import BrokerURL

FAST_METHODS: Final = frozenset({DELIVER, RETURN, ACK, NACK})
"""Methods that the broker sends only on fast channels."""


class FrameProtocol(asyncio.StreamReaderProtocol):
    """Splits the stream between the fast channels and aiormq's reader, and notices at once when the connection ends.

    Args:
        heartbeat: seconds; if nothing is read for two heartbeats, the connection is given up. aiormq alone waits for
            three, and does not see the frames that the fast channels take.
        on_lost: called once, when the connection cannot be used any more.
        on_blocked: called with the reason when the broker takes no messages, and with None when it does again.

    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        loop: asyncio.AbstractEventLoop,
        heartbeat: float,
        on_lost: Callable[[BrokerError], None],
        on_blocked: Callable[[str | None], None],
    ) -> None:
        super().__init__(reader, loop=loop)
        self.on_writable: Callable[[], None] = lambda: None
        self.writable = True
        self.lost: BrokerError | None = None
        self._loop_ = loop
        self._heartbeat = heartbeat
        self._on_lost = on_lost
        self._frames = FrameReader(self._pass_on, self._broker_closes, on_blocked)
        self._transport_: asyncio.Transport | None = None
        self._last_read = self._last_passed = self._made = time.monotonic()
        self._watchdog = loop.call_later(heartbeat, self._watch)

    # For the owner.

    @property
    def unanswered(self) -> bool:
        """Whether the socket was opened, including the TLS handshake, and no byte came."""
        return self._transport_ is not None and self._last_read == self._made

    def tuned(self, frame_max: int) -> None:
        """Set the limit of a frame, once the handshake is over."""
        self._frames.max_payload = (frame_max or MAX_FRAME) - FRAME_OVERHEAD

    def register(self, number: int, channel: FastChannel) -> None:
        """Take the hot frames of a channel from now on; call this before the channel consumes."""
        self._frames.channels[number] = channel

    def unregister(self, number: int) -> None:
        """Forget a channel that is closed."""
        self._frames.channels.pop(number, None)

    def write(self, data: bytes) -> None:
        """Write now. Does nothing once the connection is lost: `on_lost` has been called, or will be.

        The socket may be closed already: aiormq closes it when its tasks are cancelled, as when the event loop ends.
        """
        if self.lost is None and self._transport_ is not None and not self._transport_.is_closing():
            self._transport_.write(data)

    def fail(self, cause: BrokerError) -> None:
        """Give the connection up: call `on_lost` once, write nothing more."""
        if self.lost is None:
            self.lost = cause
            self._watchdog.cancel()
            self._frames.channels.clear()
            self._on_lost(cause)

    def abort(self) -> None:
        """Close the socket; what is still in its buffer is dropped."""
        if self._transport_ is not None:
            # In CPython 3.11.2, abort() of a TLS transport that was closed twice raises AttributeError.
            with contextlib.suppress(AttributeError):
                self._transport_.abort()

    # Called by asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport: the socket is open."""
        self._transport_ = transport  # type: ignore[assignment]  # a stream protocol gets a stream transport
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Read the bytes that came."""
        self._last_read = now = time.monotonic()
        try:
            self._frames.feed(data)
        except ProtocolError as error:
            self.fail(error)
            self.abort()
            return
        if now - self._last_passed > self._heartbeat and self.lost is None:
            self._pass_on(HEARTBEAT_FRAME)  # aiormq would give up a connection on which it sees no frame

    def eof_received(self) -> bool | None:
        """Give up: the broker will send nothing more."""
        self.fail(BrokerUnreachable("the broker closed the connection"))
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up: the socket is closed."""
        why = f"the connection to the broker was lost: {exc}" if exc else "the connection to the broker was closed"
        self.fail(BrokerUnreachable(why))
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Stop writing: the socket's buffer is over its high-water mark."""
        self.writable = False
        super().pause_writing()

    def resume_writing(self) -> None:
        """Write again: the socket's buffer is below its low-water mark."""
        self.writable = True
        super().resume_writing()
        self.on_writable()

    # Internal.

    def _pass_on(self, frame: bytes) -> None:
        # aiormq silently drops frames of a channel that it does not know: a message would be lost.
        if self._frames.channels and (frame[0] in (HEADER, BODY) or frame[7:11] in FAST_METHODS):
            raise ProtocolError(f"a message or a confirm came on a channel that has none: {frame[:16]!r}")
        self._last_passed = self._last_read
        super().data_received(frame)

    def _broker_closes(self, code: int, text: str) -> None:
        self.fail(closed_by_broker(code, text))

    def _watch(self) -> None:
        idle = time.monotonic() - self._last_read
        limit = 2 * self._heartbeat
        if idle < limit:
            self._watchdog = self._loop_.call_later(limit - idle, self._watch)
        else:
            # After the event loop was blocked, it runs its timers before it reads: check again once it has read.
            self._watchdog = self._loop_.call_later(0.05, self._give_up, self._last_read)

    def _give_up(self, last_read: float) -> None:
        if self._last_read != last_read:
            self._watch()
            return
        idle = time.monotonic() - last_read
        self.fail(BrokerUnreachable(f"nothing came from the broker for {idle:.1f} s"))
        self.abort()


class _Factory(TransportFactory):
    """Opens the socket with our protocol, over TLS if the URL asks for it: aiormq leaves that to its factory."""

    def __init__(
        self,
        heartbeat: float,
        on_lost: Callable[[BrokerError], None],
        on_blocked: Callable[[str | None], None],
    ) -> None:
        self._heartbeat = heartbeat
        self._on_lost = on_lost
        self._on_blocked = on_blocked
        self.protocol: FrameProtocol | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context: ssl.SSLContext | None = None
        if url.scheme == "amqps":
            context = await kwargs["ssl_context_provider"].get_context()
        elif url.scheme != "amqp":
            raise ValueError(f"the scheme must be amqp or amqps; got {url.scheme!r}")
        assert url.host is not None  # noqa: S101 - `connect` below passes both
        assert url.port is not None  # noqa: S101
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = FrameProtocol(reader, loop, self._heartbeat, self._on_lost, self._on_blocked)
        self.protocol = protocol
        try:
            transport, _ = await loop.create_connection(lambda: protocol, url.host, url.port, ssl=context)
        except BaseException:
            protocol.fail(BrokerUnreachable("the connection could not be opened"))
            raise
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class FrameConnection(Connection):
    """An aio-pika connection that takes a transport factory."""

    PARAMETERS = (*Connection.PARAMETERS, ConnectionParameter("transport_factory", is_kwarg=True, parser=lambda it: it))

    def __del__(self) -> None:
        """Do nothing: rpcq closes what it opens. aio-pika would start a task, in any thread that collects garbage."""


async def connect(
    url: BrokerURL,
    host: str,
    port: int,
    options: ConnectionOptions,
    role: str,
    on_lost: Callable[[BrokerError], None],
    on_blocked: Callable[[str | None], None],
) -> tuple[FrameConnection, FrameProtocol]:
    """Open one connection to one host.

    Raises:
        BrokerError: it could not be opened; nothing is left open.
        ConfigurationError: a file that the URL names for TLS cannot be used.

    """
    # Read the files each time: certificates are renewed while programs run.
    context = await asyncio.to_thread(tls_context, url) if url.scheme == "amqps" else None
    factory = _Factory(options.heartbeat, on_lost, on_blocked)
    address = URL.build(
        scheme=url.scheme,
        user=url.user,
        password=url.password,
        host=host,
        port=port,
        path="/" + url.vhost,
        query={"heartbeat": str(int(options.heartbeat)), "name": f"{options.name} {role}"},
    )
    connection = FrameConnection(address, ssl_context=context, transport_factory=factory)
    try:
        with heeding_cancellation():
            await connection.connect()
    except BaseException as error:
        protocol = factory.protocol
        lost = protocol.lost if protocol is not None else None
        if protocol is not None:
            protocol.fail(BrokerUnreachable("the connection could not be opened"))
            protocol.abort()
        if is_foreign(error):
            silent = protocol is not None and protocol.unanswered
            raise refused(error, lost, url, host, port, silent=silent) from error
        raise
    assert factory.protocol is not None  # noqa: S101 - connect() made it
    return connection, factory.protocol
