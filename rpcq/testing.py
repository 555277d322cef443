"""Test a service, or what calls one, without a broker. The same test runs on RabbitMQ by a URL.

    async with running(calculator) as client:
        assert await client.call("calculator.add", x=1, y=2) == 3

Nothing is patched: a real worker serves, a real client calls, and what goes between them is what goes over RabbitMQ.
`FakeService` stands in for a service that the code under test calls.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import os
import secrets
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal, Self, TypedDict, Unpack, cast

from rpcq.client import Client
from rpcq.contracts import METHOD_NAME, Contract
from rpcq.errors import BrokerError, CallError, ConfigurationError, DomainError, InvalidReply, ServiceUnavailable
from rpcq.invocation import Refused
from rpcq.options import ConnectionOptions, check_name
from rpcq.service import Context, Method, Service
from rpcq.transport.opening import open_admin
from rpcq.url import parse
from rpcq.validation.schemas import type_hints
from rpcq.wire.topology import Topology
from rpcq.worker import Worker

__all__ = ["FakeService", "Received", "running"]

FAKES_GRACE: Final = 0.05
"""Seconds that a fake's handlers have to end when its worker stops or is lost; long enough to send what is answered."""


class Settings(TypedDict, total=False):
    """The keyword arguments of `running` besides the URL: options of its client and of its workers.

    Attributes:
        name: what both are called.
        timeout: seconds that a call has unless `with_options` says otherwise.
        prefetch: calls of each service that run at once.
        max_body: bytes of a message.
        grace: seconds that running handlers have to end when the test does; 1 unless given.

    """

    name: str
    timeout: float
    prefetch: int
    max_body: int
    grace: float


def running(
    *services: Service, url: str | None = None, **settings: Unpack[Settings]
) -> AbstractAsyncContextManager[Client]:
    """Serve services, real and fake ones, and give a connected client, until the `async with` is left.

    All of it is in a namespace of its own. On RabbitMQ, its queues and exchanges are deleted in the end; a queue that a
    service names itself (`queue=`) is in no namespace, and stays. So does what the code under test declares besides.

    Code that opens its own client or worker gets to the same place with the same URL and
    `namespace=client.options.namespace`, or from `RPCQ_URL` and `RPCQ_NAMESPACE`, which the pytest fixture
    `rpcq_running` sets.

    Args:
        services: what is served; none, to see what callers get when nobody serves.
        url: the broker; that of `RPCQ_TEST_URL` if None; without either, a fresh one in this process.
        settings: as in `Settings`; what is not given is as in production.

    Raises:
        BrokerError: the broker cannot be used, or the queues could not be deleted. Where the test has failed already,
            the latter is a note on its error.
        ConfigurationError: a service, the URL or a setting cannot be used; or two services have the same name.

    """
    return Place(url).running(*services, **settings)


class Place:
    """A broker, and a namespace on it that nobody else has.

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
        """See `running`. The queues are deleted when the last of those that overlap here is left."""
        for service in services:
            if not isinstance(service, Service):
                raise ConfigurationError(f"{service!r} is no Service")
        names = [service.name for service in services]
        if twice := sorted({it for it in names if names.count(it) > 1}):
            raise ConfigurationError(f"two services are called {', '.join(twice)}; give one of them another name")
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
            for fake in fakes:  # each with a worker of its own, which it may lose
                await workers.enter_async_context(_served(fake, partial(worker, grace=FAKES_GRACE)))
            yield client

    @asynccontextmanager
    async def _cleared(self, services: Sequence[Service]) -> AsyncIterator[None]:
        """Leave nothing behind."""
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
    """Delete exchanges and queues of RabbitMQ with all that is in them; what is not there is passed over.

    Raises:
        BrokerError: it could not be done.

    """
    broker, options = parse(url), ConnectionOptions(name="rpcq.testing")
    async with open_admin(broker, options, *broker.hosts[0]) as admin:
        await admin.delete(queues, exchanges)


# Fakes.


@dataclass(frozen=True, slots=True)
class Received:
    """A call that a fake service got.

    Attributes:
        method: its name.
        args: the parameters that came by position.
        params: those that came by name; in a fake of a contract, of the types that the contract gives them.
        context: the rest: `metadata`, `attempt`, `deadline`, `caller`, ...

    """

    method: str
    args: tuple[Any, ...]
    params: Mapping[str, Any]
    context: Context


_Act = Callable[[Received], Awaitable[Any]]
"""What a fake does with a call."""


class FakeService(Service):
    """A service that does as it is told, for tests of what calls it.

        stock = FakeService("stock").fails("take", OutOfStock("no bolts")).answers("take", 3)

    Each call of a method takes the next of what was told of that method, and the last one stays. More may be told while
    it is served. A method of which nothing was told is `MethodNotFound`.

    It is served by a real worker of its own in `running`, and callers get what they get in production: domain errors
    come as themselves to who declares them, a fake that is slow runs into the caller's deadline, and so on.

    Args:
        name: the service's.
        queue_type: "classic" or "quorum", as the real one.

    Attributes:
        calls: what it got, in order; also calls that it failed or vanished with, and each attempt at one.

    Raises:
        ConfigurationError: an argument cannot be; the message names it.

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
        """A fake of what a Protocol class describes, so that it cannot drift from that.

        Only methods of the class can be told; parameters are validated as it has them (`InvalidParams`), results
        have to fit, and a further attempt at a call is refused where the contract does not say that it is idempotent.

        Args:
            api: the class, as for `Client.bind`.
            service: its name; that of the class's `contract` if None.
            queue_type: "classic" or "quorum", as the real one.

        Raises:
            ConfigurationError: no service is named, or the class has something that is no method.

        """
        said: Contract | None = getattr(api, "__rpcq_contract__", None)
        if service is None and said is None:
            msg = f"{api!r} does not say which service it is; decorate it with @contract('name'), or give the name"
            raise ConfigurationError(msg)
        fake = cls(service or cast("Contract", said).service, queue_type=queue_type)
        fake._contract = {name: inspect.getattr_static(api, name) for name in dir(api) if not name.startswith("_")}
        for name, function in fake._contract.items():
            if not inspect.isfunction(function):
                raise ConfigurationError(f"{api!r} has {name!r}, which is no method; a contract has methods alone")
        if said is not None:
            fake._idempotent = said.idempotent
        return fake

    def answers(self, method: str, value: Any = None, *, after: float = 0.0) -> Self:
        """Answer a call of the method.

        Args:
            method: its name.
            value: the result; or a function of the parameters, `def` or `async def`, that gives it or raises.
            after: seconds until then: how slow it is.

        Raises:
            ConfigurationError: the contract has no such method; JSON cannot carry the value, or it is not what the
                contract says that the method returns.

        """
        offered = self._offered(method)
        if not callable(value):
            try:
                offered.write_result(value, sys.maxsize)
            except InvalidReply as error:
                raise ConfigurationError(f"a fake cannot answer {value!r}: {error.message}") from error

        async def answer(received: Received) -> Any:
            if not callable(value):
                return value
            result = value(*received.args, **received.params)
            return await result if inspect.isawaitable(result) else result

        return self._tell(offered, answer, after)

    def fails(self, method: str, error: Exception | type[Exception], *, after: float = 0.0) -> Self:
        """Fail a call of the method, with what its caller is to see.

        Args:
            method: its name.
            error: a domain error comes as itself to callers who declare it; an error of rpcq's as it is, with its
                `executed` and `retryable`; any other exception as `RemoteError`, like that of a handler. After
                `OutcomeUnknown` an idempotent call is sent again, as in production.
            after: seconds until then.

        Raises:
            ConfigurationError: the contract has no such method; that is no exception; or it is `ServiceUnavailable`,
                which callers get where nobody serves: leave the fake out of `running` for that.

        """
        raised = error() if isinstance(error, type) else error
        if not isinstance(raised, Exception):
            raise ConfigurationError(f"a fake fails with an exception, not with {raised!r}")
        if isinstance(raised, ServiceUnavailable):
            # A worker that says so shuts down, and the client sends the call again.
            msg = "no worker tells its callers that it is not there; leave the fake out of running(), and they get it"
            raise ConfigurationError(msg)

        async def fail(_: Received) -> Any:
            error = _final(raised)
            if isinstance(error, CallError) and not isinstance(error, DomainError):
                raise Refused(error)  # no handler raises it
            raise error

        return self._tell(self._offered(method), fail, after)

    def vanishes(self, method: str, *, after: float = 0.0) -> Self:
        """Lose the worker that holds a call of the method: it is cut off, and the next one takes its place.

        The caller gets `OutcomeUnknown`, or another attempt if the call is idempotent. What else the lost worker holds
        at that moment and does not end within 0.05 s is lost with it.

        Args:
            method: its name.
            after: seconds until then.

        Raises:
            ConfigurationError: the contract has no such method.

        """

        async def vanish(received: Received) -> Any:
            lost = received.context.state
            if lost is None:
                raise RuntimeError("a fake can vanish only inside rpcq.testing.running")
            lost.set()
            await asyncio.get_running_loop().create_future()  # until its worker is gone

        return self._tell(self._offered(method), vanish, after)

    def check(self) -> None:
        """That it can be served: it can, whatever it was told."""

    def under(self, lost: asyncio.Event) -> Service:
        """The same for one worker, which is to be cut off once `lost` is set."""

        @asynccontextmanager
        async def lifespan() -> AsyncIterator[asyncio.Event]:
            yield lost

        served = copy.copy(self)
        served.lifespan = lifespan
        return served

    def _tell(self, offered: Method, act: _Act, after: float) -> Self:
        if isinstance(after, bool) or not isinstance(after, int | float) or not 0 <= after < float("inf"):
            raise ConfigurationError(f"after is {after!r}; it is a number of seconds from 0")

        async def later(received: Received) -> Any:
            await asyncio.sleep(after)
            return await act(received)

        self.methods[offered.name] = offered
        self._next.setdefault(offered.name, deque()).append(later if after else act)
        return self

    def _offered(self, name: str) -> Method:
        """The method, as a worker takes it; only `_tell` has it served."""
        if name in self.methods:
            return self.methods[name]
        check_name("the method", name)
        if not METHOD_NAME.match(name):
            raise ConfigurationError(f"the method is called {name!r}; a method's name has no dot")
        if self._contract is not None and name not in self._contract:
            has = ", ".join(self._contract) or "none"
            raise ConfigurationError(f"the contract of {self.name!r} has no method {name!r}; it has {has}")
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
        return f"<FakeService {self.name!r}: {', '.join(self.methods) or 'nothing was told'}>"


def _take_types(handle: Callable[..., Any], function: Callable[..., Any], label: str) -> None:
    """Make a handler take the parameters of a contract's method, and return what it returns."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    context = inspect.Parameter("rpcq_context", inspect.Parameter.KEYWORD_ONLY)
    before = [it for it in parameters if it.kind is not it.VAR_KEYWORD]
    handle.__signature__ = inspect.Signature([*before, context, *parameters[len(before) :]])  # type: ignore[attr-defined]  # what `inspect.signature` reads
    handle.__annotations__ = {**type_hints(label, function), "rpcq_context": Context}


def _final(error: Exception) -> Exception:
    """What a handler raises, so that the caller gets it: a fresh one for each call."""
    if not isinstance(error, CallError):
        return error.with_traceback(None)
    return copy.copy(error)


@asynccontextmanager
async def _served(fake: FakeService, make: Callable[[Service], Worker]) -> AsyncIterator[None]:
    """Serve a fake: a worker that is to be lost is cut off, and the next one takes its place."""
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
            await workers[0].stop()  # not clean: what it holds is left to the broker
            del workers[0]

    keeper = asyncio.create_task(replace_lost(await begin()))
    try:
        yield
    finally:
        keeper.cancel()
        await asyncio.wait([keeper])
        for worker in workers:
            await worker.stop()
    if not keeper.cancelled():
        await keeper  # there was no next worker: the error says why
