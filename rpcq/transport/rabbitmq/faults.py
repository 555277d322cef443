"""The border to aio-pika: its errors, and aiormq's, become errors of rpcq here."""

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
"""How RabbitMQ says that a message is larger than it takes; the code alone does not tell."""

BY_CHANNEL_ERROR: dict[type[BaseException], type[BrokerError]] = {
    aiormq.exceptions.ChannelAccessRefused: AccessRefused,
    aiormq.exceptions.ChannelNotFoundEntity: NotFound,
    aiormq.exceptions.ChannelLockedResource: ResourceLocked,
    aiormq.exceptions.ChannelPreconditionFailed: PreconditionFailed,
}

UNKNOWN_ISSUER: Final = frozenset({2, 18, 19, 20, 21})
"""OpenSSL's codes for a certificate whose CA is not among those that are trusted."""

OWN_CERTIFICATE: Final = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE", "ACCESS_DENIED", "DECRYPT_ERROR")
"""What an alert has in its name where a broker wants another client certificate, or one at all."""

NOT_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL")
"""OpenSSL's reasons where the peer answers a handshake with something else."""


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


def refused(
    error: BaseException, told: BrokerError | None, url: BrokerURL, host: str, port: int, *, silent: bool
) -> BrokerError:
    """Why a connection could not be opened, as ours.

    Args:
        error: what aio-pika raised.
        told: what the connection itself saw, if anything.
        url: the broker's.
        host: the one of its hosts.
        port: that host's.
        silent: whether the socket was opened and nothing came.

    """
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
