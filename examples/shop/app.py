"""The web app: takes orders, and shows the shop at work.

`POST /orders` needs the orders' database alone: it works while the broker, or any other service, is down. All else is
for the page, which looks into all services: a real shop would have a dashboard for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from prometheus_client import make_asgi_app
from sqlalchemy import select

from examples.shop import books, orders, outside
from examples.shop.orders import NewOrder, Order, place
from examples.shop.relaying import relaying
from examples.shop.setup import NAMES, SERVICES
from examples.stage import letters
from examples.stage.pages import add_page, from_this_site
from examples.stage.workers import Workers
from rpcq import RpcqError
from rpcq.observability.queues import QueueDepth, QueueWatch

SHOWN = 30
"""Orders that the page shows, the newest."""

MOST = 50
"""Orders that are taken at once, by one process."""

COME_AGAIN = 1
"""Seconds after which a customer may come again when the shop is full."""

LOOK_EVERY = 1.0
"""Seconds between two looks at the queues."""

log = logging.getLogger("shop")


class Room:
    """What the page shows, apart from orders: queues, dead letters, and processes.

    Args:
        workers: the processes of each service that the page may start and kill; None if they are somebody else's.

    """

    def __init__(self, workers: Mapping[str, Workers] | None) -> None:
        self.workers = workers
        self.letters: dict[str, list[dict[str, Any]]] = {}
        self._depths: dict[str, QueueDepth] = {}
        self._changed = asyncio.Event()

    def note(self, depth: QueueDepth) -> None:
        """Take what the broker says of a queue."""
        before = self._depths.get(depth.queue)
        self._depths[depth.queue] = depth
        if depth.kind == "dead" and depth.messages != (0 if before is None else before.messages):
            self._changed.set()

    def dead(self, service: str) -> int | None:
        """Dead letters of a service; None while that is not known."""
        return next((it.messages for it in self._depths.values() if (it.service, it.kind) == (service, "dead")), None)

    def waiting(self, service: str) -> int | None:
        """Events that wait for a service; None while that is not known."""
        found = [it.messages for it in self._depths.values() if it.service == service and it.kind == "events"]
        return sum(found) if found else None

    def delayed(self) -> int:
        """Events that wait for their next attempt, of all services."""
        return sum(it.messages for it in self._depths.values() if it.kind == "delayed")

    def state(self) -> dict[str, Any]:
        """All of this."""
        return {
            "services": [
                {
                    "name": name,
                    "waiting": self.waiting(name),
                    "dead": self.dead(name),
                    "running": None if self.workers is None else list(self.workers[name].running),
                    "letters": self.letters.get(name, []),
                }
                for name in NAMES
            ],
            "delayed": self.delayed(),
        }

    async def watch(self) -> None:
        """Look at the queues, and read the dead letters whenever their number changes; until it is cancelled."""
        watch = QueueWatch(SERVICES, every=LOOK_EVERY, management="", on_depth=self.note)
        async with asyncio.TaskGroup() as group:
            group.create_task(watch.run())
            while True:
                await self._changed.wait()
                self._changed.clear()
                for name in NAMES:
                    try:
                        self.letters[name] = await letters.listed(name) if self.dead(name) else []
                    except RpcqError as error:
                        log.warning("dead letters of %s cannot be listed: %s", name, error)


async def known(service: str) -> str:
    """The name of a service, from the path; 404 if there is none."""
    if service not in NAMES:
        raise HTTPException(404, "There is no such service.")
    return service


Known = Annotated[str, Depends(known)]


def create_app(workers: Mapping[str, Workers] | None = None, *, watches: bool = True) -> FastAPI:
    """Make the app.

    Args:
        workers: the processes that the page may start and kill.
        watches: whether to ask the broker how deep the queues are: it must be RabbitMQ then.

    """
    room = Room(workers)

    @asynccontextmanager
    async def running(_app: FastAPI) -> AsyncIterator[None]:
        async with relaying(orders.outbox), asyncio.TaskGroup() as group:
            watch = group.create_task(room.watch()) if watches else None
            yield
            if watch is not None:
                watch.cancel()

    app = FastAPI(title="A shop", lifespan=running)
    add_page(app, Path(__file__).parent / "static")
    app.mount("/metrics", make_asgi_app())
    _add_routes(app, room)
    return app


def _add_routes(app: FastAPI, room: Room) -> None:
    guarded = [Depends(from_this_site)]

    taking = asyncio.Semaphore(MOST)

    @app.post("/orders", status_code=202, dependencies=guarded)
    async def take(new: NewOrder) -> dict[str, str]:
        """Take an order. It will be done, or cancelled; the answer does not wait for that.

        If too many are being taken, the customer is asked to come again: the database is not asked for more than it
        can do, and those who are let in are not slowed down by all others.
        """
        if taking.locked():
            raise HTTPException(503, "The shop is full at the moment.", {"Retry-After": str(COME_AGAIN)})
        async with taking:
            return {"id": await place(new)}

    @app.get("/orders/{order_id}")
    async def one(order_id: str) -> dict[str, Any]:
        """How far an order has come."""
        async with orders.sessions() as db:
            found = await db.get(Order, order_id)
        if found is None:
            raise HTTPException(404, "There is no such order.")
        return _shown(found)

    @app.get("/state")
    async def state() -> dict[str, Any]:
        """All that the page shows."""
        async with orders.sessions() as db:
            newest = (await db.scalars(select(Order).order_by(Order.placed.desc()).limit(SHOWN))).all()
        return {
            "orders": [_shown(it) for it in newest],
            "books": asdict(await books.read()),
            "outbox": (await orders.outbox.depth()).waiting,
            "mail": not await outside.is_broken("mail"),
        } | room.state()

    @app.post("/services/{service}/start", dependencies=guarded)
    def start(service: Known) -> dict[str, int | None]:
        """Start a process of a service."""
        return {"started": None if room.workers is None else room.workers[service].start()}

    @app.post("/services/{service}/kill", dependencies=guarded)
    def kill(service: Known) -> dict[str, int | None]:
        """Kill the process of a service with SIGKILL."""
        return {"killed": None if room.workers is None else room.workers[service].kill()}

    @app.post("/services/{service}/replay", dependencies=guarded)
    async def replay(service: Known) -> dict[str, int]:
        """Have the dead letters of a service done again."""
        return {"replayed": await letters.replayed(service)}

    @app.post("/mail/{state}", dependencies=guarded)
    async def mail(state: str) -> dict[str, bool]:
        """Let the mail provider refuse the shop's key ("refuse"), or take it again ("accept")."""
        if state not in ("accept", "refuse"):
            raise HTTPException(404, "The provider accepts or refuses.")
        await outside.set_broken("mail", broken=state == "refuse")
        return {"mail": state == "accept"}


def _shown(order: Order) -> dict[str, Any]:
    what = f"{order.count} {order.article}"
    keys = "id", "customer", "country", "cents", "state", "why", "told"
    return {key: getattr(order, key) for key in keys} | {"what": what}
