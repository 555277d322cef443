"""Tests of the shop, on a broker in this process, or on the one of `RPCQ_TEST_URL`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from decimal import Decimal

import httpx
import pytest

from examples.sample.contracts import Article, OrdersApi, OutOfStock, StockApi, TooExpensive, UnknownArticle
from examples.sample.orders import orders
from examples.sample.report import report
from examples.sample.stock import stock
from rpcq import CallTimeout, with_options
from rpcq.sync import Client
from rpcq.testing import FakeService, Running


async def test_an_order_takes_from_the_shelf(rpcq_running: Running) -> None:
    async with rpcq_running(stock, orders) as client:
        shop = client.bind(OrdersApi)
        order = await shop.place("tea", 3)
        assert (order.sku, order.total) == ("tea", Decimal("13.50"))
        assert await shop.placed() == [order]
        assert (await client.bind(StockApi).find("tea")).left == 7


def test_an_order_is_in_the_report(rpcq_running_sync: Callable[..., AbstractContextManager[Client]]) -> None:
    with rpcq_running_sync(stock, orders) as client:
        client.call(OrdersApi.place, "tea", 3)
        assert report(client) == "   1 coffee at 7.90\n   7 tea at 4.50\n1 orders, 13.50 in all"


async def test_errors_keep_their_attributes_over_both_services(rpcq_running: Running) -> None:
    async with rpcq_running(stock, orders) as client:
        shop = client.bind(OrdersApi)
        with pytest.raises(OutOfStock, match=r"^only 1 of coffee left$") as out:
            await shop.place("coffee", 2)
        assert (out.value.sku, out.value.left, out.value.executed) == ("coffee", 1, "yes")
        with pytest.raises(UnknownArticle, match=r"^there is no gold$") as unknown:
            await shop.place("gold")
        assert unknown.value.sku == "gold"
        with pytest.raises(TooExpensive) as expensive:
            await shop.place("tea", 2, limit=Decimal(5))
        assert (expensive.value.total, expensive.value.limit) == (Decimal("9.00"), Decimal(5))


async def test_an_order_for_what_is_gone_meanwhile_is_not_placed(rpcq_running: Running) -> None:
    tea = Article("tea", Decimal(1), 5)
    fake = FakeService.of(StockApi).answers("find", tea).fails("take", OutOfStock("tea", 0))
    async with rpcq_running(fake, orders) as client:
        shop = client.bind(OrdersApi)
        with pytest.raises(OutOfStock) as out:
            await shop.place("tea")
        assert out.value.left == 0
        assert await shop.placed() == []
    assert fake.calls[-1].context.metadata.keys() == {"x-order"}


async def test_a_customer_who_is_in_a_hurry_does_not_wait(rpcq_running: Running) -> None:
    fake = FakeService.of(StockApi).answers("find", Article("tea", Decimal(1), 5), after=30)
    async with rpcq_running(fake, orders) as client:
        with pytest.raises(CallTimeout):
            await with_options(client.bind(OrdersApi), timeout=0.2).place("tea")


async def test_the_app_answers_with_orders_and_with_problems_that_its_openapi_describes(rpcq_running: Running) -> None:
    from examples.sample.app import app, rpc

    described = app.openapi()["paths"]["/orders"]["post"]["responses"]
    transport = httpx.ASGITransport(app)
    async with (
        rpcq_running(stock, orders),
        rpc.lifespan(),
        httpx.AsyncClient(transport=transport, base_url="http://shop") as user,
    ):
        for query, status, title in (
            ("sku=tea&limit=1", 402, "Too expensive"),
            ("sku=gold", 404, "Unknown article"),
            ("sku=coffee&quantity=5", 409, "Not enough left"),
            ("sku=coffee", 201, None),
            ("sku=coffee", 410, "Sold out"),
        ):
            response = await user.post(f"/orders?{query}")
            assert (response.status_code, response.json().get("title")) == (status, title)
            assert str(status) in described or "default" in described
        assert (await user.get("/articles/coffee")).json() == {"sku": "coffee", "price": "7.90", "left": 0}
    assert described["402"]["description"] == "Too expensive"
