"""Tests of the scores without a broker: the time is moved, and workers are killed, in this process."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from examples.scores import service
from examples.scores.app import create_app
from examples.scores.asking import ask
from examples.scores.products import PRODUCTS
from examples.scores.service import compute, renew, scores
from examples.scores.simulation import Footprint, simulate
from examples.scores.store import Store
from rpcq.testing import Running, World, Worlds

QUICK = 100
"""Runs of a simulation that is only to end."""

FEW = dict(list(PRODUCTS.items())[::10])
"""Products that a night renews."""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of this test's own, which the service opens too; its simulations are short, and a night has few."""
    path = tmp_path / "scores.sqlite"
    monkeypatch.setenv("SCORES_DATABASE", str(path))
    monkeypatch.setattr(service, "PRODUCTS", FEW)
    monkeypatch.setattr(service, "simulate", lambda product, edition: simulate(product, edition, QUICK))
    return Store(path)


def expected(product: str, edition: int) -> Footprint:
    return simulate(PRODUCTS[product], edition, QUICK)


async def asked(world: World, store: Store, *products: str) -> None:
    await ask(world.client, store, products, "high")
    await world.settled()


def test_a_simulation_is_the_same_each_time_and_another_with_other_factors() -> None:
    jeans = PRODUCTS["jeans-brazil"]
    first = simulate(jeans, 1, QUICK)
    assert simulate(jeans, 1, QUICK) == first
    assert simulate(jeans, 2, QUICK) != first
    assert first.low < first.kg < first.high


def test_all_products_have_ids_of_their_own() -> None:
    assert len(PRODUCTS) == 120
    assert all(product.id == key for key, product in PRODUCTS.items())


async def test_a_product_is_computed_once_however_often_it_is_asked_for(rpcq_world: Worlds, store: Store) -> None:
    async with rpcq_world(scores) as world:
        await asked(world, store, "jeans-brazil", "jeans-brazil")
        await ask(world.client, store, ["jeans-brazil"], "low")
        await world.client.send(compute, product="jeans-brazil")
        await world.settled()
    found = store.score("jeans-brazil")
    assert found is not None
    assert (found.footprint, found.edition) == (expected("jeans-brazil", 1), 1)
    assert len(store.runs()) == 1
    assert store.waits("high", 60).done == 1


async def test_what_nobody_sells_is_a_dead_letter_that_says_so(rpcq_world: Worlds, store: Store) -> None:
    async with rpcq_world(scores) as world:
        await asked(world, store, "unicorn-peru")
        (letter,) = world.dead(compute)
    assert (letter.reason, letter.error) == ("gave_up", "there is no product 'unicorn-peru'")


async def test_each_night_all_products_are_computed_with_new_factors(rpcq_world: Worlds, store: Store) -> None:
    async with rpcq_world(scores) as world:
        await asked(world, store, "jeans-brazil")
        await world.advance(days=1)
        assert not world.dead(scores)
    assert store.edition == 2
    assert set(store.states().values()) == {"fresh"}
    assert {product: score.footprint for product, score in store.scores().items()} == {
        product: expected(product, 2) for product in FEW
    }
    assert store.waits("low", 60).done == len(FEW)


async def test_a_night_that_is_sent_twice_is_one_night(rpcq_world: Worlds, store: Store) -> None:
    async with rpcq_world(scores) as world:
        night = world.client.with_options(idempotency_key="cron:renew:2026-11-29")
        await night.send(renew)
        await world.settled()
        await world.kill_worker()  # with what it remembers
        await world.start_worker()
        await night.send(renew)
        await world.settled()
    assert store.edition == 2
    assert len(store.runs()) == len(FEW)


async def test_a_worker_that_is_lost_in_a_computation_leaves_it_to_another_one(
    rpcq_world: Worlds, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rpcq_world(scores) as world:
        once = [world.crash]

        def crashes_once(product: object, edition: int) -> Footprint:
            if once:
                once.pop()()
            return expected("jeans-brazil", edition)

        monkeypatch.setattr(service, "simulate", crashes_once)
        await asked(world, store, "jeans-brazil")
        assert not world.dead(scores)
    assert store.states() == {"jeans-brazil": "fresh"}
    assert [run.ended is None for run in store.runs()] == [True, False]


async def test_an_old_score_does_not_replace_a_new_one(store: Store) -> None:
    late = store.begin("jeans-brazil", "a")
    store.new_edition("later")
    soon = store.begin("jeans-brazil", "b")
    assert late is not None
    assert soon is not None
    store.finish(soon, expected("jeans-brazil", 2))
    store.finish(late, expected("jeans-brazil", 1))
    found = store.score("jeans-brazil")
    assert found is not None
    assert found.edition == 2


# On the web.


def user_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://scores")


async def test_a_look_is_answered_at_once_and_the_score_comes_later(
    rpcq_running: Running, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_answered = threading.Event()

    def waits(_product: object, edition: int) -> Footprint:
        assert is_answered.wait(10)
        return expected("jeans-brazil", edition)

    monkeypatch.setattr(service, "simulate", waits)
    app = create_app(store, watches=False)
    async with rpcq_running(scores), app.router.lifespan_context(app), user_of(app) as user:
        first = await user.post("/products/jeans-brazil/look")
        assert first.status_code == 202
        assert first.json()["kg"] is None
        is_answered.set()
        while (again := await user.post("/products/jeans-brazil/look")).status_code == 202:
            assert again.json()["state"] in ("queued", "computing")
        assert (again.status_code, again.json()["state"]) == (200, "fresh")
        assert again.json()["kg"] == round(expected("jeans-brazil", 1).kg, 2)
        assert (await user.post("/products/unicorn/look")).status_code == 404
        (row,) = [it for it in (await user.get("/state")).json()["products"] if it["id"] == "jeans-brazil"]
        assert row["state"] == "fresh"
    assert len(store.runs()) == 1


async def test_what_the_store_has_needs_neither_broker_nor_worker(rpcq_running: Running, store: Store) -> None:
    run = store.begin("jeans-brazil", "a")
    assert run is not None
    store.finish(run, expected("jeans-brazil", 1))
    app = create_app(store, watches=False)
    async with user_of(app) as user:  # the app has not even begun
        assert (await user.post("/products/jeans-brazil/look")).status_code == 200


async def test_without_a_queue_a_look_is_refused_and_the_next_one_asks_again(
    rpcq_running: Running, store: Store
) -> None:
    app = create_app(store, watches=False)
    async with app.router.lifespan_context(app), user_of(app) as user:
        refused = await user.post("/products/jeans-brazil/look")
        assert (refused.status_code, refused.json()["title"], refused.json()["queued"]) == (503, "Not queued", "no")
        assert store.states() == {}
        async with rpcq_running(scores):
            while (await user.post("/products/jeans-brazil/look")).status_code != 200:
                pass


async def test_another_site_may_kill_nothing(rpcq_running: Running, store: Store) -> None:
    app = create_app(store, watches=False)
    async with user_of(app) as user:
        for path in ("/workers/kill", "/workers", "/renew", "/products/jeans-brazil/look"):
            response = await user.post(path, headers={"sec-fetch-site": "cross-site"})
            assert response.status_code == 403
