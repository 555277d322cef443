"""Subscriptions of each instance: every process gets each event, at most once.

    delivery -> waits until the handler has ended with the event before
             -> it runs -> returned, raised, timed out -> acknowledged

One event runs at a time, in the order in which the broker has them, because such handlers keep caches: of two events,
the later one must be applied last. Nothing is retried. When its session is lost, the queue is gone with all in it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from typing import Any, Final

from rpcq import logs
from rpcq.errors import InvalidParams
from rpcq.events.subscriptions import ServedSubscription
from rpcq.execution import Executor
from rpcq.invocation import Interruption, Invocation
from rpcq.jobs.invocation import JobInvocation
from rpcq.jobs.observing import JobObserving
from rpcq.jobs.run import JobRun
from rpcq.observer import OK
from rpcq.transport.base import Delivery
from rpcq.wire.jobs import read_job
from rpcq.wire.properties import MalformedProperties

INSTANCE_PREFETCH: Final = 100
"""Events that wait in this process; the others wait in its queue."""

log = logs.get_logger("rpcq.worker")


class Instance:
    """One subscription of each instance, in this process.

    Args:
        executor: what runs handlers.
        served: its queue.
        observing: calls the observers of jobs; None without.

    """

    def __init__(self, executor: Executor, served: ServedSubscription, observing: JobObserving | None) -> None:
        self._executor = executor
        self._served = served
        self._observing = observing
        self._waiting: deque[Delivery] = deque()
        self._running: JobRun | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._seldom = logs.Seldom(log)

    def __len__(self) -> int:
        return len(self._waiting) + (self._running is not None)

    @property
    def running(self) -> JobRun | None:
        """The run of its handler; None if it does not run."""
        return self._running

    def on_delivery(self, delivery: Delivery) -> None:
        """Take an event."""
        self._waiting.append(delivery)
        self._idle.clear()
        if self._running is None:
            self._go_on()

    def lost(self) -> None:
        """The consuming session is down, and the queue with it."""
        if self._waiting:
            log.warning("events of a lost session are dropped", count=len(self._waiting), job=self._served.label)
        self._waiting.clear()

    async def stop(self) -> None:
        """Begin nothing more, and wait until the handler has ended."""
        self.vanish()
        if self._running is None:
            self._idle.set()
        await self._idle.wait()

    def vanish(self) -> None:
        """Begin nothing more."""
        self._stopping = True
        self._waiting.clear()

    # What the run of its handler reports; see `Run`.

    def returned(self, run: JobRun, value: Any) -> None:  # noqa: ARG002 - nobody gets it
        """The handler returned."""
        if self._observing is not None:
            self._observing.end(run, "done", OK)
        self._ended(run)

    def raised(self, run: JobRun, invocation: Invocation, error: BaseException) -> None:
        """The handler raised: the event is not retried."""
        incident = secrets.token_hex(6)
        log.error("event failed, and is not retried", **invocation.names(), incident=incident, exc_info=error)
        if self._observing is not None:
            self._observing.end(run, "dropped", "failed", error, incident)
        self._ended(run)

    def interrupted(self, run: JobRun, invocation: Invocation, why: Interruption) -> None:
        """The handler was interrupted, or never entered."""
        said = why.name.lower()
        log.warning("event interrupted, and is not retried", **invocation.names(), why=said)
        if self._observing is not None:
            self._observing.end(run, "dropped", "timed_out" if said.startswith("timed_out") else "stopped")
        if run.outlasts and run.result is not None and not self._stopping:  # the next one comes after it
            run.result.add_done_callback(lambda _: self._ended(run))
        else:
            self._ended(run)

    def _ended(self, run: JobRun) -> None:
        run.delivery.ack()
        self._running = None
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting and self._running is None and not self._stopping:
            self._begin(self._waiting.popleft())
        if self._running is None and not self._waiting:
            self._idle.set()

    def _begin(self, delivery: Delivery) -> None:
        served, subscriber = self._served, self._served.subscriber
        why = f"its body is {delivery.body_size} bytes, over the limit (max_body)"
        arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        try:
            if delivery.body is not None:
                job = read_job(delivery.properties, delivery.body, redelivered=delivery.redelivered)
                why = job.problem
                arguments = None if why else served.read(job)
        except (MalformedProperties, InvalidParams) as error:
            why = str(error)
        if arguments is None:
            self._seldom.warning("an event that cannot be read is dropped", job=served.label, cause=why)
            if self._observing is not None:
                self._observing.unreadable(served, delivery.body_size, "dropped")
            delivery.ack()
            return
        run = JobRun(self, served, delivery, job, subscriber, is_suspect=False)
        now = time.monotonic()
        invocation = JobInvocation(job, subscriber, arguments, now + run.options.timeout, served)
        self._running = run
        around = None if self._observing is None else self._observing.wrap(run, None)
        self._executor.begin(run, invocation, now, around)
