"""The worker: takes requests, runs handlers, and replies.

The order for each request is fixed: parse, check the deadline and `allow`, validate, ask `authorize`, run, publish the
reply, wait for its confirm, acknowledge. A call with an idempotency key looks for a stored result before it runs.
While replies can be published, every delivery starts in the loop iteration that brings it: the prefetch limits the
concurrency.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AsyncExitStack
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, Unpack

from rpcq import logs
from rpcq.calls.intake import Intake
from rpcq.calls.replaying import Replays
from rpcq.calls.replying import Replier
from rpcq.control import Answerer, WorkerStats, describe
from rpcq.environment import broker_url, options_from
from rpcq.errors import BrokerError, ClosedError, ConfigurationError, UsageError
from rpcq.events import queues
from rpcq.events.instances import INSTANCE_PREFETCH, Instance
from rpcq.events.subscriptions import ServedSubscription
from rpcq.execution import Executor
from rpcq.jobs.invocation import Served
from rpcq.jobs.observing import JobObserving
from rpcq.jobs.ordering import ORDERED_PREFETCH, Room
from rpcq.jobs.running import JobRunner
from rpcq.jobs.telling import Teller
from rpcq.jobs.ticking import Ticker, schedules_of
from rpcq.observer import ObservedBatch, Observer, Observers
from rpcq.options import Priority, WorkerKwargs, WorkerOptions
from rpcq.results import MemoryResults
from rpcq.runtime.watchdog import Watchdog
from rpcq.service import Offered, Service
from rpcq.transport.base import Subscription, Transport
from rpcq.transport.opening import open_transport
from rpcq.transport.sessions import Sessions
from rpcq.url import mask
from rpcq.validation.listing import lists_options
from rpcq.wire.events import EventTopology
from rpcq.wire.job_queues import ORDERED_LANES
from rpcq.wire.topology import CONSUMER_TIMEOUT, Topology

log = logs.get_logger("rpcq.worker")


_HELD: Final = {"x-consumer-timeout": CONSUMER_TIMEOUT}
"""The arguments of a consumer of a quorum queue. RabbitMQ 4.3 refuses them for a classic queue."""


class Phase(Enum):
    """The phases of a worker."""

    NEW = "new"
    SERVING = "serving"
    STOPPING = "stopping"
    STOPPED = "stopped"


@lists_options(WorkerOptions)
class Worker:
    """Serves one or more services from one process.

    Use it as an async context manager, which serves while inside, or await `run`.

    Args:
        services: at least one, each with at least one method.
        url: the broker, as for `Client`; `RPCQ_URL` if None.
        options: as in `WorkerOptions`. What is not given is read from the environment (`RPCQ_PREFETCH`, ...).
        observers: called with its requests and sessions: metrics, traces, logs; see `rpcq.Observer`.

    Raises:
        ConfigurationError: a service, the URL or an option cannot be used.

    """

    def __init__(
        self,
        *services: Service,
        url: str | None = None,
        observers: Iterable[Observer] = (),
        **options: Unpack[WorkerKwargs],
    ) -> None:
        check_services(services)
        self.options = options_from(WorkerOptions, options)
        self.services = services
        self._url = broker_url(url)
        self._transport: Transport = open_transport(self._url, self.options)
        self._topology = Topology(self.options.namespace)
        self._lifespans = AsyncExitStack()
        self._observers = Observers(observers, self)
        self._sessions = Sessions(self._transport, self._observers)
        # Twice for jobs: the thread of a job that is written off may never be free again.
        jobs = sum(jobs_at_once(service, self.options) for service in services)
        executor = Executor(self.options.prefetch * len(services) + 2 * jobs, self._on_batch)
        self._event_topology = EventTopology(self.options.namespace)
        self._job_topology = self._event_topology.jobs
        self._jobs: JobRunner | None = None
        if any(service.takes_jobs for service in services):
            self._jobs = JobRunner(
                self._transport,
                executor,
                self._job_topology,
                may_begin=lambda: self._sessions.can_exchange,
                ready=self._sessions.ready,
                teller=Teller(
                    self._transport,
                    may_reply_to=lambda reply_to: self._intake.may_reply_to(reply_to),  # noqa: PLW0108 - made below
                    reply_exchange=self.options.reply_exchange,
                    max_body=self.options.max_body,
                ),
                remember=self.options.remember // 8,
                observers=self._observers.jobs,
            )
        self._executor = executor
        self._instances: list[Instance] = []
        self._tickers = [
            Ticker(self._transport, self._job_topology, service, app_id=self.options.name)
            for service in services
            if schedules_of(service)
        ]
        self._replier = Replier(
            self._transport,
            self._sessions,
            executor,
            Replays(MemoryResults(self.options.remember), self.options.max_body),
            reply_exchange=self.options.reply_exchange,
            max_body=self.options.max_body,
            observers=self._observers.requests,
            on_message=partial(self._observers.message, "replies") if self._observers.has_messages else None,
        )
        self._intake = Intake(self._replier, self._sessions, self._topology, self.options, self._observers)
        info = describe(self.options, services)
        self._answerer = Answerer(
            self._transport,
            info,
            self._stats,
            takes=self._intake.takes,
            cancel=self._intake.cancel,
            is_reply_queue=self._intake.is_reply_queue,
            reply_exchange=self.options.reply_exchange,
            max_body=self.options.max_body,
        )
        self._phase = Phase.NEW
        self._stopping = asyncio.Event()
        self._closing: asyncio.Task[bool] | None = None
        self._watchdog: Watchdog | None = None

    # Starting and stopping.

    async def start(self) -> None:
        """Enter the services' lifespans, declare the queues and begin to consume.

        Raises:
            BrokerError: the broker cannot be used; the message says why. Nothing is left open.
            ClosedError: the worker was stopped meanwhile.
            UsageError: the worker was started before.

        """
        if self._phase is not Phase.NEW:
            raise UsageError(f"this worker is {self._phase.value}; a worker is started once")
        self._phase = Phase.SERVING
        self._answerer.open()
        self._observers.opened()
        self._replier.open()
        self._watchdog = Watchdog(asyncio.get_running_loop(), self.options.blocked_after, self._name_of)
        try:
            subscriptions = [each for service in self.services for each in await self._enter(service)]
            control = self._topology.control_queue(tuple(service.name for service in self.services))
            subscriptions += [ticker.subscription() for ticker in self._tickers]
            subscriptions.append(Subscription(control, self._answerer.on_delivery, no_ack=True))
            listener = self._sessions.listener(
                consuming=lambda _: None, consuming_lost=self._on_consuming_lost, blocked=self._on_blocked
            )
            exchanges = self._topology.exchanges(self.options.reply_exchange)
            exchanges += queues.exchanges(self._event_topology, self.services)
            shared = queues.shared(self._event_topology, self.services)
            await self._transport.start(exchanges, subscriptions, listener, shared)
        except BaseException:
            await self._abandon()
            raise
        if self._closing is not None:
            raise ClosedError("the worker was stopped while it was being started")
        for ticker in self._tickers:
            ticker.start()
        self._warn_of_small_prefetch()
        log.info(
            "worker started",
            services=[service.name for service in self.services],
            prefetch=self.options.prefetch,
            url=mask(self._url),
            namespace=self.options.namespace,
        )

    def _warn_of_small_prefetch(self) -> None:
        """Warn of batches that can never be full: the broker delivers no more than `prefetch` calls."""
        for service in self.services:
            for method in service.methods.values():
                if method.batch is not None and method.batch.max_size > self.options.prefetch:
                    log.warning(
                        "batches cannot be full: raise prefetch, or lower max_size",
                        method=method.label,
                        max_size=method.batch.max_size,
                        prefetch=self.options.prefetch,
                    )

    async def stop(self) -> bool:
        """Take nothing new, wait for what runs within the grace time, and close.

        Returns:
            Whether everything ended in time. The rest is cancelled, and its callers get `OutcomeUnknown` at once. If
            this is cancelled, the worker stops all the same.

        """
        if self._closing is None:
            if self._phase is not Phase.SERVING:
                return True
            self._phase = Phase.STOPPING
            self._intake.stop()
            self._stopping.set()
            self._closing = asyncio.get_running_loop().create_task(self._stop())
        return await asyncio.shield(self._closing)

    async def _stop(self) -> bool:
        await self._transport.stop_consuming()
        self._replier.hurry()
        clean = True
        try:
            async with asyncio.timeout(self.options.grace):
                await self._intake.waiting.emptied()  # turned away, as soon as there is a way to say so
                await self._replier.in_hand.none_left()
                stopping = [ticker.stop() for ticker in self._tickers]
                if self._jobs is not None:
                    stopping.append(self._jobs.stop())
                stopping += [instance.stop() for instance in self._instances]
                await asyncio.gather(*stopping)
        except TimeoutError:
            clean = False
        await self._abandon()
        log.info("worker stopped", clean=clean)
        return clean

    async def _abandon(self) -> None:
        """Take nothing more, cut off what still runs, and close."""
        self._phase = Phase.STOPPED
        await self._intake.close()
        left = [] if self._jobs is None else self._jobs.cut_off()
        for instance in self._instances:
            instance.vanish()
            left += [] if instance.running is None else [instance.running]
        await self._replier.abandon(left)
        for ticker in self._tickers:
            await ticker.close()
        if self._jobs is not None:
            await self._jobs.close()
        try:
            await self._transport.close()
            await self._lifespans.aclose()
        finally:
            if self._watchdog is not None:
                self._watchdog.close()
            self._sessions.closed()
            self._observers.closed()

    async def run(self) -> bool:
        """Start, serve until `request_stop` is called or this task is cancelled, and stop.

        Returns:
            As `stop`.

        """
        await self.start()
        try:
            await self._stopping.wait()
        finally:
            clean = await self.stop()
        return clean

    def request_stop(self) -> None:
        """Make `run` stop; for signal handlers of the event loop."""
        self._stopping.set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def __repr__(self) -> str:
        names = ", ".join(repr(service.name) for service in self.services)
        where = f"{mask(self._url)} in namespace {self._topology.namespace!r}"
        state = self.why_not_ready() or "connected"
        return f"<Worker of {names} at {where}: {state}, {self.in_flight} requests in flight>"

    @property
    def in_flight(self) -> int:
        """Requests, jobs and events that it holds: they wait, run, or have ended and are not acknowledged yet.

        Of a message with several requests that waits until it can be replied to, the message is counted.
        """
        return len(self._replier.in_hand) + len(self._intake.waiting) + self._jobs_in_hand

    @property
    def _jobs_in_hand(self) -> int:
        return (0 if self._jobs is None else len(self._jobs)) + sum(len(instance) for instance in self._instances)

    @property
    def connected(self) -> bool:
        """Whether it takes requests: it was started, does not stop, and both sessions are up."""
        return not self.why_not_ready()

    def why_not_ready(self) -> str:
        """Why it takes no requests now, as text; empty if it does. May be called from another thread."""
        if self._phase is not Phase.SERVING:
            return f"the worker is {self._phase.value}"
        down = self._sessions.down
        return f"the {' and the '.join(down)} session to the broker is down" if down else ""

    def counts(self) -> Mapping[str, int]:
        """The counters, for observers: those of `WorkerStats`, jobs apart, and how often its event loop was blocked."""
        watchdog, jobs = self._watchdog, self._jobs_in_hand
        return {
            "in_flight": self.in_flight - jobs,
            "jobs_in_hand": jobs,
            "finished": self._replier.finished,
            "refused_redeliveries": self.refused_redeliveries,
            "expired_on_arrival": self.expired_on_arrival,
            "unroutable_replies": self._replier.unroutable_replies,
            "replayed": self._replier.replayed,
            "reply_messages": self._replier.reply_messages,
            "loop_blocks": 0 if watchdog is None else watchdog.blocks,
        }

    @property
    def expired_on_arrival(self) -> int:
        """Requests that were refused because their deadline had passed."""
        return self._intake.expired_on_arrival

    @property
    def refused_redeliveries(self) -> int:
        """Requests that were refused because they may have run before: the worker that held them was lost."""
        return self._replier.refused_redeliveries

    def _on_batch(self, method: Offered, size: int, seconds: float) -> None:
        if self._observers.has_batches:
            self._observers.batch(ObservedBatch(method.service, method.name, method.label, size, seconds))

    def _name_of(self, task: asyncio.Task[Any]) -> dict[str, Any]:
        """What a task runs, as fields for a log; may be called from another thread."""
        named = None if self._jobs is None else self._jobs.name_of(task)
        running = [each.running for each in self._instances if each.running is not None]
        named = named or next((run.names for run in running if run.task is task), None)
        return self._replier.name_of(task) if named is None else named

    async def _enter(self, service: Service) -> list[Subscription]:
        """Enter the service's lifespan; returns the subscriptions for its requests, its jobs and its events."""
        state = None
        if service.lifespan is not None:
            state = await self._lifespans.enter_async_context(service.lifespan())
        found = []
        if service.is_called:
            found.append(
                Subscription(
                    self._topology.request_queue(
                        service.name, service.queue_type, service.queue, declare=service.declare_queue
                    ),
                    self._intake.serve(service, state),
                    prefetch=self.options.prefetch,
                    arguments=_HELD if service.queue_type == "quorum" else {},
                )
            )
        if self._jobs is not None:
            found += [*self._of_jobs(self._jobs, service, state), *self._of_events(self._jobs, service, state)]
        return [*found, *self._of_instance(service, state)]

    def _of_jobs(self, runner: JobRunner, service: Service, state: Any) -> Iterator[Subscription]:
        """Subscribe to the queues of a service's jobs."""
        if not service.jobs:
            return
        topology = self._job_topology
        for priority, prefetch in prefetches(service, self.options).items():
            served = Served(service, state, room=prefetch // 2, topology=topology)
            queue = topology.queue(service.name, priority)
            yield Subscription(queue, runner.serve(served), prefetch=prefetch, arguments=_HELD)
        room = Room(self.options.job_prefetch)
        for name in ORDERED_LANES if service.ordered else ():
            queue = topology.queue(service.name, name)
            lane = runner.ordering.add(name, queue.name, room)
            on_delivery = runner.serve(Served(service, state, room=ORDERED_PREFETCH, topology=topology, lane=lane))
            yield Subscription(queue, on_delivery, prefetch=ORDERED_PREFETCH, arguments=_HELD, in_order=True)
        served = Served(service, state, room=0, topology=topology)
        suspects = topology.suspects(service.name)
        yield Subscription(suspects, runner.serve(served, is_suspects=True), prefetch=1, arguments=_HELD)

    def _of_events(self, runner: JobRunner, service: Service, state: Any) -> Iterator[Subscription]:
        """Subscribe to the queues of a service's subscriptions."""
        topology, prefetch = self._event_topology, self.options.job_prefetch
        for each in service.lasting:
            served = ServedSubscription(service, state, each, room=prefetch // 2, topology=topology)
            queue = topology.queue(service.name, each.name, each.topics.patterns)
            yield Subscription(queue, runner.serve(served), prefetch=prefetch, arguments=_HELD)
            served = ServedSubscription(service, state, each, room=0, topology=topology)
            suspects = topology.suspects(service.name, each.name)
            yield Subscription(suspects, runner.serve(served, is_suspects=True), prefetch=1, arguments=_HELD)

    def _of_instance(self, service: Service, state: Any) -> Iterator[Subscription]:
        """Subscribe to queues of this process for a service's subscriptions of each instance."""
        observers, topology = self._observers.jobs, self._event_topology
        observing = JobObserving(observers, self._transport.now_ms) if observers else None
        for each in service.subscriptions.values():
            if each.topics.each_instance:
                served = ServedSubscription(service, state, each, room=0, topology=topology)
                instance = Instance(self._executor, served, observing)
                self._instances.append(instance)
                queue = topology.instance_queue(each.topics.patterns)
                yield Subscription(queue, instance.on_delivery, prefetch=INSTANCE_PREFETCH)

    # What the transport reports.

    def _on_consuming_lost(self, _: BrokerError) -> None:
        self._intake.waiting.clear()  # the broker delivers them again
        if self._jobs is not None:
            self._jobs.lost()
        for ticker in self._tickers:
            ticker.lost()
        for instance in self._instances:
            instance.lost()

    def _on_blocked(self, reason: str) -> None:
        log.warning("the broker takes no replies; nothing new is begun", reason=reason)

    def _stats(self, name: str, host: str, pid: int, uptime: float) -> WorkerStats:
        return WorkerStats(
            name=name,
            host=host,
            pid=pid,
            time_ms=time.time() * 1000,
            uptime=uptime,
            in_flight=self.in_flight,
            finished=self._replier.finished,
            refused_redeliveries=self.refused_redeliveries,
            expired_on_arrival=self.expired_on_arrival,
            unroutable_replies=self._replier.unroutable_replies,
            replayed=self._replier.replayed,
            ticks={job: tick for ticker in self._tickers for job, tick in ticker.last_ticks()},
        )


def prefetches(service: Service, options: WorkerOptions) -> dict[Priority, int]:
    """The queues of jobs of a service, and how many jobs of each a worker runs at once.

    They are not shares of one number: a backlog in one lane takes no place of another, and a service that gets lanes
    runs no fewer jobs of normal priority than before.
    """
    found: dict[Priority, int] = {"normal": options.job_prefetch}
    if service.lanes:
        found |= {"high": options.job_prefetch, "low": max(1, options.job_prefetch // 4)}
    return found


def jobs_at_once(service: Service, options: WorkerOptions) -> int:
    """How many jobs and events of a service a worker runs at once."""
    jobs = sum(prefetches(service, options).values()) if service.jobs else 0
    jobs += options.job_prefetch if service.jobs and service.ordered else 0
    instances = len(service.subscriptions) - len(service.lasting)
    return jobs + len(service.lasting) * options.job_prefetch + instances


def check_services(services: tuple[Service, ...]) -> None:
    """Check that one worker can serve these.

    Raises:
        ConfigurationError: it cannot; the message says why.

    """
    if not services:
        raise ConfigurationError("services must be one or more; got none")
    for service in services:
        if not isinstance(service, Service):
            raise ConfigurationError(f"services must be instances of Service; got {service!r}")
        service.check()
    names = [service.name for service in services]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"services must have different names; got several called {', '.join(twice)}")
    named = [service.queue for service in services if service.queue is not None]
    if shared := sorted({queue for queue in named if named.count(queue) > 1}):
        raise ConfigurationError(f"services must have different queues; got several with the queue {', '.join(shared)}")
