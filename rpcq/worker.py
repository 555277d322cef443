"""The worker: a consumer pool that runs handlers and replies.

Its order is fixed: parse, check the deadline and `allow`, validate, ask `authorize`, run, publish the reply, wait for
its confirm, acknowledge.
Every delivery starts in the loop iteration that brings it: prefetch is the concurrency, and there is no backlog.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, Unpack

from rpcq import logs, wire
from rpcq.admission import ExpiredOnArrival, admit, why_it_may_have_run
from rpcq.control import Answerer, WorkerStats, describe
from rpcq.environment import broker_url, options_from
from rpcq.errors import (
    BrokerError,
    CallError,
    ClosedError,
    ConfigurationError,
    PermissionDenied,
    ServiceUnavailable,
    TooLarge,
    UsageError,
)
from rpcq.idempotency import MemoryAnswers
from rpcq.observer import Observer, Observers, SeenRequest
from rpcq.properties import MalformedProperties, Properties, decode
from rpcq.running import Running, Runs
from rpcq.service import Service
from rpcq.settings import MAX_PROPERTIES, MAX_TIMEOUT, WorkerOptions, WorkerSettings
from rpcq.transport.base import Delivery, Listener, Subscription, Transport
from rpcq.transport.opening import open_transport
from rpcq.transport.topology import CONSUMER_TIMEOUT, Names
from rpcq.url import mask
from rpcq.watchdog import Watchdog
from rpcq.wire import Request

REMEMBERED_CANCELS: Final = 10_000
"""Calls cancelled before they arrived that a worker remembers."""

log = logs.get_logger("rpcq.worker")


class _Served:
    """A service being served, with what its lifespan gave."""

    __slots__ = ("service", "state")

    def __init__(self, service: Service) -> None:
        self.service = service
        self.state: Any = None


class Worker:
    """Serves one or more services from one process.

    Use it as an async context manager, which serves while inside, or await `run`.

    Args:
        services: at least one, each with at least one method.
        url: the broker, as for `Client`; `RPCQ_URL` if None.
        options: as in `WorkerOptions`; what is not given comes from the environment (`RPCQ_PREFETCH`, ...), if it is
            there.
        observers: who is told of its requests and sessions: metrics, traces, logs; see `rpcq.observer`.

    Attributes:
        expired_on_arrival: requests answered and not run, because their deadline had passed.

    Raises:
        ConfigurationError: a service, the URL or an option cannot be used.

    """

    def __init__(
        self,
        *services: Service,
        url: str | None = None,
        observers: Iterable[Observer] = (),
        **options: Unpack[WorkerSettings],
    ) -> None:
        _check(services)
        self.options = options_from(WorkerOptions, options)
        self.services = services
        self._url = broker_url(url)
        self._transport: Transport = open_transport(self._url, self.options)
        self._names = Names(self.options.namespace)
        self._requests = self._names.requests.name.encode()
        self._reply_prefixes = self._names.reply_prefixes(self.options.reply_exchange)
        self._may_reply_to = [re.compile(pattern.encode()) for pattern in self.options.reply_to]
        self._lifespans = AsyncExitStack()
        self._observers = Observers(observers, self)
        self._runs = Runs(
            self._transport,
            reply_exchange=self.options.reply_exchange,
            max_body=self.options.max_body,
            threads=self.options.prefetch * len(services),
            answers=MemoryAnswers(self.options.remember),
            observers=self._observers.requests,
        )
        self._held: deque[tuple[_Served, Delivery]] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._cancels: dict[tuple[bytes, bytes], float] = {}
        self._state = "new"
        self._stopping = asyncio.Event()
        self._closing: asyncio.Task[bool] | None = None
        self._watchdog: Watchdog | None = None
        self._seldom = logs.Seldom(log)
        self._consuming_up = False
        self._publishing_up = False
        self._started = time.monotonic()
        self._info = describe(self.options.name, self.options.prefetch, services, self._names)
        self._answerer = Answerer(
            self._transport, self.options.reply_exchange, self._info, self._stats, self.options.max_body
        )
        self.expired_on_arrival = 0

    # Starting and stopping.

    async def start(self) -> None:
        """Enter the services' lifespans, declare the queues and begin to consume.

        Raises:
            BrokerError: the broker cannot be used; the message says why. Nothing is left open.
            ClosedError: it was stopped meanwhile.
            UsageError: it was started before.

        """
        if self._state != "new":
            raise UsageError(f"this worker is {self._state}; a worker is started once")
        self._state = "serving"
        self._started = time.monotonic()
        self._observers.opened()
        self._runs.open()
        self._watchdog = Watchdog(asyncio.get_running_loop(), self.options.blocked_after, self._runs.name_of)
        try:
            subscriptions = [await self._enter(service) for service in self.services]
            control = self._names.control_queue(tuple(service.name for service in self.services))
            subscriptions.append(Subscription(control, self._on_control, no_ack=True))
            listener = Listener(
                consuming=self._consuming,
                consuming_lost=self._consuming_lost,
                publishing=self._publishing,
                publishing_lost=self._publishing_lost,
                publishing_blocked=self._blocked,
            )
            exchanges = self._names.exchanges(self.options.reply_exchange)
            await self._transport.start(exchanges, subscriptions, listener)
        except BaseException:
            self._state = "stopped"
            await self._runs.abandon()
            await self._close()
            raise
        if self._closing is not None:
            raise ClosedError("the worker was stopped while it was being started")
        log.info(
            "worker started",
            services=[service.name for service in self.services],
            prefetch=self.options.prefetch,
            url=mask(self._url),
            namespace=self.options.namespace,
        )

    async def stop(self) -> bool:
        """Take nothing new, let what runs end within the grace time, and close.

        Returns:
            Whether everything ended. What did not is cancelled, and its callers get `OutcomeUnknown` at once.
            Cancelling this does not stop it.

        """
        if self._closing is None:
            if self._state != "serving":
                return True
            self._state = "stopping"
            self._stopping.set()
            self._closing = asyncio.get_running_loop().create_task(self._stop())
        return await asyncio.shield(self._closing)

    async def _stop(self) -> bool:
        await self._transport.stop_consuming()
        clean = True
        try:
            async with asyncio.timeout(self.options.grace):
                while self._held:  # turned away, as soon as there is a way to say so
                    await self._start_pump()
                await self._runs.all_done()
        except TimeoutError:
            clean = False
        self._state = "stopped"
        if self._pump is not None:
            self._pump.cancel()
        await self._runs.abandon()
        await self._close()
        log.info("worker stopped", clean=clean)
        return clean

    async def _close(self) -> None:
        try:
            await self._transport.close()
            await self._lifespans.aclose()
        finally:
            if self._watchdog is not None:
                self._watchdog.close()
            self._consuming_up = self._publishing_up = False
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
        """Let `run` stop; to be called from a signal handler of the event loop."""
        self._stopping.set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def in_flight(self) -> int:
        """Requests that it holds: running, or answered and not yet acknowledged."""
        return len(self._runs) + len(self._held)

    @property
    def connected(self) -> bool:
        """Whether both sessions are up and it takes requests: not before `start`, and no longer once it stops."""
        return not self.why_not_ready()

    def why_not_ready(self) -> str:
        """Why it takes no requests now, for people; empty where it does. May be called from another thread."""
        if self._state != "serving":
            return f"the worker is {self._state}"
        down = [name for name, up in (("consuming", self._consuming_up), ("publishing", self._publishing_up)) if not up]
        return f"the {' and the '.join(down)} session to the broker is down" if down else ""

    def counts(self) -> Mapping[str, int]:
        """What it counts, for observers: the numbers of `WorkerStats`, and how often its loop was blocked."""
        watchdog = self._watchdog
        return {
            "in_flight": self.in_flight,
            "finished": self._runs.finished,
            "refused_redeliveries": self.refused_redeliveries,
            "expired_on_arrival": self.expired_on_arrival,
            "unroutable_replies": self._runs.unroutable_replies,
            "replayed": self._runs.replayed,
            "loop_blocks": 0 if watchdog is None else watchdog.blocks,
        }

    @property
    def refused_redeliveries(self) -> int:
        """Requests answered and not run, because a worker that held them was lost."""
        return self._runs.refused_redeliveries

    async def _enter(self, service: Service) -> Subscription:
        served = _Served(service)
        if service.lifespan is not None:
            served.state = await self._lifespans.enter_async_context(service.lifespan())
        queue = self._names.request_queue(service.name, service.queue_type, service.queue)
        return Subscription(
            queue,
            partial(self._on_request, served),
            prefetch=self.options.prefetch,
            # RabbitMQ 4.3 refuses it for a classic queue.
            arguments={"x-consumer-timeout": CONSUMER_TIMEOUT} if service.queue_type == "quorum" else {},
        )

    # Requests.

    def _on_request(self, served: _Served, delivery: Delivery) -> None:
        if self._held or not self._consuming_up or not self._transport.can_publish:
            # What cannot be answered is not begun, and nothing before the session has all of its queues.
            self._held.append((served, delivery))
            if self._consuming_up:
                self._start_pump()
        else:
            self._accept(served, delivery)

    def _accept(self, served: _Served, delivery: Delivery) -> None:
        if self._state == "stopped":
            return  # left to the broker
        request = self._read(served.service, delivery)
        if request is None:
            delivery.ack()
            return
        key = request.reply_to, request.correlation_id
        if delivery.redelivered and self._runs.adopt(key, delivery):
            return  # it came over a session that was lost, and still runs here
        if self._cancels and self._cancels.pop(key, None) is not None:
            delivery.ack()
            return
        moved = delivery.exchange != self._requests
        may_have_run = None
        if delivery.redelivered or moved:
            may_have_run = why_it_may_have_run(request, redelivered=delivery.redelivered, moved=moved)
        if may_have_run is not None and self._runs.holds(key):
            delivery.ack()  # a copy of a call that runs here, and will be answered
            return
        run = Running(self._runs, delivery, key, may_have_run)
        if self._observers.requests:
            run.seen = self._seen(served.service, request, delivery)
        now = time.monotonic()
        try:
            if self._state == "stopping" and may_have_run is None:  # else there may be an answer for it
                raise ServiceUnavailable("the worker shuts down, and did not begin")
            if len(delivery.properties) > MAX_PROPERTIES:
                raise TooLarge(f"the properties are {len(delivery.properties)} bytes; the limit is {MAX_PROPERTIES}")
            job = admit(
                served.service,
                request,
                delivery.body,
                delivery.body_size,
                may_have_run=may_have_run,
                max_body=self.options.max_body,
                wall_ms=time.time() * 1000,
                now=now,
                state=served.state,
            )
        except CallError as error:
            self._refused(served.service, error, key)
            self._runs.refuse(run, error)
        else:
            self._runs.begin(run, job, now)

    def _seen(self, service: Service, request: Request, delivery: Delivery) -> SeenRequest:
        """A request, as observers see it. It may name any method: only those that there are count."""
        method = service.find(request.method)
        name, label = ("", service.name) if method is None else (method.name, method.label)
        seen = SeenRequest(self._requests, service.name, name, label)
        seen.correlation_id = request.correlation_id.decode("utf-8", "replace")
        seen.attempt = request.attempt if type(request.attempt) is int else 1
        seen.caller = request.app_id
        seen.headers = request.headers
        seen.body_size = delivery.body_size
        return seen

    def _read(self, service: Service, delivery: Delivery) -> Request | None:
        """What the request says, or None where it cannot be answered, and so is not run."""
        try:
            request = wire.read_request(delivery.properties)
        except MalformedProperties as error:
            self._seldom.warning("request dropped", service=service.name, cause=str(error))
            return None
        reply_to = request.reply_to
        if request.correlation_id and reply_to.startswith(self._reply_prefixes):
            return request
        if not reply_to:
            return request
        if not request.correlation_id:
            why = "it wants a reply and has no correlation_id"
        elif any(it.fullmatch(reply_to) for it in self._may_reply_to):
            return request
        else:
            why = f"its reply_to is {reply_to!r}; the worker's option reply_to says what else is allowed"
            if self.options.reply_exchange is not None:
                why += ", and rpcq clients need the option reply_exchange as this worker has it"
        correlation_id = request.correlation_id.decode("utf-8", "replace")
        self._seldom.warning("request dropped", service=service.name, correlation_id=correlation_id, cause=why)
        return None

    def _refused(self, service: Service, error: CallError, key: tuple[bytes, bytes]) -> None:
        """Say what tells that something is wrong elsewhere, and what nobody else will hear of."""
        correlation_id = key[1].decode("utf-8", "replace")
        if isinstance(error, ExpiredOnArrival):
            self.expired_on_arrival += 1
            self._seldom.warning(
                "request expired on arrival; if this goes on, compare the clocks of callers and workers",
                correlation_id=correlation_id,
                late_ms=round(error.late_ms),
                so_far=self.expired_on_arrival,
            )
        elif isinstance(error, PermissionDenied):
            self._seldom.warning("call denied", correlation_id=correlation_id, cause=error.message)
        elif not key[0]:
            self._seldom.warning(
                "request refused, and its caller wants no reply",
                service=service.name,
                correlation_id=correlation_id,
                code=error.code,
                cause=error.message,
            )

    def _start_pump(self) -> asyncio.Task[None]:
        if self._pump is None or self._pump.done():
            self._pump = asyncio.get_running_loop().create_task(self._accept_held())
        return self._pump

    async def _accept_held(self) -> None:
        while self._held:
            await self._transport.writable()
            while self._held and self._transport.can_publish:
                self._accept(*self._held.popleft())

    # What the transport tells.

    def _consuming(self, _queues: Sequence[str]) -> None:
        self._consuming_up = True
        self._observers.session("consuming")
        if self._held:
            self._start_pump()

    def _consuming_lost(self, cause: BrokerError) -> None:
        self._held.clear()  # the broker delivers it again
        self._consuming_up = False
        self._observers.session("consuming", cause)

    def _publishing(self) -> None:
        if not self._publishing_up:  # else it was blocked
            self._publishing_up = True
            self._observers.session("publishing")

    def _publishing_lost(self, cause: BrokerError) -> None:
        self._publishing_up = False
        self._observers.session("publishing", cause)

    def _blocked(self, reason: str) -> None:
        log.warning("the broker takes no replies; nothing new is begun", reason=reason)

    # Control.

    def _on_control(self, delivery: Delivery) -> None:
        try:
            found = decode(delivery.properties)
        except MalformedProperties as error:
            self._seldom.warning("control message dropped", cause=str(error))
            return
        reply_to, correlation_id = found.reply_to or b"", found.correlation_id or b""
        if not reply_to or not correlation_id:
            self._seldom.warning("control message dropped", cause="it has no reply_to or no correlation_id")
        elif found.type == wire.CANCEL:
            self._cancel((reply_to, correlation_id), found)
        elif not reply_to.startswith(self._reply_prefixes):
            self._seldom.warning("control message dropped", cause=f"its reply_to is {reply_to!r}")
        elif not self._answerer.answer(found.type or b"", reply_to, correlation_id):
            self._seldom.warning(
                "control message dropped", cause=f"its type is {found.type!r}, which this version does not know"
            )

    def _stats(self) -> WorkerStats:
        info = self._info
        return WorkerStats(
            name=info.name,
            host=info.host,
            pid=info.pid,
            time_ms=time.time() * 1000,
            uptime=time.monotonic() - self._started,
            in_flight=self.in_flight,
            finished=self._runs.finished,
            refused_redeliveries=self.refused_redeliveries,
            expired_on_arrival=self.expired_on_arrival,
            unroutable_replies=self._runs.unroutable_replies,
            replayed=self._runs.replayed,
        )

    def _cancel(self, key: tuple[bytes, bytes], found: Properties) -> None:
        if self._runs.cancel(key):
            return
        # It may still be in the queue, or with another worker.
        now_ms = time.time() * 1000
        until = (found.headers or {}).get(wire.DEADLINE)
        self._cancels[key] = until if isinstance(until, int) else now_ms + MAX_TIMEOUT * 1000
        if len(self._cancels) > REMEMBERED_CANCELS:
            kept = [(it, end) for it, end in self._cancels.items() if end > now_ms]
            self._cancels = dict(kept[-REMEMBERED_CANCELS // 2 :])


def _check(services: tuple[Service, ...]) -> None:
    if not services:
        raise ConfigurationError("a worker without services; give it at least one")
    for service in services:
        if not isinstance(service, Service):
            raise ConfigurationError(f"{service!r} is no Service")
        service.check()
    names = [service.name for service in services]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"two services are called {', '.join(twice)}; a worker serves each once")
    queues = [service.queue for service in services if service.queue is not None]
    if shared := sorted({queue for queue in queues if queues.count(queue) > 1}):
        raise ConfigurationError(f"two services share the queue {', '.join(shared)}; each has its own")
