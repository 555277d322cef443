"""The web app. No request computes anything: it reads the store, and sends a job for a score that is missing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Response

from examples.scores.asking import ask
from examples.scores.contracts import ScoresApi
from examples.scores.products import PRODUCTS
from examples.scores.store import Lane, Score, Store
from examples.stage.pages import add_page, from_this_site
from examples.stage.workers import Workers
from rpcq import RpcqError
from rpcq.observability.queues import QueueDepth, QueueWatch
from rpcq.web import Rpc, on_call_error

LANES: tuple[Lane, ...] = ("high", "normal", "low")

RECENT = 60.0
"""Seconds that the page looks back."""

SEND_TIMEOUT = 5.0
"""Seconds that a request waits for a broker that is away; then its user hears that."""

LOOK_EVERY = 0.5
"""Seconds between two looks at the depth of the queues."""


class Depths:
    """How many jobs wait in each lane, as the broker last said."""

    def __init__(self) -> None:
        self._found: dict[str, QueueDepth] = {}

    def note(self, depth: QueueDepth) -> None:
        """Take what the broker says of a queue."""
        self._found[depth.queue] = depth

    def waiting(self, lane: Lane) -> int | None:
        """Jobs that no worker has taken; None while that is not known."""
        for name, depth in self._found.items():
            if depth.kind == "jobs" and (name.endswith(f":{lane}") if lane != "normal" else ":" not in name):
                return depth.messages
        return None

    @property
    def dead(self) -> int | None:
        """Dead letters; None while that is not known."""
        return next((depth.messages for depth in self._found.values() if depth.kind == "dead"), None)


class Shop:
    """What the app does, apart from HTTP.

    Args:
        store: the scores.
        rpc: sends jobs.
        workers: the workers that the page may start and kill; None if they are somebody else's.

    """

    def __init__(self, store: Store, rpc: Rpc, workers: Workers | None) -> None:
        self.store = store
        self.rpc = rpc
        self.depths = Depths()
        self.workers = workers

    async def look(self, product: str) -> tuple[str, Score | None]:
        """Show a product to somebody: its state, and its score, if there is one.

        A score that is missing or old is asked for, in the lane `high`. One that is there needs no broker.
        """
        state, score = await asyncio.to_thread(self._known, product)
        if state != "fresh":
            await ask(self.rpc.client, self.store, [product], "high")
            state, score = await asyncio.to_thread(self._known, product)
        return state, score

    def _known(self, product: str) -> tuple[str, Score | None]:
        return self.store.states().get(product, "none"), self.store.score(product)

    def state(self) -> dict[str, Any]:
        """All that the page shows."""
        now = time.time()
        scores, states = self.store.scores(), self.store.states()
        waits = {lane: self.store.waits(lane, RECENT) for lane in LANES}
        return {
            "edition": self.store.edition,
            "ready": self.rpc.ready,
            "lanes": [
                {
                    "lane": lane,
                    "waiting": self.depths.waiting(lane),
                    "done": waits[lane].done,
                    "median": waits[lane].median,
                    "longest": waits[lane].longest,
                }
                for lane in LANES
                if lane != "normal"
            ],
            "dead": self.depths.dead,
            "workers": None if self.workers is None else list(self.workers.running),
            "products": [
                {"id": product.id, "name": product.name, "state": states.get(product.id, "none")}
                | _shown(scores.get(product.id), now)
                for product in PRODUCTS.values()
            ],
        }


def _shown(score: Score | None, now: float) -> dict[str, Any]:
    if score is None:
        return {"grade": None, "kg": None, "low": None, "high": None, "age": None}
    footprint = score.footprint
    return {
        "grade": footprint.grade,
        "kg": round(footprint.kg, 2),
        "low": round(footprint.low, 2),
        "high": round(footprint.high, 2),
        "age": round(now - score.at, 1),
    }


async def known(product: str) -> str:
    """The ID of a product, from the path; 404 if there is none."""
    if product not in PRODUCTS:
        raise HTTPException(404, "There is no such product.")
    return product


def create_app(store: Store | None = None, workers: Workers | None = None, *, watches: bool = True) -> FastAPI:
    """Make the app.

    Args:
        store: the scores; None for those of `SCORES_DATABASE`.
        workers: the workers that the page may start and kill.
        watches: whether to ask the broker how deep the lanes are: it must be RabbitMQ then.

    """
    rpc = Rpc(name="scores-web", timeout=SEND_TIMEOUT)
    shop = Shop(store or Store(Path(os.environ.get("SCORES_DATABASE", "scores.sqlite"))), rpc, workers)

    @asynccontextmanager
    async def watching(_app: FastAPI) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            watch = QueueWatch(["scores"], every=LOOK_EVERY, on_depth=shop.depths.note) if watches else None
            task = None if watch is None else group.create_task(watch.run())
            yield
            if task is not None:
                task.cancel()

    errors = on_call_error()
    app = FastAPI(title="Scores", lifespan=rpc.around(watching), responses=errors.responses)
    app.add_exception_handler(RpcqError, errors)
    add_page(app, Path(__file__).parent / "static")
    _add_routes(app, shop)
    return app


def _add_routes(app: FastAPI, shop: Shop) -> None:
    guarded = [Depends(from_this_site)]

    @app.get("/state")
    def state() -> dict[str, Any]:
        """All that the page shows."""
        return shop.state()

    @app.post("/products/{product}/look", dependencies=guarded)
    async def look(product: Annotated[str, Depends(known)], response: Response) -> dict[str, Any]:
        """The score of a product; 202 if it is being computed for whoever asks now."""
        state, score = await shop.look(product)
        response.status_code = 200 if state == "fresh" else 202
        return {"id": product, "state": state} | _shown(score, time.time())

    @app.post("/renew", status_code=202, dependencies=guarded)
    async def renew() -> dict[str, str]:
        """What the night does, now: new emission factors, and all products again, in the lane `low`."""
        job = await shop.rpc.client.send(shop.rpc.client.bind(ScoresApi).renew)
        return {"job": job.id}

    @app.post("/workers", status_code=201, dependencies=guarded)
    def start() -> dict[str, int | None]:
        """Start a worker."""
        return {"started": None if shop.workers is None else shop.workers.start()}

    @app.post("/workers/kill", dependencies=guarded)
    def kill() -> dict[str, int | None]:
        """Kill the oldest worker with SIGKILL."""
        return {"killed": None if shop.workers is None else shop.workers.kill()}
