"""From a URL to a transport. Each is imported only where it is used."""

from __future__ import annotations

from rpcq.settings import ConnectionOptions
from rpcq.transport.base import Transport
from rpcq.url import parse


def open_transport(url: str, options: ConnectionOptions) -> Transport:
    """A transport for the URL, not started.

    Raises:
        ConfigurationError: the URL cannot be used.

    """
    broker = parse(url)
    if broker.scheme == "memory":
        from rpcq.transport.memory import MemoryTransport  # noqa: PLC0415

        return MemoryTransport(broker.hosts[0][0], options)
    from rpcq.transport.rabbitmq import RabbitMQTransport  # noqa: PLC0415

    return RabbitMQTransport(broker, options)
