"""Control messages: questions to workers, their answers, and cancellations of calls.

`rpcq list`, `rpcq describe`, `rpcq ping` and `Client.wait_for_service` ask workers who is there, what they serve and
in what state they are. Each worker answers for itself.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from typing import Annotated, Any, Final, TypeVar

from pydantic import Field, FiniteFloat, ValidationError

from rpcq import logs
from rpcq.options import JobOptions, WorkerOptions
from rpcq.runtime.process import own_version
from rpcq.service import Method, Service, Subscriber
from rpcq.transport.base import Delivery, Message, Published, Transport
from rpcq.validation.bounds import NotRead, first_error
from rpcq.validation.schemas import Codec, make_codec
from rpcq.wire import bodies, control, replies
from rpcq.wire.events import EventTopology
from rpcq.wire.properties import MalformedProperties, Properties, decode
from rpcq.wire.topology import EVERY_SERVICE, Topology

T = TypeVar("T")

PING_TIMEOUT: Final = 1.0
"""Seconds that a worker has to answer a ping."""

MOST_ANSWERS: Final = 16
"""Answers that a worker may have sent and the broker has not confirmed yet."""

MOST_QUESTIONS: Final = 1000
"""Questions that a worker keeps until it can answer them."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A count in an answer. Larger ones are refused, because a sum of them could have more digits than Python writes."""

log = logs.get_logger("rpcq.control")


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method, as its worker describes it.

    Attributes:
        name: the name under which callers call it.
        signature: its parameters and its result, with their types: "(x: int, y: int) -> int".
        doc: its handler's docstring, or an empty string.
        idempotent: whether running it twice does no harm.
        timeout: the most seconds that it may run; None for the caller's deadline alone.
        errors: the codes of the domain errors that it declares.

    """

    name: str
    signature: str
    doc: str = ""
    idempotent: bool = False
    timeout: FiniteFloat | None = None
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JobInfo:
    """A job, as its worker describes it.

    Attributes:
        name: the name under which it is sent.
        signature: its parameters and its result, with their types: "(to: str) -> None".
        timeout: the most seconds that one attempt may run.
        max_attempts: the most attempts, including the first one.
        doc: its handler's docstring, or an empty string.
        at_most_once: whether it is never run again after it may have run.
        schedule: when workers send it by themselves: "cron 0 6 * * mon-fri Europe/Berlin", "every 60 s", or empty.
        missed: what becomes of the ticks of its schedule that nobody was there for; empty without a schedule.

    """

    name: str
    signature: str
    timeout: FiniteFloat
    max_attempts: Count
    doc: str = ""
    at_most_once: bool = False
    schedule: str = ""
    missed: str = ""


@dataclass(frozen=True, slots=True)
class SubscriptionInfo:
    """A subscription, as its worker describes it.

    Attributes:
        name: its name within the service.
        signature: the parameter for the event, with its type, and the result: "(event: shop.OrderCreated) -> None".
        patterns: the names and patterns of events that its queue is bound to.
        timeout: the most seconds that one attempt may run.
        max_attempts: the most attempts, including the first one.
        queue: the name of its queue; empty if every process has its own.
        events: the events that it has classes for, "name version".
        doc: its handler's docstring, or an empty string.
        at_most_once: whether an event is never run again after it may have run.
        each_instance: whether every process gets each event.

    """

    name: str
    signature: str
    patterns: tuple[str, ...]
    timeout: FiniteFloat
    max_attempts: Count
    queue: str = ""
    events: tuple[str, ...] = ()
    doc: str = ""
    at_most_once: bool = False
    each_instance: bool = False


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """A service, as one of its workers describes it.

    Attributes:
        name: the service's name.
        queue: the name of its request queue.
        queue_type: "classic" or "quorum".
        methods: its methods.
        jobs: its jobs; none from a worker of a version that does not describe them.
        job_queue: the name of the queue of its jobs; empty if it has none.
        lanes: whether its jobs of high and of low priority have queues of their own.
        subscriptions: its subscriptions; none from a worker of a version that does not describe them.
        ordered: whether its jobs may have an order key.
        takes: calls that it wants in one message at most, now; 0 if each is to go alone.

    """

    name: str
    queue: str
    queue_type: str
    methods: tuple[MethodInfo, ...] = ()
    jobs: tuple[JobInfo, ...] = ()
    job_queue: str = ""
    lanes: bool = False
    subscriptions: tuple[SubscriptionInfo, ...] = ()
    ordered: bool = False
    takes: Count = 0


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker, as it describes itself.

    Attributes:
        name: the worker's name (its option `name`).
        host: its machine's name.
        pid: its process ID.
        version: its version of rpcq.
        prefetch: calls of each service that it runs at once.
        services: the services that it runs.
        job_prefetch: jobs of each service that it runs at once; 0 from a version that does not say so.

    """

    name: str
    host: str
    pid: Count
    version: str
    prefetch: Count
    services: tuple[ServiceInfo, ...]
    job_prefetch: Count = 0


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """The state of a worker, and what it has done since it was started.

    Attributes:
        name: the worker's name.
        host: its machine's name.
        pid: its process ID.
        time_ms: its wall clock when it answered, in milliseconds since the epoch.
        uptime: seconds since it was started.
        in_flight: requests that it has in hand.
        finished: requests that it has replied to or dropped.
        refused_redeliveries: requests refused because a worker that held them was lost.
        expired_on_arrival: requests refused because their deadline had passed.
        unroutable_replies: replies whose caller was gone.
        replayed: requests for which it replayed a stored result.
        ticks: of the jobs whose schedules it carries on, "service.job", the last tick that was sent, in milliseconds
            since the epoch.

    """

    name: str
    host: str
    pid: Count
    time_ms: FiniteFloat
    uptime: FiniteFloat
    in_flight: Count
    finished: Count
    refused_redeliveries: Count
    expired_on_arrival: Count
    unroutable_replies: Count
    replayed: Count = 0
    ticks: Mapping[str, Count] = field(default_factory=dict)


def describe(options: WorkerOptions, services: Sequence[Service]) -> WorkerInfo:
    """Describe this process as a worker of `services`."""
    topology, events = Topology(options.namespace), EventTopology(options.namespace)
    return WorkerInfo(
        name=options.name,
        host=socket.gethostname(),
        pid=os.getpid(),
        version=own_version(),
        prefetch=options.prefetch,
        job_prefetch=options.job_prefetch,
        services=tuple(
            ServiceInfo(
                name=service.name,
                queue=topology.request_queue(service.name, service.queue_type, service.queue).name,
                queue_type=service.queue_type,
                methods=tuple(_describe_method(method) for method in service.methods.values()),
                jobs=tuple(_describe_job(job, job.job) for job in service.jobs.values() if job.job is not None),
                job_queue=events.jobs.queue(service.name).name if service.jobs else "",
                lanes=service.lanes and bool(service.jobs),
                subscriptions=tuple(_describe_subscription(events, it) for it in service.subscriptions.values()),
                ordered=service.ordered and bool(service.jobs),
            )
            for service in services
        ),
    )


def _describe_method(method: Method) -> MethodInfo:
    return MethodInfo(
        name=method.name,
        signature=_written(method.signature),
        doc=inspect.getdoc(method.handler) or "",
        idempotent=method.idempotent,
        timeout=method.timeout,
        errors=tuple(sorted({error.code for error in method.errors})),
    )


def _written(signature: inspect.Signature) -> str:
    """Write a signature as people write it: its annotations are resolved, and `None` is `NoneType` then."""
    is_none = signature.return_annotation is type(None)
    return str(signature.replace(return_annotation=None) if is_none else signature)


def _describe_job(job: Method, options: JobOptions) -> JobInfo:
    return JobInfo(
        name=job.name,
        signature=_written(job.signature),
        doc=inspect.getdoc(job.handler) or "",
        timeout=options.timeout,
        max_attempts=options.max_attempts,
        at_most_once=options.at_most_once,
        schedule="" if options.schedule is None else str(options.schedule),
        missed="" if options.schedule is None else options.schedule.missed,
    )


def _describe_subscription(topology: EventTopology, subscriber: Subscriber) -> SubscriptionInfo:
    topics, queue = subscriber.topics, topology.queue(subscriber.service, subscriber.name, ())
    assert subscriber.job is not None  # noqa: S101 - a subscription has options
    return SubscriptionInfo(
        name=subscriber.name,
        signature=_written(subscriber.signature),
        patterns=topics.patterns,
        timeout=subscriber.job.timeout,
        max_attempts=1 if topics.each_instance else subscriber.job.max_attempts,
        queue="" if topics.each_instance else queue.name,
        events=tuple(f"{kind.event_name} {kind.event_version}" for kind in topics.kinds),
        doc=inspect.getdoc(subscriber.handler) or "",
        at_most_once=subscriber.job.at_most_once or topics.each_instance,
        each_instance=topics.each_instance,
    )


class Answerer:
    """The worker's side: takes control messages, answers questions, and passes on cancellations.

    Clients may ask without limit. So at most `MOST_ANSWERS` answers are sent and unconfirmed at once, and questions
    beyond `MOST_QUESTIONS` are dropped.

    Args:
        transport: sends the answers.
        info: the worker's description of itself.
        stats: called with the worker's name, host, process ID and seconds since its start; returns its state.
        takes: called with the name of a service; returns how many calls it wants in one message.
        cancel: called with the key of a call whose caller is gone, and the properties of the control message.
        is_reply_queue: whether answers may be sent to a queue.
        reply_exchange: the exchange for answers; None for the default one.
        max_body: the most bytes of an answer.

    """

    def __init__(
        self,
        transport: Transport,
        info: WorkerInfo,
        stats: Callable[[str, str, int, float], WorkerStats],
        *,
        takes: Callable[[str], int],
        cancel: Callable[[tuple[bytes, bytes], Properties], None],
        is_reply_queue: Callable[[bytes], bool],
        reply_exchange: str | None,
        max_body: int,
    ) -> None:
        self._transport = transport
        self._cancel = cancel
        self._is_reply_queue = is_reply_queue
        self._exchange = (reply_exchange or "").encode()
        self._encoder = replies.ReplyEncoder()
        ping = bodies.dumps({"name": info.name, "services": [service.name for service in info.services]})

        @lru_cache(maxsize=1)  # it is costly to write
        def describe_taking(*counts: int) -> bytes:
            services = (replace(it, takes=count) for it, count in zip(info.services, counts, strict=True))
            return _fitting(replace(info, services=tuple(services)), max_body)

        def get_description() -> bytes:
            return describe_taking(*(takes(service.name) for service in info.services))

        def get_stats() -> bytes:
            return bodies.dumps(asdict(stats(info.name, info.host, info.pid, time.monotonic() - self._opened)))

        self._answers: dict[bytes, Callable[[], bytes]] = {
            control.PING: lambda: ping,
            control.DESCRIBE: get_description,
            control.STATS: get_stats,
        }
        self._questions: deque[tuple[bytes, bytes, bytes]] = deque()
        self._unconfirmed = 0
        self._seldom = logs.Seldom(log)
        self._is_answering = False
        self._opened = time.monotonic()

    def open(self) -> None:
        """Start to count the worker's uptime."""
        self._opened = time.monotonic()

    def on_delivery(self, delivery: Delivery) -> None:
        """Take a control message."""
        try:
            found = decode(delivery.properties)
        except MalformedProperties as error:
            self._drop(str(error))
            return
        reply_to, correlation_id = found.reply_to or b"", found.correlation_id or b""
        if not reply_to or not correlation_id:
            self._drop("it has no reply_to or no correlation_id")
        elif found.type == control.CANCEL:
            self._cancel((reply_to, correlation_id), found)
        elif not self._is_reply_queue(reply_to):
            self._drop(f"its reply_to is {reply_to!r}")
        elif not self.answer(found.type or b"", reply_to, correlation_id):
            self._drop(f"its type is {found.type!r}, which this version does not know")

    def _drop(self, cause: str) -> None:
        self._seldom.warning("control message dropped", cause=cause)

    def answer(self, kind: bytes, reply_to: bytes, correlation_id: bytes) -> bool:
        """Answer a question, perhaps later; return False if its kind is not known."""
        if kind not in self._answers:
            return False
        if len(self._questions) >= MOST_QUESTIONS:
            self._seldom.warning("question dropped: there are too many", reply_to=reply_to.decode("utf-8", "replace"))
        else:
            self._questions.append((kind, reply_to, correlation_id))
            self._send_answers()
        return True

    def _send_answers(self) -> None:
        if self._is_answering:  # `publish` called `_on_published` at once; the loop below goes on
            return
        self._is_answering = True
        try:
            while self._questions and self._unconfirmed < MOST_ANSWERS:
                kind, reply_to, correlation_id = self._questions.popleft()
                properties = self._encoder.encode(replies.RESULT, correlation_id, None, 0.0)
                body = self._answers[kind]()
                self._unconfirmed += 1
                self._transport.publish(
                    Message(self._exchange, reply_to, correlation_id, properties, body, self._on_published)
                )
        finally:
            self._is_answering = False

    def _on_published(self, _: Published) -> None:
        self._unconfirmed -= 1
        self._send_answers()


def _fitting(info: WorkerInfo, max_body: int) -> bytes:
    """Write a description; if it is too large, without docs, then without signatures, then without methods and jobs."""
    described = asdict(info)
    body = bodies.dumps(described)
    for left_out in ("doc", "signature"):
        if len(body) <= max_body:
            return body
        log.warning("this worker's description is larger than max_body: part of it is left out", part=left_out)
        for service in described["services"]:
            for each in (*service["methods"], *service["jobs"]):
                each[left_out] = ""
        body = bodies.dumps(described)
    if len(body) > max_body:
        for service in described["services"]:
            service["methods"] = service["jobs"] = []
        body = bodies.dumps(described)
    return body


class Control:
    """The client's side: sends control messages, and collects the answers.

    Args:
        transport: sends the control messages.
        topology: has the name of the control exchange.
        ready: waits until the client has a reply queue and may publish; returns the queue's name.
        next_id: makes correlation IDs.

    """

    def __init__(
        self,
        transport: Transport,
        topology: Topology,
        ready: Callable[[], Awaitable[bytes]],
        next_id: Callable[[], bytes],
    ) -> None:
        self._transport = transport
        self._exchange = topology.control.name.encode()
        self._ready = ready
        self._next_id = next_id
        self._questions: dict[bytes, asyncio.Queue[bytes | None]] = {}  # the answers to each, by correlation ID
        self._waiting: set[asyncio.Task[bytes]] = set()
        self._seldom = logs.Seldom(log)

    def cancel(self, service: bytes, correlation_id: bytes, reply_to: bytes, deadline_ms: int) -> None:
        """Send to all workers of a service that the caller of this request is gone."""
        properties = control.encode_control(control.CANCEL, correlation_id, reply_to, deadline_ms)
        self._transport.publish(Message(self._exchange, service, correlation_id, properties, b"", lambda _: None))

    def answered(self, correlation_id: bytes, body: bytes | None) -> bool:
        """Take an answer from the reply queue; return False if the message is no answer to a question."""
        answers = self._questions.get(correlation_id) if self._questions else None
        if answers is None:
            return False
        if body is None:
            self._seldom.warning("answer of a worker dropped: it is larger than this client's max_body")
        else:
            answers.put_nowait(body)
        return True

    def read(self, kind: type[T], answer: bytes) -> T | None:
        """Validate an answer; if it does not fit, log that and return None: answers of other workers may fit."""
        try:
            found: T = _codec(kind).read(answer)  # type: ignore[arg-type]  # a class is hashable
        except (ValidationError, NotRead) as error:
            self._seldom.warning("answer of a worker dropped", cause=first_error(error), expected=kind.__name__)
            return None
        return found

    def close(self) -> None:
        """End all questions, also those that wait to be asked."""
        for answers in self._questions.values():
            answers.put_nowait(None)
        for waiting in self._waiting:
            waiting.cancel()

    async def ask(self, kind: bytes, service: str | None, wait: float) -> AsyncGenerator[bytes, None]:
        """Ask all workers of a service (None: every worker), and yield their answers as they come in `wait` seconds.

        It ends at once if there is no worker.
        """
        until = time.monotonic() + wait
        correlation_id = self._next_id()
        answers: asyncio.Queue[bytes | None] = asyncio.Queue()

        def on_published(published: Published) -> None:
            if published is not Published.CONFIRMED:
                answers.put_nowait(None)

        self._questions[correlation_id] = answers
        try:
            reply_to = await self._reply_to(wait)
            if reply_to is None:
                return
            key = EVERY_SERVICE if service is None else service
            properties = control.encode_control(kind, correlation_id, reply_to)
            self._transport.publish(
                Message(self._exchange, key.encode(), correlation_id, properties, b"", on_published)
            )
            while True:
                async with asyncio.timeout(until - time.monotonic()):
                    answer = await answers.get()
                if answer is None:
                    return
                yield answer
        except TimeoutError:
            return
        finally:
            del self._questions[correlation_id]

    async def _reply_to(self, wait: float) -> bytes | None:
        """The client's reply queue; None if the client cannot ask within `wait` seconds, or is closed before."""

        async def get_ready() -> bytes:
            return await self._ready()

        waiting = asyncio.get_running_loop().create_task(get_ready())
        self._waiting.add(waiting)
        try:
            await asyncio.wait([waiting], timeout=wait)
            return waiting.result() if waiting.done() and not waiting.cancelled() else None
        finally:
            self._waiting.discard(waiting)
            waiting.cancel()


@cache
def _codec(kind: type[Any]) -> Codec:
    return make_codec(kind, kind.__name__, written=False)
