"""The service that computes scores.

Its jobs come in lanes: `high` for what somebody looks at, `low` for what the night renews. `compute` is a `def`: it
runs in a thread, and so the worker answers the broker meanwhile. Pure Python uses one CPU in each process, whatever the
number of threads; so a worker takes one job of each lane (`--job-prefetch 1`), and there are as many workers as CPUs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from examples.scores.asking import ask
from examples.scores.contracts import ScoresApi
from examples.scores.products import PRODUCTS
from examples.scores.simulation import simulate
from examples.scores.store import LOST, Store
from rpcq import Client, Context, Cron, GiveUp, Retry, Service


@dataclass(frozen=True)
class Tools:
    """What the handlers share."""

    store: Store
    client: Client


@asynccontextmanager
async def tools() -> AsyncGenerator[Tools, None]:
    """Open the store of `SCORES_DATABASE`, and a client for the jobs that a job sends."""
    store = Store(Path(os.environ.get("SCORES_DATABASE", "scores.sqlite")))
    async with Client(name="scores") as client:
        yield Tools(store, client)


scores = Service(api=ScoresApi, lifespan=tools, lanes=True)


@scores.job(timeout=LOST, retry=Retry(max_attempts=8, initial_backoff=1, max_backoff=60))
def compute(context: Context[Tools], product: str) -> None:
    """Compute the score of a product, unless the store has it already.

    A product may be sent twice, in one lane or in two, and a job may run twice after a crash. The store has the answer:
    who comes second finds the score, and has nothing to do.
    """
    if product not in PRODUCTS:
        raise GiveUp(f"there is no product {product!r}")
    store = context.state.store
    run = store.begin(product, str(os.getpid()))
    if run is not None:
        store.finish(run, simulate(PRODUCTS[product], run.edition))


@scores.job(schedule=Cron("0 3 * * *", tz="Europe/Berlin"), timeout=120)
async def renew(context: Context[Tools]) -> None:
    """Each night: take new emission factors, and have each product computed again, in the lane `low`.

    A tick may be sent twice, and an attempt may fail in its middle. All of them have one key, so there is one edition
    for them, and what was sent before is not sent again.
    """
    tools = context.state
    await asyncio.to_thread(tools.store.new_edition, context.idempotency_key or context.correlation_id)
    await ask(tools.client, tools.store, PRODUCTS, "low")
