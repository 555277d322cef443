"""The uploads while each of their processes is killed in turn under load, and the broker once.

The oracle: each upload that was taken ("201") has all its files, each can be read, and each step was counted once;
there is one notice for it. There are no dead letters, and no job is left.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from PIL import Image

from examples.media.books import Books
from examples.media.ffmpeg import sample
from examples.media.files import ORIGINAL, Files
from examples.media.steps import STEPS
from support.broker import Broker
from support.load import until
from support.ports import free_ports
from support.producers import SECONDS
from support.systems import WORKER, Processes, running

# After a kill of the broker, what is on its way between two delay queues may stand still for 180 s.
pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

LATE = 300.0
"""Seconds after which what is waited for will not come."""

SERVICES = ("pictures", "videos", "notices")


@pytest.fixture(scope="module")
def originals(ffmpeg: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What users upload: pictures of several sizes, and a video, by their names."""
    found: dict[str, bytes] = {}
    for number, size in enumerate([(300, 200), (2400, 1600), (600, 900)]):
        written = BytesIO()
        Image.effect_noise(size, 40).convert("RGB").save(written, "JPEG")
        found[f"cat-{number}.jpg"] = written.getvalue()
    place = tmp_path_factory.mktemp("originals") / "short.mp4"
    asyncio.run(sample(place, 1))
    return found | {"short.mp4": place.read_bytes()}


class System(Processes):
    """The web app and the workers as processes, and users who upload."""

    def __init__(self, url: str, folder: Path, originals: dict[str, bytes]) -> None:
        self.books = Books(folder)
        self.files = Files(folder)
        self.taken: set[str] = set()
        self.room = 8  # uploads that are not complete, at most
        self._originals = originals
        (port,) = free_ports(1)
        self._base = f"http://127.0.0.1:{port}"
        web = "examples.media", "--alone", "--folder", str(folder), "--port", str(port)
        commands = {"web": web} | {
            f"{name}-{number}": (*WORKER, f"examples.media.{name}:{name}", "--job-prefetch", "1")
            for name, number in (("pictures", 1), ("pictures", 2), ("videos", 1), ("notices", 1))
        }
        workers = {"pictures": 2, "videos": 1, "notices": 1}
        super().__init__(url, commands, {"MEDIA_FOLDER": str(folder)}, workers, SERVICES)

    async def end(self) -> None:
        await super().end()
        self.books.close()

    async def users(self) -> None:
        """Upload, one after the other, whatever becomes of the app; no more than a few that are not complete."""
        async with httpx.AsyncClient(base_url=self._base, timeout=SECONDS) as user:
            while True:
                for name, content in self._originals.items():
                    await until(lambda: len(self.taken) < self.complete() + self.room, LATE)
                    try:
                        response = await user.post("/uploads", params={"name": name}, content=content)
                    except httpx.TransportError:
                        await asyncio.sleep(0.1)
                    else:
                        assert response.status_code == 201, response.text
                        self.taken.add(response.json()["id"])
                    await asyncio.sleep(0.05)

    def complete(self) -> int:
        return self.books.counts()[1]

    def runs(self) -> int:
        """How often a step has begun."""
        return sum(step.runs for _, steps in self.books.latest(1000) for step in steps)


@pytest.fixture
async def system(own: Broker, originals: dict[str, bytes], tmp_path: Path) -> AsyncIterator[System]:
    async with running(System(own.url, tmp_path, originals)) as made:
        yield made


@asynccontextmanager
async def load(system: System) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        users = group.create_task(system.users())
        yield
        users.cancel()


async def more(system: System, uploads: int) -> None:
    """Wait until so many more uploads have all their files."""
    before = system.complete()
    await until(lambda: system.complete() >= before + uploads, LATE)


async def check(system: System) -> None:
    """The oracle."""
    books = system.books
    assert system.taken
    await until(lambda: books.uploads() == {notice.upload for notice in books.notices()}, LATE)
    assert books.uploads() >= system.taken  # an upload whose answer was lost with the web app counts too
    depths = await system.drained()
    while (await books.outbox.depth()).waiting:
        await asyncio.sleep(0.1)
        depths = await system.drained()
    assert depths["dead"] == depths["lost"] == 0

    assert set(Counter(notice.upload for notice in books.notices()).values()) == {1}
    for upload, steps in books.latest(1000):
        assert upload.left == 0
        assert all(step.done is not None for step in steps)
        for step in STEPS["picture" if upload.kind == "picture" else "video"]:
            await readable(system.files.path(upload.id, step.file))
        files = {path.name for path in system.files.path(upload.id, "").iterdir() if path.suffix != ".part"}
        assert files == {ORIGINAL, *(step.file for step in STEPS[upload.kind])}  # type: ignore[index]


async def readable(path: Path) -> None:
    """Read a file to its end."""
    if path.suffix != ".mp4":
        with Image.open(path) as image:
            image.load()
        return
    process = await asyncio.create_subprocess_exec(
        "ffmpeg", "-v", "error", "-xerror", "-i", path, "-f", "null", "-", stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert (process.returncode, said) == (0, b"")


async def test_each_upload_has_all_its_files_once_when_every_process_is_killed_under_load(system: System) -> None:
    async with load(system):
        await more(system, 2)
        for name in ("pictures-1", "videos-1", "notices-1", "web", "pictures-2", "videos-1"):
            await system.kill(name)
            await asyncio.sleep(0.5)
            await system.start(name)
            await more(system, 3)
    await check(system)
    steps = sum(len(found) for _, found in system.books.latest(1000))
    assert system.runs() > steps, "no worker was killed in a step"


async def test_each_upload_has_all_its_files_once_when_the_broker_is_killed_under_load(
    own: Broker, system: System
) -> None:
    async with load(system):
        await more(system, 4)
        await asyncio.to_thread(own.kill)
        taken = len(system.taken)
        system.room += 4  # nothing is completed now
        await until(lambda: len(system.taken) > taken, LATE)  # uploads are taken
        await asyncio.to_thread(own.start)
        await more(system, 8)
    await check(system)
