"""The page of the uploads in a real browser, with RabbitMQ, ffmpeg and workers that are killed."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from support.examples import example
from support.pages import MS, assert_fits, assert_legible, opened

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]  # of the first one, with the start of all programs

DONE = re.compile(r"all there, and its user knows")


@pytest.fixture(scope="module")
def base(vhost: str, ffmpeg: str) -> Iterator[str]:
    with example("media", vhost, f"t{secrets.token_hex(8)}") as where:
        yield where


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Files of a user."""
    places = [tmp_path / f"cat-{number}.png" for number in range(2)]
    for number, place in enumerate(places):
        Image.effect_noise((300, 200), 20 + number).save(place)
    return places


def served(page: Page) -> None:
    """Wait until the workers have declared their queues: the app can say then how deep they are."""
    for service in ("pictures", "videos", "notices"):
        expect(page.locator(f"#service-{service} td").first).not_to_have_text("?", timeout=2 * MS)


def upload(page: Page, name: str) -> Locator:
    return page.locator("#uploads > li", has=page.locator("h3", has_text=name))


def step(page: Page, name: str, of: str) -> Locator:
    return upload(page, of).locator(f"[data-step='{name}'] > :last-child")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_picture_is_made_and_its_files_are_reached_by_keyboard_alone(
    browser: Browser, base: str, scheme: Any
) -> None:
    with opened(browser, base, color_scheme=scheme) as page:
        served(page)
        order = []
        for _ in range(4):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
            assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
            if order[-1] == "Make me a picture":
                before = page.locator("#uploads > li").count()
                page.keyboard.press("Enter")
        assert order == ["file", "Make me a picture", "Make me a video", "ten"]
        expect(page.locator("#uploads > li")).to_have_count(before + 1, timeout=MS)
        expect(page.locator("#uploads > li h3").first).to_have_text(DONE, timeout=2 * MS)
        link = page.locator("#uploads > li a").first
        for _ in range(20):
            page.keyboard.press("Tab")
            if link.evaluate("it => it === document.activeElement"):
                break
        assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("resize of sample-")
        got = page.request.get(f"{base}{link.get_attribute('href')}")
        assert (got.status, got.headers["content-type"]) == (200, "image/jpeg")
        expect(page.locator("#uploads > li img").first).to_have_js_property("complete", value=True)
        assert page.locator("#uploads > li img").first.evaluate("it => it.naturalWidth") > 0
        assert_legible(page)


def test_files_are_chosen_and_dropped_and_what_is_no_picture_is_refused(
    browser: Browser, base: str, pictures: list[Path], tmp_path: Path
) -> None:
    with opened(browser, base) as page:
        served(page)
        page.set_input_files("#file", pictures[0])
        expect(upload(page, "cat-0.png").locator("h3")).to_have_text(DONE, timeout=2 * MS)
        content = list(pictures[1].read_bytes())
        page.evaluate(
            """([content, name]) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(content)], name));
                document.getElementById("drop").dispatchEvent(
                    new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
            }""",
            [content, "cat-1.png"],
        )
        expect(upload(page, "cat-1.png").locator("h3")).to_have_text(DONE, timeout=2 * MS)
    page = browser.new_page()  # its console says that a request was refused
    page.goto(base)
    (tmp_path / "cat.jpg").write_text("This is a text.")
    page.set_input_files("#file", tmp_path / "cat.jpg")
    expect(page.locator("#trouble")).to_contain_text("cat.jpg was not uploaded. This is no picture", timeout=MS)
    page.close()


def test_a_video_shows_its_progress_and_has_all_its_files(browser: Browser, base: str) -> None:
    with opened(browser, base) as page:
        served(page)
        page.click("[data-sample=video]")
        video = page.locator("#uploads > li", has=page.locator("[data-step='720p']")).first
        expect(video.locator("[data-step='720p'] > :last-child")).to_have_text(
            re.compile(r"worker \d+: \d+ %"), timeout=3 * MS
        )
        expect(video.locator("h3")).to_have_text(DONE, timeout=5 * MS)
        assert [link.get_attribute("href").rpartition("/")[2] for link in video.locator("a").all()] == [  # type: ignore[union-attr]
            "thumbnail.jpg",
            "720p.mp4",
            "480p.mp4",
            "240p.mp4",
        ]


def test_a_step_that_fails_is_a_dead_letter_and_is_replayed_alone(
    browser: Browser, base: str, pictures: list[Path]
) -> None:
    place = pictures[0].rename(pictures[0].with_name("dog.png"))
    with opened(browser, base) as page:
        served(page)
        page.click("#fault-watermark")
        expect(page.locator("#fault-watermark")).to_have_text("watermark: fails", timeout=MS)
        page.set_input_files("#file", place)
        expect(step(page, "watermark", "dog.png")).to_contain_text(
            "given up: watermark is made to fail", timeout=3 * MS
        )
        expect(upload(page, "dog.png").locator("h3")).to_contain_text("2 of 3 files are there")
        page.click("#fault-watermark")
        expect(page.locator("#fault-watermark")).to_have_text("watermark: works", timeout=MS)
        page.click("button[aria-label='Replay pictures.watermark']")
        expect(upload(page, "dog.png").locator("h3")).to_have_text(DONE, timeout=2 * MS)
        expect(step(page, "watermark", "dog.png")).to_contain_text("after 5 runs")
        expect(page.locator("#dead")).to_have_text("0 dead letters.", timeout=MS)


def test_steps_wait_while_all_workers_are_dead_and_nothing_scrolls_sideways(
    browser: Browser, base: str, pictures: list[Path]
) -> None:
    place = pictures[0].rename(pictures[0].with_name("owl.png"))
    with opened(browser, base, viewport={"width": 320, "height": 640}) as page:
        served(page)
        for left in (1, 0):
            page.click("button[aria-label='Kill a worker of pictures']")
            expect(page.locator("#service-pictures td").nth(1)).to_have_text(str(left), timeout=MS)
        page.set_input_files("#file", place)
        expect(step(page, "resize", "owl.png")).to_have_text("waits for a worker", timeout=MS)
        expect(page.locator("#service-pictures td").first).to_have_text("3", timeout=MS)
        assert_fits(page)
        page.click("button[aria-label='Start a worker of pictures']")
        expect(upload(page, "owl.png").locator("h3")).to_have_text(DONE, timeout=3 * MS)
        assert_fits(page)


def test_without_javascript_the_page_says_what_it_needs(browser: Browser, base: str) -> None:
    with opened(browser, base, java_script_enabled=False) as page:
        expect(page.locator("noscript .note")).to_be_visible()


def test_without_ffmpeg_the_page_says_so_and_pictures_work(
    browser: Browser, vhost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        example("media", vhost, f"t{secrets.token_hex(8)}") as where,
        opened(browser, where) as page,
    ):
        expect(page.locator("#no-videos")).to_contain_text(
            "Videos need ffmpeg, which is not installed here", timeout=MS
        )
        expect(page.locator("[data-sample=video]")).to_be_disabled()
        page.click("[data-sample=picture]")
        expect(page.locator("#uploads > li h3").first).to_have_text(DONE, timeout=3 * MS)
