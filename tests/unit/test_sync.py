"""A client for programs that block: the same calls from threads, handlers and notebooks."""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol

import pytest

import rpcq
from rpcq import (
    BrokerError,
    CallTimeout,
    ClosedError,
    ConfigurationError,
    Context,
    DomainError,
    InvalidParams,
    InvalidReply,
    MethodNotFound,
    ObservedCall,
    OutcomeUnknown,
    RemoteError,
    Retry,
    SendError,
    Service,
    ServiceUnavailable,
    UsageError,
    Worker,
    contract,
    sync,
)
from rpcq.observer import Observer
from rpcq.runtime import blocking
from rpcq.sync import Client, disconnect_all
from rpcq.testing import FakeService, running, running_sync

SECONDS = 10.0
UNREACHABLE = "amqp://127.0.0.1:1/"

RunningSync = Callable[..., AbstractContextManager[Client]]


class OutOfStock(DomainError):
    """No more."""


@contract("stock", errors=[OutOfStock], idempotent=["count"])
class StockApi(Protocol):
    async def take(self, sku: str, count: int = 1) -> set[int]: ...

    async def count(self, sku: str) -> int: ...


def stock() -> Service:
    service = Service("stock", errors=[OutOfStock])

    @service.method
    async def take(sku: str, count: int = 1) -> list[int]:
        if sku == "nuts":
            raise OutOfStock("no more nuts")
        return [*range(count)]

    @service.method(idempotent=True)
    async def count(sku: str) -> int:
        return len(sku)

    return service


@pytest.fixture
def client() -> Iterator[Client]:
    with running_sync(stock()) as made:
        yield made


# Calls.


def test_a_call_waits_for_its_result(client: Client) -> None:
    assert client.call("stock.count", sku="bolts") == 5
    assert client.call("stock.count", "bolts") == 5
    assert client.service("stock").count(sku="bolts") == 5
    assert client.service("stock")["count"](sku="bolts") == 5
    assert client.service("stock").with_options(returns=float).count(sku="bolts") == 5.0
    assert client.with_options(timeout=2.0, idempotent=True).call("stock.count", sku="bolts") == 5
    assert (client.connected, client.in_flight, client.retried, client.unmatched_replies) == (True, 0, 0, 0)


def test_a_contract_gives_results_their_types_and_errors_their_classes(client: Client) -> None:
    assert client.call(StockApi.take, "bolts", count=2) == {0, 1}
    assert client.with_options(timeout=2.0).call(StockApi.count, sku="bolts") == 5
    assert client.bind(StockApi).take("bolts", count=2) == {0, 1}
    assert client.with_options(timeout=2.0).bind(StockApi, "stock").count("bolts") == 5
    for call in (lambda: client.call(StockApi.take, "nuts"), lambda: client.bind(StockApi).take("nuts")):
        with pytest.raises(OutOfStock, match="no more nuts") as caught:
            call()
        assert caught.value.executed == "yes"


def test_a_method_that_belongs_to_no_contract_cannot_be_called(client: Client) -> None:
    class Unmarked(Protocol):
        async def take(self, sku: str) -> int: ...

    for target in (Unmarked.take, 5, None):
        with pytest.raises(ConfigurationError, match=r"target must be .*@contract; got"):
            client.call(target, "bolts")  # type: ignore[call-overload]


def test_errors_are_those_of_the_asynchronous_client(client: Client) -> None:
    with pytest.raises(MethodNotFound) as caught:
        client.call("stock.buy")
    assert (caught.value.executed, caught.value.retryable) == ("no", False)
    with pytest.raises(ServiceUnavailable):
        client.call("shop.buy")
    with pytest.raises(InvalidReply):
        client.with_options(returns=list[int]).call("stock.count", sku="bolts")
    with pytest.raises(ConfigurationError, match="service"):
        client.call("count", sku="bolts")


def test_a_traceback_shows_the_callers_way_and_nothing_of_the_other_thread(client: Client) -> None:
    with pytest.raises(MethodNotFound) as caught:
        client.call("stock.buy")
    files = [frame.filename.rpartition("rpcq/")[2] for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert files[0] == __file__.rpartition("rpcq/")[2]
    assert {*files[1:]} == {"sync/client.py", "calls/waiting.py", "calls/proxy.py", "runtime/blocking.py"}
    text = "".join(traceback.format_exception(caught.value))
    assert text.count("Traceback") == 1
    assert "asyncio" not in text


def test_it_knows_workers_and_waits_for_services(client: Client) -> None:
    assert [it.services[0].name for it in client.workers("stock")] == ["stock"]
    assert [it.finished for it in client.stats()] == [0]
    client.wait_for_service("stock", timeout=SECONDS)
    with pytest.raises(ServiceUnavailable, match="no worker of 'shop' answered"):
        client.wait_for_service("shop", timeout=0.1)
    with pytest.raises(ConfigurationError, match="timeout"):
        client.wait_for_service("shop", timeout=0)
    with pytest.raises(ConfigurationError, match="wait"):
        client.workers(wait=-1)


def test_a_failed_call_is_made_again_as_retry_says() -> None:
    fake = FakeService("stock").fails("take", rpcq.Overloaded()).answers("take", 1)
    with running_sync(fake) as client:
        assert client.with_options(retry=Retry(initial_backoff=0.01)).call("stock.take", sku="bolts") == 1
        assert client.retried == 1


def test_a_deadline_ends_a_call() -> None:
    with running_sync(FakeService("stock").answers("take", 1, after=60)) as client:
        began = time.monotonic()
        with pytest.raises(CallTimeout):
            client.with_options(timeout=0.2).call("stock.take")
        assert time.monotonic() - began < SECONDS


def test_observers_and_callbacks_are_called_with_its_calls() -> None:
    seen: list[str] = []

    class Seen(Observer):
        def on_call(self, call: ObservedCall) -> None:
            seen.append(call.label)

    replies: list[Any] = []
    with (
        running_sync(stock()) as inner,
        Client(inner_url(inner), namespace=inner.options.namespace, observers=[Seen()]) as client,
    ):
        client.on_reply(replies.append)
        client.call("stock.count", sku="bolts")
        client.on_reply(None)
        client.call("stock.count", sku="bolts")
    assert seen == ["stock.count", "stock.count"]
    assert [it.body for it in replies] == [b"5"]


def inner_url(client: Client) -> str:
    url = client._url
    assert url is not None
    return url


@sync.contract("stock", errors=[OutOfStock], idempotent=["count"])
class BlockingStockApi(Protocol):
    def take(self, sku: str, count: int = 1) -> set[int]: ...

    def count(self, sku: str) -> int: ...


def test_a_contract_of_blocking_methods_can_be_bound(client: Client) -> None:
    bound = client.bind(BlockingStockApi)
    assert bound.take("bolts", count=2) == {0, 1}
    assert bound.count("bolts") == 5
    with pytest.raises(OutOfStock, match="no more nuts"):
        bound.take("nuts")
    with pytest.raises(TypeError, match="3 given"):
        bound.take("nuts", 2, 3)  # type: ignore[call-arg]


def test_a_contract_of_blocking_methods_is_checked_and_not_for_clients_that_await(client: Client) -> None:
    with pytest.raises(ConfigurationError, match=r"Mixed\.take must be a def, .*; got an async def: write 'def take'"):

        @sync.contract("stock")
        class Mixed(Protocol):
            async def take(self, sku: str) -> int: ...

    with pytest.raises(ConfigurationError, match="must name functions of its class"):
        sync.contract("stock", idempotent=["none"])(BlockingStockApi)
    with pytest.raises(ConfigurationError, match=r"bind it with rpcq\.sync\.Client"):
        rpcq.Client("memory://").bind(BlockingStockApi)


# Jobs.


def test_jobs_are_sent_by_function_and_by_name_and_run() -> None:
    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    service = Service("emails")

    @service.job
    async def welcome(to: str) -> None:
        done.put(to)

    with running_sync(service) as client:
        sent = [
            client.send(welcome, to="ada"),
            client.send("emails.welcome", "bob"),
            client.with_options(idempotency_key="k").send(welcome, "eve"),
            *client.send_many(welcome, ({"to": it} for it in ("kim", "lou"))),
            *client.with_options(timeout=5.0).send_many("emails.welcome", []),
        ]
        assert {done.get(timeout=SECONDS) for _ in sent} == {"ada", "bob", "eve", "kim", "lou"}
        assert [it.service for it in sent] == ["emails"] * 5
        assert sent[2].key == "k"
        with pytest.raises(InvalidParams):
            client.send(welcome, 5)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="idempotency_key"):
            client.with_options(idempotency_key="k").send_many(welcome, [])


@contract("emails", jobs=["welcome"])
class EmailsApi(Protocol):
    async def welcome(self, to: str, name: str = "you") -> None: ...

    async def sent(self) -> int: ...


@sync.contract("emails", jobs=["welcome"])
class BlockingEmailsApi(Protocol):
    def welcome(self, to: str, name: str = "you") -> None: ...

    def sent(self) -> int: ...


def test_jobs_are_sent_by_contract_and_run() -> None:
    done: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    service = Service(api=EmailsApi)

    @service.job
    def welcome(to: str, name: str = "you") -> None:
        done.put((to, name))

    @service.method
    async def sent() -> int:
        return 0

    with running_sync(service) as client:
        blocking, awaited = client.bind(BlockingEmailsApi), client.bind(EmailsApi)
        sent_jobs = [
            client.send(blocking.welcome, "ada", name="Ada"),
            client.with_options(idempotency_key="k").send(blocking.welcome, to="bob"),
            *client.send_many(blocking.welcome, [{"to": "kim"}]),
            client.send(awaited.welcome, to="eve"),
        ]
        found = {done.get(timeout=SECONDS) for _ in sent_jobs}
        assert found == {("ada", "Ada"), ("bob", "you"), ("kim", "you"), ("eve", "you")}
        assert (sent_jobs[1].key, sent_jobs[1].name) == ("k", "welcome")
        with pytest.raises(InvalidParams, match=r"do not fit emails\.welcome: to: "):
            client.send(blocking.welcome, 5)  # type: ignore[arg-type]
        assert blocking.sent() == 0


def test_a_job_is_not_called_and_a_method_is_not_sent() -> None:
    client = Client(UNREACHABLE)
    for api in (BlockingEmailsApi, EmailsApi):
        with pytest.raises(UsageError, match=r"emails\.welcome is a job: send it"):
            client.bind(api).welcome("ada")
        with pytest.raises(UsageError, match="it is a method: call it, do not send it"):
            client.send(client.bind(api).sent)
        with pytest.raises(UsageError, match=rf"bind the contract first: .*client\.bind\({api.__name__}\)\.welcome"):
            client.send(api.welcome, "ada")
    with pytest.raises(UsageError, match=r"emails\.welcome is a job: send it"):
        client.call(EmailsApi.welcome, "ada")


def test_a_service_is_held_to_the_jobs_of_a_contract_of_blocking_functions() -> None:
    service = Service(api=BlockingEmailsApi)

    @service.method
    def sent() -> int:
        return 0

    with pytest.raises(ConfigurationError, match="must have all jobs of its contract BlockingEmailsApi"):
        service.check()
    with pytest.raises(
        ConfigurationError, match=r"emails\.welcome must be a job, as in its contract BlockingEmailsApi"
    ):

        @service.method
        def welcome(to: str, name: str = "you") -> None: ...


def test_a_job_that_no_queue_takes_is_an_error() -> None:
    with running_sync(stock()) as client, pytest.raises(SendError, match="no queue takes jobs") as caught:
        client.send("stock.welcome")
    assert caught.value.queued == "no"


def test_a_job_is_not_queued_if_the_client_cannot_be_opened_and_a_mistake_is_told_before() -> None:
    client = Client(UNREACHABLE, connect_timeout=1.0)
    with pytest.raises(SendError, match="could not be opened") as caught:
        client.send("stock.welcome")
    assert (caught.value.queued, caught.value.message_id) == ("no", None)
    with pytest.raises(ConfigurationError, match=r"service\.job"):
        client.send("welcome")
    with pytest.raises(UsageError, match="it is not a job"):
        client.send(print)
    client.close()
    with pytest.raises(ClosedError, match="this client is closed"):
        client.send("stock.welcome")


# Threads.


def test_threads_share_one_client_and_each_gets_its_own_results(client: Client) -> None:
    together = threading.Barrier(8)

    def work(number: int) -> list[int]:
        together.wait()
        return [client.call("stock.count", sku="x" * (number * 50 + it)) for it in range(50)]

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(work, range(8))]
    assert found == [[*range(number * 50, number * 50 + 50)] for number in range(8)]


def test_threads_that_use_it_first_open_it_once() -> None:
    opened: list[object] = []

    class Seen(Observer):
        def on_opened(self, owner: object) -> None:
            opened.append(owner)

    with running_sync(stock()) as inner:
        client = Client(inner_url(inner), namespace=inner.options.namespace, observers=[Seen()])
        together = threading.Barrier(8)

        def work(_: int) -> int:
            together.wait()
            return int(client.call("stock.count", sku="bolts"))

        with ThreadPoolExecutor(8) as pool:
            assert [*pool.map(work, range(8))] == [5] * 8
        client.close()
    assert len(opened) == 1


def test_a_def_handler_uses_it_and_its_calls_inherit_the_deadline() -> None:
    remaining: list[float] = []
    service = Service("outer")

    @service.method
    async def inner(context: Context) -> None:
        remaining.append(context.deadline.remaining())

    @service.method
    def outer() -> None:
        client.call("outer.inner")

    with running_sync(service) as client:
        client.with_options(timeout=5.0).call("outer.outer")
        client.with_options(timeout=50.0).call("outer.outer")
    assert 3 < remaining[0] <= 5
    assert 28 < remaining[1] <= 30  # the client's own timeout is sooner


def test_a_def_handler_whose_deadline_has_passed_sends_nothing() -> None:
    gone, caught = threading.Event(), []
    service = Service("outer")

    @service.method
    def outer() -> None:
        gone.wait(SECONDS)
        try:
            client.call("outer.outer")
        except CallTimeout as error:
            caught.append(error.executed)
        finally:
            gone.clear()

    with running_sync(service) as client:
        with pytest.raises(CallTimeout):
            client.with_options(timeout=0.2).call("outer.outer")
        gone.set()
        while gone.is_set():
            threading.Event().wait(0.01)
    assert caught == ["no"]


# Event loops.


def test_an_async_handler_is_refused_with_what_to_do() -> None:
    service = Service("outer")

    @service.method
    async def outer() -> str:
        try:
            client.call("outer.outer")
        except UsageError as error:
            return str(error)
        return "nothing"

    with running_sync(service) as client:
        assert "rpcq.Client" in client.call("outer.outer")


def test_in_another_running_loop_such_as_a_notebooks_it_blocks_and_works(client: Client) -> None:
    async def cell() -> int:
        return int(client.call("stock.count", sku="bolts"))

    assert asyncio.run(cell()) == 5


async def test_it_reaches_a_broker_in_memory_of_another_threads_loop() -> None:
    async with running(stock()) as inner:
        url = inner._url
        client = Client(url, namespace=inner.options.namespace)

        def work() -> int:
            with client:
                return client.call(StockApi.count, "bolts")

        assert await asyncio.to_thread(work) == 5
        with pytest.raises(UsageError, match="to_thread"), Client(url, namespace=inner.options.namespace):
            pass  # never: the loop would wait for itself


def test_a_client_goes_on_with_the_next_loop_of_its_broker(namespace: str) -> None:
    client = Client(f"memory://{namespace}")

    async def run() -> int:
        async with Worker(stock(), url=f"memory://{namespace}"):
            return await asyncio.to_thread(client.call, StockApi.count, "bolts")

    assert [asyncio.run(run()), asyncio.run(run())] == [5, 5]
    client.close()


def test_a_call_whose_loop_ends_may_have_run(namespace: str) -> None:
    began = threading.Event()
    service = Service("slow")
    failed: list[BaseException] = []

    @service.method
    async def wait() -> None:
        began.set()
        await asyncio.sleep(60)

    client = Client(f"memory://{namespace}")

    def work() -> None:
        try:
            client.call("slow.wait")
        except OutcomeUnknown as error:
            failed.append(error)

    thread = threading.Thread(target=work)

    async def run() -> None:
        worker = Worker(service, url=f"memory://{namespace}")
        await worker.start()
        thread.start()
        await asyncio.to_thread(began.wait, SECONDS)
        # And ends, with all that runs in it.

    asyncio.run(run())
    thread.join(SECONDS)
    assert [str(error) for error in failed]
    client.close()


async def test_a_broker_in_memory_of_several_loops_is_refused(namespace: str) -> None:
    url = f"memory://{namespace}"

    def work() -> None:
        with Client(url):
            pass

    def other() -> None:
        async def run() -> None:
            async with Worker(stock(), url=url):
                with pytest.raises(UsageError, match="2 event loops"):
                    await asyncio.to_thread(work)

        asyncio.run(run())

    async with Worker(stock(), url=url):
        await asyncio.to_thread(other)


# Opening and closing.


def test_what_cannot_be_is_told_when_it_is_made() -> None:
    with pytest.raises(ConfigurationError, match="http"):
        Client("http://localhost/")
    with pytest.raises(ConfigurationError, match="timeout"):
        Client("memory://", timeout=-1)


def test_the_environment_counts_as_it_is_when_the_client_connects(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RPCQ_URL", raising=False)
    client = Client()
    proxy, bound = client.service("stock"), client.bind(StockApi)
    with pytest.raises(ConfigurationError, match="RPCQ_URL"):
        client.call("stock.count", sku="bolts")
    for name, value in {"URL": f"memory://{namespace}", "NAMESPACE": namespace, "TIMEOUT": "7"}.items():
        monkeypatch.setenv(f"RPCQ_{name}", value)
    with running_sync(stock(), url=f"memory://{namespace}") as inner:
        monkeypatch.setenv("RPCQ_NAMESPACE", inner.options.namespace)
        assert (proxy.count(sku="bolts"), bound.count("bolts"), client.options.timeout) == (5, 5, 7)
        monkeypatch.setenv("RPCQ_TIMEOUT", "8")
        assert client.options.timeout == 7  # it is connected
        disconnect_all()
        assert proxy.count(sku="bolts") == 5
        assert client.options.timeout == 8
        client.close()


def test_the_fixture_serves_blocking_clients_of_modules(rpcq_running_sync: RunningSync) -> None:
    def report() -> str:
        return f"{MODULES_OWN.call('stock.count', sku='bolts')} bolts"

    with rpcq_running_sync(FakeService("stock").answers("count", 12)):
        assert report() == "12 bolts"


def test_the_fixture_serves_them_again_in_the_next_test(rpcq_running_sync: RunningSync) -> None:
    with rpcq_running_sync(FakeService("stock").answers("count", 13)):
        assert MODULES_OWN.call("stock.count", sku="bolts") == 13


async def test_the_fixture_serves_them_in_threads_of_asynchronous_tests(rpcq_running: Any) -> None:
    async with rpcq_running(FakeService("stock").answers("count", 14)):
        assert await asyncio.to_thread(MODULES_OWN.call, "stock.count", sku="bolts") == 14


MODULES_OWN = Client()


def test_an_error_of_the_test_ends_what_runs_and_is_raised() -> None:
    with pytest.raises(ZeroDivisionError), running_sync(stock()) as client:
        raise ZeroDivisionError
    with pytest.raises(ClosedError):
        client.call("stock.count", sku="bolts")


def test_a_broker_that_is_not_there_is_told_by_connect_and_is_unavailable_to_calls() -> None:
    client = Client(UNREACHABLE, connect_timeout=1.0)
    with pytest.raises(BrokerError):
        client.connect()
    with pytest.raises(ServiceUnavailable, match="could not be opened") as caught:
        client.call("stock.count", sku="bolts")
    assert (caught.value.executed, caught.value.retryable) == ("no", True)
    assert isinstance(caught.value.__cause__, BrokerError)
    assert (client.connected, client.in_flight) == (False, 0)
    client.close()


def test_a_call_does_not_wait_for_a_connection_beyond_its_deadline() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and says nothing
        client = Client(f"amqp://127.0.0.1:{silent.getsockname()[1]}/", connect_timeout=60.0)
        began = time.monotonic()
        with ThreadPoolExecutor(2) as pool:  # one opens it, one waits for that
            calls = [pool.submit(client.with_options(timeout=0.3).call, "stock.count") for _ in range(2)]
            for call in calls:
                with pytest.raises(ServiceUnavailable, match="until the deadline"):
                    call.result(SECONDS)
        assert time.monotonic() - began < 5
        client.close()


def test_a_closed_client_is_closed(client: Client) -> None:
    client.close()
    client.close()
    for use in (lambda: client.call("stock.count", sku="bolts"), client.connect, client.workers):
        with pytest.raises(ClosedError, match="this client is closed"):
            use()
    Client("memory://").close()  # never opened


def test_calls_of_other_threads_end_when_it_is_closed() -> None:
    with (
        running_sync(fake := FakeService("stock").answers("take", 1, after=60)) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        call = pool.submit(client.call, "stock.take")
        while not fake.calls:
            threading.Event().wait(0.01)
        client.close()
        with pytest.raises(OutcomeUnknown):
            call.result(SECONDS)


def test_a_client_that_nobody_closed_is_closed_when_it_is_collected() -> None:
    with running_sync(stock()) as inner:
        client = Client(inner_url(inner), namespace=inner.options.namespace)
        client.call("stock.count", sku="bolts")
        connection = client._connection
        assert connection is not None
        opened, gone = connection.client, weakref.ref(client)
        del client, connection
        with pytest.warns(ResourceWarning, match="was not closed"):
            gc.collect()
        assert gone() is None

        async def closed() -> None:
            while opened.connected:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0)

        blocking.run(blocking.shared_loop(), closed)


def test_an_exception_that_breaks_event_loops_reaches_the_caller_only() -> None:
    class Odd(BaseException):
        pass

    async def fail() -> None:
        raise Odd

    for _ in range(2):
        with pytest.raises(Odd):
            blocking.run(blocking.shared_loop(), fail)


def test_a_handler_that_fails_is_a_remote_error() -> None:
    with running_sync(FakeService("stock").fails("take", ValueError("x"))) as client:
        with pytest.raises(RemoteError) as caught:
            client.call("stock.take")
        assert caught.value.incident
