"""The properties of control messages: questions and cancellations. Pure; `docs/wire.md` is the contract."""

from __future__ import annotations

from typing import Final

from rpcq.wire import properties as amqp
from rpcq.wire.properties import Properties
from rpcq.wire.requests import DEADLINE

CANCEL: Final = b"cancel"
PING: Final = b"ping"
DESCRIBE: Final = b"describe"
STATS: Final = b"stats"


def encode_control(kind: bytes, correlation_id: bytes, reply_to: bytes, deadline_ms: int | None = None) -> bytes:
    """The properties of a control message."""
    headers = {DEADLINE: deadline_ms} if deadline_ms is not None else None
    return amqp.encode(
        Properties(headers=headers, delivery_mode=1, correlation_id=correlation_id, reply_to=reply_to, type=kind)
    )
