"""The newsroom: a page where stories are published, and which shows who has got them, live."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query
from fastapi.responses import StreamingResponse

from examples.news import desk, editor
from examples.news.contracts import TOPICS, EditorApi, Topic
from examples.news.gateway import Gateway
from examples.news.web import After, Choices, LastId
from examples.stage.pages import add_page, from_this_site
from examples.stage.workers import Programs
from rpcq import RpcqError
from rpcq.observability.queues import QueueDepth, QueueWatch
from rpcq.web import Rpc, on_call_error

SERVICES = {
    "mobile": ("mobile", "mobile:spread"),
    "emails": ("emails", "emails:collect"),
    "web": ("web", "web:keep"),
}
"""The queues of each service, as `QueueWatch` names them."""

LOOK_EVERY = 0.5
"""Seconds between two looks at the queues."""

SAVED_WITHIN = 5.0
"""Seconds that the editor has to save a story."""

Headline = Annotated[str, Query(min_length=1, max_length=120)]
Given = Annotated[str | None, Query(pattern=r"^[0-9a-f]{16}$", description="the story's ID, to ask again safely")]


class Newsroom:
    """What the page shows apart from stories.

    Args:
        gateway: has the browsers' streams.
        programs: what the page may kill and start, by its name; empty if it runs elsewhere.

    """

    def __init__(self, gateway: Gateway, programs: Mapping[str, Programs]) -> None:
        self.gateway = gateway
        self.programs = programs
        self._depths: dict[str, QueueDepth] = {}

    def note(self, depth: QueueDepth) -> None:
        """Take what the broker says of a queue."""
        self._depths[depth.queue] = depth

    def waiting(self, service: str) -> int | None:
        """What waits for a service, or is in its hands; None while that is not known."""
        found = [it for it in self._depths.values() if it.service == service and it.kind in ("jobs", "events")]
        return sum(it.messages + (it.unacknowledged or 0) for it in found) if found else None

    def dead(self) -> int | None:
        """Dead letters of all services; None while that is not known."""
        found = [it.messages for it in self._depths.values() if it.kind == "dead"]
        return sum(found) if found else None

    async def state(self) -> dict[str, Any]:
        """All that the page shows."""
        readers = await desk.all_readers()
        return {
            "stories": len(await desk.stories()),
            "kept": len(await desk.kept()),
            "again": await desk.pushed_again(),
            "dead": self.dead(),
            "waiting": {service: self.waiting(service) for service in SERVICES}
            | {"editor": (await editor.outbox.depth()).waiting},
            "programs": {name: bool(program.running) for name, program in self.programs.items()},
            "readers": [
                {
                    "name": it.name,
                    "by": it.by,
                    "choices": it.choices,
                    "wanted": len(it.wanted),
                    "got": len(it.got),
                    "right": it.is_right,
                    "mails": it.mails,
                    "last": it.last,
                }
                for it in readers
            ],
        }


def create_app(gateway: Gateway, programs: Mapping[str, Programs] | None = None, *, watches: bool = True) -> FastAPI:
    """Make the app.

    Args:
        gateway: to the processes of the web.
        programs: what the page may kill and start, by its name.
        watches: whether to ask the broker how deep the queues are: it must be RabbitMQ then.

    """
    rpc = Rpc(name="newsroom", timeout=SAVED_WITHIN)
    room = Newsroom(gateway, programs or {})

    @asynccontextmanager
    async def watching(_app: FastAPI) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            names = [queue for queues in SERVICES.values() for queue in queues]
            watch = QueueWatch(names, every=LOOK_EVERY, management="", on_depth=room.note) if watches else None
            task = None if watch is None else group.create_task(watch.run())
            yield
            if task is not None:
                task.cancel()

    errors = on_call_error()
    app = FastAPI(title="News", lifespan=rpc.around(watching), responses=errors.responses)
    app.add_exception_handler(RpcqError, errors)
    add_page(app, Path(__file__).parent / "static")
    _add_stories(app, room, rpc)
    _add_controls(app, room)
    return app


def _add_stories(app: FastAPI, room: Newsroom, rpc: Rpc) -> None:
    guarded = [Depends(from_this_site)]

    @app.get("/state")
    async def state() -> dict[str, Any]:
        """All that the page shows."""
        return await room.state()

    @app.get("/live")
    async def live(choices: Choices, after: After = None, last_id: LastId = None) -> StreamingResponse:
        """Stories as they come, from one of the processes of the web."""
        told = room.gateway.stream(choices, after if last_id is None else last_id)
        return StreamingResponse(told, media_type="text/event-stream", headers={"cache-control": "no-store"})

    @app.post("/stories", status_code=201, dependencies=guarded)
    async def publish(topic: Topic, headline: Headline, story_id: Given = None) -> dict[str, str]:
        """Publish a story. The answer says that it is saved; nobody waits for its readers."""
        made = story_id or secrets.token_hex(8)
        await rpc.client.bind(EditorApi).publish(story_id=made, topic=topic, headline=headline)
        return {"id": made}

    @app.post("/stories/many", status_code=201, dependencies=guarded)
    async def many(count: Annotated[int, Query(ge=1, le=200)] = 25) -> dict[str, int]:
        """Publish many stories, of all topics."""
        topics = list(TOPICS)
        for number in range(count):
            topic: Any = topics[number % len(topics)]
            await rpc.client.bind(EditorApi).publish(
                story_id=secrets.token_hex(8), topic=topic, headline=f"Story {number + 1} of {count}"
            )
        return {"count": count}


def _add_controls(app: FastAPI, room: Newsroom) -> None:
    """Add what a user of a real newsroom cannot do."""
    guarded = [Depends(from_this_site)]

    def program(name: str) -> Programs:
        if name not in room.programs:
            raise HTTPException(404, "There is no such program here.")
        return room.programs[name]

    @app.post("/programs/{name}/start", status_code=201, dependencies=guarded)
    def start(name: str) -> dict[str, int | None]:
        """Start a program."""
        return {"started": program(name).start()}

    @app.post("/programs/{name}/kill", dependencies=guarded)
    def kill(name: str) -> dict[str, int | None]:
        """Kill a program with SIGKILL."""
        return {"killed": program(name).kill()}
