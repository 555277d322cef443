"""What the page shows: uploads and steps, queues, workers, dead letters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from examples.media.books import Books
from examples.media.files import Files
from examples.media.steps import BY_NAME
from examples.media.tables import StepRow, Upload
from examples.stage import letters
from examples.stage.workers import Workers
from rpcq import RpcqError
from rpcq.observability.queues import QueueDepth, QueueWatch

SERVICES = ("pictures", "videos", "notices")

SHOWN = 12
"""Uploads on the page: the latest ones."""

LOOK_EVERY = 0.5
"""Seconds between two looks at the depth of the queues."""

log = logging.getLogger("media")


@dataclass
class Room:
    """What the app has, apart from HTTP.

    Attributes:
        books: say what is known of uploads.
        files: the uploads, and what is made of them.
        workers: the processes of each service that the page may start and kill; empty if they run elsewhere.
        videos: whether videos are taken.

    """

    books: Books
    files: Files
    workers: Mapping[str, Workers]
    videos: bool
    letters: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _depths: dict[str, QueueDepth] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, depth: QueueDepth) -> None:
        """Take what the broker says of a queue."""
        before = self._depths.get(depth.queue)
        self._depths[depth.queue] = depth
        if depth.kind == "dead" and depth.messages != (0 if before is None else before.messages):
            self._changed.set()

    async def watch(self) -> None:
        """Look at the queues, and read the dead letters whenever their number changes; until it is cancelled."""
        watch = QueueWatch(SERVICES, every=LOOK_EVERY, management="", on_depth=self.note)
        async with asyncio.TaskGroup() as group:
            group.create_task(watch.run())
            while True:
                await self._changed.wait()
                self._changed.clear()
                for service in SERVICES:
                    try:
                        self.letters[service] = await letters.listed(service) if self._of(service, "dead") else []
                    except RpcqError as error:
                        log.warning("dead letters of %s cannot be listed: %s", service, error)
                        self._changed.set()
                        await asyncio.sleep(LOOK_EVERY)

    def _of(self, service: str, kind: str) -> int | None:
        found = [it.messages for it in self._depths.values() if (it.service, it.kind) == (service, kind)]
        return sum(found) if found else None

    def state(self) -> dict[str, Any]:
        """All that the page shows, but for the progress of steps."""
        number, complete = self.books.counts()
        dead = {letter["id"] for found in self.letters.values() for letter in found}
        return {
            "videos": self.videos,
            "count": number,
            "complete": complete,
            "services": [
                {
                    "name": service,
                    "waiting": self._of(service, "jobs"),
                    "dead": self._of(service, "dead"),
                    "workers": list(self.workers[service].running) if service in self.workers else None,
                    "most": self.workers[service].most if service in self.workers else 0,
                }
                for service in SERVICES
            ],
            "letters": [{"service": service} | letter for service, found in self.letters.items() for letter in found],
            "faults": sorted(self.books.faults()),
            "notices": [{"id": it.id, "upload": it.upload, "text": it.text} for it in self.books.notices(SHOWN)],
            "uploads": [
                {
                    "id": upload.id,
                    "kind": upload.kind,
                    "name": upload.name,
                    "size": upload.size,
                    "left": upload.left,
                    "notified": upload.notified is not None,
                    "steps": [self._shown(upload, step, dead) for step in steps],
                }
                for upload, steps in self.books.latest(SHOWN)
            ],
        }

    def _shown(self, upload: Upload, step: StepRow, dead: set[str]) -> dict[str, Any]:
        if step.done is not None:
            state = "done"
        elif step.job in dead:
            state = "dead"
        elif step.error is not None:
            state = "failed"
        elif step.began is not None:
            state = "lost" if self._is_lost(step) else "begun"
        else:
            state = "unsent" if step.sent is None else "waiting"
        return {
            "name": step.name,
            "state": state,
            "attempt": step.attempt,
            "runs": step.runs,
            "worker": step.worker,
            "error": step.error,
            "size": step.size,
            "file": f"/uploads/{upload.id}/{BY_NAME[step.name].file}",
        }

    def _is_lost(self, step: StepRow) -> bool:
        """Whether the worker that began a step is known to be dead: nobody can know that of one that runs elsewhere."""
        service = BY_NAME[step.name].job.partition(".")[0]
        return service in self.workers and step.worker not in self.workers[service].running
