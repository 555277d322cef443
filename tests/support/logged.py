"""What rpcq logged, as the standard library's records."""

from __future__ import annotations

import logging


def event_of(record: logging.LogRecord) -> str:
    """The event of a record, without its fields; the message of a record that is not rpcq's."""
    event = getattr(record, "event", None)
    return event if isinstance(event, str) else record.getMessage()
