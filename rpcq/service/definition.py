"""A service: what it is defined with, and the functions that it offers."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from typing import Any, Final, Literal, TypeVar, overload

from rpcq.contracts import METHOD_NAME, Obligation
from rpcq.errors import ConfigurationError, DomainError
from rpcq.event_types import Event, pattern_of
from rpcq.once import Once
from rpcq.options import JOB_RETRY, Batch, CallOptions, JobOptions, Retry, check_errors, check_name
from rpcq.results import ResultStore
from rpcq.schedules import Schedule
from rpcq.service.methods import Authorize, Method, Subscriber, function_of, jobs_of, marked
from rpcq.validation.definitions import check_allow, check_handler, check_lifespan, check_types
from rpcq.wire.events import NOT_A_SUBSCRIPTION

Handler = TypeVar("Handler", bound=Callable[..., Any])
BatchHandler = TypeVar("BatchHandler", bound=Callable[..., Awaitable[Sequence[Any]] | Sequence[Any]])
Lifespan = Callable[[], AbstractAsyncContextManager[Any]]

EVERY_METHOD: Final = "*"
"""In `allow`, all methods that it does not name. No method can have this name."""


class Service:
    """A named set of methods behind one request queue.

    Args:
        name: 1 to 100 of the characters `A-Za-z0-9_.-`; None for the name in the contract of `api`.
        api: the Protocol class that callers bind. The service takes its name, its errors and which methods are
            idempotent from the class's `contract`, and must offer its methods, and no others, and its jobs: each must
            take what the class says, and return it. None for a service without a contract.
        queue_type: "classic" is fast; "quorum" survives the loss of a node, and the broker itself delivers a request
            at most once.
        queue: the request queue's name, for clients that are not rpcq's; None for rpcq's own name.
        declare_queue: False to serve `queue` as it is: it must exist, and is neither declared nor bound. Then
            `queue_type` says what type it has, callers have to name the queue (`with_options(queue=...)`), and an
            expiry is silent; see docs/wire.md.
        timeout: seconds that a call may take if its caller gives no deadline.
        default_method: the method that a request without a `type` calls; not needed if there is only one method.
        default_types: values of `type` that stand for the default method, for clients that send a fixed one, such as
            `("call",)` for aio-pika's JsonRPC. Any other `type` that is no method's name is refused.
        errors: domain errors that every method may raise.
        lifespan: returns an async context manager, which is entered before the first call and left after the last
            one. What it yields is `Context.state`.
        result_store: where workers share stored results, by idempotency key; None keeps them in each worker's memory.
        allow: maps methods to the broker's users that may call them, such as `{"refund": ["billing"]}`; "*" stands for
            all methods that are not named. A method without an entry may be called by all users. Clients need
            `identify=True`.
        authorize: an `async def` that is called with the `Context` of each request, before its handler runs or a
            stored result is replayed. It raises `PermissionDenied` to refuse the call. It may return a string, such as
            a tenant: callers with different strings never share an idempotency key. None stands for the broker's user.
        batching: whether workers send several replies to one client in one message, if the client reads that. What a
            call returns or raises does not depend on it.
        lanes: whether jobs may have a priority: those of high and of low priority then have a queue each, which workers
            consume besides the one for all others. True must remain while such jobs wait.
        ordered: whether jobs may have an order key: they then go through 16 further queues, which workers consume
            besides the others, each by one worker at a time. True must remain while such jobs wait.

    Raises:
        ConfigurationError: an argument is not valid; the message names it.

    """

    def __init__(  # noqa: PLR0913 - all options of a service
        self,
        name: str | None = None,
        *,
        api: type[Any] | None = None,
        queue_type: Literal["classic", "quorum"] = "classic",
        queue: str | None = None,
        declare_queue: bool = True,
        timeout: float = 30.0,
        default_method: str | None = None,
        default_types: Iterable[str] = (),
        errors: Iterable[type[DomainError]] = (),
        lifespan: Lifespan | None = None,
        result_store: ResultStore | None = None,
        allow: Mapping[str, Iterable[str]] | None = None,
        authorize: Authorize | None = None,
        lanes: bool = False,
        ordered: bool = False,
        batching: bool = True,
    ) -> None:
        self._obligation = obligation = None if api is None else Obligation(api, name)
        if obligation is not None:
            name = obligation.contract.service
        self.name = name = check_name("the name of a service", name)
        if queue_type not in ("classic", "quorum"):
            raise ConfigurationError(
                f"queue_type of service {name!r} must be 'classic' or 'quorum'; got {queue_type!r}"
            )
        options = CallOptions(timeout=timeout, queue=queue)
        self.queue_type: Literal["classic", "quorum"] = queue_type
        self.queue = queue
        self.declare_queue = declare_queue
        if not declare_queue and queue is None:
            raise ConfigurationError(f"queue of service {name!r} must be a name with declare_queue=False; got None")
        self.timeout = options.timeout
        self.default_method = default_method
        self.default_types = check_types(name, default_types)
        self.errors = check_errors(errors)
        if obligation is not None:
            obligation.check_errors(f"service {name!r}", self.errors)
            self.errors = obligation.contract.errors
        check_lifespan(name, lifespan)
        self.lifespan = lifespan
        self.result_store = result_store
        self.allow = check_allow(name, {} if allow is None else allow)
        if authorize is not None and not inspect.iscoroutinefunction(function_of(authorize)):
            raise ConfigurationError(f"authorize of service {name!r} must be an async def or None; got {authorize!r}")
        self.authorize = authorize
        if not isinstance(lanes, bool):
            raise ConfigurationError(f"lanes of service {name!r} must be True or False; got {lanes!r}")
        self.lanes = lanes
        if not isinstance(ordered, bool):
            raise ConfigurationError(f"ordered of service {name!r} must be True or False; got {ordered!r}")
        self.ordered = ordered
        if not isinstance(batching, bool):
            raise ConfigurationError(f"batching of service {name!r} must be True or False; got {batching!r}")
        self.batching = batching
        self.methods: dict[str, Method] = {}
        self.jobs: dict[str, Method] = {}
        self.subscriptions: dict[str, Subscriber] = {}

    @overload
    def method(self, handler: Handler, /) -> Handler: ...

    @overload
    def method(
        self,
        handler: None = None,
        /,
        *,
        name: str | None = None,
        idempotent: bool = False,
        errors: Sequence[type[DomainError]] = (),
        timeout: float | None = None,
        batch: None = None,
    ) -> Callable[[Handler], Handler]: ...

    @overload
    def method(
        self,
        handler: None = None,
        /,
        *,
        name: str | None = None,
        idempotent: bool = False,
        errors: Sequence[type[DomainError]] = (),
        timeout: float | None = None,
        batch: Batch,
    ) -> Callable[[BatchHandler], BatchHandler]: ...

    def method(
        self,
        handler: Any = None,
        /,
        *,
        name: str | None = None,
        idempotent: bool = False,
        errors: Sequence[type[DomainError]] = (),
        timeout: float | None = None,
        batch: Batch | None = None,
    ) -> Any:
        """Offer a function as a method. The function itself is not changed.

        Args:
            handler: an `async def`, or a `def`, which runs in a thread.
            name: the name under which callers call it; None for the function's own name.
            idempotent: running it twice does no harm, so it may run again after an attempt that may have run. A service
                with an `api` takes this from there.
            errors: domain errors that are sent to callers, besides the service's.
            timeout: the most seconds that it may run, even if the caller's deadline is later.
            batch: how calls are gathered for a handler that takes a list for each parameter, with the values of all
                calls, and returns a list with their results, in the same order. An exception in that list is the error
                of its call alone. Callers, and a contract, have the signature of one call. None for a handler that
                takes one call at a time.

        Raises:
            ConfigurationError: the service already has a method of that name, pydantic cannot handle an annotation, the
                method does not fit the service's contract, or it has a `batch` and does not take and return lists.

        """
        if batch is not None and not isinstance(batch, Batch):
            raise ConfigurationError(f"batch must be a Batch(...) or None; got {batch!r}")

        def add(handler: Handler) -> Handler:
            check_handler(self.name, handler, "method")
            called = self._check_new("method", name or str(getattr(handler, "__name__", "")))
            if timeout is not None:
                CallOptions(timeout=timeout)
            own = check_errors(errors)
            obligation = self._obligation
            method = Method(
                self.name,
                called,
                handler,
                idempotent=idempotent or (obligation is not None and called in obligation.contract.idempotent),
                errors=(*self.errors, *own),
                timeout=timeout,
                allow=self.allow.get(called, self.allow.get(EVERY_METHOD)),
                batch=batch,
            )
            if obligation is not None:
                obligation.check_method(called, method.signature, own, idempotent=idempotent)
            self.methods[called] = method
            return handler

        return add if handler is None else add(handler)

    @overload
    def job(self, handler: Handler, /) -> Handler: ...

    @overload
    def job(
        self,
        handler: None = None,
        /,
        *,
        name: str | None = None,
        retry: Retry | None = JOB_RETRY,
        timeout: float = 300.0,
        retry_on: Sequence[type[Exception]] = (Exception,),
        give_up_on: Sequence[type[Exception]] = (),
        at_most_once: bool = False,
        schedule: Schedule | None = None,
        max_concurrency: int | None = None,
        rate: str | None = None,
        once: Once | None = None,
    ) -> Callable[[Handler], Handler]: ...

    def job(self, handler: Any = None, /, *, name: str | None = None, **options: Any) -> Any:
        """Offer a function as a job: work that is done sooner or later, for a sender that does not wait.

        It runs at least once, or becomes a dead letter that says why. The function itself is not changed, and can be
        given to `Client.send`.

        Args:
            handler: an `async def`, or a `def`, which runs in a thread. What it returns reaches a sender that
                watches the job, and nobody else.
            name: the name under which it is sent; None for the function's own name.
            options: as in `rpcq.JobOptions`.

        Raises:
            ConfigurationError: the service already has a job or method of that name, an option is not valid, pydantic
                cannot handle an annotation, or the job does not fit the service's contract.

        """
        declared = JobOptions(**options)

        def add(handler: Handler) -> Handler:
            check_handler(self.name, handler, "job")
            called = self._check_new("job", name or str(getattr(handler, "__name__", "")))
            job = Method(
                self.name,
                called,
                handler,
                idempotent=False,
                errors=(),
                timeout=declared.timeout,
                allow=None,
                job=declared,
            )
            job.lanes, job.ordered = self.lanes, self.ordered
            if self._obligation is not None:
                self._obligation.check_job(called, job.signature)
            if declared.schedule is not None:
                job.parameters.check_none_needed()
            self.jobs[called] = job
            with suppress(AttributeError):  # a function of C: it is sent by its name only
                marked(handler).__rpcq_jobs__ = (*jobs_of(handler), job)  # read by `jobs_of`
            return handler

        return add if handler is None else add(handler)

    def on(  # noqa: PLR0913 - all options of a subscription
        self,
        *topics: type[Event] | str,
        name: str | None = None,
        each_instance: bool = False,
        retry: Retry | None = JOB_RETRY,
        timeout: float = 300.0,
        retry_on: Sequence[type[Exception]] = (Exception,),
        give_up_on: Sequence[type[Exception]] = (),
        at_most_once: bool = False,
        max_concurrency: int | None = None,
        rate: str | None = None,
        once: Once | None = None,
    ) -> Callable[[Handler], Handler]:
        """Subscribe a function to events: `@shipping.on(OrderCreated)`, `@audit.on("order.*", "invoice.#")`.

        The service gets each such event once, in a queue of this subscription, and its workers share them. An event
        is done at least once, or becomes a dead letter of this subscription that says why; other subscriptions do not
        notice. The function takes the event in its only parameter, besides a `Context`.

        Args:
            topics: classes of events, and patterns of their names: `*` stands for one word, `#` for any number of
                words.
            name: the subscription's name, which names its queue; None for the function's own name.
            each_instance: every process of the service gets each event while it runs, in order, one at a time, at
                most once: for caches. It takes no options besides `timeout`.
            retry: as in `rpcq.JobOptions`, like all that follow.
            timeout: the most seconds that one attempt may run, at most 25 minutes.
            retry_on: only these exceptions, and timeouts, are retried.
            give_up_on: these exceptions are not retried.
            at_most_once: an event that may have run becomes a dead letter.
            max_concurrency: the most events that one worker runs at once here.
            rate: how many events one worker begins at most in a second, a minute or an hour, such as "10/s".
            once: an inbox, such as `rpcq.outbox.Inbox(engine)`: the function also takes a session, whose transaction
                has the key of the event, so that its changes happen once for each event.

        Raises:
            ConfigurationError: the service has another function of that name, a topic is no class of events and no
                pattern, the function's parameter does not fit the topics, or an option is not valid.

        """
        options = JobOptions(
            retry=retry,
            timeout=timeout,
            retry_on=tuple(retry_on),
            give_up_on=tuple(give_up_on),
            at_most_once=at_most_once,
            max_concurrency=max_concurrency,
            rate=rate,
            once=once,
        )
        if not topics or (len(topics) == 1 and callable(topics[0]) and not isinstance(topics[0], type)):
            got = f"; got the function {topics[0]!r} alone" if topics else ""
            raise ConfigurationError(
                f"on must be given the events, as in @{self.name}.on(OrderCreated) or @{self.name}.on('order.*'){got}"
            )
        for topic in topics:
            pattern_of(topic)
        if each_instance and options != JobOptions(timeout=timeout):
            raise ConfigurationError(
                f"on must have no options with each_instance=True besides name and timeout: in service {self.name!r}, "
                "such events are run once in each process, in order, and are not retried"
            )

        def add(handler: Handler) -> Handler:
            check_handler(self.name, handler, "subscription")
            called = self._check_new("subscription", name or str(getattr(handler, "__name__", "")))
            if called == NOT_A_SUBSCRIPTION:
                raise ConfigurationError(f"a subscription must not be called {called!r}, as a queue of suspects is")
            self.subscriptions[called] = Subscriber(
                self.name,
                called,
                handler,
                topics,
                job=replace(options, retry=None) if each_instance else options,
                each_instance=each_instance,
            )
            return handler

        return add

    def _check_new(self, what: str, name: str) -> str:
        """Check the name of a new method, job or subscription, and return it."""
        if not METHOD_NAME.match(name):
            msg = f"the name of a {what} must be 1 to 100 of the characters A-Z a-z 0-9 _ -; got {name!r}"
            raise ConfigurationError(msg)
        if name in self.methods or name in self.jobs or name in self.subscriptions:
            msg = f"methods, jobs and subscriptions of service {self.name!r} must have different names"
            raise ConfigurationError(f"{msg}; got {name!r} twice")
        return name

    @property
    def is_called(self) -> bool:
        """Whether it has a request queue. One that offers nothing has it, since a fake may get its methods later."""
        return bool(self.methods) or not (self.jobs or self.subscriptions)

    @property
    def takes_jobs(self) -> bool:
        """Whether it has jobs, or subscriptions with a queue that lasts: both are delayed, retried and buried."""
        return bool(self.jobs or self.lasting)

    @property
    def lasting(self) -> list[Subscriber]:
        """The subscriptions with a queue that lasts, which the workers share."""
        return [each for each in self.subscriptions.values() if not each.topics.each_instance]

    def find(self, name: str | None) -> Method | None:
        """Find the method of a request. Without a name, or with one of `default_types`, it is the default or only."""
        if name is not None:
            found = self.methods.get(name)
            if found is not None or name not in self.default_types:
                return found
        if self.default_method is not None:
            return self.methods.get(self.default_method)
        return next(iter(self.methods.values())) if len(self.methods) == 1 else None

    def check(self) -> None:
        """Check that the service can be served.

        Raises:
            ConfigurationError: it offers nothing, it lacks a method or a job of its contract, or `default_method` or
                `allow` names a method that it does not have, or `default_types` names one that it has.

        """
        if self._obligation is not None:
            self._obligation.check_complete({*self.methods, *self.jobs})
        if not self.methods and not self.jobs and not self.subscriptions:
            raise ConfigurationError(
                f"service {self.name!r} has no methods, no jobs and no subscriptions; add one with "
                f"@{self.name}.method, .job or .on"
            )
        if self.default_method is not None and self.default_method not in self.methods:
            raise ConfigurationError(
                f"default_method of service {self.name!r} must be one of its methods; got {self.default_method!r}"
            )
        if both := sorted(self.default_types & self.methods.keys()):
            raise ConfigurationError(
                f"default_types of service {self.name!r} must not name its methods; got {both[0]!r}"
            )
        if self.default_types and self.find(None) is None:
            raise ConfigurationError(
                f"default_method of service {self.name!r} must be one of its methods with default_types; got None"
            )
        if unknown := sorted(self.allow.keys() - self.methods.keys() - {EVERY_METHOD}):
            raise ConfigurationError(f"allow of service {self.name!r} must name its methods; got {unknown[0]!r}")

    def __repr__(self) -> str:
        return f"<Service {self.name!r}: {', '.join((*self.methods, *self.jobs, *self.subscriptions)) or 'no methods'}>"
