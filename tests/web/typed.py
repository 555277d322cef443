"""What type checkers must make of `rpcq.web` in an app: no error but on the lines that say so. Never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any, Protocol, TypedDict, assert_type

from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware

from rpcq import CallError, Client, DomainError, RpcqError, Service, contract
from rpcq.web import CancelOnDisconnect, Problem, Rpc, on_call_error, problem


class OutOfStock(DomainError):
    """No more."""

    sku: str = ""


@contract("things")
class Things(Protocol):
    async def add(self, x: int, y: int = 1) -> int: ...


class State(TypedDict):
    answer: int


@asynccontextmanager
async def plain(_app: FastAPI) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def with_state(_app: Starlette) -> AsyncIterator[State]:
    yield {"answer": 42}


rpc = Rpc("memory://", services=[Service("s")], worker_options={"prefetch": 5}, grace=1, first_wait=0.5, timeout=2)
app = FastAPI(lifespan=rpc.lifespan)
app.add_middleware(CancelOnDisconnect)
app.add_exception_handler(RpcqError, on_call_error(domain={OutOfStock: 409}))
app.add_exception_handler(CallError, on_call_error({OutOfStock: (409, "Sold out")}, retry_after=2))
on_call_error({OutOfStock: lambda error: (410, error.sku)})
FastAPI(
    lifespan=rpc.around(plain), responses=on_call_error().responses, exception_handlers={CallError: on_call_error()}
)
Starlette(
    lifespan=rpc.around(with_state),
    middleware=[Middleware(CancelOnDisconnect)],
    exception_handlers={RpcqError: on_call_error()},
)

assert_type(rpc.bind(Things), Things)
assert_type(rpc.bind(Things, "other", timeout=1.5, idempotent=True), Things)
depends: Callable[[], Coroutine[Any, Any, Things]] = rpc.api(Things, timeout=1.5)


@app.get("/add")
async def add(x: int, things: Annotated[Things, Depends(rpc.api(Things))]) -> int:
    assert_type(await things.add(x), int)
    await things.add("1")  # error: arg-type
    return await things.add(x, 2)


async def others() -> None:
    assert_type(rpc.client, Client)
    assert_type(rpc.ready, bool)
    assert_type(rpc.why_not_ready, str | None)
    made = problem(OutOfStock("none"), {OutOfStock: 409})
    assert_type(made, Problem)
    assert_type(made.status, int)
    assert_type(made.body, bytes)
    api = await depends()
    assert_type(await api.add(1), int)
    await api.ad(1)  # error: attr-defined
    async with rpc.lifespan():
        pass


Rpc("memory://", timeut=1)  # error: call-arg
Rpc("memory://", worker_options={"prefetc": 5})  # error: arg-type
Rpc("memory://", services=[5])  # error: list-item
on_call_error({ValueError: 400})  # error: dict-item
on_call_error({OutOfStock: "409"})  # error: dict-item
rpc.bind(Things, timeout="1")  # error: arg-type
problem("none")  # error: arg-type
