"""Sends the jobs that have a schedule, without a scheduler: the workers carry tickets from one tick to the next.

    a worker starts        -> publishes a first ticket for each schedule
    a ticket is delivered  -> there is a better one of its job      -> acknowledged
                           -> it is the best                        -> held until the next tick; the other one is
                                                                       acknowledged
    its time has come      -> jobs sent -> next ticket published -> both confirmed -> acknowledged

Of all workers of a service, the broker lets one consume the tickets; when that one is lost, it gives them to another.
A ticket is acknowledged only when its successor is confirmed. So a tick may be sent twice, under one idempotency key,
and none is forgotten.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from rpcq import logs
from rpcq.schedules import Schedule, due
from rpcq.service import Service
from rpcq.transport.base import Delivery, Message, Published, Subscription, Transport
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.jobs import JobMessage, encode_job
from rpcq.wire.tickets import NotATicket, Ticket, encode_ticket, read_ticket
from rpcq.wire.topology import CONSUMER_TIMEOUT

log = logs.get_logger("rpcq.worker")

HELD: Final = 600.0
"""Seconds that a ticket is held at most: RabbitMQ closes the channel of who holds a message for 30 minutes."""

FORGOTTEN_AFTER_MS: Final = 24 * 3600 * 1000
"""Milliseconds after which a ticket is dropped whose schedule no worker had meanwhile."""

PAUSE: Final = 0.5
"""Seconds before a message is published again that the broker refused or returned."""

PREFETCH: Final = 1000
"""Tickets that a worker may hold."""


@dataclass(eq=False, slots=True)
class _Held:
    """A ticket in hand.

    Attributes:
        ticket: the ticket.
        delivery: its delivery.
        task: waits for its time, and then sends its jobs.
        is_due: whether its time has come: it then goes on to its end.

    """

    ticket: Ticket
    delivery: Delivery
    task: asyncio.Task[None] | None = None
    is_due: bool = False


class Ticker:
    """Sends the jobs of one service that have a schedule.

    Args:
        transport: the worker's.
        topology: of the namespace.
        service: the service.
        app_id: the worker's name.

    """

    def __init__(self, transport: Transport, topology: JobTopology, service: Service, *, app_id: str) -> None:
        self._transport = transport
        self._to_queue = topology.ladder.route(0, topology.address(service.name))
        self._queue = topology.tickets(service.name)
        self._service = service.name
        self._to_tickets = topology.due.name.encode(), topology.ticket_key(service.name).encode()
        self._schedules = schedules_of(service)
        self._app_id = app_id
        self._asleep = 0
        self._held: dict[str, _Held] = {}  # by job
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._seldom = logs.Seldom(log)

    @property
    def is_at_work(self) -> bool:
        """Whether it does anything but wait for the next tick."""
        return len(self._tasks) > self._asleep

    def start(self) -> None:
        """Publish a first ticket for each schedule."""
        now = self._transport.now_ms()
        for name, schedule in self._schedules.items():
            self._begin(self._publish_ticket(Ticket(name, str(schedule), since=now, last=now, seen=now)))

    def subscription(self) -> Subscription:
        """What to consume."""
        return Subscription(
            self._queue, self.on_delivery, prefetch=PREFETCH, arguments={"x-consumer-timeout": CONSUMER_TIMEOUT}
        )

    def on_delivery(self, delivery: Delivery) -> None:
        """A ticket is delivered."""
        if self._stopping:
            delivery.reject(requeue=True)
            return
        try:
            ticket = read_ticket(delivery.body)
        except NotATicket as error:
            self._seldom.warning("a ticket that cannot be read is dead", service=self._service, cause=str(error))
            delivery.reject()
            return
        other = self._held.get(ticket.job)
        if other is not None and not other.is_due:  # one that is due is on its way out, and this may be its successor
            if other.ticket.counts_before(ticket):
                delivery.ack()
                return
            self._release(other)
            other.delivery.ack()
        held = self._held[ticket.job] = _Held(ticket, delivery)
        held.task = self._begin(self._hold(held))

    def last_ticks(self) -> Iterator[tuple[str, int]]:
        """The last tick that was sent of each job whose ticket is here: "service.job", milliseconds since the epoch."""
        for held in self._held.values():
            if held.ticket.last != held.ticket.since:  # else its schedule has just begun
                yield self._label(held.ticket), held.ticket.last

    def lost(self) -> None:
        """The consuming session is down: the broker delivers the tickets again, here or elsewhere."""
        for held in [*self._held.values()]:
            self._release(held)
        self._held.clear()

    async def stop(self) -> None:
        """Give back the tickets that wait, and finish with those whose time has come."""
        self._stopping = True
        for held in [*self._held.values()]:
            if not held.is_due:
                self._release(held)
                held.delivery.reject(requeue=True)
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """End everything at once. The broker delivers again what is not acknowledged."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _begin(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _release(self, held: _Held) -> None:
        if not held.is_due and held.task is not None:
            held.task.cancel()
        if self._held.get(held.ticket.job) is held:
            del self._held[held.ticket.job]

    async def _hold(self, held: _Held) -> None:
        """Hold a ticket until its time has come, send its jobs, and replace it by the next one."""
        ticket, schedule = held.ticket, self._schedules.get(held.ticket.job)
        now = begun = self._transport.now_ms()
        if schedule is not None and str(schedule) != ticket.schedule:
            log.info("schedule changed", job=self._label(ticket), before=ticket.schedule, now=str(schedule))
            ticket = replace(ticket, schedule=str(schedule), last=max(ticket.last, now))
        ticks: list[int] = []
        give_up = begun + round(HELD * 1000)
        while now < give_up and not ticks:
            wake = give_up
            if schedule is not None:
                ticks = due(schedule, ticket.last, now)
                if ticks:
                    break
                wake = min(wake, schedule.next_after(max(ticket.last, now)) or wake)
            self._asleep += 1
            try:
                await self._transport.sleep_until(wake)
            finally:
                self._asleep -= 1
            now = self._transport.now_ms()
        held.is_due = True
        for tick in ticks:
            await self._send(ticket.job, tick)
        if schedule is not None:
            ticket = replace(ticket, last=ticks[-1] if ticks else ticket.last, seen=now)
        if schedule is not None or now - ticket.seen < FORGOTTEN_AFTER_MS:
            await self._publish_ticket(ticket)
        else:
            log.info("schedule is gone", job=self._label(ticket), schedule=ticket.schedule)
        self._release(held)
        held.delivery.ack()

    async def _send(self, name: str, tick: int) -> None:
        moment = datetime.fromtimestamp(tick / 1000, UTC).isoformat(timespec="milliseconds")
        job_id = secrets.token_hex(12)
        job = JobMessage(
            id=job_id, name=name, body=b"{}", key=f"cron:{name}:{moment}", due_ms=tick, app_id=self._app_id
        )
        await self._publish(self._to_queue, job_id, encode_job(job, self._transport.now_ms()), job.body)

    async def _publish_ticket(self, ticket: Ticket) -> None:
        message_id = secrets.token_hex(12)
        await self._publish(self._to_tickets, message_id, *encode_ticket(ticket, message_id, self._app_id))

    async def _publish(self, route: tuple[bytes, bytes], message_id: str, properties: bytes, body: bytes) -> None:
        """Publish a message until the broker confirms it."""
        loop = asyncio.get_running_loop()
        while True:
            await self._transport.writable()
            published: asyncio.Future[Published] = loop.create_future()
            self._transport.publish(
                Message(*route, message_id.encode(), properties, body, partial(_set_result, published))
            )
            match await published:
                case Published.CONFIRMED:
                    return
                case Published.UNSENT | Published.UNKNOWN:
                    continue
                case other:
                    self._seldom.warning(
                        "a schedule cannot go on yet", service=self._service, cause=other.value, to=route[1].decode()
                    )
                    await asyncio.sleep(PAUSE)

    def _label(self, ticket: Ticket) -> str:
        return f"{self._service}.{ticket.job}"


def schedules_of(service: Service) -> dict[str, Schedule]:
    """The schedules of a service's jobs, by the jobs' names."""
    return {
        name: method.job.schedule
        for name, method in service.jobs.items()
        if method.job is not None and method.job.schedule is not None
    }


def _set_result(published: asyncio.Future[Published], value: Published) -> None:
    if not published.done():  # else its task was cancelled
        published.set_result(value)
