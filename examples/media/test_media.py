"""Tests of the uploads without a broker: steps fail, workers are killed, and the time is moved, in this process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image
from sqlalchemy import create_engine, text

from examples.media import books, ffmpeg, painting, sending, uploads
from examples.media.app import create_app
from examples.media.books import Books
from examples.media.files import ORIGINAL, Files, kind_of
from examples.media.notices import notices
from examples.media.pictures import pictures, watermark
from examples.media.pool import Pool
from examples.media.sending import Sender
from examples.media.steps import STEPS, UnusableError
from examples.media.uploads import RefusedError, take
from examples.media.videos import videos
from rpcq import GiveUp
from rpcq.testing import Running, World, Worlds
from rpcq.web import Rpc

needs_ffmpeg = pytest.mark.skipif(not ffmpeg.is_there(), reason=ffmpeg.MISSING)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test, which the services open too."""
    monkeypatch.setenv("MEDIA_FOLDER", str(tmp_path))
    return tmp_path


@pytest.fixture
def shelf(folder: Path) -> Iterator[Books]:
    made = Books(folder)
    yield made
    made.close()


def picture(seed: int = 1) -> bytes:
    """A small picture."""
    written = BytesIO()
    Image.effect_noise((90, 60), seed).convert("RGB").save(written, "JPEG")
    return written.getvalue()


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def uploaded(shelf: Books, folder: Path, content: bytes, name: str = "cat.jpg") -> str:
    return await take(shelf, Files(folder), name, chunks(content), videos=True)


async def sent(world: World, shelf: Books) -> None:
    """Send what is not sent, as the web app does, and wait until it is done, delayed or dead."""
    for upload, name in shelf.unsent(100):
        job = await world.client.with_options(idempotency_key=f"{upload}.{name}").send(
            f"pictures.{name}", upload=upload
        )
        shelf.sent(upload, name, job.id)
    await world.settled()


async def told(shelf: Books, count: int) -> list[str]:
    """The uploads whose users were told, once there are so many: the outbox is a program of its own."""
    while len(shelf.notices()) < count or (await shelf.outbox.depth()).waiting:  # noqa: ASYNC110 - others
        await asyncio.sleep(0.02)
    return [notice.upload for notice in shelf.notices()]


def made(folder: Path, upload: str) -> set[str]:
    return {path.name for path in Files(folder).path(upload, "").iterdir()} - {ORIGINAL}


ALL = {step.file for step in STEPS["picture"]}


async def test_each_upload_has_all_its_files_and_one_notice(rpcq_world: Worlds, shelf: Books, folder: Path) -> None:
    async with rpcq_world(pictures, notices) as world:
        both = [await uploaded(shelf, folder, picture(seed)) for seed in (1, 2)]
        await sent(world, shelf)
        assert sorted(await told(shelf, 2)) == sorted(both)
        assert not world.dead()
    for upload in both:
        assert made(folder, upload) == ALL
        for file in ALL:
            with Image.open(Files(folder).path(upload, file)) as image:
                assert image.size == (90, 60)
    assert shelf.counts() == (2, 2)


async def test_a_step_that_fails_is_repeated_alone_and_the_others_go_on(
    rpcq_world: Worlds, shelf: Books, folder: Path
) -> None:
    shelf.set_fault("watermark", fails=True)
    async with rpcq_world(pictures, notices) as world:
        upload = await uploaded(shelf, folder, picture())
        await sent(world, shelf)
        assert made(folder, upload) == ALL - {"preview.jpg"}
        (waiting,) = world.waiting(watermark)
        assert waiting.attempt == 2
        shelf.set_fault("watermark", fails=False)
        assert shelf.notices() == []
        await world.advance(minutes=1)
        assert await told(shelf, 1) == [upload]
        assert not world.dead()
    ((_, steps),) = shelf.latest(1)
    assert {step.name: step.runs for step in steps} == {"resize": 1, "watermark": 2, "optimise": 1}


async def test_a_step_that_goes_on_failing_is_a_dead_letter_and_nobody_is_told_that_all_is_there(
    rpcq_world: Worlds, shelf: Books, folder: Path
) -> None:
    shelf.set_fault("watermark", fails=True)
    async with rpcq_world(pictures, notices) as world:
        await uploaded(shelf, folder, picture())
        await sent(world, shelf)
        await world.advance(hours=1)
        (letter,) = world.dead(watermark)
        assert (letter.reason, letter.attempt) == ("attempts", 4)
    ((upload, steps),) = shelf.latest(1)
    assert (upload.left, upload.notified, shelf.notices()) == (1, None, [])
    assert [step.error for step in steps] == [None, "watermark is made to fail", None]


@pytest.mark.parametrize("when", ["before the file is there", "before it is noted", "after it is noted"])
async def test_a_worker_may_be_lost_anywhere_in_a_step(
    rpcq_world: Worlds, shelf: Books, folder: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    async with rpcq_world(pictures, notices) as world:
        once = [world.crash]
        finish, run = Books.finish, Pool.run

        def finishes(self: Books, *args: Any) -> bool:
            if when == "before it is noted" and once:
                once.pop()()
            done = finish(self, *args)
            if when == "after it is noted" and once:
                once.pop()()
            return done

        async def runs(self: Pool, work: Any, *args: Any, **options: Any) -> Any:
            found = await run(self, work, *args, **options)
            if when == "before the file is there" and args and once:
                once.pop()()
            return found

        monkeypatch.setattr(Books, "finish", finishes)
        monkeypatch.setattr(Pool, "run", runs)
        upload = await uploaded(shelf, folder, picture())
        await sent(world, shelf)
        assert not once
        assert await told(shelf, 1) == [upload]
        assert not world.dead()
    assert made(folder, upload) == ALL
    ((row, _),) = shelf.latest(1)
    assert row.left == 0


def test_of_many_that_finish_the_same_steps_at_once_one_has_the_user_told(shelf: Books, folder: Path) -> None:
    shelf.add("picture", "cat.jpg", 1, "a")
    names = [step.name for step in STEPS["picture"]] * 4
    with ThreadPoolExecutor(8) as threads:
        counted = list(threads.map(lambda name: shelf.finish("a", name, 1), names))
    assert sum(counted) == len(STEPS["picture"])
    ((upload, _),) = shelf.latest(1)
    assert upload.left == 0
    engine = create_engine(f"sqlite:///{folder}/media.sqlite")
    with engine.connect() as connection:
        assert connection.scalar(text("select count(*) from rpcq_outbox")) == 1
    engine.dispose()


def test_a_notice_that_comes_twice_is_one(shelf: Books) -> None:
    shelf.add("picture", "cat.jpg", 1, "a")
    for _ in range(2):
        shelf.notify("a")
    assert [notice.text for notice in shelf.notices()] == ["cat.jpg is ready"]
    with pytest.raises(GiveUp, match="there is no upload 'b'"):
        shelf.notify("b")


async def test_what_is_no_picture_is_a_dead_letter_that_says_so(rpcq_world: Worlds, shelf: Books, folder: Path) -> None:
    async with rpcq_world(pictures) as world:
        await uploaded(shelf, folder, picture()[:400])
        await sent(world, shelf)
        letters = world.dead(pictures)
    assert {(letter.reason, letter.attempt) for letter in letters} == {("gave_up", 1)}
    assert all(letter.error.startswith("the picture cannot be read: ") for letter in letters)
    assert len(letters) == 3


def test_a_small_file_with_many_pixels_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "large.png"
    Image.new("1", (10_000, 8_000)).save(place)
    with pytest.raises(UnusableError, match="has 80 million pixels; at most 60 million are taken"):
        painting.resize(place, tmp_path / "small.jpg")


# The process of a pool.


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


async def test_work_whose_process_dies_fails_and_the_next_one_has_a_new_process() -> None:
    async with Pool() as pool:
        first = await pool.run(os.getpid)
        assert first != os.getpid()
        with pytest.raises(RuntimeError, match="the process that did the work died"):
            await pool.run(os.kill, first, signal.SIGKILL)
        assert await pool.run(os.getpid) not in (first, os.getpid())


async def test_work_says_how_far_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(picture())
    heard: list[tuple[float, float]] = []
    async with Pool() as pool:
        await pool.run(painting.resize, tmp_path / "a", tmp_path / "b", on_progress=lambda *it: heard.append(it))
    assert heard[-1] == (3, 3)


async def test_work_that_is_cancelled_ends_at_once() -> None:
    async with Pool() as pool:
        first = await pool.run(os.getpid)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await pool.run(_sleep, 60)
        assert await pool.run(os.getpid) != first
        while Path(f"/proc/{first}").exists():  # noqa: ASYNC110, ASYNC240 - another process
            await asyncio.sleep(0.01)


# Uploads.


@pytest.mark.parametrize(
    ("content", "videos_too", "status", "why"),
    [
        (b"%PDF-1.7 and so on", True, 415, "no picture"),
        (b"", True, 415, "no picture"),
        (b"\0\0\0\x20ftypisom", False, 415, "Videos need ffmpeg, which is not installed here: apt-get install ffmpeg"),
    ],
)
async def test_what_is_refused_leaves_nothing(
    shelf: Books, folder: Path, content: bytes, videos_too: bool, status: int, why: str
) -> None:
    with pytest.raises(RefusedError, match=why) as refused:
        await take(shelf, Files(folder), "x", chunks(content), videos=videos_too)
    assert refused.value.status == status
    assert list((folder / "uploads").iterdir()) == []
    assert shelf.uploads() == set()


async def test_too_much_is_refused_before_all_of_it_has_come(
    shelf: Books, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MOST_BYTES", 1_000_000)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(300_000)

    with pytest.raises(RefusedError, match="at most 1 MB"):
        await take(shelf, Files(folder), "x", endless(), videos=True)
    assert list((folder / "uploads").iterdir()) == []


def test_kinds_are_told_by_the_first_bytes() -> None:
    assert [
        kind_of(head) for head in (picture()[:16], b"RIFF\0\0\0\0WEBPVP8 ", b"\x1a\x45\xdf\xa3", b"RIFF....WAVE")
    ] == [
        "picture",
        "picture",
        "video",
        None,
    ]


async def test_what_killed_programs_left_is_removed_after_a_while(shelf: Books, folder: Path) -> None:
    upload = await uploaded(shelf, folder, picture())
    files = Files(folder)
    old, new = files.path(upload, "large.jpg.1.part"), files.path(upload, "large.jpg.2.part")
    orphan = files.path("nobody", ORIGINAL)
    orphan.parent.mkdir()
    for path in (old, new, orphan):
        path.write_bytes(b"x")
    for path in (old, orphan.parent, files.path(upload, ORIGINAL)):
        os.utime(path, (0, 0))
    files.tidy(shelf.uploads())
    assert [path.exists() for path in (old, new, orphan, files.path(upload, ORIGINAL))] == [False, True, False, True]


# On the web.


def user_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://media")


async def until(user: httpx.AsyncClient, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """What the page shows, once that is so."""
    while not condition(state := (await user.get("/state")).json()):  # noqa: ASYNC110 - other tasks
        await asyncio.sleep(0.02)
    found: dict[str, Any] = state
    return found


async def test_a_user_uploads_a_picture_and_gets_what_is_made_of_it(rpcq_running: Running, folder: Path) -> None:
    app = create_app(folder, watches=False)
    async with rpcq_running(pictures, notices), app.router.lifespan_context(app), user_of(app) as user:
        taken = await user.post("/uploads", params={"name": "cat.jpg"}, content=picture())
        assert taken.status_code == 201
        state = await until(user, lambda it: it["uploads"][0]["notified"])
        (shown,) = state["uploads"]
        assert (shown["left"], state["complete"], state["trouble"]) == (0, 1, None)
        for step in shown["steps"]:
            got = await user.get(step["file"])
            assert (got.status_code, len(got.content)) == (200, step["size"])
        for path in (f"/uploads/{shown['id']}/original", "/uploads/nobody/large.jpg"):
            assert (await user.get(path)).status_code == 404
        assert (
            (await user.post("/uploads", params={"name": "a"}, content=b"text"))
            .json()["detail"]
            .startswith("This is no")
        )


async def test_an_upload_is_taken_while_nothing_else_runs_and_done_later(
    rpcq_running: Running, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "LOOK_EVERY", 0.05)
    app = create_app(folder, watches=False)
    async with app.router.lifespan_context(app), user_of(app) as user:
        assert (await user.post("/uploads", params={"name": "cat.jpg"}, content=picture())).status_code == 201
        state = await until(user, lambda it: it["trouble"] is not None)
        assert [step["state"] for step in state["uploads"][0]["steps"]] == ["unsent"] * 3
        async with rpcq_running(pictures, notices):
            await until(user, lambda it: it["uploads"][0]["notified"])


async def test_an_app_with_steps_to_send_starts_while_the_broker_is_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("RPCQ_URL", f"amqp://guest:guest@127.0.0.1:{silent.getsockname()[1]}/")
        app = create_app(folder, watches=False)
        async with app.router.lifespan_context(app), user_of(app) as user:
            assert (await user.post("/uploads", params={"name": "cat.jpg"}, content=picture())).status_code == 201
            state = await until(user, lambda it: it["trouble"] is not None)
            assert "broker" in state["trouble"]
            assert [step["state"] for step in state["uploads"][0]["steps"]] == ["unsent"] * 3


async def test_the_app_hears_how_far_a_step_is(
    rpcq_running: Running, shelf: Books, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, run = asyncio.Event(), Pool.run

    async def waits(self: Pool, work: Any, *args: Any, on_progress: Any = None) -> Any:
        if on_progress is not None:
            on_progress(2, 3)
            await shown.wait()
        return await run(self, work, *args)

    monkeypatch.setattr(Pool, "run", waits)
    rpc = Rpc()
    sender = Sender(shelf, rpc)
    async with rpcq_running(pictures, notices), rpc.lifespan():
        upload = await uploaded(shelf, folder, picture())
        sending = asyncio.create_task(sender.run())
        heard = {}
        async for of, name, step in sender.told():
            if step.total is not None:  # else it has only begun
                heard[of, name] = (step.state, step.done, step.total)
            if len(heard) == 3:
                break
        shown.set()
        assert await told(shelf, 1) == [upload]
        sending.cancel()
        await asyncio.wait([sending])
    assert heard == {(upload, step.name): ("running", 2, 3) for step in STEPS["picture"]}


async def test_another_site_may_do_nothing(rpcq_running: Running, folder: Path) -> None:
    app = create_app(folder, watches=False)
    async with rpcq_running(), app.router.lifespan_context(app), user_of(app) as user:
        for path in ("/uploads?name=a", "/samples/picture", "/services/pictures/kill", "/faults/resize?fails=true"):
            assert (await user.post(path, headers={"sec-fetch-site": "cross-site"})).status_code == 403


# Videos.


@needs_ffmpeg
async def test_a_video_becomes_three_sizes_and_a_thumbnail(rpcq_running: Running, folder: Path) -> None:
    app = create_app(folder, watches=False)
    await ffmpeg.sample(folder / "short.mp4", 1)
    async with rpcq_running(videos, notices), app.router.lifespan_context(app), user_of(app) as user:
        await user.post("/uploads", params={"name": "a.mp4"}, content=(folder / "short.mp4").read_bytes())
        state = await until(user, lambda it: it["uploads"][0]["notified"])
    (upload,) = state["uploads"]
    heights = [await _height(Files(folder).path(upload["id"], f"{height}p.mp4")) for height in (720, 480, 240)]
    assert heights == [720, 480, 240]
    with Image.open(Files(folder).path(upload["id"], "thumbnail.jpg")) as image:
        assert image.height == 360


async def _height(path: Path) -> int:
    asked = "-select_streams", "v:0", "-show_entries", "stream=height", "-of", "json"
    process = await asyncio.create_subprocess_exec(
        "ffprobe", "-v", "error", *asked, path, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    height: int = json.loads(out)["streams"][0]["height"]
    return height


@needs_ffmpeg
async def test_what_is_no_video_says_so_and_reads_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "list").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/secret\n#EXT-X-ENDLIST\n")
    with pytest.raises(UnusableError, match="the video cannot be read: Invalid data"):
        await ffmpeg.transcode(tmp_path / "list", tmp_path / "part", 240, lambda _done, _total: None)


async def test_without_ffmpeg_a_worker_of_videos_does_not_start(
    rpcq_running: Running, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(Exception, match="videos need ffmpeg") as raised:
        async with rpcq_running(videos):
            pass
    assert ffmpeg.MISSING in str(raised.value)
    assert books.folder() == folder
