"""How a caller that blocks names what it calls: as in `rpcq.calls.proxy`, but each call waits for its result."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import (
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    Unpack,
    cast,
    overload,
)

from rpcq.calls import proxy
from rpcq.calls.targets import Target
from rpcq.errors import ConfigurationError, UsageError
from rpcq.event_types import Event
from rpcq.once import GivenSession
from rpcq.options import CallKwargs, CallOptions, UntypedCallKwargs, UnwatchedCallKwargs
from rpcq.service import Context
from rpcq.watching import BlockingJob
from rpcq.wire.events import Publication
from rpcq.wire.jobs import Job
from rpcq.wire.topology import Topology

P = ParamSpec("P")
SessionT = TypeVar("SessionT", bound=GivenSession)
R = TypeVar("R")
T = TypeVar("T")


class Caller(Protocol):
    """What makes the calls, and waits for each: a client."""

    topology: Topology

    def invoke(self, target: Target, options: CallOptions, args: tuple[Any, ...], params: Mapping[str, Any]) -> Any:
        """One call, from its parameters to its result."""

    def send_jobs(
        self,
        job: str | Callable[..., Any],
        options: CallOptions,
        several: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]],
    ) -> list[Job]:
        """Send jobs of one name."""

    def publish_event(self, event: Event, options: CallOptions) -> Publication:
        """Publish an event."""


class RemoteMethod(proxy.RemoteMethod, Generic[R]):
    """A method of a service; calling it waits for the result."""

    __slots__ = ()

    def with_options(self, **options: Unpack[CallKwargs]) -> RemoteMethod[R]:
        """The same method, with other options; see `rpcq.CallOptions`."""
        changed = replace(self._options, **options)
        return RemoteMethod(self._caller, self._service, self._target.method.decode(), changed)

    def __call__(self, /, *args: Any, **params: Any) -> R:  # type: ignore[override]  # it waits
        """Call it; parameters all by name or all by position. See `CallMaker.call`."""
        return cast("R", self._caller.invoke(self._target, self._options, args, params))


class ServiceProxy(proxy.ServiceProxy, Generic[R]):
    """A service, with its methods as attributes: `calculator.add(x=1, y=2)`.

    If an attribute of this class has the name of a method, or the name begins with an underscore, use an item:
    `calculator["with_options"]`.
    """

    @overload
    def with_options(self, *, returns: type[T], **options: Unpack[UntypedCallKwargs]) -> ServiceProxy[T]: ...

    @overload
    def with_options(self, **options: Unpack[CallKwargs]) -> ServiceProxy[Any]: ...

    def with_options(self, **options: Any) -> ServiceProxy[Any]:
        """The same service, with other options; see `rpcq.CallOptions`."""
        return ServiceProxy(self._caller, self._service, replace(self._options, **options))

    def __getitem__(self, method: str) -> RemoteMethod[R]:
        return RemoteMethod(self._caller, self._service, method, self._options)

    def __getattr__(self, method: str) -> RemoteMethod[R]:
        return cast("RemoteMethod[R]", super().__getattr__(method))


class CallMaker(Generic[R]):
    """Makes calls with one set of options; see `Client.with_options`."""

    def __init__(self, caller: Caller, options: CallOptions) -> None:
        self._caller = caller
        self._options = options
        self._maker = proxy.CallMaker(cast("proxy.Caller", caller), options)
        self._methods: dict[Any, Callable[..., Any]] = {}

    @overload
    def with_options(self, *, watch: Literal[True], **options: Unpack[UnwatchedCallKwargs]) -> WatchingCallMaker: ...

    @overload
    def with_options(self, *, returns: type[T], **options: Unpack[UntypedCallKwargs]) -> CallMaker[T]: ...

    @overload
    def with_options(self, **options: Unpack[CallKwargs]) -> CallMaker[Any]: ...

    def with_options(self, **options: Any) -> CallMaker[Any]:
        """The same, with further options; see `rpcq.CallOptions`. Type checkers know the result from `returns=`."""
        changed = replace(self._options, **options)
        return (WatchingCallMaker if changed.watch else CallMaker)(self._caller, changed)

    @overload
    def call(self, target: str, /, *args: Any, **params: Any) -> R: ...

    @overload
    def call(
        self, target: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]], /, *args: P.args, **params: P.kwargs
    ) -> T: ...

    def call(self, target: Any, /, *args: Any, **params: Any) -> Any:
        """Call a method, and wait until the call has ended.

        Args:
            target: `service.method`; with `queue=` in the options, the name of the method is enough. Or a method of a
                contract, such as `OrdersApi.create`: type checkers then know its parameters and its result.
            args: parameters by position; a single number, string, boolean or None is sent as bare JSON.
            params: parameters by name, instead.

        Returns:
            The result: plain JSON types, or the type of `returns=` in the options or of the contract.

            If the thread is interrupted (Ctrl-C), the handler is cancelled.

        Raises:
            ServiceUnavailable: also if the client could not be opened until the deadline; it did not run.
            UsageError: an `async def` handler, or the event loop of a worker in memory, would wait for itself.
            Exception: what awaiting `rpcq.CallMaker.call` raises.

        """
        if isinstance(target, str):
            return self._maker.call(target, *args, **params)
        method = self._methods.get(target)
        if method is None:
            method = self._methods[target] = self._method(target)
        return method(*args, **params)

    def _method(self, function: Callable[..., Any]) -> Callable[..., Any]:
        api = getattr(function, "__rpcq_api__", None)
        if api is None:
            msg = f"target must be 'service.method', or a method of a class that has @contract; got {function!r}"
            raise ConfigurationError(msg)
        method: Callable[..., Any] = getattr(self.bind(api), function.__name__)
        return method

    def service(self, name: str) -> ServiceProxy[R]:
        """A proxy of a service; nothing is sent.

        Raises:
            ConfigurationError: the name is not valid.

        """
        self._maker.service(name)  # checks the name
        return ServiceProxy(cast("proxy.Caller", self._caller), name, self._options)

    def bind(self, api: Callable[..., T], service: str | None = None) -> T:
        """A proxy with the methods and jobs of a Protocol class: `client.bind(Orders).create(sku="tea")`.

        Its results have the types that the class says. Type checkers take the class as it is written: they know that a
        method waits only where it is a `def`, as in the classes of `rpcq.sync.contract`. For a contract whose methods
        are `async def`, because asynchronous callers use it too, they understand `call(OrdersApi.create, sku="tea")`.

        Args:
            api: a Protocol class whose methods describe the service's; results are validated as annotated.
            service: its name; that of the class's `contract` if None.

        Raises:
            ConfigurationError: no service is named, or the class has an attribute that is not a method.

        """
        return self._maker.bind_any(api, service)

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
        """Send a job: it returns when the broker has the job in a queue that survives the loss of a node.

        Of the options, `timeout`, `idempotency_key`, `metadata`, `delay`, `at`, `expires`, `priority` and `watch` are
        used; with `watch` also `returns`.

        Args:
            job: a function with `@service.job`, or a job of a bound contract, such as `client.bind(EmailsApi).welcome`:
                the parameters are checked before anything is sent. Or its name, `service.job`: only the worker checks
                them.
            args: parameters by position; with a name as the job, all are by position or all by name.
            params: parameters by name.

        Returns:
            The job's ID and key; with `watch=True` in the options an `rpcq.sync.WatchedJob`.

            If the thread is interrupted (Ctrl-C), the job may be queued all the same.

        Raises:
            SendError: also if the client could not be opened in time; then `queued` is "no".
            Exception: what awaiting `rpcq.CallMaker.send` raises.

        """
        (sent,) = self._caller.send_jobs(job, self._options, [(args, params)])
        return sent

    def send_many(self, job: str | Callable[..., Any], several: Iterable[Mapping[str, Any]], /) -> list[Job]:
        """Send several jobs of one name, and wait once for all of them.

        All parameters are checked before anything is sent.

        Args:
            job: as for `send`.
            several: the parameters of each job, by name.

        Returns:
            The jobs, in order.

        Raises:
            SendError: of the first job that failed; others may be queued.
            UsageError: there is an `idempotency_key` in the options, which can name only one job.
            InvalidParams: the parameters of a job are not a mapping, or do not fit. Nothing was sent.
            Exception: what else `send` raises.

        """
        if self._options.idempotency_key is not None:
            raise UsageError("send_many must have no idempotency_key: each job has a key of its own")
        return self._caller.send_jobs(job, self._options, [((), params) for params in several])

    def publish(self, event: Event, /) -> Publication:
        """Publish an event: it returns when the broker has it in the queue of every subscription that takes it.

        Of the options, `timeout`, `idempotency_key` and `metadata` are used.

        Args:
            event: an instance of a class of events.

        Returns:
            The event's ID and key, and whether anybody listens.

        Raises:
            SendError: also if the client could not be opened in time; then `queued` is "no".
            Exception: what awaiting `rpcq.CallMaker.publish` raises.

        """
        return self._caller.publish_event(event, self._options)


class WatchingCallMaker(CallMaker[Any]):
    """A `CallMaker` whose jobs are watched: `send` returns a `WatchedJob`, of whose result type checkers know the type.

    `with_options(watch=True)` makes it. It makes no calls.
    """

    def with_options(self, **options: Unpack[UnwatchedCallKwargs]) -> WatchingCallMaker:  # type: ignore[override]  # its jobs stay watched
        """The same, with further options; see `CallOptions`."""
        return cast("WatchingCallMaker", super().with_options(**options))

    @overload
    def send(
        self, job: Callable[Concatenate[Context, P], Coroutine[Any, Any, T]], /, *args: P.args, **params: P.kwargs
    ) -> BlockingJob[T]: ...

    @overload
    def send(
        self, job: Callable[Concatenate[Context, P], T], /, *args: P.args, **params: P.kwargs
    ) -> BlockingJob[T]: ...

    @overload
    def send(
        self, job: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **params: P.kwargs
    ) -> BlockingJob[T]: ...

    @overload
    def send(self, job: Callable[P, T], /, *args: P.args, **params: P.kwargs) -> BlockingJob[T]: ...

    @overload
    def send(
        self, job: Callable[Concatenate[SessionT, P], Any], /, *args: P.args, **params: P.kwargs
    ) -> BlockingJob[Any]: ...

    @overload
    def send(
        self, job: Callable[Concatenate[Context, SessionT, P], Any], /, *args: P.args, **params: P.kwargs
    ) -> BlockingJob[Any]: ...

    @overload
    def send(self, job: str, /, *args: Any, **params: Any) -> BlockingJob[Any]: ...

    def send(self, job: Any, /, *args: Any, **params: Any) -> Any:
        """Send a job; see `CallMaker.send`."""
        return super().send(job, *args, **params)

    @overload  # type: ignore[override]  # a list of watched jobs is no list of jobs to which others are added
    def send_many(
        self, job: Callable[..., Coroutine[Any, Any, T]], several: Iterable[Mapping[str, Any]], /
    ) -> list[BlockingJob[T]]: ...

    @overload
    def send_many(self, job: Callable[..., T], several: Iterable[Mapping[str, Any]], /) -> list[BlockingJob[T]]: ...

    @overload
    def send_many(self, job: str, several: Iterable[Mapping[str, Any]], /) -> list[BlockingJob[Any]]: ...

    def send_many(self, job: Any, several: Any, /) -> Any:
        """Send several jobs of one name; see `CallMaker.send_many`."""
        return super().send_many(job, several)
