"""Programs that know nothing of rpcq, in Python with pika and in Node with amqplib, on the other side of the wire.

Each program of `programs/` runs as a process of its own against the real broker; what is expected of rpcq is what the
wire contract promises to any AMQP 0-9-1 client.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import HeadersType

from rpcq import CallTimeout, Client, InvalidReply, RemoteError, Service, ServiceUnavailable, Worker
from support.foreign import INSTALLING, PROGRAMS, Line, Server, run, serving

NODE = pytest.mark.timeout(INSTALLING + 60)
"""The first test that asks for the Node client waits for npm."""


def fibonacci(n: int) -> int:
    before, last = 0, 1
    for _ in range(n):
        before, last = last, before + last
    return before


# Running programs


async def pika_program(name: str, *arguments: str, stdin: str = "") -> list[Line]:
    return await run(sys.executable, PROGRAMS / name, *arguments, stdin=stdin)


async def send(url: str, *requests: Line, **spec: Any) -> list[Line]:
    """Has `pika_requests.py` send these; the messages that came back, in the order in which they came."""
    return await pika_program("pika_requests.py", url, stdin=json.dumps({"requests": requests, **spec}))


async def ask(url: str, *requests: Line) -> list[Line]:
    """Has `pika_requests.py` send these, each with a correlation ID of its own; one reply for each, in their order."""
    ids = [(f"request {number}").encode().hex() for number in range(len(requests))]
    lines = await send(url, *({**each, "correlation_id_hex": own} for each, own in zip(requests, ids, strict=True)))
    by_id = {line["correlation_id_hex"]: line for line in lines}
    assert len(lines) == len(ids), f"{len(ids)} requests, but these replies: {lines}"
    assert by_id.keys() == set(ids)
    return [by_id[own] for own in ids]


@asynccontextmanager
async def pika_server(url: str, queue: str, *reply: str) -> AsyncIterator[Server]:
    async with serving(sys.executable, PROGRAMS / "pika_server.py", url, queue, *reply) as server:
        yield server


# What they talk to


class Toolbox:
    """A service with a few methods, which notes what it ran."""

    def __init__(self, **options: Any) -> None:
        self.ran: list[Any] = []
        self.service = Service("toolbox", **options)

        @self.service.method
        async def subtract(minuend: int, subtrahend: int) -> int:
            self.ran.append((minuend, subtrahend))
            return minuend - subtrahend

        @self.service.method
        async def note(value: str) -> str:
            self.ran.append(value)
            return value

        @self.service.method
        async def fail() -> None:
            raise LookupError("the password is swordfish")


def request(namespace: str, method: str | None, body: str, **more: Any) -> Line:
    """A request to the toolbox, through the namespace's exchange."""
    properties = more.pop("properties", {})
    if method is not None:
        properties = {"type": method, **properties}
    place = {"exchange": f"{namespace}.requests", "routing_key": "toolbox"}
    return {**place, "body": body, "properties": properties, **more}


def result_of(reply: Line) -> Any:
    """The value of a reply that must be a result, as the contract shapes it."""
    assert reply["properties"].get("type") == "result", reply
    assert reply["properties"]["content_type"] == "application/json"
    assert reply["queue"] is None
    return json.loads(reply["body"])


def error_of(reply: Line) -> tuple[str, str]:
    """Code and `executed` of a reply that must be an error, as the contract shapes it."""
    assert reply["properties"].get("type") == "error", reply
    assert reply["properties"]["content_type"] == "application/json"
    assert reply["queue"] is None
    body = json.loads(reply["body"])
    assert {"code", "message", "executed", "retryable"} <= body.keys() <= FIELDS_OF_AN_ERROR, body
    assert isinstance(body["message"], str)
    assert body["message"]
    assert isinstance(body["retryable"], bool)
    return body["code"], body["executed"]


FIELDS_OF_AN_ERROR = {"code", "message", "executed", "retryable", "details", "incident"}


def fib_service(queue: str) -> Service:
    service = Service("fib", queue=queue)

    @service.method
    async def fib(n: int) -> int:
        return fibonacci(n)

    return service


# 1. Plain clients call an rpcq service that names its queue


async def test_a_plain_pika_client_gets_its_answers_from_an_rpcq_service(
    rabbitmq_url: str, namespace: str, own_queue: str
) -> None:
    async with Worker(fib_service(own_queue), url=rabbitmq_url, namespace=namespace):
        printed = await pika_program("pika_client.py", rabbitmq_url, own_queue, "30", "0", "7")
    assert printed == [
        {"sent": "30", "reply": "832040"},
        {"sent": "0", "reply": "0"},
        {"sent": "7", "reply": "13"},
    ]


async def test_plain_pika_clients_at_once_each_get_their_own_answers(
    rabbitmq_url: str, namespace: str, own_queue: str
) -> None:
    async with Worker(fib_service(own_queue), url=rabbitmq_url, namespace=namespace):
        asked = [[str(first), str(first + 1), str(first + 2)] for first in range(10, 60, 10)]
        printed = await asyncio.gather(
            *(pika_program("pika_client.py", rabbitmq_url, own_queue, *numbers) for numbers in asked)
        )
    assert printed == [[{"sent": n, "reply": str(fibonacci(int(n)))} for n in numbers] for numbers in asked]


@NODE
async def test_a_plain_node_client_gets_its_answers_from_an_rpcq_service(
    rabbitmq_url: str, namespace: str, own_queue: str, node_client: list[str | Path]
) -> None:
    numbers = [str(n) for n in range(40)]
    async with Worker(fib_service(own_queue), url=rabbitmq_url, namespace=namespace):
        printed = await run(*node_client, rabbitmq_url, own_queue, *numbers)
    assert printed == [{"sent": n, "reply": str(fibonacci(int(n)))} for n in numbers]


@NODE
async def test_node_and_pika_clients_and_an_rpcq_client_share_one_service(
    rabbitmq_url: str, namespace: str, own_queue: str, node_client: list[str | Path]
) -> None:
    async with (
        Worker(fib_service(own_queue), url=rabbitmq_url, namespace=namespace),
        Client(rabbitmq_url, namespace=namespace) as client,
    ):
        from_node, from_pika, by_queue, by_name = await asyncio.gather(
            run(*node_client, rabbitmq_url, own_queue, "20"),
            pika_program("pika_client.py", rabbitmq_url, own_queue, "21"),
            client.with_options(queue=own_queue, timeout=10).call("fib", 22),
            client.with_options(timeout=10).call("fib.fib", n=23),
        )
    assert from_node == [{"sent": "20", "reply": "6765"}]
    assert from_pika == [{"sent": "21", "reply": "10946"}]
    assert by_queue == 17711
    assert by_name == 28657


# A plain client reads several replies in one message


async def test_a_plain_client_that_says_so_gets_several_replies_in_one_message_and_reads_them_by_the_contract(
    rabbitmq_url: str, namespace: str
) -> None:
    service, opened = Service("gate"), asyncio.Event()
    inside = 0

    @service.method
    async def wait(x: int) -> int:
        nonlocal inside
        inside += 1
        if inside == 20:
            opened.set()
        await opened.wait()
        if x == 7:
            raise LookupError(x)
        return 10 * x

    place = {"exchange": f"{namespace}.requests", "routing_key": "gate", "properties": {"type": "wait"}}
    ids = [f"id-{x}" for x in range(20)]
    async with Worker(service, url=rabbitmq_url, namespace=namespace):
        messages = await send(
            rabbitmq_url,
            *(
                {
                    **place,
                    "body": str(x),
                    "correlation_id_hex": ids[x].encode().hex(),
                    "headers": {"rpcq-batches": True}
                    | ({"rpcq-timeout": 10_000, "rpcq-deadline": _soon()} if x else {}),
                }
                for x in range(20)
            ),
            expect=2,
            linger=0.2,
        )
    found: dict[str, tuple[str, Any]] = {}
    timed = 0
    for message in messages:
        if message["properties"]["type"] != "replies":
            found[bytes.fromhex(message["correlation_id_hex"]).decode()] = (
                message["properties"]["type"],
                json.loads(message["body"]),
            )
            continue
        assert message["properties"]["content_type"] == "application/x-ndjson"
        assert message["properties"]["delivery_mode"] == 1
        assert bytes.fromhex(message["correlation_id_hex"]).decode() not in ids
        assert message["headers"].keys() <= {"rpcq-takes"}
        first, *bodies = message["body"].split("\n")
        for (correlation_id, kind, queue_ms, handler_ms), body in zip(json.loads(first), bodies, strict=True):
            assert (queue_ms is None) is (handler_ms is None)
            timed += queue_ms is not None
            found[correlation_id] = kind, json.loads(body)
    assert len(messages) < 10
    assert found.keys() == set(ids)
    assert timed >= 10
    for x in range(20):
        kind, value = found[ids[x]]
        assert kind == ("error" if x == 7 else "result")
        assert value == 10 * x if x != 7 else value["code"] == "UNKNOWN"


async def test_a_plain_client_writes_several_requests_into_one_message_and_each_is_answered_by_the_contract(
    rabbitmq_url: str, namespace: str
) -> None:
    toolbox, ids = Toolbox(), [f"id-{x}" for x in range(20)]
    heads: list[list[Any]] = [[it, "note", 10_000] for it in ids]
    heads[3] = ["id-3", "absent", 10_000]
    heads[4] = ["id-4", "note", "soon"]
    heads[5] = ["id-5", None, 10_000, {"rpcq-method": "note", "rpcq-idempotency-key": "k", "x-user": "ada"}]
    body = "\n".join([json.dumps(heads), *(json.dumps(f"n{x}") if x != 6 else "" for x in range(20))])
    message = {
        "exchange": f"{namespace}.requests",
        "routing_key": toolbox.service.name,
        "body": body,
        "correlation_id_hex": b"the message".hex(),
    }
    batch = {"type": "requests", "content_type": "application/x-ndjson"}
    async with Worker(toolbox.service, url=rabbitmq_url, namespace=namespace):
        found = await send(rabbitmq_url, {**message, "properties": batch}, expect=20, linger=0.2)
        (broken,) = await send(rabbitmq_url, {**message, "properties": batch, "body": body + "\n1"}, expect=1)
        (other,) = await send(rabbitmq_url, {**message, "properties": {**batch, "type": "note"}}, expect=1)
    replies = {bytes.fromhex(it["correlation_id_hex"]).decode(): it for it in found}
    assert len(found) == 20
    assert replies.keys() == set(ids)
    for x, it in enumerate(ids):
        if x in (3, 4, 6):
            expected = {3: "UNIMPLEMENTED", 4: "INVALID_ARGUMENT", 6: "INVALID_ARGUMENT"}[x]
            assert error_of(replies[it]) == (expected, "no")
        else:
            assert result_of(replies[it]) == f"n{x}"
    for refused in (broken, other):
        assert bytes.fromhex(refused["correlation_id_hex"]) == b"the message"
        assert error_of(refused) == ("INVALID_ARGUMENT", "no")


async def test_a_plain_client_that_does_not_say_so_gets_each_reply_alone(rabbitmq_url: str, namespace: str) -> None:
    toolbox = Toolbox()
    async with Worker(toolbox.service, url=rabbitmq_url, namespace=namespace):
        found = await ask(rabbitmq_url, *(request(namespace, "note", json.dumps(str(x))) for x in range(30)))
        assert [result_of(it) for it in found] == [str(x) for x in range(30)]


def _soon() -> int:
    return int(time.time() * 1000) + 10_000


# 2. An rpcq client calls plain servers


async def test_an_rpcq_client_gets_its_answers_from_a_plain_pika_server(
    rabbitmq_url: str, namespace: str, own_queue: str
) -> None:
    async with pika_server(rabbitmq_url, own_queue), Client(rabbitmq_url, namespace=namespace) as client:
        server = client.with_options(queue=own_queue, timeout=10)
        assert await server.call("fib", 30) == 832040
        many = await asyncio.gather(*(server.call("fib", n) for n in range(60)))
    assert many == [fibonacci(n) for n in range(60)]


async def test_a_plain_server_sees_a_request_as_the_contract_describes_it(
    rabbitmq_url: str, namespace: str, own_queue: str
) -> None:
    async with (
        pika_server(rabbitmq_url, own_queue) as server,
        Client(rabbitmq_url, namespace=namespace, name="asker") as client,
    ):
        before = time.time()
        await client.with_options(queue=own_queue, timeout=10).call("fib", 30)
        seen = await server.next_line()
    properties, headers = seen["properties"], seen["headers"]
    assert seen["body"] == "30"
    assert properties["type"] == "fib"
    assert properties["content_type"] in {None, "application/json"}
    assert properties["reply_to"].startswith("amq.gen-")
    assert 1 <= len(properties["correlation_id"].encode()) <= 255
    assert properties["app_id"] == "asker"
    assert properties["delivery_mode"] in {None, 1}
    assert 0 < int(properties["expiration"]) <= 10_000
    assert isinstance(headers["rpcq-deadline"], str)  # digits: old clients do not know 64-bit integers
    assert abs(int(headers["rpcq-deadline"]) / 1000 - (before + 10)) < 5
    assert isinstance(headers["rpcq-timeout"], int)
    assert 5_000 < headers["rpcq-timeout"] <= 10_000
    assert "rpcq-attempt" not in headers or headers["rpcq-attempt"] == 1


async def test_a_reply_that_is_not_json_is_an_invalid_reply(rabbitmq_url: str, namespace: str, own_queue: str) -> None:
    async with (
        pika_server(rabbitmq_url, own_queue, "eight hundred"),
        Client(rabbitmq_url, namespace=namespace) as client,
    ):
        with pytest.raises(InvalidReply) as caught:
            await client.with_options(queue=own_queue, timeout=10).call("fib", 30)
    assert caught.value.executed == "yes"


async def test_a_reply_of_an_unknown_type_is_refused_and_named(
    rabbitmq_url: str, namespace: str, own_queue: str
) -> None:
    async with (
        pika_server(rabbitmq_url, own_queue, "1", "postcard"),
        Client(rabbitmq_url, namespace=namespace) as client,
    ):
        with pytest.raises(InvalidReply, match="postcard"):
            await client.with_options(queue=own_queue, timeout=10).call("fib", 30)


async def test_an_error_that_a_plain_server_replies_with_reaches_the_caller(
    rabbitmq_url: str, namespace: str, own_queue: str
) -> None:
    body = {"code": "too_big", "message": "not above 90", "executed": "yes", "retryable": False, "details": [90]}
    async with (
        pika_server(rabbitmq_url, own_queue, json.dumps(body), "error"),
        Client(rabbitmq_url, namespace=namespace) as client,
    ):
        with pytest.raises(RemoteError) as caught:
            await client.with_options(queue=own_queue, timeout=10).call("fib", 91)
    error = caught.value
    assert {name: getattr(error, name) for name in body} == body


async def test_a_queue_that_does_not_exist_is_service_unavailable_at_once(
    rabbitmq_url: str, namespace: str, own_queue: str
) -> None:
    async with Client(rabbitmq_url, namespace=namespace) as client:
        began = time.monotonic()
        with pytest.raises(ServiceUnavailable) as caught:
            await client.with_options(queue=own_queue, timeout=15).call("fib", 30)
        assert time.monotonic() - began < 5
    assert caught.value.executed == "no"


async def test_a_plain_server_that_is_gone_while_its_queue_stays_is_a_timeout(
    rabbitmq_url: str, namespace: str, own_queue: str
) -> None:
    async with Client(rabbitmq_url, namespace=namespace) as client:
        async with pika_server(rabbitmq_url, own_queue):
            pass
        with pytest.raises(CallTimeout) as caught:
            await client.with_options(queue=own_queue, timeout=1).call("fib", 30)
    assert caught.value.executed == "maybe"


# 3. Direct reply-to


async def test_a_client_with_direct_reply_to_gets_its_replies(rabbitmq_url: str, namespace: str) -> None:
    exchange = f"{namespace}.requests"
    async with Worker(Toolbox().service, url=rabbitmq_url, namespace=namespace):
        bodies = [f"[{n}, 1]" for n in range(20)]
        printed = await pika_program("pika_direct.py", rabbitmq_url, exchange, "toolbox", "subtract", *bodies)
    assert printed == [{"sent": f"[{n}, 1]", "type": "result", "reply": str(n - 1)} for n in range(20)]


async def test_a_client_with_direct_reply_to_gets_errors_too(rabbitmq_url: str, namespace: str) -> None:
    async with Worker(Toolbox().service, url=rabbitmq_url, namespace=namespace):
        [printed] = await pika_program(
            "pika_direct.py", rabbitmq_url, f"{namespace}.requests", "toolbox", "divide", "[8, 2]"
        )
    assert printed["type"] == "error"
    assert json.loads(printed["reply"])["code"] == "UNIMPLEMENTED"


# 4. Neither deadline nor headers: the service's default timeout


async def test_a_request_without_a_deadline_is_served_under_the_default_timeout_of_the_service(
    rabbitmq_url: str, namespace: str
) -> None:
    service = Service("toolbox", timeout=0.5)
    ended: list[str] = []

    @service.method
    async def quick() -> str:
        return "done"

    @service.method
    async def slow() -> str:
        try:
            await asyncio.sleep(15)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return "too late"

    async with Worker(service, url=rabbitmq_url, namespace=namespace):
        [served] = await ask(rabbitmq_url, request(namespace, "quick", "[]"))
        began = time.monotonic()
        [cut_off] = await ask(rabbitmq_url, request(namespace, "slow", "[]"))
        assert time.monotonic() - began < 10
    assert result_of(served) == "done"
    assert error_of(cut_off) == ("DEADLINE_EXCEEDED", "yes")
    assert ended == ["cancelled"]


# What else the contract promises


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        pytest.param("[42, 2]", None, id="by_position_with_no_content_type"),
        pytest.param("[42, 2]", "application/json", id="by_position"),
        pytest.param("[42, 2]", "application/json; charset=utf-8", id="by_position_with_a_charset"),
        pytest.param('{"subtrahend": 2, "minuend": 42}', None, id="by_name_with_no_content_type"),
        pytest.param(' {"subtrahend" : 2,\n "minuend":\t42}\n', "application/json", id="by_name_with_spaces"),
    ],
)
async def test_parameters_go_by_position_or_by_name(
    rabbitmq_url: str, namespace: str, body: str, content_type: str | None
) -> None:
    async with Worker(Toolbox().service, url=rabbitmq_url, namespace=namespace):
        [reply] = await ask(
            rabbitmq_url, request(namespace, "subtract", body, properties={"content_type": content_type})
        )
    assert result_of(reply) == 40


async def test_a_bare_text_is_one_parameter_and_keeps_its_characters(rabbitmq_url: str, namespace: str) -> None:
    text = 'Grüße, "мир" \\ 🙂 \u0000'
    async with Worker(Toolbox().service, url=rabbitmq_url, namespace=namespace):
        replies = await ask(
            rabbitmq_url,
            request(namespace, "note", json.dumps(text)),
            request(namespace, "note", json.dumps(text, ensure_ascii=False)),
        )
    assert [result_of(reply) for reply in replies] == [text, text]


@pytest.mark.parametrize(
    ("method", "body", "properties", "code"),
    [
        pytest.param("divide", "[42, 2]", {}, "UNIMPLEMENTED", id="unknown_method"),
        pytest.param(None, "[42, 2]", {}, "UNIMPLEMENTED", id="no_method_where_there_are_several"),
        pytest.param("__init__", "[]", {}, "UNIMPLEMENTED", id="a_python_attribute_is_not_a_method"),
        pytest.param("subtract", "[42]", {}, "INVALID_ARGUMENT", id="too_few"),
        pytest.param("subtract", "[42, 2, 1]", {}, "INVALID_ARGUMENT", id="too_many"),
        pytest.param("subtract", '{"minuend": 42, "other": 2}', {}, "INVALID_ARGUMENT", id="wrong_name"),
        pytest.param("subtract", '["forty", 2]', {}, "INVALID_ARGUMENT", id="wrong_type"),
        pytest.param("subtract", "forty-two", {}, "INVALID_ARGUMENT", id="not_json"),
        pytest.param("subtract", "[42, 2", {}, "INVALID_ARGUMENT", id="half_of_a_json"),
        pytest.param("subtract", "42, 2", {}, "INVALID_ARGUMENT", id="an_array_without_its_brackets"),
        pytest.param("subtract", "", {}, "INVALID_ARGUMENT", id="empty_body"),
        pytest.param(
            "subtract", "<p>42</p>", {"content_type": "text/xml"}, "INVALID_ARGUMENT", id="unknown_content_type"
        ),
        pytest.param(
            "subtract", "[42, 2]", {"content_type": "text/xml"}, "INVALID_ARGUMENT", id="unknown_type_of_what_is_json"
        ),
    ],
)
async def test_what_a_service_cannot_take_is_answered_with_an_error_and_not_run(
    rabbitmq_url: str, namespace: str, method: str | None, body: str, properties: Line, code: str
) -> None:
    toolbox = Toolbox()
    async with Worker(toolbox.service, url=rabbitmq_url, namespace=namespace):
        refused, served = await ask(
            rabbitmq_url,
            request(namespace, method, body, properties=properties),
            request(namespace, "note", '"and it still serves"'),
        )
    assert error_of(refused) == (code, "no")
    assert result_of(served) == "and it still serves"
    assert toolbox.ran == ["and it still serves"]


async def test_an_unexpected_exception_is_answered_with_an_incident_and_none_of_its_text(
    rabbitmq_url: str, namespace: str
) -> None:
    async with Worker(Toolbox().service, url=rabbitmq_url, namespace=namespace):
        [reply] = await ask(rabbitmq_url, request(namespace, "fail", "[]"))
    assert error_of(reply) == ("UNKNOWN", "yes")
    assert json.loads(reply["body"])["incident"]
    assert "swordfish" not in json.dumps(reply)
    assert "Traceback" not in json.dumps(reply)


@pytest.mark.parametrize(
    "correlation_id",
    [
        pytest.param(b"7", id="1_byte"),
        pytest.param(b"x" * 255, id="255_bytes"),
        pytest.param(("ü🙂" * 42 + "abc").encode(), id="255_bytes_of_characters_beyond_ascii"),
        pytest.param(bytes(range(1, 256)), id="255_bytes_that_are_no_text"),
    ],
)
async def test_the_correlation_id_comes_back_byte_for_byte(
    rabbitmq_url: str, namespace: str, correlation_id: bytes
) -> None:
    assert len(correlation_id) in {1, 255}
    sent = correlation_id.hex()
    good = request(namespace, "note", '"a"', correlation_id_hex=sent)
    bad = request(namespace, "divide", "[]", correlation_id_hex=sent)
    async with Worker(Toolbox().service, url=rabbitmq_url, namespace=namespace):
        replies = await send(rabbitmq_url, good, bad)
    assert sorted(reply["properties"]["type"] for reply in replies) == ["error", "result"]
    assert [reply["correlation_id_hex"] for reply in replies] == [sent, sent]


async def test_a_reply_says_where_the_time_went(rabbitmq_url: str, namespace: str) -> None:
    service = Service("toolbox")

    @service.method
    async def rest() -> None:
        await asyncio.sleep(0.2)

    times: HeadersType = {"rpcq-deadline": int(time.time() * 1000) + 20_000, "rpcq-timeout": 20_000}
    async with (
        Worker(service, url=rabbitmq_url, namespace=namespace),
        await aio_pika.connect(rabbitmq_url) as connection,  # not pika: it cuts floats down to whole numbers
    ):
        channel = await connection.channel()
        exchange = await channel.get_exchange(f"{namespace}.requests")
        own = await channel.declare_queue(exclusive=True)
        for headers in ({}, times):
            message = aio_pika.Message(b"[]", reply_to=own.name, correlation_id="1", type="rest", headers=headers)
            await exchange.publish(message, "toolbox")
            async with own.iterator(no_ack=True, timeout=15) as replies:
                reply = await anext(replies)
            assert (reply.type, reply.body) == ("result", b"null")
            if not headers:  # old clients do not know the type of these
                assert reply.headers == {}
            else:
                assert isinstance(reply.headers["rpcq-handler-ms"], float)
                assert 150 < reply.headers["rpcq-handler-ms"] < 5_000
                assert isinstance(reply.headers["rpcq-queue-ms"], float)
                assert 0 <= reply.headers["rpcq-queue-ms"] < 20_000


async def test_a_request_with_no_reply_to_is_run_and_gets_no_reply(rabbitmq_url: str, namespace: str) -> None:
    toolbox = Toolbox()
    silent = request(namespace, "note", '"silent"', properties={"reply_to": None})
    wrong = request(namespace, "divide", '"silent"', properties={"reply_to": None})
    spoken = request(namespace, "note", '"spoken"', correlation_id_hex="0d15")
    async with Worker(toolbox.service, url=rabbitmq_url, namespace=namespace):
        [reply] = await send(rabbitmq_url, silent, wrong, spoken, expect=1, linger=0.5)
    assert reply["correlation_id_hex"] == "0d15"
    assert result_of(reply) == "spoken"
    assert sorted(toolbox.ran) == ["silent", "spoken"]


@pytest.mark.parametrize("queue", ["orders-{}", "{}.req.billing", "{}.once.billing"])
async def test_a_reply_to_that_names_a_business_queue_is_refused(rabbitmq_url: str, namespace: str, queue: str) -> None:
    business = queue.format(namespace)
    toolbox = Toolbox()
    aside = {"properties": {"reply_to": business}, "correlation_id_hex": "0bad"}
    planted = request(namespace, "note", '"planted"', **aside)
    planted_error = request(namespace, "divide", "[]", **aside)
    honest = request(namespace, "note", '"honest"', correlation_id_hex="0d15")
    async with Worker(toolbox.service, url=rabbitmq_url, namespace=namespace):
        came = await send(rabbitmq_url, planted, planted_error, honest, watch=[business], expect=1, linger=0.7)
        assert await messages_in(rabbitmq_url, f"{namespace}.req.toolbox") == 0
    assert [line["queue"] for line in came] == [None]
    assert result_of(came[0]) == "honest"
    assert toolbox.ran == ["honest"]


async def test_headers_that_the_contract_does_not_know_are_ignored(rabbitmq_url: str, namespace: str) -> None:
    headers = {"x-team": "blue", "priority": 3, "nested": {"a": [1, None, True]}, "rpcq-of-the-future": "1"}
    async with Worker(Toolbox().service, url=rabbitmq_url, namespace=namespace):
        [reply] = await ask(rabbitmq_url, request(namespace, "subtract", "[42, 2]", headers=headers))
    assert result_of(reply) == 40


async def test_a_deadline_that_has_passed_is_answered_and_the_request_not_run(
    rabbitmq_url: str, namespace: str
) -> None:
    toolbox = Toolbox()
    now = int(time.time() * 1000)
    late = request(namespace, "note", '"late"', headers={"rpcq-deadline": now - 60_000})
    in_time = request(namespace, "note", '"in time"', headers={"rpcq-deadline": now + 60_000, "rpcq-timeout": 60_000})
    async with Worker(toolbox.service, url=rabbitmq_url, namespace=namespace):
        refused, served = await ask(rabbitmq_url, late, in_time)
    assert error_of(refused) == ("DEADLINE_EXCEEDED", "no")
    assert result_of(served) == "in time"
    assert toolbox.ran == ["in time"]


# What the broker does by itself, because rpcq declares its queues so


@pytest.mark.parametrize(("queue_type", "kind"), [("classic", "req"), ("quorum", "once")])
async def test_the_broker_tells_a_plain_client_that_its_request_expired(
    rabbitmq_url: str, namespace: str, queue_type: str, kind: str
) -> None:
    toolbox = Toolbox(queue_type=queue_type)
    async with Worker(toolbox.service, url=rabbitmq_url, namespace=namespace):
        pass  # the queue is there from now on, and nobody serves it
    doomed = request(namespace, "note", '"doomed"', properties={"expiration": "200"}, headers={"CC": ["$reply"]})
    doomed["correlation_id_hex"] = "0123456789abcdef"
    [notice] = await send(rabbitmq_url, doomed, bind=f"{namespace}.notices", linger=0.3)
    assert notice["queue"] is None
    assert notice["correlation_id_hex"] == "0123456789abcdef"
    assert notice["properties"]["type"] == "note"
    assert notice["body"] == '"doomed"'
    [death] = notice["headers"]["x-death"]
    assert death["reason"] == "expired"
    assert death["queue"] == f"{namespace}.{kind}.toolbox"
    assert toolbox.ran == []


async def test_a_request_that_expires_in_a_queue_with_a_name_of_its_own_is_dropped_and_does_not_go_round(
    rabbitmq_url: str, namespace: str, own_queue: str
) -> None:
    async with Worker(fib_service(own_queue), url=rabbitmq_url, namespace=namespace):
        pass
    place = {"exchange": "", "routing_key": own_queue}
    came = await send(rabbitmq_url, {**place, "body": "7", "properties": {"expiration": "200"}}, wait=1)
    assert came == []
    assert await messages_in(rabbitmq_url, own_queue) == 0


async def messages_in(url: str, queue: str) -> int:
    async with await aio_pika.connect(url) as connection:
        declared = await (await connection.channel()).declare_queue(queue, passive=True)
        count = declared.declaration_result.message_count
        assert count is not None
        return count
