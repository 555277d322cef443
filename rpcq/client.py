"""The client: sends calls, owns the futures that wait for their replies."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack, cast

from rpcq import logs, observer, processes, wire
from rpcq.answers import Answers, meaning
from rpcq.calls import MAX_ATTEMPTS, Event, PendingCalls
from rpcq.control import Control, WorkerInfo, WorkerStats, read
from rpcq.deadline import Deadline, inherit
from rpcq.environment import broker_url, options_from
from rpcq.errors import (
    BrokerError,
    CallError,
    CallTimeout,
    ClosedError,
    ConfigurationError,
    Executed,
    ServiceUnavailable,
    UsageError,
)
from rpcq.observer import Observer, Observers, SeenCall
from rpcq.properties import MalformedProperties
from rpcq.proxy import CallMaker, ServiceProxy, Target
from rpcq.sending import ClientCall, Sender
from rpcq.settings import CallOptions, CallSettings, ClientOptions, ClientSettings, Retry, check_name, check_seconds
from rpcq.timeouts import Timeouts
from rpcq.transport.base import Delivery, Listener, Subscription, Transport
from rpcq.transport.opening import open_transport
from rpcq.transport.topology import Names
from rpcq.url import mask, parse
from rpcq.wire import Notice, Reply

T = TypeVar("T")

PING_TIMEOUT: Final = 1.0
"""Seconds that a worker has to answer a ping."""

_REPLY: Final = Event.REPLY  # as in `rpcq.calls`, faster to get at

log = logs.get_logger("rpcq.client")


class Client:
    """Calls methods of services; any number at once.

    Use it as an async context manager, or call `connect` and `close`. It belongs to the event loop and the process
    that opened it.

    Args:
        url: the broker: `amqp://user:password@host:port/vhost`, `amqps://...` or `memory://`; `RPCQ_URL` if None.
        options: as in `ClientOptions`; what is not given comes from the environment (`RPCQ_TIMEOUT`, ...), if it is
            there.
        observers: who is told of its calls and sessions: metrics, traces, logs; see `rpcq.observer`.

    Attributes:
        retried: calls that were made again, as their `retry` asks.

    Raises:
        ConfigurationError: the URL or an option cannot be used.

    """

    def __init__(
        self, url: str | None = None, *, observers: Iterable[Observer] = (), **options: Unpack[ClientSettings]
    ) -> None:
        self.options = options_from(ClientOptions, options)
        self.names = Names(self.options.namespace)
        self._url = broker_url(url)
        self._transport: Transport = open_transport(self._url, self.options)
        self._maker = CallMaker(self, CallOptions(timeout=self.options.timeout))
        self._calls = PendingCalls(self.options.max_in_flight)
        self._answers = Answers()
        self._observers = Observers(observers, self)
        self._on_call = self._observers.calls
        self._user = parse(self._url).user
        if self.options.identify and len(self._user.encode()) > 255:
            raise ConfigurationError(
                f"a user who identifies must have a name of at most 255 bytes; got {self._user!r:.50}"
            )
        user = self._user if self.options.identify else ""
        self._sender = Sender(self._transport, self._calls, self.options.name, user, self.options.unrun_within)
        self._thread = 0
        self._timeouts: Timeouts[ClientCall]
        self._generation = -1
        self._state = "new"
        self._closing: asyncio.Task[None] | None = None
        self._pausing: set[asyncio.Future[None]] = set()  # of calls that are to be made again
        self._seldom = logs.Seldom(log)
        self.retried = 0
        self._notices = self.names.notices.name.encode()
        self._control = Control(self._transport, self.names, self._sender.reply_queue, self._calls.next_id)

    # Opening and closing.

    async def connect(self) -> Self:
        """Open both connections; from then on the client keeps itself connected.

        Raises:
            BrokerError: the broker cannot be used; the message says why. Nothing is left open.
            ClosedError: it was closed meanwhile.
            UsageError: it was opened before.

        """
        if self._state != "new":
            raise UsageError(f"this client is {self._state}; a client is opened once")
        self._sender.open()
        self._thread = threading.get_ident()
        self._timeouts = Timeouts(self._sender.loop, self._sender.expire)
        self._generation = processes.generation
        self._state = "open"
        own = self.names.reply_queue(self.options.reply_exchange, self._user)
        reply_queue = Subscription(own, self._on_delivery, no_ack=True)
        listener = Listener(
            consuming=self._consuming,
            consuming_lost=self._consuming_lost,
            publishing=self._publishing,
            publishing_lost=self._publishing_lost,
            publishing_blocked=self._publishing_blocked,
        )
        self._observers.opened()
        try:
            await self._transport.start(self.names.exchanges(self.options.reply_exchange), [reply_queue], listener)
        except BaseException:
            self._state = "closed"
            await self._end_calls()
            self._observers.closed()
            raise
        if self._closing is not None:
            raise ClosedError("the client was closed while it was being opened")
        log.debug("client open", url=mask(self._url), namespace=self.options.namespace)
        return self

    async def close(self) -> None:
        """Close both connections. Calls under way end at once: `OutcomeUnknown` if sent, else `ServiceUnavailable`.

        Cancelling it does not stop it: the client is closed all the same.
        """
        if self._state == "new":
            self._state = "closed"
        elif self._closing is not None or self._state == "open":
            self._check_place()
            if self._closing is None:
                self._state = "closed"
                self._closing = self._sender.loop.create_task(self._close())
            await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if pending := self.in_flight:
            log.warning("client closed with calls under way", count=pending)
        await self._end_calls()
        try:
            await self._transport.close()
        finally:
            self._observers.closed()

    async def _end_calls(self) -> None:
        """End all that is under way: calls, pauses between them, questions to workers."""
        for call in self._calls:
            self._calls.happened(call, Event.CLOSE)
        for pause in self._pausing:
            pause.cancel()
        self._control.close()
        await self._sender.close()
        self._timeouts.close()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def in_flight(self) -> int:
        """Calls under way, with those that failed and wait to be made again."""
        return len(self._calls) + len(self._pausing)

    @property
    def connected(self) -> bool:
        """Whether both sessions are up: a call that is made now is sent at once."""
        return self._state == "open" and self._sender.encoder is not None and self._sender.publishing_up

    def counts(self) -> Mapping[str, int]:
        """What it counts, for observers: calls under way, replies for none of them, and what was sent again."""
        calls = self._calls
        return {
            "pending_replies": len(calls),
            "late_replies": calls.late,
            "duplicate_replies": calls.duplicate,
            "stray_replies": calls.stray,
            "resent": self._sender.resent,
            "retried": self.retried,
        }

    @property
    def unmatched_replies(self) -> int:
        """Replies and notices that were for no call under way: late, twice, or for nobody. Each was dropped."""
        return self._calls.unmatched

    def on_reply(self, told: Callable[[Reply], None] | None) -> None:
        """Have a function called with each reply that ends a call: in the task of its caller, before that goes on."""
        self._answers.on_reply = told

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

    def with_options(self, **options: Unpack[CallSettings]) -> CallMaker:
        """The same client, with other options for its calls; see `CallOptions`."""
        return self._maker.with_options(**options)

    async def wait_for_service(self, name: str, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - as `call` has it
        """Wait until a worker of the service answers.

        Args:
            name: the service's.
            timeout: seconds, above 0.

        Raises:
            ServiceUnavailable: none did until then.
            ConfigurationError: the name or the timeout cannot be used.
            ClosedError: the client is not open, or was closed meanwhile.

        """
        check_name("the service", name)
        check_seconds("timeout", timeout)
        deadline = Deadline.after(timeout)
        pause = 0.05
        while (left := deadline.remaining()) > 0:
            self._check_usable()
            async with aclosing(self._control.ask(wire.PING, name, min(left, PING_TIMEOUT))) as answers:
                async for _ in answers:
                    return
            await asyncio.sleep(max(0.0, min(pause, deadline.remaining())))
            pause = min(pause * 1.5, 0.5)
        where = f"in namespace {self.names.namespace!r}"
        raise ServiceUnavailable(f"no worker of {name!r} answered within {timeout:g} s; is one running {where}?")

    def workers(self, service: str | None = None, *, wait: float = 1.0) -> AsyncGenerator[WorkerInfo, None]:
        """The workers that are there, as they answer: `async for worker in client.workers("calculator")`.

        Args:
            service: of this service alone; None for every worker of the namespace.
            wait: seconds to wait for answers, above 0; the number of answers is not known. It ends at once where no
                worker is there.

        Raises:
            ConfigurationError: the service or the wait cannot be used.
            ClosedError: the client is not open.

        """
        return self._ask(wire.DESCRIBE, WorkerInfo, service, wait)

    def stats(self, service: str | None = None, *, wait: float = 1.0) -> AsyncGenerator[WorkerStats, None]:
        """How the workers fare; as `workers`."""
        return self._ask(wire.STATS, WorkerStats, service, wait)

    async def _ask(self, question: bytes, kind: type[T], service: str | None, wait: float) -> AsyncGenerator[T, None]:
        self._check_usable()
        if service is not None:
            check_name("the service", service)
        check_seconds("wait", wait)
        async with aclosing(self._control.ask(question, service, wait)) as answers:
            async for answer in answers:
                if (found := read(kind, answer, self._seldom)) is not None:
                    yield found

    def invoke(
        self, target: Target, options: CallOptions, args: tuple[Any, ...], params: Mapping[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """One call, from its parameters to its result: where `CallMaker` and the proxies come."""
        if self._on_call:
            return self._observed(target, options, args, params)
        if options.retry is None:
            return self._call(target, options, args, params)
        return self._retry(target, options, options.retry, args, params)

    async def _observed(
        self, target: Target, options: CallOptions, args: tuple[Any, ...], params: Mapping[str, Any]
    ) -> Any:
        """One call, with its attempts, of which the observers are told."""
        seen = SeenCall(target.exchange, target.routing_key.decode(), target.method.decode(), target.label)
        seen.correlation_id = self._calls.next_id().decode()
        began = time.perf_counter()
        endings = observer.begin(self._on_call, seen)
        try:
            if options.retry is None:
                value = await self._call(target, options, args, params, seen=seen)
            else:
                value = await self._retry(target, options, options.retry, args, params, seen)
        except BaseException as error:
            seen.error, seen.code = error, observer.code_of(error)
            raise
        else:
            seen.code = observer.OK
            return value
        finally:
            seen.seconds = time.perf_counter() - began
            observer.end(endings, seen)
            del seen, endings  # an error's traceback holds this frame

    async def _retry(
        self,
        target: Target,
        options: CallOptions,
        retry: Retry,
        args: tuple[Any, ...],
        params: Mapping[str, Any],
        seen: SeenCall | None = None,
    ) -> Any:
        """One call, made again where it fails as `retry` says, within the deadline of the first time."""
        self._check_usable()
        deadline = inherit(options.timeout, time.monotonic())
        key = options.idempotency_key
        if key is None and options.idempotent:
            key = self._calls.next_id().decode()  # the same each time
        attempt, retries = 1, 0
        while True:
            try:
                return await self._call(target, options, args, params, deadline, key, attempt, seen)
            except CallError as error:
                may_have_run = error.executed != "no"
                pause = random.uniform(0, retry.longest_pause(retries))  # noqa: S311 - jitter
                retries += 1
                if (
                    retries == retry.max_attempts
                    or error.code not in retry.codes
                    or (may_have_run and not options.idempotent)
                    or time.monotonic() + pause >= deadline
                ):
                    raise
                if not await self._pause(pause):
                    raise  # the client was closed meanwhile
                log.info("call is made again", correlation_id=error.correlation_id, code=error.code, retries=retries)
                attempt = error.attempt + may_have_run
                self.retried += 1
            if seen is not None:
                seen.correlation_id, seen.attempt = self._calls.next_id().decode(), attempt

    async def _pause(self, seconds: float) -> bool:
        """Wait before a call is made again; False if the client is closed meanwhile."""
        if self._state != "open":
            return False
        ended = self._sender.loop.create_future()
        self._pausing.add(ended)
        try:
            await asyncio.wait([ended], timeout=seconds)
        finally:
            self._pausing.discard(ended)
        return not ended.done()

    async def _call(
        self,
        target: Target,
        options: CallOptions,
        args: tuple[Any, ...],
        params: Mapping[str, Any],
        deadline: float | None = None,
        key: str | None = None,
        attempt: int = 1,
        seen: SeenCall | None = None,
    ) -> Any:
        """One call; with `deadline`, `key` and `attempt` where it is made again, or may be."""
        self._check_usable()
        body = wire.encode_params(args, params, self.options.max_body)
        now = time.monotonic()
        if deadline is None:
            deadline, key = inherit(options.timeout, now), options.idempotency_key
        correlation_id = self._calls.next_id() if seen is None else seen.correlation_id.encode()
        if key is None and options.idempotent:
            key = correlation_id.decode()  # the first request's ID: no other call has it
        if deadline <= now:
            executed: Executed = "no" if attempt == 1 else "maybe"
            late = CallTimeout(
                "the deadline had passed before the call", executed=executed, correlation_id=correlation_id.decode()
            )
            late.deadline = deadline
            raise late
        call = ClientCall(self._sender, correlation_id, target, options, body, deadline, key, attempt)
        if seen is not None:
            call.trace = seen.headers
        del body, params, args  # the call may last
        if options.metadata:
            call.headers(MAX_ATTEMPTS)  # what is too large is told before anything is sent
        self._calls.add(call)
        self._timeouts.set(call, deadline, now)
        try:
            self._sender.send(call)
            outcome = await call.future
        except BaseException:
            self._give_up(call)
            raise
        finally:
            self._timeouts.cancel(call)
            if self._sender.waiting:
                self._sender.waiting.pop(call, None)
        try:
            if type(outcome) is Reply:
                return self._answers.read(call, outcome, target.label, options)
            raise outcome  # type: ignore[misc]  # an outcome that is no reply is an error
        except CallTimeout as error:
            error.deadline = deadline
            raise
        finally:
            del outcome, call  # the error's traceback holds this frame

    def _give_up(self, call: ClientCall) -> None:
        """The caller is gone: forget the call, and tell the worker if it may have begun."""
        may_run = call.sent and self._calls.is_pending(call)
        self._calls.happened(call, Event.CANCEL)
        encoder = self._sender.encoder
        if may_run and call.target.is_ours and encoder is not None and self._transport.can_publish:
            deadline_ms = int((time.time() + call.deadline - time.monotonic()) * 1000)
            self._control.cancel(call.target.routing_key, call.request_id, encoder.reply_to, deadline_ms)

    # Receiving.

    def _on_delivery(self, delivery: Delivery) -> None:
        try:
            encoder = self._sender.encoder
            came = wire.read_reply(delivery.properties, delivery.body, b"" if encoder is None else encoder.reply_to)
        except MalformedProperties as error:
            self._dropped("a malformed reply is dropped", cause=str(error))
            return
        if type(came) is Reply and came.kind == wire.RESULT and delivery.exchange != self._notices:
            call = self._calls.get(came.correlation_id)  # by the ID of any of its requests: one of them ran
            if call is not None:
                self._calls.happened(call, _REPLY, came)
                return
        self._on_other(delivery, came)

    def _on_other(self, delivery: Delivery, came: Reply | Notice | None) -> None:
        """Take what is not the result of a call under way."""
        if came is None:
            self._dropped("a copy of a request came to the reply queue, and is dropped: something moves messages")
            return
        if (delivery.exchange == self._notices) is not isinstance(came, Notice):
            # Clients can have the broker send anything through the notices, and workers anything that looks like one.
            self._dropped("a forged reply or notice came to the reply queue, and is dropped")
            return
        request_id = came.correlation_id
        if self._control.answered(request_id, delivery.body):
            return
        if isinstance(came, Notice):
            self._observers.notice(came.reason)
        call = self._calls.get(request_id)
        if call is None:
            self._calls.count_unmatched(request_id)
            log.debug("reply for no call under way", correlation_id=request_id.decode("utf-8", "replace"))
        elif call.request_id != request_id:
            pass  # it is about an earlier request of the call
        elif isinstance(came, Reply):
            event, why = meaning(came)
            self._calls.happened(call, event, came, why)
        elif came.reason == "expired":
            self._calls.happened(call, self._sender.expired(cast("ClientCall", call), came.queue))
        else:
            self._calls.happened(call, Event.WORKER_LOST, why=came.reason)

    def _dropped(self, what: str, **fields: str) -> None:
        """Count and report something that is neither a reply nor a notice of ours."""
        self._calls.stray += 1
        self._seldom.warning(what, **fields)

    # What the transport tells.

    def _consuming(self, queues: Sequence[str]) -> None:
        self._sender.consuming(queues[0])
        self._observers.session("consuming")

    def _consuming_lost(self, cause: BrokerError) -> None:
        """No reply to any call under way will come."""
        self._sender.consuming_lost()
        self._observers.session("consuming", cause)
        for call in self._calls:
            self._calls.happened(call, Event.LOST, why=str(cause))

    def _publishing(self) -> None:
        if not self._sender.publishing_up:  # else it was blocked
            self._sender.publishing_up = True
            self._observers.session("publishing")

    def _publishing_lost(self, cause: BrokerError) -> None:
        self._sender.publishing_up = False  # each call was told by its own message
        self._observers.session("publishing", cause)

    def _publishing_blocked(self, reason: str) -> None:
        log.warning("the broker takes no messages", reason=reason)

    # Checks.

    def _check_usable(self) -> None:
        if self._state == "closed":
            raise ClosedError("this client is closed")
        if self._state == "new":
            raise ClosedError("this client is not open yet; use 'async with Client(...)', or await connect() first")
        self._check_place()

    def _check_place(self) -> None:
        if self._generation != processes.generation:
            raise UsageError("this client was opened before a fork; open one in each process, after the fork")
        # As good as asking for the running loop, which is a system call in Python 3.11.
        if threading.get_ident() != self._thread or not self._sender.loop.is_running():
            raise UsageError("this client was opened in another event loop; open one in each loop")
