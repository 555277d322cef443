"""From a URL to a transport. Each is imported only where it is used."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from rpcq.errors import ConfigurationError
from rpcq.options import ConnectionOptions
from rpcq.transport.base import Transport
from rpcq.url import BrokerURL, parse

if TYPE_CHECKING:
    from rpcq.transport.rabbitmq.admin import Admin


def open_transport(url: str, options: ConnectionOptions) -> Transport:
    """A transport for the URL, not started.

    Raises:
        ConfigurationError: the URL cannot be used.

    """
    broker = parse(url)
    if broker.scheme == "memory":
        from rpcq.transport.memory.transport import MemoryTransport  # noqa: PLC0415

        return MemoryTransport(broker.hosts[0][0], options)
    from rpcq.transport.rabbitmq.transport import RabbitMQTransport  # noqa: PLC0415

    return RabbitMQTransport(broker, options)


def open_admin(
    broker: BrokerURL, options: ConnectionOptions, host: str, port: int
) -> AbstractAsyncContextManager[Admin]:
    """Ask one node while inside; see `rpcq.transport.admin`.

    Raises:
        ConfigurationError: it is the in-process broker, which has no node.
        BrokerError: it cannot be reached or used; the message says why.

    """
    if broker.scheme == "memory":
        msg = "the in-process broker of memory:// is gone with each process; there is nothing to look after"
        raise ConfigurationError(msg)
    from rpcq.transport.rabbitmq import admin  # noqa: PLC0415

    return admin.open_admin(broker, options, host, port)
