"""A client, and a worker if wanted, that live as long as a web app."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import fields
from typing import Any, Final, TypeVar, Unpack, cast

from rpcq import logs
from rpcq.calls.proxy import CallMaker, Target
from rpcq.client import Client
from rpcq.environment import broker_url
from rpcq.errors import ClosedError, ConfigurationError, ServiceUnavailable, UsageError
from rpcq.observer import Observer
from rpcq.options import (
    CallKwargs,
    CallOptions,
    ClientKwargs,
    ConnectionKwargs,
    ConnectionOptions,
    WorkerKwargs,
)
from rpcq.service import Service
from rpcq.web.keeping import Keeper
from rpcq.wire.topology import Topology
from rpcq.worker import Worker

T = TypeVar("T")
AppType = TypeVar("AppType")
State = TypeVar("State")

LOOK_AGAIN: Final = 0.01
"""Seconds between two looks at whether the last call has ended, at shutdown."""

log = logs.get_logger("rpcq.web")


class Rpc:
    """A client for each time that an app runs, and beside it, in the same event loop, a worker if `services` are given.

    Give `rpc.lifespan` to the app: `FastAPI(lifespan=rpc.lifespan)`. Making an `Rpc` opens nothing, so that it can be
    made where the app is; each process that serves the app opens its own connections.

    The app starts whether or not the broker is there: what is not open after `first_wait` is opened in the background
    as soon as that works. Until then calls raise `ServiceUnavailable`, and `ready` is false. An error that is no
    `BrokerError` is not mended by trying again, and fails the app's start; where it comes only later, as from a slow
    lifespan of a service, the program is told to stop through its handler of SIGTERM, if it has one, and the app's end
    fails.

    Args:
        url: the broker, as for `Client`; `RPCQ_URL` if None.
        services: to serve beside the app; none for a client alone.
        worker_options: as in `WorkerOptions`; how the broker is reached is as for the client, unless it is here.
        grace: seconds that calls under way have to end when the app stops, after the worker has; 0 for none.
        first_wait: seconds that the start of the app waits for the first connection; 0 for not at all.
        observers: who is told of calls, requests and sessions, of the client and of the worker; see `rpcq.observer`.
        client_options: as in `ClientOptions`; what is not given comes from the environment, if it is there.

    Raises:
        ConfigurationError: a service, the URL or an option cannot be used. At once.

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
        self._url = broker_url(url)
        self._services = tuple(services)
        self._client_options = client_options
        shared = {name: value for name, value in client_options.items() if name in ConnectionKwargs.__annotations__}
        self._worker_options = cast("WorkerKwargs", {**shared, **(worker_options or {})})
        self._grace = grace
        self._first_wait = first_wait
        self._observers = tuple(observers)
        # All is checked now, and the environment read, so that each run of the app has the same.
        client = self._make_client()
        self._client_options = cast("ClientKwargs", _all(client.options))
        if self._services:
            self._worker_options = cast("WorkerKwargs", _all(self._make_worker().options))
        self._maker = CallMaker(_Late(self, client.topology), CallOptions(timeout=client.options.timeout))
        self._running: _Running | None = None

    # The app's life.

    @asynccontextmanager
    async def lifespan(self, _app: Any = None, /) -> AsyncIterator[None]:
        """What the app is to be given as its lifespan; also an async context manager for programs that are no app.

        At its end the worker stops first, within its own grace, then calls under way have `grace` seconds, then all is
        closed. Cancelling that lets the calls end at once, and leaves nothing open. It can be entered again afterwards.

        Raises:
            UsageError: it is entered already: two apps each have an `Rpc` of their own.
            Exception: what no attempt mends; see the class.

        """
        if self._running is not None:
            raise UsageError("this Rpc is in use by an app already; give each app its own")
        running = self._running = _Running(self._make_client, self._make_worker if self._services else None)
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
        """The app's own lifespan with this one inside: what `own` made is there as long as handlers and calls run.

        `own` is entered first and left last; the state that it yields is the app's.
        """

        @asynccontextmanager
        async def both(app: AppType) -> AsyncIterator[State]:
            async with own(app) as state, self.lifespan(app):
                yield state

        return both

    @property
    def ready(self) -> bool:
        """Whether the app should be sent requests: all sessions with the broker are up, and it does not shut down."""
        return self.why_not_ready is None

    @property
    def why_not_ready(self) -> str | None:
        """What is missing, in a sentence for operators; None where nothing is."""
        return "the app has not started, or has ended" if self._running is None else self._running.why_not_ready

    # Calling.

    @property
    def client(self) -> Client:
        """The open client of this run of the app; not to be kept for longer.

        Raises:
            ServiceUnavailable: the broker has not been reached yet.
            ClosedError: the lifespan is not entered.

        """
        if self._running is None:
            raise ClosedError("the app has not started, or has ended: rpc.lifespan is not entered")
        keeper = self._running.client
        if keeper.opened is None:
            raise ServiceUnavailable(keeper.why_not_ready or "")
        return keeper.opened

    def bind(self, api: Callable[..., T], service: str | None = None, **options: Unpack[CallKwargs]) -> T:
        """A proxy of a Protocol's type, as `Client.bind` gives, that can be made before the app starts and kept.

        Its calls go to the client of the moment, and also raise what `client` does.

        Args:
            api: a class whose methods describe the service's.
            service: its name; that of the class's `contract` if None.
            options: for its calls; see `CallOptions`.

        Raises:
            ConfigurationError: as `CallMaker.bind`.

        """
        return self._maker.with_options(**options).bind(api, service)

    def api(
        self, api: Callable[..., T], service: str | None = None, **options: Unpack[CallKwargs]
    ) -> Callable[[], Coroutine[Any, Any, T]]:
        """The same as a dependency: `calculator: Annotated[CalculatorApi, Depends(rpc.api(CalculatorApi))]`."""
        bound = self.bind(api, service, **options)

        # Not `def`, which FastAPI runs in a thread, behind whatever blocks there.
        async def bound_api() -> T:
            return bound

        return bound_api

    def _make_client(self) -> Client:
        return Client(self._url, observers=self._observers, **self._client_options)

    def _make_worker(self) -> Worker:
        return Worker(*self._services, url=self._url, observers=self._observers, **self._worker_options)


class _Late:
    """Makes calls with the client that there is when they are made."""

    def __init__(self, rpc: Rpc, topology: Topology) -> None:
        self.topology = topology
        self._rpc = rpc

    def invoke(
        self, target: Target, options: CallOptions, args: tuple[Any, ...], params: Mapping[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        return self._rpc.client.invoke(target, options, args, params)


class _Running:
    """All that one run of an app has open.

    Attributes:
        failure: what no attempt mends, if that showed after the start.

    """

    def __init__(self, make_client: Callable[[], Client], make_worker: Callable[[], Worker] | None) -> None:
        self.client = Keeper("client", make_client, Client.connect)
        self.worker = None if make_worker is None else Keeper("worker", make_worker, Worker.start)
        self.failure: BaseException | None = None
        self._keepers = [keeper for keeper in (self.client, self.worker) if keeper is not None]
        self._stopping = False
        self._hurried = False

    @property
    def why_not_ready(self) -> str | None:
        if self._stopping:
            return "the app shuts down"
        if self.failure is not None:
            return f"what runs beside the app failed: {type(self.failure).__name__}"
        return next((why for keeper in self._keepers if (why := keeper.why_not_ready)), None)

    async def start(self, seconds: float) -> None:
        tasks = [keeper.task for keeper in self._keepers]
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        if why := self.why_not_ready:
            log.warning("the app starts without the broker; it is tried again in the background", cause=why)
        for task in tasks:
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None or self._stopping:
            return
        self.failure = error
        log.critical("what runs beside the app cannot be started; the app is to stop", exc_info=error)
        # A server that keeps running would hide it, and nothing else of an app reaches every server.
        if callable(signal.getsignal(signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)

    async def stop(self, grace: float) -> None:
        """Close all, to the end even where this is cancelled."""
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
        await asyncio.gather(*(keeper.give_up() for keeper in self._keepers))
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
        # Rare and short: no event is worth setting for each call that ends.
        while client.in_flight and not self._hurried and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_AGAIN)


def _all(options: ConnectionOptions) -> dict[str, Any]:
    return {it.name: getattr(options, it.name) for it in fields(options)}


def _check_seconds(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ConfigurationError(f"{name} is {value!r}; it is a number of seconds, 0 or more")
