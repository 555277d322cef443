"""Messages that are hostile, broken, doubled or late, beside load that must not notice them.

Each test has a stranger, a program that is not rpcq's, send what rpcq never would, while tens of callers go on calling
a real worker. Whatever was sent: the load has no failure, nobody's connection is lost, what the worker took in hand is
what was sent to it, and nothing is left in the request queue or was given up by it.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, Self

import aio_pika
import pydantic
import pytest
from aio_pika.abc import AbstractIncomingMessage, AbstractQueue
from pydantic import SecretStr

import rpcq.calls.invoking
import rpcq.calls.sending
from rpcq import (
    CallTimeout,
    Client,
    ConfigurationError,
    InvalidReply,
    MethodNotFound,
    NotSerializable,
    TooLarge,
)
from rpcq.control import WorkerStats
from rpcq.logs import SELDOM
from support.load import READY, Load, Scene, WorkerProcess, until

MIB = 1024 * 1024
HOUR = 3600
DEPTH = 100_000
DEEP: Any = "bottom"
for _ in range(40):
    DEEP = {"deeper": DEEP}
THINK = 0.1
"""Seconds between two calls of one caller: what a stranger does takes several times as long as what rpcq does."""


class Copies:
    """A queue that gets a copy of each request. It is asked for one after the other: it may well be behind the load."""

    def __init__(self, queue: AbstractQueue) -> None:
        self._queue = queue
        self._found: deque[Request] = deque()

    async def next(self) -> Request:
        """The next request, also if it came with others in one message."""
        async with asyncio.timeout(READY):
            while not self._found:
                message = await self._queue.get(no_ack=True, fail=False)
                if message is None:
                    await asyncio.sleep(0.01)
                else:
                    self._found.extend(requests_in(message))
        return self._found.popleft()

    async def of(self, nonces: list[Any]) -> list[Request]:
        """The requests that came with these."""
        found: dict[str, Request] = {}
        async with asyncio.timeout(READY):
            while not found.keys() >= set(nonces):
                copy = await self.next()
                found[json.loads(copy.body)["nonce"]] = copy
        return [found[nonce] for nonce in nonces]


@dataclass(frozen=True)
class Request:
    """A request as it is in a message of its own."""

    body: bytes
    headers: dict[str, Any]
    properties: dict[str, Any]

    @property
    def correlation_id(self) -> str:
        return str(self.properties["correlation_id"])

    @property
    def reply_to(self) -> str:
        return str(self.properties["reply_to"])


def requests_in(message: AbstractIncomingMessage) -> list[Request]:
    """The requests in a message, by docs/wire.md."""
    names = ("content_type", "correlation_id", "reply_to", "expiration", "type", "app_id", "delivery_mode")
    properties = {name: getattr(message, name) for name in names}
    headers = dict(message.headers)
    if message.content_type != "application/x-ndjson":
        return [Request(message.body, headers, properties)]
    first, *bodies = message.body.split(b"\n")
    sent = int(str(headers["rpcq-deadline"])) - int(str(headers["rpcq-timeout"]))
    found = []
    for (correlation_id, method, timeout, *own), body in zip(json.loads(first), bodies, strict=True):
        times = {"rpcq-timeout": timeout, "rpcq-deadline": sent + timeout}
        alone = {"content_type": "application/json", "correlation_id": correlation_id, "type": method}
        found.append(Request(body, headers | times | (own[0] if own else {}), properties | alone))
    return found


class Stranger:
    """A program that is not rpcq's: it sends what the test says, and keeps what comes back.

    Attributes:
        replies: what came to its reply queue, by correlation ID.
        requests: what came to its own queue, to which clients send as to a server that is not rpcq's.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._count = 0
        self.replies: dict[str | None, list[AbstractIncomingMessage]] = {}
        self.requests: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        self._connection = await aio_pika.connect(self._scene.url)
        self._channel = await self._connection.channel()
        self._exchange = await self._channel.get_exchange(f"{self._scene.namespace}.requests")
        self._inbox = await self._channel.declare_queue(exclusive=True)
        self._given_up = await self._channel.declare_queue(exclusive=True)
        await self._given_up.bind(f"{self._scene.namespace}.notices", self._given_up.name)
        self._counter = await self._channel.declare_queue(exclusive=True)
        await self._inbox.consume(self._on_reply, no_ack=True)
        await self._counter.consume(self._on_request, no_ack=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()

    async def _on_reply(self, message: AbstractIncomingMessage) -> None:
        self.replies.setdefault(message.correlation_id, []).append(message)

    async def _on_request(self, message: AbstractIncomingMessage) -> None:
        self.requests.put_nowait(message)

    @property
    def counter(self) -> str:
        """The name of its own queue, for the option `queue`."""
        return self._counter.name

    # As one who calls.

    async def send(self, body: bytes, *, headers: dict[str, Any] | None = None, **properties: Any) -> None:
        """Send a request to the service; if its queue gives it up, the broker is to say so."""
        given = {"type": "once", **properties}
        message = aio_pika.Message(body, headers={"CC": [self._given_up.name], **(headers or {})}, **given)
        await self._exchange.publish(message, "target")

    async def ask(self, body: bytes, **properties: Any) -> AbstractIncomingMessage:
        """Send a request, and wait for the reply to it."""
        self._count += 1
        own = properties.setdefault("correlation_id", f"stranger-{self._count}")
        await self.send(body, reply_to=self._inbox.name, **properties)
        await until(lambda: own in self.replies, what=f"no reply to {body[:60]!r} {str(properties)[:200]}")
        return self.replies[own][-1]

    async def send_again(self, request: Request) -> None:
        """Replay what somebody sent: the same bytes with the same properties."""
        message = aio_pika.Message(request.body, headers=request.headers, **request.properties)
        await self._exchange.publish(message, "target")

    @asynccontextmanager
    async def copies(self) -> AsyncIterator[Copies]:
        """Copies of all requests to the service from now on, for as long as this lasts."""
        queue = await self._channel.declare_queue(exclusive=True)
        quorum = self._scene.queue_type == "quorum"  # clients send to such a queue by its name
        await queue.bind(self._exchange, self._scene.queue if quorum else "target")
        yield Copies(queue)
        await queue.delete(if_unused=False, if_empty=False)

    # As one who answers.

    async def next_request(self) -> AbstractIncomingMessage:
        return await asyncio.wait_for(self.requests.get(), READY)

    async def reply(self, request: AbstractIncomingMessage | Request, body: bytes, **properties: Any) -> None:
        """Answer a request: as its worker would, but for what the test says."""
        assert request.reply_to is not None
        await self.reply_to(request.reply_to, body, **{"correlation_id": request.correlation_id, **properties})

    async def reply_to(self, queue: str, body: bytes, **properties: Any) -> None:
        given = {"type": "result", "content_type": "application/json", **properties}
        await self._channel.default_exchange.publish(aio_pika.Message(body, **given), queue)

    # As one who looks.

    async def queue(self, name: str) -> AbstractQueue:
        """A queue of its own, of this name."""
        return await self._channel.declare_queue(name, exclusive=True)

    async def messages_in(self, name: str) -> int | None:
        return (await self._channel.declare_queue(name, passive=True)).declaration_result.message_count

    async def check_nothing_is_left(self) -> None:
        """Once the worker has ended: all that was sent has been acknowledged, and nothing was answered twice.

        What the worker left unacknowledged would stand in a classic queue, in front of the message that is sent now,
        and would have been given up by a quorum one before it.
        """
        assert await self.messages_in(self._scene.queue) == 0
        await self.send(b"last", expiration=0.001)
        await until_async(self._given_up_count)
        first = await self._given_up.get(no_ack=True)
        assert first.body == b"last", f"the request queue gave up {first.body[:100]!r}: {first.headers}"
        await self.reply_to(self._inbox.name, b"last", correlation_id="last")
        await until(lambda: "last" in self.replies)
        twice = {told: len(came) for told, came in self.replies.items() if len(came) > 1}
        assert not twice, f"answered more than once: {twice}"

    async def _given_up_count(self) -> int | None:
        return await self.messages_in(self._given_up.name)


async def until_async(condition: Callable[[], Awaitable[object]], seconds: float = READY) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"it was not so within {seconds:g} s"
        await asyncio.sleep(0.01)


@dataclass
class Stage:
    """What a test has before it, and what it expects to be counted besides the load.

    Attributes:
        handled: requests besides those of ledgers that the worker took in hand, and answered if they wanted it.
        expired: those of all requests that it found expired.
        unmatched: replies that were for no call of the client.
    """

    scene: Scene
    worker: WorkerProcess
    client: Client
    stranger: Stranger
    load: Load
    handled: int = 0
    expired: int = 0
    unmatched: int = 0

    @property
    def reply_queue(self) -> str:
        assert self.client._sender.encoder is not None
        return self.client._sender.encoder.reply_to.decode()

    async def stats(self) -> WorkerStats:
        async with aclosing(self.client.stats("target", wait=READY)) as answers:
            return await anext(answers)

    async def check_counts(self) -> None:
        """Once there is no more load: what the worker took in hand is what was sent to it, each once."""
        handled = sum(ledger.ended for ledger in self.scene.ledgers) + self.handled
        deadline = time.monotonic() + READY
        while True:
            stats = await self.stats()
            if (stats.in_flight, stats.finished) == (0, handled) or time.monotonic() > deadline:
                break
        assert (stats.in_flight, stats.finished, stats.refused_redeliveries) == (0, handled, 0)
        assert stats.expired_on_arrival == self.expired
        await until(lambda: self.client._calls.unmatched >= self.unmatched)
        assert self.client._calls.unmatched == self.unmatched


def connections(client: Client) -> tuple[Any, Any]:
    transport: Any = client._transport
    return transport._consuming._link, transport._publishing._link


@asynccontextmanager
async def under_load(scene: Scene, **options: Any) -> AsyncIterator[Stage]:
    """A worker, a client with these options and a stranger; the load goes on, and through it all comes."""
    worker = await scene.worker()
    async with Stranger(scene) as stranger:
        async with scene.client(name="tested", **options) as client:
            before = connections(client)
            async with scene.load(client, callers=30, timeout=30, think=THINK) as load:
                stage = Stage(scene, worker, client, stranger, load)
                await load.through(30)
                yield stage
                await load.through(30)
            assert load.ledger.failed == 0, load.ledger.counts
            assert None not in before
            assert connections(client) == before, "the client lost a connection"
            await stage.check_counts()
        await scene.check()
        assert not worker.says("session down"), "the worker lost a connection"
        await stranger.check_nothing_is_left()


def params(nonce: str, **more: Any) -> bytes:
    return json.dumps({"nonce": nonce, **more}).encode()


def error_of(reply: AbstractIncomingMessage) -> tuple[str, str, bool]:
    """Code, `executed` and `retryable` of a reply that has to be an error."""
    assert reply.type == "error", reply.body
    body = json.loads(reply.body)
    return body["code"], body["executed"], body["retryable"]


def result_of(reply: AbstractIncomingMessage) -> Any:
    assert reply.type == "result", reply.body
    return json.loads(reply.body)


# Requests that the worker refuses, and answers: rows 21, 23, 24, 25, 26, 27

Sent = tuple[bytes, dict[str, Any]]
GOOD = params("strange")
REFUSED: dict[str, tuple[str, list[Sent]]] = {
    "21-body-not-json": (
        "INVALID_ARGUMENT",
        [
            (body, {})
            for body in (
                b"",
                b" ",
                b"not json",
                b"{",
                GOOD[:-1],
                GOOD + b"}",
                GOOD + GOOD,
                b"1, 2",
                b"{'nonce': 'strange'}",
                b'{"nonce": NaN}',
                b'{"nonce": "strange \xff"}',
                b"\xef\xbb\xbf" + GOOD,
                "{}".encode("utf-16"),
                bytes(range(256)),
                b"null",
                b"[]",
                b'{"nonce": 5}',
                params("strange", unknown=1),
            )
        ],
    ),
    "23-body-over-the-limit": (
        "INVALID_ARGUMENT",
        [(GOOD.ljust(MIB + 1), {}), (params("strange" * MIB), {}), (b"[" * (5 * MIB), {})],
    ),
    "24-json-nested-too-deep": (
        "INVALID_ARGUMENT",
        [
            (b"[" * DEPTH + b"]" * DEPTH, {}),
            (b'{"nonce":' * DEPTH + b'"strange"' + b"}" * DEPTH, {}),
            (b'{"nonce":' + b"[" * DEPTH + b"]" * DEPTH + b"}", {}),
            (b'{"nonce":"strange","kind":' + b"[" * DEPTH + b"]" * DEPTH + b"}", {"type": "odd"}),
            (b"[" * DEPTH, {}),
        ],
    ),
    "25-unknown-method": (
        "UNIMPLEMENTED",
        [
            (GOOD, {"type": name})
            for name in (None, "nothing", "Once", "once ", "target.once", "__init__", "\N{SNOWMAN}", "x" * 255)
        ],
    ),
    "26-unknown-content-type": (
        "INVALID_ARGUMENT",
        [
            *(
                (GOOD, {"content_type": name})
                for name in (
                    "application/x-python-pickle",
                    "application/msgpack",
                    "application/json; charset=latin-1",
                    "json",
                    "x" * 255,
                )
            ),
            (GOOD, {"content_type": "application/json", "content_encoding": "gzip"}),
            (gzip.compress(GOOD), {}),
            (b"\xef\xbb\xbf" + GOOD, {}),
        ],
    ),
    "27-headers-over-the-limit": (
        "INVALID_ARGUMENT",
        [
            (GOOD, {"headers": {"x-large": "x" * 20_000}}),
            (GOOD, {"headers": {"x-large": "x" * 100_000}}),
            (GOOD, {"headers": {f"x-{number}": "small" for number in range(2_000)}}),
            (GOOD, {"headers": {"unknown": ["x" * 10_000, {"more": "x" * 10_000}]}}),
            (GOOD, {"headers": {"deep": DEEP}}),
        ],
    ),
}


async def test_requests_that_may_not_run_are_answered_once_and_acknowledged_rows_21_and_23_to_27(scene: Scene) -> None:
    async with under_load(scene) as stage:
        for row, (code, strange) in REFUSED.items():
            for body, properties in strange:
                reply = await stage.stranger.ask(body, **properties)
                assert error_of(reply) == (code, "no", False), f"row {row}: {body[:60]!r} {str(properties)[:100]}"
                assert len(reply.body) < 10_000, f"row {row}: what was refused goes back to its sender"
                await stage.stranger.send(body, **properties)  # with no reply_to: nobody hears of the refusal
                stage.handled += 2
        calls = [stage.client.call(f"target.nothing-{n}", nonce="strange") for n in range(30)]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, MethodNotFound), f"row 25, as rpcq's client has it: {outcome!r}"
            assert (outcome.executed, outcome.retryable) == ("no", False)
        stage.handled += 30
        edge = GOOD.replace(b"strange", b"edge").ljust(MIB)  # what is just within all limits does run
        assert result_of(await stage.stranger.ask(edge, headers={"x-large": "x" * 8_000})) == "edge"
        stage.handled += 1
    assert scene.ran("strange") == []
    assert scene.ran("edge") == ["edge"]


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_a_storm_of_all_that_may_not_run_is_answered_one_by_one_rows_21_and_23_to_27(scene: Scene) -> None:
    """The same again and again, many at once, with replies for nobody in between."""
    strange = [(row, code, *it) for row, (code, its) in REFUSED.items() for it in its if len(it[0]) < MIB]
    async with under_load(scene) as stage:

        async def trouble(number: int) -> None:
            for row, code, body, properties in strange[number:] + strange[:number]:
                assert error_of(await stage.stranger.ask(body, **properties)) == (code, "no", False), row
                await stage.stranger.reply_to(stage.reply_queue, body[:1000], correlation_id=f"{number}")

        await asyncio.gather(*(trouble(number) for number in range(8)))
        stage.handled += 8 * len(strange)
        stage.unmatched += 8 * len(strange)
    assert scene.ran("strange") == []


# Requests that cannot be answered: row 28


def dropped(lines: list[str]) -> int:
    """Requests that a worker's log tells to have been dropped."""
    told = [json.loads(line) for line in list(lines) if "request dropped" in line]
    return sum(1 + line.get("unsaid", 0) for line in told)


async def test_a_reply_to_that_names_a_queue_of_the_namespace_or_a_business_queue_is_not_run_row_28(
    scene: Scene,
) -> None:
    own = scene.namespace
    watched = [f"orders-{own}", f"{own}.req.billing", f"{own}.once.billing", f"{own}.job.target", f"x{own}.reply.x"]
    async with under_load(scene) as stage:
        for name in watched:
            await stage.stranger.queue(name)
        asked = [*watched, scene.queue, "target", f"{own}.requests", f"{own}.reply", "amq.gen", "Amq.gen-x", "x" * 255]
        strange: list[Sent] = [
            (body, {"reply_to": name, "correlation_id": "1", "type": kind})
            for name in asked
            for body, kind in ((GOOD, "once"), (b"not json", "once"), (GOOD, "nothing"), (GOOD, "fail"))
        ]
        for body, properties in strange:
            await stage.stranger.send(body, **properties)
        await asyncio.sleep(1.5 * SELDOM)  # the next one is told with the number of those that were not
        await stage.stranger.send(strange[0][0], **strange[0][1])
        await until(lambda: dropped(stage.worker.lines) > len(strange), what="the worker does not say what it dropped")
        for name in watched:
            assert await stage.stranger.messages_in(name) == 0
    assert dropped(stage.worker.lines) == len(strange) + 1
    assert scene.ran("strange") == []


# Results that cannot be sent: rows 29 and 23


async def test_a_result_that_cannot_be_sent_is_an_invalid_reply_for_its_caller_alone_rows_29_and_23(
    scene: Scene,
) -> None:
    async with under_load(scene) as stage:
        kinds = {"object": "cannot", "nan": "NaN", "large": "limit"}  # row 29: the first two; row 23: the last
        calls = [
            stage.client.call("target.odd", nonce=f"strange-{kind}-{n}", kind=kind) for kind in kinds for n in range(5)
        ]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, InvalidReply), outcome
            assert (outcome.executed, outcome.retryable) == ("yes", False)
        for kind in kinds:
            reply = await stage.stranger.ask(params(f"strange-{kind}-stranger", kind=kind), type="odd")
            assert error_of(reply) == ("INTERNAL", "yes", False)
        stage.handled += 18
    ran = scene.ran("strange")
    assert (len(ran), len(set(ran))) == (18, 18), "each ran once"


# Replies that cannot be read: rows 22, 23 and 24


def _broken(_: Any) -> Any:
    raise LookupError("a validator of the caller's own")


Told = tuple[bytes, dict[str, Any], Any, str]
"""Body and properties of a reply, the type that the caller expects, and what its error says of the handler."""

UNREADABLE: dict[str, list[Told]] = {
    "22-not-json-or-not-what-is-expected": [
        *((body, {}, None, "yes") for body in (b" ", b"not json", b"{", b"1 2", b"NaN", b'"\xff"', bytes(range(256)))),
        *((body, {}, int, "yes") for body in (b"", b"not json", b'"text"', b"null", b"[1]", b"1.5", b"NaN")),
        (b"1", {}, Annotated[int, pydantic.AfterValidator(_broken)], "yes"),
        *((b"1", {"content_type": "text/xml"}, kind, "yes") for kind in (None, int)),
        *((b"hello", {"content_type": "text/plain"}, kind, "yes") for kind in (None, str)),
        *((gzip.compress(b"1"), {"content_encoding": name}, int, "yes") for name in (None, "gzip")),
        (b"1", {"type": "postcard"}, None, "maybe"),
        *((body, {"type": "error"}, None, "maybe") for body in (b"", b"not json", b"[]", b"null", b'{"code": 5}')),
    ],
    "23-over-the-clients-limit": [
        (b"1".ljust(MIB + 1), {}, None, "yes"),
        (b"1".ljust(5 * MIB), {}, int, "yes"),
        (b'{"code": "UNKNOWN"}'.ljust(MIB + 1), {"type": "error"}, None, "maybe"),
    ],
    "24-nested-too-deep": [
        (b"[" * DEPTH + b"]" * DEPTH, {}, None, "yes"),
        (b"[" * DEPTH + b"]" * DEPTH, {}, list[Any], "yes"),
        (b'{"a":' * DEPTH + b"1" + b"}" * DEPTH, {}, None, "yes"),
        (b"[" * DEPTH, {}, None, "yes"),
        (
            b'{"code": "UNKNOWN", "details": ' + b"[" * DEPTH + b"]" * DEPTH + b"}",
            {"type": "error"},
            None,
            "maybe",
        ),
    ],
}


async def test_replies_that_cannot_be_read_are_an_invalid_reply_for_that_call_alone_rows_22_to_24(scene: Scene) -> None:
    async with under_load(scene) as stage:
        asked = stage.client.with_options(queue=stage.stranger.counter, timeout=30)
        for row, replies in UNREADABLE.items():
            good = asyncio.create_task(asked.call("work"))
            its = await stage.stranger.next_request()
            for body, properties, returns, executed in replies:
                bad = asyncio.create_task(asked.with_options(returns=returns).call("work"))
                await stage.stranger.reply(await stage.stranger.next_request(), body, **properties)
                with pytest.raises(InvalidReply) as caught:
                    await bad
                told = caught.value.executed, caught.value.retryable
                assert told == (executed, False), f"row {row}: {body[:60]!r} {properties}"
                assert len(str(caught.value)) < 10_000
            await stage.stranger.reply(its, b'"good"'.ljust(MIB))
            assert await good == "good", f"row {row}: it was under way all the time"


# Replies that come twice, late, or for nobody: rows 17, 18, 19 and 20


async def test_of_two_replies_to_a_call_the_first_wins_and_the_second_is_counted_row_17(scene: Scene) -> None:
    async with under_load(scene) as stage:
        asked = stage.client.with_options(queue=stage.stranger.counter, timeout=30)
        for number in range(20):
            call = asyncio.create_task(asked.call("work"))
            request = await stage.stranger.next_request()
            await stage.stranger.reply(request, b"%d" % number)
            await stage.stranger.reply(request, b'"second"')
            await stage.stranger.reply(request, b'{"code": "UNKNOWN", "executed": "no"}', type="error")
            assert await call == number
        stage.unmatched += 40


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_every_call_of_a_load_may_be_answered_twice_row_17(scene: Scene) -> None:
    """Somebody else takes a copy of every request, and answers it beside the worker: which comes first is open."""
    async with under_load(scene) as stage:
        async with stage.stranger.copies() as copies:
            for _ in range(200):
                copy = await copies.next()
                await stage.stranger.reply(copy, json.dumps(json.loads(copy.body)["nonce"]).encode())
        stage.unmatched += 200


async def test_a_late_reply_is_dropped_and_counted_and_reaches_no_other_call_row_18(scene: Scene) -> None:
    async with under_load(scene) as stage:
        asked = stage.client.with_options(queue=stage.stranger.counter)
        # Their numbers tell them from the others, since some may come to the stranger later still.
        early = [asked.with_options(timeout=2).call("work", number=-1 - number) for number in range(30)]
        for outcome in await asyncio.gather(*early, return_exceptions=True):
            assert isinstance(outcome, CallTimeout), outcome
            assert outcome.executed == "maybe"
        pending = [asyncio.create_task(asked.call("work", number=number)) for number in range(30)]
        its: dict[int, AbstractIncomingMessage] = {}
        late: list[AbstractIncomingMessage] = []
        while len(its) < len(pending):
            request = await stage.stranger.next_request()
            number = json.loads(request.body)["number"]
            if number < 0:
                late.append(request)
            else:
                its[number] = request
        assert late
        for number, request in enumerate(late):
            if number % 3:
                await stage.stranger.reply(request, b'"late"')
            else:
                await stage.stranger.reply(request, b'{"code": "UNAVAILABLE", "executed": "no"}', type="error")
        for number in reversed(its):
            await stage.stranger.reply(its[number], b"%d" % number)
        assert await asyncio.gather(*pending) == list(range(30))
        stage.unmatched += len(late)


async def test_replies_that_name_no_call_are_dropped_and_counted_row_19(scene: Scene) -> None:
    async with under_load(scene) as stage:
        held = asyncio.create_task(stage.client.with_options(queue=stage.stranger.counter, timeout=30).call("work"))
        request = await stage.stranger.next_request()
        known = request.correlation_id
        assert known is not None
        prefix = known.partition("-")[0]
        expired = {"x-death": [{"reason": "expired", "queue": scene.queue, "count": 1}]}
        strays: list[Sent] = [
            *(
                (b"1", {"correlation_id": name})
                for name in (
                    None,
                    "",
                    "x",
                    ".",
                    "x" * 255,
                    "\N{SNOWMAN}",
                    prefix,
                    f"{prefix}-",
                    f"{prefix}-ffffffff",
                    f"{known} ",
                    f" {known}",
                    known.upper() + "x",
                    f"{known}.2.2",
                )
            ),
            (b"1", {"type": None, "content_type": None}),
            (b"not json", {"correlation_id": "x", "type": "error"}),
            (b"1", {"correlation_id": "x", "headers": expired}),
            (b"1", {"headers": expired}),
            (b"1", {"correlation_id": "x", "headers": {"deep": DEEP}}),
            (b"1", {"correlation_id": "x", "headers": {"x-large": "x" * 100_000}}),
            (b"1".ljust(5 * MIB), {"correlation_id": "x"}),
        ]
        for body, properties in strays:
            await stage.stranger.reply_to(stage.reply_queue, body, **properties)
        await stage.stranger.reply(request, b'"its own"')
        assert await held == "its own"
        stage.unmatched += len(strays)


async def test_a_correlation_id_that_collides_is_refused_at_insertion_row_20(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with under_load(scene) as stage:
        asked = stage.client.with_options(queue=stage.stranger.counter, timeout=30)
        first = asyncio.create_task(asked.call("work"))
        request = await stage.stranger.next_request()
        assert request.correlation_id is not None
        taken = request.correlation_id.encode()
        with monkeypatch.context() as patch:  # nothing else runs meanwhile: a call that is refused waits for nothing
            patch.setattr(stage.client._calls, "next_id", lambda: taken)
            with pytest.raises(ConfigurationError, match="is under way already"):
                await asked.call("work")
        await stage.stranger.reply(request, b'"first"')
        assert await first == "first"
        assert stage.stranger.requests.empty()


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_ids_of_many_clients_differ_and_an_id_that_two_senders_use_is_no_harm_row_20(scene: Scene) -> None:
    async with under_load(scene) as stage, AsyncExitStack() as others:
        loads = []
        for _ in range(8):
            client = await others.enter_async_context(Client(scene.url, namespace=scene.namespace))
            loads.append(await others.enter_async_context(scene.load(client, callers=3, think=THINK)))
        async with stage.stranger.copies() as copies:
            ids = [(await copies.next()).correlation_id for _ in range(200)]
        assert len(ids) == len(set(ids))
        prefixes = {name.partition("-")[0] for name in ids}
        assert len(prefixes) == 9
        assert all(len(prefix) == 8 for prefix in prefixes)
        assert len({name.rpartition("-")[2] for name in ids}) == len(ids)
        # An ID of somebody's call, with a reply_to of one's own; then two of the same ID and reply_to at once.
        assert result_of(await stage.stranger.ask(params("strange-0"), correlation_id=ids[-1])) == "strange-0"
        own = {"correlation_id": "mine", "reply_to": stage.stranger._inbox.name}
        await stage.stranger.send(params("strange-1", seconds=0.2), **own)
        await stage.stranger.send(params("strange-2"), **own)
        await until(lambda: len(stage.stranger.replies.get("mine", ())) == 2)
        told = stage.stranger.replies.pop("mine")
        assert sorted(result_of(reply) for reply in told) == ["strange-1", "strange-2"]
        stage.handled += 3
    assert sum(load.ledger.failed for load in loads) == 0
    assert sorted(scene.ran("strange")) == ["strange-0", "strange-1", "strange-2"]


# What its caller is told before anything is sent: rows 23, 27 and 46


def _nested() -> list[Any]:
    nested: list[Any] = []
    for _ in range(DEPTH):
        nested = [nested]
    return nested


def _circular() -> list[Any]:
    circular: list[Any] = []
    circular.append(circular)
    return circular


CULPRITS: dict[str, Callable[[], Any]] = {
    "object": object,
    "nan": lambda: float("nan"),
    "infinity": lambda: [-float("inf")],
    "lone surrogate": lambda: "\ud800",
    "secret": lambda: {"inside": SecretStr("s3cret")},
    "long integer": lambda: 10**5000,
    "function": lambda: print,
    "type": lambda: int,
    "key": lambda: {object(): 1},
    "error": lambda: ValueError("x"),
    "circle": _circular,
    "depth": _nested,
}


async def test_what_cannot_be_sent_is_told_to_its_caller_and_nothing_is_sent_rows_46_23_and_27(scene: Scene) -> None:
    async with under_load(scene) as stage:
        call = stage.client.call
        for what, make in CULPRITS.items():  # row 46
            with pytest.raises(NotSerializable, match="parameter 'culprit'") as caught:
                await call("target.once", nonce="strange", culprit=make(), seconds=0)
            assert isinstance(caught.value, TypeError), what
            assert (caught.value.executed, caught.value.retryable) == ("no", False)
            with pytest.raises(NotSerializable, match="parameter 1"):
                await call("target.once", "strange", make())
        for size in (MIB, 5 * MIB):  # row 23
            for args, named in (((), {"nonce": "x" * size}), (("x" * size,), {})):
                with pytest.raises(TooLarge, match=rf"the limit is {MIB} \(max_body\)") as refused:
                    await call("target.once", *args, **named)
                assert (refused.value.executed, refused.value.retryable) == ("no", False)
        for metadata in ({"x-large": "x" * 200_000}, {f"x-{n}": "x" * 100 for n in range(2_000)}):  # row 27
            maker = stage.client.with_options(metadata=metadata)
            for _ in range(20):
                with pytest.raises(TooLarge, match="the limit is 8192") as refused:
                    await maker.call("target.once", nonce="strange")
                assert (refused.value.executed, refused.value.retryable) == ("no", False)
        edge = "x" * (MIB - len(b'{"nonce":""}'))  # the body is just within its limit, and so is the result's
        metadata = {"x-large": "x" * 8_000}
        assert await stage.client.with_options(metadata=metadata).call("target.once", nonce=edge) == edge
        stage.handled += 1
    assert scene.ran("strange") == []
    assert [len(nonce) for nonce in scene.ran("x")] == [len(edge)]


# Messages that are sent again later: row 30


async def test_a_request_replayed_after_its_deadline_is_answered_as_expired_and_not_run_again_row_30(
    scene: Scene,
) -> None:
    async with under_load(scene) as stage:
        short = scene.load(stage.client, callers=0, timeout=10)
        async with stage.stranger.copies() as copies:
            told = await asyncio.gather(*(short.call() for _ in range(20)))
            assert short.ledger.failed == 0
            old = await copies.of(told)
        # The stranger hears what is said of its own; what is said of the others goes to the client, which drops it.
        now = int(time.time() * 1000)
        times = {"rpcq-deadline": now + 10_000, "rpcq-timeout": 10_000}
        own = await stage.stranger.ask(params("strange"), headers=times, correlation_id="mine")
        assert result_of(own) == "strange"
        deadlines = [now + 10_000, *(int(str(request.headers["rpcq-deadline"])) for request in old)]
        await asyncio.sleep(max(deadlines) / 1000 - time.time() + 0.05)
        for request in old:
            await stage.stranger.send_again(request)
        again = await stage.stranger.ask(params("strange"), headers=times, correlation_id="mine again")
        assert error_of(again) == ("DEADLINE_EXCEEDED", "no", True)
        stage.handled += 20 + 2
        stage.expired += 20 + 1
        stage.unmatched += 20
    assert scene.ran("strange") == ["strange"]
    assert [scene.ran().count(nonce) for nonce in told] == [1] * 20


async def test_a_request_replayed_with_its_idempotency_key_is_answered_and_not_run_again_row_30(scene: Scene) -> None:
    """The worker remembers results by key, and refuses a key that comes with other parameters."""
    async with under_load(scene) as stage:
        idempotent = scene.load(stage.client, callers=0, method="again", idempotent=True, timeout=30)
        async with stage.stranger.copies() as copies:
            told = await asyncio.gather(*(idempotent.call() for _ in range(20)))
            assert idempotent.ledger.failed == 0
            requests = await copies.of(told)
        for request in requests:
            await stage.stranger.send_again(request)  # within its deadline: its key alone says that it ran
        stage.handled += 20
        stage.unmatched += 20
        for number in range(5):
            keyed = {"type": "again", "headers": {"rpcq-idempotency-key": f"key of {scene.namespace} {number}"}}
            for _ in range(3):
                assert result_of(await stage.stranger.ask(params(f"strange-{number}"), **keyed)) == f"strange-{number}"
            other = await stage.stranger.ask(params(f"strange-other-{number}"), **keyed)
            assert error_of(other) == ("INVALID_ARGUMENT", "no", False)
            assert result_of(await stage.stranger.ask(params(f"strange-{number}"), **keyed)) == f"strange-{number}"
        stage.handled += 25
        keyed = {"type": "again", "headers": {"rpcq-idempotency-key": f"key of {scene.namespace}"}}
        both = [stage.stranger.ask(params("strange-both", seconds=0.3), **keyed) for _ in range(2)]
        for reply in await asyncio.gather(*both):  # the second comes while the first runs, or later
            assert result_of(reply) == "strange-both"
        stage.handled += 2
        stats = await stage.stats()
        assert stats.replayed == 20 + 15 + 1
    assert [scene.ran().count(nonce) for nonce in told] == [1] * 20
    assert sorted(scene.ran("strange")) == [*(f"strange-{number}" for number in range(5)), "strange-both"]


# Clocks that are an hour apart: row 31

clock_is_off: ContextVar[float] = ContextVar("clock_is_off", default=0.0)
"""Seconds by which the wall clock of a caller is ahead."""


class OffClock:
    """What the client knows as `time`: the wall clock is off for the tasks that say so, and for no other."""

    monotonic = staticmethod(time.monotonic)

    @staticmethod
    def time() -> float:
        return time.time() + clock_is_off.get()


@asynccontextmanager
async def load_whose_clock_is_off(stage: Stage, seconds: float, **options: Any) -> AsyncIterator[Load]:
    """A load of the same client: its tasks, begun here, keep the clock that they are begun with."""
    token = clock_is_off.set(seconds)
    try:
        async with stage.scene.load(stage.client, **options) as load:
            yield load
    finally:
        clock_is_off.reset(token)


async def test_to_a_worker_whose_clock_is_an_hour_ahead_calls_fail_as_expired_and_it_says_why_row_31(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rpcq.calls.invoking, rpcq.calls.sending):
        monkeypatch.setattr(module, "time", OffClock)
    async with under_load(scene, batching=False) as stage:  # a message has one clock
        async with load_whose_clock_is_off(stage, -HOUR, callers=20, think=0.02) as behind:
            await until(lambda: behind.ledger.ended > 100)
        told = behind.ledger.ended
        assert behind.ledger.counts == {"CallTimeout/no": told}
        past = {"rpcq-deadline": int((time.time() - HOUR) * 1000), "rpcq-timeout": 5_000}
        reply = await stage.stranger.ask(params("strange"), headers=past)
        assert error_of(reply) == ("DEADLINE_EXCEEDED", "no", True)
        stage.handled += 1
        stage.expired += told + 1
        lines = [json.loads(line) for line in list(stage.worker.lines) if "request expired on arrival" in line]
        assert 1 <= len(lines) < told, "it says so now and then, and not of each"
        assert "compare the clocks" in lines[0]["event"]
        assert (HOUR - 60) * 1000 < lines[0]["late_ms"] <= HOUR * 1000
    assert scene.ran("strange") == []


async def test_at_a_worker_whose_clock_is_an_hour_behind_the_relative_time_counts_row_31(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rpcq.calls.invoking, rpcq.calls.sending):
        monkeypatch.setattr(module, "time", OffClock)
    async with under_load(scene, batching=False) as stage:  # a message has one clock
        future = {"rpcq-deadline": int((time.time() + HOUR) * 1000), "rpcq-timeout": 10_000}
        assert result_of(await stage.stranger.ask(params("strange-quick"), headers=future)) == "strange-quick"
        async with (
            load_whose_clock_is_off(stage, HOUR, callers=20, think=THINK) as ahead,
            load_whose_clock_is_off(stage, HOUR, callers=0, timeout=5.0) as stuck,
        ):
            calls = [asyncio.create_task(stuck.call(seconds=60)) for _ in range(10)]
            headers = {**future, "rpcq-timeout": 3000}
            slow = await stage.stranger.ask(params("strange-slow", seconds=60), headers=headers)
            assert error_of(slow) == ("DEADLINE_EXCEEDED", "yes", False)  # and not an hour later
            await asyncio.gather(*calls)
            await ahead.through(100)
        assert ahead.ledger.failed == 0
        assert stuck.ledger.count(CallTimeout) == 10
        assert stuck.ledger.count("CallTimeout/no") == 0
        stage.unmatched += stuck.ledger.count("CallTimeout/maybe")  # to these, the worker's word came too late
        await until(lambda: len(scene.ran("cancelled")) == 11)
        stage.handled += 2
    assert sorted(scene.ran("strange")) == ["strange-quick", "strange-slow"]
