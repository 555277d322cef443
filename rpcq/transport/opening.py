"""From a URL to a transport. Each transport is imported only when it is used."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from rpcq.errors import ConfigurationError
from rpcq.options import ConnectionOptions
from rpcq.transport.base import Transport
from rpcq.url import BrokerURL, parse

if TYPE_CHECKING:
    import asyncio

    from rpcq.transport.rabbitmq.admin import Admin


def open_transport(url: str, options: ConnectionOptions) -> Transport:
    """Make a transport for the URL; it is not started yet.

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
    """Open a connection to one node for the questions in `rpcq.transport.rabbitmq.admin`; it closes at the block's end.

    Raises:
        ConfigurationError: the URL is one of the in-process broker, which has no nodes.
        BrokerError: the node cannot be reached or used; the message says why.

    """
    if broker.scheme == "memory":
        msg = "memory:// has no node to connect to: its broker is part of each process, and ends with it"
        raise ConfigurationError(msg)
    from rpcq.transport.rabbitmq import admin  # noqa: PLC0415

    return admin.open_admin(broker, options, host, port)


def loops_of_memory(name: str) -> list[asyncio.AbstractEventLoop]:
    """The event loops that run, in any thread, and have an in-process broker of this name."""
    from rpcq.transport.memory.broker import loops  # noqa: PLC0415

    return loops(name)
