"""Requests and replies of programs that do not use rpcq, and queues that they declared, on both transports."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from rpcq import CallError, CallTimeout, Client, InvalidReply, OutcomeUnknown, Service, ServiceUnavailable, Worker
from rpcq.errors import NotFound
from rpcq.transport.base import Message
from rpcq.wire.properties import Properties, decode, encode, encode_table
from rpcq.wire.topology import Queue
from support.places import lose
from support.seam import End, Seam

QUIET = 0.3
"""Seconds to wait for what should not come."""


@dataclass(frozen=True)
class Came:
    """What came to the reply queue of a foreign program."""

    properties: Properties
    body: bytes | None

    @property
    def value(self) -> Any:
        assert self.properties.type == b"result", self.body
        assert self.body is not None
        return json.loads(self.body)

    @property
    def error(self) -> tuple[str, str, str]:
        """Code, `executed` and message."""
        assert self.properties.type == b"error", self.body
        assert self.body is not None
        said = json.loads(self.body)
        return said["code"], said["executed"], said["message"]


async def ask(end: End, key: str, body: bytes, **properties: Any) -> Came:
    """Publish a request to the default exchange, and wait for the reply in the first queue of `end`."""
    end.publish(key, body, reply_to=end.names[0].encode(), **properties)
    delivery = await end.inbox.next()
    return Came(decode(delivery.properties), delivery.body)


def publish_raw(end: End, key: str, properties: bytes, body: bytes) -> None:
    """Publish with properties that `encode` refuses to write."""
    end.transport.publish(Message(b"", key.encode(), b"raw", properties, body, lambda _: None))


def nested(**properties: Any) -> bytes:
    """Properties with a header that is nested 40 deep."""
    value = b""
    for _ in range(40):
        value = b"\x01aF" + struct.pack(">I", len(value)) + value
    entries = encode_table({"x-user": "ada"})[4:] + value
    flat = encode(Properties(headers={}, **properties))
    return flat[:2] + struct.pack(">I", len(entries)) + entries + flat[6:]  # after the flags


class Fibonacci:
    """A service of one method, which notes what it ran."""

    def __init__(self, queue: str, **options: Any) -> None:
        self.ran: list[int] = []
        self.service = Service("fibonacci", queue=queue, **options)
        self.service.method(self.fib)

    async def fib(self, n: int = 10) -> int:
        self.ran.append(n)
        before, last = 0, 1
        for _ in range(n):
            before, last = last, before + last
        return before


@asynccontextmanager
async def serving(seam: Seam, service: Service, **options: Any) -> AsyncIterator[Worker]:
    async with Worker(service, url=seam.url, namespace=seam.namespace, **options) as worker:
        yield worker


@asynccontextmanager
async def scene(seam: Seam, **options: Any) -> AsyncIterator[tuple[Fibonacci, str, End]]:
    """A foreign program with a reply queue, and a worker with a queue of its own name."""
    queue = f"{seam.namespace}.rpc_queue"
    seam.lasting.append(queue)
    fibonacci = Fibonacci(queue, **options)
    async with seam.opened(seam.own_queue()) as end, serving(seam, fibonacci.service):
        yield fibonacci, queue, end


# Requests.


PROPERTIES: list[dict[str, bytes]] = [
    {},
    {"content_type": b""},
    {"content_type": b"text/plain"},
    {"content_type": b"text/plain", "content_encoding": b"UTF-8"},
    {"content_type": b"application/octet-stream"},
    {"content_type": b"application/json; charset=utf8", "content_encoding": b"utf-8"},
    {"content_type": b"application/data", "content_encoding": b"binary"},
]


async def test_json_is_read_whatever_content_type_a_client_sends(seam: Seam) -> None:
    async with scene(seam) as (_, queue, end):
        for properties in PROPERTIES:
            came = await ask(end, queue, b"30", **properties)
            assert came.value == 832040, properties
            refused = await ask(end, queue, b"thirty", **properties)
            assert refused.error[:2] == ("INVALID_ARGUMENT", "no"), properties
            assert "not JSON" in refused.error[2], properties


REFUSED: list[tuple[bytes, dict[str, Any], str]] = [
    (b"30", {"content_type": b"text/xml"}, "got 'text/xml'"),
    (b"30", {"content_type": b"text/plain; charset=utf-16"}, "charset=utf-16"),
    (gzip.compress(b"30"), {"content_encoding": b"gzip"}, "no content encoding; got 'gzip'"),
    (gzip.compress(b"30"), {}, "compressed with gzip"),
    (b"\xef\xbb\xbf30", {"content_type": b"text/plain"}, "byte order mark (U+FEFF)"),
    (b"\xff\xfe3\x000\x00", {}, "byte order mark of UTF-16"),
    (b"30", {"headers": {"rpcq-method": 5}}, "the header rpcq-method must be a string; got 5"),
]


async def test_what_cannot_be_read_is_refused_with_its_cause(seam: Seam) -> None:
    async with scene(seam) as (fibonacci, queue, end):
        for body, properties, said in REFUSED:
            code, executed, message = (await ask(end, queue, body, **properties)).error
            assert (code, executed) == ("INVALID_ARGUMENT", "no")
            assert said in message
        publish_raw(end, queue, nested(correlation_id=b"deep", reply_to=end.names[0].encode()), b"30")
        delivery = await end.inbox.next()  # headers that are nested too deep
        came = Came(decode(delivery.properties), delivery.body)
        assert came.properties.correlation_id == b"deep"
        assert came.error == ("INVALID_ARGUMENT", "no", "headers must be nested at most 16 deep")
        assert fibonacci.ran == []


async def test_an_empty_body_is_no_parameters_and_only_requests_with_times_get_headers(
    seam: Seam,
) -> None:
    async with scene(seam) as (fibonacci, queue, end):
        assert (await ask(end, queue, b"")).value == 55
        assert fibonacci.ran == [10]
        assert (await ask(end, queue, b"30")).properties.headers is None
        assert (await ask(end, queue, b"thirty")).properties.headers is None
        assert (await ask(end, queue, b"30", headers={"rpcq-timeout": 5000})).properties.headers is None
        times = {"rpcq-deadline": int(time.time() * 1000) + 5000, "rpcq-timeout": 5000}
        for sent in (times, {name: str(value) for name, value in times.items()}):
            headers = (await ask(end, queue, b"30", headers=sent)).properties.headers
            assert headers is not None
            assert {type(value) for value in headers.values()} == {float}
            assert headers.keys() == {"rpcq-queue-ms", "rpcq-handler-ms"}


async def test_the_method_may_be_in_a_header_and_a_listed_type_stands_for_the_default_method(seam: Seam) -> None:
    queue = f"{seam.namespace}.rpc_queue"
    seam.lasting.append(queue)
    service = Service("fibonacci", queue=queue, default_method="double", default_types=("call",))

    @service.method
    async def double(n: int) -> int:
        return 2 * n

    @service.method
    async def negate(n: int) -> int:
        return -n

    async with seam.opened(seam.own_queue()) as end, serving(seam, service):
        assert (await ask(end, queue, b"7", headers={"rpcq-method": "negate"})).value == -7
        assert (await ask(end, queue, b"7", headers={"rpcq-method": "negate"}, type=b"call")).value == -7
        assert (await ask(end, queue, b"7", headers={"rpcq-method": "negate"}, type=b"double")).value == -7
        assert (await ask(end, queue, b"7", type=b"call")).value == 14
        assert (await ask(end, queue, b"7")).value == 14
        for properties in ({"type": b"cal"}, {"headers": {"rpcq-method": "cal"}, "type": b"call"}):
            assert (await ask(end, queue, b"7", **properties)).error[:2] == ("UNIMPLEMENTED", "no")


async def test_a_request_without_a_correlation_id_is_replied_to_by_its_message_id(seam: Seam) -> None:
    async with scene(seam) as (fibonacci, queue, end):
        came = await ask(end, queue, b"30", correlation_id=b"", message_id=b"message-1")
        assert (came.properties.correlation_id, came.value) == (b"message-1", 832040)
        came = await ask(end, queue, b"30", correlation_id=b"own", message_id=b"message-2")
        assert came.properties.correlation_id == b"own"
        end.publish(queue, b"31", reply_to=end.names[0].encode(), correlation_id=b"")  # neither: it is dropped
        assert (await ask(end, queue, b"32")).value == 2178309
        await asyncio.sleep(QUIET)
        assert fibonacci.ran == [30, 30, 32]
        assert len(end.inbox.all) == 3


# Replies.


@asynccontextmanager
async def foreign_server(seam: Seam) -> AsyncIterator[tuple[End, Client]]:
    """A queue that a foreign program serves, and a client of rpcq."""
    async with (
        seam.opened(seam.queue("server")) as end,
        Client(seam.url, namespace=seam.namespace, timeout=5.0) as client,
    ):
        yield end, client


async def call(end: End, client: Client, body: bytes, *, returns: Any = None, **properties: Any) -> Any:
    """A call to the queue of `end`, which replies with this."""
    asked = client.with_options(queue=end.names[0], returns=returns)
    answer = asyncio.create_task(asked.call("work", 1))
    delivery = await end.inbox.next()
    delivery.ack()
    request = decode(delivery.properties)
    assert request.reply_to is not None
    end.publish(request.reply_to.decode(), body, correlation_id=request.correlation_id, **properties)
    return await answer


async def test_json_is_read_whatever_content_type_a_server_sends(seam: Seam) -> None:
    async with foreign_server(seam) as (end, client):
        for properties in PROPERTIES:
            assert await call(end, client, b'{"n": 1}', **properties) == {"n": 1}
            assert await call(end, client, b"832040", returns=int, type=b"result", **properties) == 832040
            assert await call(end, client, b"", **properties) is None
            for returns in (None, int):
                with pytest.raises(InvalidReply, match=r"not JSON: .*; its body is 'hello'") as caught:
                    await call(end, client, b"hello", returns=returns, **properties)
                assert caught.value.executed == "yes"


UNREADABLE: list[tuple[bytes, dict[str, Any], str]] = [
    (b"1", {"content_type": b"text/xml"}, "got 'text/xml'; its body is '1'"),
    (gzip.compress(b"1"), {"content_encoding": b"gzip"}, "no content encoding; got 'gzip'"),
    (gzip.compress(b"1"), {}, "compressed with gzip"),
    (b"\xef\xbb\xbf1", {}, "byte order mark (U+FEFF)"),
]


async def test_a_reply_that_cannot_be_read_is_an_invalid_reply_with_its_cause(seam: Seam) -> None:
    async with foreign_server(seam) as (end, client):
        for (body, properties, said), returns in itertools.product(UNREADABLE, (None, int)):
            with pytest.raises(InvalidReply) as caught:
                await call(end, client, body, returns=returns, **properties)
            assert said in str(caught.value)
            assert caught.value.executed == "yes"


async def test_a_foreign_error_is_kept_in_the_text_and_the_details_of_the_error(seam: Seam) -> None:
    said = {"error": {"type": "ValueError", "message": "ValueError('not above 90')", "args": [91]}}
    async with foreign_server(seam) as (end, client):
        with pytest.raises(CallError, match="not above 90") as caught:
            await call(end, client, json.dumps(said).encode(), type=b"error", content_type=b"application/json")
        assert (type(caught.value), caught.value.executed, caught.value.details) == (InvalidReply, "maybe", said)
        with pytest.raises(InvalidReply, match="its body is 'division by zero'"):
            await call(end, client, b"division by zero", type=b"error", content_type=b"text/plain")


async def test_a_request_to_a_queue_has_headers_of_types_that_old_clients_know(seam: Seam) -> None:
    async with foreign_server(seam) as (end, client):
        assert await call(end, client, b"1") == 1
        headers = decode(end.inbox.all[0].properties).headers or {}
        assert headers.keys() == {"rpcq-deadline", "rpcq-timeout"}
        assert abs(int(headers["rpcq-deadline"]) - (time.time() + 5) * 1000) < 5000
        assert isinstance(headers["rpcq-deadline"], str)
        assert b"rpcq-timeoutI" in end.inbox.all[0].properties


# Queues that exist already.


async def declared(seam: Seam, queue: Queue) -> str:
    """Have a foreign program declare a queue, and go; the queue stays."""
    seam.lasting.append(queue.name)
    async with seam.opened(queue):
        return queue.name


def plain(seam: Seam) -> Queue:
    return Queue(f"{seam.namespace}.rpc_queue")


QUEUES = {
    "plain": {},
    "durable": {"durable": True},
    "limited": {"durable": True, "arguments": {"x-max-length": 7, "x-overflow": "reject-publish"}},
    "quorum": {"durable": True, "arguments": {"x-queue-type": "quorum"}},
}


@pytest.mark.parametrize("kind", QUEUES)
async def test_an_existing_queue_is_served_as_it_is(seam: Seam, kind: str) -> None:
    queue = replace(plain(seam), **QUEUES[kind])  # type: ignore[arg-type]  # its fields
    async with seam.opened(seam.own_queue()) as end:
        await declared(seam, queue)
        fibonacci = Fibonacci(
            queue.name, declare_queue=False, queue_type="quorum" if kind == "quorum" else "classic", timeout=5.0
        )
        for _ in range(2):  # a worker that comes back finds it as it was
            async with serving(seam, fibonacci.service), Client(seam.url, namespace=seam.namespace) as client:
                assert (await ask(end, queue.name, b"30")).value == 832040
                assert await client.with_options(queue=queue.name, timeout=5.0).call("fib", 7) == 13
                with pytest.raises(ServiceUnavailable) as caught:  # it is not bound
                    await client.with_options(timeout=5.0).call("fibonacci.fib", 7)
                assert caught.value.executed == "no"
            await declared(seam, queue)  # its owner finds it as it was, too
    assert fibonacci.ran == [30, 7, 30, 7]


async def test_old_servers_and_workers_serve_one_queue_meanwhile(seam: Seam) -> None:
    queue = plain(seam)
    async with seam.opened(seam.own_queue()) as client:
        await declared(seam, queue)
        fibonacci = Fibonacci(queue.name, declare_queue=False)
        async with seam.opened(queue) as old, serving(seam, fibonacci.service):
            for _ in range(10):
                client.publish(queue.name, b"7", reply_to=client.names[0].encode())
            for _ in range(5):
                request = decode((await old.inbox.next()).properties)
                assert request.reply_to is not None
                await old.sent(request.reply_to.decode(), b'"old"', correlation_id=request.correlation_id)
            came = [(await client.inbox.next()).body for _ in range(10)]
    assert sorted(came, key=str) == [b'"old"'] * 5 + [b"13"] * 5


async def test_a_queue_that_does_not_exist_is_named_and_not_declared(seam: Seam) -> None:
    queue = f"{seam.namespace}.rpc_queue"
    async with seam.opened(seam.own_queue()):
        for _ in range(2):
            worker = Worker(Fibonacci(queue, declare_queue=False).service, url=seam.url, namespace=seam.namespace)
            with pytest.raises(
                NotFound, match=f"the queue '{queue}' must exist, because its service has declare_queue"
            ):
                await worker.start()


async def test_an_expiry_in_such_a_queue_is_silent_and_a_maybe(seam: Seam) -> None:
    queue = plain(seam)
    async with seam.opened(seam.own_queue()), Client(seam.url, namespace=seam.namespace) as client:
        await declared(seam, queue)
        began = time.monotonic()
        with pytest.raises(CallTimeout) as caught:
            await client.with_options(queue=queue.name, timeout=0.5).call("fib", 7)
        assert time.monotonic() - began >= 0.49
        assert (caught.value.executed, caught.value.retryable) == ("maybe", False)


@pytest.mark.parametrize("kind", ["plain", "quorum"])
async def test_a_request_that_a_lost_worker_held_is_not_run_again_in_such_a_queue(seam: Seam, kind: str) -> None:
    queue = replace(plain(seam), **QUEUES[kind])  # type: ignore[arg-type]  # its fields
    options: Any = {"declare_queue": False, "queue_type": "quorum" if kind == "quorum" else "classic"}
    async with seam.opened(seam.own_queue()), Client(seam.url, namespace=seam.namespace) as client:
        await declared(seam, queue)
        hanging, begun = Service("fibonacci", queue=queue.name, **options), asyncio.Event()

        @hanging.method
        async def fib(n: int) -> int:
            begun.set()
            await asyncio.Event().wait()
            return n

        lost = Worker(hanging, url=seam.url, namespace=seam.namespace, grace=0.1)
        await lost.start()
        answer = asyncio.create_task(client.with_options(queue=queue.name, timeout=10.0).call("fib", 7))
        await begun.wait()
        await lose(lost)
        fibonacci = Fibonacci(queue.name, **options)
        async with serving(seam, fibonacci.service):
            with pytest.raises(OutcomeUnknown) as caught:
                await answer
    assert caught.value.executed == "maybe"
    assert fibonacci.ran == []
