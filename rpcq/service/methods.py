"""The functions that a service offers as methods, jobs and subscriptions, and what these can know of a message."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from types import FunctionType
from typing import Any, Final, Generic, cast

import pydantic
from typing_extensions import TypeVar

from rpcq.contracts import Parameters, result_adapter
from rpcq.errors import ConfigurationError, DomainError, InvalidReply
from rpcq.event_types import Topics
from rpcq.options import Batch, JobOptions, check_amount, size_of
from rpcq.runtime.deadline import Deadline
from rpcq.validation.attributes import check_attributes
from rpcq.validation.batches import signature_of_one
from rpcq.validation.schemas import type_hints
from rpcq.wire import bodies
from rpcq.wire.values import NotCarried

State_co = TypeVar("State_co", default=Any, covariant=True)

Place = tuple[int, str]
"""The position and the name of a parameter."""

Report = Callable[[float, float | None, str | None], None]
"""Takes how much is done, how much there is to do, and a note; may be called in any thread."""

MAX_NOTE: Final = 1000
"""Bytes of a note on the progress of a job."""


@dataclass(frozen=True, slots=True)
class Context(Generic[State_co]):
    """What a handler can know of its request. It gets this in a parameter that is annotated `Context`.

    `Context[StockApi]` says of which type `state` is, to type checkers alone; `Context` is `Context[Any]`.

    Attributes:
        service: the service's name.
        method: the name of the method, of the job or of the subscription.
        correlation_id: the call's correlation ID, empty if the caller wants no reply; the ID of a job or an event.
        deadline: when the call ends; calls that the handler makes inherit it.
        attempt: 1 + the number of earlier attempts that may have run.
        idempotency_key: the call's key, the same for all its attempts; or None.
        caller: the name that the client gives itself, which is not checked; or None.
        user: the client's user at the broker, checked by the broker; None if the client does not send it (see its
            option `identify`).
        metadata: the caller's own headers, whose names begin with `x-`.
        state: what the service's `lifespan` yielded, or None.
        due: when a job was to be done: the tick of its schedule, or the end of its delay, in UTC; None for at once.
        order_key: the order key of a job; None for none.
        is_last_attempt: whether no further attempt follows if this attempt of a job or an event fails. If its worker is
            lost, or stops, the attempt may come again under the same number. Always False in a call, whose caller
            alone knows whether it makes another attempt.

    """

    service: str
    method: str
    correlation_id: str
    deadline: Deadline
    attempt: int = 1
    idempotency_key: str | None = None
    caller: str | None = None
    user: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    state: State_co = cast("State_co", None)  # noqa: RUF009 - None
    due: datetime | None = None
    order_key: str | None = None
    is_last_attempt: bool = False
    _report: Report | None = field(default=None, repr=False, compare=False)

    def progress(self, done: float, total: float | None = None, note: str | None = None) -> None:
        """Say how far the job is, to a sender that watches it (`with_options(watch=True)`).

        It may be called as often as you like, from `def` and `async def` handlers and from other threads: the sender is
        told at most ten times a second, always of the newest, and of the last one before the result. In a job that
        nobody watches, and in a call, it checks its arguments and does nothing.

        Args:
            done: how much is done, a number of at least 0, in a unit of your choice.
            total: how much there is to do, in the same unit; None if that is not known. It may change.
            note: what people are to know besides, at most 1000 bytes; None for nothing.

        Raises:
            ConfigurationError: an argument is not valid.

        """
        check_amount("done", done)
        if total is not None:
            check_amount("total", total)
        if note is not None and not 0 <= size_of(note) <= MAX_NOTE:
            raise ConfigurationError(f"note must be a string of at most {MAX_NOTE} bytes; got {note!r:.100}")
        if self._report is not None:
            self._report(done, total, note)


Authorize = Callable[[Context], Awaitable[str | None]]


class Offered:
    """One function that a service offers: a method, a job, or a subscription.

    Attributes:
        service: the service's name.
        label: both names, as "service.name".
        name: its name within the service.
        handler: the Python function.
        is_async: whether it is an `async def`; a `def` runs in a thread.
        timeout: the most seconds that it may run; None for the caller's deadline alone.
        job: how it is run if it is a job or a subscription; None for a method that is called.
        batch: how calls are gathered for a handler that takes lists; None for a handler that takes one call.
        context_parameter: the position and the name of the parameter that takes a `Context`, or None; a keyword-only
            parameter has the position `sys.maxsize`.
        once_parameter: the same of the parameter that takes what the option `once` of the job gives.
        signature: without these parameters, and with resolved annotations.

    Raises:
        ConfigurationError: an annotation cannot be resolved, it is a generator, or it takes its `Context` in a way
            that cannot be.

    """

    batch: Batch | None = None

    def __init__(
        self, service: str, name: str, handler: Callable[..., Any], *, timeout: float | None, job: JobOptions | None
    ) -> None:
        self.service = service
        self.label = f"{service}.{name}"
        self.name = name
        self.handler = handler
        function = function_of(handler)
        self.is_async = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(function)
        self.timeout = timeout
        self.job = job
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigurationError(f"{self.label} must return one value; got a generator")
        hints = type_hints(self.label, function)
        once = None if job is None else job.once
        self.context_parameter, self.once_parameter, signature = _without_given(
            self.label,
            handler,
            hints,
            None if once is None else partial(once.gives, self.label, is_async=self.is_async),
        )
        if once is not None and self.once_parameter is None:
            raise ConfigurationError(f"{self.label} {once.missing(is_async=self.is_async)}")
        self.signature = signature.replace(return_annotation=hints.get("return", Any))

    def call(self, args: tuple[Any, ...], params: dict[str, Any], context: Callable[[], Context]) -> Any:
        """Call the handler; an `async def` returns a coroutine.

        `context` is called only if the handler takes a `Context`.
        """
        if self.context_parameter is not None:
            at, name = self.context_parameter
            if len(args) > at:  # by position: insert the context at its parameter's position
                args = (*args[:at], context(), *args[at:])
            else:
                params[name] = context()
        return self.handler(*args, **params)

    def call_once(
        self, args: tuple[Any, ...], params: dict[str, Any], context: Callable[[], Context], given: Any
    ) -> Any:
        """The same for a job with `once`; `given` is what that gives."""
        assert self.once_parameter is not None  # noqa: S101 - `once` has one
        places: list[tuple[int, str, Any]] = [(*self.once_parameter, given)]
        if self.context_parameter is not None:
            places.append((*self.context_parameter, context()))
        for at, name, value in sorted(places, key=lambda place: place[0]):
            if len(args) > at:
                args = (*args[:at], value, *args[at:])
            else:
                params[name] = value
        return self.handler(*args, **params)


class Subscriber(Offered):
    """A subscription: a function that takes events.

    Attributes:
        topics: the events that it takes.

    Raises:
        ConfigurationError: as for `Offered`; or it does not take the event in one parameter, or not these events.

    """

    def __init__(
        self,
        service: str,
        name: str,
        handler: Callable[..., Any],
        topics: Sequence[Any],
        *,
        job: JobOptions,
        each_instance: bool,
    ) -> None:
        super().__init__(service, name, handler, timeout=job.timeout, job=job)
        parameters = [*self.signature.parameters.values()]
        kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        if len(parameters) != 1 or parameters[0].kind in kinds:
            raise ConfigurationError(
                f"{self.label} must take the event in one parameter, and may take a Context beside it; got "
                f"{self.signature}: write async def {name}(event: OrderCreated)"
            )
        (parameter,) = parameters
        self._by_name = parameter.name if parameter.kind is parameter.KEYWORD_ONLY else None
        self.topics = Topics(self.label, topics, parameter.annotation, each_instance=each_instance)

    def arguments(self, event: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the handler for an event, without its `Context`."""
        return ((event,), {}) if self._by_name is None else ((), {self._by_name: event})


class Method(Offered):
    """A method or a job, with the types that it takes and returns.

    Attributes:
        idempotent: whether running it twice does no harm.
        errors: the domain errors that are sent to callers.
        allow: the broker's users that may call it; None for all users.
        lanes: whether its service has lanes for the priorities of jobs.
        parameters: reads its parameters.

    """

    def __init__(  # noqa: PLR0913 - all that a method is defined with
        self,
        service: str,
        name: str,
        handler: Callable[..., Any],
        *,
        idempotent: bool,
        errors: tuple[type[DomainError], ...],
        timeout: float | None,
        allow: frozenset[str] | None,
        job: JobOptions | None = None,
        batch: Batch | None = None,
    ) -> None:
        check_attributes(errors)
        super().__init__(service, name, handler, timeout=timeout, job=job)
        self.idempotent = idempotent
        self.errors = errors
        self.allow = allow
        self.batch = batch
        self.lanes = self.ordered = False
        if batch is not None:
            self._check_contexts()
            self.signature = signature_of_one(self.label, self.signature)
        self.parameters = Parameters(self.label, self.signature.replace(return_annotation=inspect.Signature.empty))
        returns = self.signature.return_annotation
        self._result = None if returns is Any else result_adapter(self.label, returns, written=True)

    def _check_contexts(self) -> None:
        if self.context_parameter is None:
            return
        name = self.context_parameter[1]
        hint = type_hints(self.label, function_of(self.handler))[name]
        if typing.get_origin(hint) is not list:
            msg = f"the parameter {name!r} of {self.label} must be a list[Context], because the method has a batch"
            raise ConfigurationError(f"{msg}; got {inspect.formatannotation(hint)}")

    def call_batch(
        self, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], contexts: Sequence[Callable[[], Context]]
    ) -> Any:
        """Call the handler of a batch once; an `async def` returns a coroutine.

        Args:
            calls: the arguments of each call, by position and by name.
            contexts: make the `Context` of each call; called only if the handler takes them.

        """
        names = [*self.signature.parameters]
        given = [dict(zip(names, args, strict=False)) | params if args else params for args, params in calls]
        lists = {name: [each[name] for each in given] for name in names}
        if self.context_parameter is not None:
            lists[self.context_parameter[1]] = [context() for context in contexts]
        return self.handler(**lists)

    def write_result(self, value: Any, max_body: int) -> bytes:
        """Write what the handler returned as JSON.

        Raises:
            InvalidReply: it does not fit the annotation, JSON cannot carry it, or it is over `max_body` bytes. The
                message does not contain the value.

        """
        try:
            body = bodies.dumps(value) if self._result is None else self._result.write(value)
        except pydantic.ValidationError as error:
            msg = f"{self.label} returned a {type(value).__name__}, which does not fit its annotation"
            raise InvalidReply(msg) from error
        except NotCarried as error:
            msg = f"{self.label} returned a {type(value).__name__} that JSON cannot carry: {error}"
            raise InvalidReply(msg) from error
        except Exception as error:
            msg = f"{self.label} returned a {type(value).__name__} that JSON cannot carry"
            raise InvalidReply(msg) from error
        if len(body) > max_body:
            msg = f"{self.label} returned {len(body)} bytes of JSON; the limit is {max_body} (max_body)"
            raise InvalidReply(msg)
        return body

    def read_result(self, body: bytes) -> Any:
        """Read what the handler returned from JSON.

        Raises:
            ValidationError, NotRead, InvalidReply, ValueError: it does not fit the annotation, or is not JSON.

        """
        return bodies.loads(body) if self._result is None else self._result.read(body)


def jobs_of(function: Any) -> tuple[Method, ...]:
    """The jobs that a function is the handler of, of all services."""
    found: tuple[Method, ...] = getattr(marked(function), "__rpcq_jobs__", ())
    return found


def marked(handler: Callable[..., Any]) -> Any:
    """The function on which the jobs of a handler are noted; see `jobs_of`."""
    if type(handler) is FunctionType:  # nearly all are; `send` asks each time
        return handler
    function = function_of(handler)
    return getattr(function, "__func__", function)  # a bound method is made anew each time


def function_of(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The function that a handler runs: the function of a partial, the `__call__` of an object, or the handler."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    return handler if inspect.isroutine(handler) or not callable(handler) else handler.__call__  # type: ignore[operator]


def _without_given(
    label: str,
    handler: Callable[..., Any],
    hints: Mapping[str, Any],
    is_given: Callable[[Any], bool] | None,
) -> tuple[Place | None, Place | None, inspect.Signature]:
    """The signature that senders see, with resolved annotations, and the parameters that it leaves out.

    These are the parameter of the context, and that of which `is_given` says so.
    """
    found: dict[str, Place] = {}
    parameters = []
    bound = handler.keywords if isinstance(handler, functools.partial) else ()
    try:
        given = inspect.signature(handler).parameters.values()
    except ValueError as error:  # some builtins
        raise ConfigurationError(f"{label} has no signature that can be read: {error}") from error
    for at, parameter in enumerate(given):
        hint = hints.get(parameter.name, Any)
        if parameter.name in bound:
            continue  # the partial gives it, not the caller
        kinds = (hint, *typing.get_args(hint))
        if any(it is Context or typing.get_origin(it) is Context for it in kinds):
            what = "Context"
        elif is_given is not None and any(is_given(it) for it in kinds):
            what = "session"
        else:
            parameters.append(parameter.replace(annotation=hint))
            continue
        by_position = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if what in found or not (by_position or parameter.kind is parameter.KEYWORD_ONLY):
            msg = f"{label} must take its {what} in one parameter that can be given by name"
            raise ConfigurationError(msg)
        found[what] = at if by_position else sys.maxsize, parameter.name
    return found.get("Context"), found.get("session"), inspect.Signature(parameters)
