"""What `targets` serves, by a worker that wants many calls in one message, however long its handlers take."""

from __future__ import annotations

from rpcq.calls import slots
from rpcq.calls.slots import Slots
from support.targets import target

__all__ = ["target"]

slots.MOST_MS = 60_000.0
Slots.takes = Slots._in_time  # type: ignore[method-assign, assignment]  # from the first call on
