"""Takes the jobs that are delivered to a worker, runs them, and settles their deliveries.

    delivery -> it is in hand here already                  -> the run takes it over
             -> it may not run (`outcomes.of_delivery`)     -> moved: delayed, to the suspects, or to the dead letters
             -> it may run                                  -> Executor.begin
    run ended -> done                                       -> acknowledged
              -> again, or dead (`outcomes.of_error`)       -> moved
              -> its worker stopped                         -> given back to its queue
    moved = published elsewhere -> confirmed -> acknowledged

A job is acknowledged only when it is done, or when the broker has confirmed it elsewhere. So it is never lost; if the
worker dies between the two, it is there twice, under one ID and key.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final

from rpcq import logs
from rpcq.errors import GiveUp, InvalidParams, RetryLater
from rpcq.execution import Executor, Run
from rpcq.invocation import Interruption, Invocation
from rpcq.jobs.invocation import JobInvocation, Served
from rpcq.jobs.outcomes import Again, Dead, Suspect, of_delivery, of_error, of_interruption, of_refusal
from rpcq.options import JobOptions
from rpcq.runtime.backlog import Backlog
from rpcq.runtime.backoff import full_jitter
from rpcq.runtime.threads import Ended
from rpcq.service import Service
from rpcq.transport.base import Delivery, Outgoing, Published, Transport
from rpcq.wire import jobs as wire
from rpcq.wire.jobs import JobMessage, JobTopology, encode_dead, encode_job, read_job
from rpcq.wire.properties import MalformedProperties

log = logs.get_logger("rpcq.worker")

MOVE_PAUSE: Final = 0.5
"""Seconds before a job is published again that the broker refused or returned."""


class JobRun(Run):
    """A job in hand, from its delivery until it is settled.

    Attributes:
        runner: what settles it.
        served: its service.
        delivery: its delivery.
        job: its message.
        is_suspect: whether it came from the queue for suspects.

    """

    __slots__ = ("delivery", "is_suspect", "job", "runner", "served")

    def __init__(
        self, runner: JobRunner, served: Served, delivery: Delivery, job: JobMessage, *, is_suspect: bool
    ) -> None:
        super().__init__()
        self.runner = runner
        self.served = served
        self.delivery = delivery
        self.job = job
        self.is_suspect = is_suspect

    @property
    def id(self) -> str:
        """The job's ID, for logs."""
        return self.job.id

    def returned(self, invocation: Invocation, value: Any) -> None:  # noqa: ARG002 - what a job returns is not used
        """See `Run`."""
        self.runner.returned(self)

    def raised(self, invocation: Invocation, error: BaseException) -> None:
        """See `Run`."""
        self.runner.raised(self, invocation, error)

    def interrupted(self, invocation: Invocation, why: Interruption) -> None:
        """See `Run`."""
        self.runner.interrupted(self, invocation, why)


class _Moved(Outgoing):
    """A job that is published to another queue; its delivery is acknowledged once the broker has it there."""

    __slots__ = ("run",)

    def __init__(self, run: JobRun, exchange: bytes, routing_key: bytes, properties: bytes) -> None:
        super().__init__(exchange, routing_key, run.job.id.encode(), properties, run.job.body)
        self.run = run

    def on_published(self, published: Published) -> None:
        """See `Outgoing`."""
        self.run.runner.moved(self, published)


class JobRunner:
    """Runs the jobs of a worker's services.

    Args:
        transport: the worker's.
        executor: what runs handlers.
        topology: of the namespace.
        may_begin: whether a job may begin now: what becomes of it must be published.
        ready: waits for that.

    Attributes:
        finished: jobs that are settled.
        retried: jobs that run again later.
        dead: jobs that became dead letters here.
        spread: makes the longest pause before a retry into the pause, in seconds.

    """

    def __init__(
        self,
        transport: Transport,
        executor: Executor,
        topology: JobTopology,
        *,
        may_begin: Callable[[], bool],
        ready: Callable[[], Any],
    ) -> None:
        self._transport = transport
        self._executor = executor
        self._topology = topology
        self._may_begin = may_begin
        self._in_hand: dict[str, JobRun] = {}
        self._twins: set[JobRun] = set()  # jobs whose ID another job in hand has
        self._running: set[JobRun] = set()
        self._suspects: deque[JobRun] = deque()  # each waits until nothing runs, and nothing begins before it
        self._held: deque[JobRun] = deque()  # wait for the suspects
        self._arriving: Backlog[tuple[Served, Delivery, bool]] = Backlog(may_begin, ready, self._take)
        self._unsent: Backlog[_Moved] = Backlog(lambda: transport.can_publish, transport.writable, transport.publish)
        self._pauses: set[asyncio.TimerHandle] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._abandoned = False
        self._seldom = logs.Seldom(log)
        self.finished = 0
        self.retried = 0
        self.dead = 0
        self.spread: Callable[[float], float] = full_jitter

    def __len__(self) -> int:
        return len(self._in_hand) + len(self._twins) + len(self._arriving)

    def __iter__(self) -> Iterator[JobRun]:
        return iter((*self._in_hand.values(), *self._twins))  # a copy: they change meanwhile

    def serve(self, service: Service, state: Any, *, is_suspects: bool) -> Callable[[Delivery], None]:
        """The callback for the deliveries of one of a service's queues; `state` is what its lifespan yielded."""
        served = Served(service, state)
        return lambda delivery: self._on_delivery(served, delivery, is_suspects)

    def lost(self) -> None:
        """The consuming session is down: the broker delivers again what has not begun."""
        self._arriving.clear()
        for run in self._take_waiting():
            self._forget(run)
        self._note_idle()

    async def stop(self) -> None:
        """Begin nothing more, give back what has not begun, and wait until the rest is settled."""
        self._stopping = True
        for served, delivery, is_suspects in [*self._arriving.items]:
            self._take((served, delivery, is_suspects))
        self._arriving.clear()
        for run in self._take_waiting():
            self._give_back(run)
        self._note_idle()
        await self._idle.wait()

    def name_of(self, task: asyncio.Task[Any]) -> dict[str, Any] | None:
        """What a task runs, as fields for a log; None if it is no job. May be called from another thread."""
        return next((_names(run) for run in self if run.task is task), None)

    def cut_off(self) -> list[JobRun]:
        """The runs that are left when the worker closes; for `Executor.abandon`."""
        runs = list(self)
        if runs:
            log.error("jobs cut off", count=len(runs), job_ids=[run.id for run in runs[:20]])
        return runs

    def vanish(self) -> None:
        """Go on as if the process was killed: begin and publish nothing more, and cancel what runs."""
        self._abandoned = True
        self._suspects.clear()
        self._held.clear()
        for run in self:
            self._executor.cancel(run)

    async def close(self) -> None:
        """Publish nothing more. What is not settled, the broker delivers again."""
        self._abandoned = True
        for pause in self._pauses:
            pause.cancel()
        await self._arriving.close()
        await self._unsent.close()

    # Taking.

    def _on_delivery(self, served: Served, delivery: Delivery, is_suspects: bool) -> None:
        if self._arriving.items or not (self._may_begin() or self._stopping):
            self._arriving.add((served, delivery, is_suspects))
            self._idle.clear()
        else:
            self._take((served, delivery, is_suspects))

    def _take(self, arrived: tuple[Served, Delivery, bool]) -> None:
        served, delivery, is_suspects = arrived
        if delivery.body is None:
            self._bury_as_it_is(served, delivery, f"its body is {delivery.body_size} bytes, over the limit (max_body)")
            return
        try:
            job = read_job(delivery.properties, delivery.body, redelivered=delivery.redelivered)
        except MalformedProperties as error:
            self._bury_as_it_is(served, delivery, str(error))
            return
        if delivery.redelivered and self._adopt(job.id, delivery, is_suspects):
            return
        run = JobRun(self, served, delivery, job, is_suspect=is_suspects)
        if self._in_hand.setdefault(job.id, run) is not run:
            self._twins.add(run)
        self._idle.clear()
        if self._stopping:
            self._give_back(run)
            return
        service = served.service
        method = service.jobs.get(job.name)
        fate = of_delivery(
            job,
            is_suspects=is_suspects,
            known=None if method is None else method.job,
            is_method=job.name in service.methods,
            now_ms=self._transport.now_ms(),
        )
        if fate is not None:
            self._settle(run, fate)
        elif is_suspects:
            self._suspects.append(run)
            self._go_on()
        elif self._suspects:
            self._held.append(run)
        else:
            self._begin(run)

    def _adopt(self, job_id: str, delivery: Delivery, is_suspects: bool) -> bool:
        """Let a job that is still in hand take over its redelivery: the session of its first delivery was lost."""
        for run in (self._in_hand.get(job_id), *self._twins):
            if run is not None and run.job.id == job_id and run.is_suspect == is_suspects:
                if run.delivery.source is delivery.source:
                    continue  # this session delivered both: they are two messages with one ID
                run.delivery = delivery
                return True
        return False

    def _bury_as_it_is(self, served: Served, delivery: Delivery, why: str) -> None:
        """Let the broker make a dead letter of what cannot be read here: nothing of it is lost so."""
        self.dead += 1
        self._seldom.warning("a job that cannot be read is dead", service=served.service.name, cause=why)
        delivery.reject()

    def _begin(self, run: JobRun) -> None:
        method = run.served.service.jobs[run.job.name]
        options = method.job
        assert options is not None  # noqa: S101 - `Service.job` sets it
        try:
            arguments = method.parameters.read(run.job.body)
        except InvalidParams as error:
            self._settle(run, of_refusal(run.job, error))
            return
        now = time.monotonic()
        invocation = JobInvocation(run.job, method, arguments, now + options.timeout, run.served.state)
        self._running.add(run)
        self._executor.begin(run, invocation, now)

    def _go_on(self) -> None:
        """Begin the next suspect if nothing runs; without suspects, begin what they held up."""
        if self._suspects:
            if not self._running:
                run = self._suspects[0]
                self._begin(run)
                if run not in self._running:  # it was settled without a run, or has ended
                    self._after_suspect(run)
            return
        while self._held and not self._suspects:
            self._begin(self._held.popleft())

    def _after_suspect(self, run: JobRun) -> None:
        """Begin all that one suspect held up before the next one: RabbitMQ bounds how long a delivery may be held."""
        if self._suspects and self._suspects[0] is run:
            self._suspects.popleft()
            held, self._held = self._held, deque()
            for each in held:
                self._begin(each)
            self._go_on()

    def _take_waiting(self) -> list[JobRun]:
        """Take out the jobs that wait to begin."""
        waiting = [run for run in (*self._suspects, *self._held) if run not in self._running]
        self._suspects = deque(run for run in self._suspects if run in self._running)
        self._held.clear()
        return waiting

    # Ends of a run.

    def returned(self, run: JobRun) -> None:
        """The handler returned: the job is done."""
        self._acknowledge(run)
        self._ended(run)

    def raised(self, run: JobRun, invocation: Invocation, error: BaseException) -> None:
        """The handler raised."""
        fate = of_error(run.job, _options(invocation), error, self.spread)
        if isinstance(error, RetryLater | GiveUp):  # its handler says what is to become of it
            self._settle(run, fate)
            self._ended(run)
            return
        incident = secrets.token_hex(6)
        write = log.error if isinstance(fate, Dead) else log.warning
        write(
            "job failed",
            **invocation.names(),
            incident=incident,
            duration_ms=round(run.handler_ms, 3),
            exc_info=error,
        )
        self._settle(run, fate, incident)
        self._ended(run)

    def interrupted(self, run: JobRun, invocation: Invocation, why: Interruption) -> None:
        """The handler was interrupted, or never entered.

        A thread cannot be interrupted: the fate of its job waits until it ends, so that no two attempts run at once.
        """
        if run.outlasts and not self._abandoned:
            assert run.result is not None  # noqa: S101 - made with the thread
            log.warning("job goes on beyond its timeout, in a thread", **invocation.names())
            run.result.add_done_callback(lambda result: self._outlasted(run, invocation, why, result))
        else:
            self._interrupted(run, invocation, why)

    def _outlasted(self, run: JobRun, invocation: Invocation, why: Interruption, result: asyncio.Future[Ended]) -> None:
        if self._abandoned:
            return  # the broker delivers it again
        if not result.cancelled() and result.result().error is None:
            self.returned(run)
        else:
            self._interrupted(run, invocation, why)

    def _interrupted(self, run: JobRun, invocation: Invocation, why: Interruption) -> None:
        fate = of_interruption(run.job, _options(invocation), why, run.handler_ms / 1000, self.spread)
        if fate is None:
            self._give_back(run)
        else:
            log.warning("job interrupted", **invocation.names(), why=why.name.lower(), cause=fate.error)
            self._settle(run, fate)
        self._ended(run)

    def _ended(self, run: JobRun) -> None:
        """Its handler has ended: others may begin."""
        self._running.discard(run)
        self._after_suspect(run)
        self._go_on()
        self._note_idle()

    # Settling.

    def _settle(self, run: JobRun, fate: Again | Dead | Suspect, incident: str | None = None) -> None:
        if self._abandoned:
            return  # the broker delivers it again
        service = run.served.service.name
        job, now_ms = run.job, self._transport.now_ms()
        match fate:
            case Suspect():
                key = self._topology.suspect_key(service)
                log.warning("job is a suspect: its workers were lost", **_names(run), returns=job.returns)
                self._move(run, self._topology.due.name.encode(), key.encode(), encode_job(job, now_ms))
            case Again():
                self.retried += 1
                again = replace(job, attempt=job.attempt + fate.attempts, unknown=job.unknown + fate.unknown)
                log.info("job runs again later", **_names(run), seconds=fate.steps / 4, cause=fate.error)
                if fate.steps:
                    exchange, address = self._topology.ladder.route(fate.steps, self._topology.address(service))
                else:
                    exchange, address = self._topology.jobs.name.encode(), service.encode()
                self._move(run, exchange, address, encode_job(again, now_ms))
            case Dead():
                self.dead += 1
                log.error("job is dead", **_names(run), reason=fate.reason, executed=fate.executed, cause=fate.error)
                headers = {
                    wire.REASON: fate.reason,
                    wire.EXECUTED: fate.executed,
                    wire.ERROR: fate.error,
                    wire.FROM: service,
                    wire.DIED_AT: now_ms,
                }
                if incident is not None:
                    headers[wire.INCIDENT] = incident
                key = self._topology.address(service)
                letter = encode_dead(run.delivery.properties, headers)
                self._move(run, self._topology.dead.name.encode(), key.encode(), letter)

    def _move(self, run: JobRun, exchange: bytes, routing_key: bytes, properties: bytes) -> None:
        self._publish(_Moved(run, exchange, routing_key, properties))

    def _publish(self, moved: _Moved) -> None:
        if self._unsent.items or not self._transport.can_publish:
            self._unsent.add(moved)
        else:
            self._transport.publish(moved)

    def moved(self, moved: _Moved, published: Published) -> None:
        """What became of a job that was published elsewhere."""
        run = moved.run
        if published is Published.CONFIRMED:
            self._acknowledge(run)
        elif self._abandoned:
            pass  # the broker delivers it again
        elif published in (Published.UNSENT, Published.UNKNOWN):
            self._unsent.add(moved)
        elif published is Published.TOO_LARGE:
            log.error("a job is larger than the broker takes: the broker itself makes it a dead letter", **_names(run))
            self._release(run)
            run.delivery.reject()
        else:
            self._seldom.warning(
                "a job cannot be moved yet", **_names(run), to=moved.routing_key.decode(), cause=published.value
            )
            loop = asyncio.get_running_loop()
            pause: asyncio.TimerHandle
            pause = loop.call_later(MOVE_PAUSE, partial(self._move_again, moved, lambda: self._pauses.discard(pause)))
            self._pauses.add(pause)

    def _move_again(self, moved: _Moved, forget: Callable[[], None]) -> None:
        forget()
        self._publish(moved)

    def _give_back(self, run: JobRun) -> None:
        self._release(run)
        run.delivery.reject(requeue=True)

    def _acknowledge(self, run: JobRun) -> None:
        self.finished += 1
        self._release(run)
        run.delivery.ack()

    def _release(self, run: JobRun) -> None:
        self._forget(run)
        self._note_idle()

    def _forget(self, run: JobRun) -> None:
        if self._in_hand.get(run.job.id) is run:
            del self._in_hand[run.job.id]
        else:
            self._twins.discard(run)

    def _note_idle(self) -> None:
        if not self._in_hand and not self._twins and not self._running and not self._arriving.items:
            self._idle.set()


def _options(invocation: Invocation) -> JobOptions:
    options = invocation.method.job
    assert options is not None  # noqa: S101 - `Service.job` sets it
    return options


def _names(run: JobRun) -> dict[str, Any]:
    job = run.job
    return {"job": f"{run.served.service.name}.{job.name}", "job_id": job.id, "attempt": job.attempt}
