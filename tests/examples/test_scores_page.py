"""The page of the scores in a real browser, with RabbitMQ and workers that are killed."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from support.examples import example
from support.pages import MS, assert_fits, assert_legible, opened

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]  # of the first one, with the start of all programs


@pytest.fixture(scope="module")
def base(vhost: str) -> Iterator[str]:
    with example("scores", vhost, f"t{secrets.token_hex(8)}", "--workers", "1") as where:
        yield where


def lane(page: Page, name: str, column: int) -> Any:
    return page.locator(f"#lane-{name} > :nth-child({column})")


def served(page: Page) -> None:
    """Wait until a worker has declared the queues: the app can say then how deep they are."""
    expect(page.locator("#dead")).to_have_text("0 dead letters.", timeout=MS)


def look(page: Page, product: str) -> None:
    page.select_option("#product", product)
    page.click("#look button.main")


@pytest.mark.parametrize(("scheme", "product"), [("light", "Phone, from Peru"), ("dark", "Phone, from Poland")])
def test_a_product_is_looked_at_by_keyboard_alone(browser: Browser, base: str, scheme: Any, product: str) -> None:
    with opened(browser, base, color_scheme=scheme) as page:
        served(page)
        order = []
        for _ in range(7):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
            assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
            if order[-1] == "product":
                page.keyboard.type(product)
            elif order[-1] == "Look":
                page.keyboard.press("Enter")
        assert order[:6] == ["product", "Look", "visitors", "renew", "kill", "start"]
        expect(page.locator("#looked")).to_contain_text(
            re.compile(rf"^{product}: grade [A-E], [\d.]+ kg CO₂e \(.+\)\. It took"), timeout=MS
        )
        assert_legible(page, 100)


def test_a_flood_in_low_does_not_hold_up_who_looks_at_a_product(browser: Browser, base: str) -> None:
    with opened(browser, base) as page:
        served(page)
        page.click("#renew")
        expect(page.locator("#flood")).to_contain_text("A flood of", timeout=MS)
        look(page, "tomatoes-vietnam")  # the last one of the flood
        expect(page.locator("#looked")).to_contain_text("It took", timeout=MS)
        assert int(lane(page, "low", 2).inner_text()) > 20
        row = page.locator("#products tr", has_text="Tomatoes, 1 kg, from Vietnam")
        expect(row.locator("td").first).to_have_text("done")
        expect(page.locator("#flood")).to_contain_text("Who looked at a product in the last minute waited")
        assert_legible(page, 100)


@pytest.mark.long
@pytest.mark.timeout(180)
def test_jobs_wait_while_no_worker_runs_and_none_is_lost(browser: Browser, base: str) -> None:
    with opened(browser, base) as page:
        served(page)
        page.click("#kill")
        expect(page.locator("#workers")).to_have_text("0 workers: none, so that jobs wait.", timeout=MS)
        page.click("#renew")
        look(page, "bicycle-italy")
        page.click("#start")
        expect(page.locator("#workers")).to_contain_text("1 worker: ", timeout=MS)
        expect(page.locator("#looked")).to_contain_text(re.compile("Bicycle, from Italy: grade"), timeout=MS)
        page.click("#visitors")
        expect(page.locator("#visitors")).to_have_attribute("aria-pressed", "true")
        expect(lane(page, "high", 3)).not_to_have_text("0", timeout=MS)
        page.click("#visitors")
        expect(page.locator("#progress")).to_contain_text("Of 120 products, 120 done, 0 queued", timeout=6 * MS)
        expect(page.locator("#flood")).to_contain_text("No flood: low is empty.", timeout=MS)
        expect(page.locator("#dead")).to_have_text("0 dead letters.")


def test_at_320_px_nothing_scrolls_sideways(browser: Browser, base: str) -> None:
    with opened(browser, base, viewport={"width": 320, "height": 640}) as page:
        served(page)
        look(page, "running-shoes-germany")
        expect(page.locator("#looked")).to_contain_text("grade", timeout=MS)
        assert_fits(page)


def test_without_javascript_the_page_says_what_it_needs(browser: Browser, base: str) -> None:
    with opened(browser, base, java_script_enabled=False) as page:
        expect(page.locator("noscript .note")).to_be_visible()
