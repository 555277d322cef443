"""How a caller names what it calls: by a string, by a proxy of a service, or by a contract."""

from __future__ import annotations

import copy
import functools
import inspect
import typing
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

from rpcq.calls.targets import Target, make_target
from rpcq.contracts import (
    Contract,
    RemoteCallable,
    RemoteJob,
    contract_of,
    methods_of,
    result_adapter,
)
from rpcq.errors import ConfigurationError, UsageError
from rpcq.event_types import Event
from rpcq.once import GivenSession
from rpcq.options import CallKwargs, CallOptions, UnwatchedCallKwargs, check_name
from rpcq.service import Context
from rpcq.validation.attributes import check_attributes
from rpcq.validation.listing import lists_options
from rpcq.validation.parameters import by_name, positional_names
from rpcq.validation.schemas import type_hints
from rpcq.watching import WatchedJob
from rpcq.wire.events import Publication
from rpcq.wire.jobs import Job
from rpcq.wire.topology import Topology

P = ParamSpec("P")
SessionT = TypeVar("SessionT", bound=GivenSession)
T = TypeVar("T")


class Caller(Protocol):
    """What makes the calls: a client."""

    topology: Topology

    def invoke(
        self, target: Target, options: CallOptions, args: tuple[Any, ...], params: Mapping[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """One call, from its parameters to its result."""

    def send_jobs(
        self,
        job: str | Callable[..., Any],
        options: CallOptions,
        several: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]],
    ) -> Coroutine[Any, Any, list[Job]]:
        """Send jobs of one name."""

    def publish_event(self, event: Event, options: CallOptions) -> Coroutine[Any, Any, Publication]:
        """Publish an event."""


class RemoteMethod(RemoteCallable):
    """A method of a service; calling it returns an awaitable."""

    __slots__ = ("_caller", "_options", "_service", "_target")

    def __init__(self, caller: Caller, service: str, method: str, options: CallOptions) -> None:
        self._caller = caller
        self._service = service
        self._target = make_target(caller.topology, service, method, options.queue)
        self._options = options

    def with_options(self, **options: Unpack[CallKwargs]) -> RemoteMethod:
        """The same method, with other options; see `CallOptions`."""
        return RemoteMethod(self._caller, self._service, self._target.method.decode(), _changed(self._options, options))

    def __call__(self, /, *args: Any, **params: Any) -> Coroutine[Any, Any, Any]:
        """Call it; parameters all by name or all by position. See `CallMaker.call`."""
        return self._caller.invoke(self._target, self._options, args, params)

    def __repr__(self) -> str:
        return f"<RemoteMethod {self._target.label}>"


class ServiceProxy:
    """A service, with its methods as attributes: `await calculator.add(x=1, y=2)`.

    If an attribute of this class has the name of a method, or the name begins with an underscore, use an item:
    `calculator["with_options"]`.
    """

    def __init__(self, caller: Caller, service: str, options: CallOptions) -> None:
        self._caller = caller
        self._service = service
        self._options = options

    @lists_options(CallOptions, changes=True)
    def with_options(self, **options: Unpack[CallKwargs]) -> ServiceProxy:
        """The same service, with other options; see `CallOptions`."""
        return ServiceProxy(self._caller, self._service, _changed(self._options, options))

    def __getitem__(self, method: str) -> RemoteMethod:
        return RemoteMethod(self._caller, self._service, method, self._options)

    def __getattr__(self, method: str) -> RemoteMethod:
        if method.startswith("_"):
            raise AttributeError(method)
        remote = self[method]
        self.__dict__[method] = remote  # found at once from now on
        return remote

    def __repr__(self) -> str:
        return f"<ServiceProxy {self._service!r}>"


class CallMaker:
    """Makes calls with one set of options; see `Client.with_options`."""

    _REMEMBERED = 1024  # targets called by name; programs call far fewer

    def __init__(self, caller: Caller, options: CallOptions) -> None:
        self._caller = caller
        self._options = options
        self._targets: dict[str, Target] = {}

    @overload
    def with_options(self, *, watch: Literal[True], **options: Unpack[UnwatchedCallKwargs]) -> WatchingCallMaker: ...

    @overload
    def with_options(self, **options: Unpack[CallKwargs]) -> CallMaker: ...

    @lists_options(CallOptions, changes=True)
    def with_options(self, **options: Any) -> CallMaker:
        """The same, with further options; see `CallOptions`."""
        changed = _changed(self._options, cast("CallKwargs", options))
        return (WatchingCallMaker if changed.watch else CallMaker)(self._caller, changed)

    def call(self, target: str, /, *args: Any, **params: Any) -> Coroutine[Any, Any, Any]:
        """Call a method by its name.

        Args:
            target: `service.method`; with `queue=` in the options, the name of the method is enough.
            args: parameters by position; a single number, string, boolean or None is sent as bare JSON.
            params: parameters by name, instead.

        Returns:
            An awaitable of the result: plain JSON types, or the type of `returns=` in the options.

            If the task that awaits it is cancelled, the handler is cancelled too.

        Raises:
            ConfigurationError: the name is not valid. Raised at once, not when awaited.
            NotSerializable: JSON cannot carry a parameter. Nothing was sent.
            TooLarge: parameters or headers are over the limit. Nothing was sent.
            InvalidParams: the worker refused the parameters; it did not run.
            MethodNotFound: the service has no such method.
            ServiceUnavailable: no worker serves it, or there was no connection until the deadline; it did not run.
            Overloaded: the request queue, the client or the broker is full; it did not run.
            CallTimeout: the deadline passed; `executed` says what is known.
            OutcomeUnknown: the connection or the worker was lost; it may have run.
            InvalidReply: it ran, and its result cannot be used.
            RemoteError: the handler raised.
            DomainError: the handler raised one of the errors declared in `errors=`.
            ClosedError: the client is not open.
            UsageError: the client belongs to another event loop or process.

        """
        found = self._targets.get(target)
        if found is None:
            service, _, method = target.rpartition(".")
            found = make_target(self._caller.topology, service or None, method, self._options.queue)
            if len(self._targets) < self._REMEMBERED:
                self._targets[target] = found
        return self._caller.invoke(found, self._options, args, params)

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

    async def send(self, job: str | Callable[..., Any], /, *args: Any, **params: Any) -> Job:
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
            The job's ID and key; with `watch=True` in the options a `WatchedJob`.

            If the task that awaits it is cancelled, the job may be queued all the same.

        Raises:
            SendError: the job is not queued, or may not be; `queued` says which, and the message what to do.
            ConfigurationError: the name is not valid.
            UsageError: it is not a job, such as a method; or the client belongs to another event loop or process.
            InvalidParams: the parameters do not fit the function or the contract. Nothing was sent.
            NotSerializable: JSON cannot carry a parameter. Nothing was sent.
            TooLarge: parameters or headers are over the limit. Nothing was sent.
            TypeError: there are too many parameters by position, or one is given twice. Nothing was sent.
            ClosedError: the client is not open.

        """
        (sent,) = await self._caller.send_jobs(job, self._options, [(args, params)])
        return sent

    async def send_many(self, job: str | Callable[..., Any], several: Iterable[Mapping[str, Any]], /) -> list[Job]:
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
        return await self._caller.send_jobs(job, self._options, [((), params) for params in several])

    async def publish(self, event: Event, /) -> Publication:
        """Publish an event: it returns when the broker has it in the queue of every subscription that takes it.

        Of the options, `timeout`, `idempotency_key` and `metadata` are used.

        Args:
            event: an instance of a class of events.

        Returns:
            The event's ID and key, and whether anybody listens.

            If the task that awaits it is cancelled, the event may be published all the same.

        Raises:
            SendError: it is not published, or may not be; `queued` says which, and the message what to do. If a queue
                refused it, others have it: publish it again under the same key.
            UsageError: it is not an event of a class with a name, or an option is for jobs only; or the client belongs
                to another event loop or process.
            InvalidParams: it was changed after it was made, and does not fit its class. Nothing was sent.
            NotSerializable: JSON cannot carry it. Nothing was sent.
            TooLarge: the event or the headers are over the limit. Nothing was sent.
            ClosedError: the client is not open.

        """
        return await self._caller.publish_event(event, self._options)

    def service(self, name: str) -> ServiceProxy:
        """A proxy of a service; nothing is sent.

        Raises:
            ConfigurationError: the name is not valid.

        """
        return ServiceProxy(self._caller, check_name("the name of a service", name), self._options)

    def bind(self, api: Callable[..., T], service: str | None = None) -> T:
        """A proxy with the type of a Protocol class: type checkers know its methods and its jobs.

        Its methods are called, `await emails.count()`. Its jobs are given to `send`, `await client.send(emails.welcome,
        to="ada@example.org")`, with the options of the client that sends them.

        Args:
            api: a class whose methods describe the service's, as `async def`; results are validated as annotated.
            service: its name; that of the class's `contract` if None.

        Raises:
            ConfigurationError: no service is named, the class has an attribute that is not an `async def`, or it is a
                contract of `rpcq.sync`, whose methods nobody awaits.

        """
        declared = contract_of(api, service)
        if declared.blocking:
            msg = (
                f"{api!r} is a contract of rpcq.sync: bind it with rpcq.sync.Client, or decorate it with rpcq.contract"
            )
            raise ConfigurationError(msg)
        return typing.cast("T", _Bound(self._caller, api, declared, self._options))

    def bind_any(self, api: Callable[..., T], service: str | None) -> T:
        """As `bind`, whether callers await the methods or not. `rpcq.sync` uses it."""
        declared = contract_of(api, service)
        return typing.cast("T", _Bound(self._caller, api, declared, self._options, is_awaited=False))


class WatchingCallMaker(CallMaker):
    """A `CallMaker` whose jobs are watched: `send` returns a `WatchedJob`, of whose result type checkers know the type.

    `with_options(watch=True)` makes it. It makes no calls.
    """

    def with_options(self, **options: Unpack[UnwatchedCallKwargs]) -> WatchingCallMaker:  # type: ignore[override]  # its jobs stay watched
        """The same, with further options; see `CallOptions`."""
        return cast("WatchingCallMaker", super().with_options(**options))

    @overload
    def send(
        self, job: Callable[Concatenate[Context, P], Coroutine[Any, Any, T]], /, *args: P.args, **params: P.kwargs
    ) -> Coroutine[Any, Any, WatchedJob[T]]: ...

    @overload
    def send(
        self, job: Callable[Concatenate[Context, P], T], /, *args: P.args, **params: P.kwargs
    ) -> Coroutine[Any, Any, WatchedJob[T]]: ...

    @overload
    def send(
        self, job: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **params: P.kwargs
    ) -> Coroutine[Any, Any, WatchedJob[T]]: ...

    @overload
    def send(self, job: Callable[P, T], /, *args: P.args, **params: P.kwargs) -> Coroutine[Any, Any, WatchedJob[T]]: ...

    @overload
    def send(
        self, job: Callable[Concatenate[SessionT, P], Any], /, *args: P.args, **params: P.kwargs
    ) -> Coroutine[Any, Any, WatchedJob[Any]]: ...

    @overload
    def send(
        self, job: Callable[Concatenate[Context, SessionT, P], Any], /, *args: P.args, **params: P.kwargs
    ) -> Coroutine[Any, Any, WatchedJob[Any]]: ...

    @overload
    def send(self, job: str, /, *args: Any, **params: Any) -> Coroutine[Any, Any, WatchedJob[Any]]: ...

    def send(self, job: Any, /, *args: Any, **params: Any) -> Any:
        """Send a job; see `CallMaker.send`."""
        return super().send(job, *args, **params)

    @overload  # type: ignore[override]  # a list of watched jobs is no list of jobs to which others are added
    def send_many(
        self, job: Callable[..., Coroutine[Any, Any, T]], several: Iterable[Mapping[str, Any]], /
    ) -> Coroutine[Any, Any, list[WatchedJob[T]]]: ...

    @overload
    def send_many(
        self, job: Callable[..., T], several: Iterable[Mapping[str, Any]], /
    ) -> Coroutine[Any, Any, list[WatchedJob[T]]]: ...

    @overload
    def send_many(
        self, job: str, several: Iterable[Mapping[str, Any]], /
    ) -> Coroutine[Any, Any, list[WatchedJob[Any]]]: ...

    def send_many(self, job: Any, several: Any, /) -> Any:
        """Send several jobs of one name; see `CallMaker.send_many`."""
        return super().send_many(job, several)


@lists_options(CallOptions, changes=True)
def with_options(bound: T, **options: Unpack[CallKwargs]) -> T:
    """What was bound, with other options, and of the same type: for one call, nothing has to be bound again.

        await with_options(stock, timeout=2.0).take("tea")
        await with_options(stock.take, timeout=2.0)("tea")

    Args:
        bound: what `bind` returned, one of its methods, a `ServiceProxy` or one of its methods.
        options: as in `CallOptions`. `errors` are added to those of the contract.

    Raises:
        ConfigurationError: it was not bound, or an option is not valid.
        UsageError: it is a job, whose options are those of the client that sends it.

    """
    if isinstance(bound, _Bound):
        return typing.cast("T", _Rebound(bound, options))
    if isinstance(bound, RemoteMethod | ServiceProxy | RemoteJob):
        return typing.cast("T", bound.with_options(**options))
    raise ConfigurationError(f"bound must be what a client has bound, or one of its methods; got {bound!r}")


def _changed(options: CallOptions, changes: CallKwargs) -> CallOptions:
    changed = replace(options, **changes)
    if "errors" in changes:
        check_attributes(changed.errors)
    return changed


class _Bound:
    """The methods and jobs of a Protocol class, as attributes."""

    def __init__(
        self,
        caller: Caller,
        api: Callable[..., Any],
        declared: Contract,
        options: CallOptions,
        *,
        is_awaited: bool = True,
    ) -> None:
        service = declared.service
        self._label = f"{getattr(api, '__name__', api)} of service {service!r}"
        for name, function in methods_of(api, is_awaited=is_awaited).items():
            if name in declared.jobs:
                setattr(self, name, RemoteJob(service, name, function))
                continue
            returns = type_hints(f"{service}.{name}", function).get("return", Any)
            own = replace(
                options,
                errors=(*options.errors, *declared.errors),
                idempotent=options.idempotent or name in declared.idempotent,
                returns=None if returns is Any else returns,
            )
            if own.returns is not None:
                result_adapter(f"{service}.{name}", own.returns)  # raises now if the type cannot be used
            setattr(self, name, _BoundMethod(caller, service, name, own, function))

    def __repr__(self) -> str:
        return f"<{self._label}>"


class _Rebound(_Bound):
    """The methods of a bound Protocol class, with other options; each is made when it is first used."""

    def __init__(self, bound: _Bound, options: CallKwargs) -> None:
        self._bound = bound
        self._given = options

    def __getattr__(self, name: str) -> RemoteMethod:
        if name.startswith("_"):
            raise AttributeError(name)
        method: RemoteMethod = getattr(self._bound, name).with_options(**self._given)
        self.__dict__[name] = method  # found at once from now on
        return method

    def __dir__(self) -> list[str]:
        return dir(self._bound)

    def __repr__(self) -> str:
        return repr(self._bound)


class _BoundMethod(RemoteMethod):
    """A method that knows the names of its parameters: those given by position are sent by name, if all have one."""

    __slots__ = ("__dict__", "_names")  # the function's name, docstring and signature

    def __init__(
        self, caller: Caller, service: str, method: str, options: CallOptions, function: Callable[..., Any]
    ) -> None:
        super().__init__(caller, service, method, options)
        functools.update_wrapper(self, function, updated=())
        del self.__dict__["__wrapped__"]  # it has a `self`
        signature = inspect.signature(function)
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        self._names = positional_names(self.__signature__)

    def with_options(self, **options: Unpack[CallKwargs]) -> RemoteMethod:
        """The same method, with other options; `errors` are added to those of the contract."""
        changed = _changed(self._options, options)
        if "errors" in options:
            changed = replace(changed, errors=(*changed.errors, *self._options.errors))
        made = copy.copy(self)  # its signature is known
        RemoteMethod.__init__(made, self._caller, self._service, self._target.method.decode(), changed)
        return made

    def __call__(self, /, *args: Any, **params: Any) -> Coroutine[Any, Any, Any]:
        if args:
            return self._caller.invoke(
                self._target, self._options, *by_name(self._target.label, self._names, args, params)
            )
        return self._caller.invoke(self._target, self._options, args, params)
