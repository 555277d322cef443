"""`rpcq.testing` and its pytest plugin, without a broker."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import textwrap
from decimal import Decimal
from typing import Protocol

import pytest

from rpcq import (
    Client,
    ConfigurationError,
    Context,
    DomainError,
    InvalidParams,
    InvalidReply,
    MethodNotFound,
    RemoteError,
    Service,
    ServiceUnavailable,
    Worker,
    contract,
)
from rpcq.testing import FakeService, Place, running

pytest_plugins = ["pytester"]


class OutOfStock(DomainError):
    pass


@contract("stock", errors=[OutOfStock], idempotent=["price"])
class Stock(Protocol):
    async def price(self, sku: str, count: int = 1) -> Decimal: ...
    async def take(self, sku: str, /, *more: str, **notes: int) -> None: ...


@pytest.fixture(autouse=True)
def without_a_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RPCQ_TEST_URL", raising=False)


# Where it runs.


def test_it_runs_in_this_process_unless_an_argument_or_else_the_environment_gives_a_url(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Place().url.startswith("memory://")
    assert Place().url != Place().url
    monkeypatch.setenv("RPCQ_TEST_URL", "amqp://there/")
    assert Place().url == "amqp://there/"
    assert Place("amqp://here/").url == "amqp://here/"
    monkeypatch.setenv("RPCQ_TEST_URL", "")
    assert Place().url.startswith("memory://")


async def test_each_has_a_namespace_of_its_own_even_on_one_broker() -> None:
    stock = FakeService("stock").answers("price", 1)
    async with running(stock, url="memory://shared"), running(url="memory://shared") as other:
        with pytest.raises(ServiceUnavailable):
            await other.call("stock.price")


async def test_nothing_of_the_process_environment_leads_it_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPCQ_URL", "amqp://production.invalid/")
    monkeypatch.setenv("RPCQ_NAMESPACE", "production")
    async with running(FakeService("stock").answers("price", 1)) as client:
        assert await client.call("stock.price") == 1
        assert client.options.namespace != "production"


async def test_settings_go_to_the_client_and_to_the_workers() -> None:
    service = Service("things")

    @service.method
    async def caller(context: Context) -> str | None:
        return context.caller

    async with running(service, name="tester", timeout=1.5, prefetch=3, max_body=5000) as client:
        assert await client.call("things.caller") == "tester"
        assert (client.options.timeout, client.options.max_body) == (1.5, 5000)
        worker = await anext(client.workers("things"))
        assert (worker.name, worker.prefetch) == ("tester", 3)


async def test_what_is_no_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="namespace"):
        async with running(namespace="production"):  # type: ignore[call-arg]
            pass


async def test_what_is_no_service_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="must be instances of Service"):
        async with running(Stock):  # type: ignore[arg-type]
            pass


async def test_two_services_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="must have different names; got several called stock"):
        async with running(FakeService("stock"), FakeService("stock")):
            pass


def test_without_rabbitmq_nothing_of_it_is_loaded() -> None:
    code = """
        import asyncio, sys
        from rpcq.testing import FakeService, running
        async def main():
            async with running(FakeService("stock").answers("price", 1)) as client:
                assert await client.call("stock.price") == 1
        asyncio.run(main())
        assert not {"aio_pika", "aiormq", "pytest"} & {*sys.modules}
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=30, check=False
    )
    assert ran.returncode == 0, ran.stderr


# What a fake is told.


async def test_each_call_takes_the_next_that_was_told_of_its_method_and_the_last_stays() -> None:
    fake = FakeService("stock").answers("price", 1).answers("price", 2).answers("count", 10)
    async with running(fake) as client:
        assert [await client.call("stock.price") for _ in range(3)] == [1, 2, 2]
        assert [await client.call("stock.count") for _ in range(2)] == [10, 10]
        fake.answers("price", 3).answers("price", 4)
        assert [await client.call("stock.price") for _ in range(3)] == [3, 4, 4]


async def test_a_function_answers_from_the_parameters_at_once_or_later_or_raises() -> None:
    async def later(x: int) -> int:
        await asyncio.sleep(0)
        return -x

    def refuse(x: int) -> int:
        raise OutOfStock(f"no {x}")

    fake = FakeService("stock").answers("add", lambda x, y: x + y)
    fake.answers("negate", later).answers("take", refuse)
    async with running(fake) as client:
        assert await client.call("stock.add", x=1, y=2) == 3
        assert await client.call("stock.add", 1, 2) == 3
        assert await client.call("stock.negate", 5) == -5
        with pytest.raises(RemoteError, match="no 5") as caught:
            await client.call("stock.take", x=5)
        assert caught.value.code == "out_of_stock"


async def test_a_method_that_was_not_told_is_not_found_until_it_is() -> None:
    fake = FakeService("stock")
    async with running(fake) as client:
        with pytest.raises(MethodNotFound):
            await client.call("stock.price")
        assert fake.calls == []
        fake.answers("price", 2)
        assert await client.call("stock.price") == 2


async def test_a_fake_knows_what_it_got() -> None:
    fake = FakeService("stock").fails("take", OutOfStock()).answers("take")
    async with running(fake, name="shop") as client:
        ada = client.with_options(metadata={"x-user": "ada"}, idempotent=True)
        with pytest.raises(RemoteError):
            await ada.call("stock.take", sku="bolts", count=3)
        await client.call("stock.take", "nuts", 4)
    first, second = fake.calls
    assert (first.method, first.args, first.params) == ("take", (), {"sku": "bolts", "count": 3})
    assert (second.method, second.args, second.params) == ("take", ("nuts", 4), {})
    assert first.context.metadata == {"x-user": "ada"}
    assert (first.context.attempt, first.context.caller, first.context.state) == (1, "shop", None)
    assert first.context.idempotency_key is not None
    assert second.context.idempotency_key is None


async def test_a_fake_goes_on_from_one_place_to_the_next() -> None:
    fake = FakeService("stock").answers("price", 1).answers("price", 2)
    for expected in (1, 2, 2):
        async with running(fake) as client:
            assert await client.call("stock.price") == expected
    assert len(fake.calls) == 3


async def test_a_fake_cannot_vanish_from_a_worker_that_is_not_its_own() -> None:
    fake = FakeService("stock").vanishes("take").answers("take", 1)
    async with Worker(fake, url="memory://plain"), Client("memory://plain") as client:
        with pytest.raises(RemoteError):
            await client.call("stock.take")
        assert await client.call("stock.take") == 1


@pytest.mark.parametrize(
    ("tell", "named"),
    [
        (lambda fake: fake.answers("price", object()), "JSON cannot carry"),
        (lambda fake: fake.answers("price", 1, after=-1), "after must be a number of seconds of at least 0; got -1"),
        (
            lambda fake: fake.answers("price", 1, after=float("nan")),
            "after must be a number of seconds of at least 0; got nan",
        ),
        (lambda fake: fake.answers("stock.price", 1), "no dot"),
        (lambda fake: fake.answers("", 1), "must be 1 to 100 of the characters"),
        (lambda fake: fake.fails("price", "no"), "must be an exception; got 'no'"),
        (lambda fake: fake.fails("price", KeyboardInterrupt), "must be an exception; got KeyboardInterrupt"),
        (lambda _: FakeService("stock!"), "stock!"),
        (lambda _: FakeService("stock", queue_type="stream"), "stream"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_told_is_refused_when_it_is_told(tell, named) -> None:  # type: ignore[no-untyped-def]
    fake = FakeService("stock")
    with pytest.raises(ConfigurationError, match=named):
        tell(fake)
    assert fake.methods == {}


# A fake of a contract.


async def test_a_fake_of_a_contract_takes_and_gives_what_the_contract_says() -> None:
    fake = FakeService.of(Stock).answers("price", lambda sku, count=1: Decimal("2.5") * count).answers("take")
    async with running(fake) as client:
        stock = client.bind(Stock)
        assert await stock.price("bolts", 2) == Decimal("5.0")
        assert await stock.price("bolts") == Decimal("2.5")
        assert await client.call("stock.price", sku="bolts") == "2.5"
        await stock.take("bolts", "nuts", "pins")
        with pytest.raises(InvalidParams, match="count"):
            await client.call("stock.price", sku="bolts", count="many")
        with pytest.raises(InvalidParams, match="size"):
            await client.call("stock.price", sku="bolts", size=3)
        with pytest.raises(InvalidParams, match="sku"):
            await client.call("stock.price")
    assert len(fake.calls) == 4
    assert fake.calls[0].params == {"sku": "bolts", "count": 2}
    assert fake.calls[3].args == ("bolts", "nuts", "pins")


def test_a_fake_of_a_contract_refuses_to_be_told_what_the_contract_does_not_have() -> None:
    fake = FakeService.of(Stock)
    for tell in (fake.answers, fake.vanishes, lambda name: fake.fails(name, OutOfStock)):
        with pytest.raises(ConfigurationError, match="which has price, take; got 'prices'"):
            tell("prices")
    with pytest.raises(ConfigurationError, match="does not fit its annotation"):
        fake.answers("price", "cheap")
    with pytest.raises(ConfigurationError, match="does not fit its annotation"):
        fake.answers("take", 3)
    assert fake.methods == {}


async def test_a_function_that_gives_what_the_contract_does_not_say_is_an_invalid_reply() -> None:
    async with running(FakeService.of(Stock).answers("price", lambda **_: "cheap")) as client:
        with pytest.raises(InvalidReply):
            await client.call("stock.price", sku="bolts")


def test_a_fake_is_of_a_contract_that_names_its_service_or_is_given_the_name() -> None:
    class Nameless(Protocol):
        async def price(self) -> int: ...

    class Wrong(Protocol):
        price: int = 3

    with pytest.raises(ConfigurationError, match="names no service"):
        FakeService.of(Nameless)
    with pytest.raises(ConfigurationError, match=r"must have only methods; .* has 'price'"):
        FakeService.of(Wrong, "stock")
    assert FakeService.of(Nameless, "prices", queue_type="quorum").queue_type == "quorum"
    assert FakeService.of(Stock, "warehouse").name == "warehouse"


# The pytest plugin, as it is installed.

SHOP = """
    import os
    from contextlib import asynccontextmanager
    from rpcq import Client, Context, Service

    @asynccontextmanager
    async def stock():
        async with Client() as client:
            yield client

    shop = Service("shop", lifespan=stock)

    @shop.method
    async def price(sku: str, context: Context) -> int:
        return 2 * await context.state.call("stock.price", sku=sku)
"""
TEST = """
    import pytest
    from rpcq.testing import FakeService
    from shop import shop

    {marks}async def test_that_the_shop_asks_the_stock(rpcq_running):
        stock = FakeService("stock").answers("price", 4)
        async with rpcq_running(shop, stock) as client:
            assert await client.call("shop.price", sku="bolts") == 8
        assert stock.calls[0].params == {{"sku": "bolts"}}
"""


@pytest.fixture
def pages(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("RPCQ_URL", "amqp://production.invalid/")
    return pytester


ASYNCIO = ["-p", "no:anyio", "-o", "asyncio_default_fixture_loop_scope=function"]


@pytest.mark.parametrize(
    ("marks", "arguments"),
    [
        pytest.param([], [*ASYNCIO, "-o", "asyncio_mode=auto"], id="pytest-asyncio, auto"),
        pytest.param(["asyncio"], [*ASYNCIO, "-o", "asyncio_mode=strict"], id="pytest-asyncio, strict"),
        pytest.param(["anyio", "parametrize('anyio_backend', ['asyncio'])"], ["-p", "no:asyncio"], id="anyio"),
    ],
)
def test_the_fixture_works_with_any_plugin_for_async_tests_and_code_that_opens_its_own_client_gets_there(
    pages: pytest.Pytester, marks: list[str], arguments: list[str]
) -> None:
    pages.makepyfile(shop=SHOP)
    pages.makepyfile(TEST.format(marks="".join(f"@pytest.mark.{mark}\n    " for mark in marks)))
    pages.runpytest_subprocess("-W", "error", *arguments).assert_outcomes(passed=1)


APP = """
from typing import Annotated, Protocol

from fastapi import Depends, FastAPI
from rpcq import contract
from rpcq.web import Rpc

@contract("stock")
class Stock(Protocol):
    async def price(self, sku: str) -> int: ...

rpc = Rpc()
app = FastAPI(lifespan=rpc.lifespan)
bound = rpc.bind(Stock)

@app.get("/price/{sku}")
async def price(sku: str, stock: Annotated[Stock, Depends(rpc.api(Stock))]) -> list[int]:
    return [await stock.price(sku), await bound.price(sku)]
"""

TEST_OF_THE_APP = """
import asyncio
import httpx
from rpcq.testing import FakeService
from shop_app import app, rpc

def test_the_app(rpcq_running):
    async def main():
        fake = FakeService("stock").answers("price", 4)
        async with (
            rpcq_running(fake),
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as user,
        ):
            assert (await user.get("/price/bolts")).json() == [4, 4]
        assert len(fake.calls) == 2

    asyncio.run(main())

def test_the_app_without_the_fixture():
    async def main():
        async with rpc.lifespan():
            pass

    asyncio.run(main())
"""


def test_an_app_that_was_imported_before_calls_the_services_of_the_fixture_and_not_the_live_broker(
    pages: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as live:
        live.setblocking(False)
        monkeypatch.setenv("RPCQ_URL", f"amqp://127.0.0.1:{live.getsockname()[1]}/")
        monkeypatch.setenv("RPCQ_NAMESPACE", "live")
        monkeypatch.setenv("RPCQ_CONNECT_TIMEOUT", "5")
        pages.makepyfile(shop_app=APP)
        pages.makepyfile(TEST_OF_THE_APP)
        pages.runpytest_subprocess(*ASYNCIO, "-W", "error", "-k", "not without").assert_outcomes(passed=1, deselected=1)
        with pytest.raises(BlockingIOError):
            live.accept()
        pages.runpytest_subprocess(*ASYNCIO, "-W", "error", "-k", "without").assert_outcomes(passed=1, deselected=1)
        live.accept()[0].close()  # the address would have been used


def test_the_fixture_works_without_a_plugin_for_async_tests_and_the_environment_is_as_before_afterwards(
    pages: pytest.Pytester,
) -> None:
    pages.makepyfile("""
        import asyncio, os
        from rpcq.testing import FakeService

        seen = []

        def test_one(rpcq_running):
            async def main():
                async with rpcq_running(FakeService("stock").answers("price", 4)) as client:
                    assert os.environ["RPCQ_NAMESPACE"] == client.options.namespace
                    return await client.call("stock.price")

            assert asyncio.run(main()) == 4
            assert os.environ["RPCQ_URL"].startswith("memory://")
            seen.append(os.environ["RPCQ_URL"])

        def test_another_has_a_place_of_its_own(rpcq_running):
            assert os.environ["RPCQ_URL"] not in seen

        def test_after():
            assert os.environ["RPCQ_URL"] == "amqp://production.invalid/"
            assert "RPCQ_NAMESPACE" not in os.environ
    """)
    pages.runpytest_subprocess("-p", "no:asyncio", "-p", "no:anyio", "-W", "error").assert_outcomes(passed=3)


def test_whoever_does_not_use_the_plugin_does_not_pay_for_it(pages: pytest.Pytester) -> None:
    pages.makepyfile("""
        import sys

        def test_nothing_of_rpcq_is_loaded(pytestconfig):
            assert any(plugin == "rpcq" for plugin, _ in pytestconfig.pluginmanager.list_name_plugin())
            assert not {"rpcq.client", "rpcq.worker", "rpcq.testing", "pydantic", "structlog"} & {*sys.modules}
    """)
    pages.runpytest_subprocess("-p", "no:asyncio", "-W", "error").assert_outcomes(passed=1)


def test_the_fixture_is_shown_with_what_it_does(pages: pytest.Pytester) -> None:
    result = pages.runpytest_subprocess("--fixtures", "-v")
    result.stdout.fnmatch_lines(["rpcq_running*", "*in a namespace of this test*"])


@pytest.mark.parametrize("error", [ServiceUnavailable, ServiceUnavailable("down")])
def test_a_fake_cannot_say_that_it_is_not_there(error: Exception | type[Exception]) -> None:
    with pytest.raises(ConfigurationError, match="leave the fake out of running"):
        FakeService("stock").fails("take", error)
