"""The worker: what it refuses to serve, and that it leaves nothing open where it could not start."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from rpcq import CallTimeout, Client, ConfigurationError, Context, Service, ServiceUnavailable, UsageError, Worker
from rpcq.errors import BrokerUnreachable
from rpcq.transport.base import Outgoing, Published

SECONDS = 5.0


class Served:
    """A service with a lifespan, and what became of it."""

    def __init__(self, name: str = "things", fails: str = "", told: list[str] | None = None) -> None:
        self.told = [] if told is None else told
        self.fails = fails
        self.name = name
        self.service = Service(name, lifespan=self._lifespan)
        self.service.method(self.work)

    async def work(self, context: Context) -> str:
        self.told.append("worked")
        return str(context.state)

    @asynccontextmanager
    async def _lifespan(self) -> AsyncIterator[str]:
        if self.fails == "entering":
            raise ZeroDivisionError(self.name)
        self.told.append(f"{self.name} entered")
        try:
            yield "state"
        finally:
            self.told.append(f"{self.name} left")
        if self.fails == "leaving":
            raise ZeroDivisionError(self.name)


def a_dead_url() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"amqp://127.0.0.1:{one.getsockname()[1]}/"


# What it refuses.


def test_a_worker_without_services_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="services must be one or more"):
        Worker(url="memory://")


def test_a_service_without_methods_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="'empty' has no methods"):
        Worker(Served().service, Service("empty"), url="memory://")


def test_a_service_whose_default_method_is_none_of_its_own_is_refused() -> None:
    service = Service("things", default_method="other")
    service.method(Served().work)
    with pytest.raises(ConfigurationError, match="must be one of its methods; got 'other'"):
        Worker(service, url="memory://")


def test_two_services_of_one_name_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="must have different names; got several called things"):
        Worker(Served().service, Served("others").service, Served().service, url="memory://")


@pytest.mark.parametrize("thing", [None, "things", Service, 5, lambda: None], ids=["None", "str", "type", "int", "def"])
def test_what_is_no_service_is_refused_by_its_repr(thing: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Worker(thing, url="memory://")
    assert f"must be instances of Service; got {thing!r}" in str(caught.value)


def test_a_list_of_services_is_refused_since_each_is_an_argument_of_its_own() -> None:
    with pytest.raises(ConfigurationError, match="must be instances of Service"):
        Worker([Served().service], url="memory://")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prefetch": 0}, "prefetch"),
        ({"prefetch": 65_536}, "prefetch"),
        ({"prefetch": 1.0}, "prefetch"),
        ({"prefetch": True}, "prefetch"),
        ({"grace": 0}, "grace"),
        ({"grace": "30"}, "grace"),
        ({"reply_to": "amq.gen-.*"}, "reply_to"),
        ({"reply_to": ("(",)}, "reply_to"),
        ({"namespace": "a b"}, "namespace"),
        ({"max_body": -1}, "max_body"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        Worker(Served().service, url="memory://", **options)


def test_without_a_url_the_environment_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RPCQ_URL", raising=False)
    with pytest.raises(ConfigurationError, match="RPCQ_URL"):
        Worker(Served().service)
    monkeypatch.setenv("RPCQ_URL", "memory://")
    Worker(Served().service)


# Starting.


async def test_a_worker_is_started_once(namespace: str) -> None:
    served = Served()
    worker = Worker(served.service, url=f"memory://{namespace}")
    await worker.start()
    with pytest.raises(UsageError, match="started once"):
        await worker.start()
    async with Client(f"memory://{namespace}") as client:
        assert await client.call("things.work") == "state"  # and it is none the worse for it
    assert await worker.stop()
    with pytest.raises(UsageError, match="stopped"):
        await worker.start()
    assert served.told == ["things entered", "worked", "things left"]


async def test_stopping_twice_or_unstarted_does_nothing(namespace: str) -> None:
    served = Served()
    worker = Worker(served.service, url=f"memory://{namespace}")
    assert await worker.stop()
    await worker.start()
    assert await worker.stop()
    assert await worker.stop()
    assert served.told == ["things entered", "things left"]


async def test_a_lifespan_that_raises_when_it_is_entered_ends_the_others_and_opens_nothing(namespace: str) -> None:
    told: list[str] = []
    first, failing, never = Served("first", told=told), Served("failing", "entering", told), Served("never", told=told)
    worker = Worker(first.service, failing.service, never.service, url=f"memory://{namespace}")
    with pytest.raises(ZeroDivisionError, match="failing"):
        await worker.start()
    assert told == ["first entered", "first left"]
    async with Client(f"memory://{namespace}") as client:
        with pytest.raises(ServiceUnavailable):
            await client.call("first.work")
    with pytest.raises(UsageError):
        await worker.start()


async def test_lifespans_are_left_in_reverse_and_one_that_raises_does_not_keep_the_others(namespace: str) -> None:
    told: list[str] = []
    first, second, third = Served("first", told=told), Served("second", "leaving", told), Served("third", told=told)
    worker = Worker(first.service, second.service, third.service, url=f"memory://{namespace}")
    await worker.start()
    with pytest.raises(ZeroDivisionError, match="second"):
        await worker.stop()
    assert told == [
        "first entered",
        "second entered",
        "third entered",
        "third left",
        "second left",
        "first left",
    ]
    async with Client(f"memory://{namespace}") as client:
        with pytest.raises(ServiceUnavailable):
            await client.call("first.work")


async def test_a_worker_whose_broker_cannot_be_reached_leaves_its_lifespan_and_nothing_open() -> None:
    before = asyncio.all_tasks()
    served, url = Served(), a_dead_url()
    worker = Worker(served.service, url=url)
    async with asyncio.timeout(SECONDS):
        with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1"):
            await worker.start()
    assert served.told == ["things entered", "things left"]
    assert asyncio.all_tasks() == before
    assert await worker.stop()
    with pytest.raises(UsageError):
        await worker.start()


async def run(worker: Worker) -> None:
    await worker.run()


async def enter(worker: Worker) -> None:
    async with worker:
        pytest.fail("it served")


@pytest.mark.parametrize("how", [run, enter])
async def test_a_worker_that_cannot_start_says_so_however_it_is_run(how: Callable[[Worker], Awaitable[None]]) -> None:
    served = Served()
    with pytest.raises(BrokerUnreachable):
        await how(Worker(served.service, url=a_dead_url()))
    assert served.told == ["things entered", "things left"]


# Running.


async def test_run_serves_until_it_is_asked_to_stop(namespace: str) -> None:
    served = Served()
    worker = Worker(served.service, url=f"memory://{namespace}")
    running = asyncio.create_task(worker.run())
    async with Client(f"memory://{namespace}") as client, asyncio.timeout(SECONDS):
        await client.wait_for_service("things")
        assert await client.call("things.work") == "state"
        worker.request_stop()
        assert await running is True
        with pytest.raises(CallTimeout):  # its queue stays, and nobody takes from it
            await client.with_options(timeout=0.1).call("things.work")
    assert served.told == ["things entered", "worked", "things left"]


async def test_run_stops_where_its_task_is_cancelled(namespace: str) -> None:
    served = Served()
    worker = Worker(served.service, url=f"memory://{namespace}")
    running = asyncio.create_task(worker.run())
    async with Client(f"memory://{namespace}") as client, asyncio.timeout(SECONDS):
        await client.wait_for_service("things")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert served.told == ["things entered", "things left"]


async def test_a_stop_that_was_asked_for_before_the_start_is_not_forgotten(namespace: str) -> None:
    served = Served()
    worker = Worker(served.service, url=f"memory://{namespace}")
    worker.request_stop()
    async with asyncio.timeout(SECONDS):
        assert await worker.run() is True
    assert served.told == ["things entered", "things left"]


async def test_what_does_not_end_within_the_grace_time_is_cut_off_and_told(
    namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    service, started, cancelled = Service("things"), asyncio.Event(), asyncio.Event()

    @service.method
    async def hang() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    worker = Worker(service, url=f"memory://{namespace}", grace=0.05)
    await worker.start()
    async with Client(f"memory://{namespace}", timeout=SECONDS) as client, asyncio.timeout(SECONDS):
        call = asyncio.create_task(client.call("things.hang"))
        await started.wait()
        assert worker.in_flight == 1
        assert await worker.stop() is False
        assert cancelled.is_set()
        assert "calls cut off" in caplog.text
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


async def test_a_reply_for_which_the_broker_takes_nothing_small_enough_is_given_up_and_acknowledged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    namespace = secrets.token_hex(4)
    worker = Worker(Served().service, url="memory://", namespace=namespace)
    async with worker, Client("memory://", namespace=namespace) as client:
        await client.wait_for_service("things")

        def publish(message: Outgoing) -> None:
            message.on_published(Published.TOO_LARGE)

        monkeypatch.setattr(worker._transport, "publish", publish)
        result = client.with_options(timeout=0.3).call("things.work")
        with pytest.raises(CallTimeout):
            await result
        with pytest.raises(CallTimeout):
            await client.with_options(timeout=0.3).call("things.work", unknown=1)
        assert (worker.in_flight, worker.counts()["finished"]) == (0, 2)
    assert "larger than the broker takes" in caplog.text
