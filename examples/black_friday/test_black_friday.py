"""Tests of the crowd and of the report, without a broker. `tests/examples` sends a crowd to the shop itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace

from aiohttp import web
from aiohttp.test_utils import TestServer

from examples.black_friday.crowd import Crowd
from examples.black_friday.report import Outcome, oldest, page, percentile
from examples.black_friday.sampling import Sample, Times

START = 1_700_000_000.0


async def ordered(take: Callable[[int], Awaitable[web.StreamResponse]], orders: int) -> Crowd:
    """A crowd at a shop that does this with each request, counted from 1."""
    requests = Counter[str]()

    async def handle(_request: web.Request) -> web.StreamResponse:
        requests["all"] += 1
        return await take(requests["all"])

    app = web.Application()
    app.router.add_post("/orders", handle)
    async with TestServer(app) as server:
        crowd = Crowd([str(server.make_url("")).rstrip("/")], orders, 0.2)
        await crowd.come()
    return crowd


async def test_customers_come_at_their_rate_and_keep_what_they_were_promised() -> None:
    async def take(number: int) -> web.StreamResponse:
        return web.json_response({"id": f"order-{number}"}, status=202)

    crowd = await ordered(take, 20)
    assert sorted(crowd.promised) == sorted(f"order-{number}" for number in range(1, 21))
    assert len(crowd.answers) == 20
    gaps = [later - earlier for earlier, later in zip(crowd.came, crowd.came[1:], strict=False)]
    assert all(abs(gap - 0.01) < 1e-4 for gap in gaps)  # due, however late they were sent
    assert (crowd.postponed, crowd.unanswered) == (0, 0)


async def test_customers_come_again_when_the_shop_is_full_and_are_not_counted_twice() -> None:
    async def take(number: int) -> web.StreamResponse:
        if number <= 5:
            return web.Response(status=503, headers={"Retry-After": "0.05"})
        return web.json_response({"id": f"order-{number}"}, status=202)

    crowd = await ordered(take, 8)
    assert crowd.postponed == 5
    assert len(set(crowd.promised)) == len(crowd.came) == 8
    assert max(seconds for _, seconds in crowd.answers) >= 0.05


async def test_an_order_whose_answer_is_lost_is_not_promised() -> None:
    async def take(number: int) -> web.StreamResponse:
        if number == 2:
            raise ConnectionResetError
        return web.json_response({"id": f"order-{number}"}, status=202)

    async def cut(number: int) -> web.StreamResponse:
        try:
            return await take(number)
        except ConnectionResetError:
            return Cut()

    crowd = await ordered(cut, 3)
    assert (len(crowd.promised), crowd.unanswered) == (2, 1)


class Cut(web.Response):
    """Cuts the connection instead of answering."""

    async def prepare(self, request: web.BaseRequest) -> None:
        """Cut it."""
        assert request.transport is not None
        request.transport.abort()


def test_the_oldest_order_is_the_first_one_whose_customer_was_not_told() -> None:
    times = [Times(3.0, None, 9.0), Times(1.0, 2.0, 5.0), Times(2.0, 3.0, None)]
    assert oldest(times, [0.0, 1.5, 4.0, 6.0, 10.0]) == [0.0, 0.5, 3.0, 4.0, 8.0]
    assert oldest(times[:2], [10.0]) == [0.0]


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(it) for it in range(1, 101)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 51.0, 100.0, 100.0]
    assert percentile([], 0.5) == 0.0


def an_outcome() -> Outcome:
    taken = [START + at / 10 for at in range(100)]
    return Outcome(
        came=taken,
        answers=[(at, 0.02) for at in taken],
        postponed=3,
        unanswered=0,
        killed=True,
        samples=[
            Sample(START + at, {"payment": 40 - at, "shipping": at, "": 1}, {"payment": 2, "others": 1}, at)
            for at in range(20)
        ],
        times={f"order-{at}": Times(when, when + 5, when + 10) for at, when in enumerate(taken)},
        faults=[],
        settings={"orders": "100"},
    )


def test_the_report_has_its_numbers_and_a_plot_of_each_kind() -> None:
    text = page(an_outcome())
    assert '<span class="good">100 orders taken, as many settled: none is lost' in text
    for head in ("Orders a second", "What waits", "Worker processes", "Age", "How long an order takes"):
        assert f"<h3>{head}</h3>" in text
    assert text.count("<svg class=") == 6
    assert "nothing was measured" not in text
    for said in ("taken in 10 s", "1 worker killed", "<dd>41<small>events that wait", "1 + 2", "others + payment"):
        assert said in text, said


def test_the_report_says_what_does_not_add_up() -> None:
    text = page(replace(an_outcome(), faults=["done = parcels: 7 and 8"]))
    assert '<span class="bad">The books do not add up: done = parcels: 7 and 8.' in text
    assert "none is lost" not in text
