"""Runs a client, and a worker if wanted, for the lifetime of a web app."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import fields
from functools import partial
from typing import Any, Final, TypeVar, Unpack, cast

from rpcq import logs
from rpcq.calls import late
from rpcq.calls.proxy import CallMaker
from rpcq.calls.targets import Target
from rpcq.client import Client
from rpcq.environment import broker_url, options_from
from rpcq.errors import ClosedError, ConfigurationError, ServiceUnavailable, UsageError
from rpcq.event_types import Event
from rpcq.observer import Observer
from rpcq.options import (
    CallKwargs,
    CallOptions,
    ClientKwargs,
    ClientOptions,
    ConnectionKwargs,
    ConnectionOptions,
    WorkerKwargs,
    WorkerOptions,
)
from rpcq.service import Service
from rpcq.transport.opening import open_transport
from rpcq.validation.listing import lists_options
from rpcq.web.opening import Opener
from rpcq.wire.events import Publication
from rpcq.wire.jobs import Job
from rpcq.worker import Worker, check_services

T = TypeVar("T")
AppType = TypeVar("AppType")
State = TypeVar("State")

LOOK_AGAIN: Final = 0.01
"""Seconds between two looks whether the last call has ended, at shutdown."""

log = logs.get_logger("rpcq.web")


@lists_options(ClientOptions)
class Rpc:
    """A client for the lifetime of an app; with `services`, also a worker in the same event loop.

    Give `rpc.lifespan` to the app: `FastAPI(lifespan=rpc.lifespan)`. Making an `Rpc` opens nothing and reads no
    environment, so it can be made in the same module as the app: the environment is read each time the lifespan is
    entered, so a test can set it after the import. Each process that serves the app opens its own connections.

    The app starts even if the broker is not there: a client or worker that is not open after `first_wait` is opened in
    the background. Until then, calls raise `ServiceUnavailable`, and `ready` is False. An error that is not a
    `BrokerError` fails the start of the app: trying again does not help. If such an error comes after the start, for
    example from a slow lifespan of a service, rpcq raises SIGTERM if the program has a handler for it, and the end of
    the app fails with the error.

    Args:
        url: URL of the broker, as for `Client`; `RPCQ_URL` if None.
        services: services that a worker serves beside the app; if there are none, there is only a client.
        worker_options: as in `WorkerOptions`; options of the connection that are not here are those of the client.
        grace: seconds that calls under way have to end when the app stops, after the worker has stopped; 0 for none.
        first_wait: seconds that the start of the app waits for the first connection; 0 to not wait.
        observers: observers of the client and of the worker; see `rpcq.observer`.
        client_options: as in `ClientOptions`; options that are not given come from the environment, if set there.

    Raises:
        ConfigurationError: a service, the URL or an option that is given here cannot be used; raised at once.

    """

    def __init__(
        self,
        url: str | None = None,
        *,
        services: Iterable[Service] = (),
        worker_options: WorkerKwargs | None = None,
        grace: float = 10.0,
        first_wait: float = 1.0,
        observers: Iterable[Observer] = (),
        **client_options: Unpack[ClientKwargs],
    ) -> None:
        _check_seconds("grace", grace)
        _check_seconds("first_wait", first_wait)
        options = ClientOptions(**client_options)
        if url:
            open_transport(url, options)  # it is not started: this checks the URL
        shared = {name: value for name, value in client_options.items() if name in ConnectionKwargs.__annotations__}
        self._url = url
        self._services = tuple(services)
        self._client_options = client_options
        self._worker_options = cast("WorkerKwargs", {**shared, **(worker_options or {})})
        if self._services:
            check_services(self._services)
            WorkerOptions(**self._worker_options)
        self._grace = grace
        self._first_wait = first_wait
        self._observers = tuple(observers)
        self._maker = CallMaker(_Caller(self), late.OPTIONS)
        self._late: late.Late  # of this run of the app
        self._running: _Running | None = None

    # The app's life.

    @asynccontextmanager
    async def lifespan(self, _app: Any = None, /) -> AsyncIterator[None]:
        """The lifespan to give to the app; also an async context manager for programs that are not web apps.

        At its end, the worker stops first, within its own `grace`; then calls under way have `grace` seconds; then all
        is closed. If this end is cancelled, it does not wait for calls, and still closes all. It can be entered again
        afterwards.

        Raises:
            UsageError: it is entered already; two apps need two `Rpc` objects.
            ConfigurationError: there is no URL, or a variable of the environment has an invalid value.
            Exception: an error that trying again does not fix; see the class.

        """
        if self._running is not None:
            raise UsageError("this Rpc is in use by an app already; give each app its own")
        running = self._running = self._begin()
        try:
            await running.start(self._first_wait)
            yield
            if running.failure is not None:
                raise running.failure
        finally:
            try:
                await running.stop(self._grace)
            finally:
                self._running = None

    def around(
        self, own: Callable[[AppType], AbstractAsyncContextManager[State]], /
    ) -> Callable[[AppType], AbstractAsyncContextManager[State]]:
        """Put this lifespan inside the app's own: what `own` made stays open as long as handlers and calls run.

        `own` is entered first and left last; the state that it yields is the app's.
        """

        @asynccontextmanager
        async def both(app: AppType) -> AsyncIterator[State]:
            async with own(app) as state, self.lifespan(app):
                yield state

        return both

    @property
    def ready(self) -> bool:
        """Whether the app should get requests: all sessions are up, and the app is not shutting down."""
        return self.why_not_ready is None

    @property
    def why_not_ready(self) -> str | None:
        """Why the app is not ready, in a sentence for operators; None if it is ready."""
        return "the app has not started, or has ended" if self._running is None else self._running.why_not_ready

    # Calling.

    @property
    def client(self) -> Client:
        """The open client of this run of the app. Do not keep it for longer.

        Raises:
            ServiceUnavailable: the client has not connected to the broker yet.
            ClosedError: the lifespan is not entered.

        """
        if self._running is None:
            raise ClosedError("the app has not started, or has ended: rpc.lifespan is not entered")
        opener = self._running.client
        if opener.opened is None:
            raise ServiceUnavailable(opener.why_not_ready or "")
        return opener.opened

    def bind(self, api: Callable[..., T], service: str | None = None, **options: Unpack[CallKwargs]) -> T:
        """Make a proxy of a Protocol's type, as `Client.bind` does. It can be made before the app starts, and kept.

        Its calls go to the client of the current run of the app; they also raise the errors of `client`.

        Args:
            api: class whose methods describe those of the service.
            service: name of the service; if None, the name in the class's `contract`.
            options: options of its calls; see `CallOptions`.

        Raises:
            ConfigurationError: as for `CallMaker.bind`.

        """
        return self._maker.with_options(**options).bind(api, service)

    def api(
        self, api: Callable[..., T], service: str | None = None, **options: Unpack[CallKwargs]
    ) -> Callable[[], Coroutine[Any, Any, T]]:
        """Like `bind`, as a dependency: `calculator: Annotated[CalculatorApi, Depends(rpc.api(CalculatorApi))]`."""
        bound = self.bind(api, service, **options)

        # Not `def`: FastAPI runs a `def` in a pool of threads, where it may wait for functions that block.
        async def bound_api() -> T:
            return bound

        return bound_api

    def _begin(self) -> _Running:
        """Read the environment, and open a client and a worker that keep what it says, however often they are made."""
        url, observers = broker_url(self._url), self._observers
        client_options = cast("ClientKwargs", _all(options_from(ClientOptions, self._client_options)))
        make_client = partial(Client, url, observers=observers, **client_options)
        client = make_client()  # raises here, and not in a task, if it cannot be made
        self._late = late.Late(client.topology, client.options.timeout)
        if not self._services:
            return _Running(make_client, None)
        worker_options = cast("WorkerKwargs", _all(options_from(WorkerOptions, self._worker_options)))
        make_worker = partial(Worker, *self._services, url=url, observers=observers, **worker_options)
        make_worker()
        return _Running(make_client, make_worker)


class _Caller:
    """Makes each call with the client that is open at that time, in its namespace and with its timeout."""

    topology = late.TOPOLOGY

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc

    def invoke(
        self, target: Target, options: CallOptions, args: tuple[Any, ...], params: Mapping[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        client = self._rpc.client
        target, options = self._rpc._late.resolve(target, options)  # noqa: SLF001 - a part of it
        return client.invoke(target, options, args, params)

    def send_jobs(
        self,
        job: str | Callable[..., Any],
        options: CallOptions,
        several: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]],
    ) -> Coroutine[Any, Any, list[Job]]:
        client = self._rpc.client
        return client.send_jobs(job, self._rpc._late.options(options), several)  # noqa: SLF001 - a part of it

    def publish_event(self, event: Event, options: CallOptions) -> Coroutine[Any, Any, Publication]:
        client = self._rpc.client
        return client.publish_event(event, self._rpc._late.options(options))  # noqa: SLF001 - a part of it


class _Running:
    """The client and the worker of one run of an app.

    Attributes:
        failure: error after the start that trying again does not fix, or None.

    """

    def __init__(self, make_client: Callable[[], Client], make_worker: Callable[[], Worker] | None) -> None:
        self.client = Opener("client", make_client, Client.connect)
        self.worker = None if make_worker is None else Opener("worker", make_worker, Worker.start)
        self.failure: BaseException | None = None
        self._openers = [opener for opener in (self.client, self.worker) if opener is not None]
        self._stopping = False
        self._hurried = False

    @property
    def why_not_ready(self) -> str | None:
        if self._stopping:
            return "the app shuts down"
        if self.failure is not None:
            return f"the client or the worker of the app cannot be opened: {type(self.failure).__name__}"
        return next((why for opener in self._openers if (why := opener.why_not_ready)), None)

    async def start(self, seconds: float) -> None:
        tasks = [opener.task for opener in self._openers]
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        if why := self.why_not_ready:
            log.warning("the app starts without the broker; it goes on connecting in the background", cause=why)
        for task in tasks:
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None or self._stopping:
            return
        self.failure = error
        log.critical("the client or the worker of the app cannot be opened; the app has to stop", exc_info=error)
        # The error must not stay hidden in a server that keeps running. SIGTERM is the only way to stop every server.
        if callable(signal.getsignal(signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)

    async def stop(self, grace: float) -> None:
        """Close all; if this is cancelled, close all sooner, and then raise the cancellation."""
        self._stopping = True
        closing = asyncio.create_task(self._stop(grace))
        cancelled: asyncio.CancelledError | None = None
        while not closing.done():
            try:
                await asyncio.wait([closing])
            except asyncio.CancelledError as error:
                cancelled, self._hurried = error, True
        closing.result()
        if cancelled is not None:
            raise cancelled

    async def _stop(self, grace: float) -> None:
        await asyncio.gather(*(opener.give_up() for opener in self._openers))
        try:
            if self.worker is not None and self.worker.opened is not None:
                await self.worker.opened.stop()
        finally:
            if self.client.opened is not None:
                await self._drain(self.client.opened, grace)
                await self.client.opened.close()

    async def _drain(self, client: Client, grace: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + grace
        # Polled: this wait is rare and short, and setting an event would cost something at the end of each call.
        while client.in_flight and not self._hurried and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_AGAIN)


def _all(options: ConnectionOptions) -> dict[str, Any]:
    return {it.name: getattr(options, it.name) for it in fields(options)}


def _check_seconds(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ConfigurationError(f"{name} must be a number of seconds, 0 or more; got {value!r}")
