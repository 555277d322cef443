"""What mypy --strict must refuse of `rpcq.sync`, each line for the reason that it names. Never run."""

from __future__ import annotations

from typing import Protocol

from rpcq import Context, Service, contract, sync
from rpcq.sync import Client

emails = Service("emails")


@emails.job
async def welcome(context: Context, to: str) -> None: ...


@contract("things")
class Things(Protocol):
    async def add(self, x: int, y: int = 1) -> int: ...


@sync.contract("things")
class BlockingThings(Protocol):
    def add(self, x: int, y: int = 1) -> int: ...


@sync.contract("emails", jobs=["welcome"])
class BlockingEmails(Protocol):
    def welcome(self, to: str, copies: int = 1) -> None: ...


@contract("emails", jobs=["welcome"])
class Emails(Protocol):
    async def welcome(self, to: str, copies: int = 1) -> None: ...


sync.contract("emails", jobs=[5])  # error: list-item


def jobs(client: Client) -> None:
    client.send(client.bind(BlockingEmails).welcome, 5)  # error: call-overload
    client.send(client.bind(BlockingEmails).welcome, name="ada")  # error: call-overload
    client.send(client.bind(Emails).welcome)  # error: call-overload
    client.send(Emails.welcome, to="ada")  # error: call-overload


def clients() -> None:
    client = Client(5)  # error: arg-type
    Client(timeut=5)  # error: call-arg
    Client(timeout="5")  # error: arg-type
    client.call(Things.add, "1")  # error: call-overload
    client.call(Things.add, z=1)  # error: call-overload
    client.call(5)  # error: call-overload
    wrong: str = client.call(Things.add, 1)  # error: assignment
    client.bind(BlockingThings).add("1")  # error: arg-type
    client.bind(BlockingThings).remove()  # error: attr-defined
    client.bind(Things).add(1) + 1  # error: operator
    wrong = client.bind(BlockingThings).add(1)  # error: assignment
    wrong = client.with_options(returns=int).call("things.add")  # error: assignment
    wrong = client.service("things").with_options(returns=int).add()  # error: assignment
    client.with_options(timeut=1)  # error: call-overload
    client.with_options(timeout="1")  # error: call-overload
    client.send(welcome, 5)  # error: call-overload
    client.send_many(welcome, [5])  # error: list-item
    client.wait_for_service("things", 1.0)  # error: call-arg
    client.in_flight = 5  # error: misc
    del wrong


async def awaiting(client: Client) -> None:
    await client.with_options(returns=int).call("things.add")  # error: misc
    async with client:  # error: attr-defined
        pass
