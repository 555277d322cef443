"""Where a call goes. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rpcq.contracts import METHOD_NAME
from rpcq.errors import ConfigurationError
from rpcq.options import check_name
from rpcq.wire.topology import Topology


@dataclass(frozen=True, slots=True)
class Target:
    """Where a call goes.

    Attributes:
        exchange: the exchange's name; empty for the default exchange.
        routing_key: the service's name, or a queue's.
        method: the method's name; empty for none.
        label: the name in texts of errors.
        is_ours: it goes through the requests exchange, where the broker sends a notice if a request expires.
        once_key: the name of the queue that delivers once, which is also the routing key that leads to this queue only;
            empty if there can be no such queue.

    """

    exchange: bytes
    routing_key: bytes
    method: bytes
    label: str
    is_ours: bool
    once_key: bytes


def make_target(topology: Topology, service: str | None, method: str, queue: str | None) -> Target:
    """The target of a method.

    Raises:
        ConfigurationError: a name is not valid.

    """
    if not METHOD_NAME.match(method):
        msg = f"the name of a method must be 1 to 100 of the characters A-Z a-z 0-9 _ -; got {method!r}"
        raise ConfigurationError(msg)
    if queue is not None:
        key = queue.encode()
        once_key = key if topology.delivers_once(queue) else b""
        return Target(b"", key, method.encode(), f"{queue}: {method}", is_ours=False, once_key=once_key)
    if service is None:
        msg = f"the target must be 'service.method', or with_options(queue=...) must name the queue; got {method!r}"
        raise ConfigurationError(msg)
    check_name("the name of a service", service)
    exchange = topology.requests.name.encode()
    once_key = topology.once_queue(service).encode()
    return Target(exchange, service.encode(), method.encode(), f"{service}.{method}", is_ours=True, once_key=once_key)
