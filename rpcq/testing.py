"""Test a service, or code that calls a service, without a broker. With a URL, the same test runs on RabbitMQ.

    async with running(calculator) as client:
        assert await client.call("calculator.add", x=1, y=2) == 3

Nothing is patched: a real worker serves, a real client calls, and their messages are the same as over RabbitMQ.
`FakeService` replaces a service that the code under test calls.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import os
import secrets
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final, Literal, Protocol, Self, TypedDict, Unpack, cast

from rpcq import sync
from rpcq.client import Client
from rpcq.contracts import METHOD_NAME, contract_of, methods_of
from rpcq.errors import BrokerError, CallError, ConfigurationError, DomainError, InvalidReply, ServiceUnavailable
from rpcq.invocation import Refused
from rpcq.options import ClientKwargs, ConnectionOptions, check_name
from rpcq.runtime import blocking
from rpcq.service import Context, Method, Service
from rpcq.transport.opening import open_admin
from rpcq.url import parse
from rpcq.validation.schemas import type_hints
from rpcq.wire.topology import Topology
from rpcq.worker import Worker

__all__ = ["FakeService", "Received", "Running", "running", "running_sync"]

FAKES_GRACE: Final = 0.05
"""Seconds that a fake's handlers have to end when its worker stops or is lost: long enough to send their replies."""


class Settings(TypedDict, total=False):
    """The keyword arguments of `running` besides the URL: options of its client and of its workers.

    Attributes:
        name: name of the client and of the workers.
        timeout: seconds that a call has, unless `with_options` sets another timeout.
        prefetch: number of calls of each service that may run at the same time.
        max_body: largest size of a message, bytes.
        grace: seconds that running handlers have to end when the test ends; 1 by default.

    """

    name: str
    timeout: float
    prefetch: int
    max_body: int
    grace: float


class Running(Protocol):
    """The type of the pytest fixture `rpcq_running`: `running`, in a namespace of the test."""

    def __call__(self, *services: Service, **settings: Unpack[Settings]) -> AbstractAsyncContextManager[Client]:
        """Serve the services, and yield a connected client; see `running`."""
        ...


def running(
    *services: Service, url: str | None = None, **settings: Unpack[Settings]
) -> AbstractAsyncContextManager[Client]:
    """Serve real and fake services, and yield a connected client, until the `async with` is left.

    Services and client use a namespace of their own. On RabbitMQ, its queues and exchanges are deleted at the end. Not
    deleted are queues that a service names itself (`queue=`), which are in no namespace, and everything else that the
    code under test declares.

    Code that opens its own client or worker reaches the same services with the same URL and
    `namespace=client.options.namespace`, or through `RPCQ_URL` and `RPCQ_NAMESPACE`, which the pytest fixture
    `rpcq_running` sets.

    Args:
        services: services to serve; none, to test what callers get when there is no worker.
        url: URL of the broker; `RPCQ_TEST_URL` if None; if that is not set either, a new broker in this process.
        settings: as in `Settings`; those that are not given are as in production.

    Raises:
        BrokerError: the broker cannot be used, or the queues could not be deleted. If the test has already failed, the
            second is added to its error as a note.
        ConfigurationError: a service, the URL or a setting cannot be used; or two services have the same name.

    """
    return Place(url).running(*services, **settings)


def running_sync(
    *services: Service, url: str | None = None, **settings: Unpack[Settings]
) -> AbstractContextManager[sync.Client]:
    """Serve as `running` does, and yield an `rpcq.sync.Client`, for code that blocks.

    The services run in the thread that blocking clients share.
    """
    return Place(url).running_sync(*services, **settings)


class Place:
    """A broker, and a namespace on it that is not used elsewhere.

    Args:
        url: as for `running`.

    """

    def __init__(self, url: str | None = None) -> None:
        self.url = url or os.environ.get("RPCQ_TEST_URL") or f"memory://{secrets.token_hex(8)}"
        self.namespace = f"test-{secrets.token_hex(8)}"
        self._topology = Topology(self.namespace)
        self._queues: set[str] = set()
        self._used = False
        self._users = 0

    @asynccontextmanager
    async def running(
        self,
        *services: Service,
        name: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - an option of the client
        prefetch: int | None = None,
        max_body: int | None = None,
        grace: float = 1.0,
    ) -> AsyncIterator[Client]:
        """See `running`. If several overlap, the queues are deleted when the last one is left."""
        for service in services:
            if not isinstance(service, Service):
                raise ConfigurationError(f"services must be instances of Service; got {service!r}")
        names = [service.name for service in services]
        if twice := sorted({it for it in names if names.count(it) > 1}):
            raise ConfigurationError(f"services must have different names; got several called {', '.join(twice)}")
        both = _given(namespace=self.namespace, name=name, max_body=max_body)

        def worker(*served: Service, grace: float) -> Worker:
            return Worker(*served, url=self.url, grace=grace, **both, **_given(prefetch=prefetch))

        fakes = [service for service in services if isinstance(service, FakeService)]
        real = [service for service in services if not isinstance(service, FakeService)]
        client = Client(self.url, **both, **_given(timeout=timeout))
        async with self._cleared(services), client, AsyncExitStack() as workers:
            self._used = True
            if real:
                await workers.enter_async_context(worker(*real, grace=grace))
            for fake in fakes:  # each has a worker of its own, which `vanishes` may cut off
                await workers.enter_async_context(_served(fake, partial(worker, grace=FAKES_GRACE)))
            yield client

    @contextmanager
    def running_sync(self, *services: Service, **settings: Unpack[Settings]) -> Iterator[sync.Client]:
        """See `rpcq.testing.running_sync`."""
        loop, around = blocking.shared_loop(), self.running(*services, **settings)
        inner = blocking.run(loop, around.__aenter__)
        try:
            with sync.Client(self.url, **cast("ClientKwargs", asdict(inner.options))) as client:
                yield client
        except BaseException as error:
            blocking.run(loop, around.__aexit__, type(error), error, error.__traceback__)
            raise
        blocking.run(loop, around.__aexit__, None, None, None)

    @asynccontextmanager
    async def _cleared(self, services: Sequence[Service]) -> AsyncIterator[None]:
        """Delete the queues and exchanges of the namespace at the end."""
        self._users += 1
        self._queues |= {self._topology.request_queue(it.name, it.queue_type).name for it in services}
        try:
            yield
        except BaseException as error:
            try:
                await self._leave()
            except BrokerError as why:
                error.add_note(f"rpcq.testing could not delete the queues of namespace {self.namespace!r}: {why}")
            raise
        await self._leave()

    async def _leave(self) -> None:
        self._users -= 1
        if self._used and not self._users and not self.url.startswith("memory:"):
            exchanges = [exchange.name for exchange in self._topology.exchanges()]
            await _delete(self.url, exchanges, sorted(self._queues))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


async def _delete(url: str, exchanges: Sequence[str], queues: Sequence[str]) -> None:
    """Delete exchanges, and queues with their messages, from RabbitMQ; skip those that do not exist.

    Raises:
        BrokerError: they could not be deleted.

    """
    broker, options = parse(url), ConnectionOptions(name="rpcq.testing")
    async with open_admin(broker, options, *broker.hosts[0]) as admin:
        await admin.delete(queues, exchanges)


# Fakes.


@dataclass(frozen=True, slots=True)
class Received:
    """A call that a fake service got.

    Attributes:
        method: name of the method.
        args: parameters by position.
        params: parameters by name; in a fake of a contract, they have the types of the contract.
        context: everything else: `metadata`, `attempt`, `deadline`, `caller`, ...

    """

    method: str
    args: tuple[Any, ...]
    params: Mapping[str, Any]
    context: Context


_Act = Callable[[Received], Awaitable[Any]]
"""A behaviour: what a fake does with a call."""


class FakeService(Service):
    """A service with scripted behaviour, for tests of code that calls it.

        stock = FakeService("stock").fails("take", OutOfStock("no bolts")).answers("take", 3)

    `answers`, `fails` and `vanishes` add a behaviour to a method. Each call of the method uses the next behaviour, and
    the last one is used again and again. Behaviours may be added while the fake is served. A call of a method without a
    behaviour ends with `MethodNotFound`.

    In `running`, a real worker of its own serves it, and callers get what they get in production: domain errors arrive
    as themselves if the caller declares them, a fake that is too slow makes the call time out, and so on.

    Args:
        name: name of the service.
        queue_type: "classic" or "quorum", as for the real service.

    Attributes:
        calls: the calls that it got, in order, with each attempt; also those that failed or whose worker vanished.

    Raises:
        ConfigurationError: an argument is not valid; the message names it.

    """

    def __init__(self, name: str, *, queue_type: Literal["classic", "quorum"] = "classic") -> None:
        super().__init__(name, queue_type=queue_type)
        self.calls: list[Received] = []
        self._contract: dict[str, Callable[..., Any]] | None = None
        self._idempotent: frozenset[str] = frozenset()
        self._next: dict[str, deque[_Act]] = {}
        self._current: dict[str, _Act] = {}

    @classmethod
    def of(
        cls, api: Any, service: str | None = None, *, queue_type: Literal["classic", "quorum"] = "classic"
    ) -> FakeService:
        """Make a fake of the service that a Protocol class describes; the fake must keep to that contract.

        Only methods of the class can have a behaviour. Parameters are validated against the class (`InvalidParams`),
        and so are results. A second attempt at a call is refused unless the contract declares the method idempotent.

        Args:
            api: the class, as for `Client.bind`.
            service: name of the service; if None, the name in the class's `contract`.
            queue_type: "classic" or "quorum", as for the real service.

        Raises:
            ConfigurationError: no service is named, or the class has an attribute that is not an `async def`.

        """
        declared = contract_of(api, service)
        fake = cls(declared.service, queue_type=queue_type)
        functions = methods_of(api, is_awaited=not declared.blocking)
        fake._contract = {name: it for name, it in functions.items() if name not in declared.jobs}
        fake._idempotent = declared.idempotent
        return fake

    def answers(self, method: str, value: Any = None, *, after: float = 0.0) -> Self:
        """Add a behaviour: the method returns a result.

        Args:
            method: name of the method.
            value: the result; or a function, `def` or `async def`, that takes the parameters and returns it or raises.
            after: seconds that the method takes.

        Raises:
            ConfigurationError: the contract has no such method; or JSON cannot carry the value, or the value does not
                have the type that the contract gives the result.

        """
        offered = self._offered(method)
        if not callable(value):
            try:
                offered.write_result(value, sys.maxsize)
            except InvalidReply as error:
                msg = f"value must be a result that the method can return; got {value!r}: {error.message}"
                raise ConfigurationError(msg) from error

        async def act(received: Received) -> Any:
            if not callable(value):
                return value
            result = value(*received.args, **received.params)
            return await result if inspect.isawaitable(result) else result

        return self._add(offered, act, after)

    def fails(self, method: str, error: Exception | type[Exception], *, after: float = 0.0) -> Self:
        """Add a behaviour: the method fails, and the caller gets an error.

        Args:
            method: name of the method.
            error: the caller gets a domain error as itself if it declares it; an error of rpcq's as it is, with its
                `executed` and `retryable`; and any other exception as `RemoteError`, as if a handler had raised it.
                After `OutcomeUnknown`, an idempotent call is sent again, as in production.
            after: seconds before it fails.

        Raises:
            ConfigurationError: the contract has no such method; the error is not an exception; or it is
                `ServiceUnavailable`, which callers get without a worker: leave the fake out of `running` instead.

        """
        raised = error() if isinstance(error, type) else error
        if not isinstance(raised, Exception):
            raise ConfigurationError(f"error must be an exception; got {raised!r}")
        if isinstance(raised, ServiceUnavailable):
            # A worker replies with it when it shuts down, and the client sends the call again.
            msg = "error must not be ServiceUnavailable: callers get it if you leave the fake out of running()"
            raise ConfigurationError(msg)

        async def fail(_: Received) -> Any:
            error = _final(raised)
            if isinstance(error, CallError) and not isinstance(error, DomainError):
                raise Refused(error)  # a worker replies with it; a handler does not raise it
            raise error

        return self._add(self._offered(method), fail, after)

    def vanishes(self, method: str, *, after: float = 0.0) -> Self:
        """Add a behaviour: the worker that holds the call is cut off, and another worker replaces it.

        The caller gets `OutcomeUnknown`; an idempotent call is sent again. Other calls that the lost worker has in hand
        and does not end within 0.05 s are lost with it.

        Args:
            method: name of the method.
            after: seconds before the worker is cut off.

        Raises:
            ConfigurationError: the contract has no such method.

        """

        async def vanish(received: Received) -> Any:
            lost = received.context.state
            if lost is None:
                raise RuntimeError("a fake can only vanish inside rpcq.testing.running")
            lost.set()
            await asyncio.get_running_loop().create_future()  # never ends: its worker is cut off

        return self._add(self._offered(method), vanish, after)

    def check(self) -> None:
        """Do nothing: a fake can always be served, even without methods."""

    def under(self, lost: asyncio.Event) -> Service:
        """Return a copy of this service for one worker, which has to be cut off once `lost` is set."""

        @asynccontextmanager
        async def lifespan() -> AsyncIterator[asyncio.Event]:
            yield lost

        served = copy.copy(self)
        served.lifespan = lifespan
        return served

    def _add(self, offered: Method, act: _Act, after: float) -> Self:
        if isinstance(after, bool) or not isinstance(after, int | float) or not 0 <= after < float("inf"):
            raise ConfigurationError(f"after must be a number of seconds of at least 0; got {after!r}")

        async def later(received: Received) -> Any:
            await asyncio.sleep(after)
            return await act(received)

        self.methods[offered.name] = offered
        self._next.setdefault(offered.name, deque()).append(later if after else act)
        return self

    def _offered(self, name: str) -> Method:
        """Return the method; `_add` then adds it to the methods that are served."""
        if name in self.methods:
            return self.methods[name]
        check_name("the name of a method", name)
        if not METHOD_NAME.match(name):
            raise ConfigurationError(f"the name of a method must have no dot; got {name!r}")
        if self._contract is not None and name not in self._contract:
            has = ", ".join(self._contract) or "none"
            raise ConfigurationError(
                f"the name of a method must be in the contract of {self.name!r}, which has {has}; got {name!r}"
            )
        return Method(
            self.name,
            name,
            self._handler(name),
            idempotent=self._contract is None or name in self._idempotent,
            errors=(DomainError,),
            timeout=None,
            allow=None,
        )

    def _handler(self, name: str) -> Callable[..., Any]:
        async def handle(*args: Any, rpcq_context: Context, **params: Any) -> Any:
            received = Received(name, args, params, rpcq_context)
            self.calls.append(replace(received, context=replace(rpcq_context, state=None)))
            if self._next[name]:
                self._current[name] = self._next[name].popleft()
            return await self._current[name](received)

        if self._contract is not None:
            _take_types(handle, self._contract[name], f"{self.name}.{name}")
        return handle

    def __repr__(self) -> str:
        return f"<FakeService {self.name!r}: {', '.join(self.methods) or 'no methods'}>"


def _take_types(handle: Callable[..., Any], function: Callable[..., Any], label: str) -> None:
    """Give a handler the signature and the types of a contract's method."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    context = inspect.Parameter("rpcq_context", inspect.Parameter.KEYWORD_ONLY)
    before = [it for it in parameters if it.kind is not it.VAR_KEYWORD]
    handle.__signature__ = inspect.Signature([*before, context, *parameters[len(before) :]])  # type: ignore[attr-defined]  # what `inspect.signature` reads
    handle.__annotations__ = {**type_hints(label, function), "rpcq_context": Context}


def _final(error: Exception) -> Exception:
    """Return the error to raise for one call: a copy, or without the traceback of earlier calls."""
    if not isinstance(error, CallError):
        return error.with_traceback(None)
    return copy.copy(error)


@asynccontextmanager
async def _served(fake: FakeService, make: Callable[[Service], Worker]) -> AsyncIterator[None]:
    """Serve a fake: cut off each worker that has to be lost, and start another one in its place."""
    workers: list[Worker] = []

    async def begin() -> asyncio.Event:
        lost = asyncio.Event()
        workers.append(make(fake.under(lost)))
        await workers[-1].start()
        return lost

    async def replace_lost(lost: asyncio.Event) -> None:
        while True:
            await lost.wait()
            lost = await begin()
            await workers[0].stop()  # its handlers do not end: it is cut off, and its deliveries return to the broker
            del workers[0]

    replacing = asyncio.create_task(replace_lost(await begin()))
    try:
        yield
    finally:
        replacing.cancel()
        await asyncio.wait([replacing])
        for worker in workers:
            await worker.stop()
    if not replacing.cancelled():
        await replacing  # a worker could not be replaced: raise its error
