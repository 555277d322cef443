"""Tickets: messages that carry a schedule from one tick to the next. Pure; `docs/wire.md` is the contract.

For each job with a schedule, a ticket is in the queue `rpcq.cron.SERVICE`, and says which tick was the last one. The
only active consumer of that queue holds it until the next tick, sends the job, publishes the next ticket, and only then
acknowledges the ticket that it holds. So there is always at least one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from rpcq.wire import bodies
from rpcq.wire import properties as amqp
from rpcq.wire.bodies import JSON
from rpcq.wire.properties import Properties


class NotATicket(ValueError):
    """A message cannot be read as a ticket."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """How far the schedule of a job is. All times are in milliseconds since the epoch.

    Attributes:
        job: the name of the job within its service.
        schedule: the schedule as text. If that of the service is another one, the schedule has changed.
        since: when the first ticket was written, from which this one descends.
        last: the last tick that was sent, or that is left out; at first, when the schedule began.
        seen: when a worker that has the schedule wrote this ticket.

    """

    job: str
    schedule: str
    since: int
    last: int
    seen: int

    def counts_before(self, other: Ticket) -> bool:
        """Whether this ticket is kept rather than another one of the same job.

        Each start of a worker writes a first ticket. If there was one already, the older line of tickets goes on, so
        that it makes up for what it has missed; within a line, the ticket that is further.
        """
        return (-self.since, self.last, self.seen) >= (-other.since, other.last, other.seen)


_NUMBERS: Final = ("since", "last", "seen")


def encode_ticket(ticket: Ticket, name: str, app_id: str) -> tuple[bytes, bytes]:
    """The properties and the body of a ticket; `name` is the message's own ID."""
    encoded = amqp.encode(
        Properties(
            content_type=JSON,
            delivery_mode=2,
            correlation_id=name.encode(),
            message_id=name.encode(),
            timestamp=ticket.seen // 1000,
            app_id=app_id.encode(),
        )
    )
    return encoded, bodies.dumps(asdict(ticket))


def read_ticket(body: bytes | None) -> Ticket:
    """Read a ticket.

    Raises:
        NotATicket: the body is none.

    """
    try:
        found: Any = bodies.loads(body or b"")
        ticket = Ticket(**{each.name: found[each.name] for each in fields(Ticket)})  # a later version may have more
    except (ValueError, TypeError, KeyError) as error:
        raise NotATicket(f"the body is no ticket: {error}") from error
    for name in _NUMBERS:
        if type(getattr(ticket, name)) is not int:
            raise NotATicket(f"{name} of a ticket must be a whole number; got {getattr(ticket, name)!r:.50}")
    if not isinstance(ticket.job, str) or not isinstance(ticket.schedule, str):
        raise NotATicket("job and schedule of a ticket must be strings")
    return ticket
