"""An event as the message that its publisher sends. Pure."""

from __future__ import annotations

from rpcq.errors import UsageError
from rpcq.event_types import Event, named, write_event
from rpcq.options import CallOptions
from rpcq.wire.jobs import JobMessage, check_headers


def message_of(event: Event, options: CallOptions, *, event_id: str, app_id: str, max_body: int) -> JobMessage:
    """The message of an event; `rpcq.wire.events.encode_event` makes it what is published.

    Args:
        event: the event.
        options: of these, `idempotency_key` and `metadata` are used.
        event_id: its ID; it is the key too if the options have none.
        app_id: the name of the program that publishes it.
        max_body: the most bytes of its fields as JSON.

    Raises:
        UsageError: it is not an event of a class with a name, or an option is for jobs only.
        NotSerializable: JSON cannot carry it.
        InvalidParams: it would not be read again, because it was changed after it was made.
        TooLarge: it is over `max_body` bytes, or its headers over 8 KiB.

    """
    kind = named(event)
    if options.is_for_jobs:
        raise UsageError(
            "publish must not have the options delay, at, expires and priority, which are for jobs: send a job that "
            "publishes the event"
        )
    if options.metadata:
        check_headers(options.metadata)
    return JobMessage(
        id=event_id,
        name=kind.event_name,
        version=kind.event_version,
        body=write_event(event, max_body),
        key=options.idempotency_key or event_id,
        app_id=app_id,
        headers=options.metadata,
    )
