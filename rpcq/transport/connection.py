"""The socket shell of the fast lane: an aio-pika connection that carries it, and the border to aio-pika's errors.

Handshake, TLS, heartbeats, topology and close stay aio-pika's. Its transport factory lets us supply the stream
protocol, which takes the hot frames of the channels that registered a lane and feeds every other byte to aiormq.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import aiormq.exceptions
from aio_pika.abc import ConnectionParameter
from aio_pika.connection import Connection
from aiormq.connection import TransportFactory
from yarl import URL

from rpcq.errors import (
    AccessRefused,
    AuthenticationFailed,
    BrokerError,
    BrokerUnreachable,
    ConfigurationError,
    NotFound,
    PreconditionFailed,
    ProtocolError,
    ResourceLocked,
    VhostNotFound,
)
from rpcq.settings import ConnectionOptions
from rpcq.transport.lane import (
    ACK,
    BODY,
    DELIVER,
    FRAME_OVERHEAD,
    HEADER,
    HEARTBEAT_FRAME,
    MAX_FRAME,
    NACK,
    RETURN,
    FrameReader,
    Lane,
)
from rpcq.url import BrokerURL

BY_REPLY_CODE: dict[int, type[BrokerError]] = {
    403: AccessRefused,
    404: NotFound,
    405: ResourceLocked,
    406: PreconditionFailed,
    501: ProtocolError,
    502: ProtocolError,
    503: ProtocolError,
    504: ProtocolError,
    505: ProtocolError,
    530: VhostNotFound,
}
TOO_LARGE: Final = re.compile(r"message size \d+ is larger than (?:configured )?max size (\d+)")
"""How RabbitMQ says that a message is larger than it takes; the code alone does not tell."""

BY_CHANNEL_ERROR: dict[type[BaseException], type[BrokerError]] = {
    aiormq.exceptions.ChannelAccessRefused: AccessRefused,
    aiormq.exceptions.ChannelNotFoundEntity: NotFound,
    aiormq.exceptions.ChannelLockedResource: ResourceLocked,
    aiormq.exceptions.ChannelPreconditionFailed: PreconditionFailed,
}

OF_LANES: Final = frozenset({DELIVER, RETURN, ACK, NACK})
"""Methods that only a channel with a lane is sent."""

UNKNOWN_ISSUER: Final = frozenset({2, 18, 19, 20, 21})
"""OpenSSL's codes for a certificate whose CA is not among those that are trusted."""

OWN_CERTIFICATE: Final = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE", "ACCESS_DENIED", "DECRYPT_ERROR")
"""What an alert has in its name where a broker wants another client certificate, or one at all."""

NOT_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL")
"""OpenSSL's reasons where the peer answers a handshake with something else."""


class LaneProtocol(asyncio.StreamReaderProtocol):
    """Splits the stream between the lanes and aiormq's reader, and notices at once when the connection ends.

    Args:
        heartbeat: seconds; with nothing read for two of them, the connection is given up. aiormq alone takes three,
            and misses what the lanes swallow.
        on_lost: the connection cannot be used any more; called once.
        on_blocked: the broker takes no messages for now: its reason, or None when it does again.

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

    # What the owner asks.

    @property
    def unanswered(self) -> bool:
        """Whether the socket was opened, its TLS handshake included, and nothing came."""
        return self._transport_ is not None and self._last_read == self._made

    def tuned(self, frame_max: int) -> None:
        """The handshake is over: frames have this limit."""
        self._frames.max_payload = (frame_max or MAX_FRAME) - FRAME_OVERHEAD

    def register(self, channel: int, lane: Lane) -> None:
        """Take the hot frames of a channel; before it consumes."""
        self._frames.lanes[channel] = lane

    def unregister(self, channel: int) -> None:
        """The channel is closed."""
        self._frames.lanes.pop(channel, None)

    def write(self, data: bytes) -> None:
        """Write now. Dropped once the connection is lost: its loss has been told, or is about to be.

        aiormq closes the socket by itself when its tasks are cancelled, as they are when the event loop ends.
        """
        if self.lost is None and self._transport_ is not None and not self._transport_.is_closing():
            self._transport_.write(data)

    def fail(self, cause: BrokerError) -> None:
        """Give the connection up: tell the owner once, write nothing more."""
        if self.lost is None:
            self.lost = cause
            self._watchdog.cancel()
            self._frames.lanes.clear()
            self._on_lost(cause)

    def abort(self) -> None:
        """Close the socket, whatever is still in its buffer."""
        if self._transport_ is not None:
            # In CPython 3.11.2, a TLS transport that was closed twice has nothing left to abort, and raises over that.
            with contextlib.suppress(AttributeError):
                self._transport_.abort()

    # What asyncio tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        self._transport_ = transport  # type: ignore[assignment]  # a stream protocol gets a stream transport
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """The socket brought something."""
        self._last_read = now = time.monotonic()
        try:
            self._frames.feed(data)
        except ProtocolError as error:
            self.fail(error)
            self.abort()
            return
        if now - self._last_passed > self._heartbeat and self.lost is None:
            self._pass_on(HEARTBEAT_FRAME)  # aiormq gives up a connection on which it sees no frame

    def eof_received(self) -> bool | None:
        """The broker will send nothing more."""
        self.fail(BrokerUnreachable("the broker closed the connection"))
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed."""
        why = f"the connection to the broker was lost: {exc}" if exc else "the connection to the broker was closed"
        self.fail(BrokerUnreachable(why))
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The socket's buffer is over its high-water mark."""
        self.writable = False
        super().pause_writing()

    def resume_writing(self) -> None:
        """The socket's buffer is below its low-water mark."""
        self.writable = True
        super().resume_writing()
        self.on_writable()

    # Inside.

    def _pass_on(self, frame: bytes) -> None:
        # aiormq drops what is for a channel that it does not know: a message would be lost without a word.
        if self._frames.lanes and (frame[0] in (HEADER, BODY) or frame[7:11] in OF_LANES):
            raise ProtocolError(f"a message or a confirm came where none is to come: {frame[:16]!r}")
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
            # A loop that was itself blocked runs its timers before it reads: look again once it has read.
            self._watchdog = self._loop_.call_later(0.05, self._give_up, self._last_read)

    def _give_up(self, last_read: float) -> None:
        if self._last_read != last_read:
            self._watch()
            return
        idle = time.monotonic() - last_read
        self.fail(BrokerUnreachable(f"nothing came from the broker for {idle:.1f} s"))
        self.abort()


class _Factory(TransportFactory):
    """Opens the socket with our protocol, over TLS where the URL says so: aiormq leaves that to its factory."""

    def __init__(
        self,
        heartbeat: float,
        on_lost: Callable[[BrokerError], None],
        on_blocked: Callable[[str | None], None],
    ) -> None:
        self._heartbeat = heartbeat
        self._on_lost = on_lost
        self._on_blocked = on_blocked
        self.protocol: LaneProtocol | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context: ssl.SSLContext | None = None
        if url.scheme == "amqps":
            context = await kwargs["ssl_context_provider"].get_context()
        elif url.scheme != "amqp":
            raise ValueError(f"no transport for the scheme {url.scheme!r}")
        assert url.host is not None  # noqa: S101 - `connect` below gives both
        assert url.port is not None  # noqa: S101
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = LaneProtocol(reader, loop, self._heartbeat, self._on_lost, self._on_blocked)
        self.protocol = protocol
        try:
            transport, _ = await loop.create_connection(lambda: protocol, url.host, url.port, ssl=context)
        except BaseException:
            protocol.fail(BrokerUnreachable("the connection could not be opened"))
            raise
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class LaneConnection(Connection):
    """An aio-pika connection that may be given a transport factory."""

    PARAMETERS = (*Connection.PARAMETERS, ConnectionParameter("transport_factory", is_kwarg=True, parser=lambda it: it))

    def __del__(self) -> None:
        """Nothing: what was opened is closed. aio-pika would start a task, in whatever thread collects the garbage."""


async def connect(
    url: BrokerURL,
    host: str,
    port: int,
    options: ConnectionOptions,
    role: str,
    on_lost: Callable[[BrokerError], None],
    on_blocked: Callable[[str | None], None],
) -> tuple[LaneConnection, LaneProtocol]:
    """Open one connection to one host.

    Raises:
        BrokerError: it could not be opened; what was opened is closed.
        ConfigurationError: a file that the URL names for TLS cannot be used.

    """
    # Read anew each time: certificates are renewed while programs run.
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
    connection = LaneConnection(address, ssl_context=context, transport_factory=factory)
    try:
        with heeding_cancellation():
            await connection.connect()
    except BaseException as error:
        protocol = factory.protocol
        told = protocol.lost if protocol is not None else None
        if protocol is not None:
            protocol.fail(BrokerUnreachable("the connection could not be opened"))
            protocol.abort()
        if is_foreign(error):
            silent = protocol is not None and protocol.unanswered
            raise _refused(error, told, url, host, port, silent=silent) from error
        raise
    assert factory.protocol is not None  # noqa: S101 - connect() made it
    return connection, factory.protocol


def tls_context(url: BrokerURL) -> ssl.SSLContext:
    """Whom to trust, and how to show who we are. Blocks: it reads files.

    Raises:
        ConfigurationError: one of the files cannot be used; the message names it.

    """
    files = dict(url.tls)
    for name, path in files.items():
        _check_readable(name, path)
    cafile, certfile, keyfile = files.get("cafile"), files.get("certfile"), files.get("keyfile")
    if cafile is not None:
        _check_certificates("cafile", cafile)
    context = ssl.create_default_context(cafile=cafile, capath=files.get("capath"))
    if certfile is not None:
        _check_certificates("certfile", certfile)
        which = ("certfile", certfile) if keyfile is None else ("keyfile", keyfile)

        def has_passphrase() -> str:  # OpenSSL would ask at the terminal, and wait
            raise _unusable(*which, "its key has a passphrase, which nobody is here to type; give one without")

        try:
            context.load_cert_chain(certfile, keyfile, has_passphrase)
        except ssl.SSLError as error:
            why = f"it does not hold the private key, in PEM, of the certificate ({error.reason or error})"
            if keyfile is None:
                why += "; name the file that does with keyfile"
            raise _unusable(*which, why) from error
    return context


def _check_readable(name: str, path: str) -> None:
    if not path:
        raise _unusable(name, path, "it is empty")
    try:
        if name == "capath":
            next(Path(path).iterdir(), None)
        else:
            Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise _unusable(name, path, f"it cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _check_certificates(name: str, path: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise _unusable(name, path, f"it holds no certificate in PEM ({error.reason or error})") from error


def _unusable(name: str, path: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"the broker's URL has {name}={path!r}, which cannot be used: {why}")


def is_foreign(error: BaseException) -> bool:
    """Whether it is an error of the building blocks, and so about the broker.

    That is every exception: aiormq rejects what waits with a bare `Exception`, and with a `CancelledError` where
    nobody asked this task to cancel.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return isinstance(error, Exception)


@contextlib.contextmanager
def heeding_cancellation() -> Iterator[None]:
    """Let a cancellation of this task end the block, whatever becomes of it in there.

    aiormq swallows one that comes while it closes a channel, and makes other errors of some.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - whoever awaits aiormq is one
    before = task.cancelling()
    try:
        yield
    except Exception as error:
        if task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise
    if task.cancelling() > before:
        raise asyncio.CancelledError


class MessageTooLarge(BrokerUnreachable):
    """The broker closed a channel over a message with more bytes than the `most` that it takes."""

    def __init__(self, message: str, most: int = 0) -> None:
        super().__init__(message)
        self.most = most


def closed_by_broker(code: int, text: str) -> BrokerError:
    """What a `connection.close` or `channel.close` of the broker means to users."""
    said = f"the broker closed: {code} {text}"
    if code == 406 and (found := TOO_LARGE.search(text)) is not None:
        return MessageTooLarge(f"{said}: raise its max_message_size, or lower max_body", int(found[1]))
    return BY_REPLY_CODE.get(code, BrokerUnreachable)(said)


def translate(error: BaseException, told: BrokerError | None) -> BrokerError:
    """An error of aio-pika's or aiormq's as ours; `told` is what the connection itself saw, and says more."""
    if isinstance(error, BrokerError):
        return error
    if told is not None:
        return told  # aiormq reports whatever waited on the connection as refused
    for kind, ours in BY_CHANNEL_ERROR.items():
        if isinstance(error, kind):
            return ours(f"the broker refused: {error}")
    return BrokerUnreachable(f"the connection to the broker failed: {error!r}")


def _refused(
    error: BaseException, told: BrokerError | None, url: BrokerURL, host: str, port: int, *, silent: bool
) -> BrokerError:
    where = f"{url.scheme}://{host}:{port}"
    # Looked at as the frame passed: aiormq reports a missing vhost as an invalid frame.
    if isinstance(told, AccessRefused) or isinstance(error, aiormq.exceptions.AuthenticationError):
        hint = "; RabbitMQ lets guest in from its own machine only" if url.user == "guest" else ""
        return AuthenticationFailed(f"{where} refused the user {url.user!r} or its password{hint}")
    if isinstance(told, VhostNotFound):
        return VhostNotFound(f"{where} has no vhost {url.vhost!r}, or {url.user!r} may not enter it: {told}")
    if isinstance(told, ProtocolError):
        return ProtocolError(f"{where} is not an AMQP 0-9-1 broker, or wants TLS: {told}")
    # In TLS 1.3 the client's handshake is over before the broker looks at the client's certificate. Its refusal comes
    # with what is read next, or never, where its reset of the connection is seen first.
    for cause in (error, error.__cause__):
        if isinstance(cause, ssl.SSLError):
            return _tls_refused(cause, url, where)
    why = str(told) if told is not None and not isinstance(error, OSError) else (str(error) or repr(error))
    if url.scheme == "amqps" and (silent or isinstance(error, ConnectionResetError)):
        why = f"it closed the connection at the TLS handshake; {_own_certificate(url)} ({why})"
    return BrokerUnreachable(f"cannot reach {where}: {why}")


def _tls_refused(error: ssl.SSLError, url: BrokerURL, where: str) -> BrokerUnreachable:
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "; name its CA with cafile" if error.verify_code in UNKNOWN_ISSUER else ""
        return BrokerUnreachable(f"the certificate of {where} was refused: {error.verify_message}{hint}")
    why = error.reason or str(error)
    if "_ALERT_" in why and any(sign in why for sign in OWN_CERTIFICATE):
        why = f"{why}; {_own_certificate(url)}"
    elif any(sign in why for sign in NOT_TLS):
        why = f"{why}; what listens there may not speak TLS"
    return BrokerUnreachable(f"TLS with {where} failed: {why}")


def _own_certificate(url: BrokerURL) -> str:
    if certfile := dict(url.tls).get("certfile"):
        return f"it may not accept the client certificate of certfile={certfile!r}"
    return "it may want a client certificate: name one with certfile and keyfile"
