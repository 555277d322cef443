"""Sends jobs: each send ends when the broker has the job in its queue, or with an error that says what is known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from rpcq.contracts import RemoteJob, adapter_of
from rpcq.errors import ConfigurationError, SendError, UsageError
from rpcq.jobs.confirming import Confirms, Declared, Sending
from rpcq.jobs.observing import SendObservation, SendObservers
from rpcq.jobs.preparing import find_job, prepare, runs_at_most_once
from rpcq.observer import ObservedSend
from rpcq.options import MAX_DELAY, CallOptions, ClientOptions
from rpcq.service import Method
from rpcq.transport.base import Transport
from rpcq.watching import Read, WatchedJob, Watches
from rpcq.wire.delays import STEP, steps_of
from rpcq.wire.job_queues import DECLARE, JobTopology, lane_of, no_queue
from rpcq.wire.jobs import Job, encode_job


class _Sending(Sending):
    """A job on its way to the broker."""

    __slots__ = ("job",)

    def __init__(
        self, confirms: Confirms, job: Job, route: tuple[bytes, bytes], properties: bytes, body: bytes, *, is_once: bool
    ) -> None:
        super().__init__(confirms, job.id, job.key, route, properties, body, is_once=is_once)
        self.job = job

    def returned(self) -> None:
        """See `Sending`."""
        msg = f"no queue takes jobs that are delayed: {DECLARE}"
        if self.job.due is None:
            key = self.job.order_key
            msg = no_queue(self.job.service, self.job.priority if key is None else lane_of(key))
        self.fail(msg, is_certain=True)


@dataclass(frozen=True, slots=True)
class _Terms:
    """When a job is to be done, and who watches it.

    Attributes:
        steps: of 250 ms that the broker holds it; 0 for at once.
        due_ms: the end of that time, in milliseconds since the epoch; None for at once.
        expires_ms: when it need not be begun any more; None for never.
        reply_to: the queue in which its sender listens; empty if it does not.

    """

    steps: int = 0
    due_ms: int | None = None
    expires_ms: int | None = None
    reply_to: bytes = b""


_AT_ONCE: Final = _Terms()


class JobSender:
    """Sends the jobs of a client.

    Args:
        transport: the client's.
        confirms: the client's.
        topology: of the namespace.
        next_id: makes an ID that nobody can guess.
        options: the client's.
        reply_queue: waits until the client has a reply queue, and returns its name.
        observers: of sends, as `Observers.sends` has them.

    Attributes:
        watches: the jobs that are watched.

    """

    def __init__(
        self,
        transport: Transport,
        confirms: Confirms,
        topology: JobTopology,
        next_id: Callable[[], bytes],
        options: ClientOptions,
        reply_queue: Callable[[], Awaitable[bytes]],
        observers: SendObservers = (),
    ) -> None:
        self._transport = transport
        self._confirms = confirms
        self._topology = topology
        self._next_id = next_id
        self._name = options.name
        self._max_body = options.max_body
        self._reply_queue = reply_queue
        self.watches = Watches(options.max_in_flight)
        self._observers = observers
        self._now = Declared([topology.jobs])
        self._later = Declared([*topology.ladder.exchanges(), topology.due])
        self.exchange = topology.jobs.name.encode()

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
        observations: list[SendObservation[ObservedSend]] = []
        failed: BaseException | None = None
        try:
            return await self._send(target, options, several, sendings, observations)
        except BaseException as error:
            failed = error
            raise
        finally:
            for number, observation in enumerate(observations):
                is_prepared = number < len(sendings)
                observation.end(*sendings[number].known(failed) if is_prepared else ("no", failed))
            del failed, observations  # an error's traceback holds this frame

    async def _send(
        self,
        target: str | Callable[..., Any],
        options: CallOptions,
        several: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]],
        sendings: list[_Sending],
        observations: list[SendObservation[ObservedSend]],
    ) -> list[Job]:
        """Send jobs; `sendings` gets them, and `observations` what observers see of each."""
        service, name, method = find_job(target)
        terms = self._terms(options) if options.is_for_jobs else _AT_ONCE
        until = time.monotonic() + options.timeout
        if options.watch:
            terms = replace(terms, reply_to=await self._where_to_reply(options.timeout))
        for args, params in several:
            sendings.append(self._prepare(service, name, method, options, terms, args, params, observations))
        del several  # while many wait, the collector has less to look at
        declared = self._later if terms.steps else self._now
        seconds = max(0.0, until - time.monotonic()) if options.watch else options.timeout
        await self._confirms.send(sendings, seconds, declared, in_order=options.order_key is not None)
        return [sending.job for sending in sendings]

    async def _where_to_reply(self, seconds: float) -> bytes:
        """Wait for the reply queue.

        Raises:
            SendError: there is none in time.

        """
        try:
            async with asyncio.timeout(seconds):
                return await self._reply_queue()
        except TimeoutError as error:
            raise SendError(f"there was no connection to the broker within {seconds:g} s", queued="no") from error

    def _terms(self, options: CallOptions) -> _Terms:
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
        return _Terms(steps, due, expires_ms)

    def _prepare(
        self,
        service: str,
        name: str,
        method: Method | RemoteJob | None,
        options: CallOptions,
        terms: _Terms,
        args: tuple[Any, ...],
        params: Mapping[str, Any],
        observations: list[SendObservation[ObservedSend]],
    ) -> _Sending:
        message = prepare(
            (service, name, method),
            options,
            args,
            params,
            job_id=self._next_id().decode(),
            app_id=self._name,
            max_body=self._max_body,
        )
        due, route = None, (self.exchange, self._topology.key(service, message.lane).encode())
        if terms is not _AT_ONCE:
            message.due_ms, message.expires_ms, message.reply_to = terms.due_ms, terms.expires_ms, terms.reply_to
            if terms.due_ms is not None:
                due = datetime.fromtimestamp(terms.due_ms / 1000, UTC)
                route = self._topology.ladder.route(terms.steps, self._topology.address(service, message.lane))
        is_once = runs_at_most_once(method)
        if is_once and due is not None:
            msg = f"{service}.{name} runs at most once, and what is delayed may come twice after a crash of the broker"
            raise UsageError(f"{msg}: send it without delay and at")
        job = Job(message.id, service, name, message.key, due, message.priority, message.order_key)
        if options.watch:
            label = f"{service}.{name}"
            watch, read = self.watches.add(label, job.id), _reader(label, method, options)
            job = WatchedJob(job.id, service, name, job.key, due, job.priority, job.order_key, _watch=watch, _read=read)
        if self._observers:
            observed = ObservedSend(self.exchange, service, name, f"{service}.{name}")
            observations.append(SendObservation(self._observers, observed, message))
        properties = encode_job(message, self._transport.now_ms())
        return _Sending(self._confirms, job, route, properties, message.body, is_once=is_once)


def _reader(label: str, method: Method | RemoteJob | None, options: CallOptions) -> Read | None:
    """What reads the result of a job: by the options, else by its function or contract; None for plain JSON."""
    if options.returns is not None:
        return adapter_of(label, options.returns).read
    return None if method is None else method.read_result
