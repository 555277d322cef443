"""Watched jobs as server-sent events, under a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rpcq import ConfigurationError, Context, GiveUp, Service, WatchedJob
from rpcq.web import Rpc, progress
from support.load import until
from support.webserver import browser, served

SECONDS = 20.0


class App:
    """An app that sends jobs, and tells of them."""

    def __init__(self, namespace: str, **options: Any) -> None:
        self.go_on = asyncio.Event()
        self.jobs: dict[str, WatchedJob[Any]] = {}
        self.left: list[str] = []
        service = Service("pictures")

        @service.job
        async def resize(context: Context, path: str) -> str:
            context.progress(1, 2, note="one\ntwo")
            await self.go_on.wait()
            context.progress(2, 2)
            return path.upper()

        @service.job
        async def give_up() -> None:
            raise GiveUp("no such picture")

        @service.job
        async def too_large() -> str:
            return "x" * 2_000_000

        self.rpc = Rpc(f"memory://{namespace}", services=[service], namespace=namespace)
        self.options = options
        routes = [Route("/jobs/{name}", self.send, methods=["POST"]), Route("/jobs/{id}/events", self.events)]
        self.app = Starlette(routes=routes, lifespan=self.rpc.lifespan)

    async def send(self, request: Request) -> Response:
        job = await self.rpc.client.with_options(watch=True).send(
            f"pictures.{request.path_params['name']}", **dict(request.query_params)
        )
        self.jobs[job.id] = job
        return JSONResponse(job.id)

    async def events(self, request: Request) -> Response:
        job = self.jobs[request.path_params["id"]]
        events = progress(job, last_event_id=request.headers.get("last-event-id"), **self.options)

        async def noted() -> AsyncIterator[bytes]:
            try:
                async for event in events:
                    yield event
            finally:
                self.left.append(job.id)

        return StreamingResponse(noted(), media_type="text/event-stream")


async def sent(user: httpx.AsyncClient, name: str, **params: str) -> str:
    async with asyncio.timeout(SECONDS):
        while True:
            response = await user.post(f"/jobs/{name}", params=params)
            if response.status_code == httpx.codes.OK:
                return cast("str", response.json())
            await asyncio.sleep(0.02)


async def blocks(user: httpx.AsyncClient, job_id: str, **headers: str) -> AsyncIterator[dict[str, str]]:
    """The events, as a browser reads them: field by field; a comment has none."""
    async with user.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found: dict[str, str] = {}
        async for line in response.aiter_lines():
            if line:
                name, _, value = line.partition(": ")
                found[name] = value
            else:
                yield found
                found = {}


async def test_a_page_sees_how_far_a_job_is_and_what_it_returned(namespace: str) -> None:
    here = App(namespace)
    async with served(here.app) as user:
        job_id = await sent(user, "resize", path="a\nb")
        events = []
        async for event in blocks(user, job_id):
            events.append(event)
            here.go_on.set()
        late = [event async for event in blocks(user, job_id, **{"Last-Event-ID": events[-2]["id"]})]
        odd = [event async for event in blocks(user, job_id, **{"Last-Event-ID": "9" * 17})]
    assert [event["event"] for event in events] == ["progress", "progress", "result"]
    assert [event.get("id") for event in events] == ["1", "2", None]
    said = [json.loads(event["data"]) for event in events]
    assert said[0] == {"state": "running", "attempt": 1, "done": 1, "total": 2, "note": "one\ntwo"}
    assert said[1] == {"state": "running", "attempt": 1, "done": 2, "total": 2}
    assert said[2] == {"result": "A\nB"}
    assert late == events[2:]  # what it has does not come again
    assert odd == events[1:]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("give_up", {"reason": "gave_up", "executed": "yes", "attempts": 1, "message": "no such picture"}),
        ("too_large", {"reason": "invalid_result", "executed": "yes"}),
        ("resize", {"reason": "invalid", "executed": "no", "attempts": 0}),
    ],
)
async def test_a_page_sees_why_there_is_no_result(namespace: str, name: str, expected: dict[str, Any]) -> None:
    here = App(namespace)
    async with served(here.app) as user:
        job_id = await sent(user, name)
        *_, last = [event async for event in blocks(user, job_id)]
    assert last["event"] == "failed"
    said = json.loads(last["data"])
    assert {key: said[key] for key in expected} == expected


async def test_while_nothing_happens_comments_keep_the_connection_alive(namespace: str) -> None:
    here = App(namespace, heartbeat=0.05)
    async with served(here.app) as user:
        job_id = await sent(user, "resize", path="a")
        comments = 0
        async for event in blocks(user, job_id):
            comments += event == {"": "still there"}
            if comments == 3:
                here.go_on.set()
    assert event["event"] == "result"


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_the_events_end_when_the_user_leaves_and_the_job_goes_on(namespace: str, how: Any) -> None:
    here = App(namespace, heartbeat=0.05)
    async with served(here.app) as user:
        job_id = await sent(user, "resize", path="a")
        async with browser(user) as leaving:
            await leaving.get(f"/jobs/{job_id}/events")
            await leaving.reader.readuntil(b"event: progress")
            await leaving.leave(how)
        await until(lambda: here.left == [job_id], what="the events go on")
        here.go_on.set()
        assert await here.jobs[job_id].result(timeout=SECONDS) == "A"


async def test_a_heartbeat_that_cannot_be_is_refused(namespace: str) -> None:
    here = App(namespace)
    async with served(here.app) as user:
        job = here.jobs[await sent(user, "resize", path="a")]
        here.go_on.set()
        with pytest.raises(ConfigurationError, match="heartbeat must be a number of seconds above 0; got 0"):
            await anext(progress(job, heartbeat=0))
        assert await job.result(timeout=SECONDS) == "A"
