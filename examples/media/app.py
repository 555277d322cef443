"""The web app: takes uploads, sends their steps, and shows how far they are. It opens no picture and no video."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from sse_starlette.sse import EventSourceResponse

from examples.media import books, ffmpeg, samples
from examples.media.files import Files
from examples.media.room import SERVICES, Room
from examples.media.sending import Sender
from examples.media.steps import BY_NAME, Kind
from examples.media.uploads import RefusedError, take
from examples.stage import letters
from examples.stage.pages import add_page, from_this_site
from examples.stage.workers import Workers
from rpcq.web import Rpc

SEND_TIMEOUT = 5.0
"""Seconds that a step waits for a broker that is away, before the app says so and tries again."""

CHUNK = 1 << 20
"""Bytes that are read at once."""

Name = Annotated[str, Query(min_length=1, max_length=120, pattern=r"^[^\x00-\x1f]*$")]


def create_app(
    folder: Path | None = None,
    workers: Mapping[str, Workers] | None = None,
    *,
    videos: bool | None = None,
    watches: bool = True,
) -> FastAPI:
    """Make the app.

    Args:
        folder: where files and database are; None for that of `MEDIA_FOLDER`.
        workers: the processes of each service that the page may start and kill.
        videos: whether videos are taken; None if ffmpeg is here.
        watches: whether to ask the broker how deep the queues are: it must be RabbitMQ then.

    """
    folder = folder or books.folder()
    room = Room(books.Books(folder), Files(folder), workers or {}, ffmpeg.is_there() if videos is None else videos)
    rpc = Rpc(name="media-web", timeout=SEND_TIMEOUT)
    sender = Sender(room.books, rpc)

    @asynccontextmanager
    async def working(_app: FastAPI) -> AsyncIterator[None]:
        try:
            await asyncio.to_thread(room.files.tidy, room.books.uploads())
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(sender.run())]
                if watches:
                    tasks.append(group.create_task(room.watch()))
                yield
                for task in tasks:
                    task.cancel()
        finally:
            room.books.close()

    app = FastAPI(title="Media", lifespan=rpc.around(working))
    add_page(app, Path(__file__).parent / "static")
    _add_uploads(app, room, sender)
    _add_looks(app, room, sender)
    _add_controls(app, room)
    return app


def _add_uploads(app: FastAPI, room: Room, sender: Sender) -> None:
    guarded = [Depends(from_this_site)]

    async def taken(name: str, chunks: AsyncIterator[bytes]) -> dict[str, str]:
        upload = await take(room.books, room.files, name, chunks, videos=room.videos)
        sender.wake()
        return {"id": upload}

    @app.exception_handler(RefusedError)
    async def refused(_request: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status)

    @app.post("/uploads", status_code=201, dependencies=guarded)
    async def upload(name: Name, request: Request) -> dict[str, str]:
        """Take a file, which is the body of the request. The answer does not wait for what is made of it."""
        return await taken(name, request.stream())

    @app.post("/samples/{kind}", status_code=201, dependencies=guarded)
    async def sample(kind: Kind) -> dict[str, str]:
        """Make a picture or a video, and take it as an upload."""
        if kind == "video" and not room.videos:
            raise RefusedError(f"{ffmpeg.MISSING[0].upper()}{ffmpeg.MISSING[1:]}.", 415)
        seed = random.randrange(1000)  # noqa: S311 - for hills
        with tempfile.TemporaryDirectory(prefix="media-") as made:
            place = Path(made) / "sample"
            if kind == "video":
                await ffmpeg.sample(place, samples.SECONDS)
            else:
                await asyncio.to_thread(samples.picture, place, seed)
            name = f"sample-{seed}.{'mp4' if kind == 'video' else 'jpg'}"
            return await taken(name, _chunks(place))

    @app.get("/uploads/{upload_id}/{file}")
    def show(upload_id: str, file: str) -> FileResponse:
        """What was made of an upload."""
        if upload_id not in room.books.uploads() or file not in {step.file for step in BY_NAME.values()}:
            raise HTTPException(404, "There is no such file.")
        place = room.files.path(upload_id, file)
        if not place.exists():
            raise HTTPException(404, "It is not made yet.")
        return FileResponse(place, headers={"x-content-type-options": "nosniff"})


async def _chunks(place: Path) -> AsyncIterator[bytes]:
    with place.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK):
            yield chunk


def _add_looks(app: FastAPI, room: Room, sender: Sender) -> None:
    @app.get("/state")
    def state() -> dict[str, Any]:
        """All that the page shows, but for the progress of steps."""
        return room.state() | {"trouble": sender.trouble}

    @app.get("/progress")
    async def progress() -> EventSourceResponse:
        """How far steps are, as server-sent events, for as long as somebody listens."""

        async def events() -> AsyncIterator[dict[str, str]]:
            async for upload, name, step in sender.told():
                known = asdict(step) | {"due": None if step.due is None else step.due.isoformat()}
                yield {"event": "progress", "data": json.dumps({"upload": upload, "step": name} | known)}

        return EventSourceResponse(events())


def _add_controls(app: FastAPI, room: Room) -> None:
    """Add what a user of a real site cannot do."""
    guarded = [Depends(from_this_site)]

    def workers(service: str) -> Workers:
        if service not in room.workers:
            raise HTTPException(404, "There is no such service here.")
        return room.workers[service]

    @app.post("/services/{service}/start", status_code=201, dependencies=guarded)
    def start(service: str) -> dict[str, int | None]:
        """Start a worker."""
        return {"started": workers(service).start()}

    @app.post("/services/{service}/kill", dependencies=guarded)
    def kill(service: str) -> dict[str, int | None]:
        """Kill the oldest worker with SIGKILL."""
        return {"killed": workers(service).kill()}

    @app.post("/letters/{service}/replay", dependencies=guarded)
    async def replay(service: str, letter: Annotated[str | None, Query(max_length=100)] = None) -> dict[str, int]:
        """Have the dead letters of a service done again, or one of them."""
        if service not in SERVICES:
            raise HTTPException(404, "There is no such service.")
        return {"replayed": await letters.replayed(service, *([] if letter is None else [letter]))}

    @app.post("/faults/{step}", dependencies=guarded)
    def fault(step: str, *, fails: bool) -> dict[str, bool]:
        """Make a step fail, or no longer."""
        if step not in BY_NAME:
            raise HTTPException(404, "There is no such step.")
        room.books.set_fault(step, fails=fails)
        return {step: fails}
