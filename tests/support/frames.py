"""AMQP as pamqp reads it, and messages to send: for the tests of the fast path's codec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from pamqp import frame

from rpcq.transport.base import Message, Outgoing, Published
from rpcq.transport.rabbitmq.frames import MAX_FRAME

dozens = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


def message(
    body: bytes = b"",
    *,
    exchange: bytes = b"rpcq.requests",
    key: bytes = b"math",
    mandatory: bool = True,
    properties: bytes = b"\x00\x00",
    correlation_id: bytes = b"",
    on_published: Callable[[Published], None] = lambda _: None,
) -> Outgoing:
    return Message(exchange, key, correlation_id, properties, body, on_published, mandatory)


def frames_of(raw: bytes, frame_max: int = MAX_FRAME) -> list[tuple[int, Any]]:
    """The frames that pamqp reads; none may be longer than `frame_max`."""
    found = []
    while raw:
        size, channel, what = frame.unmarshal(raw)
        assert 0 < size <= frame_max
        found.append((channel, what))
        raw = raw[size:]
    return found
