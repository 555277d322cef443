"""What mypy --strict must accept: the types that users get. Never run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol, assert_type

from rpcq import (
    Batch,
    CallError,
    Client,
    ClientOptions,
    Context,
    DomainError,
    Job,
    JobInfo,
    Progress,
    Service,
    WatchedJob,
    WatchingCallMaker,
    Worker,
    contract,
    with_options,
)
from rpcq.testing import Running


class OutOfStock(DomainError):
    """No more."""

    sku: str


@asynccontextmanager
async def lifespan() -> AsyncIterator[int]:
    yield 1


service = Service("things", queue_type="quorum", errors=[OutOfStock], timeout=5, lifespan=lifespan)


@service.method
async def add(x: int, y: int = 1) -> int:
    return x + y


@service.method(name="other", idempotent=True, errors=[OutOfStock], timeout=2.5)
async def named(context: Context, *, sku: str) -> str:
    assert_type(context.metadata.get(sku), str | None)
    assert_type(context.deadline.remaining(), float)
    return sku


@service.method()
def blocking(x: float) -> float:
    return x


@service.method(batch=Batch(max_size=8, max_wait=0.01, max_concurrency=2))
async def halved(contexts: list[Context[int]], x: list[float]) -> list[float | OutOfStock]:
    assert_type(contexts[0].state, int)
    return [it / 2 for it in x]


@service.method(batch=Batch())
def doubled(x: list[float]) -> list[float]:
    return [2 * it for it in x]


assert_type(doubled([1.0]), list[float])


@contract("things", errors=[OutOfStock], idempotent=["add"])
class Things(Protocol):
    async def add(self, x: int, y: int = 1) -> int: ...

    async def other(self, *, sku: str) -> str: ...


class Unmarked(Protocol):
    async def blocking(self, x: float) -> float: ...


held = Service(api=Things, lifespan=lifespan)
Service("elsewhere", api=Unmarked)


@held.method
async def stateful(context: Context[int], x: int) -> int:
    assert_type(context.state, int)
    return context.state + x


def of_a_wider_state(context: Context[float]) -> float:
    return context.state


@held.method
async def helped(context: Context[int], x: int) -> float:
    return of_a_wider_state(context) + x


def of_any_state(context: Context) -> int:
    assert_type(context.state, Any)
    assert_type(context.attempt, int)
    return 1


async def test_something(rpcq_running: Running) -> None:
    async with rpcq_running(service, held, timeout=1.0) as client:
        assert_type(client, Client)
        assert_type(client.options, ClientOptions)


async def handlers_keep_their_types() -> None:
    assert_type(await add(1, y=2), int)
    assert_type(blocking(1.5), float)
    plain: Callable[[float], float] = blocking
    awaited: Coroutine[Any, Any, int] = add(1)
    assert_type(await awaited, int)
    assert_type(plain(1.0), float)


async def clients() -> None:
    async with Client("amqp://localhost/", timeout=5, max_in_flight=10, namespace="n", heartbeat=5) as client:
        assert_type(client, Client)
        assert_type(client.in_flight, int)
        things = client.bind(Things)
        assert_type(things, Things)
        assert_type(await things.add(1, 2), int)
        assert_type(await things.other(sku="x"), str)
        assert_type(client.bind(Unmarked, "things"), Unmarked)
        assert_type(client.with_options(timeout=1.5).bind(Things), Things)
        assert_type(with_options(things, timeout=2, errors=[OutOfStock]), Things)
        assert_type(await with_options(things, timeout=2).add(1), int)
        assert_type(await with_options(things.other, retry=None)(sku="x"), str)
        assert_type(client.with_options(errors=[OutOfStock]).bind(Things), Things)
        options = client.with_options(
            timeout=1, idempotent=True, queue=None, errors=(OutOfStock,), returns=int, metadata={"x-a": "b"}
        )
        assert_type(await options.call("things.add", 1, 2), Any)
        proxy = client.service("things").with_options(timeout=1)
        assert_type(await proxy.add(x=1), Any)
        assert_type(await proxy["with_options"](x=1), Any)
        sums = await asyncio.gather(*(things.add(x) for x in range(3)))
        assert_type(sums, list[int])
        assert_type(await client.wait_for_service("things", timeout=1), None)
        try:
            await client.call("things.add", x=1)
        except OutOfStock as error:
            assert_type(error.code, str)
            assert_type(error.sku, str)
        except CallError as error:
            if error.executed == "no" and error.retryable:
                assert_type(error.incident, str | None)
    assert_type(await Client().connect(), Client)


emails = Service("emails")


@emails.job(timeout=60)
async def welcome(context: Context, to: str, copies: int = 1) -> None: ...


@emails.job
def plain(to: str) -> str:
    return to


@emails.job
async def render(context: Context, path: str, size: int) -> bytes:
    context.progress(1, 2, note=path)
    return bytes(size)


@contract("emails", jobs=["welcome", "tidy"])
class EmailsApi(Protocol):
    async def welcome(self, to: str, copies: int = ...) -> None: ...

    async def tidy(self) -> None: ...

    async def sent(self, to: str) -> int: ...


async def jobs(client: Client) -> None:
    assert_type(await client.send(welcome, "ada", copies=2), Job)
    assert_type(await client.send(plain, to="ada"), Job)
    assert_type(await client.send("emails.welcome", to="ada"), Job)
    api = client.bind(EmailsApi)
    assert_type(api, EmailsApi)
    assert_type(await client.send(api.welcome, "ada", copies=2), Job)
    assert_type(await client.send(api.welcome, to="ada"), Job)
    assert_type(await client.send(api.tidy), Job)
    assert_type(await client.with_options(idempotency_key="k").send(api.welcome, to="ada"), Job)
    assert_type(await client.with_options(priority="high").send(api.welcome, to="ada"), Job)
    assert_type(await client.with_options(order_key="customer-7").send(api.welcome, to="ada"), Job)
    assert_type(await client.with_options(order_key="a").send_many(api.welcome, [{"to": "ada"}]), list[Job])
    assert_type(await client.send_many(api.welcome, [{"to": "ada"}]), list[Job])
    assert_type(await api.sent("ada"), int)
    watching = client.with_options(watch=True)
    assert_type(watching, WatchingCallMaker)
    assert_type(await watching.send(plain, to="ada"), WatchedJob[str])
    assert_type(await watching.send(render, "a.png", 5), WatchedJob[bytes])
    assert_type(await watching.with_options(delay=5).send(render, "a.png", 5), WatchedJob[bytes])
    assert_type(await watching.send("emails.render", path="a.png"), WatchedJob[Any])
    assert_type(await watching.send(api.welcome, to="ada"), WatchedJob[None])
    assert_type(await watching.send_many(render, [{"path": "a.png", "size": 5}]), list[WatchedJob[bytes]])
    job = await watching.send(render, "a.png", 5)
    async for step in job.progress():
        assert_type(step, Progress)
        assert_type(step.done, float | None)
    assert_type(await job.result(timeout=5), bytes)


async def workers(client: Client) -> None:
    async for found in client.workers("emails"):
        assert_type(found.services[0].jobs, tuple[JobInfo, ...])
    worker = Worker(service, url="memory://", prefetch=10, grace=1.5, reply_to=("q.*",), name="n", max_body=1)
    assert_type(await worker.run(), bool)
    async with worker as entered:
        assert_type(entered, Worker)
        assert_type(entered.in_flight, int)
    assert_type(await worker.stop(), bool)
