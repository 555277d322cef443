"""The client: makes calls, and keeps itself connected.

The way of a call, out and back, is one page of the documentation: docs/explanations/life-of-a-call.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Any, Concatenate, Final, Literal, ParamSpec, Self, TypeVar, Unpack, overload

from rpcq import logs
from rpcq.calls.invoking import Invoker
from rpcq.calls.pending import PendingCalls
from rpcq.calls.proxy import CallMaker, ServiceProxy, WatchingCallMaker
from rpcq.calls.receiving import Receiver
from rpcq.calls.sending import Sender
from rpcq.control import PING_TIMEOUT, Control, WorkerInfo, WorkerStats
from rpcq.environment import broker_url, options_from
from rpcq.errors import (
    BrokerError,
    ClosedError,
    ServiceUnavailable,
    UsageError,
)
from rpcq.event_types import Event
from rpcq.events.publishing import EventPublisher
from rpcq.jobs.confirming import Confirms
from rpcq.jobs.sending import JobSender
from rpcq.observer import Observer, Observers
from rpcq.once import GivenSession
from rpcq.options import (
    CallKwargs,
    CallOptions,
    ClientKwargs,
    ClientOptions,
    UnwatchedCallKwargs,
    check_name,
    check_seconds,
)
from rpcq.runtime.backoff import Backoff
from rpcq.runtime.deadline import Deadline
from rpcq.runtime.process import Place
from rpcq.service import Context
from rpcq.transport.base import Subscription, Transport
from rpcq.transport.opening import open_transport
from rpcq.transport.sessions import Sessions
from rpcq.url import checked_user, mask, parse
from rpcq.validation.listing import lists_options
from rpcq.wire import control
from rpcq.wire.events import EventTopology, Publication
from rpcq.wire.jobs import Job
from rpcq.wire.replies import Reply
from rpcq.wire.topology import Topology

P = ParamSpec("P")
SessionT = TypeVar("SessionT", bound=GivenSession)
T = TypeVar("T")

log = logs.get_logger("rpcq.client")


class Phase(Enum):
    """The phases of a client."""

    NEW = "new"
    OPEN = "open"
    CLOSED = "closed"


@lists_options(ClientOptions)
class Client:
    """Calls methods of services; any number at once.

    Use it as an async context manager, or call `connect` and `close`. It belongs to the event loop and the process
    that opened it.

    Args:
        url: the broker: `amqp://user:password@host:port/vhost`, `amqps://...` or `memory://`; `RPCQ_URL` if None.
        options: as in `ClientOptions`. What is not given is read from the environment (`RPCQ_TIMEOUT`, ...).
        observers: called with its calls and sessions: metrics, traces, logs; see `rpcq.Observer`.

    Raises:
        ConfigurationError: the URL or an option cannot be used.

    """

    def __init__(
        self, url: str | None = None, *, observers: Iterable[Observer] = (), **options: Unpack[ClientKwargs]
    ) -> None:
        # 17 attributes: each is a part that the client puts together, or how far it is.
        self.options = options_from(ClientOptions, options)
        self.topology = Topology(self.options.namespace)
        self._url = broker_url(url)
        self._transport: Transport = open_transport(self._url, self.options)
        self._observers = Observers(observers, self)
        self._sessions = Sessions(self._transport, self._observers)
        self._calls = PendingCalls(self.options.max_in_flight)
        self._sender = Sender(
            self._transport,
            self._sessions,
            self._calls,
            self.options,
            user=checked_user(self._url) if self.options.identify else "",
            on_message=partial(self._observers.message, "requests") if self._observers.has_messages else None,
        )
        self._control = Control(self._transport, self.topology, self._sender.reply_queue, self._calls.next_id)
        self._invoker = Invoker(
            self._transport,
            self._sender,
            self._calls,
            self._control,
            self._observers,
            self._check_usable,
            self.options.max_body,
        )
        self.invoke = self._invoker.invoke
        self._confirms = Confirms(self._transport)
        events = EventTopology(self.options.namespace)
        self._events = EventPublisher(
            self._transport, self._confirms, events, self._calls.next_id, self.options, self._observers.publishes
        )
        self._jobs = JobSender(
            self._transport,
            self._confirms,
            events.jobs,
            self._calls.next_id,
            self.options,
            self._sender.reply_queue,
            self._observers.sends,
        )
        self._maker = CallMaker(self, CallOptions(timeout=self.options.timeout))
        self._place: Place
        self._phase = Phase.NEW
        self._closing: asyncio.Task[None] | None = None

    # Opening and closing.

    async def connect(self) -> Self:
        """Open both connections. From then on, the client reconnects by itself.

        Raises:
            BrokerError: the broker cannot be used; the message says why. Nothing is left open.
            ClosedError: the client was closed meanwhile.
            UsageError: the client was opened before.

        """
        if self._phase is not Phase.NEW:
            raise UsageError(f"this client is {self._phase.value}; a client is opened once")
        self._place = Place("this client")
        self._sender.open()
        self._confirms.open()
        self._invoker.open()
        self._phase = Phase.OPEN
        receiver = Receiver(
            self._calls,
            self._sender,
            self._control,
            self._observers,
            self.topology.notices.name,
            self._jobs.watches.take,
        )
        own = self.topology.reply_queue(self.options.reply_exchange, parse(self._url).user)
        reply_queue = Subscription(own, receiver.on_delivery, no_ack=True)
        listener = self._sessions.listener(
            consuming=self._on_consuming, consuming_lost=self._on_consuming_lost, blocked=self._on_blocked
        )
        self._observers.opened()
        try:
            exchanges = self.topology.exchanges(self.options.reply_exchange)
            await self._transport.start(exchanges, [reply_queue], listener)
        except BaseException:
            self._phase = Phase.CLOSED
            await self._end_calls()
            self._observers.closed()
            raise
        if self._closing is not None:
            raise ClosedError("the client was closed while it was being opened")
        log.debug("client open", url=mask(self._url), namespace=self.options.namespace)
        return self

    async def close(self) -> None:
        """Close both connections. Calls under way end at once: `OutcomeUnknown` if sent, else `ServiceUnavailable`.

        If this is cancelled, the client is closed all the same.
        """
        if self._phase is Phase.NEW:
            self._phase = Phase.CLOSED
        elif self._closing is not None or self._phase is Phase.OPEN:
            self._place.check()
            if self._closing is None:
                self._phase = Phase.CLOSED
                self._closing = self._sender.loop.create_task(self._close())
            await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if pending := self.in_flight:
            log.warning("client closed with calls under way", count=pending)
        await self._end_calls()
        try:
            await self._transport.close()
        finally:
            self._sessions.closed()
            self._observers.closed()

    async def _end_calls(self) -> None:
        """End all that is under way: calls, pauses between them, questions to workers."""
        self._invoker.close()
        self._control.close()
        await self._sender.close()
        await self._confirms.close()
        self._jobs.watches.close()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "not open yet" if self._phase is Phase.NEW else self._phase.value
        if self._phase is _OPEN:
            down = self._sessions.down
            state = f"the {' and the '.join(down)} session is down" if down else "connected"
        where = f"{mask(self._url)} in namespace {self.topology.namespace!r}"
        return f"<Client at {where}: {state}, {self.in_flight} calls in flight>"

    @property
    def in_flight(self) -> int:
        """Calls under way, including those that failed and wait to be made again."""
        return len(self._invoker)

    @property
    def connected(self) -> bool:
        """Whether both sessions are up. A call that is made now is sent at once, unless the broker blocks it."""
        return self._phase is Phase.OPEN and not self._sessions.down

    def counts(self) -> Mapping[str, int]:
        """The counters, for observers: calls under way, replies for none of them, requests sent again."""
        calls = self._calls
        return {
            "pending_replies": len(calls),
            "watched_jobs": len(self._jobs.watches),
            "late_replies": calls.late,
            "duplicate_replies": calls.duplicate,
            "stray_replies": calls.stray,
            "resent": self._sender.resent,
            "retried": self._invoker.retries.retried,
        }

    @property
    def retried(self) -> int:
        """Calls that were made again, as their `retry` asks."""
        return self._invoker.retries.retried

    @property
    def unmatched_replies(self) -> int:
        """Replies and notices that belonged to no call under way: late, duplicate, or stray. Each was dropped."""
        return self._calls.unmatched

    def on_reply(self, callback: Callable[[Reply], None] | None) -> None:
        """Call `callback` with each reply that ends a call, in the task of its caller; None removes it."""
        self._invoker.results.on_reply = callback

    # Calling.

    def call(self, target: str, /, *args: Any, **params: Any) -> Coroutine[Any, Any, Any]:
        """Call a method by its name, `service.method`, with the client's own options; see `CallMaker.call`."""
        return self._maker.call(target, *args, **params)

    def service(self, name: str) -> ServiceProxy:
        """A proxy: `await client.service("calculator").add(x=1, y=2)`; see `CallMaker.service`."""
        return self._maker.service(name)

    def bind(self, api: Callable[..., T], service: str | None = None) -> T:
        """A proxy of a Protocol's type; see `CallMaker.bind`."""
        return self._maker.bind(api, service)

    @overload
    def with_options(self, *, watch: Literal[True], **options: Unpack[UnwatchedCallKwargs]) -> WatchingCallMaker: ...

    @overload
    def with_options(self, **options: Unpack[CallKwargs]) -> CallMaker: ...

    @lists_options(CallOptions, changes=True)
    def with_options(self, **options: Any) -> CallMaker:
        """The same client, with other options for its calls; see `CallOptions`."""
        made: CallMaker = self._maker.with_options(**options)
        return made

    @overload
    def send(
        self, job: Callable[Concatenate[Context, P], Any], /, *args: P.args, **params: P.kwargs
    ) -> Coroutine[Any, Any, Job]: ...

    @overload
    def send(self, job: Callable[P, Any], /, *args: P.args, **params: P.kwargs) -> Coroutine[Any, Any, Job]: ...

    @overload
    def send(
        self, job: Callable[Concatenate[SessionT, P], Any], /, *args: P.args, **params: P.kwargs
    ) -> Coroutine[Any, Any, Job]: ...

    @overload
    def send(
        self, job: Callable[Concatenate[Context, SessionT, P], Any], /, *args: P.args, **params: P.kwargs
    ) -> Coroutine[Any, Any, Job]: ...

    @overload
    def send(self, job: str, /, *args: Any, **params: Any) -> Coroutine[Any, Any, Job]: ...

    def send(self, job: str | Callable[..., Any], /, *args: Any, **params: Any) -> Coroutine[Any, Any, Job]:
        """Send a job with the client's own options; see `CallMaker.send`."""
        return self._maker.send(job, *args, **params)

    def send_many(
        self, job: str | Callable[..., Any], several: Iterable[Mapping[str, Any]], /
    ) -> Coroutine[Any, Any, list[Job]]:
        """Send several jobs of one name with the client's own options; see `CallMaker.send_many`."""
        return self._maker.send_many(job, several)

    def send_jobs(
        self,
        job: str | Callable[..., Any],
        options: CallOptions,
        several: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]],
    ) -> Coroutine[Any, Any, list[Job]]:
        """Send jobs. `CallMaker` uses it."""
        self._check_usable()
        return self._jobs.send(job, options, several)

    def publish(self, event: Event, /) -> Coroutine[Any, Any, Publication]:
        """Publish an event with the client's own options; see `CallMaker.publish`."""
        return self._maker.publish(event)

    def publish_event(self, event: Event, options: CallOptions) -> Coroutine[Any, Any, Publication]:
        """Publish an event. `CallMaker` uses it."""
        self._check_usable()
        return self._events.publish(event, options)

    async def wait_for_service(self, name: str, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - as `call` has it
        """Wait until a worker of the service answers.

        Args:
            name: the service's.
            timeout: seconds, above 0.

        Raises:
            ServiceUnavailable: no worker answered in time.
            ConfigurationError: the name or the timeout is not valid.
            ClosedError: the client is not open, or was closed meanwhile.

        """
        check_name("the name of a service", name)
        check_seconds("timeout", timeout)
        deadline = Deadline.after(timeout)
        backoff = Backoff(0.05, 0.5, 1.5)
        while (left := deadline.remaining()) > 0:
            self._check_usable()
            async with aclosing(self._control.ask(control.PING, name, min(left, PING_TIMEOUT))) as answers:
                async for _ in answers:
                    return
            await asyncio.sleep(max(0.0, min(backoff.pause(), deadline.remaining())))
        where = f"in namespace {self.topology.namespace!r}"
        raise ServiceUnavailable(f"no worker of {name!r} answered within {timeout:g} s; is one running {where}?")

    def workers(self, service: str | None = None, *, wait: float = 1.0) -> AsyncGenerator[WorkerInfo, None]:
        """Ask which workers there are: `async for worker in client.workers("calculator")`.

        Args:
            service: only workers of this service; None for all workers of the namespace.
            wait: seconds to collect answers, above 0; their number is not known. It ends at once if there is no
                worker.

        Raises:
            ConfigurationError: the service or the wait is not valid.
            ClosedError: the client is not open.

        """
        return self._ask(control.DESCRIBE, WorkerInfo, service, wait)

    def stats(self, service: str | None = None, *, wait: float = 1.0) -> AsyncGenerator[WorkerStats, None]:
        """Ask the workers for their counters; used like `workers`."""
        return self._ask(control.STATS, WorkerStats, service, wait)

    async def _ask(self, question: bytes, kind: type[T], service: str | None, wait: float) -> AsyncGenerator[T, None]:
        self._check_usable()
        if service is not None:
            check_name("the name of a service", service)
        check_seconds("wait", wait)
        async with aclosing(self._control.ask(question, service, wait)) as answers:
            async for answer in answers:
                if (found := self._control.read(kind, answer)) is not None:
                    yield found

    # What the transport reports.

    def _on_consuming(self, queues: Sequence[str]) -> None:
        self._sender.consuming(queues[0])

    def _on_consuming_lost(self, cause: BrokerError) -> None:
        self._invoker.consuming_lost(str(cause))
        self._jobs.watches.lost(str(cause))

    def _on_blocked(self, reason: str) -> None:
        log.warning("the broker takes no messages", reason=reason)

    def _check_usable(self) -> None:
        if self._phase is not _OPEN:
            if self._phase is Phase.CLOSED:
                raise ClosedError("this client is closed")
            raise ClosedError("this client is not open yet; use 'async with Client(...)', or await connect() first")
        self._place.check()


_OPEN: Final = Phase.OPEN  # a name of its own: getting at an enum's member is slow in CPython 3.11
