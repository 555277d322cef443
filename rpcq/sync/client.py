"""The client for programs that block."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Concatenate, Final, Literal, ParamSpec, Self, TypeVar, Unpack, cast, overload
from weakref import WeakSet

from rpcq import client as asynchronous
from rpcq.calls import late
from rpcq.calls.targets import Target
from rpcq.calls.waiting import CallMaker, ServiceProxy, WatchingCallMaker
from rpcq.control import WorkerInfo, WorkerStats
from rpcq.environment import broker_url, options_from
from rpcq.errors import (
    BrokerError,
    CallTimeout,
    ClosedError,
    OutcomeUnknown,
    SendError,
    ServiceUnavailable,
)
from rpcq.event_types import Event, named
from rpcq.jobs.preparing import find_job
from rpcq.observer import Observer
from rpcq.once import GivenSession
from rpcq.options import (
    CallKwargs,
    CallOptions,
    ClientKwargs,
    ClientOptions,
    UntypedCallKwargs,
    UnwatchedCallKwargs,
    check_name,
    check_seconds,
)
from rpcq.runtime import blocking
from rpcq.runtime.deadline import Deadline, inherit
from rpcq.service import Context
from rpcq.sync.connection import Connection, left_open, loop_of
from rpcq.url import parse
from rpcq.watching import BlockingJob, WatchedJob
from rpcq.wire.events import Publication
from rpcq.wire.jobs import Job
from rpcq.wire.replies import Reply

P = ParamSpec("P")
SessionT = TypeVar("SessionT", bound=GivenSession)
T = TypeVar("T")

_clients: Final[WeakSet[Client]] = WeakSet()


class Client:
    """Calls methods of services, and waits for each. Any number of threads may share one client.

    It connects when it is first used, or by `connect`, and from then on reconnects by itself. Its connections are in a
    thread that all blocking clients of the process share. Use it as a context manager, or call `close`; at the end of
    the process it is closed in any case. After a fork, the child opens connections of its own when it first uses the
    client; those of its parent stay as they are.

    A `def` handler of a service may use it, and its calls inherit the handler's deadline. An `async def` handler may
    not. Elsewhere in a running event loop, such as in a notebook, a call blocks that loop until it has ended.

    Args:
        url: the broker, as for `rpcq.Client`; `RPCQ_URL` if None. With `memory://`, it reaches the workers and clients
            of the same name in whichever event loop of this process they are.
        options: as in `rpcq.ClientOptions`. What is not given is read from the environment, when the client connects.
        observers: called with its calls and sessions, in the thread of the connections; see `rpcq.Observer`.

    Raises:
        ConfigurationError: the URL or an option cannot be used.

    """

    def __init__(
        self, url: str | None = None, *, observers: Iterable[Observer] = (), **options: Unpack[ClientKwargs]
    ) -> None:
        self._url = url
        self._given = options
        self._observers = tuple(observers)
        if url:
            parse(url)
        ClientOptions(**options)
        self._maker: CallMaker[Any] = CallMaker(_Caller(self), late.OPTIONS)
        self._on_reply: Callable[[Reply], None] | None = None
        self._lock = threading.Lock()
        self._connection: Connection | None = None  # set and cleared under the lock
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._closed = False
        _clients.add(self)

    # Opening and closing.

    def connect(self) -> Self:
        """Open the connections now; calls do it otherwise. If they are open, it does nothing.

        Raises:
            BrokerError: the broker cannot be used; the message says why. Nothing is left open.
            ConfigurationError: there is no URL, or the environment has an option that cannot be used.
            ClosedError: the client is closed.

        """
        if self._usable() is None:
            self._open(None)
        return self

    def close(self) -> None:
        """Close the connections. Calls of other threads end at once, as `OutcomeUnknown` if sent, and else with `no`.

        A closed client cannot be used again.
        """
        self._closed = True
        self._disconnect()

    def __enter__(self) -> Self:
        return self.connect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _disconnect(self) -> None:
        with self._lock:
            connection = self._forget()
        if connection is not None:
            connection.close()

    def _forget(self) -> Connection | None:
        connection, self._connection = self._connection, None
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
        return connection

    def _forked(self) -> None:
        """This process is a child of the one that opened it: forget what was opened, and leave it alone."""
        self._lock = threading.Lock()
        self._forget()

    def _usable(self) -> Connection | None:
        """The open connection; None if there is none, or its event loop has ended."""
        connection = self._connection
        return None if connection is None or connection.loop.is_closed() else connection

    def _open(self, deadline: float | None) -> Connection:
        """Open the connections, or wait until another thread has opened them."""
        blocking.check_may_block(blocking.shared_loop_now())
        if not self._lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        try:
            connection = self._usable()
            if connection is None:
                self._forget()
                connection = self._connection = self._make(deadline)
                self._finalizer = weakref.finalize(self, left_open, connection)
                self._finalizer.atexit = False  # the end of the process closes it
            return connection
        finally:
            self._lock.release()

    def _make(self, deadline: float | None) -> Connection:
        if self._closed:
            raise ClosedError("this client is closed")
        url, options = broker_url(self._url), self.options

        async def connect() -> asynchronous.Client:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                client = asynchronous.Client(url, observers=self._observers, **cast("ClientKwargs", asdict(options)))
                client.on_reply(self._on_reply)
                return await client.connect()

        loop = loop_of(url)
        try:
            connection = Connection(loop, blocking.run(loop, connect))
        except blocking.Abandoned:
            raise ClosedError("the event loop of the client ended while it was opened") from None
        return connection

    def _opened(self, deadline: float) -> Connection:
        """The open connection; it is opened now if there is none.

        Raises:
            ServiceUnavailable: that was not possible until the deadline.

        """
        try:
            return self._usable() or self._open(deadline)
        except BrokerError as error:
            raise ServiceUnavailable(f"the client could not be opened: {error}") from error
        except TimeoutError as error:
            raise ServiceUnavailable("the client could not be opened until the deadline of the call") from error

    # What it knows.

    @property
    def options(self) -> ClientOptions:
        """Its options. Until it connects, they are as the environment is now.

        Raises:
            ConfigurationError: a variable of the environment has an invalid value.

        """
        connection = self._connection
        return options_from(ClientOptions, self._given) if connection is None else connection.client.options

    @property
    def in_flight(self) -> int:
        """Calls under way in all threads, including those that failed and wait to be made again."""
        connection = self._connection
        return 0 if connection is None else connection.client.in_flight

    @property
    def connected(self) -> bool:
        """Whether both sessions are up. False before the client is first used."""
        connection = self._connection
        return connection is not None and connection.client.connected

    @property
    def retried(self) -> int:
        """Calls that were made again, as their `retry` asks, since it connected."""
        connection = self._connection
        return 0 if connection is None else connection.client.retried

    @property
    def unmatched_replies(self) -> int:
        """Replies and notices that belonged to no call under way, since it connected. Each was dropped."""
        connection = self._connection
        return 0 if connection is None else connection.client.unmatched_replies

    def on_reply(self, callback: Callable[[Reply], None] | None) -> None:
        """Call `callback` with each reply that ends a call, in the thread of the connections; None removes it."""
        self._on_reply = callback
        if (connection := self._connection) is not None:
            connection.client.on_reply(callback)

    # Calling.

    @overload
    def call(self, target: str, /, *args: Any, **params: Any) -> Any: ...

    @overload
    def call(
        self, target: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]], /, *args: P.args, **params: P.kwargs
    ) -> T: ...

    def call(self, target: Any, /, *args: Any, **params: Any) -> Any:
        """Call `service.method`, or a method of a contract, with the client's own options; see `CallMaker.call`."""
        return self._maker.call(target, *args, **params)

    def service(self, name: str) -> ServiceProxy[Any]:
        """A proxy: `client.service("calculator").add(x=1, y=2)`; see `CallMaker.service`."""
        return self._maker.service(name)

    def bind(self, api: Callable[..., T], service: str | None = None) -> T:
        """A proxy with the methods of a Protocol class; see `CallMaker.bind`."""
        return self._maker.bind(api, service)

    @overload
    def with_options(self, *, watch: Literal[True], **options: Unpack[UnwatchedCallKwargs]) -> WatchingCallMaker: ...

    @overload
    def with_options(self, *, returns: type[T], **options: Unpack[UntypedCallKwargs]) -> CallMaker[T]: ...

    @overload
    def with_options(self, **options: Unpack[CallKwargs]) -> CallMaker[Any]: ...

    def with_options(self, **options: Any) -> CallMaker[Any]:
        """The same client, with other options for its calls; see `rpcq.CallOptions`."""
        made: CallMaker[Any] = self._maker.with_options(**options)
        return made

    # Sending jobs.

    @overload
    def send(self, job: Callable[Concatenate[Context, P], Any], /, *args: P.args, **params: P.kwargs) -> Job: ...

    @overload
    def send(self, job: Callable[P, Any], /, *args: P.args, **params: P.kwargs) -> Job: ...

    @overload
    def send(self, job: Callable[Concatenate[SessionT, P], Any], /, *args: P.args, **params: P.kwargs) -> Job: ...

    @overload
    def send(
        self, job: Callable[Concatenate[Context, SessionT, P], Any], /, *args: P.args, **params: P.kwargs
    ) -> Job: ...

    @overload
    def send(self, job: str, /, *args: Any, **params: Any) -> Job: ...

    def send(self, job: str | Callable[..., Any], /, *args: Any, **params: Any) -> Job:
        """Send a job with the client's own options; see `CallMaker.send`."""
        return self._maker.send(job, *args, **params)

    def send_many(self, job: str | Callable[..., Any], several: Iterable[Mapping[str, Any]], /) -> list[Job]:
        """Send several jobs of one name with the client's own options; see `CallMaker.send_many`."""
        return self._maker.send_many(job, several)

    def publish(self, event: Event, /) -> Publication:
        """Publish an event with the client's own options; see `CallMaker.publish`."""
        return self._maker.publish(event)

    # Asking workers.

    def wait_for_service(self, name: str, *, timeout: float = 30.0) -> None:
        """Wait until a worker of the service answers.

        Args:
            name: the service's.
            timeout: seconds, above 0.

        Raises:
            ServiceUnavailable: no worker answered in time, or the client could not be opened.
            ConfigurationError: the name or the timeout is not valid.
            ClosedError: the client is closed.

        """
        check_name("the name of a service", name)
        check_seconds("timeout", timeout)
        deadline = Deadline.after(timeout)
        client = self._opened(deadline.at).client
        left = max(deadline.remaining(), 0.001)
        self._run(lambda: client.wait_for_service(name, timeout=left))

    def workers(self, service: str | None = None, *, wait: float = 1.0) -> list[WorkerInfo]:
        """Ask which workers there are.

        Args:
            service: only workers of this service; None for all workers of the namespace.
            wait: seconds to collect answers, above 0; their number is not known. It ends at once if there is no
                worker.

        Raises:
            BrokerError: the client could not be opened.
            ConfigurationError: the service or the wait is not valid.
            ClosedError: the client is closed.

        """
        client = self._client()
        return self._run(lambda: _collect(client.workers(service, wait=wait)))

    def stats(self, service: str | None = None, *, wait: float = 1.0) -> list[WorkerStats]:
        """Ask the workers for their counters; used like `workers`."""
        client = self._client()
        return self._run(lambda: _collect(client.stats(service, wait=wait)))

    def _client(self) -> asynchronous.Client:
        return (self._usable() or self._open(None)).client

    def _run(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        connection = self._usable() or self._open(None)
        try:
            return blocking.run(connection.loop, function)
        except blocking.Abandoned:
            raise ClosedError("the event loop of the client has ended") from None


class _Caller:
    """Makes the calls of a client and its proxies."""

    topology = late.TOPOLOGY

    def __init__(self, client: Client) -> None:
        self._client = client

    def invoke(self, target: Target, options: CallOptions, args: tuple[Any, ...], params: Mapping[str, Any]) -> Any:
        """Make one call, and wait until it has ended."""
        connection = self._client._usable()  # noqa: SLF001 - a part of it
        if connection is None:
            connection, target, options = self._open(target, options)
        else:
            target, options = connection.late.resolve(target, options)
        try:
            return blocking.run(connection.loop, connection.client.invoke, target, options, args, params)
        except blocking.Abandoned:
            raise OutcomeUnknown("the event loop of the client ended during the call") from None

    def send_jobs(
        self,
        job: str | Callable[..., Any],
        options: CallOptions,
        several: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]],
    ) -> list[Job]:
        """Send jobs of one name, and wait until the broker has them."""
        several = [*several]  # here, and not in the thread of the connections
        connection, options = self._to_send(options, lambda: find_job(job))
        try:
            sent = blocking.run(connection.loop, connection.client.send_jobs, job, options, several)
        except blocking.Abandoned:
            raise SendError(_ENDED, queued="maybe") from None
        return [BlockingJob.of(each, connection.loop) if isinstance(each, WatchedJob) else each for each in sent]

    def publish_event(self, event: Event, options: CallOptions) -> Publication:
        """Publish an event, and wait until the broker has it."""
        connection, options = self._to_send(options, lambda: named(event))
        try:
            return blocking.run(connection.loop, connection.client.publish_event, event, options)
        except blocking.Abandoned:
            raise SendError(_ENDED, queued="maybe") from None

    def _to_send(self, options: CallOptions, check: Callable[[], object]) -> tuple[Connection, CallOptions]:
        """The connection for what is sent, and its options. If it has to be opened first, `check` is called before."""
        connection = self._client._usable()  # noqa: SLF001 - a part of it
        if connection is not None:
            return connection, connection.late.options(options)
        check()  # a mistake is told whether there is a broker or not
        client = self._client
        options = late.Late(self.topology, client.options.timeout).options(options)
        deadline = time.monotonic() + options.timeout
        try:
            connection = client._opened(deadline)  # noqa: SLF001 - a part of it
        except ServiceUnavailable as error:
            raise SendError(error.message, queued="no") from error
        left = deadline - time.monotonic()
        if left <= 0:
            raise SendError(f"the client was not open within {options.timeout:g} s", queued="no")
        return connection, replace(options, timeout=left)

    def _open(self, target: Target, options: CallOptions) -> tuple[Connection, Target, CallOptions]:
        """Open the client for a call, within the deadline of the call."""
        client = self._client
        _, known = late.Late(self.topology, client.options.timeout).resolve(target, options)
        now = time.monotonic()
        deadline = inherit(known.timeout, now)
        if deadline <= now:
            raise CallTimeout("the deadline had passed before the call", executed="no")
        connection = client._opened(deadline)  # noqa: SLF001 - a part of it
        left = deadline - time.monotonic()
        if left <= 0:
            raise CallTimeout("the deadline passed while the client was opened", executed="no")
        target, options = connection.late.resolve(target, options)
        return connection, target, replace(options, timeout=left)


_ENDED: Final = "the event loop of the client ended while it was sent"


async def _collect(answers: AsyncIterator[T]) -> list[T]:
    return [answer async for answer in answers]


def disconnect_all() -> None:
    """Close the connections of all clients of this process. Each opens new ones, and reads the environment, if used."""
    for client in [*_clients]:
        client._disconnect()  # noqa: SLF001 - they are of one piece


def _forked() -> None:
    for client in [*_clients]:
        client._forked()  # noqa: SLF001 - they are of one piece


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
