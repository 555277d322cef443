"""The border to aio-pika: turns its errors, and those of aiormq, into errors of rpcq."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import Iterator
from typing import Final

import aiormq.exceptions

from rpcq.errors import (
    AccessRefused,
    AuthenticationFailed,
    BrokerError,
    BrokerUnreachable,
    NotFound,
    PreconditionFailed,
    ProtocolError,
    ResourceLocked,
    VhostNotFound,
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
"""RabbitMQ's text for a message that is larger than it takes; the reply code alone does not show it."""

BY_CHANNEL_ERROR: dict[type[BaseException], type[BrokerError]] = {
    aiormq.exceptions.ChannelAccessRefused: AccessRefused,
    aiormq.exceptions.ChannelNotFoundEntity: NotFound,
    aiormq.exceptions.ChannelLockedResource: ResourceLocked,
    aiormq.exceptions.ChannelPreconditionFailed: PreconditionFailed,
}

UNKNOWN_ISSUER: Final = frozenset({2, 18, 19, 20, 21})
"""OpenSSL's codes for a certificate whose CA is not trusted."""

OWN_CERTIFICATE: Final = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE", "ACCESS_DENIED", "DECRYPT_ERROR")
"""Parts of the names of the TLS alerts of a broker that wants a client certificate, or a different one."""

NOT_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL")
"""OpenSSL's reasons when the peer answers a handshake with something that is not TLS."""


def is_foreign(error: BaseException) -> bool:
    """Whether an error came from aio-pika or below, and is therefore about the broker.

    Every `Exception` counts: aiormq fails what waits with a bare `Exception`. So does a `CancelledError` that is not a
    cancellation of this task: aiormq raises those as well.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return isinstance(error, Exception)


@contextlib.contextmanager
def heeding_cancellation() -> Iterator[None]:
    """Raise `CancelledError` at the end of the block if this task was cancelled inside it.

    aiormq swallows a cancellation that comes while it closes a channel, and turns others into different errors.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - aiormq is only awaited in tasks
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
    """The broker closed a channel because a message was larger than `most`, the limit in bytes that it takes."""

    def __init__(self, message: str, most: int = 0) -> None:
        super().__init__(message)
        self.most = most


def closed_by_broker(code: int, text: str) -> BrokerError:
    """The error for a `connection.close` or `channel.close` of the broker."""
    message = f"the broker closed: {code} {text}"
    if code == 406 and (found := TOO_LARGE.search(text)) is not None:
        return MessageTooLarge(f"{message}: raise its max_message_size, or lower max_body", int(found[1]))
    return BY_REPLY_CODE.get(code, BrokerUnreachable)(message)


def translate(error: BaseException, lost: BrokerError | None) -> BrokerError:
    """The error of rpcq for an error of aio-pika or aiormq.

    Args:
        error: what was raised.
        lost: why the connection was lost, as the connection itself saw it; it is more precise than `error`.

    """
    if isinstance(error, BrokerError):
        return error
    if lost is not None:
        return lost  # aiormq reports everything that waited on the connection as refused
    for kind, ours in BY_CHANNEL_ERROR.items():
        if isinstance(error, kind):
            return ours(f"the broker refused: {error}")
    return BrokerUnreachable(f"the connection to the broker failed: {error!r}")


def refused(
    error: BaseException, lost: BrokerError | None, url: BrokerURL, host: str, port: int, *, silent: bool
) -> BrokerError:
    """The error of rpcq for a connection that could not be opened.

    Args:
        error: what aio-pika raised.
        lost: why the connection was lost, as the connection itself saw it; None if it was not open yet.
        url: the broker's URL.
        host: the host that was tried.
        port: the port of that host.
        silent: whether the socket was opened and no byte came.

    """
    where = f"{url.scheme}://{host}:{port}"
    # `lost` is read from the broker's own frame: aiormq reports a missing vhost as an invalid frame.
    if isinstance(lost, AccessRefused) or isinstance(error, aiormq.exceptions.AuthenticationError):
        hint = "; RabbitMQ lets guest in from its own machine only" if url.user == "guest" else ""
        return AuthenticationFailed(f"{where} refused the user {url.user!r} or its password{hint}")
    if isinstance(lost, VhostNotFound):
        return VhostNotFound(f"{where} has no vhost {url.vhost!r}, or {url.user!r} may not enter it: {lost}")
    if isinstance(lost, ProtocolError):
        return ProtocolError(f"{where} is not an AMQP 0-9-1 broker, or wants TLS: {lost}")
    # In TLS 1.3 the client's handshake ends before the broker looks at the client's certificate. The broker's refusal
    # comes with the next read, or never, if the broker's reset of the connection is seen first.
    for cause in (error, error.__cause__):
        if isinstance(cause, ssl.SSLError):
            return _tls_refused(cause, url, where)
    why = str(lost) if lost is not None and not isinstance(error, OSError) else (str(error) or repr(error))
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
        why = f"{why}; that port may not speak TLS"
    return BrokerUnreachable(f"TLS with {where} failed: {why}")


def _own_certificate(url: BrokerURL) -> str:
    if certfile := dict(url.tls).get("certfile"):
        return f"it may not accept the client certificate of certfile={certfile!r}"
    return "it may want a client certificate: name one with certfile and keyfile"
