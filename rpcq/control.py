"""What goes over the control exchange: who is there, what do they serve, how do they fare; and cancellations.

`rpcq list`, `rpcq describe`, `rpcq ping` and `Client.wait_for_service` ask it. Each worker answers for itself.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Any, Final, TypeVar

from pydantic import Field, FiniteFloat, ValidationError

from rpcq import logs
from rpcq.runtime.process import own_version
from rpcq.service import Method, Service
from rpcq.transport.base import Delivery, Message, Published, Transport
from rpcq.validation.bounds import NotRead, first_error
from rpcq.validation.schemas import Codec, make_codec
from rpcq.wire import bodies, control, replies
from rpcq.wire.properties import MalformedProperties, Properties, decode
from rpcq.wire.topology import EVERY_SERVICE, Topology

T = TypeVar("T")

MOST_ANSWERS: Final = 16
"""Answers of a worker that the broker has not confirmed."""

MOST_QUESTIONS: Final = 1000
"""Questions that a worker keeps until it can answer them."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""What a worker answers may be anything: of larger numbers, a sum could have more digits than Python writes."""

log = logs.get_logger("rpcq.control")


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method, as its worker describes it.

    Attributes:
        name: what callers call it.
        signature: its parameters and its result, with their types: "(x: int, y: int) -> int".
        doc: its handler's docstring; empty where it has none.
        idempotent: running it twice does no harm.
        timeout: seconds that it may run; None for the caller's deadline alone.
        errors: the codes of the domain errors that it declares.

    """

    name: str
    signature: str
    doc: str = ""
    idempotent: bool = False
    timeout: FiniteFloat | None = None
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """A service, as a worker of it describes it.

    Attributes:
        name: the service's.
        queue: its request queue.
        queue_type: "classic" or "quorum".
        methods: what it offers.

    """

    name: str
    queue: str
    queue_type: str
    methods: tuple[MethodInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker, as it describes itself.

    Attributes:
        name: what it is called (its option `name`).
        host: its machine's name.
        pid: its process.
        version: of rpcq.
        prefetch: calls of each service that it runs at once.
        services: what it serves.

    """

    name: str
    host: str
    pid: Count
    version: str
    prefetch: Count
    services: tuple[ServiceInfo, ...]


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """How a worker fares.

    Attributes:
        name: what it is called.
        host: its machine's name.
        pid: its process.
        time_ms: its wall clock when it answered, milliseconds since the epoch.
        uptime: seconds since it was started.
        in_flight: requests that it holds.
        finished: requests that it has answered or dropped since.
        refused_redeliveries: requests answered and not run, because a worker that held them was lost.
        expired_on_arrival: requests answered and not run, because their deadline had passed.
        unroutable_replies: replies whose caller was gone.
        replayed: requests that were answered with a remembered result.

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


def describe(name: str, prefetch: int, services: Sequence[Service], topology: Topology) -> WorkerInfo:
    """What this process says of itself as a worker of `services`."""
    return WorkerInfo(
        name=name,
        host=socket.gethostname(),
        pid=os.getpid(),
        version=own_version(),
        prefetch=prefetch,
        services=tuple(
            ServiceInfo(
                name=service.name,
                queue=topology.request_queue(service.name, service.queue_type, service.queue).name,
                queue_type=service.queue_type,
                methods=tuple(_describe_method(method) for method in service.methods.values()),
            )
            for service in services
        ),
    )


def _describe_method(method: Method) -> MethodInfo:
    return MethodInfo(
        name=method.name,
        signature=str(method.signature),
        doc=inspect.getdoc(method.handler) or "",
        idempotent=method.idempotent,
        timeout=method.timeout,
        errors=tuple(sorted({error.code for error in method.errors})),
    )


class Answerer:
    """A worker's side: takes control messages, and answers the questions among them.

    Anybody may ask as often as they like. So no more than `MOST_ANSWERS` are on their way to the broker at once, and
    what is asked beyond `MOST_QUESTIONS` is dropped.

    Args:
        transport: where answers go.
        info: what the worker says of itself.
        stats: gives the state of the worker, from its name, host, process ID and seconds since its start.
        cancel: called where the caller of a call is gone, with the call's key and the message's properties.
        may_answer: whether a queue may be answered to.
        reply_exchange: the exchange that answers go through; None for the default one.
        max_body: bytes of an answer.

    """

    def __init__(
        self,
        transport: Transport,
        info: WorkerInfo,
        stats: Callable[[str, str, int, float], WorkerStats],
        *,
        cancel: Callable[[tuple[bytes, bytes], Properties], None],
        may_answer: Callable[[bytes], bool],
        reply_exchange: str | None,
        max_body: int,
    ) -> None:
        self._transport = transport
        self._cancel = cancel
        self._may_answer = may_answer
        self._exchange = (reply_exchange or "").encode()
        self._encoder = replies.ReplyEncoder()
        ping = bodies.dumps({"name": info.name, "services": [service.name for service in info.services]})
        description = _fitting(info, max_body)

        def get_stats() -> bytes:
            return bodies.dumps(asdict(stats(info.name, info.host, info.pid, time.monotonic() - self._opened)))

        self._answers: dict[bytes, Callable[[], bytes]] = {
            control.PING: lambda: ping,
            control.DESCRIBE: lambda: description,
            control.STATS: get_stats,
        }
        self._questions: deque[tuple[bytes, bytes, bytes]] = deque()
        self._under_way = 0
        self._seldom = logs.Seldom(log)
        self._is_answering = False
        self._opened = time.monotonic()

    def open(self) -> None:
        """The worker starts now."""
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
        elif not self._may_answer(reply_to):
            self._drop(f"its reply_to is {reply_to!r}")
        elif not self.answer(found.type or b"", reply_to, correlation_id):
            self._drop(f"its type is {found.type!r}, which this version does not know")

    def _drop(self, cause: str) -> None:
        self._seldom.warning("control message dropped", cause=cause)

    def answer(self, kind: bytes, reply_to: bytes, correlation_id: bytes) -> bool:
        """Answer a question; False if it is of no kind that is known."""
        if kind not in self._answers:
            return False
        if len(self._questions) >= MOST_QUESTIONS:
            self._seldom.warning("question dropped: there are too many", reply_to=reply_to.decode("utf-8", "replace"))
        else:
            self._questions.append((kind, reply_to, correlation_id))
            self._go_on()
        return True

    def _go_on(self) -> None:
        if self._is_answering:  # told at once that an answer was not sent
            return
        self._is_answering = True
        try:
            while self._questions and self._under_way < MOST_ANSWERS:
                kind, reply_to, correlation_id = self._questions.popleft()
                properties = self._encoder.encode(replies.RESULT, correlation_id, None, 0.0)
                body = self._answers[kind]()
                self._under_way += 1
                self._transport.publish(
                    Message(self._exchange, reply_to, correlation_id, properties, body, self._settled)
                )
        finally:
            self._is_answering = False

    def _settled(self, _: Published) -> None:
        self._under_way -= 1
        self._go_on()


def _fitting(info: WorkerInfo, max_body: int) -> bytes:
    """A description; without docs, then signatures, then methods, as long as it is too large."""
    described = asdict(info)
    body = bodies.dumps(described)
    for left_out in ("doc", "signature"):
        if len(body) <= max_body:
            return body
        log.warning("this worker's description is larger than max_body: part of it is left out", part=left_out)
        for service in described["services"]:
            for method in service["methods"]:
                method[left_out] = ""
        body = bodies.dumps(described)
    if len(body) > max_body:
        for service in described["services"]:
            service["methods"] = []
        body = bodies.dumps(described)
    return body


class Control:
    """A client's side: sends control messages, and gathers the answers.

    Args:
        transport: where they go.
        names: the exchange's.
        ready: waits until the client has a reply queue and may publish; gives the queue's name.
        next_id: gives correlation IDs.

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
        self._asked: dict[bytes, asyncio.Queue[bytes | None]] = {}
        self._not_ready: set[asyncio.Task[bytes]] = set()
        self._seldom = logs.Seldom(log)

    def cancel(self, service: bytes, correlation_id: bytes, reply_to: bytes, deadline_ms: int) -> None:
        """Tell all workers of a service that the caller of this request is gone."""
        properties = control.encode_control(control.CANCEL, correlation_id, reply_to, deadline_ms)
        self._transport.publish(Message(self._exchange, service, correlation_id, properties, b"", lambda _: None))

    def answered(self, correlation_id: bytes, body: bytes | None) -> bool:
        """Take what came to the reply queue; False if it is no answer to a question."""
        found = self._asked.get(correlation_id) if self._asked else None
        if found is None:
            return False
        if body is None:
            self._seldom.warning("answer of a worker dropped: it is larger than this client's max_body")
        else:
            found.put_nowait(body)
        return True

    def read(self, kind: type[T], answer: bytes) -> T | None:
        """An answer as what it should be; None if it is not, which is logged: another worker's may be."""
        try:
            found: T = _codec(kind).read(answer)  # type: ignore[arg-type]  # a class is hashable
        except (ValidationError, NotRead) as error:
            self._seldom.warning("answer of a worker dropped", cause=first_error(error), expected=kind.__name__)
            return None
        return found

    def close(self) -> None:
        """End all questions: no further answers come, and nothing more is asked."""
        for answers in self._asked.values():
            answers.put_nowait(None)
        for waiting in self._not_ready:
            waiting.cancel()

    async def ask(self, kind: bytes, service: str | None, wait: float) -> AsyncGenerator[bytes, None]:
        """The answers of all workers of a service (None: of every worker), as they come within `wait` seconds.

        It ends at once where no worker is there.
        """
        until = time.monotonic() + wait
        correlation_id = self._next_id()
        answers: asyncio.Queue[bytes | None] = asyncio.Queue()

        def settled(outcome: Published) -> None:
            if outcome is not Published.CONFIRMED:
                answers.put_nowait(None)

        self._asked[correlation_id] = answers
        try:
            reply_to = await self._reply_to(wait)
            if reply_to is None:
                return
            key = EVERY_SERVICE if service is None else service
            properties = control.encode_control(kind, correlation_id, reply_to)
            self._transport.publish(Message(self._exchange, key.encode(), correlation_id, properties, b"", settled))
            while True:
                async with asyncio.timeout(until - time.monotonic()):
                    answer = await answers.get()
                if answer is None:
                    return
                yield answer
        except TimeoutError:
            return
        finally:
            del self._asked[correlation_id]

    async def _reply_to(self, wait: float) -> bytes | None:
        """Where answers go; None where nothing can be asked within `wait` seconds, or before `close`."""

        async def get_ready() -> bytes:
            return await self._ready()

        waiting = asyncio.get_running_loop().create_task(get_ready())
        self._not_ready.add(waiting)
        try:
            await asyncio.wait([waiting], timeout=wait)
            return waiting.result() if waiting.done() and not waiting.cancelled() else None
        finally:
            self._not_ready.discard(waiting)
            waiting.cancel()


@cache
def _codec(kind: type[Any]) -> Codec:
    return make_codec(kind, kind.__name__, written=False)
