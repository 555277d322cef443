"""What mypy --strict must refuse, each line for the reason that stands behind it. Never run."""

from __future__ import annotations

from typing import Protocol

from rpcq import Batch, CallError, Client, Context, DomainError, Service, Worker, contract, with_options
from rpcq.testing import Running


class OutOfStock(DomainError):
    """No more."""

    sku: str


service = Service("things")
Service("things", queue_type="fast")  # error: arg-type
Service("things", timeout="5")  # error: arg-type
Service("things", errors=[ValueError])  # error: list-item
Service("things", int)  # error: call-arg
Service(5)  # error: arg-type


@service.method
async def add(x: int, y: int = 1) -> int:
    return x + y


@service.method(idempotent=True)
async def named(context: Context, *, sku: str) -> str:
    context.attempt = 5  # error: misc
    return sku


@service.method(batch=Batch())  # error: type-var
async def not_a_list(x: list[int]) -> int:
    return x[0]


service.method(batch=32)  # error: call-overload
Batch(size=32)  # error: call-arg
service.method(nam="x")  # error: call-overload
service.method(errors=[ValueError])  # error: list-item
service.method(timeout="5")  # error: call-overload
service.method(5)  # error: call-overload


@contract("things")
class Things(Protocol):
    async def add(self, x: int, y: int = 1) -> int: ...


contract("things", errors=[ValueError])  # error: list-item
Service(api="things")  # error: arg-type
Service(name="things", apis=Things)  # error: call-arg


@service.method
async def stateful(context: Context[int]) -> str:
    return context.state  # error: return-value


def of_a_narrower_state(context: Context[bool]) -> bool:
    return context.state


@service.method
async def helped(context: Context[int]) -> bool:
    return of_a_narrower_state(context)  # error: arg-type


async def test_something(rpcq_running: Running) -> None:
    rpcq_running(service, timeut=1.0)  # error: call-arg
    rpcq_running("things")  # error: arg-type


contract(idempotent=["add"])  # error: call-arg


async def handlers_keep_their_types() -> None:
    await add("1")  # error: arg-type
    await add()  # error: call-arg
    await named(sku="x")  # error: call-arg
    wrong: str = await add(1)  # error: assignment
    del wrong


async def clients() -> None:
    client = Client("amqp://localhost/")
    Client("amqp://localhost/", timeut=5)  # error: call-arg
    Client("amqp://localhost/", timeout="5")  # error: arg-type
    Client("amqp://localhost/", max_in_flight=1.5)  # error: arg-type
    Client("amqp://localhost/", prefetch=5)  # error: call-arg
    Client(5)  # error: arg-type

    things = client.bind(Things)
    await things.add("1")  # error: arg-type
    await things.add(1, 2, 3)  # error: call-arg
    await things.add(z=1)  # error: call-arg
    await things.remove(1)  # error: attr-defined
    wrong: str = await things.add(1)  # error: assignment
    things.add(1) + 1  # error: operator
    client.bind(Things, 5)  # error: arg-type
    client.bind("things")  # error: arg-type

    client.with_options(timeut=1)  # error: call-overload
    client.with_options(timeout="1")  # error: call-overload
    client.with_options(idempotent="yes")  # error: call-overload
    client.with_options(errors=(ValueError,))  # error: arg-type
    client.with_options(errors=[ValueError])  # error: list-item
    client.with_options(errors=OutOfStock)  # error: call-overload
    with_options(things, timeut=1)  # error: call-arg
    with_options(things, timeout="1")  # error: arg-type
    await with_options(things.add, timeout=1)("1")  # error: arg-type
    client.with_options(metadata={"x-a": 5})  # error: dict-item
    client.with_options(queue=5)  # error: call-overload
    client.with_options(5)  # error: call-overload
    client.service("things").with_options(timeut=1)  # error: call-arg
    client.service("things").with_options(timeout="1")  # error: arg-type
    client.service(5)  # error: arg-type
    await client.call(5)  # error: arg-type
    await client.wait_for_service("things", 1.0)  # error: call-arg
    client.in_flight = 5  # error: misc
    del wrong


emails = Service("emails")


@emails.job
async def welcome(context: Context, to: str, copies: int = 1) -> None: ...


@emails.job
def render(context: Context, path: str) -> bytes:
    context.progress("half")  # error: arg-type
    return b""


emails.job(timeout="60")  # error: call-overload
emails.job(retry=3)  # error: call-overload
emails.job(retries=3)  # error: call-overload
emails.job("welcome")  # error: call-overload


@contract("emails", jobs=["welcome"])
class EmailsApi(Protocol):
    async def welcome(self, to: str, copies: int = 1) -> None: ...


contract("emails", jobs=[5])  # error: list-item
contract("emails", jobs=5)  # error: arg-type


async def jobs(client: Client) -> None:
    await client.send(welcome, 5)  # error: call-overload
    await client.send(welcome)  # error: call-overload
    await client.send(welcome, name="ada")  # error: call-overload
    client.with_options(priority="urgent")  # error: call-overload
    client.with_options(order_key=7)  # error: call-overload
    client.with_options(watch="yes")  # error: call-overload
    (await client.send(welcome, "ada")).result(timeout=5)  # error: attr-defined
    watching = client.with_options(watch=True)
    await watching.send(welcome, 5)  # error: call-overload
    await (await watching.send(welcome, "ada")).result()  # error: call-arg
    number: int = await (await watching.send(render, "a.png")).result(timeout=5)  # error: assignment
    del number
    api = client.bind(EmailsApi)
    await client.send(api.welcome, 5)  # error: call-overload
    await client.send(api.welcome)  # error: call-overload
    await client.send(api.welcome, to="ada", copies="2")  # error: call-overload
    await client.send(api.welcome, name="ada")  # error: call-overload
    await client.send(api.welcom, to="ada")  # error: attr-defined
    await client.send(EmailsApi.welcome, to="ada")  # error: call-overload
    await client.send_many(api.welcome, ["ada"])  # error: list-item
    wrong: str = await client.send(api.welcome, to="ada")  # error: assignment
    del wrong


def own(error: OutOfStock) -> None:
    error.sku + 1  # error: operator
    error.skuu = 5  # error: attr-defined


def errors(error: CallError) -> None:
    error.executed = "perhaps"  # error: assignment
    CallError("x", executed="perhaps")  # error: arg-type
    assert error.executed == "perhaps"  # error: comparison-overlap


async def workers() -> None:
    Worker("things")  # error: arg-type
    Worker([service])  # error: arg-type
    Worker(service, prefetch="10")  # error: arg-type
    Worker(service, max_in_flight=10)  # error: call-arg
    Worker(service, reply_to="q")  # error: arg-type
    wrong: str = await Worker(service).run()  # error: assignment
    del wrong
