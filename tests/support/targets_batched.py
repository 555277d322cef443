"""What `targets` serves, by a worker that wants many calls in one message, however long its handlers take."""

from __future__ import annotations

from rpcq.calls import slots
from support.targets import target

__all__ = ["target"]

slots.AT_FIRST = 12
slots.MOST_MS = 60_000.0
