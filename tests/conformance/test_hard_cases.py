"""What is easy to get wrong: handlers that misbehave, endings at awkward moments, answers that come twice."""

from __future__ import annotations

import asyncio
import base64
import resource
import threading
from decimal import Decimal
from typing import Any, Self

import pytest
from pydantic import Base64Bytes, Base64UrlBytes, BaseModel, ConfigDict, SecretBytes, SecretStr

from rpcq import (
    CallTimeout,
    ClosedError,
    DomainError,
    InvalidParams,
    InvalidReply,
    MethodNotFound,
    NotSerializable,
    OutcomeUnknown,
    RemoteError,
    Retry,
    ServiceUnavailable,
    TooLarge,
)
from rpcq.calls.outcomes import MAX_ATTEMPTS
from rpcq.options import ConnectionOptions
from rpcq.transport.base import Delivery, Listener, Message, Subscription, Transport
from rpcq.transport.opening import open_transport
from rpcq.wire import replies, requests
from rpcq.wire.topology import Topology
from support.late import let_others_speak_first
from support.load import until
from support.places import Place

QUEUE_TYPE_MATTERS = False


class Odd(BaseException):
    """No Exception, and yet a handler's."""


class Broken(DomainError):
    pass


class Pair(BaseModel):
    first: int
    second: int


class Sum(BaseModel):
    left: int | Sum | Difference


class Difference(BaseModel):
    left: int | Sum | Difference


async def test_whatever_a_handler_raises_its_caller_is_told_and_its_slot_is_free_again(place: Place) -> None:
    service = place.service(errors=[Broken])
    errors = [
        Odd("odd"),
        GeneratorExit("gone"),
        BaseExceptionGroup("group", [Odd("odd")]),
        asyncio.CancelledError("by itself"),
        Broken("lone surrogate \ud800", details=object()),
        Broken(404, details={1j}),  # type: ignore[arg-type]
    ]
    in_threads = [*errors, StopIteration("stopped"), KeyboardInterrupt("in a thread"), SystemExit(3)]

    @service.method
    async def coroutine(number: int) -> None:
        raise errors[number]

    @service.method
    def thread(number: int) -> None:
        raise in_threads[number]

    async with place.worker(service, prefetch=2) as worker, place.client(timeout=10) as client:
        for method, count in (("coroutine", len(errors)), ("thread", len(in_threads))):
            for number in range(count):
                with pytest.raises(RemoteError) as caught:
                    await client.call(f"things.{method}", number=number)
                assert caught.value.executed == "yes"
        assert worker.in_flight == 0


async def test_a_handler_that_will_not_be_cancelled_does_not_hold_up_the_end(place: Place) -> None:
    service, started, release = place.service(), asyncio.Event(), asyncio.Event()

    @service.method
    async def stubborn() -> None:
        started.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async with place.client() as client:
        worker = place.worker(service, grace=0.1)
        await worker.start()
        call = asyncio.create_task(client.call("things.stubborn"))
        await started.wait()
        assert await asyncio.wait_for(worker.stop(), 10) is False
        release.set()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


async def test_what_waits_for_a_thread_until_its_deadline_never_runs_and_its_caller_knows(place: Place) -> None:
    """Threads of calls that were given up still hold their places; a further call finds none free."""
    service, gate, began, started = place.service(), threading.Event(), [], asyncio.Event()
    loop = asyncio.get_running_loop()

    @service.method
    def block(name: str) -> None:
        began.append(name)
        loop.call_soon_threadsafe(started.set)
        gate.wait(60)

    async with place.worker(service, prefetch=1) as worker, place.client(timeout=60) as client:
        first = asyncio.create_task(client.call("things.block", name="first"))
        await started.wait()
        # Its delivery comes again over a new session only if it is forgotten here: this is what a lost one leaves.
        worker._replier.in_hand._by_key.clear()
        await place.cut(client, worker)
        with pytest.raises(OutcomeUnknown):
            await first
        await until(lambda: client.connected and worker.connected)
        let_others_speak_first(client)
        with pytest.raises(CallTimeout) as caught:
            await client.with_options(timeout=3).call("things.block", name="second")
        assert caught.value.executed == "no"
        gate.set()
        assert began == ["first"]


@pytest.mark.long
async def test_slots_are_free_and_replies_sent_after_connections_were_cut_again_and_again(place: Place) -> None:
    service = place.service()

    @service.method(idempotent=True)
    async def work(x: int) -> int:
        await asyncio.sleep(0.005)
        return x

    async with place.worker(service, prefetch=10) as worker, place.client() as client:
        stop = asyncio.Event()
        answered = 0

        async def caller() -> None:
            nonlocal answered
            while not stop.is_set():
                try:
                    assert await client.call("things.work", x=5) == 5
                    answered += 1
                except (OutcomeUnknown, ServiceUnavailable):
                    continue

        callers = [asyncio.create_task(caller()) for _ in range(20)]
        for _ in range(4):
            seen = answered
            while answered < seen + 50:  # noqa: ASYNC110 - under load, each time
                await asyncio.sleep(0.01)
            await place.cut(client, worker)
        seen = answered
        while answered < seen + 50:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*callers)
        while worker.in_flight:  # noqa: ASYNC110 - replies of calls given up find nobody, and are acknowledged
            await asyncio.sleep(0.01)
        assert client.in_flight == 0


async def test_closing_while_opening_leaves_nothing_open(place: Place) -> None:
    client = place.client()
    opening = asyncio.create_task(client.connect())
    await asyncio.sleep(0)
    await client.close()
    (opened,) = await asyncio.gather(opening, return_exceptions=True)
    assert opened is client or isinstance(opened, ClosedError)  # it may have been open before it was closed
    with pytest.raises(ClosedError):
        await client.call("things.anything")
    assert not client._transport.can_publish


async def test_a_cancelled_close_goes_on_and_can_be_awaited_again(place: Place) -> None:
    client = place.client()
    await client.connect()
    closing = asyncio.create_task(client.close())
    await asyncio.sleep(0)
    if closing.cancel():  # else the loop starts tasks at once, and it is closed
        with pytest.raises(asyncio.CancelledError):
            await closing
    await client.close()
    assert not client._transport.can_publish


async def test_a_cancelled_stop_goes_on_and_tells_the_truth_when_awaited_again(place: Place) -> None:
    service, started = place.service(), asyncio.Event()

    @service.method
    async def stick() -> None:
        started.set()
        await asyncio.sleep(20)

    async with place.client() as client:
        worker = place.worker(service, grace=0.3)
        await worker.start()
        call = asyncio.create_task(client.call("things.stick"))
        await started.wait()
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0.05)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert await worker.stop() is False
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


async def test_calls_given_up_in_an_outage_are_not_kept(place: Place) -> None:
    async with place.client() as client:
        client._sender.encoder = None  # as while the consuming session is down
        client._sessions.closed()
        calls = [
            asyncio.create_task(client.with_options(timeout=0.2).call("things.x", text="x" * 1000)) for _ in range(50)
        ]
        await asyncio.sleep(0)
        assert len(client._sender.waiting) == 50
        for call in calls[:25]:
            call.cancel()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(it, asyncio.CancelledError) for it in outcomes[:25])
        for outcome in outcomes[25:]:
            assert isinstance(outcome, ServiceUnavailable)
            assert outcome.executed == "no"
            assert "no connection to the broker" in str(outcome)
        assert not client._sender.waiting
        assert client.in_flight == 0


class HandMade:
    """A worker of the service "things" that answers as the test says."""

    def __init__(self, place: Place) -> None:
        self.topology = Topology(place.namespace)
        self.transport: Transport = open_transport(place.url, ConnectionOptions(namespace=place.namespace))
        self.queue = self.topology.request_queue("things", place.queue_type)
        self.requests: asyncio.Queue[tuple[requests.Request, Delivery]] = asyncio.Queue()

    def _on_delivery(self, delivery: Delivery) -> None:
        self.requests.put_nowait((requests.read_request(delivery.properties), delivery))

    async def __aenter__(self) -> Self:
        nobody = Listener(*[lambda *_: None] * 5)
        subscription = Subscription(self.queue, self._on_delivery, prefetch=10)
        await self.transport.start([self.topology.requests, self.topology.control], [subscription], nobody)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.transport.close()

    def answer(self, request: requests.Request, kind: bytes, body: bytes) -> None:
        properties = replies.ReplyEncoder().encode(kind, request.correlation_id, None, 0.0)
        self.transport.publish(Message(b"", request.reply_to, request.correlation_id, properties, body, lambda _: None))


AWAY = b'{"code": "UNAVAILABLE", "message": "shuts down", "executed": "no", "retryable": true, "details": null}'
LOST = b'{"code": "ABORTED", "message": "lost", "executed": "maybe", "retryable": false, "details": null}'
UNKNOWN_METHOD = b'{"code": "UNIMPLEMENTED", "message": "none", "executed": "no", "retryable": false, "details": null}'


async def test_a_call_turned_away_twice_over_one_request_is_sent_again_once(place: Place) -> None:
    async with HandMade(place) as worker, place.client() as client:
        call = asyncio.create_task(client.call("things.work"))
        first, delivery = await worker.requests.get()
        delivery.ack()
        worker.answer(first, replies.ERROR, AWAY)
        second, delivery = await worker.requests.get()
        delivery.ack()
        worker.answer(first, replies.ERROR, AWAY)  # published twice: its confirm was lost
        worker.answer(first, replies.ERROR, LOST)  # or redelivered, and answered by another worker
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(worker.requests.get(), 0.3)
        assert not call.done()
        worker.answer(second, replies.RESULT, b'"done"')
        assert await call == "done"
        assert first.attempt == second.attempt == 1
        assert first.correlation_id != second.correlation_id


async def test_an_error_of_a_later_attempt_does_not_say_that_the_call_did_not_run(place: Place) -> None:
    async with HandMade(place) as worker, place.client() as client:
        call = asyncio.create_task(client.with_options(idempotent=True).call("things.work"))
        first, delivery = await worker.requests.get()
        delivery.ack()
        worker.answer(first, replies.ERROR, LOST)
        second, delivery = await worker.requests.get()
        delivery.ack()
        assert (second.attempt, second.idempotency_key) == (2, first.idempotency_key)
        worker.answer(second, replies.ERROR, UNKNOWN_METHOD)
        with pytest.raises(MethodNotFound) as caught:
            await call
        assert (caught.value.executed, caught.value.retryable) == ("maybe", False)


async def test_where_the_attempts_after_lost_workers_are_used_up_a_retry_goes_on(place: Place) -> None:
    """Only where ABORTED is asked for, and the call is idempotent."""
    retry = Retry(initial_backoff=0.01, codes=("ABORTED",))
    async with HandMade(place) as worker, place.client() as client:
        call = asyncio.create_task(client.with_options(idempotent=True, retry=retry).call("things.work"))
        seen = []
        for number in range(MAX_ATTEMPTS + 1):
            request, delivery = await worker.requests.get()
            delivery.ack()
            seen.append((request.attempt, request.idempotency_key))
            worker.answer(request, replies.ERROR, LOST if number < MAX_ATTEMPTS else UNKNOWN_METHOD)
        with pytest.raises(MethodNotFound) as caught:
            await call
        assert caught.value.executed == "maybe"
        assert [attempt for attempt, _ in seen] == [1, 2, 3, 4]
        assert len({key for _, key in seen}) == 1
        once = asyncio.create_task(client.with_options(retry=retry).call("things.work"))
        request, delivery = await worker.requests.get()
        delivery.ack()
        worker.answer(request, replies.ERROR, LOST)
        with pytest.raises(OutcomeUnknown):
            await once


async def test_a_late_result_of_an_earlier_request_answers_the_call(place: Place) -> None:
    async with HandMade(place) as worker, place.client() as client:
        call = asyncio.create_task(client.with_options(idempotent=True).call("things.work"))
        first, delivery = await worker.requests.get()
        delivery.ack()
        worker.answer(first, replies.ERROR, LOST)
        _, delivery = await worker.requests.get()
        delivery.ack()
        worker.answer(first, replies.RESULT, b'"late"')
        assert await call == "late"


ALL_BYTES = bytes(range(256))


class Credentials(BaseModel):
    user: str
    password: SecretStr


class Upload(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    name: str
    data: bytes


async def test_a_number_beyond_a_float_in_a_reply_is_an_invalid_reply_and_never_infinite(place: Place) -> None:
    async with HandMade(place) as worker, place.client() as client:
        for returns in (None, float, list[float], dict[str, Any]):
            for body in (b"1e400", b"[0.5, -1E+400]", b'{"a": 123456.7e999}', b"1" + b"0" * 400 + b".5"):
                call = asyncio.create_task(client.with_options(returns=returns).call("things.work"))
                request, delivery = await worker.requests.get()
                delivery.ack()
                worker.answer(request, replies.RESULT, body)
                with pytest.raises(InvalidReply) as caught:
                    await call
                assert caught.value.executed == "yes"


async def test_a_number_beyond_a_float_in_a_request_is_refused_and_never_infinite(place: Place) -> None:
    service, seen = place.service(), []

    @service.method
    async def take(x: float = 0.0, xs: list[float] | None = None, other: Any = None) -> None:
        seen.append((x, xs, other))

    async with place.worker(service), place.client() as client:
        for params in (
            {"x": 10**400},
            {"xs": [1.5, -(10**309)]},
            {"x": Decimal("1e400")},
            {"xs": [1.5] * 2000 + [10**309]},
        ):
            with pytest.raises(InvalidParams) as caught:
                await client.call("things.take", **params)
            assert caught.value.executed == "no"
        assert not seen
        await client.call("things.take", x=1e308, other=[10**400, Decimal("1e400"), "1e400"])
        assert seen == [(1e308, None, [10**400, "1E+400", "1e400"])]


async def test_large_and_deep_bodies_that_do_not_fit_are_refused_soon_and_cost_little_memory(place: Place) -> None:
    service, runs = place.service(), []

    @service.method
    async def take(pairs: list[Pair]) -> None:
        runs.append(pairs)

    @service.method
    async def add(sum: Sum) -> None:  # noqa: A002
        runs.append(sum)

    @service.method
    async def echo(value: Any) -> Any:
        return value

    deep: Any = "wrong"
    for _ in range(40):  # as many branches as 2 ** 40
        deep = {"left": deep}
    wrong = [{"first": "x"}] * 70_000
    async with place.worker(service), place.client(timeout=30) as client:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(InvalidParams, match=r"pairs\.0\.first: .*; pairs\.0\.second: ") as caught:
            await client.call("things.take", pairs=wrong)
        assert len(caught.value.details) == 2
        with pytest.raises(InvalidParams, match="nested too deeply"):
            await client.call("things.add", sum=deep)
        assert runs == []
        with pytest.raises(InvalidReply, match="Input should be a valid integer"):
            await client.with_options(returns=list[Pair]).call("things.echo", value=wrong)
        with pytest.raises(InvalidReply, match="nested too deeply"):
            await client.with_options(returns=Sum).call("things.echo", value=deep)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 150_000  # kB; 140 000 errors take more


async def test_what_is_written_can_be_read_on_the_other_side(place: Place) -> None:
    service, longest = place.service(), 10**4300 - 1

    @service.method
    async def echo(x: Any) -> Any:
        return x

    @service.method
    async def more(x: int) -> int:
        return x + 1

    async with place.worker(service), place.client() as client:
        assert await client.call("things.echo", x=[longest]) == [longest]
        for value in (longest + 1, [-(10**5000)], {"a": 2**20_000}):
            with pytest.raises(NotSerializable, match="an integer of more than 4300 digits"):
                await client.call("things.echo", x=value)
        with pytest.raises(InvalidReply, match="an integer of more than 4300 digits") as caught:
            await client.call("things.more", x=longest)
        assert caught.value.executed == "yes"


async def test_a_secret_is_never_sent_as_asterisks(place: Place) -> None:
    service, seen = place.service(), []

    @service.method
    async def login(user: str, password: SecretStr) -> bool:
        seen.append(password.get_secret_value())
        return True

    @service.method
    async def show(x: Any = None):  # type: ignore[no-untyped-def]
        seen.append(x)
        return {"users": [Credentials(user="a", password=SecretStr("s3cr3t"))]}

    async with place.worker(service), place.client() as client:
        secret = SecretStr("s3cr3t")
        with pytest.raises(
            NotSerializable, match=r"'password', a SecretStr: .*pass secret\.get_secret_value\(\)"
        ) as caught:
            await client.call("things.login", user="a", password=secret)
        assert "s3cr3t" not in str(caught.value)
        for value in (
            secret,
            SecretBytes(b"s3cr3t"),
            [secret],
            {"a": {"b": secret}},
            Credentials(user="a", password=secret),
        ):
            with pytest.raises(NotSerializable, match="parameter 'x'"):
                await client.call("things.show", x=value)
        assert not seen
        assert await client.call("things.login", user="a", password=secret.get_secret_value()) is True
        assert seen == ["s3cr3t"]
        with pytest.raises(
            InvalidReply, match=r"things\.show returned a dict .*pass secret\.get_secret_value\(\)"
        ) as refused:
            await client.call("things.show", x="**********")
        assert refused.value.executed == "yes"
        assert "s3cr3t" not in str(refused.value)
        assert seen == ["s3cr3t", "**********"]


async def test_bytes_arrive_as_they_were_in_both_directions(place: Place) -> None:
    service = place.service()

    @service.method
    async def typed(x: bytes, y: Base64Bytes, z: list[Base64UrlBytes]) -> dict[str, list[Base64Bytes]]:
        return {"all": [x, y, *z]}

    @service.method
    async def store(upload: Upload) -> Upload:
        return Upload(name=upload.name, data=upload.data[::-1])

    @service.method
    async def plain(x: Any) -> Any:
        return [x, {"again": ALL_BYTES}]

    async with place.worker(service), place.client() as client:
        typed_client = client.with_options(returns=dict[str, list[bytes]])
        for value in (b"", b"abc", b"\xff", b"\xfb\xff", b"YWJj", ALL_BYTES):
            result = await typed_client.call("things.typed", x=value, y=value, z=[value])
            assert result == {"all": [value] * 3}
        upload = Upload(name="a", data=ALL_BYTES)
        for given in (
            upload,
            {"name": "a", "data": ALL_BYTES},
            {"name": "a", "data": base64.b64encode(ALL_BYTES).decode()},
        ):
            stored = await client.with_options(returns=Upload).call("things.store", upload=given)
            assert stored == Upload(name="a", data=ALL_BYTES[::-1])
        text = base64.urlsafe_b64encode(ALL_BYTES).decode()
        assert await client.call("things.plain", x=ALL_BYTES) == [text, {"again": text}]


async def test_duplicate_late_and_stray_replies_are_dropped_and_counted(place: Place) -> None:
    async with HandMade(place) as worker, place.client() as client:
        call = asyncio.create_task(client.call("things.work"))
        request, delivery = await worker.requests.get()
        delivery.ack()
        for body in (b"1", b"2", b"3"):
            worker.answer(request, replies.RESULT, body)
        assert await call == 1
        stray = requests.Request(b"nobody's", request.reply_to, None)
        worker.answer(stray, replies.RESULT, b"4")
        other = asyncio.create_task(client.call("things.work"))
        request, delivery = await worker.requests.get()
        delivery.ack()
        worker.answer(request, replies.RESULT, b"5")
        assert await other == 5
        assert client._calls.unmatched == 3


async def test_headers_over_the_limit_are_refused_before_anything_is_sent_and_again_by_the_worker(place: Place) -> None:
    service, runs = place.service(), []

    @service.method(idempotent=True)
    async def work() -> None:
        runs.append("work")

    async with place.worker(service), place.client() as client:
        for size in (8_200, 200_000):
            with pytest.raises(TooLarge, match="the limit is 8192") as caught:
                await client.with_options(metadata={"x-large": "x" * size}).call("things.work")
            assert caught.value.executed == "no"
            assert client.in_flight == 0
        await client.with_options(metadata={"x-large": "x" * 8_000}).call("things.work")
        # A client that is not rpcq's keeps to no limit of ours. (RabbitMQ 4 keeps one of two headers of the same name.)
        encoder = client._sender.encoder
        assert encoder is not None
        encode = encoder.encode
        large = b"".join(
            requests.encode_headers(key=None, attempt=1, metadata={name: "x" * 8_000}) for name in ("x-a", "x-b")
        )
        encoder.encode = lambda *args, **options: encode(*args[:4], large, **options)  # type: ignore[method-assign]
        call = asyncio.create_task(client.call("things.work"))
        with pytest.raises(InvalidParams, match="the properties are"):
            await call
    assert runs == ["work"]
