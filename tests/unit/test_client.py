"""The client at the wrong time and place, and what it says then."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import pytest

from rpcq import (
    CallError,
    CallTimeout,
    Client,
    ClosedError,
    ConfigurationError,
    InvalidParams,
    NotSerializable,
    OutcomeUnknown,
    Service,
    ServiceUnavailable,
    TooLarge,
    UsageError,
    Worker,
    with_options,
)

SECONDS = 5.0

Use = Callable[[Client], Awaitable[Any]]

USES: dict[str, Use] = {
    "call": lambda client: client.call("things.work", x=1),
    "proxy": lambda client: client.service("things").work(x=1),
    "options": lambda client: client.with_options(timeout=1).call("things.work", x=1),
    "wait_for_service": lambda client: client.wait_for_service("things", timeout=1),
}


class Things:
    """A service that counts what reaches it."""

    def __init__(self, namespace: str) -> None:
        self.url = f"memory://{namespace}"
        self.namespace = namespace
        self.ran: list[int] = []
        self.release = asyncio.Event()
        self.started = asyncio.Event()
        self.service = Service("things")
        self.service.method(self.work)
        self.service.method(self.hold)

    async def work(self, x: int) -> int:
        self.ran.append(x)
        return x

    async def hold(self) -> None:
        self.started.set()
        await self.release.wait()

    def client(self, **options: Any) -> Client:
        return Client(self.url, namespace=self.namespace, **options)


@pytest.fixture
async def things(namespace: str) -> AsyncIterator[Things]:
    found = Things(namespace)
    async with Worker(found.service, url=found.url, namespace=namespace):
        yield found
        found.release.set()


@pytest.fixture(params=USES)
def use(request: pytest.FixtureRequest) -> Use:
    return USES[request.param]


# Not open.


async def test_a_client_that_is_not_open_yet_says_how_to_open_it_and_sends_nothing(things: Things, use: Use) -> None:
    client = things.client()
    with pytest.raises(ClosedError, match=r"not open yet.*async with"):
        await use(client)
    assert not things.ran
    assert client.in_flight == 0


async def test_a_client_that_is_closed_says_so_and_sends_nothing(things: Things, use: Use) -> None:
    async with things.client() as client:
        await client.call("things.work", x=0)
    with pytest.raises(ClosedError, match="this client is closed"):
        await use(client)
    assert things.ran == [0]
    assert client.in_flight == 0


async def test_a_client_is_opened_once(things: Things) -> None:
    async with things.client() as client:
        with pytest.raises(UsageError, match="opened once"):
            await client.connect()
        assert await client.call("things.work", x=1) == 1  # and it is none the worse for it
    with pytest.raises(UsageError, match="closed"):
        await client.connect()


async def test_connect_gives_the_client_itself(things: Things) -> None:
    client = things.client()
    assert await client.connect() is client
    await client.close()


async def test_closing_twice_or_unopened_does_nothing(things: Things) -> None:
    client = things.client()
    await client.connect()
    await client.close()
    await client.close()
    unopened = things.client()
    await unopened.close()
    with pytest.raises(UsageError):
        await unopened.connect()


async def test_a_client_is_closed_where_its_block_raises(things: Things) -> None:
    with pytest.raises(ZeroDivisionError):
        async with things.client() as client:
            raise ZeroDivisionError
    with pytest.raises(ClosedError):
        await client.call("things.work", x=1)


# Closing with calls under way.


async def test_closing_ends_calls_under_way_at_once_and_says_that_they_may_have_run(things: Things) -> None:
    client = await things.client().connect()
    calls = [asyncio.create_task(client.call("things.hold")) for _ in range(5)]
    async with asyncio.timeout(SECONDS):
        await things.started.wait()
        await client.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [(type(it), it.executed) for it in outcomes if isinstance(it, CallError)] == [(OutcomeUnknown, "maybe")] * 5
    assert client.in_flight == 0


async def test_closing_ends_calls_that_were_never_sent_and_says_that_they_did_not_run(things: Things) -> None:
    client = await things.client().connect()
    broker = client._transport._broker  # type: ignore[attr-defined]  # the memory transport's
    broker.block("an alarm")
    call = asyncio.create_task(client.call("things.work", x=1))
    async with asyncio.timeout(SECONDS):
        while not client.in_flight:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)
        await client.close()
        with pytest.raises(ServiceUnavailable) as caught:
            await call
    assert caught.value.executed == "no"
    broker.unblock()
    async with things.client() as other:
        await other.call("things.work", x=2)
    assert things.ran == [2]


async def test_closing_ends_a_wait_for_a_service(things: Things) -> None:
    client = await things.client().connect()
    waiting = asyncio.create_task(client.wait_for_service("nobody", timeout=60))
    await asyncio.sleep(0)
    await client.close()
    async with asyncio.timeout(SECONDS):
        with pytest.raises((ClosedError, ServiceUnavailable)):
            await waiting


# The wrong event loop, the wrong process.


async def test_a_call_from_another_event_loop_is_refused_and_sends_nothing(things: Things, use: Use) -> None:
    async with things.client() as client:
        caught: list[BaseException] = []

        async def elsewhere() -> None:
            await use(client)

        def thread() -> None:
            try:
                asyncio.run(elsewhere())
            except BaseException as error:  # noqa: BLE001 - to be looked at below
                caught.append(error)

        other = threading.Thread(target=thread)
        other.start()
        await asyncio.to_thread(other.join, SECONDS)
        assert [type(error) for error in caught] == [UsageError]
        assert "another event loop" in str(caught[0])
        assert client.in_flight == 0
        assert await client.call("things.work", x=1) == 1
        assert things.ran == [1]


async def test_closing_from_another_event_loop_is_refused_and_the_client_goes_on(things: Things) -> None:
    async with things.client() as client:
        with pytest.raises(UsageError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, client.close())
        assert await client.call("things.work", x=1) == 1


AFTER_A_FORK = """
import asyncio, os, sys
from rpcq import Client, Service, Worker

service, ran = Service("things"), []

@service.method
async def work(x: int) -> int:
    ran.append(x)
    return x

async def use(client):
    {use}

async def main():
    async with Worker(service, url="memory://"), Client("memory://") as client:
        child = os.fork()
        if not child:
            try:
                {child}
            except Exception as error:
                print(type(error).__name__, error, len(ran), flush=True)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        print("parent", await client.call("things.work", x=5), ran, flush=True)

asyncio.run(main())
"""


def forked(use: str, child: str) -> list[str]:
    ran = subprocess.run(
        [sys.executable, "-c", AFTER_A_FORK.format(use=use, child=child)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.parametrize(
    "use", ['await client.call("things.work", x=1)', "await client.close()"], ids=["call", "close"]
)
@pytest.mark.parametrize(
    "child",
    [
        "await use(client)",  # in the event loop that both processes now have
        "asyncio.events._set_running_loop(None); asyncio.run(use(client))",  # in one of its own
    ],
    ids=["same loop", "own loop"],
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_client_is_refused_after_a_fork_and_the_parents_goes_on(use: str, child: str) -> None:
    told, parent = forked(use, child)
    assert told.startswith("UsageError")
    assert "before a fork" in told
    assert told.endswith(" 0")
    assert parent == "parent 5 [5]"


# Names.


@pytest.mark.parametrize("target", ["", "work", ".work", "things.", "th ings.work", "things.wo rk", "a/b.c", "å.b"])
async def test_a_name_that_cannot_be_is_refused_before_anything_is_sent(things: Things, target: str) -> None:
    async with things.client() as client:
        with pytest.raises(ConfigurationError):
            await client.call(target, x=1)
        assert client.in_flight == 0
    assert not things.ran


async def test_a_name_without_a_service_says_what_to_do(things: Things) -> None:
    async with things.client() as client:
        with pytest.raises(ConfigurationError, match=r"must be 'service\.method', .*; got 'work'"):
            client.call("work", x=1)  # at once, and not when it is awaited


@pytest.mark.parametrize("name", ["", "a b", "x" * 101, "a\n", 5, None])
async def test_a_service_that_cannot_be_is_refused(things: Things, name: Any) -> None:
    client = things.client()
    with pytest.raises(ConfigurationError, match="the name of a service must be"):
        client.service(name)
    async with client:
        with pytest.raises(ConfigurationError, match="the name of a service must be"):
            await client.wait_for_service(name)


async def test_a_private_attribute_of_a_proxy_is_no_method(things: Things) -> None:
    proxy = things.client().service("things")
    with pytest.raises(AttributeError):
        proxy._private  # noqa: B018
    assert not hasattr(proxy, "__len__")


# Before anything is sent.


async def test_what_cannot_be_sent_is_told_and_nothing_is_left_in_flight(things: Things) -> None:
    async with things.client(max_body=100) as client:
        with pytest.raises(NotSerializable, match="'x'"):
            await client.call("things.work", x=object())
        with pytest.raises(TooLarge, match="the limit is 100"):
            await client.call("things.work", x="x" * 200)
        with pytest.raises(TooLarge, match="headers"):
            await client.with_options(metadata={"x-a": "x" * 9000}).call("things.work", x=1)
        with pytest.raises(InvalidParams, match="not both"):
            await client.call("things.work", 1, x=1)
        assert client.in_flight == 0
        assert await client.call("things.work", x=1) == 1
    assert things.ran == [1]


async def test_a_call_that_nobody_answers_ends_at_its_deadline(things: Things) -> None:
    async with things.client(timeout=0.05) as client:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(CallTimeout) as caught:
            await client.call("things.hold")
        assert 0.04 < loop.time() - began < 1.0
        assert isinstance(caught.value, TimeoutError)
        assert client.in_flight == 0


async def test_a_service_that_nobody_serves_is_waited_for_and_told(things: Things) -> None:
    async with things.client() as client:
        await client.wait_for_service("things", timeout=SECONDS)
        with pytest.raises(ServiceUnavailable, match=r"no worker of 'nobody' answered within 0\.1 s") as caught:
            await client.wait_for_service("nobody", timeout=0.1)
        assert things.namespace in str(caught.value)
        assert not client._control._questions


@pytest.mark.parametrize(
    "seconds", [float("nan"), float("inf"), pytest.param(10**400, id="huge"), -1, -0.1, 0, True, "1", None]
)
async def test_a_wait_that_is_no_number_of_seconds_is_named(things: Things, seconds: Any) -> None:
    async with things.client() as client:
        for ask in (client.workers, client.stats):
            with pytest.raises(ConfigurationError, match=f"wait must be a number of seconds above 0; got {seconds!r}"):
                await anext(ask(wait=seconds))
        with pytest.raises(ConfigurationError, match=f"timeout must be a number of seconds above 0; got {seconds!r}"):
            await client.wait_for_service("things", timeout=seconds)


# Options and the URL.


def test_without_a_url_the_environment_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RPCQ_URL", raising=False)
    for nothing in (None, ""):
        with pytest.raises(ConfigurationError, match="RPCQ_URL"):
            Client(nothing)
    monkeypatch.setenv("RPCQ_URL", "http://localhost")
    with pytest.raises(ConfigurationError, match="'http:"):
        Client()
    monkeypatch.setenv("RPCQ_URL", "memory://")
    Client()
    with pytest.raises(ConfigurationError, match="'ftp:"):
        Client("ftp://localhost")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": "30"}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"timeout": None}, "timeout"),
        ({"timeout": 26 * 60}, "1500"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"max_in_flight": 1.5}, "max_in_flight"),
        ({"max_body": 0}, "max_body"),
        ({"heartbeat": 0}, "heartbeat"),
        ({"heartbeat": 2.5}, "heartbeat"),
        ({"connect_timeout": 0}, "connect_timeout"),
        ({"name": "a b"}, "name must be"),
        ({"namespace": ""}, "namespace"),
        ({"namespace": "a b"}, "namespace"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        Client("memory://", **options)


def test_an_option_that_does_not_exist_is_named() -> None:
    with pytest.raises(TypeError, match="timeut"):
        Client("memory://", timeut=5)  # type: ignore[call-arg]


async def test_an_option_of_a_call_that_cannot_be_is_named_at_once(things: Things) -> None:
    client = things.client()
    for options, named in (
        ({"timeout": 0}, "timeout"),
        ({"queue": ""}, "queue"),
        ({"errors": (ValueError,)}, "errors"),
        ({"errors": "no"}, "errors"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"metadata": {"x-death": "b"}}, "metadata"),
        ({"metadata": {"x-a": 5}}, "metadata"),
    ):
        with pytest.raises(ConfigurationError, match=named):
            client.with_options(**options)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match=named):
            client.service("things").with_options(**options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="timeut"):
        client.with_options(timeut=1)  # type: ignore[call-arg]


async def test_a_client_and_a_worker_show_where_they_are_connected_and_what_is_in_flight() -> None:
    service = Service("things")
    entered, release = asyncio.Event(), asyncio.Event()

    @service.method
    async def work() -> None:
        entered.set()
        await release.wait()

    url = "memory://shown"
    worker, client = Worker(service, url=url), Client(url, namespace="rpcq")
    assert repr(client) == "<Client at memory://shown in namespace 'rpcq': not open yet, 0 calls in flight>"
    assert repr(worker) == (
        "<Worker of 'things' at memory://shown in namespace 'rpcq': the worker is new, 0 requests in flight>"
    )
    async with worker, client:
        call = asyncio.create_task(client.call("things.work"))
        await asyncio.wait_for(entered.wait(), SECONDS)
        assert repr(client).endswith("'rpcq': connected, 1 calls in flight>")
        assert repr(worker).endswith("'rpcq': connected, 1 requests in flight>")
        release.set()
        await call
    assert repr(client).endswith("'rpcq': closed, 0 calls in flight>")
    assert repr(worker).endswith("'rpcq': the worker is stopped, 0 requests in flight>")


def test_a_client_and_a_worker_do_not_show_the_password() -> None:
    service = Service("things")
    service.method(name="work")(lambda: None)
    url = "amqps://ada:s3cret@broker.example/orders"
    for it in (Client(url), Worker(service, url=url)):
        assert "amqps://ada:***@broker.example" in repr(it)
        assert "s3cret" not in repr(it)


def test_a_bound_contract_shows_its_class_and_its_service() -> None:
    class Things(Protocol):
        async def work(self) -> None: ...

    client = Client("memory://shown")
    bound = client.bind(Things, "things")
    assert repr(bound) == repr(with_options(bound, timeout=1)) == "<Things of service 'things'>"
    assert repr(bound.work) == "<RemoteMethod things.work>"
