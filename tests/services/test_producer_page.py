"""The page of the producer in a real browser, used as people do."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import IO, Any

import pytest
from playwright.sync_api import Browser, Page, expect

from support.pages import MS, assert_fits, assert_legible, opened
from support.producers import Away, serving, told, worker
from support.programs import launched

PAINTED = """([id, name]) => {
  const probe = document.createElement('i');
  document.body.append(probe);
  probe.style.color = `var(--${name})`;
  const [r, g, b] = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
  probe.remove();
  const canvas = document.getElementById(id);
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const pixels = copy.getImageData(0, 0, canvas.width, canvas.height).data;
  let found = 0;
  for (let i = 0; i < pixels.length; i += 4)
    found += Math.abs(pixels[i] - r) + Math.abs(pixels[i + 1] - g) + Math.abs(pixels[i + 2] - b) < 12
      && pixels[i + 3] > 90;
  return found;
}"""
"""How many pixels of a canvas have one of the page's colours."""

WATCH = """() => {
  window.seen = new Set();
  new MutationObserver(() => window.seen.add(document.getElementById('matched').textContent))
    .observe(document.getElementById('matched'), { childList: true, characterData: true, subtree: true });
}"""


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with launched(chromium) as running:
        yield running


@pytest.fixture(scope="module")
def memory() -> Iterator[str]:
    with serving(None, "page") as base:
        yield base


@pytest.fixture(scope="module")
def rabbitmq(rabbitmq_url: str) -> Iterator[tuple[str, IO[str]]]:
    """The page with RabbitMQ and a worker: where it is, and what the worker tells."""
    namespace = f"t{secrets.token_hex(8)}"
    with worker(rabbitmq_url, namespace) as lines, serving(rabbitmq_url, namespace) as base:
        yield base, lines


def ask(page: Page, **values: object) -> None:
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
    page.keyboard.press("Enter")


def state(page: Page, text: str) -> None:
    expect(page.locator("#state")).to_contain_text(text, timeout=MS)


def connected(page: Page) -> None:
    expect(page.locator("#broker-text")).to_have_text("Broker connected", timeout=MS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_requests_are_sent_by_keyboard_alone_and_answers_seen_as_they_come(
    browser: Browser, memory: str, scheme: Any
) -> None:
    with opened(browser, memory, color_scheme=scheme) as page:
        connected(page)
        page.evaluate(WATCH)
        order = []
        for value in ("", "200", "20", "0.2", "30", "hello"):
            page.keyboard.press("Tab")
            focused = page.evaluate(
                "[document.activeElement.id, getComputedStyle(document.activeElement).outlineWidth]"
            )
            order.append(focused[0])
            assert focused[1] == "3px"
            if value:
                page.keyboard.press("ControlOrMeta+a")
                page.keyboard.type(value)
        assert order == ["", "requests", "concurrency", "delay", "timeout", "message"]
        page.keyboard.press("Enter")
        state(page, "Done: all 200 requests got their own answer")
        expect(page.locator("#matched")).to_have_text("200")  # drawn at the next frame, with the plots
        assert [page.text_content(f"#{it}") for it in ("sent", "matched", "mismatched", "errors")] == [
            "200",
            "200",
            "0",
            "0",
        ]
        assert any(0 < int(it) < 200 for it in page.evaluate("[...window.seen]"))
        assert "Consumer processed: hello 200" in page.locator("#answers").inner_text()
        for row in page.locator("#percentiles td").all_inner_texts():
            assert float(row) >= 50
        assert page.evaluate(PAINTED, ["latency", "mark"]) > 100
        assert page.evaluate(PAINTED, ["throughput", "mark"]) > 1000
        assert page.evaluate(PAINTED, ["latency", "quiet"]) > 50  # the labels of the axes
        assert_legible(page)


def test_ten_thousand_answers_are_all_counted_and_the_list_stays_short(browser: Browser, memory: str) -> None:
    with opened(browser, memory) as page:
        connected(page)
        ask(page, requests=10_000, concurrency=1000, delay=0)
        state(page, "Done: all 10,000 requests")
        expect(page.locator("#matched")).to_have_text("10,000")
        assert page.locator("#answers li").count() <= 60


def test_at_320_px_nothing_scrolls_sideways(browser: Browser, memory: str) -> None:
    with opened(browser, memory, viewport={"width": 320, "height": 640}) as page:
        connected(page)
        assert_fits(page)
        ask(page, requests="", message="")
        assert_fits(page)
        ask(page, requests=50, message="x" * 199)
        state(page, "Done")
        assert_fits(page)


def test_bad_input_is_said_at_its_field_and_nothing_is_sent(browser: Browser, memory: str) -> None:
    with opened(browser, memory) as page:
        connected(page)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        ask(page, concurrency=0, timeout=-1, message=" ")
        assert page.evaluate("document.activeElement.id") == "concurrency"
        expect(page.locator("#concurrency-error")).to_have_text("At once is a whole number from 1 to 1,000.")
        expect(page.locator("#timeout-error")).to_contain_text("Timeout is a number of seconds")
        expect(page.locator("#message-error")).to_contain_text("Message is a text")
        assert page.get_attribute("#concurrency", "aria-invalid") == "true"
        assert "concurrency-error" in str(page.get_attribute("#concurrency", "aria-describedby"))
        expect(page.locator("#requests-error")).to_be_empty()
        assert_legible(page)
        page.fill("#concurrency", "5")
        expect(page.locator("#concurrency-error")).to_be_empty()
        assert not [it for it in asked if "/stream" in it]


def test_sending_twice_starts_one_run(browser: Browser, memory: str) -> None:
    with opened(browser, memory) as page:
        connected(page)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        ask(page, requests=4, concurrency=1, delay=0.1)
        page.keyboard.press("Enter")
        page.click("#start", force=True)
        state(page, "Done: all 4 requests")
        assert len([it for it in asked if "/stream" in it]) == 1
        ask(page, requests=1)
        state(page, "Done: all 1 request got")


def test_who_wants_little_motion_gets_the_same_figures(browser: Browser, memory: str) -> None:
    with opened(browser, memory, reduced_motion="reduce") as page:
        connected(page)
        ask(page, requests=100, concurrency=20)
        state(page, "Done: all 100 requests")
        expect(page.locator("#matched")).to_have_text("100")
        assert page.evaluate("getComputedStyle(document.getElementById('start')).transitionDuration") == "0s"


def test_without_javascript_the_page_says_what_to_do(browser: Browser, memory: str) -> None:
    with opened(browser, memory, java_script_enabled=False) as page:
        expect(page.locator("main .note").first).to_be_visible()
        expect(page.locator("main .note").first).to_contain_text("needs JavaScript")


def test_what_failed_is_told_by_kind_in_words_and_in_the_plot(browser: Browser, rabbitmq: tuple[str, IO[str]]) -> None:
    with opened(browser, rabbitmq[0], color_scheme="dark") as page:
        connected(page)
        ask(page, requests=20, message="break")
        state(page, "0 matched, 20 errors")
        expect(page.locator("#kinds")).to_have_text("20 service failed")  # drawn with the plots
        expect(page.locator("#answers li").first).to_contain_text("Service failed (did it run: yes)")
        assert page.evaluate(PAINTED, ["latency", "bad"]) > 10
        ask(page, message="other")
        state(page, "20 mismatched")
        expect(page.locator("#mismatched")).to_have_text("20")  # drawn at the next frame, with the plots
        assert page.evaluate(PAINTED, ["latency", "odd"]) > 10
        assert_legible(page)


@pytest.mark.parametrize("how", ["Escape", "button", "leave"])
def test_a_run_that_is_stopped_cancels_its_handlers(browser: Browser, rabbitmq: tuple[str, IO[str]], how: str) -> None:
    base, lines = rabbitmq
    with opened(browser, base) as page:
        connected(page)
        ask(page, requests=20, concurrency=4, delay=60)
        assert [lines.readline().split()[0] for _ in range(4)] == ["began"] * 4
        expect(page.locator("#sent")).to_have_text("4")
        match how:
            case "Escape":
                page.keyboard.press("Escape")
            case "button":
                page.focus("#stop")
                page.keyboard.press("Enter")
            case _:
                page.goto(f"{base}/livez")
        assert [it.split()[0] for it in told(lines, cancelled=4)] == ["cancelled"] * 4
        if how != "leave":
            state(page, "Stopped after 0 answers; 4 under way were cancelled.")
            assert page.evaluate("document.activeElement.id") == ("start" if how == "button" else "delay")


def test_a_broker_that_is_away_is_said_in_words_and_once_it_is_back_all_works(
    browser: Browser, rabbitmq_url: str, namespace: str
) -> None:
    broker = Away(rabbitmq_url)
    with (
        serving(broker.url, namespace, "--with-worker") as base,
        opened(browser, base, viewport={"width": 320, "height": 640}) as page,
    ):
        expect(page.locator("#broker-text")).to_contain_text("The message broker cannot be reached.", timeout=MS)
        ask(page, requests=5)
        state(page, "The run failed.")
        expect(page.locator("#trouble")).to_contain_text("The broker is away.")
        assert str(broker.port) not in page.inner_text("body")
        assert_legible(page)
        assert_fits(page)
        with broker.back():
            connected(page)
            ask(page, requests=5)
            state(page, "Done: all 5 requests")
            expect(page.locator("#trouble")).to_be_hidden()
