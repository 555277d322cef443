"""Publishes jobs to other queues: delayed for later, to the suspects, or as dead letters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from rpcq import logs
from rpcq.jobs.outcomes import Again, Dead, Suspect
from rpcq.runtime.backlog import Backlog
from rpcq.transport.base import Outgoing, Published, Transport
from rpcq.wire import jobs as wire
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.jobs import encode_dead, encode_job

if TYPE_CHECKING:
    from rpcq.jobs.run import JobRun

log = logs.get_logger("rpcq.worker")

MOVE_PAUSE: Final = 0.5
"""Seconds before a job is published again that the broker refused or returned."""


class _Moved(Outgoing):
    """A job that is published to another queue; its delivery is acknowledged once the broker has it there."""

    __slots__ = ("mover", "run")

    def __init__(self, mover: Mover, run: JobRun, exchange: bytes, routing_key: bytes, properties: bytes) -> None:
        super().__init__(exchange, routing_key, run.job.id.encode(), properties, run.job.body)
        self.mover = mover
        self.run = run

    def on_published(self, published: Published) -> None:
        """See `Outgoing`."""
        self.mover.published(self, published)


class Mover:
    """Publishes jobs until the broker has confirmed them.

    Args:
        transport: the worker's.
        topology: of the namespace.
        confirmed: called with a job when the broker has it in its new queue.
        too_large: called with a job that is larger than the broker takes.

    """

    def __init__(
        self,
        transport: Transport,
        topology: JobTopology,
        confirmed: Callable[[JobRun], None],
        too_large: Callable[[JobRun], None],
    ) -> None:
        self._transport = transport
        self._topology = topology
        self._confirmed = confirmed
        self._too_large = too_large
        self._unsent: Backlog[_Moved] = Backlog(lambda: transport.can_publish, transport.writable, transport.publish)
        self._pauses: set[asyncio.TimerHandle] = set()
        self._closed = False
        self._seldom = logs.Seldom(log)

    def move(self, run: JobRun, fate: Again | Dead | Suspect, incident: str) -> None:
        """Publish a job to where it is to go; `incident` is for its dead letter, empty for none.

        A job of an ordered lane that runs again stays there.
        """
        served, job, now_ms = run.served, run.job, self._transport.now_ms()
        match fate:
            case Suspect():
                log.warning("job is a suspect: its workers were lost", **run.names, returns=job.returns)
                exchange, key = self._topology.due.name.encode(), served.suspect_key.encode()
                properties = encode_job(replace(job, earlier=job.earlier + job.returns), now_ms)
            case Again():
                again = replace(
                    job,
                    attempt=job.attempt + fate.attempts,
                    unknown=job.unknown + fate.unknown,
                    # In an ordered lane it keeps its delivery, and the broker goes on counting.
                    earlier=0 if fate.attempts or run.lane is not None else job.earlier + job.returns,
                )
                write = log.info if fate.is_retry else log.debug
                write("job runs again later", **run.names, seconds=fate.steps / 4, cause=fate.error)
                if run.lane is not None:
                    run.lane.again(run, again, fate.steps / 4)
                    return
                exchange, key = self._topology.ladder.route(fate.steps, served.address(job))
                properties = encode_job(again, now_ms)
            case Dead():
                log.error("job is dead", **run.names, reason=fate.reason, executed=fate.executed, cause=fate.error)
                headers = {
                    wire.REASON: fate.reason,
                    wire.EXECUTED: fate.executed,
                    wire.ERROR: fate.error,
                    wire.FROM: served.service.name,
                    wire.DIED_AT: now_ms,
                }
                if incident:
                    headers[wire.INCIDENT] = incident
                exchange, key = self._topology.dead.name.encode(), served.dead_key.encode()
                properties = encode_dead(run.delivery.properties, headers)
        self._publish(_Moved(self, run, exchange, key, properties))

    def stop(self) -> None:
        """Publish nothing more that the broker refuses or does not confirm."""
        self._closed = True

    async def close(self) -> None:
        """Publish nothing more. What is not confirmed, the broker delivers again."""
        self.stop()
        for pause in self._pauses:
            pause.cancel()
        await self._unsent.close()

    def published(self, moved: _Moved, published: Published) -> None:
        """What became of a job that was published elsewhere."""
        if published is Published.CONFIRMED:
            self._confirmed(moved.run)
        elif self._closed:
            pass  # the broker delivers it again
        elif published in (Published.UNSENT, Published.UNKNOWN):
            self._unsent.add(moved)
        elif published is Published.TOO_LARGE:
            self._too_large(moved.run)
        else:
            self._seldom.warning(
                "a job cannot be moved yet", **moved.run.names, to=moved.routing_key.decode(), cause=published.value
            )
            loop = asyncio.get_running_loop()
            pause: asyncio.TimerHandle
            pause = loop.call_later(MOVE_PAUSE, partial(self._move_again, moved, lambda: self._pauses.discard(pause)))
            self._pauses.add(pause)

    def _move_again(self, moved: _Moved, forget: Callable[[], None]) -> None:
        forget()
        self._publish(moved)

    def _publish(self, moved: _Moved) -> None:
        if self._unsent.items or not self._transport.can_publish:
            self._unsent.add(moved)
        else:
            self._transport.publish(moved)
