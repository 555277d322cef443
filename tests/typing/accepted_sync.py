"""What mypy --strict must accept of `rpcq.sync`: the types that users get. Never run."""

from __future__ import annotations

from typing import Any, Protocol, assert_type

from rpcq import Context, Job, Service, WorkerInfo, contract, sync
from rpcq.sync import CallMaker, Client, ServiceProxy

emails = Service("emails")


@emails.job
async def welcome(context: Context, to: str, copies: int = 1) -> None: ...


@contract("things", idempotent=["add"])
class Things(Protocol):
    async def add(self, x: int, y: int = 1) -> int: ...


@sync.contract("things", idempotent=["add"])
class BlockingThings(Protocol):
    def add(self, x: int, y: int = 1) -> int: ...


def clients() -> None:
    with Client("amqp://localhost/", timeout=5, max_in_flight=10, namespace="n", heartbeat=5) as client:
        assert_type(client, Client)
        assert_type(client.connect(), Client)
        assert_type(client.in_flight, int)
        assert_type(client.call("things.add", x=1, y=2), Any)
        assert_type(client.call(Things.add, 1, y=2), int)
        assert_type(client.with_options(timeout=1.5).call(Things.add, 1), int)
        bound = client.bind(BlockingThings)
        assert_type(bound, BlockingThings)
        assert_type(bound.add(1, y=2), int)
        assert_type(client.with_options(timeout=1.5).bind(BlockingThings, "others").add(1), int)
        assert_type(client.workers("things"), list[WorkerInfo])
        client.wait_for_service("things", timeout=1.0)


def options(client: Client) -> None:
    assert_type(client.with_options(returns=int), CallMaker[int])
    assert_type(client.with_options(returns=int, timeout=1.0).call("things.add", 1, 2), int)
    assert_type(client.with_options(returns=list[int]).call("things.add", 1, 2), list[int])
    assert_type(client.with_options(timeout=1.0).with_options(returns=str).call("things.add"), str)
    assert_type(client.with_options(returns=int | None).call("things.add"), Any)
    assert_type(client.service("things"), ServiceProxy[Any])
    assert_type(client.service("things").add(x=1), Any)
    assert_type(client.service("things").with_options(returns=int).add(x=1), int)
    assert_type(client.service("things").with_options(returns=int)["with_options"](x=1), int)


@sync.contract("emails", jobs=["welcome"])
class BlockingEmails(Protocol):
    def welcome(self, to: str, copies: int = 1) -> None: ...


@contract("emails", jobs=["welcome"])
class Emails(Protocol):
    async def welcome(self, to: str, copies: int = 1) -> None: ...


def jobs_by_contract(client: Client) -> None:
    assert_type(client.send(client.bind(BlockingEmails).welcome, "ada", copies=2), Job)
    assert_type(client.send(client.bind(Emails).welcome, to="ada"), Job)
    assert_type(client.with_options(timeout=1.0).send(client.bind(BlockingEmails).welcome, "ada"), Job)
    assert_type(client.send_many(client.bind(Emails).welcome, [{"to": "ada"}]), list[Job])


def jobs(client: Client) -> None:
    assert_type(client.send(welcome, "ada"), Job)
    assert_type(client.send(welcome, to="ada", copies=2), Job)
    assert_type(client.send("emails.welcome", to="ada"), Job)
    assert_type(client.with_options(timeout=1.0).send(welcome, "ada"), Job)
    assert_type(client.send_many(welcome, [{"to": "ada"}]), list[Job])
    watching = client.with_options(watch=True)
    assert_type(watching.send(welcome, "ada"), sync.WatchedJob[None])
    assert_type(watching.send("emails.welcome", to="ada").result(timeout=5), Any)
    assert_type(watching.send_many(welcome, [{"to": "ada"}]), list[sync.WatchedJob[None]])
