"""The worker: a consumer pool that runs handlers and replies.

Its order is fixed: parse, check the deadline, validate, run, publish the reply, wait for its confirm, acknowledge.
Every delivery starts in the loop iteration that brings it: prefetch is the concurrency, and there is no backlog.
"""

from __future__ import annotations

import asyncio
import contextvars
import re
import secrets
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, Unpack

from rpcq import deadline as deadlines
from rpcq import logs, wire
from rpcq.contract import Context, Method, Service, check_body
from rpcq.deadline import Deadline
from rpcq.environment import broker_url
from rpcq.errors import (
    BrokerError,
    CallError,
    CallTimeout,
    ConfigurationError,
    InvalidReply,
    MethodNotFound,
    OutcomeUnknown,
    RemoteError,
    ServiceUnavailable,
    UsageError,
    to_wire,
)
from rpcq.properties import MalformedProperties, Properties, decode
from rpcq.settings import MAX_TIMEOUT, WorkerOptions, WorkerSettings
from rpcq.transport.base import Delivery, Listener, Outgoing, Settled, Subscription, Transport
from rpcq.transport.opening import open_transport
from rpcq.transport.topology import DIRECT_REPLY_TO, Names
from rpcq.url import mask
from rpcq.wire import Request

MARGIN: Final = 0.1
"""Seconds, at most a twentieth of what is left, that a handler ends before the caller's deadline: so that the word
that it ran gets there in time."""

REMEMBERED_CANCELS: Final = 10_000
"""Calls cancelled before they arrived that a worker remembers."""

log = logs.get_logger("rpcq.worker")


class _Served:
    """A service being served."""

    __slots__ = ("service", "state")

    def __init__(self, service: Service) -> None:
        self.service = service
        self.state: Any = None


class _Job:
    """One request, from its delivery to its acknowledgement."""

    __slots__ = (
        "args",
        "cancelled",
        "deadline",
        "delivery",
        "handler_ms",
        "key",
        "limit",
        "method",
        "params",
        "queue_ms",
        "request",
        "started",
        "state",
        "task",
        "thread",
        "timed_out",
        "timer",
    )

    def __init__(self, delivery: Delivery, reply_to: bytes | None, correlation_id: bytes | None) -> None:
        self.delivery = delivery
        self.key = (reply_to or b"", correlation_id or b"")
        self.queue_ms: float | None = None
        self.handler_ms = 0.0
        self.limit = 0.0
        self.method: Method
        self.args: tuple[Any, ...]
        self.params: dict[str, Any]
        self.request: Request
        self.deadline: Deadline
        self.state: Any = None
        self.started = 0.0  # on time.perf_counter(); 0 before the task has run
        self.task: asyncio.Task[None] | None = None
        self.thread: asyncio.Future[Any] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.timed_out = False
        self.cancelled = False

    @property
    def correlation_id(self) -> str:
        return self.key[1].decode("utf-8", "replace")

    def context(self) -> Context:
        request = self.request
        return Context(
            service=self.method.service,
            method=self.method.name,
            correlation_id=self.correlation_id,
            deadline=self.deadline,
            attempt=request.attempt,
            idempotency_key=request.idempotency_key,
            caller=request.app_id,
            metadata=request.metadata,
            state=self.state,
        )


class Worker:
    """Serves one or more services from one process.

    Use it as an async context manager, which serves while inside, or await `run`.

    Args:
        services: at least one, each with at least one method.
        url: the broker, as for `Client`; `RPCQ_URL` if None.
        options: as in `WorkerOptions`.

    Raises:
        ConfigurationError: a service, the URL or an option cannot be used.

    """

    def __init__(self, *services: Service, url: str | None = None, **options: Unpack[WorkerSettings]) -> None:
        if not services:
            raise ConfigurationError("a worker without services; give it at least one")
        for service in services:
            if not isinstance(service, Service):
                msg = f"{service!r} is no Service"
                raise ConfigurationError(msg)
            service.check()
        names = [service.name for service in services]
        if twice := {name for name in names if names.count(name) > 1}:
            msg = f"two services are called {sorted(twice)}; a worker serves each once"
            raise ConfigurationError(msg)
        self.options = WorkerOptions(**options)
        self.services = services
        self._url = broker_url(url)
        self._transport: Transport = open_transport(self._url, self.options)
        self._names = Names(self.options.namespace)
        self._may_reply_to = [re.compile(pattern.encode()) for pattern in self.options.reply_to]
        self._replies = wire.ReplyEncoder()
        self._pool: ThreadPoolExecutor | None = None
        self._lifespans = AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop
        self._state = "new"
        self._jobs: dict[tuple[bytes, bytes], _Job] = {}
        self._unnamed: set[_Job] = set()  # no reply is wanted, or the caller used a correlation ID twice
        self._held: deque[tuple[_Served, Delivery]] = deque()
        self._unsent: deque[tuple[_Job, Outgoing]] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._cancels: dict[tuple[bytes, bytes], float] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = asyncio.Event()
        self.unroutable_replies = 0
        self.refused_redeliveries = 0
        self.expired_on_arrival = 0
        self._last_warning = 0.0

    # Starting and stopping.

    async def start(self) -> None:
        """Enter the services' lifespans, declare the queues and begin to consume.

        Raises:
            BrokerError: the broker cannot be used; the message says why. Nothing is left open.
            UsageError: it was started before.

        """
        if self._state != "new":
            msg = f"this worker is {self._state}; a worker is started once"
            raise UsageError(msg)
        self._loop = asyncio.get_running_loop()
        self._state = "serving"
        try:
            subscriptions = [await self._enter(service) for service in self.services]
            control = self._names.control_queue(tuple(service.name for service in self.services))
            subscriptions.append(Subscription(control, self._on_control, no_ack=True))
            listener = Listener(
                consuming=lambda _: None,
                consuming_lost=self._consuming_lost,
                publishing=lambda: None,
                publishing_lost=lambda _: None,
                publishing_blocked=self._blocked,
            )
            await self._transport.start([self._names.requests, self._names.control], subscriptions, listener)
        except BaseException:
            self._state = "stopped"
            await self._transport.close()
            await self._leave()
            raise
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
            Whether everything ended. What did not is cancelled and left to the broker unacknowledged: its callers
            get `OutcomeUnknown`.

        """
        if self._state != "serving":
            return True
        self._state = "stopping"
        self._stopping.set()
        await self._transport.stop_consuming()
        clean = True
        try:
            async with asyncio.timeout(self.options.grace):
                if self._held:
                    self._start_pump()  # which turns them away now
                await self._idle.wait()
        except TimeoutError:
            clean = False
            jobs = [*self._jobs.values(), *self._unnamed]
            log.error(  # noqa: TRY400 - the exception says nothing
                "grace time over", running=[job.correlation_id for job in jobs[:20]], count=len(jobs)
            )
        self._state = "stopped"
        if self._pump is not None:
            self._pump.cancel()
        tasks = [job.task for job in (*self._jobs.values(), *self._unnamed) if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transport.close()
        await self._leave()
        log.info("worker stopped", clean=clean)
        return clean

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
        """Requests that it holds: running, or answered and not yet confirmed."""
        return len(self._jobs) + len(self._unnamed) + len(self._held)

    async def _enter(self, service: Service) -> Subscription:
        served = _Served(service)
        if service.lifespan is not None:
            served.state = await self._lifespans.enter_async_context(service.lifespan())
        queue = self._names.request_queue(service.name, service.queue_type, service.queue)
        return Subscription(queue, partial(self._on_request, served), prefetch=self.options.prefetch)

    async def _leave(self) -> None:
        if self._pool is not None:
            # Threads cannot be ended: what still runs after the grace time is left behind.
            self._pool.shutdown(wait=False, cancel_futures=True)
        await self._lifespans.aclose()

    # From delivery to start.

    def _on_request(self, served: _Served, delivery: Delivery) -> None:
        if self._state == "stopped":
            return  # left to the broker
        if not self._transport.can_publish or self._held:
            # What cannot be answered is not begun.
            self._held.append((served, delivery))
            self._idle.clear()
            self._start_pump()
            return
        self._accept(served, delivery)

    def _accept(self, served: _Served, delivery: Delivery) -> None:
        try:
            found = decode(delivery.properties)
        except MalformedProperties as error:
            log.warning("request dropped", service=served.service.name, cause=str(error))
            delivery.ack()
            return
        job = _Job(delivery, found.reply_to, found.correlation_id)
        if not self._may_answer(served, job, found):
            delivery.ack()
            return
        if delivery.redelivered and (running := self._jobs.get(job.key)) is not None and found.reply_to:
            running.delivery = delivery  # it came over a session that was lost, and still runs here
            return
        try:
            self._prepare(served, job, found)
        except CallError as error:
            self._register(job)
            self._reply_error(job, error)
            return
        if self._cancels and self._cancels.pop(job.key, None) is not None:
            delivery.ack()
            return
        self._register(job)
        job.timer = self._loop.call_later(job.limit, self._time_out, job)
        job.task = self._loop.create_task(self._run(job))

    def _may_answer(self, served: _Served, job: _Job, found: Properties) -> bool:
        reply_to = found.reply_to
        if not reply_to:
            return True
        if not found.correlation_id:
            why = "it wants a reply and has no correlation_id"
        elif self._names.may_reply_to(reply_to) or any(it.fullmatch(reply_to) for it in self._may_reply_to):
            return True
        else:
            why = f"its reply_to is {reply_to!r}; the worker's option reply_to says what else is allowed"
        log.warning("request refused", service=served.service.name, correlation_id=job.correlation_id, cause=why)
        return False

    def _prepare(self, served: _Served, job: _Job, found: Properties) -> None:
        """Check everything that can be checked before the handler runs.

        Raises:
            CallError: what the caller is told instead.

        """
        service = served.service
        request = wire.read_request(found)
        if job.delivery.redelivered:
            # Whether to try again is the caller's to decide.
            self.refused_redeliveries += 1
            raise OutcomeUnknown("the worker that held the call was lost")
        left = self._time_left(service, request, job)
        method = service.find(request.method)
        if method is None:
            asked = f"no method {request.method!r}" if request.method else "several methods, and the request names none"
            msg = f"service {service.name!r} has {asked}; it has {', '.join(sorted(service.methods))}"
            raise MethodNotFound(msg)
        if request.attempt > 1 and not method.idempotent:
            msg = f"{method.label} is not declared idempotent, and an earlier attempt may have run"
            raise OutcomeUnknown(msg)
        body = check_body(job.delivery.body, job.delivery.body_size, self.options.max_body)
        job.args, job.params = method.read_params(body)
        job.method = method
        job.limit = left - min(MARGIN, left / 20)
        if method.timeout is not None and method.timeout < job.limit:
            job.limit = method.timeout
        job.request = request
        job.deadline = Deadline(time.monotonic() + job.limit)
        job.state = served.state

    def _time_left(self, service: Service, request: Request, job: _Job) -> float:
        """Seconds until the caller's deadline.

        Raises:
            CallTimeout: it has passed.

        """
        now_ms = time.time() * 1000
        left_ms = service.timeout * 1000
        if request.timeout_ms is not None:
            left_ms = float(request.timeout_ms)
        if request.deadline_ms is not None:
            absolute = request.deadline_ms - now_ms
            if absolute <= 0:
                self._expired(job, -absolute)
                msg = f"the deadline had passed {-absolute:.0f} ms ago by the worker's clock"
                raise CallTimeout(msg, executed="no")
            if request.timeout_ms is None:
                left_ms = absolute
            else:
                job.queue_ms = max(0.0, now_ms - (request.deadline_ms - request.timeout_ms))
                left_ms = min(left_ms, absolute)
        if left_ms <= 0:
            raise CallTimeout("no time was left when the request was sent", executed="no")
        return min(left_ms / 1000, MAX_TIMEOUT)

    def _expired(self, job: _Job, late_ms: float) -> None:
        self.expired_on_arrival += 1
        now = time.monotonic()
        if now - self._last_warning > 1.0:  # under overload there are thousands
            self._last_warning = now
            log.warning(
                "request expired on arrival; if this goes on, compare the clocks of callers and workers",
                correlation_id=job.correlation_id,
                late_ms=round(late_ms),
                so_far=self.expired_on_arrival,
            )

    def _register(self, job: _Job) -> None:
        if not job.key[0] or self._jobs.setdefault(job.key, job) is not job:
            self._unnamed.add(job)
        self._idle.clear()

    # Running.

    async def _run(self, job: _Job) -> None:
        method = job.method
        job.started = time.perf_counter()
        deadlines.current.set(job.deadline)
        try:
            if method.is_async:
                value = await method.call(job.args, job.params, job.context)
            else:
                value = await self._run_in_thread(job)
        except asyncio.CancelledError:
            self._interrupted(job)
        except method.errors as error:
            self._finished(job)
            self._reply_error(job, error)
        except Exception as error:  # noqa: BLE001 - the handler's own; logged and answered
            self._finished(job)
            self._failed(job, error)
        else:
            self._finished(job)
            self._reply_value(job, value)

    async def _run_in_thread(self, job: _Job) -> Any:
        call = partial(contextvars.copy_context().run, job.method.call, job.args, job.params, job.context)
        job.thread = self._loop.run_in_executor(self._threads(), call)
        return await asyncio.shield(job.thread)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            # A thread for each slot; they are started as they are needed.
            slots = self.options.prefetch * len(self.services)
            self._pool = ThreadPoolExecutor(slots, thread_name_prefix="rpcq")
        return self._pool

    def _finished(self, job: _Job) -> None:
        if job.started:
            job.handler_ms = (time.perf_counter() - job.started) * 1000
        if job.timer is not None:
            job.timer.cancel()

    def _time_out(self, job: _Job) -> None:
        job.timed_out = True
        self._interrupt(job)

    def _interrupt(self, job: _Job) -> None:
        if job.task is None or job.task.done():
            return
        job.task.cancel()
        if not job.started:  # cancelled before its first step, the task never gets to say so
            self._interrupted(job)

    def _interrupted(self, job: _Job) -> None:
        """The handler was cancelled; by whom decides what is said."""
        self._finished(job)
        if job.timed_out:
            msg = f"{job.method.label} ran into the deadline after {job.handler_ms / 1000:.3f} s"
            self._reply_error(job, CallTimeout(msg, executed="yes", retryable=False))
        elif job.cancelled:
            self._settle(job)
        elif self._state != "stopped":  # else it is left to the broker
            self._failed(job, asyncio.CancelledError("the handler cancelled itself"))

    def _failed(self, job: _Job, error: BaseException) -> None:
        """An exception that the service does not declare: its text stays here."""
        incident = secrets.token_hex(6)
        log.error(
            "handler failed",
            method=job.method.label,
            correlation_id=job.correlation_id,
            incident=incident,
            duration_ms=round(job.handler_ms, 3),
            exc_info=error,
        )
        self._reply_error(job, RemoteError(f"{job.method.label} failed", incident=incident))

    # From reply to acknowledgement.

    def _reply_value(self, job: _Job, value: Any) -> None:
        try:
            body = job.method.write_result(value, self.options.max_body)
        except InvalidReply as error:
            log.exception("result cannot be sent", method=job.method.label, correlation_id=job.correlation_id)
            self._reply_error(job, error)
        else:
            self._reply(job, wire.RESULT, body)

    def _reply_error(self, job: _Job, error: CallError) -> None:
        try:
            body = wire.dumps(to_wire(error))
        except ValueError:
            body = b""
        if not body or len(body) > self.options.max_body:
            log.error("an error's details cannot be sent", correlation_id=job.correlation_id, code=error.code)
            body = wire.dumps(to_wire(error) | {"details": None, "message": error.message[:1000]})
        self._reply(job, wire.ERROR, body)

    def _reply(self, job: _Job, kind: bytes, body: bytes) -> None:
        reply_to, correlation_id = job.key
        if not reply_to:
            self._settle(job)
            return
        message = Outgoing(
            b"",
            reply_to,
            correlation_id,
            self._replies.encode(kind, correlation_id, job.queue_ms, job.handler_ms),
            body,
            lambda settled: self._replied(job, message, settled),
            not reply_to.startswith(DIRECT_REPLY_TO),  # which RabbitMQ may return even when it delivers it
        )
        self._transport.publish(message)

    def _replied(self, job: _Job, message: Outgoing, settled: Settled) -> None:
        if settled in (Settled.UNSENT, Settled.UNKNOWN):
            if self._state != "stopped":
                self._unsent.append((job, message))  # published again once there is a way
                self._start_pump()
            return
        if settled is not Settled.CONFIRMED:
            self.unroutable_replies += 1
            log.info("the caller is gone", correlation_id=job.correlation_id, reply=settled.value)
        self._settle(job)

    def _settle(self, job: _Job) -> None:
        """Acknowledge, once the thread has ended too: it holds the slot that prefetch gave it."""
        if job.thread is not None and not job.thread.done():
            job.thread.add_done_callback(lambda _: self._settle(job))
            return
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
        else:
            self._unnamed.discard(job)
        job.delivery.ack()
        self._check_idle()

    def _check_idle(self) -> None:
        if not self.in_flight:
            self._idle.set()

    # Waiting for a way to answer.

    def _start_pump(self) -> None:
        if self._pump is None or self._pump.done():
            self._pump = self._loop.create_task(self._send_waiting())

    async def _send_waiting(self) -> None:
        """Publish replies that were lost, then begin what was held, as soon as there is a way."""
        while self._unsent or self._held:
            await self._transport.writable()
            while self._unsent and self._transport.can_publish:
                _, message = self._unsent.popleft()
                self._transport.publish(message)
            while self._held and self._transport.can_publish:
                served, delivery = self._held.popleft()
                if self._state == "serving":
                    self._accept(served, delivery)
                else:
                    self._refuse(delivery)
                self._check_idle()

    def _refuse(self, delivery: Delivery) -> None:
        """Say that it was not begun; rpcq clients send it again."""
        try:
            found = decode(delivery.properties)
        except MalformedProperties:
            delivery.ack()
            return
        job = _Job(delivery, found.reply_to, found.correlation_id)
        self._register(job)
        self._reply_error(job, ServiceUnavailable("the worker shuts down, and did not begin"))

    # What the transport tells.

    def _consuming_lost(self, _cause: BrokerError) -> None:
        self._held.clear()  # the broker delivers it again
        self._check_idle()

    def _blocked(self, reason: str) -> None:
        log.warning("the broker takes no replies; nothing new is begun", reason=reason)

    # Control.

    def _on_control(self, delivery: Delivery) -> None:
        try:
            found = decode(delivery.properties)
        except MalformedProperties as error:
            log.warning("control message dropped", cause=str(error))
            return
        reply_to, correlation_id = found.reply_to or b"", found.correlation_id or b""
        if found.type == wire.CANCEL and reply_to and correlation_id:
            self._cancel((reply_to, correlation_id), found)
        elif found.type == wire.PING and reply_to and correlation_id and self._names.may_reply_to(reply_to):
            properties = self._replies.encode(wire.RESULT, correlation_id, None, 0.0)
            body = wire.dumps({"services": [service.name for service in self.services], "name": self.options.name})
            self._transport.publish(Outgoing(b"", reply_to, correlation_id, properties, body, lambda _: None))

    def _cancel(self, key: tuple[bytes, bytes], found: Properties) -> None:
        job = self._jobs.get(key)
        if job is not None:
            job.cancelled = True
            self._interrupt(job)
            return
        now = time.time()
        until = (found.headers or {}).get(wire.DEADLINE)
        self._cancels[key] = until / 1000 if isinstance(until, int) else now + MAX_TIMEOUT
        if len(self._cancels) > REMEMBERED_CANCELS:
            self._cancels = {it: end for it, end in self._cancels.items() if end > now}
            while len(self._cancels) > REMEMBERED_CANCELS:
                self._cancels.pop(next(iter(self._cancels)))
