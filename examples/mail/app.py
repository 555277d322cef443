"""The web app: it has people sign up and confirm, and shows what becomes of it. It speaks to no mail server."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from examples.mail.postbox import Postbox
from examples.mail.tables import Account, SignUp, User, open_database
from examples.mail.users import Users
from examples.stage import letters
from examples.stage.pages import add_page, from_this_site
from examples.stage.workers import Programs
from rpcq import RpcqError
from rpcq.observability.queues import QueueDepth, QueueWatch

QUEUES = {
    "confirmation mails": "sub.emails:confirm",
    "welcome mails": "job.emails",
    "billing": "sub.billing:open_account",
    "analytics": "sub.analytics:count",
}
"""The queues of the page, and the ends of their names."""

WATCHED = ("emails", "emails:confirm", "billing", "billing:open_account", "analytics", "analytics:count")

LOOK_EVERY = 0.5
"""Seconds between two looks at the depth of the queues."""

SHOWN = 30
"""Users on the page: the latest ones."""

NAMES = ("Ada", "Alan", "Barbara", "Donald", "Edsger", "Frances", "Grace", "John", "Katherine", "Margaret")

Name = Annotated[str, Query(min_length=1, max_length=60, pattern=r"^[^\r\n]*$")]
Address = Annotated[str, Query(max_length=200, pattern=r"^[A-Za-z0-9._+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+$")]


class Shop:
    """What the app does, apart from HTTP.

    Args:
        engine: the database.
        postbox: that of the mail server, to show what has arrived.
        programs: what the page may kill and start, by its name; empty if it runs elsewhere.

    """

    def __init__(self, engine: Engine, postbox: Postbox, programs: Mapping[str, Programs]) -> None:
        self.engine = engine
        self.users = Users(engine)
        self.postbox = postbox
        self.programs = programs
        self._depths: dict[str, QueueDepth] = {}

    def note(self, depth: QueueDepth) -> None:
        """Take what the broker says of a queue."""
        self._depths[depth.queue] = depth

    def state(self) -> dict[str, Any]:
        """All that the page shows."""
        mails = self.postbox.mails()
        times = {mail.id.partition("@")[0]: mail.times for mail in mails}
        with Session(self.engine) as db:
            users = db.scalars(select(User).order_by(User.created.desc()).limit(SHOWN)).all()
            counts = {
                kind: db.scalar(select(func.count()).select_from(table)) or 0
                for kind, table in (("users", User), ("billing", Account), ("analytics", SignUp))
            }
        kinds = Counter(mail.id.partition(".")[0] for mail in mails)
        done = counts | {"confirmation mails": kinds["confirm"], "welcome mails": kinds["welcome"]}
        return {
            "signed_up": counts["users"],
            "doubles": sum(mail.times - 1 for mail in mails),
            "queues": [{"queue": name, "waiting": self._waiting(name), "done": done[name]} for name in QUEUES],
            "delayed": self._of_kind("delayed"),
            "dead": self._of_kind("dead"),
            "programs": {name: bool(program.running) for name, program in self.programs.items()},
            "users": [
                {
                    "id": user.id,
                    "name": user.name,
                    "address": user.address,
                    "confirmed": user.confirmed,
                    "confirm": times.get(f"confirm.{user.id}", 0),
                    "welcome": times.get(f"welcome.{user.id}", 0),
                }
                for user in users
            ],
        }

    def _waiting(self, name: str) -> int | None:
        """Messages that wait or are in hand; None while that is not known."""
        found = [it for queue, it in self._depths.items() if queue.endswith(f".{QUEUES[name]}")]
        return found[0].messages + (found[0].unacknowledged or 0) if found else None

    def _of_kind(self, kind: str) -> int | None:
        found = [depth.messages for depth in self._depths.values() if depth.kind == kind]
        return sum(found) if found else None


def create_app(
    engine: Engine | None = None,
    postbox: Postbox | None = None,
    programs: Mapping[str, Programs] | None = None,
    *,
    watches: bool = True,
) -> FastAPI:
    """Make the app.

    Args:
        engine: the database; None for the one of `MAIL_DATABASE`.
        postbox: that of the mail server; None for the one of `MAIL_POSTBOX`.
        programs: what the page may kill and start, by its name.
        watches: whether to ask the broker how deep the queues are: it must be RabbitMQ then.

    """
    shop = Shop(engine or open_database(), postbox or Postbox(), programs or {})

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with shop.users.outbox, asyncio.TaskGroup() as group:
            watch = QueueWatch(WATCHED, every=LOOK_EVERY, on_depth=shop.note) if watches else None
            task = None if watch is None else group.create_task(watch.run())
            yield
            if task is not None:
                task.cancel()

    app = FastAPI(title="Mail", lifespan=lifespan)
    add_page(app, Path(__file__).parent / "static")
    _add_routes(app, shop)
    _add_controls(app, shop)
    return app


def _add_routes(app: FastAPI, shop: Shop) -> None:
    guarded = [Depends(from_this_site)]

    @app.get("/state")
    def state() -> dict[str, Any]:
        """All that the page shows."""
        return shop.state()

    @app.post("/users", status_code=201, dependencies=guarded)
    def sign_up(name: Name, address: Address) -> dict[str, str]:
        """Sign up."""
        return {"id": shop.users.sign_up(name, address)}

    @app.post("/users/many", status_code=201, dependencies=guarded)
    def many(count: Annotated[int, Query(ge=1, le=200)] = 50) -> dict[str, int]:
        """Have many sign up at once."""
        for number in range(count):
            name = NAMES[number % len(NAMES)]
            shop.users.sign_up(name, f"{name.lower()}{number}@example.org")
        return {"count": count}

    @app.post("/users/{user_id}/confirm", dependencies=guarded)
    def confirm(user_id: str) -> dict[str, str]:
        """Confirm an address with the code of the e-mail."""
        if not shop.users.confirm(user_id):
            raise HTTPException(404, "No such code was sent.")
        return {"id": user_id}


def _add_controls(app: FastAPI, shop: Shop) -> None:
    """Add what a user of a real shop cannot do."""
    guarded = [Depends(from_this_site)]

    def program(name: str) -> Programs:
        if name not in shop.programs:
            raise HTTPException(404, "There is no such program here.")
        return shop.programs[name]

    @app.post("/accounts", dependencies=guarded)
    def give_account(address: Address) -> dict[str, str]:
        """Have the mail server know an address that bounced."""
        shop.postbox.give_account(address)
        return {"address": address}

    @app.get("/letters")
    async def dead_letters() -> list[dict[str, Any]]:
        """The dead letters of the e-mails."""
        try:
            return await letters.listed("emails")
        except RpcqError as error:
            raise HTTPException(503, f"Dead letters cannot be listed: {error}") from error

    @app.post("/letters/replay", dependencies=guarded)
    async def replay() -> dict[str, int]:
        """Send the jobs of all dead letters again."""
        return {"count": await letters.replayed("emails")}

    @app.post("/programs/{name}/start", status_code=201, dependencies=guarded)
    def start(name: str) -> dict[str, int | None]:
        """Start a program."""
        return {"started": program(name).start()}

    @app.post("/programs/{name}/kill", dependencies=guarded)
    def kill(name: str) -> dict[str, int | None]:
        """Kill a program with SIGKILL."""
        return {"killed": program(name).kill()}
