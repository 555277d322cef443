"""Fakes: services with scripted behaviour, for tests of code that calls them, sends them jobs or publishes events."""

from __future__ import annotations

import asyncio
import copy
import inspect
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any, Final, Literal, Self, TypeVar, overload

from rpcq.contracts import METHOD_NAME, contract_of, methods_of
from rpcq.errors import CallError, ConfigurationError, DomainError, InvalidReply, ServiceUnavailable
from rpcq.event_types import AnyEvent, Event, pattern_of
from rpcq.invocation import Refused
from rpcq.options import JobOptions, check_name
from rpcq.service import Context, Method, Service, Subscriber
from rpcq.validation.schemas import type_hints
from rpcq.worker import Worker

E = TypeVar("E", bound=Event)

HEARS: Final = "hears"
"""The name of the subscription of a fake."""

FAKES_GRACE: Final = 0.05
"""Seconds that a fake's handlers have to end when its worker stops or is lost: long enough to send their replies."""


@dataclass(frozen=True, slots=True)
class Received:
    """A call or a job that a fake service got.

    Attributes:
        method: name of the method, or of the job.
        args: parameters by position.
        params: parameters by name; in a fake of a contract, they have the types of the contract.
        context: everything else: `metadata`, `attempt`, `deadline`, `caller`, `idempotency_key`, ...

    """

    method: str
    args: tuple[Any, ...]
    params: Mapping[str, Any]
    context: Context


@dataclass(frozen=True, slots=True)
class HeardEvent:
    """An event that a fake service got.

    Attributes:
        event: an instance of the class that `hears` was given for it, or an `AnyEvent` if it came by a pattern.
        context: everything else: `correlation_id`, which is its ID, `idempotency_key`, `metadata`, `attempt`, ...

    """

    event: Event | AnyEvent
    context: Context


_Act = Callable[[Received], Awaitable[Any]]
"""A behaviour: what a fake does with a call."""


class FakeService(Service):
    """A service with scripted behaviour, for tests of code that calls it.

        stock = FakeService("stock").fails("take", OutOfStock("no bolts")).answers("take", 3)

    `answers`, `fails` and `vanishes` add a behaviour to a method. Each call of the method uses the next behaviour, and
    the last one is used again and again. Behaviours may be added while the fake is served. A call of a method without a
    behaviour ends with `MethodNotFound`.

    `takes` names jobs: each job of such a name is done at once, and is in `received`. `hears` subscribes to events:
    each such event is done at once, and `heard` returns it.

    In `running`, a real worker of its own serves it, and callers get what they get in production: domain errors arrive
    as themselves if the caller declares them, a fake that is too slow makes the call time out, and so on.

    Args:
        name: name of the service.
        queue_type: "classic" or "quorum", as for the real service.
        lanes: whether its jobs may have a priority, as for the real service.
        ordered: whether its jobs may have an order key, as for the real service.

    Attributes:
        calls: the calls that it got, in order, with each attempt; also those that failed or whose worker vanished.
        received: the jobs that it got, in order.

    Raises:
        ConfigurationError: an argument is not valid; the message names it.

    """

    def __init__(
        self,
        name: str,
        *,
        queue_type: Literal["classic", "quorum"] = "classic",
        lanes: bool = False,
        ordered: bool = False,
    ) -> None:
        super().__init__(name, queue_type=queue_type, lanes=lanes, ordered=ordered)
        self.calls: list[Received] = []
        self.received: list[Received] = []
        self._results: dict[str, Any] = {}
        self._contract: dict[str, Callable[..., Any]] | None = None
        self._idempotent: frozenset[str] = frozenset()
        self._next: dict[str, deque[_Act]] = {}
        self._current: dict[str, _Act] = {}
        self._topics: tuple[type[Event] | str, ...] = ()
        self._heard: list[HeardEvent] = []

    @classmethod
    def of(
        cls,
        api: Any,
        service: str | None = None,
        *,
        queue_type: Literal["classic", "quorum"] = "classic",
        lanes: bool = False,
        ordered: bool = False,
    ) -> FakeService:
        """Make a fake of the service that a Protocol class describes; the fake must keep to that contract.

        Only methods of the class can have a behaviour; the jobs of the class are taken without `takes`. Parameters are
        validated against the class (`InvalidParams`), and so are results. A second attempt at a call is refused unless
        the contract declares the method idempotent.

        Args:
            api: the class, as for `Client.bind`.
            service: name of the service; if None, the name in the class's `contract`.
            queue_type: "classic" or "quorum", as for the real service.
            lanes: whether its jobs may have a priority, as for the real service.
            ordered: whether its jobs may have an order key, as for the real service.

        Raises:
            ConfigurationError: no service is named, or the class has an attribute that is not an `async def`.

        """
        declared = contract_of(api, service)
        fake = cls(declared.service, queue_type=queue_type, lanes=lanes, ordered=ordered)
        functions = methods_of(api, is_awaited=not declared.blocking)
        fake._contract = {name: it for name, it in functions.items() if name not in declared.jobs}
        fake._idempotent = declared.idempotent
        for name, function in functions.items():
            if name in declared.jobs:
                fake.job(name=name)(fake._job_handler(name, function))
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

    def takes(self, *jobs: str) -> Self:
        """Take jobs of these names. A job is done at once, whatever its parameters are, and is in `received`.

        In `world`, all jobs that were
        sent are in `received` after `await w.settled()`.

        A sender that watches a job (`watch=True`) gets what `returns` says, or None.

        Args:
            jobs: names of jobs, without the service's. Call `takes` before the fake is served, because its worker
                declares the queue for jobs when it starts.

        Raises:
            ConfigurationError: a name is not valid, or is that of a job or method that it already has; or this is a
                fake of a contract, which takes the jobs of the contract, and no others.

        """
        if self._contract is not None:
            has = ", ".join(sorted(self.jobs)) or "none"
            msg = (
                f"takes must not be called for a fake of a contract, which takes its jobs by itself: {has}; got {jobs}"
            )
            raise ConfigurationError(msg)
        for name in jobs:
            self.job(name=name)(self._job_handler(name, None))
        return self

    def returns(self, job: str, value: Any) -> Self:
        """Set the result of a job, for senders that watch it (`watch=True`); without it, the result is None.

        Args:
            job: name of the job, without the service's; one that `takes` has named, or of the contract.
            value: the result of each job of this name from now on.

        Raises:
            ConfigurationError: the fake takes no such job; or JSON cannot carry the value, or the value does not have
                the type that the contract gives the result.

        """
        if job not in self.jobs:
            has = ", ".join(sorted(self.jobs)) or "none"
            raise ConfigurationError(f"job must be one that the fake takes; it has {has}; got {job!r}")
        try:
            self.jobs[job].write_result(value, sys.maxsize)
        except InvalidReply as error:
            msg = f"value must be a result that the job can return; got {value!r}: {error.message}"
            raise ConfigurationError(msg) from error
        self._results[job] = value
        return self

    def hears(self, *topics: type[Event] | str) -> Self:
        """Subscribe to events. An event is done at once, and `heard` returns it.

            shipping = FakeService("shipping").hears(OrderCreated, "invoice.*")

        What is called several times is one subscription, `hears`, so each event comes once. An event that does not fit
        its class is a dead letter of this subscription, as it is of the real one. In `world`, all events that were
        published are there after `await w.settled()`.

        Args:
            topics: classes of events, and patterns of their names, as for `Service.on`; `"#"` takes all events. Call
                `hears` before the fake is served, because its worker declares the subscription's queue when it starts.

        Raises:
            ConfigurationError: no topic is given, or one is no class of events with a name and no pattern; two classes
                have one name and version; or the fake has a method or a job that is called `hears`.

        """
        if not topics:
            raise ConfigurationError("hears must be given events, as in hears(OrderCreated) or hears('order.*')")
        for topic in topics:
            pattern_of(topic, "hears")
        asked = tuple(dict.fromkeys((*self._topics, *topics)))
        kinds: list[type[Event | AnyEvent]] = [it for it in asked if not isinstance(it, str)]
        if len(kinds) < len(asked):
            kinds.append(AnyEvent)

        async def hear(event: Any, rpcq_context: Context) -> None:
            self._heard.append(HeardEvent(event, replace(rpcq_context, state=None, _report=None)))

        hear.__annotations__["event"] = reduce(or_, kinds)
        if HEARS not in self.subscriptions:
            self._check_new("subscription", HEARS)
        self.subscriptions[HEARS] = Subscriber(self.name, HEARS, hear, asked, job=JobOptions(), each_instance=False)
        self._topics = asked
        return self

    @overload
    def heard(self, kind: None = None) -> list[HeardEvent]: ...

    @overload
    def heard(self, kind: type[E]) -> list[E]: ...

    def heard(self, kind: type[E] | None = None) -> list[HeardEvent] | list[E]:
        """The events that the fake got, in the order in which they came.

            assert shipping.heard(OrderCreated) == [OrderCreated(order_id="7")]

        Args:
            kind: a class of events, for its instances, also those of its name and version that came by a pattern; None
                for all events, with the `Context` of each.

        Raises:
            InvalidParams: an event that came by a pattern has the name and the version of the class, and does not fit
                it.

        """
        if kind is None:
            return [*self._heard]
        wanted = kind.event_name, kind.event_version
        found: list[E] = []
        for it in self._heard:
            if isinstance(it.event, kind):
                found.append(it.event)
            elif isinstance(it.event, AnyEvent) and (it.event.name, it.event.version) == wanted:
                found.append(it.event.read(kind))
        return found

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

    def _job_handler(self, name: str, function: Callable[..., Any] | None) -> Callable[..., Any]:
        """What a worker runs for a job; `function` is that of the contract."""

        async def handle(*args: Any, rpcq_context: Context, **params: Any) -> Any:
            self.received.append(Received(name, args, params, replace(rpcq_context, state=None, _report=None)))
            return self._results.get(name)

        if function is not None:
            _take_types(handle, function, f"{self.name}.{name}")
        return handle

    def __repr__(self) -> str:
        names = ", ".join((*self.methods, *self.jobs, *self.subscriptions))
        return f"<FakeService {self.name!r}: {names or 'no methods'}>"


def _take_types(handle: Callable[..., Any], function: Callable[..., Any], label: str) -> None:
    """Give a handler the signature and the types of a contract's method or job."""
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
async def served(fake: FakeService, make: Callable[[Service], Worker]) -> AsyncIterator[None]:
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
