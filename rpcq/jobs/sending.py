"""Sends jobs: each send ends when the broker has the job in its queue, or with an error that says what is known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from rpcq import logs
from rpcq.contracts import METHOD_NAME, RemoteCallable, RemoteJob
from rpcq.errors import BrokerError, ClosedError, ConfigurationError, InvalidParams, SendError, UsageError
from rpcq.jobs.observing import SendObservation, SendObservers
from rpcq.observer import Queued
from rpcq.options import MAX_DELAY, CallOptions, ClientOptions, Priority, check_name
from rpcq.runtime.backlog import Backlog
from rpcq.runtime.timeouts import Bucket, Timeouts
from rpcq.service import Method, jobs_of
from rpcq.transport.base import Outgoing, Published, Transport
from rpcq.wire import bodies
from rpcq.wire.delays import STEP, steps_of
from rpcq.wire.jobs import Job, JobMessage, JobTopology, check_headers, encode_job
from rpcq.wire.topology import Exchange

log = logs.get_logger("rpcq.client")

REFUSED_PAUSE: Final = 0.1
"""Seconds before a job is sent again that the broker refused: its queue elects a leader."""

DECLARE: Final = "run `rpcq setup`, or start one of its workers, first"

_CONFIRMED: Final = Published.CONFIRMED  # a name of its own: getting at an enum's member is slow in CPython 3.11


class _Sending(Outgoing):
    """A job on its way to the broker."""

    __slots__ = ("done", "is_once", "job", "may_be_queued", "sender")

    def __init__(
        self, sender: JobSender, job: Job, route: tuple[bytes, bytes], properties: bytes, body: bytes, *, is_once: bool
    ) -> None:
        super().__init__(*route, job.id.encode(), properties, body)
        self.sender = sender
        self.job = job
        self.done: asyncio.Future[None] = sender.loop.create_future()
        self.is_once = is_once
        self.may_be_queued = False

    def on_published(self, published: Published) -> None:
        """See `Outgoing`."""
        if published is _CONFIRMED:
            if not self.done.done():
                self.done.set_result(None)
        else:
            self.sender.not_confirmed(self, published)


class _Batch:
    """The jobs of one `send`, which share its timeout."""

    __slots__ = ("seconds", "sendings", "timeout")

    def __init__(self, sendings: Sequence[_Sending], seconds: float) -> None:
        self.sendings = sendings
        self.seconds = seconds
        self.timeout: Bucket | asyncio.TimerHandle | None = None

    def end(self, why: str) -> None:
        """End those that are not confirmed."""
        for sending in self.sendings:
            _end(sending, why)


class _Declared:
    """Exchanges that have to be there before something is published to them."""

    __slots__ = ("exchanges", "is_there", "task")

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self.exchanges = exchanges
        self.task: asyncio.Task[None] | None = None
        self.is_there = False


@dataclass(frozen=True, slots=True)
class _When:
    """When a job is to be done.

    Attributes:
        steps: of 250 ms that the broker holds it; 0 for at once.
        due_ms: the end of that time, in milliseconds since the epoch; None for at once.
        expires_ms: when it need not be begun any more; None for never.

    """

    steps: int = 0
    due_ms: int | None = None
    expires_ms: int | None = None


_AT_ONCE: Final = _When()


class JobSender:
    """Sends the jobs of a client.

    Args:
        transport: the client's.
        topology: of the namespace.
        next_id: makes an ID that nobody can guess.
        options: the client's.
        observers: of sends, as `Observers.sends` has them.

    """

    def __init__(
        self,
        transport: Transport,
        topology: JobTopology,
        next_id: Callable[[], bytes],
        options: ClientOptions,
        observers: SendObservers = (),
    ) -> None:
        self._transport = transport
        self._topology = topology
        self._next_id = next_id
        self._name = options.name
        self._max_body = options.max_body
        self._observers = observers
        self._waiting: Backlog[_Sending] = Backlog(lambda: transport.can_publish, transport.writable, transport.publish)
        self._now = _Declared([topology.jobs])
        self._later = _Declared([*topology.ladder.exchanges(), topology.due])
        self._under_way: set[_Batch] = set()
        self._timeouts: Timeouts[_Batch]
        self._closed = False
        self.exchange = topology.jobs.name.encode()
        self.loop: asyncio.AbstractEventLoop

    def open(self) -> None:
        """From now on, in this event loop."""
        self.loop = asyncio.get_running_loop()
        self._timeouts = Timeouts(self.loop, _time_out)

    async def close(self) -> None:
        """End every send that is under way."""
        self._closed = True
        for declared in (self._now, self._later):
            if declared.task is not None:
                declared.task.cancel()
        await self._waiting.close()
        self._timeouts.close()
        for batch in self._under_way:
            batch.end("the client was closed")

    def send(
        self,
        target: str | Callable[..., Any],
        options: CallOptions,
        several: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]],
    ) -> Coroutine[Any, Any, list[Job]]:
        """Send jobs of one name, and wait until the broker has all of them.

        Raises:
            SendError: of the first job that failed. Its `queued` is about that job; others may be in the queue.

        """
        if self._observers:
            return self._observed(target, options, several)
        return self._send(target, options, several, [], [])

    async def _observed(
        self,
        target: str | Callable[..., Any],
        options: CallOptions,
        several: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]],
    ) -> list[Job]:
        """Send jobs and call the observers with each."""
        sendings: list[_Sending] = []
        observations: list[SendObservation] = []
        failed: BaseException | None = None
        try:
            return await self._send(target, options, several, sendings, observations)
        except BaseException as error:
            failed = error
            raise
        finally:
            for number, observation in enumerate(observations):
                observation.end(*_known(sendings[number] if number < len(sendings) else None, failed))
            del failed, observations  # an error's traceback holds this frame

    async def _send(
        self,
        target: str | Callable[..., Any],
        options: CallOptions,
        several: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]],
        sendings: list[_Sending],
        observations: list[SendObservation],
    ) -> list[Job]:
        """Send jobs; `sendings` gets them, and `observations` what observers see of each."""
        service, name, method = find_job(target)
        when = self._when(options) if options.is_for_jobs else _AT_ONCE
        for args, params in several:
            sendings.append(self._prepare(service, name, method, options, when, args, params, observations))
        del several  # while many wait, the collector has less to look at
        until = time.monotonic() + options.timeout
        declared = self._later if when.steps else self._now
        if not declared.is_there:
            try:
                async with asyncio.timeout(options.timeout):
                    await self._declare(declared)
            except TimeoutError as error:
                msg = f"there was no connection to the broker within {options.timeout:g} s"
                raise SendError(msg, queued="no") from error
        batch = _Batch(sendings, options.timeout)
        self._under_way.add(batch)
        self._timeouts.set(batch, until, time.monotonic())
        try:
            for sending in sendings:
                self._publish(sending)
            for sending in sendings:
                await sending.done
        except BaseException:
            for sending in sendings:
                if sending.done.done() and not sending.done.cancelled():
                    sending.done.exception()  # the first one is raised; the others count as seen
                else:
                    sending.may_be_queued = sending.may_be_queued or not self.waits(sending)
                    sending.done.cancel()
                self._waiting.discard(sending)
            raise
        finally:
            self._timeouts.cancel(batch)
            self._under_way.discard(batch)
        return [sending.job for sending in sendings]

    def not_confirmed(self, sending: _Sending, published: Published) -> None:
        """The broker did not confirm a job: send it again, or end it with an error."""
        if sending.done.done():
            return
        match published:
            case Published.RETURNED:
                job = sending.job
                msg = f"no queue takes jobs that are delayed: {DECLARE}"
                if job.due is None:
                    msg = no_queue(job.service, job.priority)
                self._fail(sending, msg, is_certain=True)
            case Published.TOO_LARGE:
                msg = f"the parameters are {len(sending.body)} bytes of JSON, more than the broker takes"
                self._fail(sending, msg, is_certain=True)
            case Published.REFUSED | Published.UNKNOWN if sending.is_once:
                sending.may_be_queued = True
                self._fail(sending, "the broker did not confirm it, and it runs at most once", is_certain=False)
            case Published.REFUSED:
                sending.may_be_queued = True
                self.loop.call_later(REFUSED_PAUSE, self._resend, sending)
            case Published.UNKNOWN:
                sending.may_be_queued = True
                self._waiting.add(sending)  # again under the same ID and key
            case _:
                self._waiting.add(sending)

    def waits(self, sending: _Sending) -> bool:
        """Whether a job waits to be handed to the transport."""
        return sending in self._waiting.items

    def _resend(self, sending: _Sending) -> None:
        if not sending.done.done():
            self._publish(sending)

    def _publish(self, sending: _Sending) -> None:
        if self._waiting.items or not self._transport.can_publish:
            self._waiting.add(sending)
        else:
            self._transport.publish(sending)

    def _fail(self, sending: _Sending, message: str, *, is_certain: bool) -> None:
        queued = "no" if is_certain and not sending.may_be_queued else "maybe"
        job = sending.job
        sending.done.set_exception(SendError(message, queued=queued, job_id=job.id, key=job.key))  # type: ignore[arg-type]  # one of both

    async def _declare(self, declared: _Declared) -> None:
        """Wait until exchanges are declared: publishing to one that does not exist ends the session."""
        while declared.task is None or not declared.task.done() or not _succeeded(declared.task):
            if self._closed:
                raise ClosedError("this client is closed")
            if declared.task is None or declared.task.done():
                declared.task = self.loop.create_task(self._transport.declare(declared.exchanges))
            await asyncio.wait([declared.task])
            error = None if declared.task.cancelled() else declared.task.exception()
            if error is not None and (not isinstance(error, BrokerError) or error.permanent):
                raise error
        declared.is_there = True

    def _when(self, options: CallOptions) -> _When:
        """When a job is to be done, and when it need not be done any more.

        Raises:
            ConfigurationError: that is in the past, or too far away; or it expires before it is due.

        """
        now = self._transport.now_ms()
        seconds = 0.0 if options.delay is None else options.delay
        if options.at is not None:
            seconds = options.at.timestamp() - now / 1000
            if seconds < 0:
                raise ConfigurationError(f"at must be in the future; got {options.at}, {-seconds:.3f} s ago")
            if seconds > MAX_DELAY:
                raise ConfigurationError(f"at must be at most 48 days away; got {options.at}")
        steps = steps_of(seconds)
        due = now + round(steps * STEP * 1000) if steps else None
        expires = options.expires
        if isinstance(expires, datetime):
            expires_ms: int | None = round(expires.timestamp() * 1000)
        else:
            expires_ms = None if expires is None else now + round(expires * 1000)
        if expires_ms is not None and expires_ms <= (due or now):
            msg = f"expires must be after the job is due, and in the future; got {options.expires}"
            raise ConfigurationError(msg)
        return _When(steps, due, expires_ms)

    def _prepare(
        self,
        service: str,
        name: str,
        method: Method | RemoteJob | None,
        options: CallOptions,
        when: _When,
        args: tuple[Any, ...],
        params: Mapping[str, Any],
        observations: list[SendObservation],
    ) -> _Sending:
        if not isinstance(params, Mapping):
            msg = f"send_many must have the parameters of each job by name, as in {{'to': 'ada'}}; got {params!r:.100}"
            raise InvalidParams(msg)
        if method is not None:
            args, params = method.parameters.by_name(args, params)
        body = bodies.encode_params(args, params, self._max_body)
        if method is not None:
            method.parameters.read(body)
        job_id = self._next_id().decode()
        key = options.idempotency_key or job_id
        message = JobMessage(id=job_id, name=name, body=body, key=key, app_id=self._name, headers=options.metadata)
        if options.metadata:
            check_headers(options.metadata)
        if options.priority is not None:
            message.priority = options.priority
        priority = message.priority
        if priority != "normal" and isinstance(method, Method) and not method.lanes:
            msg = f"priority must not be {priority!r} for jobs of service {service!r}, which has no lanes"
            raise UsageError(f"{msg}: define it with Service(..., lanes=True), or send them without a priority")
        due, route = None, (self.exchange, self._topology.key(service, priority).encode())
        if when is not _AT_ONCE:
            message.due_ms, message.expires_ms = when.due_ms, when.expires_ms
            if when.due_ms is not None:
                due = datetime.fromtimestamp(when.due_ms / 1000, UTC)
                route = self._topology.ladder.route(when.steps, self._topology.address(service, priority))
        is_once = isinstance(method, Method) and method.job is not None and method.job.at_most_once
        if is_once and due is not None:
            msg = f"{service}.{name} runs at most once, and what is delayed may come twice after a crash of the broker"
            raise UsageError(f"{msg}: send it without delay and at")
        job = Job(job_id, service, name, key, due, priority)
        if self._observers:
            observations.append(SendObservation(self._observers, self.exchange, job, message))
        properties = encode_job(message, self._transport.now_ms())
        return _Sending(self, job, route, properties, body, is_once=is_once)


def find_job(target: str | Callable[..., Any]) -> tuple[str, str, Method | RemoteJob | None]:
    """The service and the name of a job, and the job itself if the target is its function, or of a bound contract.

    Raises:
        ConfigurationError: the name is not valid.
        UsageError: the target is not a job, or one of several services.

    """
    if isinstance(target, str):
        service, _, name = target.rpartition(".")
        if not METHOD_NAME.match(name) or not service:
            raise ConfigurationError(f"a job must be named 'service.job'; got {target!r}")
        return check_name("the name of a service", service), name, None
    if isinstance(target, RemoteJob):
        return target.service, target.name, target
    # By label: a program may make a service again, and the newest job of a name counts.
    found = [*{job.label: job for job in jobs_of(target)}.values()] if callable(target) else []
    if len(found) != 1:
        raise UsageError(
            "send takes 'service.job', a function with @service.job, or a job of a bound contract; "
            f"got {target!r}: {_why_not_job(target, found)}"
        )
    return found[0].service, found[0].name, found[0]


def no_queue(service: str, priority: Priority) -> str:
    """Why the broker returned a job of a service."""
    if priority == "normal":
        return f"no queue takes jobs of service {service!r}: {DECLARE}"
    return (
        f"no queue takes jobs of service {service!r} with priority {priority!r}: "
        f"define the service with lanes, Service(..., lanes=True), and {DECLARE}"
    )


def _why_not_job(target: Any, found: Sequence[Method]) -> str:
    if found:
        return f"it is a job of several services: send it by name, as one of {', '.join(job.label for job in found)}"
    if isinstance(target, RemoteCallable):
        return "it is a method: call it, do not send it"
    if (api := getattr(target, "__rpcq_api__", None)) is not None:
        return f"bind the contract first: client.send(client.bind({api.__name__}).{target.__name__}, ...)"
    return "it is not a job"


def _succeeded(task: asyncio.Task[None]) -> bool:
    return not task.cancelled() and task.exception() is None


def _known(sending: _Sending | None, failed: BaseException | None) -> tuple[Queued, BaseException | None]:
    """What is known of a job once its send has ended; `failed` is what its caller got."""
    if sending is None or not sending.done.done():  # it was never to be published
        return "no", failed
    if sending.done.cancelled():  # its caller is gone, or another job of the same send has failed
        return "maybe" if sending.may_be_queued else "no", failed
    error = sending.done.exception()
    return error.queued if isinstance(error, SendError) else "yes", error


def _end(sending: _Sending, why: str) -> None:
    if sending.done.done():
        return
    job = sending.job
    queued = "maybe" if sending.may_be_queued or not sending.sender.waits(sending) else "no"
    fix = f"; send it again with idempotency_key={job.key!r}" if queued == "maybe" else ""
    sending.done.set_exception(SendError(f"{why}{fix}", queued=queued, job_id=job.id, key=job.key))  # type: ignore[arg-type]  # one of both


def _time_out(batch: _Batch) -> None:
    batch.end(f"the broker did not confirm it within {batch.seconds:g} s")
